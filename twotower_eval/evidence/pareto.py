"""Retention against speedup: which operating points no other one beats in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twotower_eval.evidence.nulls import is_invalid
from twotower_eval.records import Cell, Estimate, GateLimits

if TYPE_CHECKING:
    from twotower_eval.evidence.points import PointKey, QualityPoint
    from twotower_eval.evidence.timing import SpeedPoint

BROKEN = GateLimits().min_retention  # broken: the whole interval of retention lies below it


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """One operating point: its box of two intervals, and what forbids to read it as a point among others.

    ``on_front``: by the estimates no other point, the baseline included, is at least as good in both and better in
    one. Points with an ``invalid`` timing are never on it and beat nobody.
    """

    key: PointKey
    candidate: Cell
    retention: Estimate
    speedup: Estimate
    invalid: bool
    broken: bool
    uneven: bool
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Points that were timed alike, with retentions of one kind.

    ``same_outputs``: these are of the outputs that were timed; else of whole tasks, scored apart.
    """

    workload: str
    batch_size: int
    same_outputs: bool
    run_ids: frozenset[str]
    points: tuple[TradeOff, ...]


def front(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """For each (retention, speedup) whether it is on the Pareto front; equal points are on it together."""
    return tuple(not any(_beats(other, point) for other in points) for point in points)


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def is_fast_and_broken(retention: Estimate, speedup: Estimate) -> bool:
    """Faster than the baseline by its estimate, and surely less than ``BROKEN`` of its quality kept."""
    return speedup.value > 1 and retention.high < BROKEN


def panels(speed: Iterable[SpeedPoint], quality: Sequence[QualityPoint]) -> tuple[Panel, ...]:
    """A panel for each workload and batch size in which some point has both estimates."""
    alike: dict[tuple[str, str, int], list[SpeedPoint]] = {}
    for point in speed:
        if point.time.estimate is not None:
            alike.setdefault((point.workload, point.candidate.workload.name, point.batch_size), []).append(point)
    found = (_panel(alike[key], quality) for key in sorted(alike))
    return tuple(panel for panel in found if panel.points)


def _panel(timed: Sequence[SpeedPoint], quality: Sequence[QualityPoint]) -> Panel:
    """Of both kinds of retention the one that more points have: two kinds would not make one front."""
    own, whole = _own(timed, quality), _whole(timed, quality)
    kept, same_outputs = (own, True) if len(own) >= len(whole) else (whole, False)
    points = [point for point in timed if point.candidate.id in kept]
    return Panel(
        workload=timed[0].workload,
        batch_size=timed[0].batch_size,
        same_outputs=same_outputs,
        run_ids=frozenset(i for p in points for i in (*p.run_ids, kept[p.candidate.id].run_id)),
        points=_trade_offs(points, [kept[point.candidate.id] for point in points]),
    )


def _own(timed: Sequence[SpeedPoint], quality: Sequence[QualityPoint]) -> Mapping[str, QualityPoint]:
    """Quality of the timed outputs, by the candidate's cell."""
    run_ids = {point.candidate.id: point.run_ids for point in timed}
    scored = [q for q in quality if q.timed and q.run_id in run_ids.get(q.candidate.id, ())]
    return {q.candidate.id: q for q in scored if q.headline.estimate is not None}


def _whole(timed: Sequence[SpeedPoint], quality: Sequence[QualityPoint]) -> Mapping[str, QualityPoint]:
    """Quality of whole tasks, the most of them, at the operating point of each timed cell."""
    found: dict[str, QualityPoint] = {}
    for point in timed:
        there = [q for q in quality if q.key == point.key and not q.timed and q.headline.estimate is not None]
        if there:
            found[point.candidate.id] = max(there, key=lambda q: len(q.tasks))
    return found


def _trade_offs(timed: Sequence[SpeedPoint], quality: Sequence[QualityPoint]) -> tuple[TradeOff, ...]:
    boxes = []
    for speed, kept in zip(timed, quality, strict=True):
        assert kept.headline.estimate is not None
        assert speed.time.estimate is not None
        boxes.append((kept.headline.estimate, speed.time.estimate))
    valid = [not is_invalid(point.warnings) for point in timed]
    corners = [(retention.value, speedup.value) for (retention, speedup), ok in zip(boxes, valid, strict=True) if ok]
    best = {corner for corner, on in zip(corners, front([*corners, (1.0, 1.0)]), strict=False) if on}
    return tuple(
        TradeOff(
            key=point.key,
            candidate=point.candidate,
            retention=box[0],
            speedup=box[1],
            invalid=not ok,
            broken=is_fast_and_broken(*box),
            uneven=point.lengths_differ,
            on_front=ok and (box[0].value, box[1].value) in best,
        )
        for point, box, ok in zip(timed, boxes, valid, strict=True)
    )
