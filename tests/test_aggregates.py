"""Scores of all documents together: equal to lm-eval's functions, and what resampling says of them."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.api.metrics  # noqa: F401  # registers its functions
import numpy as np
import pytest
from lm_eval.api.registry import AGGREGATION_REGISTRY

from twotower_eval.analyse import stats
from twotower_eval.analyse.stats import aggregates
from twotower_eval.analyse.words.facts import method_text
from twotower_eval.measure.harness.scoring import parts_of, replicates_of, value_of
from twotower_eval.measure.suites import aggregation_name
from twotower_eval.progress import Advance
from twotower_eval.records import LABEL_AGGREGATIONS, MEAN, SUMMED_AGGREGATIONS, Estimate


class Source:
    """What of an lm-eval task says how items become one number."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def aggregation(self) -> dict[str, Any]:
        return {"m": self.function}


def text(rng: np.random.Generator, num: int) -> str:
    return " ".join(str(word) for word in rng.choice(["a", "b.", "the", "cat", "sat", "Ünder"], size=num))


def items_of(name: str, rng: np.random.Generator, num: int = 40) -> list[Any]:
    """Items as lm-eval's process_results gives them."""
    likelihoods = -rng.gamma(3, 10, num)
    if name == "perplexity":
        return [float(value) for value in likelihoods / 50]
    if name == "nanmean":
        return [math.nan if rng.random() < 0.3 else float(value) for value in rng.random(num)]
    if name in ("weighted_perplexity", "bits_per_byte"):
        return [
            (float(value), int(weight)) for value, weight in zip(likelihoods, rng.integers(1, 40, num), strict=True)
        ]
    if name in LABEL_AGGREGATIONS:
        gold_N = rng.integers(0, 2 if name == "f1" else 4, num)
        given_N = np.where(rng.random(num) < 0.6, gold_N, rng.integers(0, 2, num))
        return [(int(gold), given) for gold, given in zip(gold_N, given_N, strict=True)]
    return [[text(rng, rng.integers(0, 9)), text(rng, rng.integers(0, 9))] for _ in range(num)]


def summed(name: str, *arms: list[Any]) -> stats.WholeScores:
    parts = [[parts_of(name, item) for item in items] for items in arms]
    assert not any(isinstance(part, str) for found in parts for part in found), parts
    return stats.summed(name, parts, [f"d{i}" for i in range(len(arms[0]))])  # type: ignore[arg-type]


def test_every_sum_that_reports_know_is_kept_while_measuring() -> None:
    assert {*aggregates.FUNCTIONS, *aggregates.LOG_FUNCTIONS, *aggregates.LABEL_FUNCTIONS} == SUMMED_AGGREGATIONS


@pytest.mark.parametrize("name", sorted(SUMMED_AGGREGATIONS))
@pytest.mark.parametrize("num", [1, 2, 40])
def test_a_score_from_parts_is_lm_evals_own(name: str, num: int) -> None:
    for seed in range(5):
        items = items_of(name, np.random.default_rng(seed), num)
        own = value_of(Source(AGGREGATION_REGISTRY[name]), "m", items)
        if isinstance(own, str):
            assert name == "nanmean"
            assert "is nan" in own
        else:
            assert summed(name, items).value() == pytest.approx(own, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["weighted_perplexity", "bleu"])
