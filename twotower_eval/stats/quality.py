"""Retention of quality: paired, clustered, stratified. Pure functions on arrays; shape letters as in ``intervals``.

Every estimand here is a ratio ``R = sum_t v_t b_t / sum_t v_t a_t`` of weighted means of task means (a baseline, b
candidate), so one table of sums, one set of bootstrap draws and one rule for the interval serve them all: the
headline (all tasks alike), one task, the tasks that exercise the decoder, all tasks but one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from twotower_eval.records import Estimate
from twotower_eval.stats.intervals import FEW, LEVEL, Floats, binomial_upper_bound, t_quantile, widened_percentiles
from twotower_eval.stats.paired import Draws, Ints, ScoreTable

EPSILON = 1e-12


def retention(table: ScoreTable, draws: Draws, weights_K: Floats | None = None, *, level: float = LEVEL) -> Estimate:
    """Ratio of weighted mean scores, candidate over baseline, with its paired clustered bootstrap interval.

    With fewer than 5 discordant clusters the interval is an exact bound instead. ``n`` counts clusters. Raises
    ValueError where the ratio is undefined (baseline at zero, or so near that the draws reach it).
    """
    weights_K = table.weights_K() if weights_K is None else weights_K
    scope = _Scope(table, weights_K)
    if table.smallest_score < 0:
        raise ValueError("some scores are below 0: their ratio is no retention")
    if scope.baseline <= EPSILON:
        raise ValueError("the baseline scores 0 everywhere: retention is undefined")
    if scope.num_discordant < FEW:
        return _exact_retention(scope, level)
    if scope.num_baseline_successes < FEW:
        few = f"only {scope.num_baseline_successes} of {scope.n} clusters"
        raise ValueError(f"the baseline scores above 0 in {few}: too few for a ratio")
    columns = (draws.baseline_QK @ weights_K[:, None], draws.candidate_QK @ weights_K[:, None])
    low, high = _bootstrap_interval(scope, *columns, level)
    method = f"paired clustered bootstrap, {len(draws.baseline_QK):,} resamples"
    if scope.num_candidate_successes < FEW:
        rate = binomial_upper_bound(scope.num_candidate_successes, scope.n, (1 - level) / 2)
        low, high = 0.0, max(high, scope.worst_case(rate) / scope.baseline)
        method += f", exact bound where the candidate scores in {scope.num_candidate_successes} of {scope.n} clusters"
    return Estimate(value=scope.ratio, low=low, high=high, level=level, n=scope.n, method=method, seed=draws.seed)


def linear_stderr(table: ScoreTable, weights_K: Floats | None = None) -> float:
    """Standard error of retention by linearisation (the delta method), as a check of the bootstrap's.

    ``z_c`` sums ``(b - R a)`` over the documents of cluster c, weighted as in the mean; the variance is the sum over
    strata of ``C / (C - 1) * sum (z_c - mean z)^2``, over the squared mean of the baseline. A cluster alone in its
    stratum adds nothing here and never varies in the bootstrap.
    """
    scope = _Scope(table, table.weights_K() if weights_K is None else weights_K)
    return float(np.sqrt(scope.variance_components[0].sum()) / scope.baseline)


def bootstrap_stderr(draws: Draws, weights_K: Floats) -> float | None:
    """Standard deviation of the drawn ratios; ``None`` where some draw has a baseline of zero."""
    baseline_Q = draws.baseline_QK @ weights_K
    if (baseline_Q <= EPSILON).any():
        return None
    return float(np.std((draws.candidate_QK @ weights_K) / baseline_Q))


def mean_of_ratios(table: ScoreTable, draws: Draws, *, level: float = LEVEL) -> Estimate:
    """Unweighted mean over tasks of each task's own ratio; ValueError where a task's baseline is too near zero."""
    baseline_K = table.task_means_K(table.baseline_CL)
    if (baseline_K <= EPSILON).any():
        raise ValueError("a task's baseline is 0: the mean of per-task ratios is undefined")
    scope = _Scope(table, 1 / (len(baseline_K) * baseline_K))
    if scope.num_discordant < FEW:
        return _exact_retention(scope, level)
    low, high = _bootstrap_interval(scope, draws.baseline_QK, draws.candidate_QK, level)
    method = f"paired clustered bootstrap, {len(draws.baseline_QK):,} resamples"
    return Estimate(value=scope.ratio, low=low, high=high, level=level, n=scope.n, method=method, seed=draws.seed)


def leave_one_out(table: ScoreTable) -> tuple[tuple[str, float], ...]:
    """Retention without each task in turn, from lowest to highest; empty if there is only one task."""
    baseline_K, candidate_K = table.task_means_K(table.baseline_CL), table.task_means_K(table.candidate_CL)
    without_K = [(baseline_K.sum() - a, candidate_K.sum() - b) for a, b in zip(baseline_K, candidate_K, strict=True)]
    ratios = [(t, float(b / a)) for t, (a, b) in zip(table.tasks, without_K, strict=True) if a > EPSILON]
    return tuple(sorted(ratios, key=lambda item: (item[1], item[0])))


def mean_score(values: Sequence[float], clusters: Sequence[str], *, level: float = LEVEL) -> Estimate:
    """Mean score of one model alone: exact binomial interval for one right-or-wrong score a cluster, else Student's t.

    ValueError for no scores, and for graded scores of a single cluster.
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
    method = "t interval over clusters"
    return Estimate(value=mean, low=mean - half, high=mean + half, level=level, n=n, method=method)


