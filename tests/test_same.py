"""Quality and speed of one thing: what forbids to take two runs for the halves of one claim."""

import dataclasses
from collections.abc import Callable

import pytest
from report_fixture import quality_run, speed_run
from test_claims_judge import BOTH, FAST, KEPT, claims_of

from twotower_eval import store
from twotower_eval.claims import judge
from twotower_eval.evidence import Runs
from twotower_eval.records import Cell
from twotower_eval.store import Run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A quality run and a scored speed run of one thing."""
    root = tmp_path_factory.mktemp("good")
    return [store.load(quality_run(root)), store.load(speed_run(root, scored=True))]


def with_cells(run: Run, change: Callable[[Cell], Cell]) -> Run:
    """The run as if its cells had been others; ids stay, so that rows find theirs."""
    cells = tuple(change(cell) for cell in run.manifest.cells)
    return dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, cells=cells))


def in_dtype(run: Run, dtype: str) -> Run:
    return with_cells(
        run, lambda cell: dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, dtype=dtype))
    )


def test_float32_quality_and_bfloat16_speed_are_of_two_points(good: list[Run]) -> None:
    """They were joined: a point had no dtype, and "keeps 95 % at 1.4x" was said of numbers that nothing had both of."""
    apart = [good[0], in_dtype(good[1], "bfloat16")]
    kept, _, both = judge(claims_of(KEPT, FAST, BOTH), apart)
    assert kept.outcome == "SUPPORTED"
    assert both.outcome != "SUPPORTED"
    runs = Runs(apart)
    assert {key.dtype for key in runs.points} == {"float32", "bfloat16"}
    assert len(runs.points) == 2
    assert {runs.name(cell).partition(":")[0] for cell in runs.points.values()} == {"float32", "bfloat16"}
    assert not any(panel for panel in runs.trade_offs if not panel.same_outputs)


def test_in_one_dtype_a_point_is_named_without_it(good: list[Run]) -> None:
    runs = Runs([in_dtype(run, "bfloat16") for run in good])
    assert [runs.name(cell) for cell in runs.points.values()] == ["block 16, 16 steps, threshold 0.8"]
