"""Do a run's files agree with each other? What contradicts itself is no evidence, whoever changed it and why.

Everything here follows from the files alone: the plan from its hash, cells from their ids, journals from what events
tell of them, sums from the rows that they are sums of, answers from the calls that made them, scores from answers. What
a run does not record, as those of old do not, is not looked at. Nobody is caught who forges every file alike; edits,
mix-ups and copies that went wrong are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, get_args

from twotower_eval.analyse.compare.consistent_rows import ROW_CHECKS
from twotower_eval.analyse.compare.contradiction import (
    Check,
    Contradiction,
    ContradictionKind,
    Place,
    Spot,
    contradiction_of,
)
from twotower_eval.analyse.compare.gaps import GAP_CHECKS, whole_rounds
from twotower_eval.analyse.compare.once import forgotten
from twotower_eval.analyse.compare.repeats import REPEAT_CHECKS, between_runs, moment_of
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
    sha256_text,
)
from twotower_eval.store import EVENTS, JOURNALS, MANIFEST, Run
from twotower_eval.store.publish import changed_journals, short_journals

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
    own = {call.launch_id for call in run.speed if call.launch_id.startswith(f"{run.manifest.run_id}/")}
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
