"""The A/A gate: the baseline timed against itself must come out as 1, and narrowly. Pure; limits are parameters.

One pair of copies per workload and batch size. That a copy differs from itself is a test per pair, so Holm's
correction goes over the pairs: all of them are tested at ``alpha / m``, those left after a rejection at
``alpha / (m - 1)``, and so on, each time by the interval at that level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

from twotower_eval.analyse.stats.speedup import NULL_LEVEL
from twotower_eval.records import Estimate, GateLimits

LIMITS = GateLimits()


def off_nulls(
    intervals: Sequence[Callable[[float], Estimate]], *, offset: float = LIMITS.null_offset, level: float = NULL_LEVEL
) -> tuple[bool, ...]:
    """For each pair, whether its interval lies wholly outside ``exp(+-offset)``, with Holm's correction over pairs.

    ``intervals`` are functions from a level to the pair's speedup, e.g.
    ``lambda level: speedup(calls, level=level)``.
    """
    off = [False] * len(intervals)
    while not all(off):
        at = 1 - (1 - level) / off.count(False)
        newly = [not known and is_off(interval(at), offset) for known, interval in zip(off, intervals, strict=True)]
        if not any(newly):
            break
        off = [known or new for known, new in zip(off, newly, strict=True)]
    return tuple(off)


def is_off(null: Estimate, offset: float = LIMITS.null_offset) -> bool:
    """Whether an interval of a speedup lies wholly outside ``exp(+-offset)``."""
    return log(null.low) > offset or log(null.high) < -offset


def widest_null(judged: Estimate | None, limits: GateLimits = LIMITS, *, claimed: float | None = None) -> float:
    """Largest half-width of a null, on the log scale, that a speedup can be judged by.

    At stake is the end of the judged interval that is farther from 1, or the claimed speedup if that is farther still:
    a speedup of 1.00 does not ask for a null without any width, and a claim of 2x is refuted by it.
    """
    if judged is None:
        return limits.null_half_width
    at_stake = [judged.low, judged.high, *([] if claimed is None else [claimed])]
    return min(limits.null_half_width, limits.null_share * max(abs(log(end)) for end in at_stake))


def half_width(null: Estimate) -> float:
    """Half the width of a speedup's interval, on the log scale."""
    return (log(null.high) - log(null.low)) / 2
