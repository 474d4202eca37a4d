"""Tables of a report are frames of raw values first; Markdown and CSV show one and the same frame."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
from report_fixture import quality_run, speed_run

from twotower_eval.analyse import report
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.report.rendering import (
    Column,
    csv,
    frame_of,
    interval,
    markdown,
    measured_at,
    raw_rows,
    share,
    speedup_or_invalid,
    whole,
    words,
)
from twotower_eval.analyse.report.text import NONE, Section, measured_columns, retention, times
from twotower_eval.records import Estimate

KEPT = Measured(estimate=Estimate(value=0.9123456, low=0.88, high=0.941, level=0.95, n=9, method="by hand"))
MISSING = Measured(estimate=None, reason="one round only")
ROWS = [
    {"name": "a_b *c*", "n": 1234, "share": None, "invalid": True, **measured_columns("kept", KEPT)},
    {"name": "d", "n": None, "share": 0.5, "invalid": False, **measured_columns("kept", MISSING)},
]


def test_one_frame_is_shown_as_markdown_and_as_csv() -> None:
    frame = frame_of(ROWS)
    columns = [
        Column(header="name", show=words("name")),
        Column(header="kept [95 %]", show=interval("kept", retention)),
        Column(header="times", show=speedup_or_invalid("kept"), text=True),
        Column(header="share", show=share("share")),
    ]
    assert markdown(frame, columns).splitlines() == [
        "| name | kept [95 %] | times | share |",
        "| :-- | --: | :-- | --: |",
        f"| a_b \\*c\\* | 91.2 % [88.0, 94.1] | 0.912x [0.880, 0.941] **INVALID** | {NONE} |".replace(
            "0.912x [0.880, 0.941]", times(KEPT)
        ),
        f"| d | {NONE} | {NONE} | 50.0 % |",
    ]
    again = pd.read_csv(io.BytesIO(csv(frame)))
    assert again["kept"][0] == 0.9123456
    assert again["kept_missing_reason"][1] == "one round only"
    assert whole("n")(raw_rows(frame)[0]) == "1,234"


def test_an_estimate_comes_out_of_a_frame_as_it_went_in() -> None:
    there, missing = (measured_at(row, "kept") for row in raw_rows(frame_of(ROWS)))
    assert there.estimate is not None
    assert KEPT.estimate is not None
    for end in ("value", "low", "high", "level"):
        assert getattr(there.estimate, end) == getattr(KEPT.estimate, end)
    assert missing == MISSING


def mine(_: object) -> Section:
    return Section(title="Mine", markdown="text", tables={"mine": frame_of(ROWS), "empty": frame_of([])})


def twice(_: object) -> Section:
    return Section(title="Twice", markdown="text", tables={"speed": frame_of(ROWS)})


def no_frame(_: object) -> Section:
    return Section(title="No frame", markdown="text", tables={"rows": ROWS})  # type: ignore[dict-item]


def elsewhere(_: object) -> Section:
    return Section(title="Elsewhere", markdown="text", tables={"../rows": frame_of(ROWS)})


def test_a_section_of_ones_own_gives_tables_as_well(tmp_path: Path) -> None:
    """Sections could give Markdown and files alone, so that their tables had no CSV."""
    run = quality_run(tmp_path)
    name = f"{__name__}:mine"
    folder = report.write([run], tmp_path / "with", sections=[name], csv=True)
    assert (folder / "tables" / "mine.csv").read_bytes() == csv(frame_of(ROWS))
    assert not (folder / "tables" / "empty.csv").exists()
    without = report.write([run], tmp_path / "without", sections=[name])
    assert not (without / "tables").exists()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("twice", "two tables of the report are tables/speed.csv"),
        ("no_frame", "its table 'rows' is a list, not a pandas DataFrame"),
        ("elsewhere", "its tables hold '../rows', which is no name of a file"),
    ],
)
def test_tables_that_cannot_be_are_one_line(tmp_path: Path, section: str, words: str) -> None:
    run = speed_run(tmp_path, num_rounds=3, num_calls=2)
    with pytest.raises(ValueError, match=words):
        report.write([run], tmp_path / "reports", sections=["claims", f"{__name__}:{section}"], csv=True)


def test_the_shown_tables_are_the_frames(tmp_path: Path) -> None:
    """Gates, averages of retention and the points of the picture had no CSV: their rows were texts from the start."""
    folder = report.write([quality_run(tmp_path), speed_run(tmp_path, scored=True)], tmp_path / "reports", csv=True)
    tables = {file.stem: pd.read_csv(file) for file in (folder / "tables").iterdir()}
    shown = (folder / "report.md").read_text(encoding="utf-8")
    assert {"gates", "degenerate_outputs", "retention_points", "tradeoff", "speed"} <= tables.keys()
    section = shown.partition("## Gates")[2].partition("\n\n")[2].partition("\n\n")[0].split("\n| ")
    assert len(tables["gates"]) == len([line for line in section if line.endswith("` |")])
    assert set(tables["gates"]["outcome"]) <= {"passed", "failed", "not_checked", "slower"}
    kept = tables["retention_points"].iloc[0]
    assert f"{100 * kept['headline']:.1f}" in shown
    point = tables["tradeoff"].iloc[0]
    assert point["time_speedup"] == tables["speed"]["time_speedup"][0]
    assert point["number"] == 1
