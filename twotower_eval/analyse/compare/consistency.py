"""Do a run's files agree? A run that contradicts itself, or repeats another run's rows, is no evidence."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise, permutations, product
from math import gcd, pi, sqrt
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

from twotower_eval.analyse.compare.consistent_rows import ROW_CHECKS
from twotower_eval.analyse.compare.contradiction import (
    GAP_CHECKS,
    Check,
    Contradiction,
    ContradictionKind,
    Location,
    Place,
    contradiction_of,
    whole_rounds,
)
from twotower_eval.analyse.compare.figures import forgotten
from twotower_eval.records import (
    Cell,
    LikelihoodKind,
    Params,
    Score,
    SpeedSample,
    canonical_json,
    cell_id,
    cell_identity,
    digest_of_identity,
    run_and_launch,
    sha256_text,
)
from twotower_eval.rules import clocked_s
from twotower_eval.store import EVENTS, JOURNALS, MANIFEST, Run
from twotower_eval.store.journal import changed_journals, short_journals

Floats = NDArray[np.float64]
SHARE = 0.8  # of timings that have to be those of one other round or launch
MIN_VALUES = 5  # different ones: fewer may be alike by chance
DIGIT_S = 1e-9  # times are compared by whole nanoseconds: what clocks show, less what floats add
LONGEST_S = 1e9  # nothing is timed for thirty years: a longer time is compared as this one
STEADY = 1e-4  # of its seconds: no call repeats itself more closely
BESIDE = 1.5  # ticks to either side: more than one, as nanoseconds round it
BY_CHANCE = 1e-9  # chance of so many equal times from which on they are copied: a file has many pairs of rounds
INSIDE = 0.5  # of a launch's calls that have to lie within another launch: a clock may have been set back

Values = Mapping[Location, Sequence[Hashable]]
Doubt = Callable[["_Repeat"], bool]  # whether values may be equal by chance


class _Repeat(NamedTuple):
    """``num`` values of ``location`` are those of ``other``, which may be itself."""

    location: Location
    other: Location
    num: int


def _repeats(values: Values, doubt: Doubt = lambda _: False) -> Iterator[_Repeat]:
    """Places nearly all of whose values are also those of one other place, or occur twice in their own."""
    held: dict[Hashable, list[Location]] = defaultdict(list)
    for location, own in values.items():
        for value in own:
            held[value].append(location)
    holders = {
        value: Counter(locations) for value, locations in held.items() if len(locations) > 1
    }  # few are anywhere else
    for location, own in values.items():
        shared: dict[Location, list[Hashable]] = defaultdict(list)
        for value in own:
            for other, times in holders[value].items() if value in holders else ():
                if other != location or times > 1:
                    shared[other].append(value)
        enough = max(SHARE * len(own), MIN_VALUES)
        repeats = [
            _Repeat(location, other, len(same)) for other, same in shared.items() if len(set(same)) >= MIN_VALUES
        ]
        nearest = sorted((one for one in repeats if one.num >= enough), key=lambda one: -one.num)
        yield from [one for one in nearest if not doubt(one)][:1]


def _times(runs: Sequence[Run]) -> Iterator[_Repeat]:
    """Repeated times, by round; for cells with few calls a round, by launch."""
    by_round: dict[Location, list[int]] = {}
    by_launch: dict[Location, list[int]] = {}
    ticks: dict[str | None, int] = {}
    for run in runs:
        rounds: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
        for call in run.speed:
            if (time_ns := round(min(call.wall_s, LONGEST_S) / DIGIT_S)) > 0:
                key = (call.launch_id, call.cell, call.replica, call.round, call.phase)
                if key not in rounds:
                    lane = Location(
                        run=run.manifest.run_id, launch=call.launch_id, cell=call.cell, replica=call.replica
                    )
                    of_round = by_round.setdefault(lane._replace(round=call.round, phase=call.phase), [])
                    rounds[key] = of_round, by_launch.setdefault(lane, [])
                for own in rounds[key]:
                    own.append(time_ns)
                ticks[run.manifest.run_id] = gcd(ticks.get(run.manifest.run_id, 0), time_ns)
    found = list(_repeats(by_round, _doubt(by_round, ticks)))
    lanes = {one.location._replace(round=None, phase=None) for one in found}
    yield from found
    yield from (one for one in _repeats(by_launch, _doubt(by_launch, ticks)) if one.location not in lanes)


def _doubt(times_ns: Mapping[Location, Sequence[int]], ticks: Mapping[str | None, int]) -> Doubt:
    def may_be_chance(one: _Repeat) -> bool:
        own_ns, other_ns = np.asarray(times_ns[one.location], float), np.asarray(times_ns[one.other], float)
        steady = float(np.minimum(1, ticks[one.location.run] / (sqrt(4 * pi) * STEADY * own_ns)).mean())
        share = max(steady, _share_beside(own_ns, other_ns, ticks[one.location.run]))
        return bool(share >= 1 or bdtrc(one.num - 1, len(own_ns), share) > BY_CHANCE)

    return may_be_chance


def _share_beside(own_ns: Floats, other_ns: Floats, tick_ns: int) -> float:
    """Share of times with another time just above or below, within the shortest step between two of them.

    The two times with that step are left out. If the step is longer than the clock's tick and than the variation of a
    steady call, times lie far apart and the share is 0.
    """
    there_ns = np.unique(other_ns)
    step_ns = float(np.diff(np.unique(np.concatenate([own_ns, there_ns]))).min())
    near_ns = BESIDE * np.minimum(step_ns, np.maximum(tick_ns, STEADY * own_ns))
    here = np.searchsorted(there_ns, own_ns, "left"), np.searchsorted(there_ns, own_ns, "right")
    num_below = here[0] - np.searchsorted(there_ns, own_ns - near_ns, "left")
    num_above = np.searchsorted(there_ns, own_ns + near_ns, "right") - here[1]
    return max(0, int((num_below + num_above > 0).sum()) - 2) / len(own_ns)


def _moments(runs: Sequence[Run]) -> Iterator[_Repeat]:
    """Repeated moments of calls, by launch. One moment a call is enough, as short calls share a tick of the clock."""
    values: dict[Location, dict[str, Hashable]] = defaultdict(dict)
    for run in runs:
        for call in run.speed:
            key = (call.cell, call.replica, call.call_id, call.started_at)
            values[Location(run=run.manifest.run_id, launch=call.launch_id)].setdefault(call.started_at, key)
    yield from _repeats({location: list(by_moment.values()) for location, by_moment in values.items()})


def _place(one: _Repeat, field: str) -> Place:
    return Place(file=SPEED, field=field, stated=one.num, location=one.location, other=one.other)


def _times_within(run: Run) -> Iterator[Place]:
    return (_place(one, "wall_s") for one in _times([run]))


def _moments_within(run: Run) -> Iterator[Place]:
    return (_place(one, "started_at") for one in _moments([run]))


def _launches_at_once(run: Run) -> Iterator[Place]:
    """Launches of a run that overlap in time. Launches without the moments of their calls are left out."""
    moments: dict[str, list[datetime]] = defaultdict(list)
    for call in run.speed:
        if (moment := moment_of(call.started_at)) is not None:
            moments[call.launch_id].append(moment)
    telling = {launch: sorted(found) for launch, found in moments.items() if len(set(found)) >= MIN_VALUES}
    for (launch, own), (other, theirs) in permutations(telling.items(), 2):
        inside = sum(theirs[0] <= moment <= theirs[-1] for moment in own)
        if inside > INSIDE * len(own):
            location, there = (Location(run=run.manifest.run_id, launch=one) for one in (launch, other))
            yield Place(file=SPEED, field="started_at", stated=inside, location=location, other=there)


def moment_of(text: str) -> datetime | None:
    """A moment as rows write it; ``None`` for a text that is none."""
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
    """By run id, timings that equal those of another of these runs."""
    by_id = {run.manifest.run_id: run for run in runs if run.speed}
    timed = list(by_id.values())
    places: dict[tuple[str, ContradictionKind], list[Place]] = defaultdict(list)
    kinds: tuple[tuple[ContradictionKind, str, Iterable[_Repeat]], ...] = (
        ("times repeated", "wall_s", _times(timed)),
        ("moments repeated", "started_at", _moments(timed)),
    )
    for kind, field, found in kinds if len(timed) > 1 else ():
        for one in found:
            if one.location.run is not None and one.location.run != one.other.run:
                places[one.location.run, kind].append(_place(one, field))
    by_run: dict[str, list[Contradiction]] = defaultdict(list)
    for (run_id, kind), own in places.items():
        by_run[run_id].append(contradiction_of(kind, own, by_id[run_id]))
    return dict(by_run)


SPEED, SCORES = JOURNALS[SpeedSample][0], JOURNALS[Score][0]
TOLERANCE = 1e-6  # relative: sums of the same numbers in another order
CLOCK_S = 0.002  # moments are written in milliseconds, cut off
OVERLAP_SHARE = 0.01  # of a launch's calls, or of their time, above which no clock that was set explains it
CLOCK_SHARE = 0.001  # and the day's clock may be slewed while a stopwatch is not


def contradictions(run: Run) -> tuple[Contradiction, ...]:
    """All contradictions between a run's files, the first place of each kind; empty where they agree."""
    found = []
    with forgotten(run):
        for kind, check in {**CHECKS, **GAP_CHECKS, **REPEAT_CHECKS, **ROW_CHECKS}.items():
            places = list(check(run))
            if places:
                found.append(contradiction_of(kind, places, run))
    return tuple(found)


