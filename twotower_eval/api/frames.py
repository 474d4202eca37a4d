"""Journals as pandas frames: one row per journal row, with the arm and the operating point beside it, and prompts and
targets where files on this machine hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Literal, TypeVar

import pandas as pd

from twotower_eval.analyse.compare.points import checkpoint_name
from twotower_eval.errors import UserError
from twotower_eval.records import (
    Cell,
    Check,
    CostSample,
    Generation,
    GenerationRow,
    LikelihoodRow,
    Score,
    SpeedSample,
    canonical_json,
    sha256_text,
)
from twotower_eval.resources import data_path
from twotower_eval.store import Run
from twotower_eval.store.journal import read_objects


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text whose hash a run recorded; ``option`` is set where the hash covers a context and an option after it."""

    text: str
    option: str | None = None


def known_texts(run: Run) -> dict[str, Text]:
    """sha256 -> text, for those prompts and targets of the run that it keeps itself or files on this machine hold.

    Prompts with few-shot examples, and prompts that lm-eval builds from several fields, are in no file and are not
    found.
    """
    wanted = _recorded(run)
    own = (text for one in run.documents for text in (one.question, one.target))
    found = {digest: Text(text=text) for text in own if (digest := sha256_text(text)) in wanted}
    for file in _files(run):
        with contextlib.suppress(UserError):  # not a JSONL file of ours: no text to find in it
            for _, row in read_objects(file):
                found |= {digest: text for digest, text in _texts(row) if digest in wanted}
    return found


def _recorded(run: Run) -> set[str]:
    found = {row.prompt_sha256 for rows in (run.generations, run.likelihoods) for row in rows}
    for score in run.scores:
        found |= {score.prompt_sha256, score.target_sha256}
    return found


def _files(run: Run) -> Iterator[Path]:
    """The data files of the run's tasks: shipped ones, and those under ``data_dir``."""
    tasks = sorted({row.task for rows in (run.scores, run.generations, run.likelihoods) for row in rows})
    folder = run.manifest.plan.get("data_dir")
    for task in tasks:
        shipped = data_path("tasks", "miniature", f"{task}.jsonl")
        if shipped.is_file():
            yield shipped
        elif folder is not None:
            yield from sorted((Path(str(folder)) / task).glob("*.jsonl"))


def _texts(row: Mapping[str, object]) -> Iterator[tuple[str, Text]]:
    """Every text of a row by its hash (numbers as lm-eval writes them), and each text followed by each option."""
    plain = [str(value) for value in row.values() if isinstance(value, str | int)]
    yield from ((sha256_text(text), Text(text=text)) for text in plain)
    lists = [value for value in row.values() if isinstance(value, list) and all(isinstance(one, str) for one in value)]
    for text, options in product(plain, lists):
        digests = [sha256_text(canonical_json([text, option])) for option in options]
        yield from zip(digests, (Text(text=text, option=option) for option in options), strict=True)
        yield sha256_text("".join(digests)), Text(text=text)  # of all requests of a document together


R = TypeVar("R", GenerationRow, LikelihoodRow, Score, SpeedSample, CostSample, Check)
Columns = Mapping[str, Callable[[R], object]]
Texts = Mapping[str, Text]
Document = tuple[str, int]  # task and number
OF_CELLS = ("run", "arm", "model", "dtype", "decoder")


def scores(run: Run, texts: Texts) -> pd.DataFrame:
    """A row for each document, metric and filter; ``answer`` and counts are of the first sample (or timed round)."""
    first: dict[tuple[str, str, int], Generation] = {}
    for row in sorted(run.generations, key=lambda row: (row.request_index, row.repeat)):
        first.setdefault((row.cell, row.task, row.doc_id), row.generation)

    def made(name: str) -> Callable[[Score], object]:
        return lambda row: getattr(first.get((row.cell, row.task, row.doc_id)), name, None)

    columns: Columns[Score] = {
        "task": lambda row: row.task,
        "doc_id": lambda row: row.doc_id,
        "prompt": lambda row: _text(texts, row.prompt_sha256),
        "target": lambda row: _text(texts, row.target_sha256),
        "answer": made("text"),
        "metric": lambda row: row.metric,
        "filter": lambda row: row.filter,
        "value": lambda row: row.value,
        "missing_reason": lambda row: row.missing_reason,
        "scored_by": lambda row: row.scored_by,
        "headline": lambda row: row.headline,
        "higher_is_better": lambda row: row.higher_is_better,
        "chance": lambda row: row.chance,
        "cluster_id": lambda row: row.cluster_id,
        "group": lambda row: row.group,
        "finish": made("finish"),
        **{name: made(name) for name in COUNTS},
    }
    return _frame(run, run.scores, columns)


