"""Retention against speedup: which operating points no other one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twotower_eval.evidence.naming import long_name
from twotower_eval.records import Cell, Estimate, GateLimits

if TYPE_CHECKING:
    from twotower_eval.evidence.points import QualityPoint
    from twotower_eval.evidence.timing import SpeedPoint

BROKEN = GateLimits().min_retention  # broken: the whole interval of retention lies below it


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """One operating point: its name by block, steps and threshold, and its box of two intervals.

    ``on_front``: no other point is at least as good in both and better in one, by the values. ``surely_beaten``: the
    whole box of some other point lies above and to the right of this one's. A point may be neither.
    ``same_outputs``: the outputs that were timed are those that were scored.
    """

    name: str
    candidate: Cell
    retention: Estimate
    speedup: Estimate
    same_outputs: bool
    on_front: bool
    surely_beaten: bool


def front(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """For each (retention, speedup) whether it is on the Pareto front; equal points are on it together."""
    return tuple(not any(_beats(other, point) for other in points) for point in points)


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def is_fast_and_broken(retention: Estimate, speedup: Estimate) -> bool:
    """Faster than the baseline by its estimate, and surely less than ``BROKEN`` of its quality kept."""
    return speedup.value > 1 and retention.high < BROKEN


def trade_offs(pairs: Sequence[tuple[QualityPoint, SpeedPoint]]) -> tuple[TradeOff, ...]:
    """Points that have both estimates, in the order given. ``pairs`` are of one operating point each."""
    known = []
    for quality, speed in pairs:
        retention, speedup = quality.headline.estimate, speed.time.estimate
        if retention is not None and speedup is not None:
            known.append((quality, speed, (retention, speedup)))
    boxes = [box for _, _, box in known]
    on_front = front([(retention.value, speedup.value) for retention, speedup in boxes])
    return tuple(
        TradeOff(
            name=long_name(speed.candidate.decoder),
            candidate=speed.candidate,
            retention=box[0],
            speedup=box[1],
            same_outputs=quality.candidate.id == speed.candidate.id and quality.run_id in speed.run_ids,
            on_front=on,
            surely_beaten=any(_surely_beats(other, box) for other in boxes),
        )
        for (quality, speed, box), on in zip(known, on_front, strict=True)
    )


def _surely_beats(one: tuple[Estimate, Estimate], other: tuple[Estimate, Estimate]) -> bool:
    return all(mine.low > theirs.high for mine, theirs in zip(one, other, strict=True))
