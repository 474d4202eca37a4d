"""Timings that repeat each other: one launch's rows under further names, a run's folder under another run's id.

A clock of nanoseconds never gives the same times twice, call after call, to the last digit; that holds for warm-ups
and probes as well. So calls whose seconds, or whose moments, are those of others were not timed but copied. Coarse
clocks repeat themselves: times without digits below a microsecond are not looked at.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import permutations
from typing import NamedTuple

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

SPEED = JOURNALS[SpeedSample][0]
SHARE = 0.8  # of timings that have to be those of one other round or launch
MIN_VALUES = 5  # different ones: fewer may be alike by chance
COARSE_S, DIGITS_S = 1e-6, 5e-10  # a time that is a multiple of the first, by less than the second, is no fine one
INSIDE = 0.5  # of a launch's calls that have to lie within another launch: a clock may have been set back

Values = Mapping[Spot, Sequence[Hashable]]


class _Repeat(NamedTuple):
    """``num`` values of ``spot`` are those of ``like``, which may be itself."""

    spot: Spot
    like: Spot
    num: int


def _repeats(values: Values) -> Iterator[_Repeat]:
    """Where nearly all values are those of one other place, or come twice within their own."""
    holders: dict[Hashable, Counter[Spot]] = defaultdict(Counter)
    for spot, own in values.items():
        for value in own:
            holders[value][spot] += 1
    for spot, own in values.items():
        shared: dict[Spot, list[Hashable]] = defaultdict(list)
        for value in own:
            for other, times in holders[value].items():
                if other != spot or times > 1:
                    shared[other].append(value)
        enough = max(SHARE * len(own), MIN_VALUES)
        like = {other: len(same) for other, same in shared.items() if len(set(same)) >= MIN_VALUES}
        nearest = max(like, key=lambda one: like[one], default=None)
        if nearest is not None and like[nearest] >= enough:
            yield _Repeat(spot, nearest, like[nearest])


def _times(runs: Sequence[Run]) -> Iterator[_Repeat]:
    """By rounds; what has few calls a round, by all rounds of a launch."""
    by_round: dict[Spot, list[Hashable]] = defaultdict(list)
    by_launch: dict[Spot, list[Hashable]] = defaultdict(list)
    for run in runs:
        for call in run.speed:
            if _is_fine(call.wall_s):
                lane = Spot(run=run.manifest.run_id, launch=call.launch_id, cell=call.cell, replica=call.replica)
                by_round[lane._replace(round=call.round, phase=call.phase)].append(call.wall_s)
                by_launch[lane].append(call.wall_s)
    found = list(_repeats(by_round))
    lanes = {one.spot._replace(round=None, phase=None) for one in found}
    yield from found
    yield from (one for one in _repeats(by_launch) if one.spot not in lanes)


def _is_fine(wall_s: float) -> bool:
    return wall_s > 0 and abs(wall_s - round(wall_s / COARSE_S) * COARSE_S) > DIGITS_S


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