def test_draws_are_lm_evals_function_over_resampled_documents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spread of the draws is that of the function itself, called on documents drawn one by one."""
    monkeypatch.setattr("twotower_eval.measure.harness.scoring.NUM_REPLICATES", 300)
    items = items_of(name, np.random.default_rng(3), 30)
    found = summed(name, items)
    direct = replicates_of(Source(AGGREGATION_REGISTRY[name]), "m", items, [f"d{i}" for i in range(30)])
    assert isinstance(direct, tuple)
    draws_Q = np.exp(found.draws_AQ[0]) if found.log else found.draws_AQ[0]
    assert np.mean(direct) == pytest.approx(draws_Q.mean(), abs=0.2 * np.std(direct))
    assert np.std(direct) == pytest.approx(draws_Q.std(), rel=0.15)


def test_a_perplexitys_interval_is_never_negative_and_holds_its_value() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        items = [(-float(rng.gamma(0.5, 200)), int(rng.integers(1, 5))) for _ in range(4)]
        found = summed("weighted_perplexity", items).score()
        assert 0 < found.low < found.value < found.high


LEAST = {"f1": 0, "matthews_corrcoef": -1, "perplexity": 1, "weighted_perplexity": 1}
MOST = {"f1": 1, "matthews_corrcoef": 1, "nanmean": 1, "bleu": 100, "chrf": 100, "chrf++": 100}
SPANS = {
    **dict.fromkeys(("f1", "nanmean"), 1),
    "matthews_corrcoef": 2,
    **dict.fromkeys(("bleu", "chrf", "chrf++"), 100),
}


def near_the_end(name: str, rng: np.random.Generator, num: int) -> list[Any]:
    """Items of few documents, whose score is near the end of its range."""
    if name in LABEL_AGGREGATIONS:
        gold_N = rng.integers(0, 2, num)
        return [(int(gold), int(gold if rng.random() < 0.9 else 1 - gold)) for gold in gold_N]
    if name == "nanmean":
        return [math.nan if rng.random() < 0.1 else float(value) for value in rng.beta(9, 0.2, num)]
    if name == "perplexity":
        return [-float(value) for value in rng.gamma(0.1, 1, num)]
    if name in ("weighted_perplexity", "bits_per_byte"):
        return [(-float(rng.gamma(0.1, 1)), int(rng.integers(1, 40))) for _ in range(num)]
    texts = [text(rng, 8) for _ in range(num)]
    return [[one, one if rng.random() < 0.7 else text(rng, 8)] for one in texts]


def bounded(name: str, found: stats.WholeScores) -> Iterator[tuple[float, float, Estimate]]:
    """Least, most and an interval, of all that has one."""
    most, span = MOST.get(name, math.inf) * (1 + 1e-12), SPANS.get(name, math.inf)
    for of, (low, high) in {
        stats.WholeScores.score: (LEAST.get(name, 0), most),
        partial(stats.WholeScores.score, arm=1): (LEAST.get(name, 0), most),
        stats.WholeScores.difference: (-span, span),
        stats.WholeScores.retention: (-math.inf if name == "matthews_corrcoef" else 0, math.inf),
    }.items():
        with contextlib.suppress(ValueError):  # where there is no interval
            yield low, high, of(found)


@pytest.mark.parametrize("name", sorted(SUMMED_AGGREGATIONS))
def test_no_interval_leaves_the_range_of_its_score(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those of a group's mean; differences are within the range's width, and retention is not negative."""
    monkeypatch.setattr(aggregates, "NUM_RESAMPLES", 1000)
    num = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        found = summed(name, *[near_the_end(name, rng, 6 + seed) for _ in range(2)])
        group = stats.averaged([found, summed(name, *[items_of(name, rng, 40) for _ in range(2)])], [1, 1])
        for low, high, one in (*bounded(name, found), *bounded(name, group)):
            assert low <= one.low <= one.value <= one.high <= high
            num += 1
    assert num >= 9


def test_the_mean_of_perplexities_has_an_interval_on_their_own_scale() -> None:
    """One text that a model finds very unlikely made an interval from -82,106 to 82,298 about a mean of 96."""
    rng = np.random.default_rng(0)
    easy = [(-float(rng.gamma(0.5, 20)), int(rng.integers(1, 9))) for _ in range(6)]
    hard = [(-float(rng.gamma(0.5, 60)), int(rng.integers(1, 9))) for _ in range(6)]
    members = [summed("weighted_perplexity", items) for items in (easy, hard)]
    group = stats.averaged(members, [1, 3])
    assert group.value() == pytest.approx((members[0].value() + 3 * members[1].value()) / 4)
    found = group.score()
    assert 1 <= found.low < found.value < found.high
    draws_Q = np.exp(group.draws_AQ[0])
    both = sum(w * np.mean(np.exp(one.draws_AQ[0])) for w, one in zip((0.25, 0.75), members, strict=True))
    assert draws_Q.mean() == pytest.approx(both)
    assert found.high <= draws_Q.max() * 50


def test_a_function_of_unknown_range_keeps_to_its_draws() -> None:
    """A perplexity by a task's own function went from -20 to 78 about 9.5."""
    items = [float(value) for value in np.random.default_rng(1).gamma(0.3, 8, 12)]
    source = Source(lambda drawn: math.exp(sum(drawn) / len(drawn)))
    names = [f"d{i}" for i in range(len(items))]
    own = value_of(source, "m", items)
    drawn = replicates_of(source, "m", items, names)
    assert isinstance(drawn, tuple)
    assert isinstance(own, float)
    one = stats.replicated("own", [own, own * 2], [drawn, [2 * value for value in drawn]], len(items), seed=0)
    for arm in (0, 1):
        score = one.score(arm)
        assert min(one.draws_AQ[arm]) <= score.low < score.value < score.high <= max(one.draws_AQ[arm])
    assert one.difference().low >= min(drawn)
    group = stats.averaged([one, summed("perplexity", [-1.0, -2.0, -2.5, -0.5], [-1.0, -2.0, -2.2, -0.5])], [1, 1])
    assert group.score().low > 0


