"""The residual between measured and predicted time is a gate: who is faster than his own forwards is INVALID."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixture import speed_run, write
from test_claims_judge import FAST, claims_of

from twotower_eval import store
from twotower_eval.analyse import stats
from twotower_eval.analyse.claims import judge, verdict_lines
from twotower_eval.analyse.compare import Runs, SpeedPoint, gates
from twotower_eval.analyse.compare.costs import NOT_COUNTED
from twotower_eval.analyse.words import found_text
from twotower_eval.records import Arm, CostPart, CostSample, Estimate, GateLimits, Passes, SpeedSample

Factor = Callable[[Arm, SpeedSample], float]
PARTS: list[tuple[Arm, CostPart, int | None, float]] = [
    ("baseline", "prefill", None, 0.010), ("baseline", "ar_step", None, 0.004), ("candidate", "prefill", None, 0.010),
    ("candidate", "denoise", 16, 0.006), ("candidate", "context_pass", 16, 0.005),
]  # fmt: skip
LIMITS = GateLimits()
SEED = 5


def own_time_s(sample: SpeedSample) -> float:
    """What a call takes that does its forwards and nothing else."""
    steps = max(prompt.num_context_forwards for prompt in sample.prompts) - 1
    passes = max(prompt.num_denoiser_forwards for prompt in sample.prompts)
    return 0.010 + (passes * 0.006 + steps * 0.005 if passes else steps * 0.004)


def timed(
    root: Path, factor: Factor, *, batch_size: int = 1, costs: bool = True, noise: float = 0.005, **changes: Any
) -> store.Run:
    """A scored run whose calls take so many times as long as their forwards; parts are timed in every round."""
    made = store.load(speed_run(root / "made", batch_sizes=(batch_size,), scored=True))
    arms = {cell.id: cell.arm for cell in made.manifest.cells}
    rng = np.random.default_rng(SEED)

    def shaken(seconds: float) -> float:
        return seconds * float(np.exp(noise * rng.standard_normal()))

    rows: list[Any] = [*made.generations, *made.scores]
    for sample in made.speed:
        wall_s = shaken(own_time_s(sample) * factor(arms[sample.cell], sample))
        prompts = tuple(dataclasses.replace(prompt, finish_s=wall_s) for prompt in sample.prompts)
        times = {"prefill_s": None, "first_output_s": None}
        rows.append(dataclasses.replace(sample, wall_s=wall_s, prompts=prompts, **times, **changes))
    for launch, number in sorted({(s.launch_id, s.round) for s in made.speed if s.phase == "measure"} if costs else ()):
        for arm, part, block, seconds in PARTS:
            cell = next(cell.id for cell in made.manifest.cells if cell.arm == arm)
            for tokens in (5, 200):
                cost = CostSample(
                    cell=cell, launch_id=launch, round=number, phase="measure", part=part, replica=0,
                    batch_size=batch_size, context_tokens=tokens, block_size=block, num_repeats=4,
                    wall_s=4 * shaken(seconds), started_at="t",
                )  # fmt: skip
                rows.append(cost)
    return store.load(write(root / "timed", made.manifest, rows))


def point_of(run: store.Run) -> SpeedPoint:
    (point,) = Runs([run]).speed
    return point


def only(arm: Arm, factor: float) -> Factor:
    return lambda of, sample: factor if of == arm else 1.0


def test_an_honest_pair_passes_with_both_residuals(tmp_path: Path) -> None:
    run = timed(tmp_path, only("candidate", 1.0))
    gate = gates.residual_gate(point_of(run), LIMITS)
    assert gate.outcome == "passed"
    assert found_text(gate).startswith("unexplained time: baseline ")
    (verdict,) = judge(claims_of(FAST), [run])
    assert verdict.outcome == "SUPPORTED"
    assert "residual" not in verdict_lines(claims_of(FAST), [verdict])[0]


def test_a_decoder_that_remembers_is_invalid(tmp_path: Path) -> None:
    """It reports the forwards that it made once, and takes none of their time: this was SUPPORTED at any factor."""
    run = timed(tmp_path, only("candidate", 1 / 347))
    (verdict,) = judge(claims_of(FAST), [run])
    assert verdict.outcome == "INVALID"
    assert "residual: the candidate is faster than its own forwards allow: these, timed alone, take 3" in verdict.reason
    assert point_of(run).invalid


def test_one_that_remembers_from_the_second_round_on_is_invalid_as_well(tmp_path: Path) -> None:
    def factor(arm: Arm, sample: SpeedSample) -> float:
        return 0.01 if arm == "candidate" and sample.round > 0 else 1.0

    assert gates.residual_gate(point_of(timed(tmp_path, factor)), LIMITS).outcome == "failed"


@pytest.mark.parametrize(("arm", "factor", "outcome"), [
    ("baseline", 2.0, "failed"), ("baseline", 1.2, "passed"), ("baseline", 0.5, "failed"),
    ("candidate", 3.0, "passed"), ("candidate", 0.9, "passed"), ("candidate", 0.6, "failed"),
])  # fmt: skip
def test_each_arm_fails_in_the_direction_that_would_buy_something(
    tmp_path: Path, arm: Arm, factor: float, outcome: str
) -> None:
    """A candidate slower than its parts hurts only itself: it has to choose its tokens."""
    gate = gates.residual_gate(point_of(timed(tmp_path, only(arm, factor))), LIMITS)
    assert gate.outcome == outcome
    if outcome == "failed":
        assert found_text(gate).startswith(f"the {arm} is {'slower' if factor > 1 else 'faster'} than its")


def test_the_limit_is_a_field_of_the_claim(tmp_path: Path) -> None:
    run = timed(tmp_path, only("baseline", 1.6))
    (verdict,) = judge(claims_of({**FAST, "limits": {"residual": 0.5}}), [run])
    assert verdict.outcome == "SUPPORTED"
    (verdict,) = judge(claims_of(FAST), [run])
    assert verdict.outcome == "INVALID"
    assert "the baseline is slower than its parts: they do not explain +" in verdict.reason


def slowed(kind: str, candidate: bool) -> Factor:
    """A baseline with a handicap outside its forwards, beside a candidate without or with as large a one."""
    most = {"a sleep for each token": 0.004, "a sleep for each call": 0.080, "a slow wrapper": 0.0}

    def factor(arm: Arm, sample: SpeedSample) -> float:
        own_s = own_time_s(sample)
        if arm == "candidate" and not candidate:
            return 1.0
        if kind == "a slow wrapper":
            return 2.0
        num = sum(prompt.num_tokens for prompt in sample.prompts) if kind == "a sleep for each token" else 1
        return 1 + most[kind] * num / own_s

    return factor


@pytest.mark.parametrize("kind", ["a sleep for each token", "a sleep for each call", "a slow wrapper"])
@pytest.mark.parametrize("candidate", [False, True])
def test_a_slowed_baseline_is_invalid_whatever_the_candidate_does(tmp_path: Path, kind: str, candidate: bool) -> None:
    """It was SUPPORTED as soon as the candidate lagged its own parts as much."""
    run = timed(tmp_path, slowed(kind, candidate), noise=0.03)
    (verdict,) = judge(claims_of({**FAST, "expected": 1.05}), [run])
    assert verdict.outcome == "INVALID"
    assert "the baseline is slower than its parts: they do not explain +" in verdict.reason
    assert "in the fastest round of every call" in verdict.reason


def neighbours(seed: int, mean: float) -> Factor:
    """Other work holds up calls of both arms, some much and some not at all, and never the parts."""
    rng = np.random.default_rng(seed)
    of_round = rng.exponential(mean, 100)
    return lambda arm, sample: 1 + float(of_round[sample.round] * rng.exponential(1.0))


def test_calls_that_are_held_up_by_others_are_no_fault(tmp_path: Path) -> None:
    """Neighbours hold up long calls, of both arms, more than the short moments in which parts are timed."""
    for seed, mean in enumerate((0.0, 0.5, 4.0)):
        run = timed(tmp_path / str(seed), neighbours(seed, mean), noise=0.05)
        assert gates.residual_gate(point_of(run), LIMITS).outcome in ("passed", "not_checked")
        (verdict,) = judge(claims_of(FAST), [run])
        assert verdict.outcome != "INVALID" or "residual" not in verdict.reason


@pytest.mark.parametrize("both", [False, True])
def test_a_handicap_that_comes_and_goes_supports_nothing(tmp_path: Path, both: bool) -> None:
    """Whoever holds a baseline up now and then: nobody knows how fast it is."""

    def factor(arm: Arm, sample: SpeedSample) -> float:
        return 3.0 if (arm == "baseline" or both) and (sample.round + len(sample.call_id)) % 2 else 1.0

    (verdict,) = judge(claims_of({**FAST, "expected": 1.05}), [timed(tmp_path, factor, noise=0.01)])
    assert verdict.outcome in ("INCONCLUSIVE", "INVALID")


def test_a_baseline_that_nobody_can_tell_apart_from_its_neighbours_leaves_the_claim_open(tmp_path: Path) -> None:
    calm = {0: 1.0, 1: 1.0}
    run = timed(tmp_path, lambda arm, sample: calm.get(sample.round, 2.5), noise=0.01)
    gate = gates.baseline_lag_gate(point_of(run), LIMITS)
    assert gate is not None
    assert gate.outcome == "not_checked"
    assert gates.residual_gate(point_of(run), LIMITS).outcome == "not_checked"
    claims = claims_of({**FAST, "expected": 1.01})
    verdict = next(iter(judge(claims, [run])))
    assert verdict.outcome == "INCONCLUSIVE"
    assert gates.baseline_lag_gate(point_of(timed(tmp_path / "own", only("baseline", 1.2))), LIMITS) is None


def test_without_parts_nothing_is_checked_and_a_supported_speedup_says_so(tmp_path: Path) -> None:
    (verdict,) = judge(claims_of(FAST), [timed(tmp_path, only("candidate", 1.0), costs=False)])
    assert verdict.outcome == "SUPPORTED"
    line = verdict_lines(claims_of(FAST), [verdict])[0]
    assert "residual (cannot compare times with forwards: " in line.partition("not checked: ")[2]
    assert "the parts of decoding were not timed alone" in line


def test_a_batch_whose_passes_were_not_counted_is_held_to_the_least_that_they_can_take(tmp_path: Path) -> None:
    """Runs of old counted forwards by row. Rows beside each other take at least a row's share of their passes."""
    gate = gates.residual_gate(point_of(timed(tmp_path / "honest", only("candidate", 1.0), batch_size=4)), LIMITS)
    assert (gate.outcome, NOT_COUNTED in found_text(gate)) == ("not_checked", True)
    gate = gates.residual_gate(point_of(timed(tmp_path / "gone", only("candidate", 0.05), batch_size=4)), LIMITS)
    assert gate.outcome == "failed"
    assert "the candidate is faster" in found_text(gate)


