"""Where benchmarks are published: their files, licences and numbers of rows; and the readers of parquet, JSON and JSONL
files with the columns that lm-eval's stock tasks expect."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.strict import decode_utf8, parse_json

Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark as it is published.

    ``dataset`` is its name on the Hugging Face hub, ``upstream`` its authors' own place, ``licence`` what is stated
    there, ``files`` what :func:`datafiles.prepare` reads below ``SOURCE/NAME``, in any of these forms. ``scored`` is
    False where scoring executes model output, which is refused.
    """

    name: str
    dataset: str
    upstream: str
    licence: str
    files: tuple[str, ...]
    scored: bool = True

    def fetch(self, source: str = "SOURCE") -> str:
        """The command that fetches it from the hub to where ``prepare`` looks for it."""
        return f"hf download {self.dataset} --repo-type dataset --local-dir {source}/{self.name}"


PUBLISHED = {
    one.name: one
    for one in (
        Benchmark(
            name="arc",
            dataset="allenai/ai2_arc",
            upstream="https://allenai.org/data/arc (ARC-V1-Feb2018.zip)",
            licence="CC-BY-SA-4.0",
            files=("ARC-Challenge/SPLIT-*.parquet", "ARC-Easy/SPLIT-*.parquet"),
        ),
        Benchmark(
            name="winogrande",
            dataset="allenai/winogrande",
            upstream="https://github.com/allenai/winogrande (winogrande_1.1.zip)",
            licence="CC-BY (as upstream states for the data)",
            files=("winogrande_xl/SPLIT-*.parquet", "train_xl.jsonl and dev.jsonl"),
        ),
        Benchmark(
            name="race",
            dataset="EleutherAI/race",
            upstream="https://www.cs.cmu.edu/~glai1/data/race (RACE.tar.gz)",
            licence="for non-commercial research only",
            files=("high/test-*.parquet",),
        ),
        Benchmark(
            name="mmlu",
            dataset="cais/mmlu",
            upstream="https://github.com/hendrycks/test (data.tar)",
            licence="MIT",
            files=("SUBJECT/test-*.parquet and SUBJECT/dev-*.parquet", "test/SUBJECT_test.csv and dev/SUBJECT_dev.csv"),
        ),
        Benchmark(
            name="mmlu_pro",
            dataset="TIGER-Lab/MMLU-Pro",
            upstream="https://github.com/TIGER-AI-Lab/MMLU-Pro",
            licence="MIT",
            files=("data/test-*.parquet and data/validation-*.parquet",),
        ),
        Benchmark(
            name="global_mmlu_lite",
            dataset="CohereLabs/Global-MMLU-Lite",
            upstream="the same",
            licence="Apache-2.0",
            files=("LANGUAGE/test-*.parquet and LANGUAGE/dev-*.parquet",),
        ),
        Benchmark(
            name="math500",
            dataset="HuggingFaceH4/MATH-500",
            upstream="https://github.com/openai/prm800k",
            licence="MIT",
            files=("test.jsonl",),
        ),
        Benchmark(
            name="mbpp",
            dataset="google-research-datasets/mbpp",
            upstream="https://github.com/google-research/google-research/tree/master/mbpp",
            licence="CC-BY-4.0",
            files=("full/SPLIT-*.parquet", "sanitized/SPLIT-*.parquet", "mbpp.jsonl", "sanitized-mbpp.json"),
            scored=False,
        ),
        Benchmark(
            name="humaneval",
            dataset="openai/openai_humaneval",
            upstream="https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)",
            licence="MIT",
            files=("openai_humaneval/test-*.parquet", "HumanEval.jsonl.gz", "HumanEval.jsonl"),
            scored=False,
        ),
        Benchmark(
            name="gsm8k",
            dataset="openai/gsm8k",
            upstream="https://github.com/openai/grade-school-math",
            licence="MIT",
            files=("main/test-*.parquet and main/train-*.parquet", "test.jsonl and train.jsonl"),
        ),
        Benchmark(
            name="mgsm",
            dataset="juletxara/mgsm",
            upstream="https://github.com/google-research/url-nlp/tree/main/mgsm",
            licence="CC-BY-SA-4.0 on the hub, CC-BY-4.0 upstream",
            files=("mgsm_LANGUAGE.tsv",),
        ),
        Benchmark(
            name="hellaswag",
            dataset="Rowan/hellaswag",
            upstream="https://github.com/rowanz/hellaswag",
            licence="MIT",
            files=("hellaswag_val_full.txt.bz2",),
        ),
    )
}

