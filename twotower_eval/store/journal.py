"""Files that survive a kill: append-only JSONL journals, files replaced atomically, and the closing file with the
digests of all others."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import lzma
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from twotower_eval.errors import UserError
from twotower_eval.records import SCHEMA_VERSION, Count
from twotower_eval.strict import JsonObject, from_json, parse_json, parse_object, read_utf8

FSYNC_INTERVAL_S = 0.5
LOCK = "writer.lock"
PACKED = ".xz"
CHUNK_BYTES = 1 << 20


class Journal:
    """A journal open for appending whole lines, with an fsync at most every ``FSYNC_INTERVAL_S``.

    ``path`` must not end in a torn line.
    """

    def __init__(self, path: Path) -> None:
        new = not path.exists()
        content = b"" if new else path.read_bytes()
        self._num_rows, self._sha256 = content.count(b"\n"), hashlib.sha256(content)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._descriptor).st_size
        self._synced_size = self._size
        self._synced_s = time.monotonic()
        if new:
            fsync_folder(path.parent)

    def append(self, value: JsonObject) -> None:
        """Write one line; a ValueError for NaN and infinity."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = text.encode("utf-8", "surrogatepass") + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            self._size += len(line)
        except BaseException:
            # A full disk must not leave half a line in the middle of the file for the next append to follow.
            os.ftruncate(self._descriptor, self._size)
            raise
        self._num_rows += 1
        self._sha256.update(line)
        if time.monotonic() - self._synced_s >= FSYNC_INTERVAL_S:
            self.sync()

    @property
    def summary(self) -> dict[str, object]:
        """Number of lines and sha256 so far, as :func:`summary_of` gives them for a file."""
        return {"rows": self._num_rows, "sha256": self._sha256.hexdigest()}

    def sync(self) -> None:
        """Bring all lines to disk."""
        if self._synced_size != self._size:
            os.fsync(self._descriptor)
        self._synced_size, self._synced_s = self._size, time.monotonic()

    def close(self) -> None:
        """Bring all lines to disk and close the file."""
        self.sync()
        os.close(self._descriptor)


def lock_run(path: Path) -> int:
    """Lock the run folder ``path`` for this writer until the returned descriptor is closed; UserError if taken."""
    # A file of its own, opened for writing: flock on a folder or a read-only descriptor fails on NFS.
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"run {path} is being written by another process: wait for it or stop it") from error
    return descriptor


def packed(content: bytes) -> bytes:
    """The packed (xz) form of a content; the same content gives the same bytes."""
    return lzma.compress(content)


def packed_path(file: Path) -> Path:
    """The path of a file's packed copy."""
    return file.with_name(file.name + PACKED)


def content_of(file: Path) -> bytes | None:
    """The bytes of a file or of its packed copy; ``None`` if neither exists.

    UserError if the packed copy is broken, or if both exist, as they might differ.
    """
    copy = packed_path(file)
    if file.exists():
        if copy.exists():
            raise UserError(f"{file} lies beside its packed copy {copy.name}: keep one of them")
        return file.read_bytes()
    if not copy.exists():
        return None
    try:
        return lzma.decompress(copy.read_bytes())
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{copy}: cannot be unpacked ({error}): restore it") from error


def read_lines(file: Path, seen: dict[str, dict[str, object]] | None = None) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1 and whole lines of a journal; nothing if it does not exist.

    A packed file has to be unpacked anyway: its :func:`summary_of` is stored in ``seen`` under its name.
    """
    with _stream(file) as stream:
        if seen is not None and isinstance(stream, io.BytesIO) and packed_path(file).exists():
            seen[file.name] = _summary(stream)
            stream.seek(0)
        for number, line in enumerate(stream, start=1):
            if line.endswith(b"\n"):
                yield number, line[:-1]


def _stream(file: Path) -> IO[bytes]:
    """A stream of a file, never held whole, or of its packed copy."""
    if file.exists() and not packed_path(file).exists():
        return open(file, "rb")
    return io.BytesIO(content_of(file) or b"")


def read_objects(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line numbers from 1 and JSON objects of a journal; nothing if it does not exist."""
    for number, line in read_lines(file):
        yield number, parse_object(line, f"{file}, line {number}")


def truncate_torn_line(file: Path) -> None:
    """Cut off what follows the last newline."""
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def summary_of(file: Path) -> dict[str, object] | None:
    """Number of lines and sha256 of a file or of what its packed copy holds; ``None`` if neither exists."""
    if not file.exists() and not packed_path(file).exists():
        return None
    with _stream(file) as stream:
        return _summary(stream)


def _summary(stream: IO[bytes]) -> dict[str, object]:
    num_rows, digest = 0, hashlib.sha256()
    while part := stream.read(CHUNK_BYTES):
        num_rows += part.count(b"\n")
        digest.update(part)
    return {"rows": num_rows, "sha256": digest.hexdigest()}