def _plan_hash(run: Run) -> Iterator[Place]:
    found = sha256_text(canonical_json(run.manifest.plan))
    if found != run.manifest.plan_sha256:
        yield Place(file=MANIFEST, field="plan_sha256", stated=run.manifest.plan_sha256, found=found)


def _plan_and_cells(run: Run) -> Iterator[Place]:
    """Settings that a plan and its cells both record."""
    plan = run.manifest.plan
    cells = [cell for cell in run.manifest.cells if cell.workload.kind in ("task", "fixed", "answer")]
    of_several = [table.get("dtype") for table in plan.get("baselines") or ()]
    recorded: list[tuple[str, set[Any], set[Any]]] = [
        ("workload", {plan.get("workload")}, {cell.workload.kind for cell in cells} - {"task"}),
        ("batch sizes", set(plan.get("batch_sizes") or ()), {cell.workload.batch_size for cell in cells} - {None}),
        (
            "dtype",
            {plan.get("dtype"), plan.get("baseline_dtype"), *of_several},
            {cell.checkpoint.dtype for cell in cells if not cell.checkpoint.served},
        ),
    ]
    for name, planned, there in recorded:
        planned = planned - {None}
        if planned and "auto" not in planned and there and not there <= planned:
            plan_says, cells_say = (tuple(sorted(map(str, values))) for values in (planned, there))
            yield Place(file=MANIFEST, field=name, stated=plan_says, found=cells_say)


