"""Rounds that depend on their neighbours: how much less they say than as many independent ones.

A machine that is slow for one arm is often so for several rounds on end. The mean of such rounds varies more than
their number says, and their own spread shows too little of it. ``serial_dependence`` measures the lag-1 correlation
within launches, in time order, and says by what to multiply the variance of the mean of independent rounds.

The correlation of few rounds comes out too low (Kendall 1954, Marriott and Pope 1954: by about (1 + 4 rho) / n) and
badly: of 5 rounds it says next to nothing. So the variance is that of a first-order autoregression (AR(1)) whose
correlation is an upper bound: corrected for bias, plus ``BOUND`` standard errors, at most ``LARGEST``. Rounds that
share a slow wander and each have noise of their own are alike over longer than lag 1 shows. So from 20 rounds on the
same is done with the means of about ten blocks of rounds, ``BLOCK_BOUND`` standard errors up, and the wider counts.
The figures were chosen by simulation (``calibration.serial_worlds``).

Launches that follow on each other may share a wander too: a machine that is warm does not cool down between them. From
five launches of four rounds on these are what is resampled, and ``carried_over`` says by what to multiply the variance
of their mean: all rounds are taken for one series whose correlation is the bound above, at most the one that rounds
show within launches, and the wider interval counts. Where the series jumps from launch to launch by clearly more than
from round to round, launches differ by themselves and nothing is carried over. A wander between launches that no round
shows is not found: five launches cannot tell it from launches that differ by themselves.

A launch of fewer rounds shows nothing of that border, so its rounds count with the launch before it (``sittings``).
Where that leaves fewer than five launches of five and more, all rounds are one series.

How many independent rounds they are worth is said by the corrected lag-1 correlation without that bound: it decides
whether there is evidence at all, the bound how wide the interval is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import fdtri

from twotower_eval.analyse.stats.intervals import LEVEL, Floats, t_quantile
from twotower_eval.records import MIN_LAUNCH_ROUNDS, MIN_LAUNCHES, TELLING_ROUNDS, SerialDependence

BOUND = 2.0  # standard errors from the corrected correlation of rounds to the bound that is reckoned with
BLOCK_BOUND = 0.5  # the same for blocks of rounds, whose correlation is less by itself
LARGEST = 0.95  # correlation that is reckoned with: above it no number of rounds in one sitting is enough
VOID_ROUNDS = 1  # that each of many launches may have lost while their rounds are still estimated as one series
NUM_BLOCKS = 10  # at the least: of fewer blocks the correlation is no better known than that of rounds
STILL = 1e-20  # sum of squares, on the log scale, below which rounds are equal but for rounding

JUMPS_LEVEL = 0.1  # of the test for jumps between launches; the figures there were chosen by the same simulation

Caution = Literal["bounded", "estimated"]


class Widening(NamedTuple):
    """Factor on the variance of a mean of independent rounds, degrees of freedom left, and the facts for reports."""

    factor: float
    dof: float
    facts: SerialDependence


def serial_dependence(series_R: Floats, launches: Sequence[str], caution: Caution = "bounded") -> Widening:
    """How dependence between rounds widens the interval of their mean; ``series_R`` is in time order.

    ``bounded`` reckons with the correlation that there may be, as a verdict has to. ``estimated`` takes the corrected
    correlation as it comes out, to tell how noisy a machine is.
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
    """By round, the launch that it counts with: its own, or the one before it (or behind) where that has few rounds.

    Of many launches of which fewer than ``MIN_LAUNCHES`` are left, all rounds count as one.
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
    """Whether rounds show how alike neighbours are. Those of many launches of a round or two do not."""
    num_launches = len(set(launches))
    is_torn = num_launches >= MIN_LAUNCHES and len(launches) < (MIN_LAUNCH_ROUNDS - VOID_ROUNDS) * num_launches
    return _mean_length(whole) >= TELLING_ROUNDS and not is_torn


def carried_over(series_R: Floats, launches: Sequence[str], level: float) -> float:
    """Factor, at least 1, on the variance of the mean of launches for what goes on from one of them into the next.

    ``level`` is that of the interval which is to be the wider one.
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
    """By rounds with the bounded correlation or by blocks of them, whichever makes the interval wider."""
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
    """Correlation of neighbours about the mean of their launch; 0 where nothing varies."""
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
    """Variance of the mean of all values as a share of that of one; launches are independent of each other."""
    total = 0.0
    for length in map(len, whole):
        lags = np.arange(1, length)
        total += length + 2 * float(((length - lags) * correlation**lags).sum())
    return total / sum(map(len, whole)) ** 2


def _factor(whole: Sequence[Floats], correlation: float) -> float:
    """Variance of the mean over what the values' own spread, which is too small, says of it."""
    of_mean, num = _mean_variance(whole, correlation), sum(map(len, whole))
    return of_mean * (num - 1) / (1 - of_mean)


def _block_means(part_R: Floats, length: int) -> Floats:
    """Means of so many rounds on end; the first rounds are left out where they fill no block."""
    num = len(part_R) // length
    means_B: Floats = part_R[len(part_R) - num * length :].reshape(num, length).mean(axis=1)
    return means_B
