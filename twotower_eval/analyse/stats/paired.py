"""Scores of two models on the same documents: sums per cluster and task, bootstrap draws of the task means, and answers
that flip, with exact tests per task.

Shape letters as in ``intervals``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from twotower_eval.analyse.stats.intervals import EPSILON, NUM_RESAMPLES, Floats, holm
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Method

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedScores:
    """One entry per document that both models answered; the order of entries has no influence on any result.

    ``tasks`` and ``groups`` name the task and what counts once in an average: the task itself, or, for a member of a
    multi-language task, that task. Documents of one cluster (same problem, passage or parallel item) share a name in
    ``clusters``, also across tasks. Scores are finite. ``chance`` is what guessing scores on each document, 0 where
    there is nothing to guess among; empty for 0 everywhere. Members of the groups in ``by_size`` weigh as many as their
    documents, those of others the same.
    """

    tasks: Sequence[str]
    groups: Sequence[str]
    clusters: Sequence[str]
    baseline: Sequence[float]
    candidate: Sequence[float]
    chance: Sequence[float] = ()
    by_size: frozenset[str] = frozenset()

    @cached_property
    def table(self) -> ScoreTable:
        """The sums that everything else is computed from; a ValueError says what is wrong with the scores."""
        return _tabulate(self)

    @cached_property
    def draws(self) -> Draws:
        """The table's bootstrap draws; several figures of one point share them."""
        return draw_task_means(self.table)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreTable:
    """Per cluster and leaf: number of documents and sums of scores, of losses, of gains and of chance."""

    tasks: tuple[str, ...]
    leaves: tuple[str, ...]
    task_of_leaf_L: Ints
    stratum_C: Ints
    count_CL: Floats
    baseline_CL: Floats
    candidate_CL: Floats
    loss_CL: Floats
    gain_CL: Floats
    chance_CL: Floats
    smallest_score: float
    largest_score: float
    by_size: frozenset[str] = frozenset()

    @cached_property
    def averaging_KL(self) -> Floats:
        """Maps leaf means to task means: a task of several members is the mean over them, by size or not."""
        member_KL = (np.arange(len(self.tasks))[:, None] == self.task_of_leaf_L).astype(float)
        member_KL[[task in self.by_size for task in self.tasks]] *= self.count_CL.sum(axis=0)
        averaging_KL: Floats = member_KL / member_KL.sum(axis=1, keepdims=True)
        return averaging_KL

    def leaf_means_L(self, sums_CL: Floats) -> Floats:
        """Mean over documents in each leaf."""
        means_L: Floats = sums_CL.sum(axis=0) / self.count_CL.sum(axis=0)
        return means_L

    def task_means_K(self, sums_CL: Floats) -> Floats:
        """Mean of each task, over its documents or, if it has members, over their means."""
        means_K: Floats = self.averaging_KL @ self.leaf_means_L(sums_CL)
        return means_K

    def weights_K(self, tasks: Sequence[str] | None = None) -> Floats:
        """Equal weights that sum to one over ``tasks``, by default over all."""
        chosen = set(self.tasks if tasks is None else tasks)
        unknown = sorted(chosen - set(self.tasks))
        if unknown or not chosen:
            raise ValueError(f"no scores for task(s) {', '.join(unknown)}" if unknown else "no task to average over")
        weights_K: Floats = np.array([task in chosen for task in self.tasks], dtype=float) / len(chosen)
        return weights_K


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Task means of every bootstrap draw, the same resampled clusters for both models and for chance."""

    baseline_QK: Floats
    candidate_QK: Floats
    chance_QK: Floats
    seed: int


def draw_task_means(table: ScoreTable, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Draws:
    """Resample clusters with replacement within each stratum (the set of tasks a cluster touches).

    Chance has no influence on the draws of scores: it is carried along.
    """
    rng, chance_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    num_leaves = len(table.leaves)
    columns = [table.count_CL, table.baseline_CL, table.candidate_CL]
    columns += [table.chance_CL] if table.chance_CL.any() else []
    sums_Q4L = np.zeros((num_resamples, 4, num_leaves))
    for stratum in range(int(table.stratum_C.max()) + 1):
        rows = np.flatnonzero(table.stratum_C == stratum)
        leaves = np.flatnonzero(table.count_CL[rows[0]])
        values = np.stack([sums[np.ix_(rows, leaves)] for sums in columns], axis=1)
        carried = len(leaves) * (len(columns) - 3)
        drawn = resampled_sums(rng, values.reshape(len(rows), -1), num_resamples, carried, chance_rng)
        sums_Q4L[:, : len(columns), leaves] += drawn.reshape(num_resamples, len(columns), len(leaves))
    means_Q3L = sums_Q4L[:, 1:] / sums_Q4L[:, :1]
    return Draws(
        baseline_QK=means_Q3L[:, 0] @ table.averaging_KL.T,
        candidate_QK=means_Q3L[:, 1] @ table.averaging_KL.T,
        chance_QK=means_Q3L[:, 2] @ table.averaging_KL.T,
        seed=seed,
    )


def _tabulate(scores: PairedScores) -> ScoreTable:
    columns = [np.asarray(names, dtype=str) for names in (scores.tasks, scores.groups, scores.clusters)]
    baseline_N, candidate_N = np.asarray(scores.baseline, float), np.asarray(scores.candidate, float)
    num = len(baseline_N)
    chance_N = np.asarray(scores.chance, float) if len(scores.chance) else np.zeros(num)
    if any(len(column) != num for column in (*columns, candidate_N, chance_N)):
        raise ValueError("paired scores: the columns have different lengths")
    if num == 0:
        raise NoEstimate("paired scores: no documents, so there is no accuracy")
    values_2N = np.stack([baseline_N, candidate_N])
    if not np.isfinite(values_2N).all():
        raise ValueError("paired scores: every score must be finite")
    leaves, leaf_N = np.unique(columns[0], return_inverse=True)
    tasks, task_N = np.unique(columns[1], return_inverse=True)
    _, cluster_N = np.unique(columns[2], return_inverse=True)
    task_of_leaf_L = np.zeros(len(leaves), dtype=np.int64)
    task_of_leaf_L[leaf_N] = task_N
    if (task_of_leaf_L[leaf_N] != task_N).any():
        raise ValueError("paired scores: a task belongs to two groups")
    shape = (int(cluster_N.max()) + 1, len(leaves))

    def summed(values_N: Floats) -> Floats:
        sums_CL = np.zeros(shape)
        np.add.at(sums_CL, (cluster_N, leaf_N), values_N)
        return sums_CL

    count_CL = summed(np.ones(num))
    _, stratum_C = np.unique(np.packbits(count_CL > 0, axis=1), axis=0, return_inverse=True)
    return ScoreTable(
        tasks=tuple(map(str, tasks)),
        leaves=tuple(map(str, leaves)),
        task_of_leaf_L=task_of_leaf_L,
        stratum_C=stratum_C.reshape(-1),
        count_CL=count_CL,
        baseline_CL=summed(baseline_N),
        candidate_CL=summed(candidate_N),
        loss_CL=summed(np.maximum(baseline_N - candidate_N, 0)),
        gain_CL=summed(np.maximum(candidate_N - baseline_N, 0)),
        chance_CL=summed(chance_N).round(12),  # alike whatever the order in which it was summed
        smallest_score=float(values_2N.min()),
        largest_score=float(values_2N.max()),
        by_size=frozenset(scores.by_size),
    )


def resampled_sums(
    rng: np.random.Generator,
    values_CV: Floats,
    num_resamples: int,
    num_carried: int = 0,
    carried_rng: np.random.Generator | None = None,
) -> Floats:
    """Sums over C clusters drawn with replacement, for each resample: (Q, V).

    Equal clusters are counted, not drawn one by one: the counts are multinomial, which for right-or-wrong scores leaves
    four cells a task. Where most clusters differ, they are drawn and looked up, two columns at a time as one complex
    number, in chunks that stay in cache. Columns that are equal in every cluster need no draw. The last ``num_carried``
    columns do not affect which clusters are equal, nor any other sum.
    """
    num, num_own = len(values_CV), values_CV.shape[1] - num_carried
    own_CV, counts_P = np.unique(values_CV[:, :num_own], axis=0, return_counts=True)
    patterns_PV, sizes_P = np.unique(values_CV, axis=0, return_counts=True)  # in the same order, some of them split
    if len(own_CV) * 8 <= num or num < 8:
        counts_QP = rng.multinomial(num, counts_P / num, size=num_resamples)
        if num_carried == 0:
            counted: Floats = counts_QP @ own_CV
            return counted
        parts = np.repeat(np.arange(len(own_CV)), np.unique(patterns_PV[:, :num_own], axis=0, return_counts=True)[1])
        return np.hstack(
            [counts_QP @ own_CV, _carried(carried_rng or rng, counts_QP, parts, patterns_PV[:, num_own:], sizes_P)]
        )
    sorted_CV = np.repeat(patterns_PV, sizes_P, axis=0)  # not the given order, which must not matter
    return _looked_up(rng, sorted_CV, num_resamples)


def _carried(rng: np.random.Generator, counts_QP: Ints, part_of_S: Ints, values_SV: Floats, sizes_S: Ints) -> Floats:
    """Sums of carried columns, which differ among clusters that count as equal: drawn among themselves."""
    sums_QV = np.zeros((len(counts_QP), values_SV.shape[1]))
    for part, counts_Q in enumerate(counts_QP.T):
        here = part_of_S == part
        shares_S = sizes_S[here] / sizes_S[here].sum()
        chunk = max(1, 1_000_000 // len(shares_S))
        for start in range(0, len(counts_Q), chunk):
            rows = slice(start, start + chunk)
            drawn_QS = rng.multinomial(counts_Q[rows], shares_S) if len(shares_S) > 1 else counts_Q[rows, None]
            sums_QV[rows] += drawn_QS @ values_SV[here]
    return sums_QV


def _looked_up(rng: np.random.Generator, sorted_CV: Floats, num_resamples: int) -> Floats:
    """Sums of clusters drawn one by one."""
    num = len(sorted_CV)
    sums_QV = np.tile(num * sorted_CV[0], (num_resamples, 1))
    varying = np.flatnonzero((sorted_CV != sorted_CV[0]).any(axis=0))
    padded_CV = np.zeros((num, len(varying) + len(varying) % 2))
    padded_CV[:, : len(varying)] = sorted_CV[:, varying]
    pairs_WC = padded_CV.view(np.complex128).T.copy()
    chunk, small = max(1, 50_000 // num), np.uint16 if num <= 2**16 else np.uint32
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        index = rng.integers(0, num, size=(rows, num), dtype=small)
        drawn_RW = np.stack([pair_C.take(index).sum(axis=1) for pair_C in pairs_WC], axis=1)
        sums_QV[start : start + rows, varying] = drawn_RW.view(np.float64)[:, : len(varying)]
    return sums_QV


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Documents of one task that only one model got right (or better), and the test that both ways are as likely.

    ``p_holm`` is adjusted over all tasks tested together. ``n`` counts documents.
    """

    task: str
    n: int
    num_lost: int
    num_gained: int
    p_value: float
    p_holm: float
    method: Method


