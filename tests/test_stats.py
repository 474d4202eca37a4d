"""Statistics against hand-computed vectors, published figures, properties, and small simulations with known truth."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower_eval.analyse import stats
from twotower_eval.analyse.stats.intervals import t_quantile
from twotower_eval.analyse.words.facts import method_text

PAPER = {  # FACTS: AR baseline, TwoTower, in percent
    "mmlu": (78.56, 78.24),
    "mmlu_pro": (62.59, 60.93),
    "arc": (91.72, 92.66),
    "winogrande": (76.09, 76.09),
    "race": (88.90, 88.90),
    "humaneval": (79.27, 75.58),
    "mbpp": (74.71, 74.28),
    "gsm8k": (92.49, 90.14),
    "math500": (84.40, 80.60),
    "mmlu_global": (73.97, 73.94),
    "mgsm": (80.80, 80.40),
}


def paired(rows: list[tuple[str, str, float, float]], groups: dict[str, str] | None = None) -> stats.PairedScores:
    """Rows of task, cluster, baseline, candidate."""
    tasks = [task for task, *_ in rows]
    return stats.PairedScores(
        tasks=tasks,
        groups=[(groups or {}).get(task, task) for task in tasks],
        clusters=[cluster for _, cluster, *_ in rows],
        baseline=[a for *_, a, _ in rows],
        candidate=[b for *_, b in rows],
    )


def binary(rng: np.random.Generator, n: int, num_tasks: int, right: float, lost: float, gained: float):
    task_N = np.repeat([f"t{k}" for k in range(num_tasks)], n)
    a_N = (rng.random(n * num_tasks) < right).astype(float)
    change_N = rng.random(n * num_tasks)
    b_N = np.where(a_N == 1, change_N >= lost, change_N < gained).astype(float)
    clusters = [f"{task}/{i}" for i, task in enumerate(task_N)]
    return stats.PairedScores(tasks=task_N, groups=task_N, clusters=clusters, baseline=a_N, candidate=b_N)


def estimate(scores: stats.PairedScores, **options):
    return stats.retention(scores.table, stats.draw_task_means(scores.table, num_resamples=2_000), **options)


# --- retention -----------------------------------------------------------------------------------------------------


def test_published_averages_come_out() -> None:
    rows = [(t, f"{t}{i}", a / 100, b / 100) for t, (a, b) in PAPER.items() for i in range(3)]
    table = paired(rows).table
    draws = stats.draw_task_means(table)
    assert round(100 * stats.retention(table, draws).value, 2) == 98.67
    assert round(100 * stats.mean_of_ratios(table, draws).value, 2) == 98.65
    generative = ["mmlu_pro", "humaneval", "mbpp", "gsm8k", "math500", "mgsm"]
    assert round(100 * stats.retention(table, draws, table.weights_K(generative)).value, 2) == 97.40
    code_and_math = ["humaneval", "mbpp", "gsm8k", "math500"]
    assert round(100 * stats.retention(table, draws, table.weights_K(code_and_math)).value, 2) == 96.90


def test_retention_by_hand_with_unequal_tasks_and_a_grouped_task() -> None:
    # single: 2/4 -> 1/4. group: members 1/1 -> 1/1 and 1/2 -> 2/2, so (1 + .5)/2 = .75 -> 1.
    rows = [("single", f"s{i}", a, b) for i, (a, b) in enumerate([(1, 1), (1, 0), (0, 0), (0, 0)])]
    rows += [("de", "p0", 1, 1), ("fr", "p0", 1, 1), ("fr", "p1", 0, 1)]
    table = paired(rows, {"de": "multi", "fr": "multi"}).table
    assert table.tasks == ("multi", "single")
    np.testing.assert_allclose(table.task_means_K(table.baseline_CL), [0.75, 0.5])
    np.testing.assert_allclose(table.task_means_K(table.candidate_CL), [1.0, 0.25])
    draws = stats.draw_task_means(table)
    assert stats.retention(table, draws).value == pytest.approx(1.25 / 1.25)
    assert stats.mean_of_ratios(table, draws).value == pytest.approx((1 / 0.75 + 0.5) / 2)
    assert stats.leave_one_out(table) == (("multi", pytest.approx(0.5)), ("single", pytest.approx(4 / 3)))
    assert stats.num_discordant(table) == (2, 6)
    assert stats.num_lone_clusters(table) == 2  # p0 touches both members, p1 only one of them


def test_linearised_standard_error_by_hand() -> None:
    # a = 1,1,1,0; b = 1,0,1,1: R = 1, z = (b - a)/4 = 0, -1/4, 0, 1/4, mean 0; var = 4/3 * 1/8, over .75 squared.
    table = paired([("t", str(i), a, b) for i, (a, b) in enumerate([(1, 1), (1, 0), (1, 1), (0, 1)])]).table
    assert stats.linear_stderr(table) == pytest.approx(math.sqrt(4 / 3 / 8) / 0.75)


def test_bootstrap_agrees_with_linearisation_and_with_a_plain_loop() -> None:
    scores = binary(np.random.default_rng(3), 120, 3, 0.7, 0.15, 0.2)
    table = scores.table
    draws = stats.draw_task_means(table)
    drawn = stats.bootstrap_stderr(draws, table.weights_K())
    assert drawn == pytest.approx(stats.linear_stderr(table), rel=0.05)
    rng = np.random.default_rng(0)
    a_KN, b_KN = (np.reshape(x, (3, 120)) for x in (scores.baseline, scores.candidate))
    ratios = []
    for _ in range(3_000):
        index_KN = rng.integers(0, 120, size=(3, 120))
        ratios.append(np.take_along_axis(b_KN, index_KN, 1).mean() / np.take_along_axis(a_KN, index_KN, 1).mean())
    loop_low, loop_high = np.quantile(ratios, [0.025, 0.975])
    found = stats.retention(table, draws)
    assert (found.low, found.high) == pytest.approx((loop_low, loop_high), abs=0.006)


def test_graded_scores_take_the_other_way_of_drawing_and_agree() -> None:
    rng = np.random.default_rng(5)
    a_N = rng.random(400)
    b_N = np.clip(a_N + rng.normal(-0.02, 0.2, 400), 0, 1)
    table = paired([("t", str(i), a, b) for i, (a, b) in enumerate(zip(a_N, b_N, strict=True))]).table
    draws = stats.draw_task_means(table)
    assert stats.bootstrap_stderr(draws, table.weights_K()) == pytest.approx(stats.linear_stderr(table), rel=0.05)
    assert draws.baseline_QK.mean() == pytest.approx(a_N.mean(), abs=0.002)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.booleans())
def test_the_order_of_documents_has_no_influence(seed: int, n: int, graded: bool) -> None:
    rng = np.random.default_rng(seed)
    draw = rng.random if graded else (lambda size: rng.integers(0, 2, size).astype(float))
    a_N, b_N = draw(n), draw(n)
    rows = [(f"t{i % 2}", f"c{i // 3}", float(a), float(b)) for i, (a, b) in enumerate(zip(a_N, b_N, strict=True))]
    shuffled = [rows[i] for i in rng.permutation(n)]
    one, other = (stats.draw_task_means(paired(r).table, num_resamples=50) for r in (rows, shuffled))
    np.testing.assert_allclose(one.baseline_QK, other.baseline_QK, rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.candidate_QK, other.candidate_QK, rtol=0, atol=1e-12)


def test_both_models_get_the_same_draw() -> None:
    table = paired([("t", str(i), float(i % 3 > 0), float(i % 3 > 0)) for i in range(90)]).table
    draws = stats.draw_task_means(table)
    np.testing.assert_array_equal(draws.baseline_QK, draws.candidate_QK)
    assert draws.baseline_QK.std() > 0


def test_clusters_are_drawn_whole_also_across_tasks() -> None:
    """Ten copies of each answer must not pass for ten times the evidence; shared problems move two tasks at once."""
    rng = np.random.default_rng(8)
    a_C, b_C = (rng.integers(0, 2, 60).astype(float) for _ in range(2))
    problems = list(enumerate(zip(a_C, b_C, strict=True)))
    single = paired([("t", f"c{c}", a, b) for c, (a, b) in problems])
    copies = paired([(task, f"c{c}", a, b) for c, (a, b) in problems for task in ("t", "u") for _ in range(5)])
    one, many = estimate(single), estimate(copies)
    assert many.n == one.n == 60
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.05)
    assert stats.linear_stderr(copies.table) == pytest.approx(stats.linear_stderr(single.table))


def test_few_discordant_clusters_get_the_exact_bound() -> None:
    same = [("t", str(i), 1.0, 1.0) for i in range(100)]
    found = estimate(paired(same), level=0.90)
    assert (found.value, found.high) == pytest.approx((1.0, 1.0))
    assert found.low == pytest.approx(0.05 ** (1 / 100))  # harmful discordance below 1 - 0.05 ** (1 / n)
    assert found.seed is None
    assert stats.is_exact(found)
    four = [("t", str(i), 1.0, float(i >= 4)) for i in range(100)]
    assert estimate(paired(four)).low == pytest.approx(1 - stats.binomial_upper_bound(4, 100, 0.025))
    five = [("t", str(i), 1.0, float(i >= 5)) for i in range(100)]
    assert estimate(paired(five)).method_kind == "paired_bootstrap"


def test_exact_bound_weighs_the_smallest_task() -> None:
    rows = [("small", f"s{i}", 1.0, 1.0) for i in range(20)] + [("big", f"b{i}", 1.0, 1.0) for i in range(180)]
    found = estimate(paired(rows), level=0.90)
    # Each small document weighs 1/40 of the mean, so the 200 clusters bound no better than 1/40 * 200 of the rate.
    assert found.low == pytest.approx(1 - (1 - 0.05 ** (1 / 200)) * 200 / 40)


def test_a_collapsed_candidate_does_not_get_an_interval_without_width() -> None:
    found = estimate(paired([("t", str(i), float(i < 40), 0.0) for i in range(50)]))
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(stats.binomial_upper_bound(0, 50, 0.025) / 0.8)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no documents"),
        ([("t", "c", float("nan"), 1.0)], "finite"),
        ([("t", "c", -1.0, 1.0)], "below 0"),
        ([("t", str(i), 0.0, float(i % 2)) for i in range(20)], "undefined"),
        ([("t", str(i), float(i < 2), float(i % 2)) for i in range(20)], "too few for a ratio"),
        ([("t", str(i), 50.0, 50.0) for i in range(20)], "between 0 and 1"),
    ],
)
def test_no_number_where_there_is_none(rows, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        estimate(paired(rows))


def test_bad_pairings_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        _ = stats.PairedScores(tasks=["t"], groups=["t"], clusters=["c"], baseline=[1.0], candidate=[]).table
    two_groups = stats.PairedScores(
        tasks=["t", "t"], groups=["g", "h"], clusters=["c", "d"], baseline=[1.0, 1.0], candidate=[1.0, 1.0]
    )
    with pytest.raises(ValueError, match="two groups"):
        _ = two_groups.table
    with pytest.raises(ValueError, match="no scores for task"):
        paired([("t", "c", 1.0, 1.0)]).table.weights_K(["u"])


def test_difference_of_means() -> None:
    table = paired([("t", str(i), 2.0 + i % 2, 2.5 + i % 3) for i in range(60)]).table
    found = stats.difference(table, stats.draw_task_means(table))
    assert found.value == pytest.approx(3.5 - 2.5)
    assert found.low < 1.0 < found.high


@pytest.mark.parametrize(
    ("n", "num_tasks", "right", "lost", "gained"),
    [(20, 3, 0.8, 0.3, 0.1), (60, 1, 0.8, 0.25, 0.2), (100, 5, 0.9, 0.06, 0.2), (60, 2, 0.3, 0.4, 0.1)],
)
def test_retention_intervals_cover_the_truth(n: int, num_tasks: int, right: float, lost: float, gained: float) -> None:
    truth = (right * (1 - lost) + (1 - right) * gained) / right
    rng = np.random.default_rng(12)
    found = [estimate(binary(rng, n, num_tasks, right, lost, gained)) for _ in range(200)]
    covered = sum(e.low <= truth <= e.high for e in found)
    assert 182 <= covered <= 198  # 190 expected; 3.1 is one standard deviation


def test_clustered_samples_are_covered_too() -> None:
    """Five samples a problem, strongly alike within it: treating them as independent would cover far less."""
    rng, covered, naive = np.random.default_rng(2), 0, 0
    for _ in range(200):
        rate_C = rng.beta(0.6, 0.4, 40)
        a_CS, b_CS = ((rng.random((40, 5)) < rate_C[:, None] * scale).astype(float) for scale in (1.0, 0.9))
        columns = {"tasks": ["t"] * 200, "groups": ["t"] * 200, "baseline": a_CS.ravel(), "candidate": b_CS.ravel()}
        found = estimate(stats.PairedScores(clusters=[str(i // 5) for i in range(200)], **columns))
        covered += found.low <= 0.9 <= found.high
        naive += stats.linear_stderr(stats.PairedScores(clusters=[str(i) for i in range(200)], **columns).table) < 0.04
    assert 180 <= covered <= 198


def test_ten_thousand_resamples_over_a_full_suite_agree_with_linearisation() -> None:
    """Binary and graded scores of 11 tasks, drawn by different paths; ten thousand resamples must stay affordable."""
    rng = np.random.default_rng(0)
    scores = binary(rng, 1_300, 11, 0.8, 0.05, 0.1)
    graded = stats.PairedScores(
        tasks=scores.tasks, groups=scores.groups, clusters=scores.clusters,
        baseline=rng.random(14_300), candidate=rng.random(14_300),
    )  # fmt: skip
    for case in (scores, graded):
        found = stats.retention(case.table, stats.draw_task_means(case.table))
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * stats.linear_stderr(case.table), rel=0.1)


@given(times=st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=12), scale=st.floats(1e-3, 1e3))
def test_a_mean_time_stays_above_0_and_knows_no_unit(times: list[float], scale: float) -> None:
    """Rounds of exactly 1 second were taken for right answers, and one slow round gave an upper end of hours."""
    found, scaled = stats.mean_time(times), stats.mean_time([scale * time for time in times])
    assert 0 < found.low <= found.value * (1 + 1e-12)
    assert found.value <= found.high * (1 + 1e-12)
    for name in ("value", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(scale * getattr(found, name), rel=1e-6)


def test_mean_times() -> None:
    same = stats.mean_time([1.0] * 5)
    assert (same.value, same.low, same.high) == pytest.approx((1.0, 1.0, 1.0))
    near = stats.mean_time([0.99, 1.0, 1.01, 1.0, 1.0])
    assert near.low == pytest.approx(2 - near.high, abs=1e-3)
    assert stats.mean_time([1.0, 1.0, 1.0, 1.0, 1000.0]).high < 2_000
    assert stats.mean_time([0.1, 0.1, 9.0]).high < 60
    pair = stats.mean_time([1.0, 3.0])
    assert (pair.low, pair.high) == (1.0, 3.0)
    assert pair.level == 0.5
    with pytest.raises(ValueError, match="above 0 seconds"):
        stats.mean_time([1.0, 0.0, 2.0])


@pytest.mark.parametrize("n", [4, 12, 20, 50, 164])
def test_one_flip_never_shows_a_difference(n: int) -> None:
    """Near a baseline's ceiling, one document lost of 20 gave 95 % [75.1, 99.9]: equal models were REFUTED in 9 %."""
    lost = [1.0] * (n - 1) + [0.0]
    for baseline, candidate in (([1.0] * n, lost), ([1.0] * (n - 1) + [0.0], [1.0] * (n - 2) + [0.0, 0.0])):
        names = ["t"] * n
        scores = stats.PairedScores(
            tasks=names, groups=names, clusters=[str(i) for i in range(n)], baseline=baseline, candidate=candidate
        )
        found = estimate(scores)
        assert found.low < 1 <= found.high


