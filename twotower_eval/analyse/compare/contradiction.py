"""Contradictions between a run's files, and rows that its own plan and events require but that are missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from twotower_eval.analyse.compare.figures import once
from twotower_eval.analyse.compare.warned import ResumedWithFewer
from twotower_eval.records import Finding, GenerationRow, Score, SpeedSample
from twotower_eval.store import EVENTS, JOURNALS, MANIFEST, OfCell, Run

ContradictionKind = Literal[
    "plan hash",
    "plan and cells",
    "cell id",
    "journal changed",
    "journal short",
    "digests missing",
    "rounds recorded",
    "seconds recorded",
    "documents recorded",
    "launch not recorded",
    "launches begun",
    "launch without calls",
    "launch without warm-up",
    "round missing",
    "rounds below plan",
    "cell without rows",
    "plan without cells",
    "calls overlap",
    "launches at once",
    "moments repeated",
    "times repeated",
    "batch size",
    "prompts of a call",
    "prompt tokens",
    "prompt tokens of arms",
    "tokens of equal hash",
    "tokens beyond budget",
    "forwards counted",
    "call and answer",
    "call without answer",
    "answer without call",
    "text of equal tokens",
    "score without answer",
    "answer without score",
    "score of another prompt",
    "score outside 0 to 1",
    "scores of equal answers",
    "score of the target",
    "scores of one likelihood",
]
Side = str | int | float | tuple[str, ...] | tuple[int, ...] | None


class Location(NamedTuple):
    """What a contradiction is about; fields that do not apply are ``None``."""

    run: str | None = None
    cell: str | None = None
    replica: int | None = None
    launch: str | None = None
    round: int | None = None
    phase: str | None = None
    call: str | None = None
    prompt: str | None = None
    task: str | None = None
    document: int | None = None
    metric: str | None = None


NOWHERE = Location()


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """What a run's files record in two ways, at the first of ``num`` places.

    ``file`` holds it in its ``line`` (of a journal) and ``field``; ``stated`` and ``found`` are the two values,
    ``None`` where the kind says all. ``other`` is the other place of a kind with two.
    """

    kind: ContradictionKind
    file: str
    line: int | None
    field: str | None
    stated: Side
    found: Side
    location: Location
    other: Location | None = None
    num: int = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place that a check found: a ``row`` of a journal, a whole ``file``, or one ``line`` of it.

    The row names its cell, round and call; ``prompt`` names one prompt of the call.
    """

    row: OfCell | None = None
    file: str = ""
    line: int | None = None
    field: str | None = None
    stated: Side = None
    found: Side = None
    location: Location = NOWHERE
    other: Location | None = None
    prompt: str | None = None


Check = Callable[[Run], Iterable[Place]]


def contradiction_of(kind: ContradictionKind, places: Sequence[Place], run: Run) -> Contradiction:
    """The first place of a check, with the number of all."""
    first = places[0]
    return Contradiction(
        kind=kind,
        file=first.file if first.row is None else JOURNALS[type(first.row)][0],
        line=first.line if first.row is None else _line(run, first.row),
        field=first.field,
        stated=first.stated,
        found=first.found,
        location=first.location if first.row is None else _location(first.row, first.prompt),
        other=first.other,
        num=len(places),
    )


def _line(run: Run, row: OfCell) -> int | None:
    """The line of a row in its journal; ``None`` for a row that is not the run's."""
    rows: Sequence[OfCell] = run.speed if isinstance(row, SpeedSample) else run.generations
    rows = run.scores if isinstance(row, Score) else rows
    return next((number for number, one in enumerate(rows, start=1) if one is row), None)


def _location(row: OfCell, prompt: str | None) -> Location:
    if isinstance(row, SpeedSample):
        return Location(cell=row.cell, launch=row.launch_id, round=row.round, call=row.call_id, prompt=prompt)
    if isinstance(row, GenerationRow):
        asked = row.generation.prompt_id
        return Location(cell=row.cell, round=row.repeat, task=row.task, document=row.doc_id, prompt=asked)
    if isinstance(row, Score):
        return Location(cell=row.cell, task=row.task, document=row.doc_id, metric=row.metric)
    return Location(cell=row.cell)


SPEED = JOURNALS[SpeedSample][0]
MEASURED = ("task", "fixed", "answer")  # kinds of workloads whose cells have rows
AFTER_ROWS = ("measured", "cell_done", "finished")  # events that come behind rows


def whole_rounds(calls: Iterable[SpeedSample]) -> list[list[SpeedSample]]:
    """Measured rounds in which every copy of every cell has each of its calls."""
    rounds: dict[tuple[str, int], list[SpeedSample]] = defaultdict(list)
    seen = set()
    for call in calls:
        if call.phase == "measure":
            seen.add((call.cell, call.replica, call.call_id))
            rounds[call.launch_id, call.round].append(call)
    return [own for own in rounds.values() if len(own) == len(seen)]


def _rounds_missing(run: Run) -> Iterator[Place]:
    """Missing rounds: rounds are numbered without gaps, over launches too, and any row of a round shows its number."""
    timed = {cell.id for cell in run.manifest.cells if cell.workload.kind == "answer"}
    taken = {call.round for call in run.speed if call.phase != "warmup"}
    taken |= {cost.round for cost in run.costs if cost.phase == "measure"}
    taken |= {row.repeat for row in run.generations if row.cell in timed}
    if run.manifest.verb == "speed" and run.speed:
        for number in range(max(taken, default=0)):
            if number not in taken:
                yield Place(file=SPEED, field="round", found=max(taken), location=Location(round=number))


