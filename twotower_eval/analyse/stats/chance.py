"""Means of one model's scores and of ratios, with their intervals; and retention of what lies above guessing.

Shape letters as in ``intervals``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
from twotower_eval.analyse.stats.paired import Draws, PairedScores, ScoreTable, draw_task_means
from twotower_eval.analyse.stats.quality import Scope, bootstrap_method, difference
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Estimate, GateLimits, Method


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


ABOVE_CHANCE_LEVEL = GateLimits().above_chance_level

Stand = Literal["above", "near", "below", "zero"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A task's baseline against ``chance``, the mean over its documents, or ``None`` where none has options.

    ``low`` and ``high`` bound the baseline's mean less chance, one-sided at ``level`` each. They are ``None`` without
    chance, where any score above 0 is above it, and for a single cluster of several scores.
    """

    task: str
    baseline: float
    chance: float | None
    low: float | None
    high: float | None
    level: float

    @property
    def stand(self) -> Stand:
        """``above`` or ``below`` chance where a bound shows it, ``zero`` for a score of 0, else ``near``."""
        if self.baseline <= EPSILON:
            return "zero"
        if self.chance is None or (self.low is not None and self.low > EPSILON):
            return "above"
        return "below" if self.high is not None and self.high < -EPSILON else "near"

    @property
    def is_clear(self) -> bool:
        """Whether the baseline is clearly above chance."""
        return self.stand == "above"


def standings(
    table: ScoreTable, *, level: float = ABOVE_CHANCE_LEVEL, tasks: Sequence[str] | None = None
) -> tuple[Standing, ...]:
    """Every task's standing, by default of all tasks; ``level`` holds for all that are tested together.

    Each of K tasks with options is tested at ``1 - (1 - level) / K`` (Bonferroni): of eleven tasks on which a baseline
    guesses, one would else pass in 43 % of cases and count as evidence.
    """
    wanted = table.tasks if tasks is None else tuple(task for task in table.tasks if task in tasks)
    chance_K = table.task_means_K(table.chance_CL)
    num_tested = sum(chance_K[table.tasks.index(task)] > EPSILON for task in wanted)
    return tuple(_standing(table, task, 1 - (1 - level) / max(1, num_tested)) for task in wanted)


def _standing(table: ScoreTable, task: str, level: float) -> Standing:
    k = table.tasks.index(task)
    baseline, chance = (float(table.task_means_K(sums_CL)[k]) for sums_CL in (table.baseline_CL, table.chance_CL))
    known = chance > EPSILON
    bounds = excess_bounds(table, table.weights_K([task]), level) if known else None
    low, high = bounds or (None, None)
    return Standing(task=task, baseline=baseline, chance=chance if known else None, low=low, high=high, level=level)


def excess_bounds(table: ScoreTable, weights_K: Floats, level: float) -> tuple[float, float] | None:
    """One-sided bounds of the baseline's weighted mean less chance; ``None`` for a single cluster of several scores.

    Exact (Clopper and Pearson) where each cluster is one right or wrong answer of one task: a guesser whose chances
    differ by document has lighter tails than a binomial of the same mean (Hoeffding 1956). Else Student's t over
    clusters as for the mean of one model, with the exact bound where nearly all clusters score 0, or 1.
    """
    leaf_weight_L = weights_K @ table.averaging_KL
    inside_C = table.count_CL @ (leaf_weight_L > 0) > 0
    per_document_L = leaf_weight_L / table.count_CL.sum(axis=0)
    count_CL, score_CL = table.count_CL[inside_C], table.baseline_CL[inside_C]
    sums_C, weight_C = score_CL @ per_document_L, count_CL @ per_document_L
    mean, n = float(sums_C.sum()), len(sums_C)
    chance = float((table.chance_CL[inside_C] @ per_document_L).sum())
    one_leaf_L = leaf_weight_L > 0
    if (
        one_leaf_L.sum() == 1
        and (count_CL[:, one_leaf_L] == 1).all()
        and np.isin(score_CL[:, one_leaf_L], (0, 1)).all()
    ):
        right = int(score_CL[:, one_leaf_L].sum())
        low, high = 1 - binomial_upper_bound(n - right, n, 1 - level), binomial_upper_bound(right, n, 1 - level)
        return low - chance, high - chance
    if n < 2:
        return None
    both = 2 * level - 1  # either end of a two-sided interval at this level is one-sided at ``level``
    parts_C = n * ((score_CL - count_CL * table.leaf_means_L(table.baseline_CL)) @ per_document_L)
    low, high = t_interval_of_mean(mean, parts_C, both)
    if score_CL.min() >= 0 and (score_CL <= count_CL + EPSILON).all():
        below, above = (extreme_bound(part_C, weight_C, both) for part_C in (sums_C, weight_C - sums_C))
        low, high = min(low, 1 - above), max(high, below)
    return low - chance, high - chance


