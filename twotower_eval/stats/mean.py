"""Mean score of one model alone, with its interval over clusters; shape letters as in ``intervals``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower_eval.records import Estimate
from twotower_eval.stats.intervals import FEW, LEVEL, Floats, binomial_upper_bound, t_quantile
from twotower_eval.stats.paired import Ints

EPSILON = 1e-12


def mean_score(values: Sequence[float], clusters: Sequence[str], *, level: float = LEVEL) -> Estimate:
    """Mean score of one model alone: exact binomial interval for one right-or-wrong score a cluster, else Student's t.

    Where scores lie between 0 and 1 and fewer than 5 of many clusters are not all 0, or not all 1, the t interval says
    too little of the others: an exact bound, as if every cluster were as heavy as the heaviest, widens it. ValueError
    for no scores, and for graded scores of a single cluster.
    """
    value_N = np.asarray(values, dtype=float)
    if len(value_N) == 0:
        raise ValueError("no scores, so there is no mean")
    _, code_N = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    n, mean = int(code_N.max()) + 1, float(value_N.mean())
    if n == len(value_N) and np.isin(value_N, (0.0, 1.0)).all():
        right, alpha = int(value_N.sum()), (1 - level) / 2
        low, high = 1 - binomial_upper_bound(n - right, n, alpha), binomial_upper_bound(right, n, alpha)
        return Estimate(value=mean, low=low, high=high, level=level, n=n, method="exact binomial interval")
    if n < 2:
        raise ValueError("one cluster only: its variation is unknown, so there is no interval")
    z_C = np.zeros(n)
    np.add.at(z_C, code_N, (value_N - mean) / len(value_N))
    half = t_quantile(level, n - 1) * float(np.sqrt(n / (n - 1) * (z_C**2).sum()))
    below, above = (_extreme_bound(edge_N, code_N, level) for edge_N in (value_N, 1 - value_N))
    low, high = min(mean - half, 1 - above), max(mean + half, below)
    method = "t interval over clusters" + (", widened to the exact bound" if max(above, below) > 0 else "")
    return Estimate(value=mean, low=low, high=high, level=level, n=n, method=method)


def _extreme_bound(value_N: Floats, code_N: Ints, level: float) -> float:
    """Upper bound of a mean of scores that are 0 in all but a few clusters; 0 where that is not so."""
    if value_N.min() < 0 or value_N.max() > 1:
        return 0.0
    sizes_C, sums_C = np.bincount(code_N), np.bincount(code_N, value_N)
    num, n = int((sums_C > EPSILON).sum()), len(sizes_C)
    if num >= FEW or 2 * num >= n:
        return 0.0
    heaviest = float(sizes_C.max() * n / sizes_C.sum())
    return min(1.0, heaviest * binomial_upper_bound(num, n, (1 - level) / 2))
