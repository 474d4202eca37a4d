"""The closing file of a run: what every file held when the run was finished, and whether it still holds that.

``done.json`` has one entry for each file of the run, the manifest among them. Older ones give the manifest's digest in
a place of its own, ``manifest_sha256``; where a file has both they must say the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject, parse_json, read_utf8
from twotower_eval.records import SCHEMA_VERSION, Count
from twotower_eval.store.journal import content_of, now_text, prefix_digests, summary_of, write_atomically
from twotower_eval.strict import from_json

MANIFEST, DONE = "manifest.json", "done.json"
TRAINING_LOG = "training_log.jsonl"  # a copy of what lies beside a trained checkpoint; no journal of ours


@dataclass(frozen=True, kw_only=True)
class FileSummary:
    """What a file held: its lines counted, and its digest."""

    rows: Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Told:
    """What an event tells of the journals, by name."""

    files: Mapping[str, FileSummary]


@dataclass(frozen=True, kw_only=True)
class Closing:
    """``done.json``."""

    schema: int
    finished_at: str
    files: Mapping[str, FileSummary]
    manifest_sha256: str | None = None  # of older files only


def told_digests(events: Sequence[JsonObject], where: str) -> dict[str, dict[int, str]]:
    """By journal and number of lines, the sha256 that events tell of its first so many. UserError, with the line in
    ``where``, if one tells none.

    An event that tells of fewer lines than the ones before it came after a loss of lines: what those told of the lost
    ones holds no longer.
    """
    told: dict[str, dict[int, str]] = defaultdict(dict)
    for number, event in enumerate(events, start=1):
        try:
            files = from_json(Told, {"files": event.get("files", {})}).files
        except UserError as error:
            raise UserError(f"{where}, line {number}: {error}") from error
        for name, summary in files.items():
            kept = {rows: sha256 for rows, sha256 in told[name].items() if rows <= summary.rows}
            told[name] = {**kept, summary.rows: summary.sha256}
    return told


def changed_journals(path: Path, events: Sequence[JsonObject], where: str) -> dict[str, int]:
    """Journals that do not begin with what an event tells of them: name -> how many of the first lines differ.

    ``where`` is the name of the events' own file.
    """
    changed = {}
    for name, digests in told_digests(events, str(path / where)).items():
        found = prefix_digests(content_of(path / name) or b"", digests)
        wrong = [rows for rows in sorted(found) if found[rows] != digests[rows]]
        if wrong:
            changed[name] = wrong[0]
    return changed


def short_journals(path: Path, events: Sequence[JsonObject], where: str) -> dict[str, tuple[int, int]]:
    """Journals that have fewer lines than an event tells of: name -> lines told, lines there."""
    short = {}
    for name, digests in told_digests(events, str(path / where)).items():
        there = (content_of(path / name) or b"").count(b"\n")
        if there < max(digests):
            short[name] = (max(digests), there)
    return short


def close_run(path: Path, names: Sequence[str], finished_at: str | None = None) -> None:
    """Write ``done.json`` over those of the named files that are there, packed or not."""
    files = {name: summary for name in names if (summary := summary_of(path / name)) is not None}
    done = {"schema": SCHEMA_VERSION, "finished_at": finished_at or now_text(), "files": files}
    write_atomically(path / DONE, json.dumps(done, indent=1))


def read_closing(file: Path, names: Sequence[str]) -> Closing:
    """``done.json``, checked in itself; UserError where it is none, contradicts itself or lists unknown files."""
    data = parse_json(read_utf8(file), str(file))
    try:
        closing = from_json(Closing, data)
    except UserError as error:
        raise UserError(f"{file}: not a valid closing file ({error})") from error
    if closing.schema != SCHEMA_VERSION:
        raise UserError(f"{file}: schema {closing.schema}; this version reads schema {SCHEMA_VERSION} only")
    unknown = sorted(set(closing.files) - set(names))
    if unknown:
        raise UserError(f"{file}: lists {unknown[0]!r}, which is no file of a run")
    entry = closing.files.get(MANIFEST)
    if entry is None and closing.manifest_sha256 is None:
        raise UserError(f"{file}: not a valid closing file (no digest of {MANIFEST})")
    if entry is not None and closing.manifest_sha256 not in (None, entry.sha256):
        raise UserError(
            f"{file}: two digests of {MANIFEST}, manifest_sha256 and the entry under files, and they differ: "
            "drop the one that is not the manifest's"
        )
    return closing


def agrees_with_closing(path: Path, names: Sequence[str], seen: Mapping[str, dict[str, object]] | None = None) -> bool:
    """Whether a run was finished. UserError where one of the named files is not what it was then.

    ``seen`` are summaries of files that were just read, by name.
    """
    if not (path / DONE).exists():
        return False
    closing = read_closing(path / DONE, names)
    for name in names:
        found, entry = (seen or {}).get(name) or summary_of(path / name), closing.files.get(name)
        if found is None and entry is None:
            continue
        if entry is None and name == TRAINING_LOG and closing.manifest_sha256 is not None:
            continue  # older closing files left it out
        if entry is None and name == MANIFEST and found is not None and found["sha256"] == closing.manifest_sha256:
            continue
        if entry is None or found != {"rows": entry.rows, "sha256": entry.sha256}:
            state = "was lost" if found is None else "changed"
            raise UserError(
                f"{path / name}: {state} after the run was finished ({DONE} has another sha256): restore it or run anew"
            )
    return True