def _cell_ids(run: Run) -> Iterator[Place]:
    """Cells whose id does not follow from their settings; in older runs, those that do not fit the run's other ids."""
    strict = [cell for cell in run.manifest.cells if cell.extra is not None]
    older = [cell for cell in run.manifest.cells if cell.extra is None]
    shapes = list(_older_extras(run)) if older else []
    misfits = [cell for cell in older if not any(map(cell.id.__eq__, _ids_with(cell, shapes)))]
    wrong = [cell for cell in strict if _id_with(cell, cell.extra or {}) != cell.id]
    wrong += misfits if len(misfits) < len(older) or strict else []
    for cell in wrong:
        made = _id_with(cell, cell.extra or {})
        yield Place(file=MANIFEST, field="id", stated=cell.id, found=made, location=Location(cell=cell.id))


def _id_with(cell: Cell, extra: Params) -> str:
    return cell_id(cell.checkpoint, cell.decoder, cell.workload, extra)


def _ids_with(cell: Cell, extras: Sequence[Params]) -> Iterator[str]:
    identity = cell_identity(cell.checkpoint, cell.decoder, cell.workload)
    return (digest_of_identity(identity, extra) for extra in extras)


def _older_extras(run: Run) -> Iterator[Params]:
    """What older versions added to cell ids without recording it."""
    plan = run.manifest.plan
    seed = plan.get("seed")
    seeds = dict.fromkeys((None, run.manifest.seeds.get("run") if isinstance(seed, list) else seed))
    yield {}
    yield from ({"seed": seed} for seed in seeds)
    samples = dict.fromkeys((1, plan.get("samples"), *range(2, 65)))
    flags: list[Params] = [{}, {"pools_samples": True}, {"cuda_graphs": True}]
    flags.append({"pools_samples": True, "cuda_graphs": True})
    for seed, kind, num, more in product(seeds, (None, *get_args(LikelihoodKind)), samples, flags):
        yield {"seed": seed, "likelihood": kind, "samples": num, **more}


