"""The A/A gate on evidence (PROTOCOL "Speed" 5): one rule for what claims judge and what reports warn of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.measured import Measured
from twotower_eval.analyse.compare.warned import WideNull
from twotower_eval.records import Cell, Estimate, Fact, Finding, GateLimits

if TYPE_CHECKING:
    from twotower_eval.analyse.compare.timing import SpeedPoint


@dataclass(frozen=True, kw_only=True)
class NullFault(Fact):
    """Why a null forbids to judge a speedup: it is missing for a ``reason``, ``off`` by more than ``offset``, or its
    ``half_width`` is above ``widest``.

    Of a speedup that is judged, ``widest`` is the least of ``most`` and of ``share`` of what is at stake.
    """

    kind: Literal["missing", "off", "wide"]
    reason: str | None = None
    offset: float = 0.0
    half_width: float = 0.0
    widest: float = 0.0
    most: float | None = None
    share: float | None = None


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
) -> NullFault | None:
    """Why the point's null forbids to judge a speedup by it; ``None`` where nothing does.

    A null that is missing does. That a baseline differs from itself is tested with Holm's correction over the nulls
    of all workloads and batch sizes among ``others``, each pair once. ``judged`` is the speedup, ``claimed`` what
    is claimed of it: a null may be no wider than a share of what is at stake.
    """
    null = point.null.estimate
    if null is None or point.null_timed is None:
        return NullFault(kind="missing", reason=point.null.reason)
    pairs = {
        _pair(other): other.null_timed
        for other in (*others, point)
        if other.null_timed is not None and other.null.estimate is not None
    }
    intervals = [partial(_speedup_at, timed) for timed in pairs.values()]
    off = dict(zip(pairs, stats.off_nulls(intervals, offset=limits.null_offset), strict=True))
    if off[_pair(point)]:
        return NullFault(kind="off", offset=limits.null_offset)
    half, widest = stats.half_width(null), stats.widest_null(judged, limits, claimed=claimed)
    if half > widest:
        most, share = (None, None) if judged is None else (limits.null_half_width, limits.null_share)
        return NullFault(kind="wide", half_width=half, widest=widest, most=most, share=share)
    return None


def caution(point: SpeedPoint, limits: GateLimits = LIMITS) -> Finding | None:
    """What to say beside a speedup whose null is good enough in itself and yet wide for so small a difference."""
    null, found = point.null.estimate, point.time.estimate
    if null is None or found is None:
        return None
    half, widest = stats.half_width(null), stats.widest_null(found, limits)
    if half <= widest:
        return None
    wide = WideNull(half_width=half, widest=widest, share=limits.null_share)
    return Finding(kind="wide_null", severity="warning", facts=wide)


def _pair(point: Nulled) -> tuple[str, tuple[str, ...]]:
    return (point.baseline.id, point.run_ids)


def _speedup_at(timed: stats.TimedCalls, level: float) -> Estimate:
    return stats.speedup(timed, level=level, caution="estimated")