def test_tokens_without_any_forward_are_invalid(tmp_path: Path) -> None:
    """The harness counted and saw none: nothing can be predicted, and nothing was computed."""
    run = timed(tmp_path, only("candidate", 0.01), passes=(), cpu_s=0.1)
    gate = gates.residual_gate(point_of(run), LIMITS)
    assert gate.outcome == "failed"
    assert "made tokens without any forward of its model" in found_text(gate)


def cost(part: CostPart, block_size: int | None, rows: int, seconds: float) -> stats.PhaseCost:
    known = Estimate(value=seconds, low=seconds, high=seconds, level=0.95, n=9, method="given")
    return stats.PhaseCost(part=part, block_size=block_size, num_rows=rows, context_tokens=10, seconds=known)


def test_costs_are_interpolated_over_rows_and_block_sizes() -> None:
    table = stats.CostTable(
        [cost("denoise", 4, 1, 0.1), cost("denoise", 4, 5, 0.3), cost("denoise", 8, 1, 0.2), cost("denoise", 8, 5, 0.4)]
    )
    at_N = np.array([10.0])
    assert table.seconds_N("denoise", 4, at_N, 2)[0] == pytest.approx(0.15)
    assert table.seconds_N("denoise", 6, at_N, 3)[0] == pytest.approx(0.25)
    assert table.seconds_N("denoise", 8, at_N)[0] == pytest.approx(0.4)  # the whole batch
    assert [table.seconds_N("denoise", 4, at_N, rows)[1] for rows in (1, 5, 6)] == [0, 0, 1]
    with pytest.raises(ValueError, match="denoise of blocks of 16 was not measured"):
        table.seconds_N("denoise", 16, at_N)


