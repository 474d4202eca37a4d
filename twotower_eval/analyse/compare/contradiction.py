"""What a run's files say in two ways, and what they lack by the run's own plan and events: kinds as facts, and the
words for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from twotower_eval.analyse.compare.figures import once
from twotower_eval.analyse.compare.warned import ResumedWithFewer
from twotower_eval.records import Finding, GenerationRow, Score, SpeedSample
from twotower_eval.store import EVENTS, JOURNALS, MANIFEST, Row, Run

ContradictionKind = Literal[
    "plan hash",
    "plan and cells",
    "cell id",
    "journal changed",
    "journal short",
    "digests missing",
    "rounds told",
    "seconds told",
    "documents told",
    "launch untold",
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


class Spot(NamedTuple):
    """What a contradiction is about, as far as it is about one of these."""

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


NOWHERE = Spot()


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """What a run's files say in two ways, at the first of ``num`` places.

    ``file`` says it in its ``line``, where it is one of a journal, and there in its ``field``; ``stated`` is what one
    side says and ``found`` what the other does, each ``None`` where the kind says it all. ``like`` is the other place
    of a kind that is about two.
    """

    kind: ContradictionKind
    file: str
    line: int | None
    field: str | None
    stated: Side
    found: Side
    spot: Spot
    like: Spot | None = None
    num: int = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place that a check found: in a ``row`` of a journal, or in a ``file`` as a whole or in one ``line`` of it.

    What a row is about is told by the row, except for ``prompt``: one of a call's.
    """

    row: Row | None = None
    file: str = ""
    line: int | None = None
    field: str | None = None
    stated: Side = None
    found: Side = None
    spot: Spot = NOWHERE
    like: Spot | None = None
    prompt: str | None = None


Check = Callable[[Run], Iterable[Place]]


def contradiction_of(kind: ContradictionKind, places: Sequence[Place], run: Run) -> Contradiction:
    """The first place, with the number of all."""
    first = places[0]
    return Contradiction(
        kind=kind,
        file=first.file if first.row is None else JOURNALS[type(first.row)][0],
        line=first.line if first.row is None else _line(run, first.row),
        field=first.field,
        stated=first.stated,
        found=first.found,
        spot=first.spot if first.row is None else _spot(first.row, first.prompt),
        like=first.like,
        num=len(places),
    )


def _line(run: Run, row: Row) -> int | None:
    """Every row is a line of its own; ``None`` for one that is not the run's."""
    rows: Sequence[Row] = run.speed if isinstance(row, SpeedSample) else run.generations
    rows = run.scores if isinstance(row, Score) else rows
    return next((number for number, one in enumerate(rows, start=1) if one is row), None)


def _spot(row: Row, prompt: str | None) -> Spot:
    if isinstance(row, SpeedSample):
        return Spot(cell=row.cell, launch=row.launch_id, round=row.round, call=row.call_id, prompt=prompt)
    if isinstance(row, GenerationRow):
        asked = row.generation.prompt_id
        return Spot(cell=row.cell, round=row.repeat, task=row.task, document=row.doc_id, prompt=asked)
    if isinstance(row, Score):
        return Spot(cell=row.cell, task=row.task, document=row.doc_id, metric=row.metric)
    return Spot(cell=row.cell)


SPEED = JOURNALS[SpeedSample][0]
MEASURED = ("task", "fixed", "answer")  # kinds of workloads whose cells have rows
AFTER_ROWS = ("measured", "cell_done", "finished")  # events that come behind rows


def whole_rounds(calls: Iterable[SpeedSample]) -> list[list[SpeedSample]]:
    """Measured rounds in which every copy of every cell has every call that it has in any round."""
    rounds: dict[tuple[str, int], list[SpeedSample]] = defaultdict(list)
    seen = set()
    for call in calls:
        if call.phase == "measure":
            seen.add((call.cell, call.replica, call.call_id))
            rounds[call.launch_id, call.round].append(call)
    return [own for own in rounds.values() if len(own) == len(seen)]


def _rounds_missing(run: Run) -> Iterator[Place]:
    """Rounds are numbered on end, over launches as well; any row of one shows that its number was taken."""
    timed = {cell.id for cell in run.manifest.cells if cell.workload.kind == "answer"}
    taken = {call.round for call in run.speed if call.phase != "warmup"}
    taken |= {cost.round for cost in run.costs if cost.phase == "measure"}
    taken |= {row.repeat for row in run.generations if row.cell in timed}
    if run.manifest.verb == "speed" and run.speed:
        for number in range(max(taken, default=0)):
            if number not in taken:
                yield Place(file=SPEED, field="round", found=max(taken), spot=Spot(round=number))


