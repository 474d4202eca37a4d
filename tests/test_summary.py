"""The tables at the end of verbs: the numbers of the report, on standard error, plain where nobody looks."""

import io
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made
from test_report_alone import scored

import twotower_eval as tt
from twotower_eval import store
from twotower_eval.analyse.compare.points import checkpoint_name
from twotower_eval.analyse.report.text import rate, retention, significant, times
from twotower_eval.api.summary import Table
from twotower_eval.cli import main
from twotower_eval.cli.tables import show
from twotower_eval.errors import UserError

SMALL: dict[str, Any] = {"num_docs": 40, "tasks": ("arithmetic", "choice"), "perplexity": False}
TIMED: dict[str, Any] = {"num_rounds": 4, "num_calls": 3}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("both")
    return made.quality_run(out, **SMALL), made.speed_run(out, **TIMED)


def by_title(tables: tuple[Table, ...], start: str) -> Table:
    return next(table for table in tables if table.title.startswith(start))


def test_the_tables_hold_what_the_comparison_holds(both: tuple[Path, Path]) -> None:
    compared = tt.compare(*both)
    point = compared.first
    assert point is not None
    assert point.quality is not None
    assert point.speed is not None
    quality = by_title(compared.tables, "Quality at block 16")
    names = [checkpoint_name(cell.checkpoint) for cell in (point.quality.candidate, point.quality.baseline)]
    assert f": {' against '.join(names)} (" in quality.title
    assert quality.header == ("task", "n", "baseline", "candidate", "retention [95 %]")
    assert [row[0] for row in quality.rows] == ["arithmetic", "choice", "mean of 2 tasks"]
    for task, row in zip(point.quality.tasks, quality.rows, strict=False):
        numbers = (significant(task.baseline, 4), significant(task.candidate, 4))
        assert row[1:] == ("40", *numbers, retention(task.retention))
    assert quality.rows[-1][4] == retention(point.quality.headline)
    speed = by_title(compared.tables, "Speed")
    [row] = speed.rows
    named = dict(zip(speed.header, row, strict=True))
    assert named["speedup [95 %]"].removesuffix(" INVALID") == times(point.speed.time)
    assert named["speedup [95 %]"].endswith("INVALID") == point.invalid
    assert named["A/A null [99 %]"] == times(point.speed.null)
    for header, arms in {
        "useful tokens/s": (point.speed.baseline_rate, point.speed.candidate_rate),
        "answers/s": (point.speed.baseline_answers, point.speed.candidate_answers),
    }.items():
        assert named[header] == " / ".join(rate(arm).partition(" [")[0] for arm in arms)


def test_several_points_are_listed_with_their_retention(tmp_path: Path) -> None:
    decoders = [made.block_diffusion(threshold=threshold) for threshold in (0.8, 0.9)]
    run = tt.load_run(made.quality_run(tmp_path, decoders=decoders, **SMALL))
    table = by_title(run.tables, "All operating points")
    assert [row[0] for row in table.rows] == [f"block 16, 16 steps, threshold {number}" for number in ("0.8", "0.9")]


def test_one_model_alone_has_a_table_of_scores(tmp_path: Path) -> None:
    [table] = tt.load_run(scored(tmp_path)).tables
    assert table.title == "Scores"
    assert [row[0] for row in table.rows[:2]] == ["arithmetic", "sorting"]
    assert "[" in table.rows[0][-1]


def test_the_path_alone_is_on_standard_output(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *map(str, both), "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert Path(told.out.strip()).name == "report.md"
    assert told.out.count("\n") == 1
    assert "mean of 2 tasks" in told.err
    assert "A/A null [99 %]" in told.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_boxes_and_a_pipe_plain_columns() -> None:
    table = Table(title="Quality [bold]", header=("task", "n"), rows=(("sorting", "8"), ("all", "1,200")))
    terminal, pipe = Terminal(), io.StringIO()
    show(lambda: [table], terminal)
    show(lambda: [table], pipe)
    assert "━" in terminal.getvalue() or "─" in terminal.getvalue()
    assert "Quality [bold]" in terminal.getvalue(), "no text of ours is taken for markup"
    assert pipe.getvalue() == "Quality [bold]\ntask         n\nsorting      8\nall      1,200\n"


def test_runs_that_cannot_be_compared_leave_one_line() -> None:
    def refuse() -> tuple[Table, ...]:
        raise UserError("the arms are no pair")

    pipe = io.StringIO()
    show(refuse, pipe)
    assert pipe.getvalue() == "no summary: the arms are no pair\n"


def test_a_run_without_scores_has_no_tables(tmp_path: Path) -> None:
    path = made.write(tmp_path, made.manifest("20261101T120000Z-verify-000001", "verify", ()), ())
    assert store.load(path).scores == []
    assert tt.load_run(path).tables == ()
