"""Means with their intervals: of one model's scores over clusters, and of ratios; shape letters as in ``intervals``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower_eval.analyse.stats.intervals import (
    EPSILON,
    FEW,
    LEVEL,
    Floats,
    binomial_upper_bound,
    dof_of_mean,
    one_more,
    skewed_t_interval,
    t_quantile,
    third_cumulant,
)
from twotower_eval.analyse.stats.paired import PairedScores, draw_task_means
from twotower_eval.analyse.stats.quality import difference
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Estimate, Method


def mean_score(values: Sequence[float], clusters: Sequence[str], *, level: float = LEVEL) -> Estimate:
    """Mean score of one model alone: exact binomial interval for one right-or-wrong score a cluster, else Student's t.

    The latter is corrected for skewness: without that, the mean of 25 graded scores near 1 supported what is false in
    10 %. Where scores lie between 0 and 1 and fewer than 5 of many clusters are not all 0, or not all 1, the t interval
    says too little of the others: an exact bound, as if every cluster were as heavy as the heaviest, widens it.
    NoEstimate for no scores, and for graded scores of a single cluster.
    """
    value_N = np.asarray(values, dtype=float)
    if len(value_N) == 0:
        raise NoEstimate("no scores, so there is no mean")
    _, code_N = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    n, mean = int(code_N.max()) + 1, float(value_N.mean())
    if n == len(value_N) and np.isin(value_N, (0.0, 1.0)).all():
        right, alpha = int(value_N.sum()), (1 - level) / 2
        low, high = 1 - binomial_upper_bound(n - right, n, alpha), binomial_upper_bound(right, n, alpha)
        return Estimate(value=mean, low=low, high=high, level=level, n=n, method=Method(kind="exact_binomial"))
    if n < 2:
        raise NoEstimate("one cluster only: its variation is unknown, so there is no interval")
    z_C = np.zeros(n)
    np.add.at(z_C, code_N, (value_N - mean) / len(value_N))
    low, high = t_interval_of_mean(mean, n * z_C, level)
    sizes_C = np.bincount(code_N).astype(float)
    sums_C = np.bincount(code_N, value_N).astype(float)
    inside = value_N.min() >= 0 and value_N.max() <= 1
    below, above = (extreme_bound(edge_C, sizes_C, level) if inside else 0.0 for edge_C in (sums_C, sizes_C - sums_C))
    low, high = min(low, 1 - above), max(high, below)
    if inside:
        low, high = max(low, 0.0), min(high, 1.0)
    method = Method(kind="t_of_clusters", widened=max(above, below) > 0)
    return Estimate(value=mean, low=low, high=high, level=level, n=n, method=method)


def mean_of_members(
    values: Sequence[float], tasks: Sequence[str], clusters: Sequence[str], *, by_size: bool, level: float = LEVEL
) -> Estimate:
    """Mean over a group's tasks of one model's mean scores, each task weighing as many as its documents or all alike.

    The interval is that of a difference from a model that scores 0 everywhere. Scores between 0 and 1 keep it there,
    and the exact bound of :func:`mean_score` widens it. NoEstimate where a task has a single cluster.
    """
    if len(set(tasks)) == 1:
        return mean_score(values, clusters, level=level)
    group = "group"
    scores = PairedScores(
        tasks=tasks,
        groups=[group] * len(values),
        clusters=clusters,
        baseline=[0.0] * len(values),
        candidate=values,
        by_size=frozenset({group} if by_size else ()),
    )
    table = scores.table
    lone = [leaf for leaf, num in zip(table.leaves, (table.count_CL > 0).sum(axis=0), strict=True) if num < 2]
    if lone:
        raise NoEstimate(f"{lone[0]} has one cluster only: its variation is unknown, so there is no interval")
    draws = draw_task_means(table)
    found = difference(table, draws, level=level)
    low, high = found.low, found.high
    if min(values) >= 0 and max(values) <= 1:
        weight_L = table.averaging_KL[0] / table.count_CL.sum(axis=0)
        sums_C, sizes_C = table.candidate_CL @ weight_L, table.count_CL @ weight_L
        below, above = (extreme_bound(edge_C, sizes_C, level) for edge_C in (sums_C, sizes_C - sums_C))
        low, high = max(0.0, min(low, 1 - above)), min(1.0, max(high, below))
    # Nothing is paired: the other arm is a model that scores 0.
    method = Method(kind="clustered_bootstrap", num_resamples=len(draws.baseline_QK), num_tasks=len(table.leaves))
    return Estimate(value=found.value, low=low, high=high, level=level, n=found.n, method=method, seed=found.seed)


def geometric_mean(values: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """Geometric mean of independent ratios, with Student's interval on the log. NoEstimate for fewer than two."""
    log_N = np.log(np.asarray(values, dtype=float))
    if len(log_N) < 2:
        raise NoEstimate(f"{'one ratio' if len(log_N) else 'no ratio'} only: its variation is unknown")
    variance = float(log_N.var(ddof=1)) / len(log_N)
    return _on_the_log(float(log_N.mean()), variance, len(log_N) - 1, len(log_N), level)


def ratio_of_geometric_means(above: Sequence[float], below: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """Geometric mean of one sample over that of another, with Welch's interval on the log. NoEstimate where either has
    fewer than two values; ``n`` counts the smaller one."""
    logs = [np.log(np.asarray(values, dtype=float)) for values in (above, below)]
    if min(map(len, logs)) < 2:
        raise NoEstimate(f"{min(map(len, logs))} of one kind only: their variation is unknown")
    parts = [float(log_N.var(ddof=1)) / len(log_N) for log_N in logs]
    squares = sum(part**2 / (len(log_N) - 1) for part, log_N in zip(parts, logs, strict=True))
    dof = sum(parts) ** 2 / squares if squares > 0 else 1e9
    value = float(logs[0].mean() - logs[1].mean())
    return _on_the_log(value, sum(parts), dof, min(map(len, logs)), level)


def _on_the_log(log_value: float, variance: float, dof: float, n: int, level: float) -> Estimate:
    reach = t_quantile(level, dof) * variance**0.5
    low, value, high = (float(np.exp(log_value + side * reach)) for side in (-1, 0, 1))
    return Estimate(value=value, low=low, high=high, level=level, n=n, method=Method(kind="t_of_logs"))


def t_interval_of_mean(mean: float, parts_C: Floats, level: float) -> tuple[float, float]:
    """Interval of a mean of independent ``parts_C``, corrected for skewness.

    One more part like the most telling one is added where few tell.
    """
    square, cube = one_more(parts_C)
    variance = float(parts_C.var(ddof=1)) / len(parts_C) + square
    skew = (third_cumulant(parts_C) + cube) / variance**1.5 if variance > 0 else 0.0
    return skewed_t_interval(mean, variance**0.5, level=level, dof=dof_of_mean(parts_C), skew=skew)


def extreme_bound(sums_C: Floats, weight_C: Floats, level: float) -> float:
    """Upper bound of a mean of scores from 0 to 1 that are 0 in all but a few clusters; 0 where that is not so.

    ``sums_C`` are the weighted sums over each cluster's scores, ``weight_C`` those over ones.
    """
    num, n = int((sums_C > EPSILON).sum()), len(sums_C)
    if num >= FEW or 2 * num >= n:
        return 0.0
    heaviest = float(weight_C.max() * n / weight_C.sum())
    return min(1.0, heaviest * binomial_upper_bound(num, n, (1 - level) / 2))