def difference(table: ScoreTable, draws: Draws, weights_K: Floats | None = None, *, level: float = LEVEL) -> Estimate:
    """Difference of weighted mean scores, candidate minus baseline, in the scores' own unit."""
    weights_K = table.weights_K() if weights_K is None else weights_K
    delta_Q = (draws.candidate_QK - draws.baseline_QK) @ weights_K
    scope = _Scope(table, weights_K, ratio=1.0)
    low, high = widened_percentiles(delta_Q, delta_Q, level=level, dof=scope.dof, inflation=scope.inflation)
    value = scope.candidate - scope.baseline
    method = f"paired clustered bootstrap, {len(delta_Q):,} resamples"
    return Estimate(
        value=value, low=min(low, value), high=max(high, value), level=level, n=scope.n, method=method, seed=draws.seed
    )


def num_discordant(table: ScoreTable, weights_K: Floats | None = None) -> tuple[int, int]:
    """Clusters in which the models differ, and clusters in all."""
    scope = _Scope(table, table.weights_K() if weights_K is None else weights_K)
    return scope.num_discordant, scope.n


def num_lone_clusters(table: ScoreTable) -> int:
    """Clusters that are alone in their stratum, whose variation no interval here can see."""
    return int((np.bincount(table.stratum_C) == 1).sum())


