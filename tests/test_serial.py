"""Rounds that depend on their neighbours: what they are worth, and that no verdict is bought with them."""

import math

import numpy as np
import pytest

from twotower_eval.analyse import stats
from twotower_eval.analyse.stats import intervals
from twotower_eval.analyse.words import fact_text


def timed(baseline_s, candidate_s, *, launches=None, fixed=False) -> stats.TimedCalls:
    baseline_s, candidate_s = np.asarray(baseline_s, float), np.asarray(candidate_s, float)
    tokens = np.full(baseline_s.shape, 10.0)
    return stats.TimedCalls(
        baseline_s=baseline_s, candidate_s=candidate_s, baseline_tokens=tokens, candidate_tokens=tokens,
        launches=launches or ["one"] * len(baseline_s), fixed=fixed,
    )  # fmt: skip


def rounds(logs_R, *, launches=None) -> stats.TimedCalls:
    """Fixed calls whose rounds have these logs of their own speedups."""
    return timed(np.exp(np.asarray(logs_R, float))[:, None] * [[1.0, 2.0]], [[1.0, 2.0]] * len(logs_R), fixed=True,
                 launches=launches)  # fmt: skip


def verdict(calls: stats.TimedCalls, at_least: float) -> str:
    found = stats.speedup(calls, level=stats.DECISION_LEVEL, num_resamples=500)
    return stats.decide(
        found, relation="at_least", expected=at_least, margin=0.0, num_rounds=len(calls.launches)
    ).outcome


def wander(rng: np.random.Generator, num: int, correlation: float) -> np.ndarray:
    logs_R = rng.normal(0, 1, num)
    for r in range(1, num):
        logs_R[r] = correlation * logs_R[r - 1] + math.sqrt(1 - correlation**2) * logs_R[r]
    return logs_R


def test_the_correlation_of_neighbours_by_hand() -> None:
    # About their mean 2.5: -1.5, -.5, .5, 1.5, 1.5, -1.5; squares 9.5; products .75, -.25, .75, 2.25, -2.25.
    found = stats.speedup(rounds([0.01, 0.02, 0.03, 0.04, 0.04, 0.01])).serial
    assert found is not None
    assert found.lag1 == pytest.approx(1.25 / 9.5, abs=0.01)
    corrected = 1.25 / 9.5 + (1 + 4 * 1.25 / 9.5) / 6
    lags = range(1, 6)
    worth = 6 / (1 + 2 * sum((1 - k / 6) * corrected**k for k in lags))
    assert found.effective_rounds == pytest.approx(worth, rel=0.02)


def test_neighbours_are_those_of_the_same_launch() -> None:
    """A step between two launches is no sign that rounds of one depend on each other."""
    quiet = np.tile([0.0, 0.01, 0.005, -0.004, -0.01, 0.003], 2)
    apart = quiet + np.repeat([0.0, 0.5], 6)
    two = stats.speedup(rounds(apart, launches=["a"] * 6 + ["b"] * 6)).serial
    one = stats.speedup(rounds(apart)).serial
    assert two is not None
    assert one is not None
    assert two.lag1 == pytest.approx(stats.speedup(rounds(quiet, launches=["a"] * 6 + ["b"] * 6)).serial.lag1)
    assert one.lag1 > 0.7