def test_one_document_that_would_overflow_is_part_of_the_perplexity() -> None:
    items = [(-2000.0, 1), (-3.0, 900), (-4.0, 1000)]
    assert summed("weighted_perplexity", items).value() == pytest.approx(math.exp(2007 / 1901))
    alone = value_of(Source(AGGREGATION_REGISTRY["weighted_perplexity"]), "m", items[:1])
    assert alone == "lm-eval's weighted_perplexity of all documents fails (OverflowError: math range error)"
    assert parts_of("weighted_perplexity", items[0]) == (-2000.0, 1.0)


def test_documents_of_one_cluster_are_drawn_together() -> None:
    items = items_of("weighted_perplexity", np.random.default_rng(0), 40)
    apart = stats.summed("weighted_perplexity", [items * 4], [str(i) for i in range(160)]).score()
    together = stats.summed("weighted_perplexity", [items * 4], [str(i % 40) for i in range(160)]).score()
    assert together.n == 40
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), rel=0.15)


def test_intervals_of_scores_cover_what_is_true() -> None:
    """Of 60 worlds with a perplexity of 8 and one of 9, few intervals miss the truth."""
    missed = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        weight_N = rng.integers(5, 60, 50)
        arms = [[(-float(w * math.log(true) * rng.gamma(20, 1 / 20)), int(w)) for w in weight_N] for true in (8.0, 9.0)]
        found = stats.summed("weighted_perplexity", arms, [str(i) for i in range(50)])
        missed += not found.difference().low < 1 < found.difference().high
        missed += not found.score(0).low < 8 < found.score(0).high
    assert missed <= 0.1 * 120


def test_differences_and_retention_are_paired() -> None:
    rng = np.random.default_rng(5)
    gold_N = rng.integers(0, 2, 200)
    base_N = np.where(rng.random(200) < 0.8, gold_N, 1 - gold_N)
    worse_N = np.where(rng.random(200) < 0.1, 1 - base_N, base_N)
    arms = [list(zip(gold_N.tolist(), given_N.tolist(), strict=True)) for given_N in (base_N, worse_N)]
    found = summed("f1", *arms)
    difference, kept = found.difference(), found.retention()
    assert difference.value == pytest.approx(found.value(1) - found.value(0))
    assert kept.value == pytest.approx(found.value(1) / found.value(0))
    assert difference.high < 0 < 1 - kept.high
    unpaired = math.hypot(*(found.score(arm).high - found.score(arm).low for arm in (0, 1)))
    assert difference.high - difference.low < unpaired


def test_what_resampling_cannot_tell_has_no_interval() -> None:
    same = items_of("bleu", np.random.default_rng(0), 8)
    found = summed("bleu", same, same)
    with pytest.raises(ValueError, match="0 of 8 clusters differ: too few"):
        found.difference()
    with pytest.raises(ValueError, match="one cluster only"):
        summed("perplexity", [-1.0]).score()
    with pytest.raises(ValueError, match="no cluster changes the score"):
        summed("f1", [(1, 1)] * 30).score()
    with pytest.raises(ValueError, match="no value in"):
        summed("nanmean", [math.nan, 1.0, 0.5]).score()
    with pytest.raises(ValueError, match="not above 0"):
        summed("matthews_corrcoef", [(0, 1), (1, 0)] * 9, [(0, 0), (1, 0)] * 9).retention()


def test_functions_of_a_tasks_own_are_resampled_where_the_documents_are() -> None:
    clusters = [f"c{i // 2}" for i in range(30)]
    source = Source(max)
    first = replicates_of(source, "m", list(range(30)), clusters)
    assert isinstance(first, tuple)
    second = replicates_of(source, "m", list(range(1, 31)), clusters)
    assert isinstance(second, tuple)
    assert [b - a for a, b in zip(first, second, strict=True)] == [1] * len(first), "both arms draw the same clusters"
    found = stats.replicated("max", [29.0, 30.0], [first, second], 15, seed=0)
    assert found.value(1) == 30
    assert found.score(0).low < 29
    assert method_text(found.score(0)) == "clustered bootstrap through max, 1,000 resamples"
    assert aggregation_name(source, "m") == "builtins.max"
    assert aggregation_name(source, "another") == MEAN


def agg(key: str, items: list[Any], *more: Any, scale: float = 1.0) -> float:
    return len(items) * scale


