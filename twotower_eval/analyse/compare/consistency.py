"""Do a run's files agree with each other? What contradicts itself, or repeats another run's rows, is no evidence,
whoever changed it and why.
"""

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
    Place,
    Spot,
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


SPEED, SCORES = JOURNALS[SpeedSample][0], JOURNALS[Score][0]
TOLERANCE = 1e-6  # relative: sums of the same numbers in another order
CLOCK_S = 0.002  # moments are written in milliseconds, cut off
OVERLAP_SHARE = 0.01  # of a launch's calls, or of their time, above which no clock that was set explains it
CLOCK_SHARE = 0.001  # and the day's clock may be slewed while a stopwatch is not


def contradictions(run: Run) -> tuple[Contradiction, ...]:
    """All that a run's files contradict each other in, the first place of each kind; empty where they agree."""
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
    """What a plan and its cells both say in so many words."""
    plan = run.manifest.plan
    cells = [cell for cell in run.manifest.cells if cell.workload.kind in ("task", "fixed", "answer")]
    said: list[tuple[str, set[Any], set[Any]]] = [
        ("workload", {plan.get("workload")}, {cell.workload.kind for cell in cells} - {"task"}),
        ("batch sizes", set(plan.get("batch_sizes") or ()), {cell.workload.batch_size for cell in cells} - {None}),
        ("dtype", {plan.get("dtype")}, {cell.checkpoint.dtype for cell in cells}),
    ]
    for name, planned, there in said:
        if planned - {None} and there and not there <= planned:
            plan_says, cells_say = (tuple(sorted(map(str, values))) for values in (planned, there))
            yield Place(file=MANIFEST, field=name, stated=plan_says, found=cells_say)


def _cell_ids(run: Run) -> Iterator[Place]:
    """Cells that say what else is in their id; of the others, those that differ from what their run's other ids fit."""
    strict = [cell for cell in run.manifest.cells if cell.extra is not None]
    older = [cell for cell in run.manifest.cells if cell.extra is None]
    shapes = list(_older_extras(run)) if older else []
    misfits = [cell for cell in older if not any(map(cell.id.__eq__, _ids_with(cell, shapes)))]
    wrong = [cell for cell in strict if _id_with(cell, cell.extra or {}) != cell.id]
    wrong += misfits if len(misfits) < len(older) or strict else []
    for cell in wrong:
        made = _id_with(cell, cell.extra or {})
        yield Place(file=MANIFEST, field="id", stated=cell.id, found=made, spot=Spot(cell=cell.id))


def _id_with(cell: Cell, extra: Params) -> str:
    return cell_id(cell.checkpoint, cell.decoder, cell.workload, extra)


def _ids_with(cell: Cell, extras: Sequence[Params]) -> Iterator[str]:
    identity = cell_identity(cell.checkpoint, cell.decoder, cell.workload)
    return (digest_of_identity(identity, extra) for extra in extras)