def _changed(run: Run) -> Iterator[Place]:
    for name, rows in changed_journals(run.path, run.events, EVENTS).items():
        yield Place(file=name, line=rows, field="sha256")


def _short(run: Run) -> Iterator[Place]:
    """Journals with fewer lines than recorded, in complete runs: an open run may have lost lines to a crash."""
    if run.complete:
        for name, (recorded, there) in short_journals(run.path, run.events, EVENTS).items():
            yield Place(file=name, field="rows", stated=recorded, found=there)


@dataclass(frozen=True, kw_only=True)
class _MeasuredEvent:
    """What one ``measured`` event tells, and the calls that were there by then."""

    num_rounds: int
    timed_s: float
    launch: str | None
    calls: list[SpeedSample]


def _measured(run: Run) -> Iterator[_MeasuredEvent]:
    """The ``measured`` events; none for runs that time only parts of decoding."""
    launch = None
    for event in run.events if run.speed else ():
        if event["kind"] == "launched":
            launch = event.get("launch")
        if event["kind"] != "measured" or not isinstance(event.get("timed_s"), (int, float)):
            continue
        known = event.get("files", {}).get("speed.jsonl", {}).get("rows")
        rows = run.speed if known is None else run.speed[:known]
        if known is None and event is not run.events[-1] and not run.complete:
            continue
        calls = [sample for sample in rows if sample.phase == "measure"]
        yield _MeasuredEvent(num_rounds=event["num_rounds"], timed_s=event["timed_s"], launch=launch, calls=calls)


def _whole_s(calls: Iterable[SpeedSample]) -> list[float]:
    """Seconds of every complete round."""
    return [clocked_s(own) for own in whole_rounds(calls)]


def _readings(event: _MeasuredEvent) -> list[list[float]]:
    """Seconds of each complete round, of all launches so far and of the event's own: an event may count either."""
    own = [call for call in event.calls if call.launch_id == event.launch]
    return [_whole_s(event.calls), *([_whole_s(own)] if own else [])]


def _rounds_recorded(run: Run) -> Iterator[Place]:
    for event in _measured(run):
        found = [len(whole) for whole in _readings(event)]
        if event.num_rounds not in found:
            yield Place(file=SPEED, field="num_rounds", stated=event.num_rounds, found=tuple(dict.fromkeys(found)))


