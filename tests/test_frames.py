"""Tables of a report are frames of raw values first; Markdown and CSV show one and the same frame."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pandas as pd
import pytest
from report_fixture import block_diffusion, quality_run, speed_run

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


REPORT = Path(report.__file__).parent
GIVEN = {
    "checkpoints",
    "documents",
    "flips",
    "forwards",
    "latency",
    "other_scores",
    "retention",
    "retention_members",
    "scoring",
    "speed",
    "token_counts",
    "verdicts",
}


@pytest.mark.parametrize("file", sorted(file.name for file in REPORT.glob("*.py") if file.name != "rendering.py"))
def test_no_section_builds_a_table_by_hand(file: str) -> None:
    """Tables were lists of texts, made apart from the CSV files of the same numbers."""
    tree = ast.parse((REPORT / file).read_text(encoding="utf-8"))
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [node.lineno for node in texts if "| " in node.value or " |" in node.value]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [node.lineno for node in calls if node.func.id == "table"], "a section gives a frame to markdown()"


def rows_below(shown: str, header: str) -> list[list[str]]:
    """The cells of the first table that has these columns beside each other."""
    below = shown.partition(f"| {header}")[2].split("\n\n")[0].splitlines()[2:]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in below]


@pytest.fixture(scope="module")
def shown_and_tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, pd.DataFrame]]:
    """A report of scored and timed runs, a group among the tasks and some prompts cut; and its CSV files."""
    root = tmp_path_factory.mktemp("tables")
    decoders = [block_diffusion(threshold=0.8), block_diffusion(threshold=0.9)]
    runs = [
        quality_run(root, decoders=decoders, cut={("candidate", "words_en"): 3}),
        speed_run(root, decoders=decoders, scored=True, num_rounds=4, num_calls=3),
    ]
    folder = report.write(runs, root / "reports", claims="miniature", csv=True)
    tables = {file.stem: pd.read_csv(file) for file in (folder / "tables").iterdir()}
    return (folder / "report.md").read_text(encoding="utf-8"), tables


def test_the_task_table_shows_the_rows_of_its_csv_files(shown_and_tables) -> None:
    """Tasks and averages are those of retention.csv, members of groups those of retention_members.csv."""
    shown, tables = shown_and_tables
    below = rows_below(shown, "task | retention")
    frame, members = tables["retention"], tables["retention_members"]
    of_first = frame[frame["measurement"] == frame["measurement"].iloc[0]]
    tasks = of_first[of_first["level"] == "task"]
    assert len(below) == len(tasks) + len(members[members["measurement"] == of_first["measurement"].iloc[0]]) + 2
    named = {cells[0].partition(" (")[0].removeprefix(f"{NONE} "): cells for cells in below}
    for row in tasks.to_dict("records"):
        cells = " ".join(named[row["task"]])
        assert f"{100 * row['baseline_mean']:.1f} %" in cells
        assert f"{100 * row['candidate_mean']:.1f} %" in cells
        assert f"{row['num_lost']:.0f} / {row['num_gained']:.0f} (" in cells
    for row in members[members["measurement"] == of_first["measurement"].iloc[0]].to_dict("records"):
        assert f"{100 * row['candidate_mean']:.1f} %" in " ".join(named[row["task"]])
        assert row["group"] in set(tasks["task"])
    [headline] = of_first[of_first["task"] == "(headline)"].to_dict("records")
    assert f"**{100 * headline['baseline_mean']:.1f} %**" in named["**headline**"]
    assert headline["baseline_mean"] == pytest.approx(tasks["baseline_mean"].mean())
    assert headline["num_tasks"] == len(tasks)


@pytest.mark.parametrize(
    ("header", "table", "column", "at", "form"),
    [
        ("workload | batch | n ", "latency", "num_prompts", 3, "{:,.0f}"),
        ("workload | batch | prompts timed", "token_counts", "num_tokens", 10, "{:,.0f}"),
        ("workload | batch | prompts timed", "token_counts", "tokens_per_forward", 7, "{:.2f}"),
        ("checkpoint | arm", "checkpoints", "sha256", 5, "`{}`"),
        ("claim | verdict |", "verdicts", "verdict", 1, "**{}**"),
        ("task | scored by | metric (filter) | candidate's", "scoring", "task", 0, "{}"),
    ],
)
def test_a_shown_column_is_that_of_the_csv_file(shown_and_tables, header, table, column, at, form) -> None:
    shown, tables = shown_and_tables
    below = rows_below(shown, header)
    assert below, header
    wanted = [form.format(value) for value in tables[table][column]][: len(below)]
    found = [cells[at] for cells in below]
    assert (sorted(found) if table == "scoring" else found) == (sorted(wanted) if table == "scoring" else wanted)


def test_tables_are_given_for_sections_that_are_not_shown(tmp_path: Path, shown_and_tables) -> None:
    """CSV files do not depend on what is shown of the runs."""
    _, tables = shown_and_tables
    assert tables.keys() >= GIVEN
    run = quality_run(tmp_path)
    every, one = (
        report.write([run], tmp_path / name, sections=sections, csv=True)
        for name, sections in (("every", None), ("one", ["scoring"]))
    )
    of_all, of_one = ({f.name: f.read_bytes() for f in (folder / "tables").iterdir()} for folder in (every, one))
    assert of_all == of_one
