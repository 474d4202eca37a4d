"""From the costs of single steps to speedups: curves over tokens per NFE, and costs of layers that were not built.

A block of K tokens takes K AR steps of the baseline; K / x denoise steps at x tokens per NFE, then one context pass,
of the candidate. Prefill is the same for both and left out. Letters as in intervals; F fitted parts, X rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from twotower_eval.records import Estimate
from twotower_eval.stats.intervals import LEVEL, Floats, widened_percentiles

NUM_SCALING_DRAWS = 2_000


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockCosts:
    """Seconds of an AR step, a denoise step and a context pass, (Q,) each: row 0 as measured, then bootstrap draws."""

    ar_Q: Floats
    denoise_Q: Floats
    context_Q: Floats
    block_size: int
    num_rounds: int
    seed: int

    def estimate(self, values_Q: Floats, level: float = LEVEL) -> Estimate:
        """Row 0 with the interval of the draws; ends may be infinite. ValueError where row 0 is, or with one round."""
        return round_estimate(values_Q, num_rounds=self.num_rounds, seed=self.seed, level=level)


def round_draws(seconds_RF: Floats, seed: int) -> Floats:
    """Means over rounds, (Q, F): of all rounds first, then of rounds drawn with replacement, the same for all F."""
    num_rounds = seconds_RF.shape[0]
    drawn_QR = np.random.default_rng(seed).integers(num_rounds, size=(NUM_SCALING_DRAWS, num_rounds))
    return np.concatenate([seconds_RF.mean(0)[None], seconds_RF[drawn_QR].mean(1)])


def round_estimate(values_Q: Floats, *, num_rounds: int, seed: int, level: float = LEVEL) -> Estimate:
    """See :meth:`BlockCosts.estimate`."""
    if num_rounds < 2:
        raise ValueError("one round gives no interval: measure more")
    if not np.isfinite(values_Q[0]):
        raise ValueError("out of reach at any rate")
    inflation = (num_rounds / (num_rounds - 1)) ** 0.5
    draws_Q = values_Q[1:]
    low, high = widened_percentiles(draws_Q, draws_Q, level=level, dof=num_rounds - 1, inflation=inflation)
    method = "bootstrap over rounds, Student tails"
    return Estimate(value=float(values_Q[0]), low=low, high=high, level=level, n=num_rounds, method=method, seed=seed)


def speedup_curve(costs: BlockCosts, rates_X: Sequence[float]) -> Floats:
    """Speedup over the baseline at each rate, (Q, X)."""
    block = costs.block_size
    steps_X = block / np.asarray(rates_X, dtype=float)
    candidate_QX = costs.denoise_Q[:, None] * steps_X + costs.context_Q[:, None]
    curve: Floats = block * costs.ar_Q[:, None] / candidate_QX
    return curve


def needed_rate(costs: BlockCosts, speedup: float) -> Floats:
    """Tokens per NFE at which the candidate is ``speedup`` times as fast, (Q,); infinite where no rate is.

    ``speedup`` 1 is the break-even. A rate above the block size cannot be had at this block size.
    """
    left_Q = costs.ar_Q / speedup - costs.context_Q / costs.block_size  # seconds per token left for denoising
    return np.divide(costs.denoise_Q, left_Q, out=np.full_like(left_Q, np.inf), where=left_Q > 0)


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
