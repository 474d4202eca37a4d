"""The A/A gate: the baseline timed against itself must come out as 1, and narrowly. Pure; limits are parameters.

One pair of copies per workload and batch size. That a copy differs from itself is a test per pair, so Holm's
correction goes over the pairs: all of them are tested at ``alpha / m``, those left after a rejection at
``alpha / (m - 1)``, and so on, each time by the interval at that level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

from twotower_eval.records import Estimate
from twotower_eval.stats.speedup import NULL_LEVEL

NULL_OFFSET = 0.02  # on the log scale
NULL_HALF_WIDTH = 0.03
NULL_SHARE = 0.25  # of the log speedup that is judged


@dataclass(frozen=True, kw_only=True)
class NullLimits:
    """How far a baseline may be from itself, and how wide its null may be to judge by; on the log scale.

    ``share``: largest half-width as a share of the largest |log speedup| that is at stake, see ``widest_null``.
    """

    offset: float = NULL_OFFSET
    half_width: float = NULL_HALF_WIDTH
    share: float = NULL_SHARE


def off_nulls(
    intervals: Sequence[Callable[[float], Estimate]], *, offset: float = NULL_OFFSET, level: float = NULL_LEVEL
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


def is_off(null: Estimate, offset: float = NULL_OFFSET) -> bool:
    """Whether an interval of a speedup lies wholly outside ``exp(+-offset)``."""
    return log(null.low) > offset or log(null.high) < -offset


def widest_null(judged: Estimate | None, limits: NullLimits = NullLimits(), *, claimed: float | None = None) -> float:
    """Largest half-width of a null, on the log scale, that a speedup can be judged by.

    At stake is the end of the judged interval that is farther from 1, or the claimed speedup if that is farther still:
    a speedup of 1.00 does not ask for a null without any width, and a claim of 2x is refuted by it.
    """
    if judged is None:
        return limits.half_width
    at_stake = [judged.low, judged.high, *([] if claimed is None else [claimed])]
    return min(limits.half_width, limits.share * max(abs(log(end)) for end in at_stake))


def half_width(null: Estimate) -> float:
    """Half the width of a speedup's interval, on the log scale."""
    return (log(null.high) - log(null.low)) / 2