def _older_extras(run: Run) -> Iterator[Params]:
    """What went into ids before cells said it."""
    plan = run.manifest.plan
    seeds = dict.fromkeys((None, plan.get("seed")))
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
    """Of a run that went to its end: one that is still written may have lost lines to a crash, and makes them again."""
    if run.complete:
        for name, (told, there) in short_journals(run.path, run.events, EVENTS).items():
            yield Place(file=name, field="rows", stated=told, found=there)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What one ``measured`` event tells, and the calls that were there by then."""

    num_rounds: int
    timed_s: float
    launch: str | None
    calls: list[SpeedSample]


def _measured(run: Run) -> Iterator[_Told]:
    """None of runs that time parts of decoding alone: their rounds are of those."""
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
        yield _Told(num_rounds=event["num_rounds"], timed_s=event["timed_s"], launch=launch, calls=calls)


def _whole_s(calls: Iterable[SpeedSample]) -> list[float]:
    """Seconds of every complete round."""
    return [sum(call.wall_s for call in own if call.wall_s > 0) for own in whole_rounds(calls)]


def _readings(told: _Told) -> list[list[float]]:
    """An event tells of all launches so far, or of its own."""
    own = [call for call in told.calls if call.launch_id == told.launch]
    return [_whole_s(told.calls), *([_whole_s(own)] if own else [])]


def _rounds_told(run: Run) -> Iterator[Place]:
    for told in _measured(run):
        found = [len(whole) for whole in _readings(told)]
        if told.num_rounds not in found:
            yield Place(file=SPEED, field="num_rounds", stated=told.num_rounds, found=tuple(dict.fromkeys(found)))


def _seconds_told(run: Run) -> Iterator[Place]:
    for told in _measured(run):
        found = [sum(whole) for whole in _readings(told) if len(whole) == told.num_rounds]
        if found and not any(math.isclose(told.timed_s, one, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for one in found):
            yield Place(file=SPEED, field="timed_s", stated=float(told.timed_s), found=found[0])


def _documents_told(run: Run) -> Iterator[Place]:
    """The newest word on each cell; scores that all documents have, not those of all of them together."""
    told = {
        (event["cell"], event["task"]): event["num_documents"]
        for event in run.events
        if event["kind"] == "cell_done" and {"cell", "task", "num_documents"} <= event.keys()
    }
    scored: dict[tuple[str, str], set[int]] = defaultdict(set)
    for score in run.scores:
        if score.aggregation in (None, "mean"):
            scored[score.cell, score.task].add(score.doc_id)
    for (cell, task), num in told.items():
        found = len(scored[cell, task])
        if found and found != num:
            spot = Spot(cell=cell, task=task)
            yield Place(file=SCORES, field="num_documents", stated=num, found=found, spot=spot)


def _launches(run: Run) -> Iterator[Place]:
    """Launches are named after their run; each is told, or began when the run was begun or resumed."""
    launches = list(dict.fromkeys(sample.launch_id for sample in run.speed))
    own = [name for name in launches if name.startswith(f"{run.manifest.run_id}/")]
    if not own:
        return
    told = {str(event.get("launch")) for event in run.events if event["kind"] == "launched"}
    odd = [name for name in launches if name not in (told or own)]
    if odd:
        yield Place(file=SPEED, field="launch_id", stated=tuple(sorted(told)), found=odd[0])


def _launches_begun(run: Run) -> Iterator[Place]:
    """Versions that do not tell of launches tell how often a run was begun or resumed."""
    own = {call.launch_id for call in run.speed if run_and_launch(call.launch_id)[0] == run.manifest.run_id}
    told = any(event["kind"] == "launched" for event in run.events)
    begun = sum(event["kind"] in ("started", "resumed") for event in run.events)
    if not told and len(own) > begun:
        yield Place(file=SPEED, field="launch_id", stated=begun, found=len(own))


def _overlaps(run: Run) -> Iterator[Place]:
    """One process times one call after the other. Launches without the moments of their calls are left out."""
    by_launch: dict[str, list[SpeedSample]] = defaultdict(list)
    for sample in run.speed:
        by_launch[sample.launch_id].append(sample)
    for calls in by_launch.values():
        found = list(_overlaps_of(calls))
        beyond_s = sum(call.wall_s - gap_s for call, gap_s in found)
        timed_s = sum(call.wall_s for call in calls)
        # The day's clock is set back now and then, which makes one call seem to overlap the next.
        if len(found) > 1 and max(len(found) / len(calls), beyond_s / timed_s) > OVERLAP_SHARE:
            yield from (Place(row=call, field="wall_s", stated=call.wall_s, found=gap_s) for call, gap_s in found)


def _overlaps_of(calls: Sequence[SpeedSample]) -> Iterator[tuple[SpeedSample, float]]:
    """The calls that took longer than until the next one began, with the seconds until then."""
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
    "rounds told": _rounds_told,
    "seconds told": _seconds_told,
    "documents told": _documents_told,
    "launch untold": _launches,
    "launches begun": _launches_begun,
    "calls overlap": _overlaps,
}


def by_run(runs: Sequence[Run]) -> dict[str, tuple[Contradiction, ...]]:
    """Run id -> its contradictions, in itself and with the others, for runs that have any."""
    copied = between_runs(runs)
    found = {(run_id := run.manifest.run_id): (*contradictions(run), *copied.get(run_id, ())) for run in runs}
    return {run_id: own for run_id, own in found.items() if own}
