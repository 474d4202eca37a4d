"""The parts of decoding: timed in the rounds, journalled, joined with counts; residuals, break-even of known truth."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from report_fixture import PAIR, block_diffusion, make_cell, speed_run, write
from tiny_pair import write_pair

from twotower_eval import cli, store
from twotower_eval.analyse.compare import Runs
from twotower_eval.analyse.compare.calls import Lane
from twotower_eval.analyse.compare.costs import costs
from twotower_eval.measure import speed, suites
from twotower_eval.measure.speed.costs import REPEATS
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import Cell, CostSample, SpeedSample
from twotower_eval.store import Run

PREFILL_S, AR_S, DENOISE_S, CONTEXT_S = 0.010, 0.004, 0.006, 0.005
TASKS = ("miniature_sort", "miniature_recall")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def timed(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    plan = SpeedPlan(
        model=str(pair), tasks=TASKS, block_sizes=(4, 8), thresholds=(0.1, 0.9), batch_sizes=(1, 2), num_prompts=4,
        new_tokens=6, min_rounds=3,
    )  # fmt: skip
    requests = suites.build_requests(suites.resolve_tasks(TASKS))
    return store.load(speed.run(plan, requests, root=tmp_path_factory.mktemp("results")))


def test_every_round_times_every_part_once_for_each_block_size(timed: store.Run) -> None:
    """Thresholds cost the same and are not timed again; what no call did (6 tokens: no block of 8 is absorbed) is not
    timed either; passes of a batch are timed over as many rows as were seen."""
    rounds = {(sample.phase, sample.round) for sample in timed.speed if sample.phase != "probe"}
    assert {(cost.phase, cost.round) for cost in timed.costs} == rounds
    for phase, number in rounds:
        for size in (1, 2):
            cells = {id for id, cell in timed.cells.items() if cell.workload.batch_size == size}
            here = [c for c in timed.costs if (c.phase, c.round) == (phase, number) and c.cell in cells]
            here = [c for c in here if c.batch_size == size]
            arms = Counter((timed.cells[c.cell].arm, c.part, c.block_size) for c in here)
            assert arms.pop(("baseline", "prefill", None)) == arms.pop(("candidate", "prefill", None)) > 0
            assert arms.pop(("baseline", "bookkeeping", None)) == 1
            assert arms == {
                ("baseline", "ar_step", None): 3, ("candidate", "denoise", 4): 3, ("candidate", "denoise", 8): 3,
                ("candidate", "context_pass", 4): 3,
            }  # fmt: skip
    assert all(cost.num_repeats == REPEATS[cost.part] and cost.wall_s > 0 for cost in timed.costs)


def test_parts_span_the_contexts_of_the_workload_so_that_nothing_is_extrapolated(timed: store.Run) -> None:
    for point in Runs([timed]).speed:
        for arm in (point.costs.baseline, point.costs.candidate):
            assert arm.reason is None
            assert arm.prediction is not None
            assert arm.prediction.share_beyond == 0
            assert arm.explanation is not None
        assert point.costs.break_even.estimate is not None
        assert point.costs.tokens_per_nfe is not None


def test_no_costs_leaves_them_out_and_says_so(pair: Path, tmp_path: Path) -> None:
    arguments = ["speed", "--model", str(pair), "--tasks", "miniature_sort", "--num-prompts", "1", "--min-rounds", "1"]
    arguments += ["--workload", "fixed", "--new-tokens", "3", "--warmup-rounds", "0", "--no-costs"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    run = store.load(store.find_runs(tmp_path)[0])
    assert run.costs == []
    (point,) = Runs([run]).speed
    assert point.costs.candidate.reason == "the parts of decoding were not timed alone"
    assert point.costs.break_even.estimate is None


def test_out_of_memory_while_a_part_is_timed_is_one_clear_line(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("twotower_eval.measure.speed.costs.denoise", burst)
    plan = SpeedPlan(model=str(pair), tasks=("miniature_sort",), num_prompts=1, new_tokens=3, workload="fixed")
    requests = suites.build_requests(suites.resolve_tasks(("miniature_sort",)))
    with pytest.raises(ValueError, match=r"denoise at .* batch size 1: out of memory: .*--no-costs"):
        speed.run(plan, requests, root=tmp_path)


def known(tmp_path: Path, *, other_s: float = 0.0, batch_size: int = 1) -> store.Run:
    """A run whose calls take exactly what their parts take, and ``other_s`` a call; costs twice as dear in round 1."""
    made = store.load(speed_run(tmp_path / "made", batch_sizes=(batch_size,), num_rounds=6))
    rows: list[Any] = []
    for sample in made.speed:
        pace = 2.0 if sample.round == 1 else 1.0
        rows.append(dataclasses.replace(sample, wall_s=other_s + pace * truth(sample)))
    by_arm = {cell.arm: cell for cell in made.manifest.cells}
    for number in range(6):
        for arm, part, block, seconds in (
            ("baseline", "prefill", None, PREFILL_S), ("baseline", "ar_step", None, AR_S),
            ("candidate", "prefill", None, PREFILL_S), ("candidate", "denoise", 16, DENOISE_S),
            ("candidate", "context_pass", 16, CONTEXT_S),
        ):  # fmt: skip
            for tokens in (5, 200):
                cost = CostSample(
                    cell=by_arm[arm].id, launch_id="x/1", round=number, phase="measure", part=part, replica=0,
                    batch_size=batch_size, context_tokens=tokens, block_size=block, num_repeats=4,
                    wall_s=4 * seconds * (2.0 if number == 1 else 1.0), started_at="t",
                )  # fmt: skip
                rows.append(cost)
    return store.load(write(tmp_path / "known", made.manifest, rows))


def truth(sample: SpeedSample) -> float:
    steps = max(prompt.num_context_forwards for prompt in sample.prompts) - 1
    passes = max(prompt.num_denoiser_forwards for prompt in sample.prompts)
    if not passes:
        return PREFILL_S + steps * AR_S
    return PREFILL_S + passes * DENOISE_S + steps * CONTEXT_S


@pytest.mark.parametrize("batch_size", [1, 2])
def test_times_that_are_sums_of_their_parts_are_explained_without_residual(tmp_path: Path, batch_size: int) -> None:
    (point,) = Runs([known(tmp_path, batch_size=batch_size)]).speed
    for arm in (point.costs.baseline, point.costs.candidate):
        assert arm.explanation is not None
        assert arm.explanation.residual == pytest.approx(0, abs=1e-9)
        assert arm.explanation.explained
    estimate = point.costs.break_even.estimate
    assert estimate is not None
    blocks = point.counts.num_context_forwards - point.counts.num_prompts
    expected = (DENOISE_S + CONTEXT_S * blocks / point.counts.num_denoiser_forwards) / AR_S
    # Every round is its own ratio, so that the dear round does not move it.
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(expected),) * 3
    assert estimate.n == 6
    assert point.costs.tokens_per_nfe == point.counts.tokens_per_nfe


def test_time_that_no_part_has_stays_unexplained(tmp_path: Path) -> None:
    (point,) = Runs([known(tmp_path, other_s=0.5)]).speed
    explanation = point.costs.candidate.explanation
    assert explanation is not None
    assert not explanation.explained
    assert explanation.residual == pytest.approx(
        (explanation.measured_s - explanation.predicted_s) / explanation.measured_s
    )
    assert explanation.residual > 0.5


def lane(run: Run, cell: Cell, samples: list[SpeedSample]) -> Lane:
    return Lane(runs=[run], cell=cell, rounds=[("l", 0)], samples_RC=[samples])


def test_a_decoder_without_blocks_has_no_break_even_and_no_prediction(tmp_path: Path) -> None:
    run = known(tmp_path)
    sample = next(s for s in run.speed if run.cells[s.cell].arm == "candidate")
    workload = next(cell.workload for cell in run.manifest.cells)
    mock = make_cell("candidate", dataclasses.replace(block_diffusion(), kind="mock_ar", params={}), workload)
    baseline = next(cell for cell in run.manifest.cells if cell.arm == "baseline")
    found = costs(lane(run, baseline, [sample]), lane(run, mock, [sample]))
    assert found.candidate.reason == "this decoder has no blocks, and no parts of its own were timed"
    assert found.break_even.reason == "the candidate denoises no blocks, so there is no break-even"


def test_costs_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    run = known(tmp_path)
    other = dataclasses.replace(PAIR, digest="other")
    candidate = next(cell for cell in run.manifest.cells if cell.arm == "candidate")
    baseline = next(cell for cell in run.manifest.cells if cell.arm == "baseline")
    samples = [s for s in run.speed if s.cell == candidate.id]
    unlike = dataclasses.replace(candidate, checkpoint=other)
    found = costs(lane(run, baseline, samples), lane(run, unlike, samples))
    assert found.candidate.reason == "the parts of decoding were not timed alone"
