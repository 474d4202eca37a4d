"""What quality and speed statistics share: figures that may be missing, intervals from bootstrap draws, exact bounds,
Holm's correction; and the dependence between rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, inf, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, fdtri, ndtr, ndtri, stdtrit

from twotower_eval.errors import NoEstimate
from twotower_eval.records import MIN_LAUNCH_ROUNDS, MIN_LAUNCHES, TELLING_ROUNDS, Method, SerialDependence


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number without an interval, or ``None`` with the reason."""

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.reason is not None):
            raise ValueError("a figure has either a value or a reason for having none")


NUM_RESAMPLES = 10_000
LEVEL = 0.95
EPSILON = 1e-12  # scores, sums and shares nearer to each other than this are equal
FEW = 5  # fewer discordant clusters or successes than this: no bootstrap over them
FULL_DOF = 16  # degrees of freedom up to which one more value like the most telling one is added in full
EVEN = 1e-9  # as a share of the range: how unlike the distances of the farthest values may be to count as alike

MOST_LOG = 709.0  # exp of it is just below the largest double

Floats = NDArray[np.float64]


def from_log(log_value: float) -> float:
    """``exp``; NoEstimate where the result is too large."""
    if log_value > MOST_LOG:
        raise NoEstimate("the ratio, or an end of its interval, is too large a number")
    return exp(log_value)


def t_quantile(level: float, dof: float) -> float:
    """Half-width in standard errors of a two-sided interval at ``level`` with ``dof`` degrees of freedom."""
    return float(stdtrit(min(dof, 1e9), (1 + level) / 2))


def skewed_t_interval(value: float, stderr: float, *, level: float, dof: float, skew: float) -> tuple[float, float]:
    """Student's interval, widened on the side of the tail for the ``skew`` of the estimate.

    By as much as skewness shifts Student's t (Johnson 1978, "Modified t tests and confidence intervals for asymmetrical
    populations"), at the normal quantile and stretched as Student's is: the square of t grows too fast with few degrees
    of freedom. The other end stays: moving it in would trust an estimated skewness too far.
    """
    reach, normal = t_quantile(level, dof) * stderr, t_quantile(level, inf)
    shift = skew / 6 * (1 / normal + 2 * normal) * reach
    return value - reach + min(shift, 0.0), value + reach + max(shift, 0.0)


def third_cumulant(values_I: Floats) -> float:
    """Third cumulant of the mean of independent values; 0 for two or fewer, which do not show it."""
    num = values_I.size
    cubes = float(((values_I - values_I.mean()) ** 3).sum())
    return cubes / ((num - 1) * (num - 2) * num) if num > 2 else 0.0


