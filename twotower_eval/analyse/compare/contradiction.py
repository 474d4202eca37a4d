"""What a run's files say in two ways, as facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from twotower_eval.records import GenerationRow, Score, SpeedSample
from twotower_eval.store import JOURNALS, Row, Run

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