def test_few_or_dependent_rounds_decide_nothing_and_independent_ones_do() -> None:
    """Three slow rounds of one arm in five, and a change for good in the middle of a run, were taken for a speedup."""
    hair = 0.002 * np.array([0.3, -1.0, 0.9, -0.2, 0.1, -0.7, 1.0, -0.5, 0.6, -0.8, 0.4, -0.1] * 2)
    spell = np.log(1.6) * np.array([0, 1, 1, 1, 0])
    assert verdict(rounds(spell + hair[:5]), 1.0) == "INCONCLUSIVE"
    for num in (8, 12, 24):
        changed = 0.3 * (np.arange(num) >= num // 2)
        assert verdict(rounds(changed + hair[:num]), 1.0) == "INCONCLUSIVE"
        assert verdict(rounds(changed + hair[:num]), 2.0) == "INCONCLUSIVE"
        assert verdict(rounds(0.3 + hair[:num]), 1.3) == "SUPPORTED"
        assert verdict(rounds(0.3 + hair[:num]), 1.4) == "REFUTED"
    assert verdict(rounds(0.3 + hair[:4]), 1.0) == "INCONCLUSIVE"


def test_what_dependent_rounds_lack_is_said() -> None:
    calls = rounds(0.3 + 0.1 * (np.arange(12) >= 6))
    found = stats.speedup(calls, level=stats.DECISION_LEVEL)
    decision = stats.decide(found, relation="at_least", expected=1.0, margin=0.0, num_rounds=12)
    assert decision.few is not None
    words = fact_text(decision.few)
    assert "12 rounds are worth 1.2 independent ones" in words
    assert "further apart, or 5 launches or more" in words


@pytest.mark.parametrize("num", [5, 8, 12, 20, 40])
def test_wandering_rounds_are_covered_and_support_no_more_than_they_may(num: int) -> None:
    """AR(1) of 0.8 between rounds: 95 % intervals covered the truth in 46 to 61 %, a false claim got 24 to 33 %."""
    rng, covered, supported, trials = np.random.default_rng(num), 0, 0, 300
    for _ in range(trials):
        calls = rounds(0.02 * wander(rng, num, 0.8))
        found = stats.speedup(calls, num_resamples=200)
        covered += found.low <= 1 <= found.high
        supported += verdict(calls, 1.0) == "SUPPORTED"
    assert covered >= 0.92 * trials  # 93 % less one and a half standard errors or so
    assert supported <= 0.07 * trials


def test_independent_rounds_keep_their_verdict_far_from_the_limit() -> None:
    rng = np.random.default_rng(3)
    for num, least in ((12, 85), (20, 96)):
        supported = sum(verdict(rounds(0.9 + 0.03 * rng.normal(size=num)), 1.5) == "SUPPORTED" for _ in range(100))
        assert supported >= least


def test_slow_wander_under_independent_noise_is_seen_by_blocks() -> None:
    """Half of the variance wanders: the lag-1 correlation alone took 40 rounds for many more than they are worth."""
    rng, covered, by_blocks = np.random.default_rng(1), 0, 0
    for _ in range(200):
        found = stats.speedup(rounds(0.02 * (wander(rng, 40, 0.8) + rng.normal(size=40))), num_resamples=200)
        covered += found.low <= 1 <= found.high
        by_blocks += found.serial.block == 4
    assert covered >= 184
    assert by_blocks >= 60


def test_launches_are_not_widened_and_count_by_themselves() -> None:
    rng = np.random.default_rng(2)
    calls = rounds(0.3 + np.repeat(rng.normal(0, 0.03, 5), 4), launches=[f"l{i // 4}" for i in range(20)])
    found = stats.speedup(calls, level=stats.DECISION_LEVEL)
    assert found.serial is not None
    assert (found.serial.launches, found.serial.effective_rounds, found.serial.widening) == (True, 5.0, 1.0)
    assert stats.decide(found, relation="at_least", expected=1.2, margin=0.0, num_rounds=5).outcome == "SUPPORTED"


def test_a_null_is_widened_by_what_is_measured_only() -> None:
    """A bound on the correlation of few quiet rounds would call every null too wide."""
    calls = rounds(0.002 * np.array([0.3, -1.0, -0.9, 0.2, 0.6, -0.7, 1.0, -0.5]))
    bounded, estimated = (
        stats.speedup(calls, level=stats.NULL_LEVEL, caution=caution) for caution in ("bounded", "estimated")
    )
    assert estimated.serial.widening == pytest.approx(1)
    assert bounded.high / bounded.low > estimated.high / estimated.low
    stepped = rounds(0.02 * (np.arange(8) >= 4))
    assert stats.speedup(stepped, level=stats.NULL_LEVEL, caution="estimated").serial.widening > 3


def test_equal_rounds_have_no_dependence() -> None:
    found = stats.speedup(rounds([0.3] * 8))
    assert found.serial is not None
    assert (found.serial.lag1, found.serial.effective_rounds, found.serial.widening) == (0.0, 8.0, 1.0)
    assert found.low == pytest.approx(found.high)


def wandering(rng: np.random.Generator, num_rounds: int, num_launches: int) -> stats.TimedCalls:
    """One wander over all rounds, with a little noise, whatever launch they are of."""
    logs_R = 0.05 * wander(rng, num_rounds, 0.8) + 0.01 * rng.normal(size=num_rounds)
    return rounds(logs_R, launches=[f"l{i * num_launches // num_rounds}" for i in range(num_rounds)])


@pytest.mark.parametrize("num_rounds", [20, 25, 60])
def test_a_wander_that_goes_on_from_launch_to_launch_is_no_five_independent_launches(num_rounds: int) -> None:
    """Launches were taken to be independent: 10 to 20 % of claims at the limit were SUPPORTED, 70 to 85 % covered."""
    rng, num = np.random.default_rng(3), 150
    found = [stats.speedup(wandering(rng, num_rounds, 5), num_resamples=200) for _ in range(num)]
    assert sum(one.low <= 1 <= one.high for one in found) >= 0.92 * num
    assert sum(one.low > 1 for one in found) <= 0.05 * num
    assert all(one.serial is not None and one.serial.launches for one in found)
    assert np.median([one.serial.widening for one in found if one.serial]) > 1.2


def test_launches_of_quiet_rounds_are_widened_little_and_those_that_jump_not_at_all() -> None:
    """What differs between launches by itself looks like a wander over all rounds, and is none."""
    rng, launches = np.random.default_rng(4), [f"l{i // 8}" for i in range(40)]
    plain = [carried_over(0.02 * rng.normal(size=40), launches) for _ in range(200)]
    effects = [
        carried_over(np.repeat(0.05 * rng.normal(size=5), 8) + 0.01 * rng.normal(size=40), launches) for _ in range(200)
    ]
    assert min(plain + effects) >= 1
    assert np.median(plain) < 2
    assert np.mean(np.array(effects) == 1) > 0.95
    assert carried_over(np.zeros(40), launches) == 1.0


def carried_over(series_R: np.ndarray, launches: list[str], level: float = stats.DECISION_LEVEL) -> float:
    return intervals.carried_over(series_R, launches, level)


def test_the_wider_interval_is_that_at_its_own_level() -> None:
    """The factor was that of verdicts at every level: too wide at 95 % and beyond."""
    calls = wandering(np.random.default_rng(6), 25, 5)
    ninety, most = (stats.speedup(calls, level=level).serial.widening for level in (0.90, 0.9975))
    assert 1 < most < 0.7 * ninety


def in_launches(rng: np.random.Generator, num_launches: int, num_each: int) -> stats.TimedCalls:
    num = num_launches * num_each
    return rounds(0.03 * wander(rng, num, 0.8), launches=[f"l{i // num_each}" for i in range(num)])


@pytest.mark.parametrize(("num_launches", "num_each"), [(5, 1), (12, 1), (5, 2), (8, 2)])
def test_launches_of_a_round_or_two_decide_nothing(num_launches: int, num_each: int) -> None:
    """Five launches of one round were five independent ones: 29 % of false claims at the limit got SUPPORTED."""
    rng = np.random.default_rng(7)
    for _ in range(50):
        calls = in_launches(rng, num_launches, num_each)
        assert not stats.resamples_launches(calls.launches)
        assert verdict(calls, 0.5) == verdict(calls, 1.0) == "INCONCLUSIVE"
    estimate = stats.speedup(calls, level=stats.DECISION_LEVEL)
    found = stats.decide(estimate, relation="at_least", expected=0.5, margin=0.0, num_rounds=len(calls.launches))
    assert found.few is not None
    assert fact_text(found.few).endswith("time more rounds in each launch, or 5 launches or more of 4 rounds or more")


def test_rounds_of_a_short_launch_count_with_the_one_before_it() -> None:
    """A launch that was stopped keeps its rounds and is made again."""
    names = [*"baaaabcdddddeeeeffffffggggh"]
    sat = intervals.sittings(names)
    assert "".join(sat) == "aaaaaaadddddeeeeffffffggggg"
    assert stats.resamples_launches(names)
    logs_R = 0.3 + 0.01 * np.random.default_rng(8).normal(size=len(names))
    alike, apart = (stats.speedup(rounds(logs_R, launches=[*one])) for one in (names, sat))
    assert alike == apart
    assert alike.serial.effective_rounds == 5
    assert intervals.sittings([*"abcd"]) == [*"abcd"]
    assert intervals.sittings([*"aaabbbcccdddeee"]) == ["a"] * 15


def test_one_void_round_leaves_a_verdict_of_these_launches() -> None:
    rng = np.random.default_rng(9)
    names = [f"l{i // 4}" for i in range(19)]
    found = [verdict(rounds(0.9 + 0.03 * rng.normal(size=19), launches=names), 1.5) for _ in range(40)]
    assert not stats.resamples_launches(names)
    assert found.count("SUPPORTED") >= 36


def test_a_null_over_launches_takes_them_as_they_come_out() -> None:
    calls = wandering(np.random.default_rng(5), 25, 5)
    found = stats.speedup(calls, level=stats.NULL_LEVEL, caution="estimated").serial
    assert found is not None
    assert found.widening == 1.0