def _launches_without_calls(run: Run) -> Iterator[Place]:
    """A launch that measured to its end has calls; one that was stopped may have none."""
    there, launch = {call.launch_id for call in run.speed}, None
    for event in run.events if run.speed else ():
        if event["kind"] in ("launched", "resumed", "failed"):
            launch = event.get("launch")
        elif event["kind"] == "measured" and launch is not None and launch not in there:
            yield Place(file=SPEED, field="launch_id", spot=Spot(launch=str(launch)))


def _launches_without_warmup(run: Run) -> Iterator[Place]:
    """Each warms up before it measures, so one that never did is a part of another."""
    if not run.manifest.plan.get("warmup_rounds") or _was_resumed(run):  # maybe without a warm-up
        return
    warm = {call.launch_id for call in run.speed if call.phase == "warmup"}
    for launch in dict.fromkeys(call.launch_id for call in run.speed if call.phase == "measure"):
        if launch not in warm:
            stated = run.manifest.plan["warmup_rounds"]
            yield Place(file=SPEED, field="phase", stated=stated, found=0, spot=Spot(launch=launch))


def _rounds_short(run: Run) -> tuple[int, int] | None:
    """Rounds that the plan asks for and whole ones that are there, where a complete run has too few."""
    asked = run.manifest.plan.get("min_rounds")
    found = once([run], ("whole rounds",), lambda: len(whole_rounds(run.speed)))
    is_speed = run.complete and run.manifest.verb == "speed" and bool(run.speed)
    return (asked, found) if is_speed and isinstance(asked, int) and found < asked else None


def _was_resumed(run: Run) -> bool:
    """By another command. The later launches of one command resume the run as well, and do not count."""
    before: Mapping[str, Any] = {}
    for event in run.events:
        if event["kind"] == "resumed" and not (before.get("kind") == "measured" and before.get("num_missing")):
            return True
        before = event
    return False


def was_cut_short(run: Run) -> bool:
    """Whether a run was ended by another command with fewer rounds than it was begun with."""
    return _rounds_short(run) is not None and _was_resumed(run)


def _rounds_below_plan(run: Run) -> Iterator[Place]:
    if (short := _rounds_short(run)) and not _was_resumed(run):
        yield Place(file=SPEED, field="min_rounds", stated=short[0], found=short[1])


def _cells_without_rows(run: Run) -> Iterator[Place]:
    """Every cell of a run that went to its end was scored or timed."""
    journals = (run.speed, run.generations, run.likelihoods, run.scores, run.aggregates)
    there = {row.cell for rows in journals for row in rows}
    for cell in run.manifest.cells if run.complete and there else ():
        if cell.workload.kind in MEASURED and cell.id not in there:
            yield Place(file=MANIFEST, field="cells", spot=Spot(cell=cell.id))


def _block_sizes_without_cells(run: Run) -> Iterator[Place]:
    """A sweep has cells for every size of a block and of a batch that it is over."""
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
    """Whether a run was made by a version whose events tell how many lines journals have, with their sha256.

    Such a version says more in other places as well, which those before it do not.
    """
    return once([run], ("tells digests",), lambda: _tells_digests(run))


def _tells_digests(run: Run) -> bool:
    later = any(cell.extra is not None for cell in run.manifest.cells)
    later |= any(event["kind"] in ("launched", "finished") or event.get("files") for event in run.events)
    return later or any(call.passes or call.cpu_s is not None for call in run.speed)


def _digests_missing(run: Run) -> Iterator[Place]:
    """Every event behind rows tells of them, and once events have told of a journal all others do."""
    told: set[str] = set()
    rows: Sequence[object] = [*run.speed, *run.costs] if run.manifest.verb == "speed" else [*run.scores]
    for number, event in enumerate(run.events if tells_digests(run) else (), start=1):
        files = set(event.get("files", {}))
        gone = sorted(told - files)
        if gone or (rows and not files and event["kind"] in AFTER_ROWS):
            yield Place(file=EVENTS, line=number, field="files", found=gone[0] if gone else None)
        told |= files


def remarks(runs: Sequence[Run]) -> list[Finding]:
    """What is missing for a reason that files allow."""
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
