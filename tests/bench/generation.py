"""Answers to five-shot questions by the harness beside lm-eval's own ``hf``, on the same requests of a real model.

Both are called as lm-eval calls them, from text to text, in batches of one size; ours writes its journal meanwhile. The
same five worked examples stand before every question.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import Findings, Say
from bench.scoring import NUM_SHOTS, counting_tokens, load_hf, questions_of
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.measure.harness.answers import CellJournal
from twotower_eval.measure.speed.clock import no_garbage_collection
from twotower_eval.records import to_json
from twotower_eval.store.journal import Journal

BATCH_SIZE = 8
LIMIT, FULL_LIMIT = 16, 64  # questions
BUDGET, FULL_BUDGET = 40, 256  # new tokens at most, with --full as lm-eval's task allows
HEADER = ("GSM8K, five-shot", "questions", "wall", "processor time", "of hf's", "tokens read", "texts changed")


@dataclass
class Arm:
    """What one of both said, and what it took."""

    texts: list[str] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)  # of each forward, padding too


def run(*, rounds: int, full: bool, say: Say, model: Path, data_dir: Path, limit: int | None = None) -> Findings:
    """Answer GSM8K questions ``rounds`` times by both, in turns.

    ``limit``: questions (None: LIMIT, or FULL_LIMIT where ``full``).

    ValueError where the data is missing, or lm-eval's hf is not installed whole.
    """
    limit = (FULL_LIMIT if full else LIMIT) if limit is None else limit
    budget = FULL_BUDGET if full else BUDGET
    requests = _requests(data_dir, limit, budget)
    hf, own = load_hf(model, BATCH_SIZE), load_model(model)
    lengths = [len(hf.tok_encode(request.args[0])) for request in requests]
    say(
        f"GSM8K: {len(requests)} questions, {NUM_SHOTS} examples; prompts of {min(lengths)}–{max(lengths)} tokens, "
        f"answers of up to {budget}, batch {BATCH_SIZE}"
    )
    arms = {"hf": Arm(), "ours": Arm()}
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            _measure(arms[name], hf if name == "hf" else None, own, requests)
            wall_s, cpu_s = arms[name].wall_s[-1], arms[name].cpu_s[-1]
            say(f"  round {number + 1} of {rounds}, {name}: {wall_s:.1f} s, {cpu_s:.1f} s of processor time")
    summary = _summary(arms)
    sizes = {"num_questions": len(requests), "batch_size": BATCH_SIZE, "max_new_tokens": budget}
    return Findings(
        header=HEADER,
        rows=tuple(_row(name, arms, summary) for name in arms),
        summary={"model": own.checkpoint.name, **sizes, **summary},
    )


def _summary(arms: dict[str, Arm]) -> dict[str, Any]:
    hf, ours = arms["hf"], arms["ours"]
    return {
        "wall_s": {name: arm.wall_s for name, arm in arms.items()},
        "cpu_s": {name: arm.cpu_s for name, arm in arms.items()},
        "cpu_of_hf": {name: sum(arm.cpu_s) / sum(hf.cpu_s) for name, arm in arms.items()},
        "num_tokens": {name: sum(arm.num_tokens) for name, arm in arms.items()},
        "num_texts_changed": sum(one != other for one, other in zip(hf.texts, ours.texts, strict=True)),
    }


def _row(name: str, arms: dict[str, Arm], summary: dict[str, Any]) -> tuple[str, ...]:
    arm = arms[name]
    return (
        "lm-eval hf" if name == "hf" else "ours",
        str(len(arm.texts)),
        f"{sum(arm.wall_s):.1f} s",
        f"{sum(arm.cpu_s):.1f} s",
        f"{summary['cpu_of_hf'][name]:.2f}",
        f"{summary['num_tokens'][name]:,}",
        "" if name == "hf" else f"{summary['num_texts_changed']} of {len(arm.texts)}",
    )


def _requests(data_dir: Path, limit: int, budget: int) -> list[Any]:
    if not (data_dir / "gsm8k").is_dir():
        raise ValueError(f"{data_dir} has no gsm8k: twotower-eval data prepare makes it")
    settings = {"num_fewshot": NUM_SHOTS, "fewshot_config": {"sampler": "first_n"}}
    found = [one for question in questions_of("gsm8k", settings, data_dir, limit) for one in question]
    for request in found:
        request.args[1]["max_gen_toks"] = budget
    return found


def _measure(arm: Arm, hf: Any, own: Any, requests: Sequence[Any]) -> None:
    """Answer all requests once, by ``hf``, or by ours where there is none."""
    inner = (own.inner if hf is None else hf.model).get_input_embeddings()
    with tempfile.TemporaryDirectory() as name, closing(Journal(Path(name) / "generations.jsonl")) as journal:
        cell = CellJournal(cell="0" * 12, append=lambda row: journal.append(to_json(row)))
        decoder = make_decoder(own, "autoregressive")
        lm = hf or HarnessLM(own, decoder=decoder, batch_size=BATCH_SIZE, journal=cell)
        with no_garbage_collection(), counting_tokens(inner, arm.num_tokens):
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            arm.texts = lm.generate_until(list(requests), disable_tqdm=True)
            arm.wall_s.append(time.perf_counter() - began_s)
            arm.cpu_s.append(time.process_time() - began_cpu_s)