def _seconds_recorded(run: Run) -> Iterator[Place]:
    for event in _measured(run):
        found = [sum(whole) for whole in _readings(event) if len(whole) == event.num_rounds]
        if found and not any(math.isclose(event.timed_s, one, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for one in found):
            yield Place(file=SPEED, field="timed_s", stated=float(event.timed_s), found=found[0])


def _documents_recorded(run: Run) -> Iterator[Place]:
    """The newest event of each cell and task against its scores; aggregate scores are left out."""
    recorded = {
        (event["cell"], event["task"]): event["num_documents"]
        for event in run.events
        if event["kind"] == "cell_done" and {"cell", "task", "num_documents"} <= event.keys()
    }
    scored: dict[tuple[str, str], set[int]] = defaultdict(set)
    for score in run.scores:
        if score.aggregation in (None, "mean"):
            scored[score.cell, score.task].add(score.doc_id)
    for (cell, task), num in recorded.items():
        found = len(scored[cell, task])
        if found and found != num:
            location = Location(cell=cell, task=task)
            yield Place(file=SCORES, field="num_documents", stated=num, found=found, location=location)


def _launches(run: Run) -> Iterator[Place]:
    """Launches in speed.jsonl that no event names; their ids begin with their run's id."""
    launches = list(dict.fromkeys(sample.launch_id for sample in run.speed))
    own = [name for name in launches if name.startswith(f"{run.manifest.run_id}/")]
    if not own:
        return
    recorded = {str(event.get("launch")) for event in run.events if event["kind"] == "launched"}
    odd = [name for name in launches if name not in (recorded or own)]
    if odd:
        yield Place(file=SPEED, field="launch_id", stated=tuple(sorted(recorded)), found=odd[0])


def _launches_begun(run: Run) -> Iterator[Place]:
    """In older versions, without events of launches: launches against the number of starts and resumes."""
    own = {call.launch_id for call in run.speed if run_and_launch(call.launch_id)[0] == run.manifest.run_id}
    recorded = any(event["kind"] == "launched" for event in run.events)
    begun = sum(event["kind"] in ("started", "resumed") for event in run.events)
    if not recorded and len(own) > begun:
        yield Place(file=SPEED, field="launch_id", stated=begun, found=len(own))


def _overlaps(run: Run) -> Iterator[Place]:
    """Calls that overlap within a launch, which times one call after the other. Calls without moments are left out."""
    by_launch: dict[str, list[SpeedSample]] = defaultdict(list)
    for sample in run.speed:
        if sample.due_s is None:  # requests of one stream overlap
            by_launch[sample.launch_id].append(sample)
    for calls in by_launch.values():
        found = list(_overlaps_of(calls))
        beyond_s = sum(call.wall_s - gap_s for call, gap_s in found)
        timed_s = sum(call.wall_s for call in calls)
        # The day's clock is set back now and then, which makes one call seem to overlap the next.
        if len(found) > 1 and max(len(found) / len(calls), beyond_s / timed_s) > OVERLAP_SHARE:
            yield from (Place(row=call, field="wall_s", stated=call.wall_s, found=gap_s) for call, gap_s in found)


def _overlaps_of(calls: Sequence[SpeedSample]) -> Iterator[tuple[SpeedSample, float]]:
    """The calls that took longer than the time until the next one began, with that time in seconds."""
    moments = [moment_of(call.started_at) for call in calls]
    if None in moments or len(set(moments)) < 2:
        return
    for (call, began), (_, next_began) in pairwise(zip(calls, moments, strict=True)):
        gap_s = (next_began - began).total_seconds()  # type: ignore[operator]
        # Before the one ahead of it: the day's clock was set.
        if gap_s >= 0 and call.wall_s > gap_s + CLOCK_S + CLOCK_SHARE * call.wall_s:
            yield call, gap_s


CHECKS: Mapping[ContradictionKind, Check] = {
    "plan hash": _plan_hash,
    "plan and cells": _plan_and_cells,
    "cell id": _cell_ids,
    "journal changed": _changed,
    "journal short": _short,
    "rounds recorded": _rounds_recorded,
    "seconds recorded": _seconds_recorded,
    "documents recorded": _documents_recorded,
    "launch not recorded": _launches,
    "launches begun": _launches_begun,
    "calls overlap": _overlaps,
}


def by_run(runs: Sequence[Run]) -> dict[str, tuple[Contradiction, ...]]:
    """By run id, the contradictions within a run and with the other runs; runs without any are left out."""
    copied = between_runs(runs)
    found = {(run_id := run.manifest.run_id): (*contradictions(run), *copied.get(run_id, ())) for run in runs}
    return {run_id: own for run_id, own in found.items() if own}