def one_more(values_I: Floats) -> tuple[float, float]:
    """Variance and third cumulant of the mean with one more value like the most extreme one.

    Few values may lack the rare large one. It counts in full up to ``FULL_DOF`` degrees of freedom, less and less
    beyond. Two values, or two equally extreme ones on either side, do not show on which side more would lie.
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
    """One of our methods with further fields; the text of an outside method stays as it is."""
    changed: Any = fields
    return replace(method, **changed) if isinstance(method, Method) else method


BOUND = 2.0  # standard errors from the corrected correlation of rounds to the bound that is reckoned with
BLOCK_BOUND = 0.5  # the same for blocks of rounds, whose correlation is less by itself
LARGEST = 0.95  # correlation that is reckoned with: above it no number of rounds in one sitting is enough
VOID_ROUNDS = 1  # that each of many launches may have lost while their rounds are still estimated as one series
NUM_BLOCKS = 10  # minimum: of fewer blocks the correlation is no better known than that of rounds
STILL = 1e-20  # sum of squares, on the log scale, below which rounds are equal but for rounding

JUMPS_LEVEL = 0.1  # of the test for jumps between launches; the figures there were chosen by the same simulation

Caution = Literal["bounded", "estimated"]


class Widening(NamedTuple):
    """Factor on the variance of a mean of rounds, remaining degrees of freedom, and the facts for reports."""

    factor: float
    dof: float
    facts: SerialDependence


def serial_dependence(series_R: Floats, launches: Sequence[str], caution: Caution = "bounded") -> Widening:
    """How dependence between rounds widens the interval of their mean; ``series_R`` is in time order.

    ``bounded`` uses an upper bound of the correlation, as a verdict needs. ``estimated`` uses the corrected correlation
    itself, to measure how noisy a machine is.
    """
    whole, num = _series(series_R, sittings(launches)), len(series_R)
    found = _Found(factor=1.0, dof=num - 1.0, block=1)
    likely = bound = 0.0
    tells, varies = _tells(whole, launches), float(((series_R - series_R.mean()) ** 2).sum()) > STILL
    if varies:
        likely, bound = (_kendall(whole), _corrected(whole, BOUND)) if tells else (LARGEST, LARGEST)
        found = _widest(whole, bound) if caution == "bounded" else _as_measured(whole, tells=tells)
    facts = SerialDependence(
        lag1=_lag1(whole) if tells else None,
        lag1_bound=bound if tells else None,
        effective_rounds=1 / _mean_variance(whole, likely),
        block=found.block,
        widening=sqrt(found.factor),
    )
    return Widening(factor=found.factor, dof=found.dof, facts=facts)


def sittings(launches: Sequence[str]) -> list[str]:
    """By round, the launch that it counts with: its own, or a neighbouring one where that has few rounds.

    Of many launches of which fewer than ``MIN_LAUNCHES`` remain, all rounds count as one.
    """
    num_rounds = Counter(launches)
    if len(num_rounds) < MIN_LAUNCHES:
        return list(launches)
    whole = [name for name in num_rounds if num_rounds[name] >= MIN_LAUNCH_ROUNDS]
    if len(whole) < MIN_LAUNCHES:
        return [launches[0]] * len(launches)
    counts_with, latest = {}, whole[0]
    for name in num_rounds:
        latest = name if name in whole else latest
        counts_with[name] = latest
    return [counts_with[name] for name in launches]


def _tells(whole: Sequence[Floats], launches: Sequence[str]) -> bool:
    """Whether there are enough rounds in a launch to see how much neighbours resemble each other."""
    num_launches = len(set(launches))
    is_torn = num_launches >= MIN_LAUNCHES and len(launches) < (MIN_LAUNCH_ROUNDS - VOID_ROUNDS) * num_launches
    return _mean_length(whole) >= TELLING_ROUNDS and not is_torn


def carried_over(series_R: Floats, launches: Sequence[str], level: float) -> float:
    """Factor, at least 1, on the variance of the mean of launches for what neighbouring launches share.

    ``level`` is that of the interval that is to be the wider one.
    """
    whole = _series(series_R, sittings(launches))
    series_R = np.concatenate(whole)
    if float(((series_R - series_R.mean()) ** 2).sum()) <= STILL or _jumps(whole):
        return 1.0
    num, num_launches = len(series_R), len(whole)
    # What a wander does within launches cannot be told from few rounds; then it may do as much as over all.
    within = _corrected(whole, BOUND) if _mean_length(whole) >= TELLING_ROUNDS else LARGEST
    correlation = min(_corrected([series_R], BOUND), within)
    of_series = _factor([series_R], correlation) * float(series_R.var(ddof=1)) / num
    of_launches = float(np.var([part_R.mean() for part_R in whole], ddof=1)) / num_launches
    quantiles = t_quantile(level, num - 1.0) / t_quantile(level, num_launches - 1.0)
    return max(1.0, of_series * quantiles**2 / max(of_launches, STILL))


def _jumps(whole: Sequence[Floats]) -> bool:
    """Whether steps from launch to launch are larger than those from round to round, beyond chance."""
    inner = np.concatenate([np.diff(part_R) for part_R in whole])
    borders = np.array([after_R[0] - before_R[-1] for before_R, after_R in pairwise(whole)])
    of_inner, of_borders = float((inner**2).mean()), float((borders**2).mean())
    return of_borders > of_inner * float(fdtri(len(borders), len(inner), 1 - JUMPS_LEVEL))


class _Found(NamedTuple):
    factor: float
    dof: float
    block: int


def _widest(whole: Sequence[Floats], bound: float) -> _Found:
    """The wider of two intervals: with the bounded correlation of rounds, or by blocks of rounds."""
    num = sum(map(len, whole))
    rounds = _Found(factor=_factor(whole, bound), dof=num - 1.0, block=1)
    length = num // NUM_BLOCKS
    means = [_block_means(part_R, length) for part_R in whole] if length > 1 else []
    if not means or _mean_length(means) < TELLING_ROUNDS:
        return rounds
    num_blocks = sum(map(len, means))
    of_blocks = float(np.concatenate(means).var(ddof=1)) / num_blocks * _factor(means, _corrected(means, BLOCK_BOUND))
    of_rounds = float(np.concatenate(whole).var(ddof=1)) / num
    blocks = _Found(factor=of_blocks / of_rounds, dof=num_blocks - 1.0, block=length)
    return max(rounds, blocks, key=lambda one: sqrt(one.factor) * t_quantile(LEVEL, one.dof))


def _as_measured(whole: Sequence[Floats], *, tells: bool) -> _Found:
    factor = _factor(whole, _corrected(whole, 0.0)) if tells else 1.0
    return _Found(factor=factor, dof=sum(map(len, whole)) - 1.0, block=1)


def _series(series_R: Floats, launches: Sequence[str]) -> list[Floats]:
    """The rounds of each launch."""
    names = np.asarray(launches)
    return [series_R[names == name] for name in dict.fromkeys(launches)]


def _lag1(whole: Sequence[Floats]) -> float:
    """Correlation of neighbours about the mean of their launch; 0 without variation."""
    centred = [part_R - part_R.mean() for part_R in whole]
    squares = sum(float((part_R**2).sum()) for part_R in centred)
    products = sum(float((part_R[1:] * part_R[:-1]).sum()) for part_R in centred)
    return products / squares if squares > STILL else 0.0


def _mean_length(whole: Sequence[Floats]) -> float:
    return sum(map(len, whole)) / len(whole)


def _kendall(whole: Sequence[Floats]) -> float:
    """Correlation corrected for the bias of a short series, to first order; from 0 to ``LARGEST``."""
    found = _lag1(whole)
    return min(max(found + (1 + 4 * found) / _mean_length(whole), 0.0), LARGEST)


def _corrected(whole: Sequence[Floats], num_errors: float) -> float:
    """Correlation corrected for bias in full, ``num_errors`` standard errors up; from 0 to ``LARGEST``."""
    num, length = sum(map(len, whole)), _mean_length(whole)
    error = (num - 2) / (num * sqrt(num - 1))  # of the correlation of independent values
    corrected = (_lag1(whole) + 1 / length + num_errors * error) / (1 - 4 / length)
    return min(max(corrected, 0.0), LARGEST)


def _mean_variance(whole: Sequence[Floats], correlation: float) -> float:
    """Variance of the mean of all values over that of one; launches are independent."""
    total = 0.0
    for length in map(len, whole):
        lags = np.arange(1, length)
        total += length + 2 * float(((length - lags) * correlation**lags).sum())
    return total / sum(map(len, whole)) ** 2


def _factor(whole: Sequence[Floats], correlation: float) -> float:
    """Variance of the mean over its estimate from the values' own spread, which is too small."""
    of_mean, num = _mean_variance(whole, correlation), sum(map(len, whole))
    return of_mean * (num - 1) / (1 - of_mean)


def _block_means(part_R: Floats, length: int) -> Floats:
    """Means of consecutive blocks of rounds; the first rounds are left out where they fill no block."""
    num = len(part_R) // length
    means_B: Floats = part_R[len(part_R) - num * length :].reshape(num, length).mean(axis=1)
    return means_B
