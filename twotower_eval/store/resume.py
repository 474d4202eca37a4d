"""Writing a run: its folder, its manifest, its rows and events; and whether new rows may join an existing run."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from twotower_eval.errors import UserError
from twotower_eval.records import (
    Arm,
    Cell,
    DocumentText,
    RunManifest,
    run_id_of,
    to_json,
)
from twotower_eval.store.environment import SCORING_PACKAGES
from twotower_eval.store.journal import (
    DONE,
    MANIFEST,
    PACKED,
    Journal,
    changed_journals,
    close_run,
    fsync_folder,
    lock_run,
    now_text,
    truncate_torn_line,
    write_atomically,
)
from twotower_eval.store.run import EVENTS, FILES, JOURNALS, Row, Run, load, read_manifest
from twotower_eval.strict import from_json

PACKAGES_THAT_MUST_AGREE = (
    "torch",
    "transformers",
    "tokenizers",
    "lm-eval",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
)
RECORDED_LATER = tuple(name for name in SCORING_PACKAGES if name not in PACKAGES_THAT_MUST_AGREE)


def what_differs(old: RunManifest, new: RunManifest) -> list[str]:
    """Why rows made under ``new`` must not join a run started under ``old``, a line each; empty if they may."""
    pairs: list[tuple[str, Any, Any]] = [
        ("verb", old.verb, new.verb),
        ("twotower-eval", old.project_version, new.project_version),
        *((name, old.packages.get(name), new.packages.get(name)) for name in _packages(old)),
        ("active kernels", old.machine.get("kernels"), new.machine.get("kernels")),
    ]
    if old.verb == "run":  # not part of cells, or not if decoding is greedy
        pairs.append(("seed", old.plan.get("seed"), new.plan.get("seed")))
    if old.verb in ("speed", "size"):
        pairs.append(("how models are run", _flags(old), _flags(new)))
        if old.omp_wait_policy is not None:  # older manifests do not record it
            pairs.append(("OMP_WAIT_POLICY", old.omp_wait_policy, new.omp_wait_policy))
        keys = sorted(({*old.machine} | {*new.machine}) - {"kernels"})
        pairs += [(f"machine {key}", old.machine.get(key), new.machine.get(key)) for key in keys]
    found = [f"{name} was {before}, is {after}" for name, before, after in pairs if before != after]
    before, after = (float("inf") if m.plan.get("limit") is None else m.plan["limit"] for m in (old, new))
    if old.verb == "run" and after < before:  # fewer documents would close the run before it is complete
        found.append(f"limit was {old.plan.get('limit')}, is {new.plan['limit']} (it may only be raised)")
    edited = [*_file_differences(old, new), *_code_differences(old, new), *_task_differences(old, new)]
    return found + edited + _cell_differences(old, new, explained=bool(edited))


def _packages(old: RunManifest) -> tuple[str, ...]:
    """Packages whose versions must agree. Older manifests do not record the packages that score beside lm-eval, so
    these are not compared."""
    later = RECORDED_LATER if any(name in old.packages for name in RECORDED_LATER) else ()
    return (*PACKAGES_THAT_MUST_AGREE, *later)


def _flags(manifest: RunManifest) -> list[tuple[object, ...]]:
    """The flags, from how its models are run, that change speed."""
    return [(ways.cached, ways.rows_together, ways.positions_passed, ways.plain_beyond) for ways in manifest.ways]


def what_to_note(old: RunManifest, new: RunManifest) -> tuple[str, ...]:
    """Differences worth a note that do not prevent a resume: another commit, an edited checkout."""
    found = []
    if old.commit != new.commit:
        found.append(f"begun at commit {old.commit}, resumed at {new.commit}")
    if new.dirty:
        found.append("the checkout has uncommitted changes")
    return tuple(found)


def _file_differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """Files of either arm's checkpoint whose content has changed."""
    arms: tuple[Arm, ...] = ("baseline", "candidate")
    for arm in arms:
        before, after = (next((c.checkpoint for c in m.cells if c.arm == arm), None) for m in (old, new))
        if before is None or after is None or before.identity == after.identity:
            continue
        pairs = [(before.files, after.files)]
        if before.digest != after.digest and not before.tower:  # the pair that it is of names the file
            pairs.append((before.weights, after.weights))
        for pair in pairs:
            then, now = ({file.name: file.sha256 for file in files} for files in pair)
            for name, done in _edits(then, now):
                yield f"{name} of the {arm} {after.name} {done}"