def _launches_without_calls(run: Run) -> Iterator[Place]:
    """Launches recorded as complete without calls; a launch that was stopped may have none."""
    there, launch = {call.launch_id for call in run.speed}, None
    for event in run.events if run.speed else ():
        if event["kind"] in ("launched", "resumed", "failed"):
            launch = event.get("launch")
        elif event["kind"] == "measured" and launch is not None and launch not in there:
            yield Place(file=SPEED, field="launch_id", location=Location(launch=str(launch)))


def _launches_without_warmup(run: Run) -> Iterator[Place]:
    """Launches without warm-up rounds: every launch warms up before it measures."""
    if not run.manifest.plan.get("warmup_rounds") or _was_resumed(run):  # maybe without a warm-up
        return
    warm = {call.launch_id for call in run.speed if call.phase == "warmup"}
    for launch in dict.fromkeys(call.launch_id for call in run.speed if call.phase == "measure"):
        if launch not in warm:
            stated = run.manifest.plan["warmup_rounds"]
            yield Place(file=SPEED, field="phase", stated=stated, found=0, location=Location(launch=launch))


def _rounds_short(run: Run) -> tuple[int, int] | None:
    """Rounds that the plan of a complete run asks for, and its whole rounds, where these are fewer."""
    asked = run.manifest.plan.get("min_rounds")
    found = once([run], ("whole rounds",), lambda: len(whole_rounds(run.speed)))
    is_speed = run.complete and run.manifest.verb == "speed" and bool(run.speed)
    return (asked, found) if is_speed and isinstance(asked, int) and found < asked else None


def _was_resumed(run: Run) -> bool:
    """Whether another command resumed the run; later launches of one command do not count."""
    before: Mapping[str, Any] = {}
    for event in run.events:
        if event["kind"] == "resumed" and not (before.get("kind") == "measured" and before.get("num_missing")):
            return True
        before = event
    return False


def was_cut_short(run: Run) -> bool:
    """Whether another command ended a run with fewer rounds than it was started with."""
    return _rounds_short(run) is not None and _was_resumed(run)


def _rounds_below_plan(run: Run) -> Iterator[Place]:
    if (short := _rounds_short(run)) and not _was_resumed(run):
        yield Place(file=SPEED, field="min_rounds", stated=short[0], found=short[1])


def _cells_without_rows(run: Run) -> Iterator[Place]:
    """Cells of a complete run without any score or timed call."""
    journals = (run.speed, run.generations, run.likelihoods, run.scores, run.aggregates)
    there = {row.cell for rows in journals for row in rows}
    for cell in run.manifest.cells if run.complete and there else ():
        if cell.workload.kind in MEASURED and cell.id not in there:
            yield Place(file=MANIFEST, field="cells", location=Location(cell=cell.id))


def _block_sizes_without_cells(run: Run) -> Iterator[Place]:
    """Block sizes and batch sizes of a sweep's plan without cells."""
    candidates = [
        cell for cell in run.manifest.cells if cell.arm == "candidate" and cell.workload.kind in ("fixed", "answer")
    ]
    blocks = {cell.decoder.params.get("block_size") for cell in candidates} - {None}
    batches = {cell.workload.batch_size for cell in candidates} - {None}
    further = run.manifest.plan.get("set") or {}  # says of a parameter what its own field leaves at its default
    for field, found in (("block_sizes", blocks), ("batch_sizes", batches)):
        planned = further.get("block_size") if field == "block_sizes" and "block_size" in further else None
        planned = run.manifest.plan.get(field) if planned is None else planned
        missing = [size for size in planned if size not in found] if isinstance(planned, list) and found else []
        if missing:
            yield Place(file=MANIFEST, field=field, stated=tuple(map(str, missing)), found=tuple(map(str, found)))


def tells_digests(run: Run) -> bool:
    """Whether a run's version records the journals' line counts and sha256 in its events.

    Such versions record more in other places, too.
    """
    return once([run], ("tells digests",), lambda: _tells_digests(run))


def _tells_digests(run: Run) -> bool:
    later = any(cell.extra is not None for cell in run.manifest.cells)
    later |= any(event["kind"] in ("launched", "finished") or event.get("files") for event in run.events)
    return later or any(call.passes or call.cpu_s is not None for call in run.speed)


def _digests_missing(run: Run) -> Iterator[Place]:
    """Events without the journals' digests, or that drop a journal which earlier events had."""
    told: set[str] = set()
    rows: Sequence[object] = [*run.speed, *run.costs] if run.manifest.verb == "speed" else [*run.scores]
    for number, event in enumerate(run.events if tells_digests(run) else (), start=1):
        files = set(event.get("files", {}))
        gone = sorted(told - files)
        if gone or (rows and not files and event["kind"] in AFTER_ROWS):
            yield Place(file=EVENTS, line=number, field="files", found=gone[0] if gone else None)
        told |= files


def remarks(runs: Sequence[Run]) -> list[Finding]:
    """Missing rows that a run may lack for a valid reason."""
    found = []
    for run in runs:
        if (short := _rounds_short(run)) and _was_resumed(run):
            asked, there = short
            fewer = ResumedWithFewer(run_id=run.manifest.run_id, num_asked=asked, num_whole=there)
            found.append(Finding(kind="resumed_with_fewer", severity="note", facts=fewer))
    return found


GAP_CHECKS: Mapping[ContradictionKind, Check] = {
    "round missing": _rounds_missing,
    "launch without calls": _launches_without_calls,
    "launch without warm-up": _launches_without_warmup,
    "rounds below plan": _rounds_below_plan,
    "cell without rows": _cells_without_rows,
    "plan without cells": _block_sizes_without_cells,
    "digests missing": _digests_missing,
}
