"""Retention of quality: paired, clustered, stratified. Pure functions on arrays; shape letters as in ``intervals``.

Every estimand here is a ratio ``R = sum_t v_t b_t / sum_t v_t a_t`` of weighted means of task means (a baseline, b
candidate), so one table of sums, one set of bootstrap draws and one rule for the interval serve them all: the
headline (all tasks alike), one task, the tasks that exercise the decoder, all tasks but one.

The interval is the wider, end by end, of the bootstrap's corrected percentiles and of the linearised t interval. Where
answers differ in a dozen clusters the ratio takes few values, and either one alone was now and then a step too narrow:
the calibration found up to 6.9 % of verdicts wrong. With many clusters that differ the two agree.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from twotower_eval.analyse.stats.intervals import (
    EPSILON,
    FEW,
    LEVEL,
    Floats,
    binomial_upper_bound,
    corrected_percentiles,
    t_quantile,
)
from twotower_eval.analyse.stats.paired import Draws, Ints, ScoreTable
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Estimate, Method

EQUAL = Method(kind="equal_by_construction")  # one computation scores both arms
SPARSE = 15  # fewer discordant clusters in a stratum than this: one more is added to its variance
MIN_DISCORDANT = 5  # fewer clusters that differ: no verdict on a difference of scores
SMALL = 40  # fewer clusters in a stratum than this: one more like the worst is added


def retention(table: ScoreTable, draws: Draws, weights_K: Floats | None = None, *, level: float = LEVEL) -> Estimate:
    """Ratio of weighted mean scores, candidate over baseline, with its paired clustered bootstrap interval.

    With fewer than 5 discordant clusters the interval is an exact bound instead. ``n`` counts clusters. Raises
    NoEstimate where the ratio is undefined (baseline at zero, or so near that the draws reach it).
    """
    weights_K = table.weights_K() if weights_K is None else weights_K
    scope = Scope(table, weights_K)
    if table.smallest_score < 0:
        raise NoEstimate("some scores are below 0: their ratio is no retention")
    if scope.baseline <= EPSILON:
        raise NoEstimate("the baseline scores 0 everywhere: retention is undefined")
    if scope.num_discordant < FEW:
        return _exact_retention(scope, level)
    if scope.num_baseline_successes < FEW:
        few = f"only {scope.num_baseline_successes} of {scope.n} clusters"
        raise NoEstimate(f"the baseline scores above 0 in {few}: too few for a ratio")
    columns = (draws.baseline_QK @ weights_K[:, None], draws.candidate_QK @ weights_K[:, None])
    low, high = _bootstrap_interval(scope, *columns, level)
    method = bootstrap_method(len(draws.baseline_QK))
    if scope.num_candidate_successes < FEW:
        rate = binomial_upper_bound(scope.num_candidate_successes, scope.n, (1 - level) / 2)
        low, high = 0.0, max(high, scope.worst_case(rate) / scope.baseline)
        method = replace(method, num_scoring=scope.num_candidate_successes)
    return Estimate(value=scope.ratio, low=low, high=high, level=level, n=scope.n, method=method, seed=draws.seed)


def equal_by_construction(value: float, n: int, *, level: float = LEVEL) -> Estimate:
    """The known value where one computation scores both arms: a retention of 1, or a difference of 0."""
    return Estimate(value=value, low=value, high=value, level=level, n=n, method=EQUAL)


def is_exact(found: Estimate) -> bool:
    """Whether either end of an interval is, or may be, an exact bound."""
    method = found.method
    kinds = ("exact_bound", "exact_binomial")
    return isinstance(method, Method) and (method.kind in kinds or method.num_scoring is not None or method.widened)


def linear_stderr(table: ScoreTable, weights_K: Floats | None = None) -> float:
    """Standard error of retention by linearisation (the delta method), as a check of the bootstrap's.

    ``z_c`` sums ``(b - R a)`` over the documents of cluster c, weighted as in the mean; the variance is the sum over
    strata of ``C / (C - 1) * sum (z_c - mean z)^2``, over the squared mean of the baseline. A cluster alone in its
    stratum adds nothing here and never varies in the bootstrap.
    """
    scope = Scope(table, table.weights_K() if weights_K is None else weights_K)
    return float(np.sqrt(scope.variance_H.sum()) / scope.baseline)


def bootstrap_stderr(draws: Draws, weights_K: Floats) -> float | None:
    """Standard deviation of the drawn ratios; ``None`` where some draw has a baseline of zero."""
    baseline_Q = draws.baseline_QK @ weights_K
    if (baseline_Q <= EPSILON).any():
        return None
    return float(np.std((draws.candidate_QK @ weights_K) / baseline_Q))


def mean_of_ratios(table: ScoreTable, draws: Draws, *, level: float = LEVEL) -> Estimate:
    """Unweighted mean over tasks of each task's own ratio; NoEstimate where a task's baseline is too near zero."""
    baseline_K = table.task_means_K(table.baseline_CL)
    if (baseline_K <= EPSILON).any():
        raise NoEstimate("a task's baseline is 0: the mean of per-task ratios is undefined")
    scope = Scope(
        table, 1 / (len(baseline_K) * baseline_K), ratios_K=table.task_means_K(table.candidate_CL) / baseline_K
    )
    if scope.num_discordant < FEW:
        return _exact_retention(scope, level)
    low, high = _bootstrap_interval(scope, draws.baseline_QK, draws.candidate_QK, level)
    method = bootstrap_method(len(draws.baseline_QK))
    return Estimate(value=scope.ratio, low=low, high=high, level=level, n=scope.n, method=method, seed=draws.seed)


def leave_one_out(table: ScoreTable) -> tuple[tuple[str, float], ...]:
    """Retention without each task in turn, from lowest to highest; empty if there is only one task."""
    baseline_K, candidate_K = table.task_means_K(table.baseline_CL), table.task_means_K(table.candidate_CL)
    without_K = [(baseline_K.sum() - a, candidate_K.sum() - b) for a, b in zip(baseline_K, candidate_K, strict=True)]
    ratios = [(t, float(b / a)) for t, (a, b) in zip(table.tasks, without_K, strict=True) if a > EPSILON]
    return tuple(sorted(ratios, key=lambda item: (item[1], item[0])))


def difference(
    table: ScoreTable, draws: Draws, weights_K: Floats | None = None, *, level: float = LEVEL, min_discordant: int = 0
) -> Estimate:
    """Difference of weighted mean scores, candidate minus baseline, in the scores' own unit.

    NoEstimate where fewer than ``min_discordant`` clusters differ; a verdict needs ``MIN_DISCORDANT``.
    """
    weights_K = table.weights_K() if weights_K is None else weights_K
    delta_Q = (draws.candidate_QK - draws.baseline_QK) @ weights_K
    scope = Scope(table, weights_K, ratios_K=np.ones(len(table.tasks)))
    if scope.num_discordant < min_discordant:
        raise NoEstimate(f"{scope.num_discordant} of {scope.n} clusters differ: too few for an interval")
    value = scope.candidate - scope.baseline
    low, high = scope.interval(delta_Q, delta_Q, value, level, unit=1.0)
    method = bootstrap_method(len(delta_Q))
    return Estimate(value=value, low=low, high=high, level=level, n=scope.n, method=method, seed=draws.seed)


def num_discordant(table: ScoreTable, weights_K: Floats | None = None) -> tuple[int, int]:
    """Clusters in which the models differ, and clusters in all."""
    scope = Scope(table, table.weights_K() if weights_K is None else weights_K)
    return scope.num_discordant, scope.n


def num_lone_clusters(table: ScoreTable) -> int:
    """Clusters alone in their stratum, whose variation no interval here includes."""
    return int((np.bincount(table.stratum_C) == 1).sum())


class Scope:
    """The clusters that touch the weighted tasks, and what the interval rules need to know of them.

    ``ratios_K`` multiply the baseline's scores in the linearised numerator, task by task: by default the ratio of the
    weighted means.
    """

    def __init__(self, table: ScoreTable, weights_K: Floats, ratios_K: Floats | None = None) -> None:
        leaf_weights_L = weights_K @ table.averaging_KL
        per_document_L = leaf_weights_L / table.count_CL.sum(axis=0)
        inside_C = table.count_CL @ (leaf_weights_L > 0) > 0
        self.n = int(inside_C.sum())
        _, self._code_C, self._size_H = np.unique(table.stratum_C[inside_C], return_inverse=True, return_counts=True)
        self._baseline_C = table.baseline_CL[inside_C] @ per_document_L
        self._candidate_C = table.candidate_CL[inside_C] @ per_document_L
        self.largest_score = table.largest_score
        weight_C = table.count_CL[inside_C] @ per_document_L
        self._largest_weight = float(weight_C.max())
        self._heaviest_H = np.zeros(len(self._size_H))
        np.maximum.at(self._heaviest_H, self._code_C, weight_C)
        self.baseline, self.candidate = float(self._baseline_C.sum()), float(self._candidate_C.sum())
        self.ratio = self.candidate / self.baseline if self.baseline > EPSILON else 1.0
        ratios_L = self.ratio if ratios_K is None else ratios_K @ (table.averaging_KL > 0)
        self._expected_C = table.baseline_CL[inside_C] @ (per_document_L * ratios_L)
        # The weighted mean if every score were 1; a baseline that is there already may be a rounding error above it.
        self.ceiling = max(float(weights_K.sum()), self.baseline)
        weighted_L = leaf_weights_L > 0
        loss_C, gain_C = (sums[inside_C][:, weighted_L].sum(axis=1) for sums in (table.loss_CL, table.gain_CL))
        self.num_harmed, self.num_helped = int((loss_C > EPSILON).sum()), int((gain_C > EPSILON).sum())
        discordant_C = loss_C + gain_C > EPSILON
        self.num_discordant = int(discordant_C.sum())
        self._discordant_H = np.bincount(self._code_C, discordant_C)
        self.num_baseline_successes = int((self._baseline_C > EPSILON).sum())
        self.num_candidate_successes = int((self._candidate_C > EPSILON).sum())

    def worst_case(self, rate: float) -> float:
        """Most that clusters hit at this mean rate can weigh in the mean, as if all were as heavy as the heaviest."""
        return rate * self.n * self._largest_weight

    def interval(
        self, low_Q: Floats, high_Q: Floats, value: float, level: float, *, unit: float
    ) -> tuple[float, float]:
        """The wider of both intervals, by what these clusters say of skewness and degrees of freedom.

        ``unit`` is what the linearised numerator is divided by.
        """
        corrections = {"dof": self.dof, "inflation": self.inflation, "skew": self.skew}
        low, high = corrected_percentiles(low_Q, high_Q, value, level=level, **corrections)
        half = t_quantile(level, self.dof) * float(np.sqrt((self.variance_H + self._unseen_H).sum())) / unit
        return min(low, value - half), max(high, value + half)

    @cached_property
    def _moments(self) -> tuple[Ints, Floats, Floats, Floats]:
        """Strata of two clusters or more: their clusters, sums of squares, cubes and fourth powers of the parts."""
        many_H = self._size_H > 1
        centred_C, code_C = self._centred_C, self._code_C
        powers = [np.bincount(code_C, centred_C**k).astype(np.float64)[many_H] for k in (2, 3, 4)]
        return self._size_H[many_H].astype(np.int64), powers[0], powers[1], powers[2]

    @cached_property
    def _centred_C(self) -> Floats:
        """What each cluster adds to the linearised numerator, less the mean of its stratum."""
        z_C = self._candidate_C - self._expected_C
        centred_C: Floats = z_C - (np.bincount(self._code_C, z_C) / self._size_H)[self._code_C]
        return centred_C

    @property
    def variance_H(self) -> Floats:
        """Estimated variance of each stratum's part of the numerator."""
        sizes_H, squares_H, *_ = self._moments
        return sizes_H / (sizes_H - 1) * squares_H

    @property
    def skew(self) -> float:
        """Skewness of the estimate, 0 without variation; strata of two clusters do not show it."""
        sizes_H, _, cubes_H, _ = self._moments
        factor_H = np.where(sizes_H > 2, sizes_H**2 / np.maximum((sizes_H - 1) * (sizes_H - 2), 1), 0.0)
        variance = float(self.variance_H.sum())
        return float((factor_H * cubes_H).sum()) / variance**1.5 if variance > 0 else 0.0

    @property
    def dof(self) -> float:
        """Degrees of freedom of the variance: twice its square over its own variance.

        That variance is Satterthwaite's for strata of normal parts, or what the parts' fourth powers say if that is
        more: k flips of one weight among very many documents are worth 2 k degrees of freedom, not thousands.
        """
        sizes_H, squares_H, _, fourths_H = self._moments
        as_normal = float((2 * self.variance_H**2 / (sizes_H - 1)).sum())
        scale_H = sizes_H / (sizes_H - 1)
        as_seen = float((scale_H**2 * (fourths_H - squares_H**2 / sizes_H)).sum())
        spread = max(as_normal, as_seen)
        return max(1.0, 2 * float(self.variance_H.sum()) ** 2 / spread) if spread > 0 else 1e9

    @property
    def inflation(self) -> float:
        """How much wider the standard error is than the bootstrap's, which divides by C instead of C - 1."""
        shrunk = float(self._moments[1].sum())
        return float(np.sqrt((self.variance_H + self._unseen_H).sum() / shrunk)) if shrunk > 0 else 1.0

    @property
    def _unseen_H(self) -> Floats:
        """Added variance of each stratum for what it may have failed to show.

        A stratum with few discordant clusters may have so few by luck: one more, as heavy as its heaviest, is added.
        Few clusters may lack the rare large loss: one more like the worst seen is added.
        """
        worst_H = np.zeros(len(self._size_H))
        np.maximum.at(worst_H, self._code_C, self._centred_C**2)
        seen_H = np.where(self._size_H < SMALL, worst_H, 0.0)
        unseen_H: Floats = np.where(self._discordant_H < SPARSE, self._heaviest_H**2, seen_H)[self._size_H > 1]
        return unseen_H


