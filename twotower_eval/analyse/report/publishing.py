"""Publishes a small run and its report side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.provenance import plain_argv
from twotower_eval.errors import UserError
from twotower_eval.store import FILES, Run
from twotower_eval.store.journal import DONE, LOCK, MANIFEST, close_run, packed, packed_path, read_closing
from twotower_eval.strict import JsonObject

PUBLISHED = "published"
MAX_BYTES = 20 * 2**20  # packed: what a repository carries without pain
PACKED_FROM = 64 * 2**10  # bytes from which on a journal is packed: smaller ones are read as they are
Say = Callable[[str], None]


def publish(runs: Sequence[Run], report: Path, *, results: Path, reports: Path, say: Say) -> tuple[Path, Path]:
    """Copy run folders to ``results/published/NAME/RUN`` and a report to ``reports/published/NAME``; the two folders.

    Long journals are packed; every reader of runs takes them for the journals themselves. NAME is
    ``<model>_<hardware>_<date>``. UserError where a run is incomplete, where the runs together are larger than
    :data:`MAX_BYTES`, or where either folder exists already.
    """
    name = published_name(Runs(runs))
    targets = (results / PUBLISHED / name, reports / PUBLISHED / name)
    for run in runs:
        if not run.complete:
            raise UserError(f"run {run.manifest.run_id} is not complete: finish it with --resume before publishing it")
    for target in targets:
        if target.exists():
            raise UserError(f"{target} exists already and nothing published is overwritten: move it away first")
    num_bytes = sum(len(_carried(file)[1]) for run in runs for file in _files(run.path))
    if num_bytes > MAX_BYTES:
        sizes = f"{num_bytes / 2**20:.1f} MiB when packed, more than the {MAX_BYTES / 2**20:.0f} MiB that are published"
        raise UserError(f"the runs are {sizes}: publish fewer runs or ones of fewer documents")
    for run in runs:
        _copy(run.path, targets[0] / run.manifest.run_id)
        for line in _make_plain(targets[0] / run.manifest.run_id / MANIFEST):
            say(f"{run.manifest.run_id}: {line}")
    _copy(report, targets[1])
    return targets


def published_name(runs: Runs) -> str:
    """``<model>_<hardware>_<date>``: the candidates' names, the devices', the day of the newest run."""
    models = {cell.checkpoint.name for run in runs for cell in run.manifest.cells if cell.arm == "candidate"}
    models = models or {cell.checkpoint.name for run in runs for cell in run.manifest.cells}
    hardware = {_hardware(run.manifest.machine) for run in runs}
    date = max(run.manifest.started_at[:10] for run in runs)
    return "_".join(["+".join(sorted(map(_slug, names))) for names in (models, hardware)] + [date])


def _hardware(machine: JsonObject) -> str:
    """The accelerators' name with their number if there are several, else ``cpu``."""
    devices: Any = machine.get("devices", ())
    names = [str(d.get("name") or str(d.get("device", "cpu")).split(":")[0]) for d in devices]
    distinct = sorted(set(names)) or ["cpu"]
    number = f"-x{len(names)}" if len(names) > 1 else ""
    return "-".join(distinct) + number


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


def _files(folder: Path) -> Iterator[Path]:
    """Everything but the empty lock of whoever wrote the run."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK)


def _copy(source: Path, target: Path) -> None:
    for file in _files(source):
        name, content = _carried(file)
        place = (target / file.relative_to(source)).with_name(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


def _carried(file: Path) -> tuple[str, bytes]:
    """Under which name a file is published, and its bytes there."""
    content = file.read_bytes()
    if file.suffix != ".jsonl" or len(content) < PACKED_FROM:
        return file.name, content
    return packed_path(file).name, packed(content)


def _make_plain(manifest: Path) -> Iterator[str]:
    """Make the command line plain in a copied manifest; a line for it, and one for each other path that remains.

    The closing file's digest of the manifest then is the copy's own.
    """
    held = json.loads(manifest.read_text(encoding="utf-8"))
    plain = list(plain_argv(held["argv"]))
    if plain != held["argv"]:
        held["argv"] = plain
        held["notes"] = [*held["notes"], "published: paths of the machine in argv were made plain"]
        manifest.write_text(json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        close_run(manifest.parent, FILES, read_closing(manifest.with_name(DONE), FILES).finished_at)
        yield "paths in its argv were made plain"
    yield from (f"still names {path!r} under {where}" for where, path in _paths(held) if where.split(".")[0] != "argv")


def _paths(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Absolute paths anywhere in a manifest, with the keys that lead to them."""
    if isinstance(value, str) and re.match(r"/\w|[A-Za-z]:\\", value):
        yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, f"{where}.{key}".lstrip("."))