def test_passes_that_were_counted_predict_a_batch_that_shrinks(tmp_path: Path) -> None:
    """Rows end one after the other, and passes over fewer rows take less: counts of the longest row hide that."""
    passes = (Passes(kind="prefill", rows=4, tokens=8, num=1), Passes(kind="extend", rows=4, tokens=1, num=10))
    passes += (Passes(kind="extend", rows=1, tokens=1, num=30),)
    run = timed(tmp_path, only("candidate", 1.0), batch_size=4, noise=0.0, passes=passes)
    baseline = point_of(run).costs.baseline
    assert baseline.prediction is not None
    num_calls = sum(s.phase == "measure" for s in run.speed) // 3  # of three lanes
    assert baseline.prediction.total_s == pytest.approx(num_calls * (0.010 + 40 * 0.004))  # one width alone was timed
    assert baseline.residual.whole.estimate is None  # so that what narrower passes take is not known
    assert "sizes that were not timed" in str(baseline.residual.whole.reason)


def test_the_residual_of_a_few_rounds_is_their_range_and_of_none_an_error() -> None:
    two = stats.residual_over_rounds([1.0, 2.0], [2.0, 2.0])
    assert (two.low, two.high, two.level) == (pytest.approx(-1.0), pytest.approx(0.0), 0.5)
    same = stats.residual_over_rounds([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert (same.value, same.low, same.high) == (pytest.approx(0.5),) * 3
    with pytest.raises(ValueError, match="no round"):
        stats.residual_over_rounds([], [])