def retention_above_chance(
    table: ScoreTable, draws: Draws, weights_K: Floats | None = None, *, level: float = LEVEL
) -> Estimate:
    """Ratio of weighted mean scores above chance, candidate over baseline, on the draws that retention rests on.

    1 where nothing is lost, 0 where the candidate guesses, less where it does worse. With fewer than 5 discordant
    clusters an exact bound: what harmed or helped clusters can weigh, over the lower bound of the baseline's excess.
    NoEstimate where the baseline is so near chance that the ratio has no finite interval.
    """
    weights_K = table.weights_K() if weights_K is None else weights_K
    if table.smallest_score < 0 or table.largest_score > 1 + EPSILON:
        raise NoEstimate("some scores are below 0 or above 1: what lies above chance is no share of them")
    raised = dataclasses.replace(
        table, baseline_CL=table.baseline_CL - table.chance_CL, candidate_CL=table.candidate_CL - table.chance_CL
    )
    scope = Scope(raised, weights_K)
    alpha = (1 - level) / 2
    bounds = excess_bounds(table, weights_K, 1 - alpha)
    least = None if bounds is None else bounds[0]
    if scope.baseline <= EPSILON or least is None or least <= EPSILON:
        raise NoEstimate("the baseline is too near chance for a ratio of what lies above it")
    chance = float(table.task_means_K(table.chance_CL) @ weights_K)
    lowest, highest = -chance / least, (float(weights_K.sum()) - chance) / least
    if scope.num_discordant < FEW:
        harmed, helped = (binomial_upper_bound(k, scope.n, alpha) for k in (scope.num_harmed, scope.num_helped))
        low, high = 1 - scope.worst_case(harmed) / least, 1 + scope.worst_case(helped) / least
        low, high = max(lowest, low), min(highest, high)
        method, seed = Method(kind="exact_bound", num_differing=scope.num_discordant), None
    else:
        low, high = _drawn_interval(draws, weights_K, scope, level)
        num_right = Scope(table, weights_K).num_candidate_successes
        if num_right < FEW:
            most = scope.worst_case(binomial_upper_bound(num_right, scope.n, alpha))
            low, high = lowest, max(high, (most - chance) / least)
        method, seed = bootstrap_method(len(draws.baseline_QK)), draws.seed
    value = scope.ratio
    return Estimate(
        value=value, low=min(low, value), high=max(high, value), level=level, n=scope.n, method=method, seed=seed
    )


def _drawn_interval(draws: Draws, weights_K: Floats, scope: Scope, level: float) -> tuple[float, float]:
    """Interval of the drawn ratios; a draw whose baseline is at chance or below counts as the worst on either side."""
    baseline_Q, candidate_Q = ((one - draws.chance_QK) @ weights_K for one in (draws.baseline_QK, draws.candidate_QK))
    undefined_Q = baseline_Q <= EPSILON
    ratio_Q = candidate_Q / np.where(undefined_Q, 1.0, baseline_Q)
    low_Q, high_Q = (np.where(undefined_Q, worst, ratio_Q) for worst in (-np.inf, np.inf))
    low, high = scope.interval(low_Q, high_Q, scope.ratio, level, unit=scope.baseline)
    if not np.isfinite([low, high]).all():
        share = f"{int(undefined_Q.sum()):,} of {len(low_Q):,} resamples"
        raise NoEstimate(f"the baseline is at chance or below in {share}: the ratio has no finite interval")
    return low, high
