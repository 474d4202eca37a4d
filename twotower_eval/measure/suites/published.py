"""Where benchmarks are published: their files, licences and numbers of rows; and the readers of parquet, JSON and JSONL
files with the columns that lm-eval's stock tasks expect."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twotower_eval.errors import UserError
from twotower_eval.strict import decode_utf8, parse_json

Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark as it is published.

    ``dataset`` is its name on the Hugging Face hub, ``upstream`` its authors' own place, ``licence`` what is stated
    there, ``files`` what :func:`datafiles.prepare` reads below ``SOURCE/NAME``, in any of these forms. It writes to
    ``folder`` under the data directory, in which {} is the configuration (subject, language). ``num_rows`` are those of
    each folder's splits as published; * stands for any configuration. ``scored`` is False where scoring executes model
    output, which is refused.

    Licences and numbers of rows are those that published files show, unless they are ``unchecked``: nothing here could
    confirm these.
    """

    name: str
    dataset: str
    upstream: str
    licence: str
    files: tuple[str, ...]
    folder: str
    num_rows: Mapping[str, Mapping[str, int]]
    unchecked: frozenset[Literal["licence", "num_rows"]] = frozenset()
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
            upstream="https://allenai.org/data/arc (ARC-V1-Feb2018-2.zip)",
            licence="CC-BY-SA-4.0",
            files=("ARC-Challenge/SPLIT-*.parquet", "ARC-Easy/SPLIT-*.parquet", "ARC-V1-Feb2018-2.zip"),
            folder="{}",
            num_rows={
                "arc_challenge": {"train": 1_119, "validation": 299, "test": 1_172},
                "arc_easy": {"train": 2_251, "validation": 570, "test": 2_376},
            },
            unchecked=frozenset({"licence", "num_rows"}),
        ),
        Benchmark(
            name="winogrande",
            dataset="allenai/winogrande",
            upstream="https://github.com/allenai/winogrande (winogrande_1.1.zip)",
            licence="CC-BY",
            files=("winogrande_xl/SPLIT-*.parquet", "train_xl.jsonl and dev.jsonl", "winogrande_1.1.zip"),
            folder="{}",
            num_rows={"winogrande_xl": {"train": 40_398, "validation": 1_267}},
            unchecked=frozenset({"licence", "num_rows"}),
        ),
        Benchmark(
            name="race",
            dataset="EleutherAI/race",
            upstream="https://www.cs.cmu.edu/~glai1/data/race (RACE.tar.gz)",
            licence="for non-commercial research only",
            files=("high/test-*.parquet", "RACE.tar.gz"),
            folder="race_{}",
            num_rows={"race_high": {"test": 1_045}},
            unchecked=frozenset({"licence", "num_rows"}),
        ),
        Benchmark(
            name="mmlu",
            dataset="cais/mmlu",
            upstream="https://github.com/hendrycks/test (data.tar)",
            licence="MIT",
            files=("SUBJECT/test-*.parquet and SUBJECT/dev-*.parquet", "test/SUBJECT_test.csv and dev/SUBJECT_dev.csv"),
            folder="mmlu_{}",
            num_rows={"mmlu_*": {"dev": 5}},
        ),
        Benchmark(
            name="mmlu_pro",
            dataset="TIGER-Lab/MMLU-Pro",
            upstream="https://github.com/TIGER-AI-Lab/MMLU-Pro",
            licence="MIT",
            files=("data/test-*.parquet and data/validation-*.parquet",),
            folder="mmlu_pro",
            num_rows={"mmlu_pro": {"test": 12_032, "validation": 70}},
            unchecked=frozenset({"licence", "num_rows"}),
        ),
        Benchmark(
            name="global_mmlu_lite",
            dataset="CohereLabs/Global-MMLU-Lite",
            upstream="the same",
            licence="Apache-2.0",
            files=("LANGUAGE/test-*.parquet and LANGUAGE/dev-*.parquet",),
            folder="global_mmlu_lite_{}",
            num_rows={"global_mmlu_lite_*": {"test": 400, "dev": 215}},
            unchecked=frozenset({"licence", "num_rows"}),
        ),
        Benchmark(
            name="math500",
            dataset="HuggingFaceH4/MATH-500",
            upstream="https://github.com/openai/prm800k",
            licence="MIT",
            files=("test.jsonl",),
            folder="math500",
            num_rows={"math500": {"test": 500}},
        ),
        Benchmark(
            name="mbpp",
            dataset="google-research-datasets/mbpp",
            upstream="https://github.com/google-research/google-research/tree/master/mbpp",
            licence="CC-BY-4.0",
            files=("full/SPLIT-*.parquet", "sanitized/SPLIT-*.parquet", "mbpp.jsonl", "sanitized-mbpp.json"),
            folder="mbpp_{}",
            num_rows={
                "mbpp_full": {"train": 374, "test": 500, "validation": 90, "prompt": 10},
                "mbpp_sanitized": {"train": 120, "test": 257, "validation": 43, "prompt": 7},
            },
            unchecked=frozenset({"licence"}),
            scored=False,
        ),
        Benchmark(
            name="humaneval",
            dataset="openai/openai_humaneval",
            upstream="https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)",
            licence="MIT",
            files=("openai_humaneval/test-*.parquet", "HumanEval.jsonl.gz", "HumanEval.jsonl"),
            folder="humaneval",
            num_rows={"humaneval": {"test": 164}},
            scored=False,
        ),
        Benchmark(
            name="gsm8k",
            dataset="openai/gsm8k",
            upstream="https://github.com/openai/grade-school-math",
            licence="MIT",
            files=("main/test-*.parquet and main/train-*.parquet", "test.jsonl and train.jsonl"),
            folder="gsm8k",
            num_rows={"gsm8k": {"train": 7_473, "test": 1_319}},
        ),
        Benchmark(
            name="mgsm",
            dataset="juletxara/mgsm",
            upstream="https://github.com/google-research/url-nlp/tree/main/mgsm",
            licence="CC-BY-4.0",
            files=("mgsm_LANGUAGE.tsv",),
            folder="mgsm_{}",
            num_rows={"mgsm_*": {"test": 250}},
        ),
        Benchmark(
            name="hellaswag",
            dataset="Rowan/hellaswag",
            upstream="https://github.com/rowanz/hellaswag",
            licence="MIT",
            files=("hellaswag_val_full.txt.bz2",),
            folder="hellaswag",
            num_rows={"hellaswag": {"validation": 10_042}},
        ),
    )
}


def num_published(name: str, folder: str, split: str) -> int | None:
    """The number of rows that a split of a benchmark's folder has as published; None where that is not known."""
    known = PUBLISHED[name].num_rows
    near = next((one for one in known if one.endswith("*") and folder.startswith(one[:-1])), "")
    return known.get(folder, known.get(near, {})).get(split)


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
    """The rows of a file in these columns alone, as :func:`checked` gives them."""
    return checked(rows_of(path), columns)


def checked(rows: Iterable[tuple[str, Mapping[str, object]]], columns: Mapping[str, type]) -> Iterator[Row]:
    """Rows in these columns alone; UserError, with the place, for one that lacks a column or whose value is of another
    type."""
    for where, row in rows:
        for column, kind in columns.items():
            if type(row.get(column)) is not kind:  # true is no int
                raise UserError(f"{where}: column {column!r} is missing or no {kind.__name__}")
        yield {column: row[column] for column in columns}