def _code_differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """Files of a plug-in decoder whose content has changed."""
    then, now = ({cell.decoder.kind: cell.decoder.code for cell in manifest.cells} for manifest in (old, new))
    for kind in sorted(then.keys() & now.keys()):
        files = [{file.name: file.sha256 for file in code or ()} for code in (then[kind], now[kind])]
        for name, done in _edits(*files):
            yield f"{name} of the decoder {kind} {done}"


def _task_differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """Parts of a task that have changed: what it asks, or the code that scores answers."""
    for task in sorted(old.tasks.keys() & new.tasks.keys()):
        for part, done in _edits(old.tasks[task], new.tasks[task]):
            yield f"{part} of task {task!r} {done}"


def _edits(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names whose digests differ, and what happened to them."""
    for name in sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
        yield name, "is new" if name not in then else "is gone" if name not in now else "was changed"


def _cell_differences(old: RunManifest, new: RunManifest, *, explained: bool) -> list[str]:
    """Cells that only one of two plans has: the plan fields that differ, with an example cell, unless the cause is
    already ``explained``."""
    old_cells, new_cells = ({cell.id: cell for cell in manifest.cells} for manifest in (old, new))
    gone, added = (
        [have[name] for name in have if name not in lack]
        for have, lack in ((old_cells, new_cells), (new_cells, old_cells))
    )
    if not gone and not added:
        return []
    fields = sorted({*old.plan} | {*new.plan})
    differences = [
        f"{name} was {_plain(old.plan.get(name))}, is {_plain(new.plan.get(name))}"
        for name in fields
        if old.plan.get(name) != new.plan.get(name)
    ]
    for cells, words in ((gone, "no longer has"), (added, "newly has")):
        if cells and not explained:
            more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
            differences.append(f"the plan {words} {_cell_text(cells[0])}{more}")
    return differences


def _plain(value: object) -> str:
    """A plan's value as a user writes it."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_plain(inner)}" for name, inner in value.items())
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell_text(cell: Cell) -> str:
    decoder = f"{cell.decoder.label} version {cell.decoder.version}"
    return f"cell {cell.id} ({cell.arm} {cell.checkpoint.name}, {decoder}, {cell.workload.name})"


def new_run_id(verb: str, now: datetime | None = None) -> str:
    """``20261123T101500Z-run-3f9a1c``: time in UTC, verb, six random hex digits."""
    return run_id_of(f"{(now or datetime.now(UTC)).astimezone(UTC):%Y%m%dT%H%M%SZ}", verb, secrets.token_hex(3))


def create(root: Path, manifest: RunManifest) -> RunWriter:
    """Create the folder ``root/run_id``, write its manifest, and open it for writing."""
    data = to_json(manifest)
    from_json(RunManifest, data)  # whatever could not be read back is refused before there is a folder
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    path = root / manifest.run_id
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"run folder {path} exists already: resume it or write elsewhere") from error
    except OSError as error:
        raise UserError(f"cannot make run folder {path}: {error.strerror or error}") from error
    lock = lock_run(path)
    write_atomically(path / MANIFEST, text)
    writer = RunWriter(load(path), lock)
    writer.event("started")
    return writer


def resume(path: Path, manifest: RunManifest, *, event: str = "resumed") -> RunWriter:
    """Open an existing run, after checking that ``manifest`` would produce the same rows.

    The folder keeps its manifest. Differences that would mix unlike rows are a UserError that names them; another
    commit or an edited checkout is only noted, in the ``event`` and in ``writer.warnings``. Torn last lines are cut
    off. ``done.json`` is removed until the run is complete again.
    """
    read_manifest(path)  # before the lock, so that a wrong path leaves no lock file behind
    if sorted(path.glob(f"*{PACKED}")):
        raise UserError(
            f"run {path} is packed, as published runs are, and takes no more: unpack a copy of it with `xz -d`"
        )
    lock = lock_run(path)
    try:
        run = load(path)
        check_comparable(run, manifest)
        check_unedited(run)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path / DONE)
            fsync_folder(path)
        warnings = what_to_note(run.manifest, manifest)
        writer = RunWriter(run, lock, warnings)
        writer.event(event, commit=manifest.commit, dirty=manifest.dirty, warnings=list(warnings))
    except BaseException:
        os.close(lock)
        raise
    return writer


