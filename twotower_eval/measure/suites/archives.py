"""Benchmarks in their authors' own archives: ARC and WinoGrande (zip), RACE (tar.gz).

Members are read in memory, and nothing is unpacked: no name in an archive becomes a path.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from twotower_eval.errors import UserError
from twotower_eval.measure.suites.published import Row, checked, jsonl_rows
from twotower_eval.strict import decode_utf8, parse_json

MAX_BYTES = 1 << 30  # of an archive once it is unpacked; the largest here has a tenth of it
MAX_MEMBER_BYTES = 1 << 26
MAX_MEMBERS = 100_000
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError)  # the last: encrypted
TOP = r"(?:[^/]+/)?"  # the folder that all members of an archive are in
SPLITS = {"train": "Train", "validation": "Dev", "test": "Test"}
LETTERS = "ABCD"

Key = TypeVar("Key")
Tables = Iterator[tuple[str, str, Iterator[Row]]]  # folder, split, rows


def arc(path: Path) -> Tables:
    """Both sets of ARC, in three splits each."""
    names = {
        (place, split): f"{TOP}{place}/{place}-{word}\\.jsonl"
        for place in ("ARC-Challenge", "ARC-Easy")
        for split, word in SPLITS.items()
    }
    for (place, split), content in _wanted(path, names).items():
        rows = (_arc_row(where, row) for where, row in jsonl_rows(content, f"{path}, {place} {split}"))
        yield place.lower().replace("-", "_"), split, rows


def _arc_row(where: str, row: Row) -> Row:
    question, key = row.get("question"), row.get("answerKey")
    choices = question.get("choices") if isinstance(question, dict) else None
    if not isinstance(question, dict) or not isinstance(choices, list) or not choices:
        raise UserError(f"{where}: no question with choices")
    columns = {"text": str, "label": str}
    held = list(checked(((where, one if isinstance(one, dict) else {}) for one in choices), columns))
    made = {name: [one[name] for one in held] for name in columns}
    found = {"id": row.get("id"), "question": question.get("stem"), "choices": made, "answerKey": key}
    return next(checked([(where, found)], {"id": str, "question": str, "choices": dict, "answerKey": str}))


def winogrande(path: Path, columns: Mapping[str, type]) -> Tables:
    """The largest training set, and the validation set."""
    names = {"train": f"{TOP}train_xl\\.jsonl", "validation": f"{TOP}dev\\.jsonl"}
    for split, content in _wanted(path, names).items():
        yield "winogrande_xl", split, checked(jsonl_rows(content, f"{path}, {split}"), columns)


def race(path: Path) -> Tables:
    """The test set of high school, a row for each article, in the order of their numbers."""
    wanted = re.compile(rf"{TOP}test/high/(\d+)\.txt")
    found = {int(match[1]): content for match, content in _members(path, wanted)}
    if not found:
        raise UserError(f"{path}: holds no RACE/test/high/NUMBER.txt")
    yield "race_high", "test", (_race_row(f"{path}, test/high/{at}.txt", found[at]) for at in sorted(found))


def _race_row(where: str, content: bytes) -> Row:
    """An article with all its questions, which the data set on the hub has as the text of a Python list."""
    data = parse_json(decode_utf8(content, where), where)
    held = data if isinstance(data, dict) else {}
    lists = [held.get(name) for name in ("questions", "answers", "options")]
    if not isinstance(held.get("article"), str) or not all(isinstance(one, list) and one for one in lists):
        raise UserError(f"{where}: not an article with its questions, answers and options")
    questions, answers, options = (one for one in lists if isinstance(one, list))
    if len(questions) != len(answers) or len(questions) != len(options):
        raise UserError(f"{where}: {len(questions)} questions, {len(answers)} answers, {len(options)} sets of options")
    for question, answer, choices in zip(questions, answers, options, strict=True):
        whole = isinstance(choices, list) and len(choices) == len(LETTERS)
        texts = [question, answer, *(choices if whole else [None])]
        if not all(isinstance(text, str) for text in texts) or answer not in [*LETTERS]:
            raise UserError(f"{where}: not a question, one of {', '.join(LETTERS)}, and a text for each")
    problems = [
        {"question": question, "answer": answer, "options": choices}
        for question, answer, choices in zip(questions, answers, options, strict=True)
    ]
    return {"article": held["article"], "problems": str(problems)}


def _wanted(path: Path, names: Mapping[Key, str]) -> dict[Key, bytes]:
    """The members with these names, which are regular expressions. UserError where one is missing."""
    found: dict[Key, bytes] = {}
    for key, name in names.items():
        pattern = re.compile(name)
        contents = [content for _, content in _members(path, pattern)]
        if not contents:
            shown = name.replace(TOP, "").replace("\\", "")
            raise UserError(f"{path}: holds no {shown}")
        found[key] = contents[0]
    return found


Member = tuple[str, bool, int, Callable[[], bytes]]  # name, whether it is a plain file, bytes as stated, its content


def _members(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[re.Match[str], bytes]]:
    """The members of an archive whose names are wanted, and what is in them.

    UserError for an archive that is cut or too large, for a name that leads out of it, for two members of one name, and
    for a wanted one that is a link.
    """
    seen: set[str] = set()
    try:
        for num, (name, is_file, size, read) in enumerate(_zip(path) if path.suffix == ".zip" else _tar(path)):
            place = PurePosixPath(name.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts:
                raise UserError(f"{path}: its member {name[:80]!r} leads out of the archive: it is not as published")
            if num >= MAX_MEMBERS:
                raise UserError(f"{path}: has more than {MAX_MEMBERS:,} members: it is not as published")
            match = wanted.fullmatch(str(place))
            if match is None:
                continue
            if not is_file or str(place) in seen:
                what = "there twice" if is_file else "no plain file"
                raise UserError(f"{path}: its member {name} is {what}: it is not as published")
            if size > MAX_MEMBER_BYTES or len(content := read()) > MAX_MEMBER_BYTES:
                raise UserError(f"{path}: its member {name} has more than {MAX_MEMBER_BYTES:,} bytes")
            seen.add(str(place))
            yield match, content
    except BROKEN as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _zip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            is_file = not info.is_dir() and (stat.S_IFMT(mode) in (0, stat.S_IFREG))
            yield info.filename, is_file, info.file_size, partial(_start_of, archive, info)


def _start_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member's bytes, no more than can be told to be too many: what an archive says of their number may be wrong."""
    with archive.open(info) as file:
        return file.read(MAX_MEMBER_BYTES + 1)


def _tar(path: Path) -> Iterator[Member]:
    with gzip.open(path) as unpacked, tarfile.open(fileobj=_Bounded(unpacked, path), mode="r|") as archive:
        for info in archive:

            def read(info: tarfile.TarInfo = info) -> bytes:
                file = archive.extractfile(info)
                return b"" if file is None else file.read()

            yield info.name, info.isreg(), info.size, read


class _Bounded(io.BufferedIOBase):
    """A stream that refuses to give more than :data:`MAX_BYTES`."""

    def __init__(self, inner: gzip.GzipFile, path: Path) -> None:
        self._inner, self._path, self._left = inner, path, MAX_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes. UserError once there were too many."""
        data = self._inner.read(self._left + 1 if size is None or size < 0 else min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise UserError(f"{self._path}: has more than {MAX_BYTES:,} bytes once it is unpacked")
        return data
