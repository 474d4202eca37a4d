"""A run on disk: a manifest written once, append-only journals, and a closing file that marks the run complete.

A run folder holds ``manifest.json`` (first, atomic, never edited), one JSONL journal per kind of row, ``events.jsonl``
and, last, ``done.json`` with row counts and sha256 of every file. A line counts once its newline is written: what
follows the last newline is a torn write and dropped; any other bad line is an error that names file and line.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar, cast

from twotower_eval.errors import UserError
from twotower_eval.records import (
    SCHEMA_VERSION,
    Aggregate,
    Cell,
    Check,
    CostSample,
    DocumentText,
    GenerationRow,
    LikelihoodRow,
    RunManifest,
    Score,
    SpeedSample,
    Verb,
    Witnessed,
    verb_of,
)
from twotower_eval.store.journal import (
    DONE,
    MANIFEST,
    TRAINING_LOG,
    agrees_with_closing,
    read_lines,
    read_objects,
)
from twotower_eval.strict import decode_utf8, from_json, line_reader, parse_json

EVENTS = "events.jsonl"

OfCell = GenerationRow | LikelihoodRow | Score | Aggregate | SpeedSample | CostSample | Witnessed | Check
Row = OfCell | DocumentText
Key = tuple[str | int, ...]
R = TypeVar("R", bound=Row)
C = TypeVar("C", bound=OfCell)
Placed = tuple[list[int], list[C]]  # a journal's position of each row by key, and the rows


def _request_key(row: GenerationRow | LikelihoodRow) -> Key:
    return (row.cell, row.task, row.doc_id, row.request_index, row.repeat)


def _score_key(row: Score) -> Key:
    return (row.cell, row.task, row.doc_id, row.metric, row.filter)


def _speed_key(row: SpeedSample) -> Key:
    return (row.launch_id, row.cell, row.replica, row.phase, row.round, row.call_id)


def _cost_key(row: CostSample) -> Key:
    sizes = (row.batch_size, row.context_tokens, row.block_size or 0, row.routing or "", row.num_steps or 0)
    return (row.launch_id, row.cell, row.replica, row.phase, row.round, row.part, *sizes)


JOURNALS: dict[type[Row], tuple[str, Callable[[Any], Key]]] = {
    GenerationRow: ("generations.jsonl", _request_key),
    LikelihoodRow: ("likelihoods.jsonl", _request_key),
    Score: ("scores.jsonl", _score_key),
    # A resume may raise the limit.
    Aggregate: ("aggregates.jsonl", lambda row: (row.cell, row.task, row.metric, row.filter, row.num_documents)),
    SpeedSample: ("speed.jsonl", _speed_key),
    CostSample: ("costs.jsonl", _cost_key),
    Witnessed: ("witness.jsonl", lambda row: (row.launch_id, row.cell, row.round, row.call_id)),
    Check: ("checks.jsonl", lambda row: (row.cell, row.name)),
    DocumentText: ("documents.jsonl", lambda row: (row.task, row.doc_id)),
}
FILES = (MANIFEST, EVENTS, *(name for name, _ in JOURNALS.values()), TRAINING_LOG)  # all but the closing file


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run folder. ``complete``: ``done.json`` exists and agrees with every journal.

    ``found`` caches what analyses compute from the run, by keys of their own.
    """

    path: Path
    manifest: RunManifest
    generations: list[GenerationRow]
    likelihoods: list[LikelihoodRow]
    scores: list[Score]
    speed: list[SpeedSample]
    costs: list[CostSample]
    checks: list[Check]
    events: list[dict[str, Any]]
    complete: bool
    aggregates: list[Aggregate] = field(default_factory=list)
    witnessed: list[Witnessed] = field(default_factory=list)
    documents: list[DocumentText] = field(default_factory=list)
    found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """The manifest's cells by id."""
        return {cell.id: cell for cell in self.manifest.cells}

    def generations_of(self, cells: Collection[str]) -> list[GenerationRow]:
        """Generations of these cells, in the journal's order, without a pass over all rows."""
        return _merged(self._generations_by_cell, cells)

    def scores_of(self, cells: Collection[str]) -> list[Score]:
        """Scores of these cells, in the journal's order."""
        return _merged(self._scores_by_cell, cells)

    def speed_of(self, cells: Collection[str]) -> list[SpeedSample]:
        """Timed calls of these cells, in the journal's order."""
        return _merged(self._speed_by_cell, cells)

    @cached_property
    def _generations_by_cell(self) -> dict[str, Placed[GenerationRow]]:
        return _by_cell(self.generations)

    @cached_property
    def _scores_by_cell(self) -> dict[str, Placed[Score]]:
        return _by_cell(self.scores)

    @cached_property
    def _speed_by_cell(self) -> dict[str, Placed[SpeedSample]]:
        return _by_cell(self.speed)


