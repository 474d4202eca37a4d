"""Timings that repeat each other: one launch's rows under further names, a run's folder under another run's id.

A fine clock never gives the same times twice, call after call, to the last digit; that holds for warm-ups and probes
as well. So calls whose seconds, or whose moments, are those of others were not timed but copied.

A coarse clock, or a fine one on many short calls, repeats itself. So equal times count only where far more are equal
than chance allows. The chance that a time is among others is estimated from the times themselves: as the share of times
with one of the others just beside them, a tick up or down, where honest times lie about as often. Where a call shows
the same time again and again there is nothing beside. So the chance is taken to be at least that of two readings of a
call which varies by ``STEADY`` of its seconds, less than honest ones do, on the clock of the run, whose times are
multiples of a tick.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import permutations
from math import gcd, pi, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

from twotower_eval.analyse.compare.contradiction import (
    Check,
    Contradiction,
    ContradictionKind,
    Place,
    Spot,
    contradiction_of,
)
from twotower_eval.records import SpeedSample
from twotower_eval.store import JOURNALS, Run

Floats = NDArray[np.float64]
SPEED = JOURNALS[SpeedSample][0]
SHARE = 0.8  # of timings that have to be those of one other round or launch
MIN_VALUES = 5  # different ones: fewer may be alike by chance
DIGIT_S = 1e-9  # times are compared by whole nanoseconds: what clocks show, less what floats add
LONGEST_S = 1e9  # nothing is timed for thirty years: a longer time is compared as this one
STEADY = 1e-4  # of its seconds: no call repeats itself more closely
BESIDE = 1.5  # ticks to either side: more than one, as nanoseconds round it
BY_CHANCE = 1e-9  # chance of so many equal times from which on they are copied: a file has many pairs of rounds
INSIDE = 0.5  # of a launch's calls that have to lie within another launch: a clock may have been set back

Values = Mapping[Spot, Sequence[Hashable]]
Doubt = Callable[["_Repeat"], bool]  # whether values may be equal by chance


class _Repeat(NamedTuple):
    """``num`` values of ``spot`` are those of ``like``, which may be itself."""

    spot: Spot
    like: Spot
    num: int


def _repeats(values: Values, doubt: Doubt = lambda _: False) -> Iterator[_Repeat]:
    """Where nearly all values are those of one other place, or come twice within their own."""
    held: dict[Hashable, list[Spot]] = defaultdict(list)
    for spot, own in values.items():
        for value in own:
            held[value].append(spot)
    holders = {value: Counter(spots) for value, spots in held.items() if len(spots) > 1}  # few are anywhere else
    for spot, own in values.items():
        shared: dict[Spot, list[Hashable]] = defaultdict(list)
        for value in own:
            for other, times in holders[value].items() if value in holders else ():
                if other != spot or times > 1:
                    shared[other].append(value)
        enough = max(SHARE * len(own), MIN_VALUES)
        like = [_Repeat(spot, other, len(same)) for other, same in shared.items() if len(set(same)) >= MIN_VALUES]
        nearest = sorted((one for one in like if one.num >= enough), key=lambda one: -one.num)
        yield from [one for one in nearest if not doubt(one)][:1]


def _times(runs: Sequence[Run]) -> Iterator[_Repeat]:
    """By rounds; what has few calls a round, by all rounds of a launch."""
    by_round: dict[Spot, list[int]] = {}
    by_launch: dict[Spot, list[int]] = {}
    ticks: dict[str | None, int] = {}
    for run in runs:
        rounds: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
        for call in run.speed:
            if (time_ns := round(min(call.wall_s, LONGEST_S) / DIGIT_S)) > 0:
                key = (call.launch_id, call.cell, call.replica, call.round, call.phase)
                if key not in rounds:
                    lane = Spot(run=run.manifest.run_id, launch=call.launch_id, cell=call.cell, replica=call.replica)
                    of_round = by_round.setdefault(lane._replace(round=call.round, phase=call.phase), [])
                    rounds[key] = of_round, by_launch.setdefault(lane, [])
                for own in rounds[key]:
                    own.append(time_ns)
                ticks[run.manifest.run_id] = gcd(ticks.get(run.manifest.run_id, 0), time_ns)
    found = list(_repeats(by_round, _doubt(by_round, ticks)))
    lanes = {one.spot._replace(round=None, phase=None) for one in found}
    yield from found
    yield from (one for one in _repeats(by_launch, _doubt(by_launch, ticks)) if one.spot not in lanes)


def _doubt(times_ns: Mapping[Spot, Sequence[int]], ticks: Mapping[str | None, int]) -> Doubt:
    def may_be_chance(one: _Repeat) -> bool:
        own_ns, like_ns = np.asarray(times_ns[one.spot], float), np.asarray(times_ns[one.like], float)
        steady = float(np.minimum(1, ticks[one.spot.run] / (sqrt(4 * pi) * STEADY * own_ns)).mean())
        share = max(steady, _share_beside(own_ns, like_ns, ticks[one.spot.run]))
        return bool(share >= 1 or bdtrc(one.num - 1, len(own_ns), share) > BY_CHANCE)

    return may_be_chance


def _share_beside(own_ns: Floats, like_ns: Floats, tick_ns: int) -> float:
    """Share of times that have another one just above them or below, by the shortest step that there is between two.

    The two times with that step are left out. Where it is longer than the clock's tick and than what a steady call
    varies by, times lie far apart, and nothing is beside any.
    """
    there_ns = np.unique(like_ns)
    step_ns = float(np.diff(np.unique(np.concatenate([own_ns, there_ns]))).min())
    near_ns = BESIDE * np.minimum(step_ns, np.maximum(tick_ns, STEADY * own_ns))
    here = np.searchsorted(there_ns, own_ns, "left"), np.searchsorted(there_ns, own_ns, "right")
    num_below = here[0] - np.searchsorted(there_ns, own_ns - near_ns, "left")
    num_above = np.searchsorted(there_ns, own_ns + near_ns, "right") - here[1]
    return max(0, int((num_below + num_above > 0).sum()) - 2) / len(own_ns)


def _moments(runs: Sequence[Run]) -> Iterator[_Repeat]:
    """Of two launches: one moment is enough of each call, and calls of one launch may be shorter than a clock shows."""
    values: dict[Spot, dict[str, Hashable]] = defaultdict(dict)
    for run in runs:
        for call in run.speed:
            key = (call.cell, call.replica, call.call_id, call.started_at)
            values[Spot(run=run.manifest.run_id, launch=call.launch_id)].setdefault(call.started_at, key)
    yield from _repeats({spot: list(by_moment.values()) for spot, by_moment in values.items()})


def _place(one: _Repeat, field: str) -> Place:
    return Place(file=SPEED, field=field, stated=one.num, spot=one.spot, like=one.like)


def _times_within(run: Run) -> Iterator[Place]:
    return (_place(one, "wall_s") for one in _times([run]))


def _moments_within(run: Run) -> Iterator[Place]:
    return (_place(one, "started_at") for one in _moments([run]))


def _launches_at_once(run: Run) -> Iterator[Place]:
    """A run's launches come one after the other. Those without the moments of their calls are left out."""
    moments: dict[str, list[datetime]] = defaultdict(list)
    for call in run.speed:
        if (moment := moment_of(call.started_at)) is not None:
            moments[call.launch_id].append(moment)
    told = {launch: sorted(found) for launch, found in moments.items() if len(set(found)) >= MIN_VALUES}
    for (launch, own), (other, theirs) in permutations(told.items(), 2):
        inside = sum(theirs[0] <= moment <= theirs[-1] for moment in own)
        if inside > INSIDE * len(own):
            spot, like = (Spot(run=run.manifest.run_id, launch=one) for one in (launch, other))
            yield Place(file=SPEED, field="started_at", stated=inside, spot=spot, like=like)


