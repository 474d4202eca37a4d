"""Granularity of published percentages: can 75.58 % be k of 164? (GRIM: Brown and Heathers 2017.)

A mean of right-or-wrong answers over ``n`` documents with ``s`` samples each is some k / (n s), rounded. Half a unit
in the last place is allowed to round either way, since rounding conventions differ. Exact in rational arithmetic.
A mean over several languages or tasks is no such fraction and must not be checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor, gcd

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


def smallest_samples(percents: Sequence[float], decimals: int, n: int, limit: int = MAX_SAMPLES) -> int | None:
    """Smallest number of samples per problem, up to ``limit``, with which all ``percents`` of ``n`` problems fit.

    ``None`` where no number up to the limit fits. Where :func:`can_misfit` says no for the answer, every percentage
    fits and it says nothing.
    """
    if not percents:
        raise ValueError("no published percentage to check")
    fitting = (s for s in range(1, limit + 1) if all(possible_counts(percent, decimals, n * s) for percent in percents))
    return next(fitting, None)