def generations(run: Run, texts: Texts) -> pd.DataFrame:
    """A row for each answer; in a speed run ``repeat`` is the round in which it was timed."""
    targets = _targets(run, texts)
    columns: Columns[GenerationRow] = {
        "task": lambda row: row.task,
        "doc_id": lambda row: row.doc_id,
        "request_index": lambda row: row.request_index,
        "repeat": lambda row: row.repeat,
        "prompt": lambda row: _text(texts, row.prompt_sha256),
        "target": lambda row: targets.get((row.task, row.doc_id)),
        "answer": lambda row: row.generation.text,
        "finish": lambda row: row.generation.finish,
        "num_prompt_tokens": lambda row: row.generation.num_prompt_tokens,
        **{name: _of_generation(name) for name in COUNTS},
    }
    return _frame(run, run.generations, columns)


def likelihoods(run: Run, texts: Texts) -> pd.DataFrame:
    """A row for each scored continuation; those of equal models appear once, under the first cell that needed them."""
    targets = _targets(run, texts)
    columns: Columns[LikelihoodRow] = {
        "task": lambda row: row.task,
        "doc_id": lambda row: row.doc_id,
        "request_index": lambda row: row.request_index,
        "repeat": lambda row: row.repeat,
        "prompt": lambda row: _text(texts, row.prompt_sha256),
        "option": lambda row: getattr(texts.get(row.prompt_sha256), "option", None),
        "target": lambda row: targets.get((row.task, row.doc_id)),
        "request": lambda row: row.request,
        "num_tokens": lambda row: row.num_tokens,
        "logprob_nats": lambda row: row.likelihood.logprob_nats,
        "is_greedy": lambda row: row.likelihood.is_greedy,
        "kind": lambda row: row.likelihood.kind,
        "stderr_nats": lambda row: row.likelihood.stderr_nats,
        "num_draws": lambda row: row.likelihood.num_draws,
    }
    return _frame(run, run.likelihoods, columns)


def speed(run: Run, texts: Texts) -> pd.DataFrame:
    """A row for each timed call. Counts add up all of its prompts; a call on one prompt also has its document.

    Speedups use the rows of the phase ``measure`` only; warm-up rounds and probes are left out.
    """
    targets = _targets(run, texts)
    answers = {(row.cell, row.repeat, row.generation.prompt_id): row for row in run.generations}

    def answer(row: SpeedSample) -> GenerationRow | None:
        alone = len(row.prompts) == 1 and row.phase == "measure"
        return answers.get((row.cell, row.round, row.prompts[0].prompt_id)) if alone else None

    def target(row: SpeedSample) -> str | None:
        found = answer(row)
        return None if found is None else targets.get((found.task, found.doc_id))

    def total(name: str) -> Callable[[SpeedSample], object]:
        return lambda row: _sum([getattr(prompt, name) for prompt in row.prompts])

    def passes(kind: str) -> Callable[[SpeedSample], object]:
        return lambda row: sum(one.num for one in row.passes if one.kind == kind) if row.passes else None

    columns: Columns[SpeedSample] = {
        "task": lambda row: getattr(answer(row), "task", None),
        "doc_id": lambda row: getattr(answer(row), "doc_id", None),
        "prompt": lambda row: _text(texts, getattr(answer(row), "prompt_sha256", "")),
        "target": target,
        "answer": lambda row: None if (found := answer(row)) is None else found.generation.text,
        **{name: _field(name) for name in ("launch_id", "round", "phase", "replica", "call_id", "batch_size")},
        **{name: _field(name) for name in ("wall_s", "prefill_s", "first_output_s", "cpu_s", "caller_cpu_s")},
        **{name: _field(name) for name in ("off_clock_s", "peak_memory_bytes", "energy_j")},
        **{name: _field(name) for name in ("fault", "held_out", "started_at")},
        "num_prompt_tokens": total("num_prompt_tokens"),
        **{name: total(name) for name in COUNTS},
        **{f"num_{kind}_passes": passes(kind) for kind in ("prefill", "extend", "denoise")},
    }
    return _frame(run, run.speed, columns)


