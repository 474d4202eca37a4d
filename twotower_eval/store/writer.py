"""Writing a run: its folder and manifest, then rows and events appended until it is finished; resuming one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from twotower_eval.errors import UserError
from twotower_eval.records import RunManifest, to_json
from twotower_eval.store import comparable
from twotower_eval.store.journal import (
    PACKED,
    Journal,
    fsync_folder,
    lock_run,
    now_text,
    truncate_torn_line,
    write_atomically,
)
from twotower_eval.store.publish import DONE, MANIFEST, changed_journals, close_run
from twotower_eval.store.run import EVENTS, FILES, JOURNALS, Row, Run, load, read_manifest
from twotower_eval.strict import from_json


def new_run_id(verb: str, now: datetime | None = None) -> str:
    """``20261123T101500Z-run-3f9a1c``: time in UTC, verb, six random hex digits."""
    return f"{(now or datetime.now(UTC)).astimezone(UTC):%Y%m%dT%H%M%SZ}-{verb}-{secrets.token_hex(3)}"


def create(root: Path, manifest: RunManifest) -> RunWriter:
    """Make the folder ``root/run_id``, its manifest first, and open it for writing."""
    text = json.dumps(to_json(manifest), indent=1, ensure_ascii=False, allow_nan=False)
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
    """Open a run that was begun before, after checking that ``manifest`` would produce the same rows.

    The folder's own manifest stays. Differences that would mix unlike rows are a UserError that names them;
    another commit or an edited checkout is only noted, in the ``event`` and in ``writer.warnings``. Torn
    last lines are cut off; ``done.json`` is taken away until the run is finished again.
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
        warnings = comparable.warnings(run.manifest, manifest)
        writer = RunWriter(run, lock, warnings)
        writer.event(event, commit=manifest.commit, dirty=manifest.dirty, warnings=list(warnings))
    except BaseException:
        os.close(lock)
        raise
    return writer


def check_comparable(run: Run, manifest: RunManifest) -> None:
    """UserError that names the differences where ``manifest`` would not produce the same rows as the run's own."""
    differences = comparable.differences(run.manifest, manifest)
    if differences:
        listed = "; ".join(differences)
        raise UserError(f"cannot resume {run.path}, its rows would not be comparable: {listed}. Start a new run.")


def check_unedited(run: Run) -> None:
    """UserError where a journal does not hold any more what it held at an event that its lines still reach.

    Lines lost from a file are no edit: what they said is made again.
    """
    for name, rows in changed_journals(run.path, run.events, EVENTS).items():
        raise UserError(
            f"{run.path / name}: lines 1 to {rows} were changed after they were written ({EVENTS} has another sha256): "
            "restore them or start a new run"
        )


class RunWriter:
    """Appends rows and events to one run; holds the run's lock until closed. Use it as a context manager.

    ``run`` is what was there when the run was opened. Rows survive the process being killed as soon as ``append``
    returns, and a power cut after ``FSYNC_INTERVAL_S`` or the next event.
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
        rows += (*run.aggregates, *run.witnessed)
        self._keys = {(type(row), *JOURNALS[type(row)][1](row)) for row in rows}
        for name in (EVENTS, *(name for name, _ in JOURNALS.values())):
            truncate_torn_line(self.path / name)
            if (self.path / name).exists() or any(name in event.get("files", {}) for event in run.events):
                self._file(name)  # events tell of it from the first on, also where its lines were lost

    def append(self, row: Row) -> None:
        """Write one row to the journal of its kind; a key that is there already is a UserError."""
        name, key_of = JOURNALS[type(row)]
        key = (type(row), *key_of(row))
        data = to_json(row)
        try:
            from_json(type(row), data)  # what could not be read again is not written
        except UserError as error:  # a task's or a plug-in's words are in it
            raise UserError(f"{self.path / name}: {error}") from error
        if key in self._keys:
            raise UserError(f"{self.path / name}: row {key[1:]} is there already")
        if row.cell not in self._cells:
            raise ValueError(f"{self.path / name}: cell {row.cell!r} is not in the run's manifest")
        self._file(name).append(data)
        self._keys.add(key)

    def event(self, kind: str, **detail: object) -> None:
        """Note that something happened, with the time; rows written before it are on disk when this returns.

        Each event says how many rows the journals hold by then, and their sha256: a later edit will be noticed.
        """
        self._sync()
        files = {name: file.summary for name, file in sorted(self._files.items()) if name != EVENTS}
        file = self._file(EVENTS)
        file.append({"at": now_text(), "kind": kind, **detail, **({"files": files} if files else {})})
        file.sync()

    def finish(self) -> None:
        """Tell of the journals a last time, close them and write ``done.json``: the run takes nothing more."""
        self.event("finished")
        self._close_files()
        self._finished = True
        close_run(self.path, FILES)

    def close(self) -> None:
        """Bring everything to disk and let go of the lock; calling it twice is fine."""
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
