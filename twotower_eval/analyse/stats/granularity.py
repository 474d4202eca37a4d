"""Granularity of published percentages: can 75.58 % be k of 164? (GRIM: Brown and Heathers 2017.)

A mean of right-or-wrong answers over ``n`` documents with ``s`` samples each is some k / (n s), rounded. Half a unit
in the last place is allowed to round either way, since rounding conventions differ. Exact in rational arithmetic.
A mean over several languages or tasks is no such fraction and must not be checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor, gcd

import numpy as np
from scipy.special import gammaln, xlog1py, xlogy

MAX_SAMPLES = 100


def possible_counts(percent: float, decimals: int, n: int) -> tuple[int, ...]:
    """Every k for which 100 k / n rounds to ``percent`` at ``decimals`` decimals; empty where there is none.

    ValueError for a percentage outside 0 to 100 or one that has more decimals than it was said to have.
    """
    if n < 1 or decimals < 0:
        raise ValueError(f"{n} trials at {decimals} decimals: there must be at least one trial and no fewer than 0")
    published = Fraction(f"{percent:.{decimals}f}")
    if abs(float(published) - percent) > 1e-9 or not 0 <= published <= 100:
        raise ValueError(f"{percent} is no percentage with {decimals} decimals")
    half = Fraction(1, 2 * 10**decimals)
    low, high = ceil((published - half) * n / 100), floor((published + half) * n / 100)
    return tuple(range(max(low, 0), min(high, n) + 1))


def can_misfit(decimals: int, n: int) -> bool:
    """Whether some percentage with so many decimals is no k / n; where none is, that one fits says nothing.

    There are N = 10^(decimals + 2) steps from 0 to 100 %. From n = N on each is within half a unit of some k / n.
    Below, n + 1 counts cover as many steps, and one more for each count that lies halfway between two.
    """
    steps = int(10 ** (decimals + 2))
    shared = gcd(n, steps)
    halfway = shared if n // shared % 2 == 0 else 0
    return n + halfway < steps


def share_possible(decimals: int, n: int) -> float:
    """Share of all percentages with so many decimals that are some k / n: how often one fits by chance."""
    steps = int(10 ** (decimals + 2))
    shared = gcd(n, steps)
    covered = n + 1 + (shared if n // shared % 2 == 0 else 0)
    return min(covered, steps + 1) / (steps + 1)


def chance_of_equal(percent: float, decimals: int, n: int) -> float:
    """How often two models print the same percentage that are right with this probability, independently, n times.

    Models that agree on many documents do so more often.
    """
    counts = np.arange(n + 1)
    printed = np.round(100 * counts / n, decimals)
    _, place = np.unique(printed, return_inverse=True)
    ways = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    chances = np.exp(ways + xlogy(counts, percent / 100) + xlog1py(n - counts, -percent / 100))
    return float((np.bincount(place, weights=chances) ** 2).sum())


def smallest_samples(percents: Sequence[float], decimals: int, n: int, limit: int = MAX_SAMPLES) -> int | None:
    """Smallest number of samples per problem, up to ``limit``, with which all ``percents`` of ``n`` problems fit.

    ``None`` where no number up to the limit fits. Where :func:`can_misfit` says no for the answer, every percentage
    fits and it says nothing.
    """
    if not percents:
        raise ValueError("no published percentage to check")
    fitting = (s for s in range(1, limit + 1) if all(possible_counts(percent, decimals, n * s) for percent in percents))
    return next(fitting, None)
