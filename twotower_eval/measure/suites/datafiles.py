"""Benchmark files in the columns that lm-eval's stock tasks expect: converted from the published files, and read.

``prepare`` turns the files that benchmarks publish (:mod:`published`) into ``DIR/NAME/SPLIT.jsonl``. ``run --data-dir
DIR`` then reads ``DIR/TASK/SPLIT.jsonl``, or the folder of the data set that several stock tasks share
(:func:`folders`).
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
from twotower_eval.measure.suites import archives
from twotower_eval.measure.suites.published import PUBLISHED, checked_rows, first_file, num_published
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

SHARED_FOLDERS = {one.dataset: one.folder for one in PUBLISHED.values()}  # data set on the hub -> folder


@dataclass(frozen=True, kw_only=True)
class PreparedFile:
    """One file written by :func:`prepare`."""

    path: Path
    num_rows: int


def folders(task: str, dataset: str | None, configuration: str | None) -> list[str]:
    """Folders under a data directory that may hold a stock task's data, the task's own name first."""
    shared = SHARED_FOLDERS.get(dataset or "")
    own = str(configuration).lower().replace("-", "_")
    return [task] if shared is None else list(dict.fromkeys([task, shared.format(own)]))


def prepare(
    source: Path, target: Path, names: Sequence[str] | None = None, *, whole: bool = False
) -> list[PreparedFile]:
    """Write stock-column files under ``target`` from the published files under ``source``.

    ``names`` are some of ``BENCHMARKS``; by default all that have a folder under ``source``. ``whole`` refuses a file
    with another number of rows than was published. UserError for a missing file or an unexpected line, with the
    command that fetches what is missing. Each file is replaced whole or not at all.
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
            raise UserError(f"{source} has no folder {name}; to fetch it: {PUBLISHED[name].fetch(str(source))}")
        for folder, split, rows in BENCHMARKS[name](source / name):
            path = target / folder / f"{split}.jsonl"
            held = list(rows)
            expected = num_published(name, folder, split) if whole else None
            if expected is not None and len(held) != expected:
                known = "num_rows" not in PUBLISHED[name].unchecked
                raise UserError(
                    f"{source / name}: {folder} {split} has {len(held):,} rows, but {expected:,} are published"
                    f"{'' if known else ' (a number that was not checked here)'}: the file is cut or of another "
                    "version; --partial takes it as it is"
                )
            written.append(PreparedFile(path=path, num_rows=_write_jsonl(path, held)))
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


Made = Iterator[tuple[str, str, Rows]]  # folder, split, rows


def _splits(source: Path, folder: str, splits: Mapping[str, tuple[str, ...]], columns: Mapping[str, type]) -> Made:
    """The splits of one folder, each from the first of its patterns that has a file."""
    for split, patterns in splits.items():
        path = first_file(source, patterns)
        if path is None:
            fetch = PUBLISHED[source.name].fetch(str(source.parent))
            raise UserError(f"{source}: no file {' or '.join(patterns)}; to fetch it: {fetch}")
        yield folder, split, checked_rows(path, columns)


def _hub(place: str, *splits: str) -> dict[str, tuple[str, ...]]:
    """The patterns of a data set's files as the hub has them."""
    return {split: (f"{place}/{split}-*.parquet",) for split in splits}


def _arc(source: Path) -> Made:
    columns = {"id": str, "question": str, "choices": dict, "answerKey": str}
    places = [one for one in ("ARC-Challenge", "ARC-Easy") if (source / one).is_dir()]
    if not places and (archive := first_file(source, ("ARC-V1-Feb2018*.zip",))) is not None:
        yield from archives.arc(archive)
        return
    for place in places or ["ARC-Challenge"]:
        yield from _splits(source, place.lower().replace("-", "_"), _hub(place, "train", "validation", "test"), columns)


def _winogrande(source: Path) -> Made:
    places = {"train": "train_xl.jsonl", "validation": "dev.jsonl"}
    splits = {split: (*_hub("winogrande_xl", split)[split], file) for split, file in places.items()}
    columns = {"sentence": str, "option1": str, "option2": str, "answer": str}
    archive = first_file(source, ("winogrande_*.zip",))
    if archive is not None and all(first_file(source, patterns) is None for patterns in splits.values()):
        yield from archives.winogrande(archive, columns)
        return
    yield from _splits(source, "winogrande_xl", splits, columns)


def _race(source: Path) -> Made:
    patterns, archive = _hub("high", "test"), source / "RACE.tar.gz"
    if archive.is_file() and first_file(source, patterns["test"]) is None:
        yield from archives.race(archive)
        return
    yield from _splits(source, "race_high", patterns, {"article": str, "problems": str})


def _mmlu_pro(source: Path) -> Made:
    columns = {"question_id": int, "question": str, "options": list, "answer": str, "answer_index": int}
    columns |= {"cot_content": str, "category": str, "src": str}
    yield from _splits(source, "mmlu_pro", _hub("data", "test", "validation"), columns)


def _global_mmlu_lite(source: Path) -> Made:
    columns = {"sample_id": str, "subject": str, "subject_category": str, "question": str, "answer": str}
    columns |= {f"option_{letter}": str for letter in "abcd"}
    languages = sorted({path.parent.name for path in source.glob("*/test-*.parquet")}) or ["en"]
    for language in languages:
        yield from _splits(source, f"global_mmlu_lite_{language}", _hub(language, "test", "dev"), columns)


MBPP_IDS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}


def _mbpp(source: Path) -> Made:
    """Both sets: from the hub in their splits, from upstream in one file, whose splits go by number."""
    full = {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str}
    full |= {"challenge_test_list": list}
    sanitized = {"task_id": int, "prompt": str, "code": str, "test_list": list, "test_imports": list}
    forms = (("full", full, "mbpp.jsonl"), ("sanitized", sanitized, "sanitized-mbpp.json"))
    there = [form for form in forms if (source / form[0]).is_dir() or (source / form[2]).is_file()]
    for place, columns, file in there or forms[:1]:
        if not (source / file).is_file():
            yield from _splits(source, f"mbpp_{place}", _hub(place, *MBPP_IDS), columns)
            continue
        rows = list(checked_rows(source / file, columns))
        for split, ids in MBPP_IDS.items():
            yield f"mbpp_{place}", split, iter([row for row in rows if row["task_id"] in ids])


def _humaneval(source: Path) -> Made:
    columns = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), str)
    patterns = (*_hub("openai_humaneval", "test")["test"], "HumanEval.jsonl.gz", "HumanEval.jsonl")
    yield from _splits(source, "humaneval", {"test": patterns}, columns)


def _gsm8k(source: Path) -> Iterator[tuple[str, str, Rows]]:
    if (source / "main").is_dir():
        yield from _splits(source, "gsm8k", _hub("main", "test", "train"), {"question": str, "answer": str})
        return
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
    columns = {"question": str, "subject": str, "choices": list, "answer": int}
    subjects = sorted({path.parent.name for path in source.glob("*/test-*.parquet")} - {"all", "auxiliary_train"})
    for subject in subjects:
        yield from _splits(source, f"mmlu_{subject}", _hub(subject, "test", "dev"), columns)
    if subjects:
        return
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
    "arc": _arc,
    "winogrande": _winogrande,
    "race": _race,
    "mmlu_pro": _mmlu_pro,
    "global_mmlu_lite": _global_mmlu_lite,
    "mbpp": _mbpp,
    "humaneval": _humaneval,
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
