"""Benchmark files in the columns that lm-eval's stock tasks expect: converted from the published files, and read.

``prepare`` turns the files as gsm8k, MGSM, MMLU, MATH-500 and HellaSwag publish them into ``DIR/NAME/SPLIT.jsonl``.
``run --data-dir DIR`` then reads ``DIR/TASK/SPLIT.jsonl``, or the folder of the data set that several stock tasks share
(:func:`folders`). Standard library only.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean
from twotower_eval.strict import (
    BOM,
    JsonObject,
    check_whole_numbers,
    decode_utf8,
    parse_json,
    walk,
)

Rows = Iterator[dict[str, object]]

# Data set on the hub -> folder under the data directory; {} is the data set's configuration (subject, language).
SHARED_FOLDERS = {
    "openai/gsm8k": "gsm8k",
    "juletxara/mgsm": "mgsm_{}",
    "cais/mmlu": "mmlu_{}",
    "HuggingFaceH4/MATH-500": "math500",
    "Rowan/hellaswag": "hellaswag",
}


@dataclass(frozen=True, kw_only=True)
class PreparedFile:
    """One file written by :func:`prepare`."""

    path: Path
    num_rows: int


def folders(task: str, dataset: str | None, configuration: str | None) -> list[str]:
    """Folders under a data directory that may hold a stock task's data, the task's own name first."""
    shared = SHARED_FOLDERS.get(dataset or "")
    return [task] if shared is None else list(dict.fromkeys([task, shared.format(configuration)]))


def prepare(source: Path, target: Path, names: Sequence[str] | None = None) -> list[PreparedFile]:
    """Write stock-column files under ``target`` from the published files under ``source``.

    ``names`` are some of gsm8k, mgsm, mmlu, math500, hellaswag; by default all that have a folder under ``source``.
    UserError for a missing file or an unexpected line. Each file is replaced whole or not at all.
    """
    for name in names or ():
        if name not in BENCHMARKS:
            raise UserError(f"unknown benchmark {name!r}{did_you_mean(name, BENCHMARKS)}")
    chosen = list(names or [name for name in BENCHMARKS if (source / name).is_dir()])
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if not chosen:
        raise UserError(f"{source} has none of the folders {', '.join(BENCHMARKS)}")
    written = []
    for name in chosen:
        if not (source / name).is_dir():
            raise UserError(f"{source} has no folder {name}")
        for folder, split, rows in BENCHMARKS[name](source / name):
            path = target / folder / f"{split}.jsonl"
            written.append(PreparedFile(path=path, num_rows=_write_jsonl(path, rows)))
    return written


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """All rows of a JSONL file, which must all have the same columns; anything else is a UserError."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path) -> list[tuple[int, dict[str, object]]]:
    """The rows of a JSONL file with their line numbers.

    All must have the same columns, each of one type. UserError, with file and line, for anything else, and for numbers
    and texts that no table can hold.
    """
    rows: list[tuple[int, dict[str, object]]] = []
    kinds: dict[str, tuple[str, int]] = {}
    # No JSON text holds a bare carriage return, so that one ends a line, as on old machines.
    for number, line in enumerate(_text(path).replace("\r", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict) or not row or (rows and row.keys() != rows[0][1].keys()):
            raise UserError(f"{where}: not a JSON object with the columns of the first line")
        check_whole_numbers(row, where)
        for column, value in walk(row):
            if value is not None:
                kind, first = kinds.setdefault(column, (_kind(value), number))
                if kind != _kind(value):
                    raise UserError(f"{where}, {column!r}: {_kind(value)}, but {kind} in line {first}")
        rows.append((number, row))
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def _kind(value: object) -> str:
    words = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return words.get(type(value), "an object")


def _gsm8k(source: Path) -> Iterator[tuple[str, str, Rows]]:
    for split in ("test", "train"):
        yield "gsm8k", split, _copied(source / f"{split}.jsonl", {"question": str, "answer": str})


def _math500(source: Path) -> Iterator[tuple[str, str, Rows]]:
    # Some copies leave out unique_id, which no stock prompt reads.
    columns = {"problem": str, "solution": str, "answer": str, "subject": str, "level": int}
    yield "math500", "test", _copied(source / "test.jsonl", columns)


def _copied(path: Path, columns: Mapping[str, type]) -> Rows:
    for number, row in numbered_rows(path):
        for column, kind in columns.items():
            if type(row.get(column)) is not kind:  # true is no int
                raise UserError(f"{path}, line {number}: column {column!r} is missing or no {kind.__name__}")
            _check_mark(row[column], f"{path}, line {number}")
        yield {column: row[column] for column in columns}


def _mgsm(source: Path) -> Iterator[tuple[str, str, Rows]]:
    paths = sorted(source.glob("mgsm_*.tsv"))
    if not paths:
        raise UserError(f"{source}: no file mgsm_LANGUAGE.tsv")
    for path in paths:
        yield path.stem, "test", _mgsm_rows(path)


def _mgsm_rows(path: Path) -> Rows:
    # The published file has no worked solutions, which the stock prompts want to see as null, not missing.
    for number, line in enumerate(_text(path).rstrip("\n").split("\n"), start=1):
        cells = line.split("\t")
        if len(cells) != 2 or not re.fullmatch(r"-?\d[\d,]{0,23}", cells[1].strip()):
            raise UserError(f"{path}, line {number}: not a question, a tab and a whole number")
        _check_mark(cells[0], f"{path}, line {number}")
        answer = int(cells[1].replace(",", ""))
        check_whole_numbers(answer, f"{path}, line {number}")
        yield {"question": cells[0], "answer": None, "answer_number": answer, "equation_solution": None}


def _mmlu(source: Path) -> Iterator[tuple[str, str, Rows]]:
    for split in ("test", "dev"):
        paths = sorted((source / split).glob(f"*_{split}.csv"))
        if not paths:
            raise UserError(f"{source / split}: no file SUBJECT_{split}.csv")
        for path in paths:
            subject = path.stem.removesuffix(f"_{split}")
            yield f"mmlu_{subject}", split, _mmlu_rows(path, subject)


def _mmlu_rows(path: Path, subject: str) -> Rows:
    # There are two forms: the original without a header and with a letter, and one with a header and an index.
    for number, cells in _csv_records(path):
        if number == 1 and cells[:1] == ["question"] and cells[-1:] == ["answer"]:
            continue
        if len(cells) != 6 or cells[5] not in tuple("0123ABCD"):
            raise UserError(f"{path}, line {number}: not a question, four choices and an answer (0-3 or A-D)")
        for cell in cells:
            _check_mark(cell, f"{path}, line {number}")
        answer = int(cells[5]) if cells[5].isdigit() else "ABCD".index(cells[5])
        yield {"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": answer}


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """CSV records with the line on which each begins; a quoted field may span lines."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        line = 1
        for record in reader:
            yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _hellaswag(source: Path) -> Iterator[tuple[str, str, Rows]]:
    yield "hellaswag", "validation", _hellaswag_rows(source / "hellaswag_val_full.txt.bz2")


def _hellaswag_rows(path: Path) -> Rows:
    """Items of six lines: ``activity: context``, index of the right ending, four endings.

    The text form does not say where ``ctx_b``, the unfinished last sentence, begins; it is taken to be what follows
    the last finished sentence. Columns that the text form lost (source, split type) are left out.
    """
    lines = _text(path).rstrip("\n").split("\n")
    if len(lines) % 6:
        raise UserError(f"{path}: {len(lines)} lines, not a multiple of six")
    for index in range(len(lines) // 6):
        head, label, *endings = lines[6 * index : 6 * index + 6]
        activity, colon, context = head.partition(": ")
        if not colon or label not in ("0", "1", "2", "3"):
            raise UserError(f"{path}, line {6 * index + 1}: not 'activity: context' followed by a label from 0 to 3")
        for offset, text in enumerate(lines[6 * index : 6 * index + 6], start=1):
            _check_mark(text, f"{path}, line {6 * index + offset}")
        finished = re.fullmatch(r"(.*[.!?]['\")]*) ([^.!?]+)", context)
        ctx_a, ctx_b = finished.groups() if finished else (context, "")
        yield {
            "ind": index,
            "activity_label": activity,
            "ctx_a": ctx_a,
            "ctx_b": ctx_b,
            "ctx": context,
            "endings": endings,
            "label": label,
        }


BENCHMARKS: dict[str, Callable[[Path], Iterator[tuple[str, str, Rows]]]] = {
    "gsm8k": _gsm8k,
    "mgsm": _mgsm,
    "mmlu": _mmlu,
    "math500": _math500,
    "hellaswag": _hellaswag,
}


def _check_mark(text: object, where: str) -> None:
    """UserError for a text with a byte order mark: files that had one were joined."""
    if isinstance(text, str) and text.startswith(BOM):
        raise UserError(f"{where}: a text begins with a byte order mark (U+FEFF): take it out")


def _text(path: Path) -> str:
    """The text of a UTF-8 file, bz2 or plain, with newlines inside records unchanged."""
    try:
        content = path.read_bytes()
        if path.suffix == ".bz2":
            content = bz2.decompress(content)
    except FileNotFoundError as error:
        raise UserError(f"file {path} is missing") from error
    except (OSError, EOFError, ValueError) as error:  # the last two: a truncated file
        raise UserError(f"cannot read {path}: {error}") from error
    return decode_utf8(content, str(path)).replace("\r\n", "\n")


def _write_jsonl(path: Path, rows: Iterable[JsonObject]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return len(lines)