# --- bounds, tests, corrections ------------------------------------------------------------------------------------


def test_binomial_bound() -> None:
    assert stats.binomial_upper_bound(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert stats.binomial_upper_bound(7, 7) == 1.0
    upper = stats.binomial_upper_bound(2, 10, 0.025)
    assert upper == pytest.approx(0.5561, abs=1e-4)  # textbook: 2 of 10, 95 % two-sided, 0.0252 to 0.5561
    tail = sum(math.comb(10, k) * upper**k * (1 - upper) ** (10 - k) for k in range(3))
    assert tail == pytest.approx(0.025)
    with pytest.raises(ValueError, match="at least one trial"):
        stats.binomial_upper_bound(0, 0)


def test_holm() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert stats.holm([0.9, 0.8]) == (1.0, 1.0)
    assert stats.holm([]) == ()


def test_mcnemar() -> None:
    assert stats.mcnemar(0, 0) == 1.0
    assert stats.mcnemar(5, 0) == pytest.approx(2 / 32)
    assert stats.mcnemar(3, 9) == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)
    assert stats.mcnemar(4, 4) == 1.0


def test_sign_flips_match_full_enumeration() -> None:
    delta_C = np.array([1.0, 2.0, 0.5, -0.5, 0.0, 1.5, 2.5])
    moved = delta_C[delta_C != 0]
    sums = [abs(np.dot(signs, moved)) for signs in product((-1, 1), repeat=len(moved))]
    exact = np.mean([total >= abs(moved.sum()) - 1e-9 for total in sums])
    assert stats.sign_flip_test(delta_C) == pytest.approx(exact, abs=0.01)
    assert stats.sign_flip_test(delta_C) == stats.sign_flip_test(delta_C[::-1])
    assert stats.sign_flip_test(np.zeros(5)) == 1.0
    assert 0 < stats.sign_flip_test(np.ones(50)) < 0.001


