"""The A/A gate on evidence (PROTOCOL "Speed" 5): one rule for what claims judge and what reports warn of."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.measured import Measured
from twotower_eval.analyse.compare.numbers import PERCENT, compared
from twotower_eval.records import Cell, Estimate, GateLimits

if TYPE_CHECKING:
    from twotower_eval.analyse.compare.timing import SpeedPoint


class Nulled(Protocol):
    """What was timed against itself in these runs."""

    @property
    def run_ids(self) -> tuple[str, ...]: ...
    @property
    def baseline(self) -> Cell: ...
    @property
    def null(self) -> Measured: ...
    @property
    def null_timed(self) -> stats.TimedCalls | None: ...


LIMITS = GateLimits()


def fault(
    point: Nulled,
    others: Iterable[Nulled],
    judged: Estimate | None,
    limits: GateLimits = LIMITS,
    claimed: float | None = None,
) -> str | None:
    """Why the point's null forbids to judge a speedup by it, in words; ``None`` where nothing does.

    A null that is missing does. That a baseline differs from itself is tested with Holm's correction over the nulls
    of all workloads and batch sizes among ``others``, each pair once. ``judged`` is the speedup, ``claimed`` what
    is claimed of it: a null may be no wider than a share of what is at stake.
    """
    null = point.null.estimate
    if null is None or point.null_timed is None:
        return f"without a null no speedup can be trusted: {point.null.reason}"
    pairs = {
        _pair(other): other.null_timed
        for other in (*others, point)
        if other.null_timed is not None and other.null.estimate is not None
    }
    intervals = [partial(_speedup_at, timed) for timed in pairs.values()]
    off = dict(zip(pairs, stats.off_nulls(intervals, offset=limits.null_offset), strict=True))
    if off[_pair(point)]:
        return f"the baseline timed against itself is off by more than {100 * limits.null_offset:g} %"
    half, widest = stats.half_width(null), stats.widest_null(judged, limits, claimed=claimed)
    if half > widest:
        share = (
            "" if judged is None else f", the least of {100 * limits.null_half_width:g} % and {_share(limits)} at stake"
        )
        width, limit = compared(PERCENT, half, widest)
        return f"the null's half-width of {width} is above {limit}{share}: time more rounds"
    return None


def caution(point: SpeedPoint, limits: GateLimits = LIMITS) -> str | None:
    """What to say beside a speedup whose null is good enough in itself and yet wide for so small a difference."""
    null, found = point.null.estimate, point.time.estimate
    if null is None or found is None:
        return None
    half, widest = stats.half_width(null), stats.widest_null(found, limits)
    if half <= widest:
        return None
    width, limit = compared(PERCENT, half, widest)
    return (
        f"near 1x for its A/A null, whose half-width of {width} is above {limit}, {_share(limits)}: noise may be "
        "a good part of the difference, more rounds tell"
    )


def _share(limits: GateLimits) -> str:
    return f"{100 * limits.null_share:g} % of the log speedup"


def _pair(point: Nulled) -> tuple[str, tuple[str, ...]]:
    return (point.baseline.id, point.run_ids)


def _speedup_at(timed: stats.TimedCalls, level: float) -> Estimate:
    return stats.speedup(timed, level=level, caution="estimated")
