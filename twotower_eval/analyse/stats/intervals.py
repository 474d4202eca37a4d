"""Pieces that quality and speed statistics share: intervals from bootstrap draws, exact bounds, Holm's correction.

Shape letters of this package: Q bootstrap draws, N documents, C clusters, L tasks and members of grouped tasks
("leaves"), K tasks that count once in an average, R rounds, P timed calls (one batch of prompts each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri, stdtrit

from twotower_eval.errors import NoEstimate
from twotower_eval.records import Method

NUM_RESAMPLES = 10_000
LEVEL = 0.95
EPSILON = 1e-12  # scores, sums and shares nearer to each other than this are equal
FEW = 5  # fewer discordant clusters or successes than this: no bootstrap over them
FULL_DOF = 16  # degrees of freedom up to which one more value like the most telling one is added in full
EVEN = 1e-9  # as a share of the range: how unlike the distances of the farthest values may be to count as alike

MOST_LOG = 709.0  # exp of it is just below the largest double

Floats = NDArray[np.float64]


def from_log(log_value: float) -> float:
    """``exp``, and NoEstimate where no number is that large."""
    if log_value > MOST_LOG:
        raise NoEstimate("the ratio, or an end of its interval, is too large a number")
    return exp(log_value)


def t_quantile(level: float, dof: float) -> float:
    """Half-width in standard errors of a two-sided interval at ``level`` with ``dof`` degrees of freedom."""
    return float(stdtrit(min(dof, 1e9), (1 + level) / 2))


def skewed_t_interval(value: float, stderr: float, *, level: float, dof: float, skew: float) -> tuple[float, float]:
    """Student's interval, its end on the side of the tail moved out for the ``skew`` of the estimate.

    By as much as skewness shifts Student's t (Johnson 1978, "Modified t tests and confidence intervals for
    asymmetrical populations"), at the normal quantile and stretched as Student's is: the square of t runs away where
    degrees of freedom are few. The other end stays: to move it in would trust an estimated skewness too far.
    """
    reach, normal = t_quantile(level, dof) * stderr, t_quantile(level, inf)
    shift = skew / 6 * (1 / normal + 2 * normal) * reach
    return value - reach + min(shift, 0.0), value + reach + max(shift, 0.0)


def third_cumulant(values_I: Floats) -> float:
    """Third cumulant of the mean of independent values; 0 where two or fewer say nothing of it."""
    num = values_I.size
    cubes = float(((values_I - values_I.mean()) ** 3).sum())
    return cubes / ((num - 1) * (num - 2) * num) if num > 2 else 0.0


def one_more(values_I: Floats) -> tuple[float, float]:
    """Variance and third cumulant that one more value like the most telling one adds to those of the mean.

    Few values may lack the rare large one. It counts in full up to ``FULL_DOF`` degrees of freedom, less and less
    beyond. Two values, or the farthest two as far out on either side, do not say on which side more would lie.
    """
    centred_I = (values_I - values_I.mean()) / values_I.size
    low, high = float(centred_I.min()), float(centred_I.max())
    worst = high if high > -low else low
    share = min(1.0, FULL_DOF / dof_of_mean(values_I))
    even = abs(high + low) <= EVEN * (high - low)
    return share * worst**2, 0.0 if even else share * worst**3


def dof_of_mean(values_I: Floats) -> float:
    """Degrees of freedom of the variance of a mean of independent values, as their fourth powers leave them."""
    num = len(values_I)
    squares_I = (values_I - values_I.mean()) ** 2
    total = float(squares_I.sum())
    spread = float((squares_I**2).sum()) - total**2 / num
    return min(num - 1.0, max(1.0, 2 * total**2 / spread)) if spread > 0 else num - 1.0


def corrected_percentiles(
    low_draws_Q: Floats, high_draws_Q: Floats, value: float, *, level: float, dof: float, inflation: float, skew: float
) -> tuple[float, float]:
    """Percentile interval, corrected for skewness and for few clusters.

    Skewness: BCa (Efron 1987, "Better bootstrap confidence intervals"), the acceleration being a sixth of the
    estimate's ``skew``, the bias that of the draws' median against ``value``. Without it, bounds from few and
    one-sided flips are wrong more often than they say. Few clusters: a plain percentile interval acts like a normal
    interval with the variance divided by n instead of n - 1, so the normal deviate put into BCa is as far out as
    Student's t times ``inflation`` (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3).
    The two draws differ only where a draw is undefined.
    """
    reach = t_quantile(level, dof) * inflation
    low, high = (
        float(np.quantile(draws_Q, _bca_tail(draws_Q, value, deviate, skew / 6), method="inverted_cdf"))
        for draws_Q, deviate in ((low_draws_Q, -reach), (high_draws_Q, reach))
    )
    return low, high


def _bca_tail(draws_Q: Floats, value: float, deviate: float, acceleration: float) -> float:
    """Share of draws below the bound that lies ``deviate`` standard errors out."""
    tolerance = 1e-12 * max(1.0, abs(value))
    below, at_most = (draws_Q < value - tolerance).mean(), (draws_Q <= value + tolerance).mean()
    # Never further than what the draws can tell: half of one beyond the last.
    edge = 0.5 / len(draws_Q)
    bias = float(ndtri(min(max((below + at_most) / 2, edge), 1 - edge)))
    shifted = bias + deviate
    stretch = max(1 - acceleration * shifted, 0.1)
    return float(ndtr(bias + shifted / stretch))


def binomial_upper_bound(num_events: int, n: int, alpha: float = 0.05) -> float:
    """Clopper-Pearson: one-sided upper bound at level ``1 - alpha`` of a rate seen ``num_events`` times in ``n``.

    For no event it is ``1 - alpha ** (1 / n)``.
    """
    if n < 1 or not 0 <= num_events <= n:
        raise ValueError(f"{num_events} events in {n} trials: a rate needs at least one trial and no more events")
    if num_events == n:
        return 1.0
    return float(betaincinv(num_events + 1, n - num_events, 1 - alpha))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P-values adjusted by Holm's step-down method, in the order given (the family is the whole sequence)."""
    p_K = np.asarray(p_values, dtype=float)
    order_K = np.argsort(p_K, kind="stable")
    stepped_K = np.maximum.accumulate(p_K[order_K] * np.arange(len(p_K), 0, -1))
    adjusted_K = np.empty_like(p_K)
    adjusted_K[order_K] = np.minimum(stepped_K, 1.0)
    return tuple(float(p) for p in adjusted_K)


def method_with(method: Method | str, **fields: object) -> Method | str:
    """A method of ours with further fields; what others call theirs stays as it is."""
    changed: Any = fields
    return replace(method, **changed) if isinstance(method, Method) else method