def moment_of(text: str) -> datetime | None:
    """A moment as rows write it; ``None`` for what is none."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


REPEAT_CHECKS: Mapping[ContradictionKind, Check] = {
    "times repeated": _times_within,
    "moments repeated": _moments_within,
    "launches at once": _launches_at_once,
}


def between_runs(runs: Sequence[Run]) -> dict[str, list[Contradiction]]:
    """By run id, what of its timings is that of another of these runs."""
    by_id = {run.manifest.run_id: run for run in runs if run.speed}
    timed = list(by_id.values())
    places: dict[tuple[str, ContradictionKind], list[Place]] = defaultdict(list)
    kinds: tuple[tuple[ContradictionKind, str, Iterable[_Repeat]], ...] = (
        ("times repeated", "wall_s", _times(timed)),
        ("moments repeated", "started_at", _moments(timed)),
    )
    for kind, field, found in kinds if len(timed) > 1 else ():
        for one in found:
            if one.spot.run is not None and one.spot.run != one.like.run:
                places[one.spot.run, kind].append(_place(one, field))
    by_run: dict[str, list[Contradiction]] = defaultdict(list)
    for (run_id, kind), own in places.items():
        by_run[run_id].append(contradiction_of(kind, own, by_id[run_id]))
    return dict(by_run)
