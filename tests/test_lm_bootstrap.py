"""Standard errors of lm-eval's own aggregations, held against its own bootstrap."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from lm_eval.api import metrics

from twotower_eval.measure.harness import bootstrap

CHANCE = random.Random(1)
NUMBERS = [CHANCE.gauss(-2, 1) for _ in range(25)]
PAIRS = [(CHANCE.randint(0, 1), CHANCE.randint(0, 1)) for _ in range(25)]
CLASSES = [(gold, gold if CHANCE.random() < 0.5 else CHANCE.choice("abc")) for gold in "abc" * 8]
TEXTS = [(["the cat sat on the mat"], ["the cat sat on a mat"]), (["a b c d e"], ["a b c d f"]), (["x y"], ["z y"])]


@pytest.mark.parametrize(
    ("name", "function", "items"),
    [
        ("perplexity", metrics.perplexity, NUMBERS),
        ("median", metrics.median, NUMBERS),
        ("nanmean", metrics.nanmean, [*NUMBERS, float("nan")]),
        ("f1", metrics.f1_score, PAIRS),
        ("mcc", metrics.matthews_corrcoef, PAIRS),
        ("mcc", metrics.matthews_corrcoef, CLASSES),
        ("acc", metrics.mean, NUMBERS),
        ("bleu", metrics.bleu, TEXTS),
        ("chrf", metrics.chrf, TEXTS),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_it_is_lm_evals(
    name: str, function: Callable[[Any], float], items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its draws, so its number."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setattr(bootstrap, "NUM_DRAWS", 2000)
    monkeypatch.setattr(bootstrap, "NUM_AT_ONCE", 7 * len(items))
    iters = 100 if name in bootstrap.OF_TEXTS else 2000
    expected = metrics.stderr_for_metric(function, iters)(items)  # type: ignore[misc]
    assert bootstrap.standard_error(name, function, items) == pytest.approx(expected, rel=1e-9)


def test_where_lm_eval_gives_none_there_is_none() -> None:
    assert bootstrap.standard_error("x", metrics.weighted_perplexity, [(-1.0, 2.0), (-2.0, 3.0)]) is None
    assert bootstrap.standard_error("x", lambda items: 1.0, [1.0, 2.0]) is None
    assert bootstrap.standard_error("acc", metrics.mean, [1.0]) is None
