"""Scores against what guessing gives: which baselines stand above it, and retention of what lies above it.

Two models that guess keep 100 % of each other's quality, so a retention says something only where the baseline does
better than guessing. Shape letters as in ``intervals``; a document without options has chance 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from twotower_eval.analyse.stats.intervals import EPSILON, FEW, LEVEL, Floats, binomial_upper_bound
from twotower_eval.analyse.stats.mean import extreme_bound, t_interval_of_mean
from twotower_eval.analyse.stats.paired import Draws, ScoreTable
from twotower_eval.analyse.stats.quality import Scope, bootstrap_method
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Estimate, GateLimits, Method

ABOVE_CHANCE_LEVEL = GateLimits().above_chance_level

Stand = Literal["above", "near", "below", "zero"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a task's baseline stands to ``chance``, the mean over its documents, or ``None`` where none has options.

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
        """``above`` or ``below`` chance where a bound says so, ``zero`` without any score, else ``near``."""
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
    guesses, one would else pass in 43 % of cases, and be taken for evidence.
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
    """One-sided bounds of the baseline's weighted mean less chance; ``None`` where one cluster tells nothing.

    Exact (Clopper and Pearson) where each cluster is one right or wrong answer of one task: a guesser whose chances
    differ by document has lighter tails than a binomial of the same mean (Hoeffding 1956). Else Student's t over
    clusters as for the mean of one model, with the exact bound where next to all clusters score nothing, or all.
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