def check_comparable(run: Run, manifest: RunManifest) -> None:
    """UserError, naming the differences, if ``manifest`` would not produce the same rows as the run's own."""
    differences = what_differs(run.manifest, manifest)
    if differences:
        listed = "; ".join(differences)
        raise UserError(f"cannot resume {run.path}, its rows would not be comparable: {listed}. Start a new run.")


def check_unedited(run: Run) -> None:
    """UserError if lines of a journal were changed after an event recorded their digest.

    Lines lost at the end of a file are no edit: their rows are made again.
    """
    for name, rows in changed_journals(run.path, run.events, EVENTS).items():
        raise UserError(
            f"{run.path / name}: lines 1 to {rows} were changed after they were written ({EVENTS} has another sha256): "
            "restore them or start a new run"
        )


class RunWriter:
    """Appends rows and events to one run and holds its lock until closed. Use it as a context manager.

    ``run`` is the run's content when it was opened. A row survives a kill of the process as soon as ``append`` returns,
    and a power cut after ``FSYNC_INTERVAL_S`` or the next event.
    """

    def __init__(self, run: Run, lock: int, warnings: tuple[str, ...] = ()) -> None:
        self.run = run
        self.path = run.path
        self.warnings = warnings
        self._lock = lock
        self._finished = False
        self._cells = set(run.cells)
        self._files: dict[str, Journal] = {}
        rows: tuple[Row, ...] = (*run.generations, *run.likelihoods, *run.scores, *run.speed, *run.costs, *run.checks)
        rows += (*run.aggregates, *run.witnessed, *run.documents)
        self._keys = {(type(row), *JOURNALS[type(row)][1](row)) for row in rows}
        for name in (EVENTS, *(name for name, _ in JOURNALS.values())):
            truncate_torn_line(self.path / name)
            if (self.path / name).exists() or any(name in event.get("files", {}) for event in run.events):
                self._file(name)  # events record it from the first on, even if its lines were lost

    def append(self, row: Row) -> None:
        """Write one row to the journal of its kind; UserError if its key exists already."""
        name, key_of = JOURNALS[type(row)]
        key = (type(row), *key_of(row))
        data = to_json(row)
        try:
            from_json(type(row), data)  # refuse to write what could not be read again
        except UserError as error:  # it may contain a task's or a plug-in's text
            raise UserError(f"{self.path / name}: {error}") from error
        if key in self._keys:
            raise UserError(f"{self.path / name}: row {key[1:]} is there already")
        if not isinstance(row, DocumentText) and row.cell not in self._cells:
            raise ValueError(f"{self.path / name}: cell {row.cell!r} is not in the run's manifest")
        self._file(name).append(data)
        self._keys.add(key)

    def event(self, kind: str, **detail: object) -> None:
        """Record that something happened, with the time; rows written before it are on disk when this returns.

        Each event records how many rows the journals hold by then, and their sha256, so that a later edit is noticed.
        """
        self._sync()
        files = {name: file.summary for name, file in sorted(self._files.items()) if name != EVENTS}
        file = self._file(EVENTS)
        file.append({"at": now_text(), "kind": kind, **detail, **({"files": files} if files else {})})
        file.sync()

    def finish(self) -> None:
        """Record the journals a last time, close them and write ``done.json``: the run is complete."""
        self.event("finished")
        self._close_files()
        self._finished = True
        close_run(self.path, FILES)

    def close(self) -> None:
        """Sync everything to disk and release the lock; may be called twice."""
        self._close_files()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None and not self._finished:
                self.event("failed", error=type(error).__name__, message=str(error))
        finally:
            self.close()

    def _file(self, name: str) -> Journal:
        if self._finished or self._lock < 0:
            raise UserError(f"run {self.path} is {'finished' if self._finished else 'closed'}: resume it to write more")
        if name not in self._files:
            self._files[name] = Journal(self.path / name)
        return self._files[name]

    def _sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
