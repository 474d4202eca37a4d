"""Answers that flip between two models: counts both ways, exact tests per task, Holm over tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr

from twotower_eval.analyse.stats.intervals import EPSILON, NUM_RESAMPLES, Floats, holm
from twotower_eval.analyse.stats.paired import PairedScores
from twotower_eval.records import Method


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
    """Two-sided exact p-value that losses and gains are equally likely; 1 where there is neither."""
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