def costs(run: Run) -> pd.DataFrame:
    """A row for each part of decoding that was timed alone."""
    return _frame(run, run.costs, {name: _field(name) for name in CostSample.__dataclass_fields__ if name != "cell"})


def checks(run: Run) -> pd.DataFrame:
    """A row for each check of ``verify``."""
    return _frame(run, run.checks, {name: _field(name) for name in Check.__dataclass_fields__ if name != "cell"})


COUNTS = (
    "num_tokens",
    "num_discarded_tokens",
    "num_context_forwards",
    "num_denoiser_forwards",
    "num_forced_commits",
)


def _sum(parts: Sequence[int | None]) -> int | None:
    """``None`` where there is no part, or where the decoder did not say one of them: that is not 0."""
    known = [part for part in parts if part is not None]
    return sum(known) if parts and len(known) == len(parts) else None


def parameter_columns(params: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """Each parameter of a decoder, and the column that it is in: of its own name, or with ``decoder_`` before that
    where some other column is called so.

    >>> parameter_columns(["width", "task"], ["task", "value"])
    {'width': 'width', 'task': 'decoder_task'}
    """
    names = list(params)
    used = {*taken, *(name for name in names if name not in taken)}
    columns = {}
    for name in names:
        column = name
        while column in (used if column != name else taken):
            column = f"decoder_{column}"
        used.add(column)
        columns[name] = column
    return columns


def table(columns: Mapping[str, Sequence[object]]) -> pd.DataFrame:
    """A frame of these columns. Those of whole numbers and of truth values are pandas' ``Int64`` and ``boolean``, which
    have room for a missing one: else one missing count would make floats of all the others."""
    return pd.DataFrame({name: pd.Series(list(values), dtype=_dtype(values)) for name, values in columns.items()})


def table_of(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """A :func:`table` of rows that all have the same columns."""
    return table({name: [row[name] for row in rows] for name in (rows[0] if rows else ())})


def _dtype(values: Iterable[object]) -> Literal["Int64", "boolean"] | None:
    kinds = {type(value) for value in values} - {NoneType}
    return "Int64" if kinds == {int} else "boolean" if kinds == {bool} else None


def _frame(run: Run, rows: Sequence[R], columns: Columns[R]) -> pd.DataFrame:
    cells = run.cells
    params: dict[str, None] = dict.fromkeys(name for cell in run.manifest.cells for name in cell.decoder.params)
    several: tuple[str, ...] = ("baseline",) if any(cell.baseline for cell in run.manifest.cells) else ()
    of_cells = {cell: _of_cell(run, cells[cell], params) for cell in {row.cell for row in rows}}
    own: tuple[str, ...] = (*OF_CELLS, *several)
    names = [*OF_CELLS, *parameter_columns(params, {*own, *columns}).values()]
    beside: dict[str, Sequence[object]] = {
        name: [of_cells[row.cell][place] for row in rows] for place, name in enumerate(names)
    }
    beside |= {name: [cells[row.cell].baseline for row in rows] for name in several}
    return table({**beside, **{name: [get(row) for row in rows] for name, get in columns.items()}})


def _of_cell(run: Run, cell: Cell, params: Mapping[str, None]) -> tuple[object, ...]:
    checkpoint = cell.checkpoint
    own = (run.manifest.run_id, cell.arm, checkpoint_name(checkpoint), checkpoint.dtype, cell.decoder.kind)
    return (*own, *(cell.decoder.params.get(name) for name in params))


def _targets(run: Run, texts: Texts) -> dict[Document, str]:
    known = {(row.task, row.doc_id): texts.get(row.target_sha256) for row in run.scores}
    return {document: found.text for document, found in known.items() if found is not None}


def _text(texts: Texts, digest: str) -> str | None:
    found = texts.get(digest)
    return None if found is None else found.text


def _field(name: str) -> Callable[[object], object]:
    return lambda row: getattr(row, name)


def _of_generation(name: str) -> Callable[[GenerationRow], object]:
    return lambda row: getattr(row.generation, name)