def test_flips_choose_the_test_that_fits() -> None:
    rows = [("plain", f"p{i}", 1.0, float(i >= 6)) for i in range(20)]
    rows += [("samples", f"s{i // 2}", float(i % 2), float(i % 4 == 1)) for i in range(24)]
    plain, samples = stats.flips(paired(rows))
    assert (plain.task, plain.n, plain.num_lost, plain.num_gained) == ("plain", 20, 6, 0)
    assert (plain.method.kind, plain.p_value) == ("exact_mcnemar", pytest.approx(2 / 2**6))
    assert (samples.num_lost, samples.num_gained) == (6, 0)
    assert samples.method.kind == "sign_flips"
    assert plain.p_holm == pytest.approx(min(1, 2 * min(plain.p_value, samples.p_value)), abs=0.05)


# --- speed ---------------------------------------------------------------------------------------------------------


def timed(baseline_s, candidate_s, *, tokens=(10.0, 10.0), launches=None, fixed=False) -> stats.TimedCalls:
    baseline_s, candidate_s = np.asarray(baseline_s, float), np.asarray(candidate_s, float)
    return stats.TimedCalls(
        baseline_s=baseline_s,
        candidate_s=candidate_s,
        baseline_tokens=np.broadcast_to(np.asarray(tokens[0], float), baseline_s.shape),
        candidate_tokens=np.broadcast_to(np.asarray(tokens[1], float), baseline_s.shape),
        launches=launches or ["one"] * len(baseline_s),
        fixed=fixed,
    )


