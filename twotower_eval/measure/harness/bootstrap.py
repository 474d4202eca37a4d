"""Standard errors as lm-eval writes them beside its scores: closed forms, or its bootstrap, draw by draw.

lm-eval calls an aggregation 100,000 times, for minutes. The same draws, from Python's generator, are evaluated here
many at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from twotower_eval.measure.suites.lm_types import Aggregation

Indices = NDArray[np.intp]  # one row for each draw of documents
Figures = NDArray[np.float64]
NUM_DRAWS, NUM_OF_SEED = 100_000, 1000  # lm-eval's defaults; a new seed behind every thousand
NUM_OF_TEXTS = 100  # of metrics that read texts, by their names
OF_TEXTS = ("bleu", "chrf", "chrf++", "ter")
NUM_AT_ONCE = 4_000_000  # indices in memory


def standard_error(metric: str, function: Aggregation, items: Sequence[object]) -> float | None:
    """lm-eval's standard error of an aggregation over documents' items; None where it gives none."""
    from lm_eval.api import metrics

    closed_forms = {metrics.mean: metrics.mean_stderr, metrics.acc_all: metrics.acc_all_stderr}
    if len(items) < 2:
        return None
    if function in closed_forms:
        return float(closed_forms[function](items))
    if (make := _many(function, items)) is not None:
        return _deviation(np.concatenate([make(drawn_DN) for drawn_DN in _draws(len(items))]))
    if metric in OF_TEXTS and function in (metrics.bleu, metrics.chrf, metrics.chrfpp, metrics.ter):
        chance = random.Random(0)
        values = [function(chance.choices(items, k=len(items))) for _ in range(NUM_OF_TEXTS)]
        return _deviation(np.array(values, float))
    return None


def _deviation(values: Figures) -> float:
    return float(values.std(ddof=1))


def _draws(num_items: int) -> Iterator[Indices]:
    """The documents that lm-eval draws, some draws at a time."""
    at_once = max(1, NUM_AT_ONCE // num_items)
    for seed in range(NUM_DRAWS // NUM_OF_SEED):
        _, state, _ = random.Random(seed).getstate()
        chance = np.random.RandomState()
        # The same generator under another name; the last two are of normal draws.
        chance.set_state(("MT19937", np.array(state[:-1], np.uint32), state[-1], 0, 0.0))
        for first in range(0, NUM_OF_SEED, at_once):
            num = min(at_once, NUM_OF_SEED - first)
            yield (chance.random_sample((num, num_items)) * num_items).astype(np.intp)


def _many(function: Aggregation, items: Sequence[object]) -> Callable[[Indices], Figures] | None:
    """The aggregation of many draws of these items; None if it is not one of lm-eval's that are known here."""
    from lm_eval.api import metrics

    if function in (metrics.f1_score, metrics.matthews_corrcoef):
        golds, answers = zip(*cast("Sequence[tuple[object, object]]", items), strict=True)
        return _f1(golds, answers) if function is metrics.f1_score else _matthews(golds, answers)
    if function not in (metrics.perplexity, metrics.median, metrics.nanmean):
        return None
    values_N = np.array(items, float)
    if function is metrics.perplexity:
        return lambda drawn_DN: np.exp(-values_N[drawn_DN].mean(axis=1))
    if function is metrics.median:
        return lambda drawn_DN: np.sort(values_N[drawn_DN], axis=1)[:, len(items) // 2]
    return lambda drawn_DN: np.nanmean(values_N[drawn_DN], axis=1)


def _f1(golds: Sequence[object], answers: Sequence[object]) -> Callable[[Indices], Figures]:
    """F1 of the class 1; 0 of a draw that has none of it."""
    gold_N, said_N = (np.array([one == 1 for one in side]) for side in (golds, answers))
    found_N, either_N = gold_N & said_N, gold_N.astype(int) + said_N

    def scores(drawn_DN: Indices) -> Figures:
        either_D = either_N[drawn_DN].sum(axis=1)
        return np.asarray(2 * found_N[drawn_DN].sum(axis=1) / np.maximum(either_D, 1))

    return scores


def _matthews(golds: Sequence[object], answers: Sequence[object]) -> Callable[[Indices], Figures]:
    """Matthews' correlation of any number of classes; 0 of a draw with a single one on either side."""
    classes = list(dict.fromkeys([*golds, *answers]))
    gold_N, said_N = (np.array([classes.index(one) for one in side]) for side in (golds, answers))

    def scores(drawn_DN: Indices) -> Figures:
        gold_DN, said_DN = gold_N[drawn_DN], said_N[drawn_DN]
        num = drawn_DN.shape[1]
        right_D = (gold_DN == said_DN).sum(axis=1)
        gold_DC, said_DC = (
            np.stack([(one_DN == at).sum(axis=1) for at in range(len(classes))], axis=1)
            for one_DN in (gold_DN, said_DN)
        )
        both_D = right_D * num - (gold_DC * said_DC).sum(axis=1)
        spread_D = (num**2 - (gold_DC**2).sum(axis=1)) * (num**2 - (said_DC**2).sum(axis=1))
        return np.asarray(np.where(spread_D == 0, 0.0, both_D / np.sqrt(np.maximum(spread_D, 1))))

    return scores