# Folder under the data directory -> split -> rows as published; * stands for any language.
NUM_ROWS: Mapping[str, Mapping[str, int]] = {
    "arc_challenge": {"train": 1_119, "validation": 299, "test": 1_172},
    "arc_easy": {"train": 2_251, "validation": 570, "test": 2_376},
    "winogrande_xl": {"train": 40_398, "validation": 1_267},
    "race_high": {"test": 1_045},
    "mmlu_pro": {"test": 12_032, "validation": 70},
    "global_mmlu_lite_*": {"test": 400, "dev": 215},
    "math500": {"test": 500},
    "mbpp_full": {"train": 374, "test": 500, "validation": 90, "prompt": 10},
    "mbpp_sanitized": {"train": 120, "test": 257, "validation": 43, "prompt": 7},
    "humaneval": {"test": 164},
    "gsm8k": {"train": 7_473, "test": 1_319},
    "mgsm_*": {"test": 250},
    "mmlu_*": {"dev": 5},
    "hellaswag": {"validation": 10_042},
}


def num_published(folder: str, split: str) -> int | None:
    """The number of rows that a split has as published; None where that is not known."""
    if folder in NUM_ROWS:
        return NUM_ROWS[folder].get(split)
    near = next((name for name in NUM_ROWS if name.endswith("*") and folder.startswith(name[:-1])), None)
    return None if near is None else NUM_ROWS[near].get(split)


def rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a parquet, JSON or JSONL file (also gzipped), each with its place; UserError for a file that is cut
    or broken."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    content = _bytes(path)
    if path.name.endswith(".json"):
        found = parse_json(decode_utf8(content, str(path)), str(path))
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise UserError(f"{path}: not a list of JSON objects")
        yield from ((f"{path}, entry {number}", row) for number, row in enumerate(found, start=1))
        return
    yield from jsonl_rows(content, str(path))


def jsonl_rows(content: bytes, where: str) -> Iterator[tuple[str, Row]]:
    """The objects of a JSONL text, each with its place."""
    for number, line in enumerate(decode_utf8(content, where).split("\n"), start=1):
        if line.strip():
            row = parse_json(line, f"{where}, line {number}")
            if not isinstance(row, dict):
                raise UserError(f"{where}, line {number}: not a JSON object")
            yield f"{where}, line {number}", row


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    from pyarrow import ArrowException, parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: not a whole parquet file ({str(error).splitlines()[0]})") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def first_file(source: Path, patterns: tuple[str, ...]) -> Path | None:
    """The file of the first pattern that has one; UserError where a split lies in several, of which one would be
    left out."""
    for pattern in patterns:
        found = sorted(source.glob(pattern))
        if len(found) > 1:
            raise UserError(f"{source} has {len(found)} files {pattern}: join them, or keep one")
        if found:
            return found[0]
    return None


def checked_rows(path: Path, columns: Mapping[str, type]) -> Iterator[Row]:
    """The rows of a file in these columns alone; UserError, with the place, for one that lacks a column or whose value
    is of another type."""
    for where, row in rows_of(path):
        for column, kind in columns.items():
            if type(row.get(column)) is not kind:  # true is no int
                raise UserError(f"{where}: column {column!r} is missing or no {kind.__name__}")
        yield {column: row[column] for column in columns}
