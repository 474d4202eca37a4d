"""Costs of layers that were not built, and intervals over rounds of whatever follows from costs.

Letters as in intervals; F measured parts of a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls
from scipy.special import ndtr

from twotower_eval.records import Estimate
from twotower_eval.stats.intervals import LEVEL, Floats, t_quantile

NUM_SCALING_DRAWS = 2_000


def round_draws(seconds_RF: Floats, seed: int) -> Floats:
    """Means over rounds, (Q, F): of all rounds first, then of rounds drawn with replacement, the same for all F."""
    num_rounds = seconds_RF.shape[0]
    drawn_QR = np.random.default_rng(seed).integers(num_rounds, size=(NUM_SCALING_DRAWS, num_rounds))
    return np.concatenate([seconds_RF.mean(0)[None], seconds_RF[drawn_QR].mean(1)])


def round_estimate(values_Q: Floats, *, num_rounds: int, seed: int, level: float = LEVEL) -> Estimate:
    """Row 0 of (Q,) with the interval of the other rows; its ends may be infinite. ValueError for a single round."""
    if num_rounds < 2:
        raise ValueError("one round gives no interval: measure more")
    inflation = (num_rounds / (num_rounds - 1)) ** 0.5
    # No BCa: it compares draws with the value, and either may be infinite here.
    tail = float(ndtr(-t_quantile(level, num_rounds - 1) * inflation))
    low, high = (float(np.quantile(values_Q[1:], share, method="inverted_cdf")) for share in (tail, 1 - tail))
    method = "bootstrap over rounds, Student tails"
    return Estimate(value=float(values_Q[0]), low=low, high=high, level=level, n=num_rounds, method=method, seed=seed)


def fit_layers(patterns: Sequence[str], seconds_QF: Floats) -> tuple[str, Floats]:
    """Layer kinds, and seconds (Q, 1 + kinds) of what is outside the layers and of one layer of each kind.

    Least squares of relative errors, no cost below zero. ValueError where the parts cannot tell the kinds apart.
    """
    kinds = "".join(sorted(set("".join(patterns))))
    counts_FL = layer_counts(patterns, kinds)
    if np.linalg.matrix_rank(counts_FL) < counts_FL.shape[1]:
        raise ValueError(f"{len(patterns)} parts cannot tell {len(kinds)} kinds of layers apart")
    ones_F = np.ones(len(patterns))
    return kinds, np.array([nnls(counts_FL / row_F[:, None], ones_F)[0] for row_F in seconds_QF])


def layer_counts(patterns: Sequence[str], kinds: str) -> Floats:
    """(F, 1 + kinds): 1, and how many layers of each kind a pattern has."""
    return np.array([[1.0, *(pattern.count(kind) for kind in kinds)] for pattern in patterns])