class _Scope:
    """The clusters that touch the weighted tasks, and what the interval rules need to know of them."""

    def __init__(self, table: ScoreTable, weights_K: Floats, ratio: float | None = None) -> None:
        leaf_weights_L = weights_K @ table.averaging_KL
        per_document_L = leaf_weights_L / table.count_CL.sum(axis=0)
        inside_C = table.count_CL @ (leaf_weights_L > 0) > 0
        self.n = int(inside_C.sum())
        self._stratum_C = table.stratum_C[inside_C]
        self._baseline_C = table.baseline_CL[inside_C] @ per_document_L
        self._candidate_C = table.candidate_CL[inside_C] @ per_document_L
        self.largest_score = table.largest_score
        self._largest_weight = float((table.count_CL[inside_C] @ per_document_L).max())
        self.baseline, self.candidate = float(self._baseline_C.sum()), float(self._candidate_C.sum())
        self._given_ratio = ratio
        self.ceiling = float(weights_K.sum())  # the weighted mean if every score were 1
        weighted_L = leaf_weights_L > 0
        loss_C, gain_C = (sums[inside_C][:, weighted_L].sum(axis=1) for sums in (table.loss_CL, table.gain_CL))
        self.num_harmed, self.num_helped = int((loss_C > EPSILON).sum()), int((gain_C > EPSILON).sum())
        self.num_discordant = int((loss_C + gain_C > EPSILON).sum())
        self.num_baseline_successes = int((self._baseline_C > EPSILON).sum())
        self.num_candidate_successes = int((self._candidate_C > EPSILON).sum())

    @property
    def ratio(self) -> float:
        return self.candidate / self.baseline if self._given_ratio is None else self._given_ratio

    def worst_case(self, rate: float) -> float:
        """Most that clusters hit at this mean rate can weigh in the mean, as if all were as heavy as the heaviest."""
        return rate * self.n * self._largest_weight

    @cached_property
    def variance_components(self) -> tuple[Floats, Ints]:
        """Per stratum of two clusters or more: estimated variance of its part of the numerator, and its clusters."""
        z_C = self._candidate_C - self.ratio * self._baseline_C
        _, codes_C, sizes_H = np.unique(self._stratum_C, return_inverse=True, return_counts=True)
        mean_H = np.bincount(codes_C, z_C) / sizes_H
        squares_H = np.bincount(codes_C, (z_C - mean_H[codes_C]) ** 2)
        many_H = sizes_H > 1
        sizes = sizes_H[many_H]
        return sizes / (sizes - 1) * squares_H[many_H], sizes

    @property
    def dof(self) -> float:
        """Satterthwaite's degrees of freedom over strata."""
        variance_H, sizes_H = self.variance_components
        squared = float((variance_H**2 / (sizes_H - 1)).sum())
        return float(variance_H.sum()) ** 2 / squared if squared > 0 else 1e9

    @property
    def inflation(self) -> float:
        """How much wider the standard error is than the bootstrap's, which divides by C instead of C - 1."""
        variance_H, sizes_H = self.variance_components
        shrunk = float((variance_H * (sizes_H - 1) / sizes_H).sum())
        return float(np.sqrt(variance_H.sum() / shrunk)) if shrunk > 0 else 1.0


def _bootstrap_interval(scope: _Scope, baseline_QK: Floats, candidate_QK: Floats, level: float) -> tuple[float, float]:
    """Interval of the mean over columns of the drawn ratios."""
    undefined_QK = baseline_QK <= EPSILON
    ratio_QK = candidate_QK / np.where(undefined_QK, 1.0, baseline_QK)
    # A draw without any baseline success counts as the worst on either side.
    low_Q, high_Q = (np.where(undefined_QK, worst, ratio_QK).mean(axis=1) for worst in (0.0, np.inf))
    low, high = widened_percentiles(low_Q, high_Q, level=level, dof=scope.dof, inflation=scope.inflation)
    if not np.isfinite(high):
        share = f"{int(undefined_QK.any(axis=1).sum()):,} of {len(low_Q):,} resamples"
        raise ValueError(f"the baseline scores 0 in {share}: the ratio has no finite interval")
    return min(low, scope.ratio), max(high, scope.ratio)


def _exact_retention(scope: _Scope, level: float) -> Estimate:
    """Bounds from the binomial tails of harmed and of helped clusters, for scores between 0 and 1.

    The number of harmed clusters has a lighter lower tail than a binomial with the same mean (Hoeffding 1956), and a
    cluster costs at most its weight: so the bound is exact for equal clusters and on the safe side for others. The
    baseline's mean is taken as known.
    """
    if scope.largest_score > 1 + EPSILON:
        raise ValueError(f"scores reach {scope.largest_score:g}: the exact bound needs scores between 0 and 1")
    alpha = (1 - level) / 2
    harmed, helped = (binomial_upper_bound(k, scope.n, alpha) for k in (scope.num_harmed, scope.num_helped))
    low = max(0.0, 1 - scope.worst_case(harmed) / scope.baseline)
    high = min(1 + scope.worst_case(helped) / scope.baseline, scope.ceiling / scope.baseline)
    method = f"exact binomial bound, {scope.num_discordant} of {scope.n} clusters discordant"
    value = scope.ratio
    return Estimate(
        value=value, low=min(low, value), high=max(high, value), level=level, n=scope.n, method=method, seed=None
    )