def bootstrap_method(num_resamples: int) -> Method:
    return Method(kind="paired_bootstrap", num_resamples=num_resamples)


def _bootstrap_interval(scope: Scope, baseline_QK: Floats, candidate_QK: Floats, level: float) -> tuple[float, float]:
    """Interval of the mean over columns of the drawn ratios."""
    undefined_QK = baseline_QK <= EPSILON
    ratio_QK = candidate_QK / np.where(undefined_QK, 1.0, baseline_QK)
    # A draw without any baseline success counts as the worst on either side.
    low_Q, high_Q = (np.where(undefined_QK, worst, ratio_QK).mean(axis=1) for worst in (0.0, np.inf))
    low, high = scope.interval(low_Q, high_Q, scope.ratio, level, unit=scope.baseline)
    if not np.isfinite(high):
        share = f"{int(undefined_QK.any(axis=1).sum()):,} of {len(low_Q):,} resamples"
        raise NoEstimate(f"the baseline scores 0 in {share}: the ratio has no finite interval")
    return max(low, 0.0), high


def _exact_retention(scope: Scope, level: float) -> Estimate:
    """Bounds from the binomial tails of harmed and of helped clusters, for scores between 0 and 1.

    The number of harmed clusters has a lighter lower tail than a binomial with the same mean (Hoeffding 1956), and a
    cluster costs at most its weight: so the bound is exact for equal clusters and on the safe side for others. The
    baseline's mean is taken as known, which is why nothing narrower stands on it: near its ceiling a baseline is often
    the luckier of two equal models, and an interval of all clusters lost reaches to 100 % while they are so few.
    """
    if scope.largest_score > 1 + EPSILON:
        raise NoEstimate(f"scores reach {scope.largest_score:g}: the exact bound needs scores between 0 and 1")
    alpha = (1 - level) / 2
    harmed, helped = (binomial_upper_bound(k, scope.n, alpha) for k in (scope.num_harmed, scope.num_helped))
    low = max(0.0, 1 - scope.worst_case(harmed) / scope.baseline)
    high = min(1 + scope.worst_case(helped) / scope.baseline, scope.ceiling / scope.baseline)
    method = Method(kind="exact_bound", num_differing=scope.num_discordant)
    value = scope.ratio
    return Estimate(
        value=value, low=min(low, value), high=max(high, value), level=level, n=scope.n, method=method, seed=None
    )