def prefix_digests(content: bytes, wanted: Collection[int]) -> dict[int, str]:
    """Number of lines -> sha256 of that many first lines of a journal, for each ``wanted`` number that it has."""
    digest, found = hashlib.sha256(), {}
    for number, line in enumerate([b"", *content.split(b"\n")[:-1]]):
        digest.update(line + b"\n" if number else b"")
        if number in wanted:
            found[number] = digest.hexdigest()
    return found


def write_atomically(file: Path, text: str) -> None:
    """Write ``text`` and a newline so that readers see all of it or nothing, even after a power cut."""
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, file)
    fsync_folder(file.parent)


def fsync_folder(path: Path) -> None:
    """Make new, renamed and removed names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def now_text() -> str:
    """The time in UTC, ISO 8601 with milliseconds."""
    return moment_text(moment_now())


def moment_now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


def moment_text(moment: datetime) -> str:
    """A time as the journals hold it, ISO 8601 with milliseconds."""
    return moment.isoformat(timespec="milliseconds")


MANIFEST, DONE = "manifest.json", "done.json"
TRAINING_LOG = "training_log.jsonl"  # copied from beside a trained checkpoint; not one of our journals


@dataclass(frozen=True, kw_only=True)
class FileSummary:
    """A file's number of lines and digest when the run was closed."""

    rows: Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RecordedCounts:
    """The journals' lines and digests that an event recorded, by name."""

    files: Mapping[str, FileSummary]


@dataclass(frozen=True, kw_only=True)
class Closing:
    """``done.json``."""

    schema: int
    finished_at: str
    files: Mapping[str, FileSummary]
    manifest_sha256: str | None = None  # in older files only


def recorded_digests(events: Sequence[JsonObject], where: str) -> dict[str, dict[int, str]]:
    """Journal -> number of lines -> sha256 of that many first lines, as events recorded them.

    UserError, with the line in ``where``, for an event without digests. An event with fewer lines than earlier ones
    came after lines were lost: what earlier events recorded beyond them is dropped.
    """
    digests: dict[str, dict[int, str]] = defaultdict(dict)
    for number, event in enumerate(events, start=1):
        try:
            files = from_json(RecordedCounts, {"files": event.get("files", {})}).files
        except UserError as error:
            raise UserError(f"{where}, line {number}: {error}") from error
        for name, summary in files.items():
            kept = {rows: sha256 for rows, sha256 in digests[name].items() if rows <= summary.rows}
            digests[name] = {**kept, summary.rows: summary.sha256}
    return digests


def changed_journals(path: Path, events: Sequence[JsonObject], where: str) -> dict[str, int]:
    """Journals whose first lines differ from what an event recorded: name -> number of those lines.

    ``where`` is the name of the events' own file.
    """
    changed = {}
    for name, digests in recorded_digests(events, str(path / where)).items():
        found = prefix_digests(content_of(path / name) or b"", digests)
        wrong = [rows for rows in sorted(found) if found[rows] != digests[rows]]
        if wrong:
            changed[name] = wrong[0]
    return changed


def short_journals(path: Path, events: Sequence[JsonObject], where: str) -> dict[str, tuple[int, int]]:
    """Journals with fewer lines than an event recorded: name -> (recorded lines, present lines)."""
    short = {}
    for name, digests in recorded_digests(events, str(path / where)).items():
        there = (content_of(path / name) or b"").count(b"\n")
        if there < max(digests):
            short[name] = (max(digests), there)
    return short


def close_run(path: Path, names: Sequence[str], finished_at: str | None = None) -> None:
    """Write ``done.json`` for those of the named files that exist, packed or not."""
    files = {name: summary for name in names if (summary := summary_of(path / name)) is not None}
    done = {"schema": SCHEMA_VERSION, "finished_at": finished_at or now_text(), "files": files}
    write_atomically(path / DONE, json.dumps(done, indent=1))


def read_closing(file: Path, names: Sequence[str]) -> Closing:
    """Read ``done.json``; UserError if it is invalid, contradicts itself or lists unknown files."""
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
    """Whether a run is complete. UserError if one of the named files has changed since.

    ``seen`` are summaries, by name, of files that were just read.
    """
    if not (path / DONE).exists():
        return False
    closing = read_closing(path / DONE, names)
    for name in names:
        found, entry = (seen or {}).get(name) or summary_of(path / name), closing.files.get(name)
        if found is None and entry is None:
            continue
        if entry is None and name == TRAINING_LOG and closing.manifest_sha256 is not None:
            continue  # older closing files do not list it
        if entry is None and name == MANIFEST and found is not None and found["sha256"] == closing.manifest_sha256:
            continue
        if entry is None or found != {"rows": entry.rows, "sha256": entry.sha256}:
            state = "was lost" if found is None else "changed"
            raise UserError(
                f"{path / name}: {state} after the run was finished ({DONE} has another sha256): restore it or run anew"
            )
    return True
