"""Few prompts that hold much of the time: an interval moves out for what no timed call shows."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from twotower_eval import stats
from twotower_eval.calibration.simulate import calibrate_speed
from twotower_eval.calibration.tail_worlds import NUM_PROMPTS, Tailed, population, tailed
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import Estimate

NUM = 40


def calls(baseline_s: Any, candidate_s: Any, **known: Any) -> stats.TimedCalls:
    """Three rounds of these calls, tokens in step with the seconds."""
    arms = [np.tile(np.asarray(seconds, dtype=float), (3, 1)) for seconds in (baseline_s, candidate_s)]
    return stats.TimedCalls(
        baseline_s=arms[0], candidate_s=arms[1], baseline_tokens=100 * arms[0], candidate_tokens=100 * arms[0],
        launches=["one"] * 3, fixed=False, **known,
    )  # fmt: skip


def bounds(timed: stats.TimedCalls, quantity: Any = "time") -> Estimate:
    return stats.speedup(timed, quantity, level=stats.DECISION_LEVEL, num_resamples=500)


@pytest.mark.parametrize(
    ("kind", "least_undecided"),
    [
        (Tailed(share=0.01, times=30), 0.8),
        (Tailed(share=0.02, times=20, both=True), 0.8),
        (Tailed(alpha=1.1, fall=0.3), 0.7),
        (Tailed(alpha=1.5, fall=0.3), 0.8),
        (Tailed(alpha=2.0, fall=0.3), 0.8),
    ],
)
def test_at_the_default_number_of_prompts_a_tail_leaves_open_what_it_does_not_show(
    kind: Tailed, least_undecided: float
) -> None:
    """Today's main supports at the limit in 14 to 45 % where the gain falls with a Pareto length."""
    world = tailed(kind)
    found = calibrate_speed(world, num=NUM, num_resamples=200, seed=5, advance=lambda num=1, /: None)
    assert found.num_supported <= 5
    assert found.num_covered >= 36
    assert NUM - found.num_supported - found.num_refuted >= least_undecided * NUM


def test_an_honest_decoder_is_supported_and_its_interval_stays_narrow() -> None:
    rng = np.random.default_rng(1)
    length = rng.lognormal(0, 0.5, NUM_PROMPTS)
    timed = calls(length, length / np.exp(rng.normal(0.8, 0.2, NUM_PROMPTS)))
    found = bounds(timed)
    assert stats.decide(
        found, relation="at_least", expected=found.value, margin=0.05 * found.value, num_rounds=3, num_calls=NUM_PROMPTS
    ).outcome == "SUPPORTED"  # fmt: skip
    assert "moved out" not in found.method


def test_the_default_number_of_prompts_sees_a_runaway_in_a_hundred() -> None:
    assert SpeedPlan().num_prompts == NUM_PROMPTS > stats.calls_to_see(0.01) == 299
    assert 0.99**299 <= 0.05 < 0.99**298


def test_what_the_budget_allows_moves_the_bounds_by_the_rule_of_three() -> None:
    """Every call alike: the bootstrap knows no spread at all, the budgets do."""
    plain, bounded = bounds(calls([1.0] * 64, [0.5] * 64)), bounds(calls([1.0] * 64, [0.5] * 64, limits_s=(4.0, 10.0)))
    assert plain.low == pytest.approx(2.0)
    assert plain.high == pytest.approx(2.0)
    unseen = 1 - 0.05 ** (1 / 64)
    assert bounded.low == pytest.approx(2 / (1 + unseen * 19))
    assert bounded.high == pytest.approx(2 * (1 + unseen * 3))
    assert bounded.value == plain.value
    assert "moved out for calls that were not timed" in bounded.method
    assert bounds(calls([1.0] * 64, [0.5] * 64, limits_s=(0.5, 0.25))) == plain, "no call can be longer than those seen"


def test_the_lengths_of_all_documents_say_what_the_timed_ones_lack() -> None:
    seconds = np.linspace(1, 2, 40)
    timed = calls(seconds, seconds / 2)

    def lengths(baseline: Any, candidate: Any) -> stats.Documents:
        return stats.Documents(
            baseline_tokens=np.asarray(baseline, dtype=float), candidate_tokens=np.asarray(candidate, dtype=float),
            longest_baseline=200.0, longest_candidate=200.0,
        )  # fmt: skip

    same = dataclasses.replace(timed, documents=lengths(100 * seconds, 100 * seconds), limits_s=(90.0, 90.0))
    assert bounds(same).low == pytest.approx(bounds(timed).low), "known lengths leave nothing for budgets to do"
    longer = dataclasses.replace(timed, documents=lengths(100 * seconds, 120 * seconds))
    found, plain = bounds(longer), bounds(timed)
    assert found.low < plain.low / 1.19
    assert found.high == pytest.approx(plain.high)
    with pytest.raises(ValueError, match="both arms need the same documents"):
        lengths([1.0], [1.0, 2.0])


def test_fixed_prompts_are_no_sample_and_nothing_is_unseen() -> None:
    timed = dataclasses.replace(calls([1.0, 1.5] * 32, [0.5, 0.6] * 32, limits_s=(50.0, 50.0)), fixed=True)
    assert "moved out" not in bounds(timed).method


def test_one_call_that_holds_half_the_time_is_told() -> None:
    tail = calls([1.0] * 99 + [99.0], [1.0] * 100).tail
    assert tail.largest_share == pytest.approx(0.5)
    assert tail.effective_calls == pytest.approx(1 / (0.25 + 99 / 198**2))
    assert tail.num_calls == 100
    assert calls([1.0] * 30, [1.0] * 30).tail.index is None


def test_hills_index_of_a_pareto_tail() -> None:
    length = 1 + np.random.default_rng(0).pareto(1.5, 4_000)
    assert calls(length, length).tail.index == pytest.approx(1.5, abs=0.25)


def test_a_runaway_has_no_gain_in_the_worlds() -> None:
    everyone = population(Tailed(share=0.05, times=20))
    away = everyone.candidate_tokens == 2_000
    assert 0.04 < away.mean() < 0.06
    assert np.allclose(everyone.candidate_s[away], 40.0)


def test_a_limit_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds of a call at its budget must be finite"):
        calls([1.0, 2.0], [1.0, 2.0], limits_s=(float("nan"), 1.0))
