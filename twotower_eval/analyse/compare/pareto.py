"""Retention against speedup: which operating points no other one beats in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twotower_eval.analyse.compare.alike import MeasuredOn, any_run, scored_on, timed_on
from twotower_eval.records import Cell, Estimate, GateLimits

if TYPE_CHECKING:
    from twotower_eval.analyse.compare.points import PointKey, QualityPoint
    from twotower_eval.analyse.compare.timing import SpeedPoint

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
    """Points that were timed alike, with retentions on the same documents of outputs of one kind.

    ``same_outputs``: these are of the outputs that were timed; else of whole tasks, scored apart.
    """

    workload: str
    batch_size: int
    same_outputs: bool
    scored: MeasuredOn
    timed: MeasuredOn
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
    """A panel for each way of timing in which some point has both estimates."""
    alike: dict[MeasuredOn, list[SpeedPoint]] = {}
    for point in speed:
        if point.time.estimate is not None:
            alike.setdefault(timed_on(point), []).append(point)
    found = (_panel(on, alike[on], quality) for on in sorted(alike, key=_order))
    return tuple(panel for panel in found if panel is not None)


def _order(on: MeasuredOn) -> tuple[object, ...]:
    return (on.kind, on.batch_size, on.run_ids, on.same)


def _panel(on: MeasuredOn, timed: Sequence[SpeedPoint], quality: Sequence[QualityPoint]) -> Panel | None:
    """Of all kinds of retention the one that most points have: two kinds would not make one front."""
    kinds: dict[MeasuredOn, dict[str, QualityPoint]] = {}
    for point in timed:
        for one in quality:
            if one.key == point.key and one.headline.estimate is not None and _is_of(one, point):
                kinds.setdefault(any_run(scored_on(one)), {})[point.candidate.id] = one
    if not kinds:
        return None
    scored = max(kinds, key=lambda kind: (len(kinds[kind]), kind.kind != "task", kind.num_tasks, kind.num_documents))
    kept = kinds[scored]
    points = [point for point in timed if point.candidate.id in kept]
    return Panel(
        workload=timed[0].workload,
        batch_size=timed[0].batch_size,
        same_outputs=scored.kind != "task",
        scored=scored,
        timed=on,
        run_ids=frozenset(i for p in points for i in (*p.run_ids, kept[p.candidate.id].run_id)),
        points=_trade_offs(points, [kept[point.candidate.id] for point in points]),
    )


def _is_of(quality: QualityPoint, point: SpeedPoint) -> bool:
    """Whether a retention is that of the timed outputs themselves, or of whole tasks."""
    same = quality.candidate.id == point.candidate.id and quality.run_id in point.run_ids
    return same or not quality.timed


def _trade_offs(timed: Sequence[SpeedPoint], quality: Sequence[QualityPoint]) -> tuple[TradeOff, ...]:
    boxes = []
    for speed, kept in zip(timed, quality, strict=True):
        assert kept.headline.estimate is not None
        assert speed.time.estimate is not None
        boxes.append((kept.headline.estimate, speed.time.estimate))
    valid = [not point.invalid for point in timed]
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