def flips(scores: PairedScores, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> tuple[Flips, ...]:
    """Flips of every task, by name: exact McNemar where each cluster has one binary score, else sign flips."""
    scores.table  # noqa: B018 - refuses what is no valid pairing
    group_N, cluster_N = np.asarray(scores.groups, dtype=str), np.asarray(scores.clusters, dtype=str)
    values_2N = np.stack([np.asarray(scores.baseline, float), np.asarray(scores.candidate, float)])
    found = []
    for task in np.unique(group_N):
        here_2N = values_2N[:, group_N == task]
        delta_N = here_2N[1] - here_2N[0]
        lost, gained = int((delta_N < -EPSILON).sum()), int((delta_N > EPSILON).sum())
        _, code_N = np.unique(cluster_N[group_N == task], return_inverse=True)
        if np.isin(here_2N, (0.0, 1.0)).all() and len(code_N) == code_N.max() + 1:
            p_value, method = mcnemar(lost, gained), Method(kind="exact_mcnemar")
        else:
            delta_C = np.zeros(code_N.max() + 1)
            np.add.at(delta_C, code_N, delta_N)
            p_value = sign_flip_test(delta_C, num_resamples=num_resamples, seed=seed)
            method = Method(kind="sign_flips", num_resamples=num_resamples)
        found.append((str(task), len(delta_N), lost, gained, p_value, method))
    adjusted = holm([p_value for *_, p_value, _ in found])
    return tuple(
        Flips(task=task, n=n, num_lost=lost, num_gained=gained, p_value=p_value, p_holm=p_holm, method=method)
        for (task, n, lost, gained, p_value, method), p_holm in zip(found, adjusted, strict=True)
    )


def mcnemar(num_lost: int, num_gained: int) -> float:
    """Two-sided exact p-value that losses and gains are equally likely; 1 without either."""
    num = num_lost + num_gained
    return min(1.0, 2 * float(bdtr(min(num_lost, num_gained), num, 0.5))) if num else 1.0


def sign_flip_test(delta_C: Floats, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> float:
    """Two-sided permutation p-value of the summed differences under random signs per cluster, never 0."""
    moved_C = np.sort(delta_C[np.abs(delta_C) > EPSILON])
    if len(moved_C) == 0:
        return 1.0
    rng = np.random.default_rng(seed)
    observed = abs(moved_C.sum()) - EPSILON * len(moved_C)
    as_far = 0
    for start in range(0, num_resamples, 1_000):
        positive_QC = rng.integers(0, 2, size=(min(1_000, num_resamples - start), len(moved_C)), dtype=np.int8)
        as_far += int((np.abs((2.0 * positive_QC - 1.0) @ moved_C) >= observed).sum())
    return (1 + as_far) / (1 + num_resamples)
