"""Synthetic runs with known truth, written through records and store, for tests of the reading arm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from twotower_eval import store
from twotower_eval.records import (
    SCHEMA_VERSION,
    Arm,
    Cell,
    Checkpoint,
    DecoderSpec,
    Generation,
    GenerationRow,
    Likelihood,
    LikelihoodRow,
    PromptTiming,
    RunManifest,
    Score,
    SpeedSample,
    Workload,
    canonical_json,
    cell_id,
    sha256_text,
)

Row = Score | SpeedSample | GenerationRow | LikelihoodRow
Edit = Callable[[Row], Row | None]

PAIR = Checkpoint(
    name="pair", family="twotower", source="pair", digest=sha256_text("pair"), dtype="float32", devices=("cpu",)
)
CONTEXT = dataclasses.replace(PAIR, digest=sha256_text("context tower"), tower="context")
AUTOREGRESSIVE = DecoderSpec(kind="autoregressive", params={"temperature": 0.0})
PLAN = {"tasks": ["arithmetic", "sorting", "words", "choice"], "seed": 7}
RUN_ID, SPEED_ID = "20261101T120000Z-run-aaaaaa", "20261102T120000Z-speed-bbbbbb"
# Task: (group, metric, scored by, share right, share lost per unit of haste, share gained)
TASKS: dict[str, tuple[str | None, str, str, float, float, float]] = {
    "arithmetic": (None, "exact_match", "generation", 0.85, 0.08, 0.10),
    "sorting": (None, "exact_match", "generation", 0.70, 0.05, 0.05),
    "words_de": ("words", "exact_match", "generation", 0.60, 0.10, 0.05),
    "words_en": ("words", "exact_match", "generation", 0.75, 0.10, 0.05),
    "choice": (None, "acc", "context_tower", 0.65, 0.0, 0.0),
}


def block_diffusion(block_size: int = 16, steps: int | None = None, threshold: float = 0.8) -> DecoderSpec:
    params = {"block_size": block_size, "steps_per_block": steps or block_size, "threshold": threshold}
    return DecoderSpec(kind="block_diffusion", params={**params, "temperature": 0.0, "batch_mean_t": False})


def sweep() -> tuple[DecoderSpec, ...]:
    grid = product((8, 16, 32), (None, 4), (0.7, 0.8, 0.9))
    return tuple(block_diffusion(block_size, steps, threshold) for block_size, steps, threshold in grid)


def haste(decoder: DecoderSpec) -> float:
    """Made-up truth: how much quality a setting costs, 1 at the claimed point."""
    block, steps, threshold = (decoder.params[name] for name in ("block_size", "steps_per_block", "threshold"))
    return (block / 16) ** 1.2 * (1 + 0.8 * (block / steps - 1) / 3) * (1.8 - threshold)


def manifest(run_id: str, verb: Any, cells: Iterable[Cell], **changes: Any) -> RunManifest:
    plain = RunManifest(
        schema=SCHEMA_VERSION,
        run_id=run_id,
        verb=verb,
        argv=("twotower-eval", verb, "--tasks", "arithmetic,sorting,words,choice", "--out", "my results"),
        plan=PLAN,
        plan_sha256=sha256_text(canonical_json(PLAN)),
        cells=tuple(cells),
        started_at="2026-11-01T12:00:00.000+00:00",
        project_version="0.1.0",
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        packages={"torch": "2.9.0", "lm-eval": "0.4.13"},
        machine={"system": "Linux", "cpu": "Some CPU | 3 GHz", "num_cores": 2, "devices": [{"device": "cpu"}]},
        seeds={"seed": 7},
    )
    return dataclasses.replace(plain, **changes)


def make_cell(arm: Arm, decoder: DecoderSpec, workload: Workload) -> Cell:
    checkpoint = CONTEXT if arm == "baseline" else PAIR
    return Cell(
        id=cell_id(checkpoint, decoder, workload), arm=arm, checkpoint=checkpoint, decoder=decoder, workload=workload
    )


def write(
    root: Path,
    header: RunManifest,
    rows: Iterable[Row],
    *,
    complete: bool = True,
    edit: Edit | None = None,
    cut: Mapping[tuple[str, str], int] | None = None,
):
    """Put rows into a new run folder; ``edit`` may change or, by returning None, drop a row.

    ``cut`` says of (arm, task) how many of ten prompts were; without it the run does not count them.
    """
    with store.create(root, header) as writer:
        values: dict[tuple[str, str, int], float] = {}
        for row in rows:
            told = row
            if isinstance(row, GenerationRow) and (row.cell, row.task, row.doc_id) in values:
                told = saying(row, values[row.cell, row.task, row.doc_id])
            kept = told if edit is None else edit(told)
            if isinstance(kept, Score) and kept.value is not None:
                values[kept.cell, kept.task, kept.doc_id] = kept.value
            if kept is not None:
                writer.append(kept)
        for cell in header.cells if cut is not None else ():
            num_truncated = cut.get((cell.arm, cell.workload.name), 0)  # type: ignore[union-attr]
            task = {"cell": cell.id, "task": cell.workload.name}
            writer.event("truncated", **task, num_requests=10, num_truncated=num_truncated)
        if complete:
            writer.finish()
        return writer.path


def saying(row: GenerationRow, value: float) -> GenerationRow:
    """The answer with its score in it: equal answers have equal scores."""
    text = " ".join([f"{value:g}", *str(row.generation.text).split()[1:]])
    return dataclasses.replace(row, generation=dataclasses.replace(row.generation, text=text))


def taking(sample: SpeedSample, factor: float) -> SpeedSample:
    """The call at another pace: its prompts end within it, else it would be void."""
    prompts = [dataclasses.replace(prompt, finish_s=prompt.finish_s * factor) for prompt in sample.prompts]
    return dataclasses.replace(sample, wall_s=sample.wall_s * factor, prompts=tuple(prompts))


def quality_run(
    root: Path,
    *,
    decoders: Sequence[DecoderSpec] = (block_diffusion(),),
    num_docs: int = 150,
    tasks: Sequence[str] = tuple(TASKS),
    run_id: str = RUN_ID,
    complete: bool = True,
    perplexity: bool = True,
    edit: Edit | None = None,
    cut: Mapping[tuple[str, str], int] | None = None,
    **changes: Any,
) -> Path:
    """A run whose tasks are right as TASKS says; the two language tasks hold the same items."""
    rng = np.random.default_rng(1)
    cells, rows = [], []
    for task in tasks:
        group, _, _, right, lost, gained = TASKS[task]
        workload = Workload(kind="task", name=task, digest=sha256_text(task), max_new_tokens=64)
        easy_N = rng.random(num_docs)
        base_N = (easy_N < right).astype(float)
        baseline = make_cell("baseline", AUTOREGRESSIVE, workload)
        cells.append(baseline)
        rows += _score_rows(baseline, task, base_N, group)
        change_N = rng.random(num_docs)
        for decoder in decoders:
            slip = min(0.98, lost * haste(decoder))
            value_N = np.where(base_N == 1, change_N >= slip, change_N < gained).astype(float)
            if not lost:
                value_N = base_N
            candidate = make_cell("candidate", decoder, workload)
            cells.append(candidate)
            rows += _score_rows(candidate, task, value_N, group)
    if perplexity:
        workload = Workload(kind="task", name="prose", digest=sha256_text("prose"))
        for arm, decoder in (("baseline", AUTOREGRESSIVE), *(("candidate", d) for d in decoders)):
            cell = make_cell(arm, decoder, workload)
            cells.append(cell)
            rows += [_perplexity(cell, i, 1.5 + 0.01 * (i % 7) + 0.002 * (arm == "candidate")) for i in range(40)]
    return write(root, manifest(run_id, "run", cells, **changes), rows, complete=complete, edit=edit, cut=cut)


def speed_run(
    root: Path,
    *,
    decoders: Sequence[DecoderSpec] = (block_diffusion(),),
    workload: Any = "answer",
    batch_sizes: Sequence[int] = (1,),
    num_rounds: int = 12,
    num_calls: int = 8,
    run_id: str = SPEED_ID,
    complete: bool = True,
    scored: bool = False,
    edit: Edit | None = None,
    cut: Mapping[tuple[str, str], int] | None = None,
    **changes: Any,
) -> Path:
    """A speed run: the baseline in two copies and every decoder, interleaved, one warm-up round."""
    rng = np.random.default_rng(2)
    length_P = rng.integers(10, 60, size=num_calls * max(batch_sizes))
    if run_id != SPEED_ID:  # on the same prompts, and no clock repeats another's times
        rng = np.random.default_rng([2, int(sha256_text(run_id)[:8], 16)])
    cells, rows = [], []
    for batch_size in batch_sizes:
        work = Workload(
            kind=workload,
            name=f"{workload}: four tasks",
            digest=sha256_text("prompts"),
            max_new_tokens=64,
            batch_size=batch_size,
            num_devices=1,
        )
        arms = [("baseline", AUTOREGRESSIVE, 0), ("baseline", AUTOREGRESSIVE, 1)]
        arms += [("candidate", decoder, 0) for decoder in decoders]
        for arm, decoder, replica in arms:
            cell = make_cell(arm, decoder, work)
            if replica == 0:
                cells.append(cell)
            for round_, call in product(range(-1, num_rounds), range(num_calls)):
                lengths = [40] * batch_size if workload == "fixed" else length_P[call * batch_size :][:batch_size]
                rows.append(_sample(rng, cell, replica, round_, call, [int(n) for n in lengths]))
            if scored and replica == 0:
                rows += _score_rows(cell, "sorting", (np.arange(60) % 10 < (8 if arm == "baseline" else 7)) * 1.0, None)
    return write(root, manifest(run_id, "speed", cells, **changes), rows, complete=complete, edit=edit, cut=cut)


def _score_rows(cell: Cell, task: str, value_N: np.ndarray, group: str | None) -> list[Row]:
    _, metric, scored_by, *_ = TASKS[task]
    rows: list[Row] = []
    for doc_id, value in enumerate(value_N):
        item = f"{group or task}/{doc_id}"
        score = Score(
            cell=cell.id,
            task=task,
            doc_id=doc_id,
            cluster_id=item,
            doc_sha256=sha256_text(f"{task}{doc_id}"),
            prompt_sha256=sha256_text(f"prompt {task}{doc_id}"),
            target_sha256=sha256_text(f"target {task}{doc_id}"),
            metric=metric,
            filter="none",
            higher_is_better=True,
            headline=True,
            scored_by=scored_by,
            value=float(value),
            group=group,
        )
        rows.append(score)
        if scored_by == "context_tower" and cell.arm == "baseline":  # computed once, as the tensors are shared
            rows.append(_likelihood(cell, task, doc_id))
        if metric == "acc":
            rows.append(dataclasses.replace(score, metric="acc_norm", headline=False))
        if scored_by == "generation":
            generation = _generation(cell, doc_id)
            rows.append(
                GenerationRow(
                    cell=cell.id,
                    task=task,
                    doc_id=doc_id,
                    request_index=0,
                    repeat=0,
                    prompt_sha256=score.prompt_sha256,
                    generation=generation,
                )
            )
    return rows


def _likelihood(cell: Cell, task: str, doc_id: int) -> LikelihoodRow:
    return LikelihoodRow(
        cell=cell.id,
        task=task,
        doc_id=doc_id,
        request_index=0,
        repeat=0,
        request="loglikelihood",
        prompt_sha256=sha256_text(f"prompt {task}{doc_id}"),
        num_tokens=3,
        likelihood=Likelihood(logprob_nats=-1.5, is_greedy=False, kind="context_tower"),
    )


def _perplexity(cell: Cell, doc_id: int, bits: float) -> Score:
    """Of a document of 100 bytes."""
    return Score(
        cell=cell.id,
        task="prose",
        doc_id=doc_id,
        cluster_id=f"prose/{doc_id}",
        doc_sha256=sha256_text(f"p{doc_id}"),
        prompt_sha256="p",
        target_sha256="t",
        metric="bits_per_byte",
        filter="none",
        higher_is_better=False,
        headline=False,
        scored_by="context_tower",
        value=None,
        missing_reason="bits_per_byte is of all documents together",
        aggregation="bits_per_byte",
        parts=(-bits * 100 * math.log(2), 100.0),
    )


def _forwards(cell: Cell, num_tokens: int) -> tuple[int, int]:
    """Context and denoiser forwards."""
    if cell.arm == "baseline":
        return num_tokens, 0
    block, threshold = int(cell.decoder.params["block_size"]), float(cell.decoder.params["threshold"])
    steps = int(cell.decoder.params["steps_per_block"])
    blocks = -(-num_tokens // block)
    return blocks, blocks * max(1, min(steps, round(block * (threshold - 0.35) * 0.8)))


def _generation(cell: Cell, doc_id: int) -> Generation:
    num_tokens = 20 + doc_id % 30
    num_context, num_denoiser = _forwards(cell, num_tokens)
    return Generation(
        prompt_id=str(doc_id),
        token_ids=tuple(range(num_tokens)),
        text=" ".join(str(doc_id * n * n % 97) for n in range(num_tokens // 3)),
        finish="eos",
        num_prompt_tokens=12,
        num_tokens=num_tokens,
        num_discarded_tokens=3 if cell.arm == "candidate" else 0,
        num_context_forwards=num_context,
        num_denoiser_forwards=num_denoiser,
        num_forced_commits=num_tokens // 5 if cell.arm == "candidate" else None,
    )


def _sample(rng: np.random.Generator, cell: Cell, replica: int, round_: int, call: int, lengths: list[int]):
    costs = [0.010 * c + 0.014 * d for c, d in (_forwards(cell, n) for n in lengths)]
    wall_s = max(costs) * (1 + 0.3 * (len(lengths) - 1)) * float(np.exp(rng.normal(0.02 * round_ / 6, 0.01)))
    prompts = []
    for slot, num_tokens in enumerate(lengths):
        num_context, num_denoiser = _forwards(cell, num_tokens)
        prompts.append(
            PromptTiming(
                prompt_id=f"q{call * len(lengths) + slot}",
                num_prompt_tokens=30,
                num_tokens=num_tokens,
                num_discarded_tokens=2 if cell.arm == "candidate" else 0,
                num_context_forwards=num_context,
                num_denoiser_forwards=num_denoiser,
                finish="stop" if slot % 2 else "eos",
                finish_s=wall_s * 0.95,
                num_forced_commits=num_tokens // 6 if cell.arm == "candidate" else None,
                tokens_sha256="0" * 64,
            )
        )
    return SpeedSample(
        call_id=f"{call}",
        launch_id="launch-1",
        cell=cell.id,
        replica=replica,
        round=max(round_, 0),
        phase="warmup" if round_ < 0 else "measure",
        batch_size=len(lengths),
        wall_s=wall_s,
        prefill_s=None,
        first_output_s=None,
        peak_memory_bytes=None,
        peak_memory_reason="no driver tells on a CPU",
        started_at="2026-11-02T12:00:00.000+00:00",
        prompts=tuple(prompts),
    )