def test_functions_without_a_name_of_their_own_are_told_apart() -> None:
    """All of squad's metrics were by functools.partial."""
    module = __name__.rpartition(".")[2]

    def named(function: Any, metric: str = "f1") -> str:
        return aggregation_name(type("Own", (), {"aggregation": lambda self: {metric: function}})(), metric)

    assert named(partial(agg, "exact")).endswith(f"{module}.agg('exact')")
    assert named(partial(partial(agg, "f1"), scale=100.0)).endswith("agg('f1', scale=100.0)")
    assert named(partial(agg, max)).endswith("agg(builtins.max)")
    assert named(partial(agg, object())).endswith("agg(object)")
    assert named(lambda items: 1.0).endswith(f"{module}.test_functions_without_a_name_of_their_own_are_told_apart.f1")
    assert named(lambda items: 2.0, "em") != named(lambda items: 1.0)
    assert "<" not in named(lambda items: 1.0)
    assert named(AGGREGATION_REGISTRY["f1"]) == "f1"


def test_a_slow_function_is_resampled_as_often_as_its_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 documents took a minute for each metric and arm, and squad's metrics hours."""
    clock_s = itertools.count(0.0, 0.5)  # half a second a call
    monkeypatch.setattr("twotower_eval.measure.harness.scoring.time", SimpleNamespace(monotonic=lambda: next(clock_s)))
    clusters, progress = [f"c{i // 2}" for i in range(30)], Noted()

    def called(limit_s: float, items: list[int]) -> tuple[float, ...]:
        monkeypatch.setattr("twotower_eval.measure.harness.scoring.BUDGET_S", limit_s)
        found = replicates_of(Source(max), "m", items, clusters, progress)
        assert isinstance(found, tuple)
        return found

    some, more = called(70.0, list(range(30))), called(0.0, list(range(1, 31)))
    assert (len(some), len(more), len(called(1e9, list(range(30))))) == (139, 100, 1000)
    assert [b - a for a, b in zip(some, more, strict=False)] == [1] * 100, "the same draws in the same order"
    assert progress.tracked == [("resampling m, by builtins.max", num) for num in (139, 100, 1000)]
    both = stats.replicated("max", [29.0, 30.0], [some, more], 15, seed=0)
    assert method_text(both.score(1)) == "clustered bootstrap through max, 100 resamples"


class Noted:
    """Progress that keeps what was tracked."""

    def __init__(self) -> None:
        self.tracked: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def track(self, total: int, description: str) -> Iterator[Advance]:
        done = 0

        def advance(num: int = 1, /) -> None:
            nonlocal done
            done += num

        yield advance
        assert done <= total
        self.tracked.append((description, done))

    def note(self, text: str) -> None:
        raise AssertionError(text)


def test_a_function_that_fails_says_so() -> None:
    assert parts_of("perplexity", -math.inf) == "lm-eval's item of this document is -inf"
    assert parts_of("f1", None) == "lm-eval's item of this document is not one of f1 (TypeError)"
    assert "fails (TypeError" in str(value_of(Source(AGGREGATION_REGISTRY[MEAN]), "m", [(1, 2)]))
    assert "is inf" in str(value_of(Source(AGGREGATION_REGISTRY["perplexity"]), "m", [-math.inf]))
    with pytest.raises(FileNotFoundError):  # no property of the answers
        value_of(Source(lambda items: Path("/not/there").read_text()), "m", [1])


@pytest.mark.parametrize("name", ["perplexity", "weighted_perplexity", "bits_per_byte", "bleu", "chrf", "ter", "f1"])
def test_no_interval_leaves_the_range_of_its_function(name: str) -> None:
    """Few and very unlike documents: symmetric intervals went below 0 and above 100."""
    rng = np.random.default_rng(3)
    if name in ("perplexity", "weighted_perplexity", "bits_per_byte"):
        nats_N = -(10.0 ** rng.uniform(-4, 2, 7))
        items: list[Any] = nats_N.tolist() if name == "perplexity" else [(nats, 3) for nats in nats_N.tolist()]
    elif name == "f1":
        items = [(1, 1)] * 6 + [(0, 1)]
    else:
        items = [("the cat sat on a mat", "the cat sat on a mat")] * 4 + [
            ("a", "b b b b b b b b"),
            ("c d", "c"),
            ("e", "f"),
        ]
    found, again = summed(name, items, items[::-1]), summed(name, items[::-1])
    one = found.score(0)
    low, high = aggregates.RANGES[name]
    assert low <= one.low <= one.value <= one.high <= high
    assert again.score().value == pytest.approx(one.value)
    group = stats.averaged([found, found], [1.0, 3.0]).score()
    assert low <= group.low <= group.value <= group.high <= high
    if high < math.inf and (found.num_discordant or 0) >= 5:
        change = found.difference()
        assert low - high <= change.low <= change.value <= change.high <= high - low
