"""Writing a run: its folder and manifest, then rows and events until it is finished; and whether rows made now may join
a run begun before.
"""

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
    """What forbids adding rows made under ``new`` to a run begun under ``old``, in words."""
    pairs: list[tuple[str, Any, Any]] = [
        ("verb", old.verb, new.verb),
        ("twotower-eval", old.project_version, new.project_version),
        *((name, old.packages.get(name), new.packages.get(name)) for name in _packages(old)),
        ("active kernels", old.machine.get("kernels"), new.machine.get("kernels")),
    ]
    if old.verb == "run":  # what cells do not tell, or not where decoding is greedy
        pairs.append(("seed", old.plan.get("seed"), new.plan.get("seed")))
    if old.verb in ("speed", "size"):
        pairs.append(("how models are run", _flags(old), _flags(new)))
        keys = sorted(({*old.machine} | {*new.machine}) - {"kernels"})
        pairs += [(f"machine {key}", old.machine.get(key), new.machine.get(key)) for key in keys]
    found = [f"{name} was {before}, is {after}" for name, before, after in pairs if before != after]
    before, after = (float("inf") if m.plan.get("limit") is None else m.plan["limit"] for m in (old, new))
    if old.verb == "run" and after < before:  # fewer documents would close the run before it is complete
        found.append(f"limit was {old.plan.get('limit')}, is {new.plan['limit']} (it may only be raised)")
    edited = [*_file_differences(old, new), *_code_differences(old, new), *_task_differences(old, new)]
    return found + edited + _cell_differences(old, new, explained=bool(edited))


def _packages(old: RunManifest) -> tuple[str, ...]:
    """Packages whose versions must agree. Manifests of old tell of none that score beside lm-eval: nothing is known
    of these there, neither that they were installed nor that they were not."""
    later = RECORDED_LATER if any(name in old.packages for name in RECORDED_LATER) else ()
    return (*PACKAGES_THAT_MUST_AGREE, *later)


def _flags(manifest: RunManifest) -> list[tuple[object, ...]]:
    """What in the ways of its models changes how fast they are."""
    return [(ways.cached, ways.rows_together, ways.positions_passed, ways.plain_beyond) for ways in manifest.ways]


def what_to_note(old: RunManifest, new: RunManifest) -> tuple[str, ...]:
    """What is worth a note, though it forbids nothing: another commit, an edited checkout."""
    found = []
    if old.commit != new.commit:
        found.append(f"begun at commit {old.commit}, resumed at {new.commit}")
    if new.dirty:
        found.append("the checkout has uncommitted changes")
    return tuple(found)


def _file_differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """Files of either arm's checkpoint that hold something else than before."""
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
    """Files of a plug-in decoder that hold something else than before."""
    then, now = ({cell.decoder.kind: cell.decoder.code for cell in manifest.cells} for manifest in (old, new))
    for kind in sorted(then.keys() & now.keys()):
        files = [{file.name: file.sha256 for file in code or ()} for code in (then[kind], now[kind])]
        for name, done in _edits(*files):
            yield f"{name} of the decoder {kind} {done}"


def _task_differences(old: RunManifest, new: RunManifest) -> Iterator[str]:
    """Parts of a task that are not what they were: what it asks, or the code that makes scores of the answers."""
    for task in sorted(old.tasks.keys() & new.tasks.keys()):
        for part, done in _edits(old.tasks[task], new.tasks[task]):
            yield f"{part} of task {task!r} {done}"


def _edits(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names whose digests are not the same, and what happened to them."""
    for name in sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
        yield name, "is new" if name not in then else "is gone" if name not in now else "was changed"


def _cell_differences(old: RunManifest, new: RunManifest, *, explained: bool) -> list[str]:
    """Cells that only one of two plans has: the plans' own words where these differ, and an example, unless what made
    them others is ``explained`` already."""
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
    """A plan's value as one gives it."""
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
        warnings = what_to_note(run.manifest, manifest)
        writer = RunWriter(run, lock, warnings)
        writer.event(event, commit=manifest.commit, dirty=manifest.dirty, warnings=list(warnings))
    except BaseException:
        os.close(lock)
        raise
    return writer


def check_comparable(run: Run, manifest: RunManifest) -> None:
    """UserError that names the differences where ``manifest`` would not produce the same rows as the run's own."""
    differences = what_differs(run.manifest, manifest)
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