def _by_cell(rows: Sequence[C]) -> dict[str, Placed[C]]:
    found: dict[str, Placed[C]] = {}
    for place, row in enumerate(rows):
        places, own = found.setdefault(row.cell, ([], []))
        places.append(place)
        own.append(row)
    return found


def _merged(by_cell: Mapping[str, Placed[C]], cells: Collection[str]) -> list[C]:
    found = [by_cell[cell] for cell in dict.fromkeys(cells) if cell in by_cell]
    if len(found) == 1:
        return found[0][1]
    placed = [pair for places, rows in found for pair in zip(places, rows, strict=True)]
    return [row for _, row in sorted(placed, key=itemgetter(0))]


def load(path: Path) -> Run:
    """Read a run without changing it. A torn last line is dropped; anything else that is wrong is a UserError."""
    manifest = read_manifest(path)
    cells = {cell.id for cell in manifest.cells}
    seen: dict[str, dict[str, object]] = {}

    def rows(cls: type[R]) -> list[R]:
        name, key_of = JOURNALS[cast(type[Row], cls)]
        with paused_garbage_collection():
            return _keyed_rows(path / name, line_reader(cls), key_of, cells, seen)

    return Run(
        path=path,
        manifest=manifest,
        generations=rows(GenerationRow),
        likelihoods=rows(LikelihoodRow),
        scores=rows(Score),
        speed=rows(SpeedSample),
        costs=rows(CostSample),
        checks=rows(Check),
        aggregates=rows(Aggregate),
        witnessed=rows(Witnessed),
        documents=rows(DocumentText),
        events=_read_events(path / EVENTS),
        complete=agrees_with_closing(path, FILES, seen),
    )


def find_runs(root: Path, verb: Verb | None = None) -> list[Path]:
    """Run folders of ``verb`` directly under ``root``, newest first; one whose manifest is missing or cannot be read is
    no run: :func:`unreadable_runs` says why."""
    manifests = [(held, path) for path, held in _manifests(root) if isinstance(held, RunManifest)]
    wanted = [(m.started_at, m.run_id, path) for m, path in manifests if verb in (None, verb_of(m))]
    return [path for _, _, path in sorted(wanted, reverse=True)]


def is_closed(path: Path) -> bool:
    """Whether a run was brought to its end: its closing file is there. :func:`load` compares that with the journals."""
    return (path / DONE).is_file()


def unreadable_runs(root: Path) -> list[str]:
    """Why the manifests under ``root`` that cannot be read are none, a line for each, which names the file."""
    return [str(held) for _, held in _manifests(root) if isinstance(held, UserError)]


def _manifests(root: Path) -> Iterator[tuple[Path, RunManifest | UserError]]:
    """Folders with a manifest, by name, each with that or with what keeps it from being read."""
    for file in sorted(root.glob(f"*/{MANIFEST}")) if root.is_dir() else ():
        try:
            yield file.parent, read_manifest(file.parent)
        except UserError as error:
            yield file.parent, error


def read_manifest(path: Path) -> RunManifest:
    """The manifest of a run folder; UserError if there is none or it cannot be read."""
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is no run folder: cannot read {MANIFEST} ({error.strerror or error})") from error
    data = parse_json(decode_utf8(content, str(file)), str(file))
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA_VERSION:
        raise UserError(f"{file}: schema {schema!r}; this version reads schema {SCHEMA_VERSION} only")
    try:
        return from_json(RunManifest, data)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _read_events(file: Path) -> list[dict[str, object]]:
    """Events of any kind, as later versions may add some; each has a time and a kind."""
    events = []
    for number, event in read_objects(file):
        for key in ("at", "kind"):
            if not isinstance(event.get(key), str):
                raise UserError(f"{file}, line {number}: an event's {key} must be a text, not {event.get(key)!r}")
        events.append(event)
    return events


@contextlib.contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Pause the cycle collector while many rows are made: none is part of a cycle, and each pass scans all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _keyed_rows(
    file: Path,
    read: Callable[[bytes, str], R],
    key_of: Callable[[R], Key],
    cells: set[str],
    seen: dict[str, dict[str, object]],
) -> list[R]:
    """The rows of a journal by key; the summary of a packed one, which is slow to unpack, is stored in ``seen``."""
    rows: list[R] = []
    lines: dict[Key, int] = {}
    where = str(file)
    for number, line in read_lines(file, seen):
        row = read(line, f"{where}, line {number}")
        key = key_of(row)
        earlier = lines.setdefault(key, number)
        if earlier != number:
            raise UserError(f"{file}, line {number}: repeats the row of line {earlier}, key {key}")
        if not isinstance(row, DocumentText) and row.cell not in cells:
            raise UserError(f"{file}, line {number}: cell {row.cell!r} is not in the run's manifest")
        rows.append(row)
    return rows