def test_speedups_by_hand() -> None:
    calls = timed([[2, 4], [2, 4]], [[1, 1], [1, 3]], tokens=([10, 30], [10, 20]))
    assert stats.speedup(calls).value == pytest.approx(12 / 6)
    assert stats.speedup(calls, "length").value == pytest.approx(60 / 80)
    assert stats.speedup(calls, "throughput").value == pytest.approx((60 / 6) / (80 / 12))
    assert stats.speedup(calls, "baseline_rate").value == pytest.approx(80 / 12)
    assert stats.speedup(calls, "candidate_rate").value == pytest.approx(60 / 6)
    assert stats.geometric_speedup(calls).value == pytest.approx((2 * 4 * 2 * 4 / 3) ** 0.25)
    assert stats.speedup(calls).n == 4


def test_fixed_calls_interval_is_the_t_interval_over_rounds() -> None:
    """With calls fixed and every round alike within, log S has a textbook interval to compare with."""
    log_R = np.array([0.50, 0.52, 0.49, 0.53, 0.51])
    calls = timed(np.exp(log_R)[:, None] * [[1.0, 2.0]], np.ones((5, 1)) * [[1.0, 2.0]], fixed=True)
    found = stats.speedup(calls, caution="estimated")
    half = t_quantile(0.95, 4) * log_R.std(ddof=1) / math.sqrt(5)
    assert math.log(found.high / found.value) == pytest.approx(half, rel=0.03)
    assert math.log(stats.geometric_speedup(calls).value) == pytest.approx(log_R.mean())


