"""What follows from estimates: verdicts, power, granularity of published figures, costs, the A/A gate."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower_eval.analyse import stats
from twotower_eval.records import Estimate, GateLimits


def bounds(low: float, value: float, high: float, *, n: int = 100, level: float = 0.90) -> Estimate:
    return Estimate(value=value, low=low, high=high, level=level, n=n, method="given")


def outcome(low: float, high: float, relation: stats.Relation = "at_least", *, num_clusters: int = 100) -> str:
    estimate = bounds(low, (low + high) / 2, high)
    decision = stats.decide(estimate, relation=relation, expected=0.987, margin=0.005, num_clusters=num_clusters)
    assert decision.comparisons
    return decision.outcome


# --- the verdict rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most", "equal"),
    [
        (0.983, 0.991, "SUPPORTED", "SUPPORTED", "SUPPORTED"),
        (0.983, 0.999, "SUPPORTED", "INCONCLUSIVE", "INCONCLUSIVE"),
        (0.970, 0.990, "INCONCLUSIVE", "SUPPORTED", "INCONCLUSIVE"),
        (0.900, 0.981, "REFUTED", "SUPPORTED", "REFUTED"),
        (0.993, 1.010, "SUPPORTED", "REFUTED", "REFUTED"),
        (0.970, 1.010, "INCONCLUSIVE", "INCONCLUSIVE", "INCONCLUSIVE"),
    ],
)
def test_each_relation_is_judged_by_its_own_bounds(low, high, at_least, at_most, equal) -> None:
    assert outcome(low, high, "at_least") == at_least
    assert outcome(low, high, "at_most") == at_most
    assert outcome(low, high, "equal") == equal


def test_a_bound_on_the_limit_does_not_clear_it() -> None:
    assert outcome(0.982, 0.999) == "INCONCLUSIVE"
    assert outcome(0.9, 0.982) == "INCONCLUSIVE"


def test_too_little_evidence_never_supports_but_too_few_documents_may_refute() -> None:
    assert outcome(0.99, 1.0, num_clusters=19) == "INCONCLUSIVE"
    assert outcome(0.99, 1.0, num_clusters=20) == "SUPPORTED"
    assert outcome(0.5, 0.6, num_clusters=19) == "REFUTED"
    fast = bounds(2.4, 2.5, 2.6)
    assert stats.decide(fast, relation="at_least", expected=2.42, margin=0.121, num_rounds=5).outcome == "SUPPORTED"
    assert stats.decide(fast, relation="at_least", expected=2.42, margin=0.121, num_rounds=1).outcome == "INCONCLUSIVE"
    assert stats.decide(fast, relation="at_least", expected=3.0, margin=0.1, num_rounds=5).outcome == "REFUTED"
    assert stats.decide(fast, relation="at_least", expected=3.0, margin=0.1, num_rounds=4).outcome == "INCONCLUSIVE"


def test_a_verdict_refuses_what_it_would_get_wrong() -> None:
    two_sided = bounds(0.98, 0.99, 1.0, level=0.95)
    with pytest.raises(ValueError, match=r"level=0\.9"):
        stats.decide(two_sided, relation="at_least", expected=0.987, margin=0.005, num_clusters=100)
    good = bounds(0.98, 0.99, 1.0)
    with pytest.raises(ValueError, match="clusters or how many rounds"):
        stats.decide(good, relation="at_least", expected=0.987, margin=0.005)
    with pytest.raises(ValueError, match="margin at least 0"):
        stats.decide(good, relation="at_least", expected=0.987, margin=-0.005, num_clusters=100)
    with pytest.raises(ValueError, match="none of at_least"):
        stats.decide(good, relation="about", expected=0.987, margin=0.005, num_clusters=100)  # type: ignore[arg-type]


@given(st.floats(0.5, 1.5), st.floats(0, 0.5), st.floats(0.5, 1.5), st.floats(0, 0.2))
def test_equal_is_both_one_sided_claims(low: float, width: float, expected: float, margin: float) -> None:
    estimate = bounds(low, low + width / 2, low + width)
    relations: tuple[stats.Relation, ...] = ("at_least", "at_most", "equal")
    least, most, equal = (
        stats.decide(estimate, relation=r, expected=expected, margin=margin, num_clusters=50).outcome for r in relations
    )
    assert (equal == "SUPPORTED") == (least == most == "SUPPORTED")
    assert (equal == "REFUTED") == ("REFUTED" in (least, most))


def test_a_decision_says_which_bound_met_which_limit() -> None:
    estimate = bounds(0.95, 0.97, 0.99)
    judged = {"expected": 0.987, "margin": 0.005, "num_clusters": 100}
    equal = stats.decide(estimate, relation="equal", **judged)
    assert equal.comparisons == (stats.Comparison(bound="lower", value=0.95, stands="open", limit=0.987 - 0.005),)
    most = stats.decide(estimate, relation="at_most", **{**judged, "num_clusters": 5})
    assert most.comparisons == (stats.Comparison(bound="upper", value=0.99, stands="below", limit=0.987 + 0.005),)
    assert (most.outcome, most.few) == ("INCONCLUSIVE", stats.TooFew(of="clusters", num=5))


# --- granularity ---------------------------------------------------------------------------------------------------


def test_granularity_of_the_published_humaneval_figures() -> None:
    assert stats.possible_counts(79.27, 2, 164) == (130,)
    for percent in (75.58, 76.40, 19.85):
        assert stats.possible_counts(percent, 2, 164) == ()
    assert stats.smallest_samples([75.58, 76.40, 19.85], 2, 164) == 20
    assert stats.smallest_samples([79.27], 2, 164) == 1
    assert stats.smallest_samples([75.58], 2, 164, limit=5) is None


@given(st.integers(1, 3_000), st.data(), st.integers(0, 3))
def test_every_real_count_is_possible(n: int, data: st.DataObject, decimals: int) -> None:
    k = data.draw(st.integers(0, n))
    assert k in stats.possible_counts(round(100 * k / n, decimals), decimals, n)
    assert all(
        abs(100 * j / n - 100 * k / n) <= 10**-decimals + 1e-9
        for j in stats.possible_counts(round(100 * k / n, decimals), decimals, n)
    )


@pytest.mark.parametrize(("percent", "decimals", "n"), [(79.274, 2, 164), (101.0, 2, 164), (-1.0, 0, 5), (50.0, 2, 0)])
def test_granularity_refuses_what_is_no_percentage(percent: float, decimals: int, n: int) -> None:
    with pytest.raises(ValueError, match=r"percentage|trial"):
        stats.possible_counts(percent, decimals, n)
    with pytest.raises(ValueError, match="no published"):
        stats.smallest_samples([], decimals, 5)


# --- power ---------------------------------------------------------------------------------------------------------


def test_a_hundred_gsm8k_items_cannot_test_the_claim() -> None:
    plan = stats.power_plan([stats.PlannedTask(name="gsm8k", num_clusters=100, accuracy=0.9249)], 0.982)
    # Lossless: l = g = d/2, so var z = d and the standard error sqrt(d / n) / p, in retention.
    assert plan.stderr == pytest.approx(math.sqrt(0.10 / 100) / 0.9249)
    assert plan.smallest_drop.value is not None
    assert plan.smallest_drop.value > 0.05
    assert plan.supported_at.value is not None
    assert plan.supported_at.value > 1


def test_planned_power_is_what_a_simulation_of_verdicts_finds() -> None:
    """Data at exactly the planned retentions must be refuted, or supported, about four times in five."""
    n, p, least = 800, 0.8, 0.98
    plan = stats.power_plan([stats.PlannedTask(name="t", num_clusters=n, accuracy=p, discordance=0.08)], least)
    rng = np.random.default_rng(1)
    for figure, wanted in ((plan.refuted_at, "REFUTED"), (plan.supported_at, "SUPPORTED")):
        assert figure.value is not None
        drop = (1 - figure.value) * p
        lost, gained = (0.08 + drop) / 2, (0.08 - drop) / 2
        hits = 0
        for _ in range(300):
            both, out, new = rng.multinomial(n, [p - lost, lost, gained, 1 - p - gained])[:3]
            scores = stats.PairedScores(
                tasks=["t"] * n, groups=["t"] * n, clusters=[str(i) for i in range(n)],
                baseline=[1.0] * (both + out) + [0.0] * (n - both - out),
                candidate=[1.0] * both + [0.0] * out + [1.0] * new + [0.0] * (n - both - out - new),
            )  # fmt: skip
            draws = stats.draw_task_means(scores.table, num_resamples=500)
            found = stats.retention(scores.table, draws, level=stats.DECISION_LEVEL)
            decision = stats.decide(found, relation="at_least", expected=least, margin=0.0, num_clusters=n)
            hits += decision.outcome == wanted
        assert 0.72 <= hits / 300 <= 0.88  # one standard deviation is 0.023


def test_shared_scores_dilute_and_few_clusters_are_named() -> None:
    own = stats.PlannedTask(name="code", num_clusters=164, accuracy=0.8)
    shared = stats.PlannedTask(name="shared", num_clusters=1_000, accuracy=0.8, discordance=0.0)
    alone, diluted = (stats.power_plan(tasks, 0.98) for tasks in ([own], [own, shared]))
    assert diluted.stderr == pytest.approx(alone.stderr / 2)
    tiny = stats.power_plan([replace(own, num_clusters=10, discordance=0.9)], 0.98)
    assert tiny.supported_at.value is None
    assert "fewer than 20" in (tiny.supported_at.reason or "")
    same = stats.power_plan([shared], 0.98)
    assert "exact bound" in (same.smallest_drop.reason or "")
    with pytest.raises(ValueError, match="no task"):
        stats.power_plan([], 0.98)
    with pytest.raises(ValueError, match="accuracy above 0"):
        replace(own, accuracy=0.0)


def test_evidence_still_needed() -> None:
    claim = {"relation": "at_least", "expected": 0.987, "margin": 0.005}
    # 0.01 above the limit with a lower half-width of 0.02: four times the clusters.
    found = stats.still_needed(bounds(0.972, 0.992, 1.0), **claim)
    assert (found.total, found.more) == (400, 300)
    # 0.01 below it: to be refuted, the upper half-width of 0.03 must shrink to it.
    found = stats.still_needed(bounds(0.95, 0.972, 1.002), **claim)
    assert (found.total, found.more) == (900, 800)
    on_it = stats.still_needed(bounds(0.95, 0.982, 1.002), relation="at_least", expected=0.982, margin=0.0)
    assert (on_it.total, on_it.more) == (None, None)
    assert "on the limit" in (on_it.reason or "")
    assert "so near" in (stats.still_needed(bounds(0.95, 0.98201, 1.002), **claim).reason or "")
    assert stats.still_needed(bounds(0.985, 0.99, 1.0), **claim).reason == "decided already"
    few = stats.still_needed(bounds(0.985, 0.99, 1.0, n=12), **claim)
    assert (few.total, few.more) == (20, 8)
    none = ["t"] * 40, [str(i) for i in range(40)], [1.0] * 40
    same = stats.PairedScores(tasks=none[0], groups=none[0], clusters=none[1], baseline=none[2], candidate=none[2])
    lossless = stats.retention(same.table, stats.draw_task_means(same.table), level=stats.DECISION_LEVEL)
    enough = stats.still_needed(lossless, relation="at_least", expected=1.0, margin=0.02).total
    assert enough == pytest.approx(math.log(0.05) / math.log(0.98), rel=0.03)  # none of n: 1 - 0.05^(1/n)
    both = stats.still_needed(bounds(0.97, 0.987, 1.004), relation="equal", expected=0.987, margin=0.005)
    assert both.total == math.ceil(100 * 3.4**2)


def test_rounds_still_needed_are_counted_on_the_log_scale() -> None:
    half = 0.08
    estimate = bounds(2.4 * math.exp(-half), 2.4, 2.4 * math.exp(half), n=160)
    claim = {"relation": "at_least", "expected": 2.42, "margin": 0.121}
    found = stats.still_needed(estimate, **claim, n=5, log_scale=True, least_n=stats.MIN_ROUNDS)
    assert found.total == math.ceil(5 * (half / math.log(2.4 / 2.299)) ** 2)
    with pytest.raises(ValueError, match="log scale"):
        stats.still_needed(estimate, relation="at_least", expected=0.1, margin=0.2, log_scale=True)


# --- costs ---------------------------------------------------------------------------------------------------------


def cost(part, block_size, context_tokens, value_s) -> stats.PhaseCost:
    seconds = Estimate(value=value_s, low=value_s, high=value_s, level=0.95, n=9, method="given")
    return stats.PhaseCost(part=part, block_size=block_size, context_tokens=context_tokens, seconds=seconds)


def test_median_and_its_interval() -> None:
    nine = stats.median([5, 1, 9, 2, 8, 3, 7, 4, 6])
    # Binomial(9, 1/2): P(at most 1) = 10/512, so the second smallest to second largest covers 96.1 %.
    assert (nine.value, nine.low, nine.high, nine.level) == (5, 2, 8, 0.95)
    five = stats.median([1.0, 2.0, 3.0, 4.0, 50.0])
    assert (five.low, five.high, five.level) == (1, 50, 1 - 2 / 32)
    assert stats.median([3.0]).level == 0
    with pytest.raises(ValueError, match="no values"):
        stats.median([])


def test_predicted_times_add_up() -> None:
    table = stats.CostTable(
        [
            *(cost("prefill", None, 100, 0.5), cost("ar_step", None, 100, 0.01), cost("ar_step", None, 200, 0.02)),
            *(cost("denoise", 16, 100, 0.03), cost("denoise", 16, 200, 0.03), cost("context_pass", 16, 100, 0.02)),
        ]
    )
    ar = stats.predict(table, [stats.CallCounts(prompt_tokens=100, num_steps=11)])
    assert ar.total_s == pytest.approx(0.5 + sum(0.010 + 0.0001 * i for i in range(11)))
    assert ar.share_beyond == 0
    blocks = stats.CallCounts(prompt_tokens=100, num_steps=24, block_size=16, num_context_passes=2)
    diffusion = stats.predict(table, [blocks, blocks])
    assert diffusion.by_part_s == {"prefill": 1.0, "denoise": pytest.approx(1.44), "context_pass": pytest.approx(0.08)}
    assert diffusion.share_beyond == pytest.approx(1 / 6)  # the second context pass, at 116 tokens
    with pytest.raises(ValueError, match="denoise of blocks of 32 was not measured"):
        stats.predict(table, [replace(blocks, block_size=32)])
    with pytest.raises(ValueError, match="several costs"):
        stats.CostTable([cost("prefill", None, 100, 0.5), cost("prefill", None, 100, 0.6)])
    with pytest.raises(ValueError, match="no call"):
        stats.predict(table, [])


def test_what_the_parts_do_not_explain_stays_unexplained() -> None:
    assert stats.explain(2.0, 1.9).explained
    off = stats.explain(2.0, 1.7)
    assert (off.residual, off.explained) == (pytest.approx(0.15), False)
    assert not stats.explain(2.0, 2.3).explained
    with pytest.raises(ValueError, match="no time"):
        stats.explain(0.0, 1.0)


def test_break_even_and_what_a_speedup_takes() -> None:
    costs = {"ar_step_s": 0.010, "denoise_s": 0.012, "context_pass_s": 0.016}
    assert stats.break_even(**costs, blocks_per_nfe=8 / 72) == pytest.approx(1.2 + 1.6 * 8 / 72)
    needed = stats.needed_tokens_per_nfe(2.42, **costs, block_size=16)
    assert needed.value == pytest.approx(2.42 * 1.2 / (1 - 2.42 * 1.6 / 16))
    assert stats.predicted_speedup(needed.value, **costs, block_size=16) == pytest.approx(2.42)
    even = stats.needed_tokens_per_nfe(1.0, **costs, block_size=16).value
    assert stats.break_even(**costs, blocks_per_nfe=even / 16) == pytest.approx(even)
    assert "gives only" in (stats.needed_tokens_per_nfe(9.0, **costs, block_size=16).reason or "")
    with pytest.raises(ValueError, match="tokens per NFE"):
        stats.predicted_speedup(17, **costs, block_size=16)
    with pytest.raises(ValueError, match="above 0 seconds"):
        stats.break_even(ar_step_s=0.0, denoise_s=0.1, context_pass_s=0.1, blocks_per_nfe=0.1)


# --- per device, the A/A gate --------------------------------------------------------------------------------------


def test_per_device_speedup_of_the_claim() -> None:
    found = stats.per_device(bounds(2.3, 2.42, 2.5), baseline_devices=1, candidate_devices=2)
    assert (found.value, found.low, found.high) == (1.21, 1.15, 1.25)
    with pytest.raises(ValueError, match="at least one device"):
        stats.per_device(bounds(2.3, 2.42, 2.5), baseline_devices=0, candidate_devices=2)


def null_at(offset: float, stderr: float):
    """A function from a level to a normal interval of this width around an offset."""

    def interval(level: float) -> Estimate:
        from scipy.special import ndtri

        half = stderr * float(ndtri((1 + level) / 2))
        return bounds(math.exp(offset - half), math.exp(offset), math.exp(offset + half), level=level)

    return interval


def test_off_nulls_are_corrected_over_pairs() -> None:
    # 0.05 is 3 standard errors from the limit of 0.02: p = 0.0027 two-sided, rejected alone and among 3, not among 4.
    pair, fine = null_at(0.05, 0.01), null_at(0.0, 0.01)
    assert stats.off_nulls([pair]) == (True,)
    assert stats.off_nulls([pair, fine, fine]) == (True, False, False)
    assert stats.off_nulls([pair, fine, fine, fine]) == (False, False, False, False)
    # Once a plainly broken pair is out of the way, the rest are tested at a milder level.
    assert stats.off_nulls([null_at(-0.2, 0.01), pair, fine, fine]) == (True, True, False, False)
    assert stats.off_nulls([]) == ()


def test_limits_of_the_null_follow_the_speedup_judged() -> None:
    assert stats.widest_null(None) == 0.03
    assert stats.widest_null(bounds(1.0, 2.0, 4.0)) == 0.03
    assert stats.widest_null(bounds(1.05, 1.07, 1.1)) == pytest.approx(math.log(1.1) / 4)
    assert stats.widest_null(bounds(0.9, 0.92, 0.95)) == pytest.approx(0.1 / 4, abs=0.002)
    assert stats.widest_null(bounds(1.0, 2.0, 4.0), GateLimits(null_half_width=0.01)) == 0.01
    assert stats.half_width(bounds(math.exp(-0.1), 1.0, math.exp(0.3))) == pytest.approx(0.2)


def test_a_speedup_of_one_can_be_judged() -> None:
    """A quarter of |log S| alone left no width at all to a null where the arms are equally fast: always INVALID."""
    same = bounds(0.99, 1.0, 1.01)
    assert stats.widest_null(same) == pytest.approx(0.01 / 4, rel=0.01)
    assert stats.widest_null(same, claimed=2.42) == 0.03
    assert stats.widest_null(same, claimed=1.05) == pytest.approx(math.log(1.05) / 4)
    assert stats.widest_null(bounds(0.88, 1.01, 1.15)) == 0.03


def test_the_plan_is_one_line_that_says_what_it_assumes() -> None:
    tasks = [stats.PlannedTask(name="t", num_clusters=1_000, accuracy=stats.ASSUMED_ACCURACY)]
    plan = stats.power_plan(tasks, 1.0)
    assert plan.smallest_drop.value is not None
    line = stats.power_text(plan)
    assert f"that 1,000 independent documents can show is {100 * plan.smallest_drop.value:.2g} points" in line
    assert line.endswith("assuming that 10 % of the answers differ and that the baseline is right in 80 %")
    few = stats.power_text(stats.power_plan([dataclasses.replace(tasks[0], num_clusters=12)], 1.0))
    assert few.startswith(
        "warning: 12 documents are too few to see a drop of retention; 50 or more in all are enough (--limit, --tasks) "
    )
    assert few.endswith("1.2 discordant clusters expected, fewer than 5: only an exact bound would apply)")