def test_five_launches_are_resampled_fewer_are_not() -> None:
    rng = np.random.default_rng(4)
    shift_R = np.repeat(rng.normal(0, 0.1, 5), 4)  # launches differ, rounds within a launch do not
    baseline_s = np.exp(0.7 + shift_R[:, None] + rng.normal(0, 0.001, (20, 6)))
    many = timed(baseline_s, np.ones((20, 6)), launches=[f"l{i // 4}" for i in range(20)])
    few = timed(baseline_s, np.ones((20, 6)), launches=["l"] * 20)
    launches, rounds = stats.speedup(many), stats.speedup(few)
    assert (launches.method.num_drawn, launches.method.drawn) == (5, "launches")
    assert (rounds.method.num_drawn, rounds.method.drawn) == (20, "rounds")
    assert launches.value == pytest.approx(rounds.value)
    of_launches = t_quantile(0.95, 4) * shift_R[::4].std(ddof=1) / math.sqrt(5)
    assert math.log(launches.high / launches.low) == pytest.approx(2 * of_launches, rel=0.1)
    assert rounds.serial is not None
    assert rounds.serial.effective_rounds < 2  # taken for 20 rounds of one launch, they are all alike by fours


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (lambda: timed([[1.0, 2.0]], [[1.0, 2.0]]), "one measured round"),
        (lambda: timed(np.zeros((0, 3)), np.zeros((0, 3))), "none"),
        (lambda: timed(np.ones((2, 3)), np.ones((2, 2))), "same rounds"),
        (lambda: timed([[1.0], [-1.0]], [[1.0], [1.0]]), "at least 0"),
        (lambda: timed([[1.0], [1.1]], [[1.0], [1.0]]), "one call of sampled prompts"),
    ],
)
def test_no_speedup_where_there_is_none(calls, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stats.speedup(calls())


def test_no_tokens_is_no_throughput() -> None:
    with pytest.raises(ValueError, match="no useful tokens"):
        stats.speedup(timed(np.ones((3, 2)), np.ones((3, 2)), tokens=(0.0, 1.0)), "throughput")


@pytest.mark.parametrize(
    ("num_rounds", "num_calls", "fixed", "call_spread", "noise"),
    [
        (5, 8, True, 0.2, 0.05),
        (5, 20, False, 0.2, 0.05),
        (12, 12, False, 0.1, 0.1),
        (6, 24, False, 0.0, 0.1),
    ],
)
def test_speedup_intervals_cover_the_truth(
    num_rounds: int, num_calls: int, fixed: bool, call_spread: float, noise: float
) -> None:
    """Skewed times, a drift that hits both arms, calls that differ in length and in speedup."""
    rng, covered, trials = np.random.default_rng(6), 0, 200
    lengths, gains = rng.lognormal(0, 0.5, 100_000), rng.normal(0.9, call_spread, 100_000)
    pool = np.arange(num_calls) if fixed else np.arange(100_000)
    truth = lengths[pool].sum() / (lengths[pool] * np.exp(-gains[pool])).sum()
    for _ in range(trials):
        index_P = pool if fixed else rng.choice(pool, num_calls)
        drift_R1 = np.exp(np.linspace(0, 0.1, num_rounds))[:, None]
        shape = (num_rounds, num_calls)
        slow_2RP = [np.exp(rng.exponential(noise, shape) + rng.exponential(0.02, (num_rounds, 1))) for _ in "ab"]
        baseline_s = lengths[index_P] * drift_R1 * slow_2RP[0]
        candidate_s = lengths[index_P] * np.exp(-gains[index_P]) * drift_R1 * slow_2RP[1]
        found = stats.speedup(timed(baseline_s, candidate_s, fixed=fixed), num_resamples=1_000)
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 199


def test_the_end_on_the_side_of_the_tail_is_further_out() -> None:
    """One call in sixteen gains far less than the others: more such calls may be missing from the sample."""
    seconds = np.full((4, 16), 1.0) * np.exp(np.linspace(0, 0.02, 4))[:, None]
    gains = np.where(np.arange(16) == 3, 0.7, 2.0 + 0.02 * np.arange(16))
    found = stats.speedup(timed(seconds, seconds / gains))
    below, beyond = math.log(found.value / found.low), math.log(found.high / found.value)
    assert below > 1.2 * beyond
    mirrored = stats.speedup(timed(seconds / gains, seconds))
    assert math.log(mirrored.high / mirrored.value) == pytest.approx(below, rel=0.05)


def test_the_null_of_a_model_against_itself_covers_one() -> None:
    rng, covered = np.random.default_rng(9), 0
    for _ in range(150):
        lengths = rng.lognormal(0, 0.5, 16)
        arms = [lengths * np.exp(rng.exponential(0.05, (6, 16))) for _ in "ab"]
        found = stats.speedup(timed(*arms), level=stats.NULL_LEVEL, num_resamples=1_000)
        covered += found.low <= 1 <= found.high
        assert found.level == 0.99
    assert covered >= 145


def test_a_dozen_flips_are_not_called_a_loss() -> None:
    """With 13 of 300 answers flipped, as many lost as gained, percentiles alone refuted "nothing is lost" in 6.9 %."""
    rng, refuted = np.random.default_rng(8), 0
    names = [str(i) for i in range(300)]
    for _ in range(600):
        baseline = (rng.random(300) < 0.9).astype(float)
        flips = rng.random(300) < np.where(baseline == 1, 13 / 600 / 0.9, 13 / 600 / 0.1)
        scores = stats.PairedScores(
            tasks=["t"] * 300, groups=["t"] * 300, clusters=names, baseline=baseline, candidate=np.abs(baseline - flips)
        )
        draws = stats.draw_task_means(scores.table, num_resamples=500)
        refuted += stats.retention(scores.table, draws, level=stats.DECISION_LEVEL).high < 1
    assert refuted <= 30


def test_the_mean_of_ratios_varies_by_each_tasks_own_ratio() -> None:
    """One ratio for all tasks made a task that keeps everything vary, as if its answers had differed."""
    kept = [float(i % 2) for i in range(100)]
    lost = [1.0] * 100, [float(i % 2) for i in range(100)]
    tasks, clusters = ["a"] * 100 + ["b"] * 100, [str(i) for i in range(200)]
    scores = stats.PairedScores(
        tasks=tasks, groups=tasks, clusters=clusters, baseline=kept + lost[0], candidate=kept + lost[1]
    )
    draws = stats.draw_task_means(scores.table)
    found = stats.mean_of_ratios(scores.table, draws)
    drawn = np.std((draws.candidate_QK / draws.baseline_QK).mean(axis=1))
    assert found.high - found.low == pytest.approx(2 * 1.98 * drawn, rel=0.1)


def test_the_mean_of_skew_scores_supports_no_more_than_it_may() -> None:
    """Student's t supported a mean at its very limit in 10 % where most of 25 graded scores are 1."""
    rng, above = np.random.default_rng(12), 0
    for _ in range(2_000):
        found = stats.mean_score(1 - rng.beta(0.5, 4, 25), [str(i) for i in range(25)], level=stats.DECISION_LEVEL)
        above += found.low > 1 - 0.5 / 4.5
    assert above / 2_000 < 0.06  # one standard deviation is 0.005


def test_two_values_are_not_taken_for_skew() -> None:
    found = stats.mean_score([1.0, 3.0], ["a", "b"])
    assert found.high - found.value == pytest.approx(found.value - found.low)


def test_a_mean_at_the_edge_is_never_certain() -> None:
    """Thirty problems of five samples each, all right: the t interval had no width at all."""
    clusters = [str(i // 5) for i in range(150)]
    found = stats.mean_score([1.0] * 150, clusters, level=stats.DECISION_LEVEL)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.05 ** (1 / 30))
    one_off = stats.mean_score([0.0] * 149 + [1.0], clusters, level=stats.DECISION_LEVEL)
    assert one_off.high == pytest.approx(stats.binomial_upper_bound(1, 30))
    seconds = stats.mean_score([2.0, 2.5, 3.0], ["a", "b", "c"])
    assert method_text(seconds) == "t interval over clusters, corrected for skewness"
