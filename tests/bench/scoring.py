"""Multiple choice scored by the harness beside lm-eval's own ``hf``, on the same requests of a real model.

Both are called as lm-eval calls them, from text to log-likelihoods; ours writes its journal meanwhile. Five examples
stand before every question, the same for all, as MMLU has them.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import Findings, Say
from bench.measure import ratios
from twotower_eval.engine.models import load_model
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.pieces import Piece
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.measure.harness.answers import CellJournal
from twotower_eval.measure.speed.clock import no_garbage_collection
from twotower_eval.measure.suites import FEWSHOT_SEED, lm_tasks
from twotower_eval.measure.suites.datafiles import read_jsonl
from twotower_eval.records import Likelihood, to_json
from twotower_eval.store.journal import Journal

NUM_SHOTS = 5
LIMIT, FULL_LIMIT = 12, 200  # questions per task
BATCH_SIZES = (1, 4, 16)  # lm-eval's hf is tried with each on the first questions, and timed with the fastest
TRIAL_QUESTIONS = 4  # with four options each, one full batch of the largest size
LETTERS = "mmlu_anatomy"
HEADER = (
    "task",
    "questions",
    "lm-eval hf",
    "ours",
    "ratio",
    "by round",
    "processor time",
    "largest difference",
    "changed",
    "overhead",
)

Answers = list[tuple[float, bool]]


@dataclass(kw_only=True)
class Comparison:
    """One task's questions, each a list of requests (its options), and what was measured on them."""

    name: str
    questions: list[list[Any]]
    hf_batch_size: int = 0
    wall_s: dict[str, list[float]] = field(default_factory=lambda: {"hf": [], "ours": []})
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: {"hf": [], "ours": []})
    model_s: float = 0.0  # of ours, inside the scorer
    hf: Answers = field(default_factory=list)
    ours: Answers = field(default_factory=list)
    num_tokens: dict[str, list[int]] = field(default_factory=lambda: {"hf": [], "ours": []})  # per forward


def run(*, rounds: int, full: bool, say: Say, model: Path, data_dir: Path, limit: int | None = None) -> Findings:
    """Score questions of HellaSwag and MMLU (whichever is there) in ``rounds`` blocks, by both in turns.

    ``limit``: questions per task (None: LIMIT, or FULL_LIMIT where ``full``).

    ValueError where the data is missing, or lm-eval's hf is not installed whole.
    """
    limit = (FULL_LIMIT if full else LIMIT) if limit is None else limit
    if not rounds <= limit:
        raise ValueError(f"{rounds} rounds need as many questions, and the limit is {limit}: raise --limit")
    comparisons = _comparisons(data_dir, limit)
    hf, ours = load_hf(model), load_model(model)
    for comparison in comparisons:
        say(_card(comparison, ours))
        _compare(comparison, hf, ours, rounds, say)
    return Findings(
        header=HEADER,
        rows=tuple(_row(comparison) for comparison in comparisons),
        summary={"model": ours.checkpoint.name, "tasks": {c.name: _summary(c) for c in comparisons}},
    )


def _comparisons(data_dir: Path, limit: int) -> list[Comparison]:
    found = []
    if (data_dir / "hellaswag").is_dir():
        found.append(Comparison(name="HellaSwag, endings", questions=_hellaswag(data_dir, limit)))
    if (data_dir / LETTERS).is_dir():
        questions = questions_of(LETTERS, {"num_fewshot": NUM_SHOTS}, data_dir, limit)
        found.append(Comparison(name="MMLU anatomy, letters", questions=questions))
    if not found:
        raise ValueError(f"{data_dir} has neither hellaswag nor {LETTERS}: twotower-eval data prepare makes them")
    return found


def load_hf(model: Path, batch_size: int = 1) -> Any:
    """lm-eval's hf on a folder. ValueError where it is not installed whole."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(f"lm-eval's hf needs {error.name}: pip install 'lm-eval[hf]'") from error
    return HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=batch_size)


def _hellaswag(data_dir: Path, limit: int) -> list[list[Any]]:
    """Questions evenly spaced over the validation set, whose last documents are the examples."""
    rows = read_jsonl(data_dir / "hellaswag" / "validation.jsonl")
    shots, rest = rows[-NUM_SHOTS:], rows[:-NUM_SHOTS]
    if len(rest) < limit:
        raise ValueError(f"hellaswag has {len(rest)} questions besides its examples, {limit} wanted: lower --limit")
    chosen = [rest[i * len(rest) // limit] for i in range(limit)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "hellaswag"
        folder.mkdir()
        for split, found in (("train", shots), ("validation", chosen)):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        settings = {"num_fewshot": NUM_SHOTS, "fewshot_config": {"sampler": "first_n"}}
        return questions_of("hellaswag", settings, Path(name), limit)


def questions_of(name: str, settings: dict[str, Any], data_dir: Path, limit: int) -> list[list[Any]]:
    """The first ``limit`` documents of a task, each a list of its requests."""
    with lm_tasks.quiet():
        task = lm_tasks.load_task(name, settings, data_dir)
        instances = lm_tasks.build_instances(name, task, FEWSHOT_SEED)
    by_doc: dict[int, list[Any]] = {}
    for instance in instances:
        by_doc.setdefault(instance.doc_id, []).append(instance)
    return [by_doc[doc_id] for doc_id in sorted(by_doc)][:limit]


def _card(comparison: Comparison, model: Any) -> str:
    lm = HarnessLM(model)
    pairs = [lm._encode_pair(*request.args) for question in comparison.questions for request in question]
    contexts, options = ([len(pair[i]) for pair in pairs] for i in (0, 1))
    return (
        f"{comparison.name}: {len(comparison.questions)} questions, {NUM_SHOTS} examples; contexts of {min(contexts)}–"
        f"{max(contexts)} tokens (median {statistics.median(contexts):.0f}), options of {min(options)}–{max(options)}"
    )


def _compare(comparison: Comparison, hf: Any, model: Any, rounds: int, say: Say) -> None:
    """Fill in what is measured: blocks of questions, scored by both in turns; ours keeps the examples in between."""
    questions = comparison.questions
    comparison.hf_batch_size = _fastest_batch(hf, questions[:TRIAL_QUESTIONS])
    scorer = _TimedScorer(make_scorer(model, "exact"))
    with tempfile.TemporaryDirectory() as name, closing(Journal(Path(name) / "likelihoods.jsonl")) as journal:
        cell = CellJournal(cell="0" * 12, append=lambda row: journal.append(to_json(row)))
        arms = {
            "hf": (hf, _embeddings(hf.model), comparison.hf),
            "ours": (HarnessLM(model, scorer=scorer, journal=cell), _embeddings(model.inner), comparison.ours),
        }
        for number in range(rounds):
            block = questions[number * len(questions) // rounds : (number + 1) * len(questions) // rounds]
            requests = [request for question in block for request in question]
            for arm in list(arms)[:: -1 if number % 2 else 1]:
                lm, embeddings, answers = arms[arm]
                with counting_tokens(embeddings, comparison.num_tokens[arm]):
                    wall_s, cpu_s, found = _timed(lm, requests)
                comparison.wall_s[arm].append(wall_s)
                comparison.cpu_s[arm].append(cpu_s)
                answers += found
            hf_s, ours_s = (comparison.wall_s[arm][-1] for arm in arms)
            say(f"  round {number + 1} of {rounds}, {len(block)} questions: hf {hf_s:.1f} s, ours {ours_s:.1f} s")
    comparison.model_s = scorer.wall_s


def _fastest_batch(hf: Any, questions: Sequence[Sequence[Any]]) -> int:
    """Leave hf with the batch size that is fastest on a few questions; what only the first call pays is not timed."""
    requests = [request for question in questions for request in question]
    times_s = {}
    _timed(hf, requests[:1])
    for size in BATCH_SIZES:
        hf.batch_size_per_gpu = size
        times_s[size] = _timed(hf, requests)[0]
    hf.batch_size_per_gpu = min(BATCH_SIZES, key=lambda size: times_s[size])
    return int(hf.batch_size_per_gpu)


def _timed(lm: Any, requests: Sequence[Any]) -> tuple[float, float, Answers]:
    """Seconds on the wall's clock, seconds of processor time, answers."""
    with no_garbage_collection():
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        found = lm.loglikelihood(list(requests), disable_tqdm=True)
        return time.perf_counter() - began_s, time.process_time() - began_cpu_s, found


class _TimedScorer:
    """A scorer that adds up how long its pieces take."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.wall_s = inner, 0.0

    def plan(self, requests: Sequence[Any], batch_size: int) -> list[Piece]:
        pieces = self.inner.plan(requests, batch_size)
        return [replace(piece, score=partial(self._timed, piece)) for piece in pieces]

    def score(self, requests: Sequence[Any]) -> list[Likelihood]:
        raise AssertionError("the adapter asks for pieces")

    def _timed(self, piece: Piece) -> list[Likelihood]:
        began_s = time.perf_counter()
        found = piece.score()
        self.wall_s += time.perf_counter() - began_s
        return found


def _embeddings(model: Any) -> Any:
    return model.get_input_embeddings()


@contextmanager
def counting_tokens(embeddings: Any, counts: list[int]) -> Iterator[None]:
    """Count the tokens that a model reads, padding too."""
    handle = embeddings.register_forward_pre_hook(lambda _module, inputs: counts.append(inputs[0].numel()))
    try:
        yield
    finally:
        handle.remove()


def _changed_answers(comparison: Comparison) -> int:
    """Questions whose likeliest option, whole or per byte of its text (acc, acc_norm), is another."""
    changed = start = 0
    for question in comparison.questions:
        choices = set()
        num_bytes = [len(request.args[1].encode()) for request in question]
        for answers in (comparison.hf, comparison.ours):
            own = [logprob for logprob, _ in answers[start : start + len(question)]]
            normed = [logprob / max(1, n) for logprob, n in zip(own, num_bytes, strict=True)]
            choices.add((own.index(max(own)), normed.index(max(normed))))
        changed += len(choices) > 1
        start += len(question)
    return changed


def _summary(comparison: Comparison) -> dict[str, Any]:
    hf_s, ours_s = comparison.wall_s["hf"], comparison.wall_s["ours"]
    pairs = list(zip(comparison.hf, comparison.ours, strict=True))
    return {
        "num_questions": len(comparison.questions),
        "num_requests": len(pairs),
        "hf_batch_size": comparison.hf_batch_size,
        "hf_s": sum(hf_s),
        "ours_s": sum(ours_s),
        "ratio": sum(hf_s) / sum(ours_s),
        "hf_cpu_s": sum(comparison.cpu_s["hf"]),
        "ours_cpu_s": sum(comparison.cpu_s["ours"]),
        "ratio_cpu": sum(comparison.cpu_s["hf"]) / sum(comparison.cpu_s["ours"]),
        "ratio_by_round": ratios(hf_s, ours_s),
        "overhead_share": sum(ours_s) / comparison.model_s - 1,
        "max_difference_nats": max(abs(hf - ours) for (hf, _), (ours, _) in pairs),
        "num_greedy_changed": sum(hf != ours for (_, hf), (_, ours) in pairs),
        "num_answers_changed": _changed_answers(comparison),
        "num_tokens": {arm: sum(counts) for arm, counts in comparison.num_tokens.items()},
    }


def _row(comparison: Comparison) -> tuple[str, ...]:
    found = _summary(comparison)
    by_round = found["ratio_by_round"]
    hf, ours = (f"{found[f'{arm}_s']:.1f} s, {found['num_tokens'][arm]:,} tokens" for arm in ("hf", "ours"))
    return (
        comparison.name,
        str(found["num_questions"]),
        f"{hf}, batch {found['hf_batch_size']}",
        ours,
        f"{found['ratio']:.1f}x",
        f"{by_round['low']:.1f}–{by_round['high']:.1f}",
        f"{found['ratio_cpu']:.1f}x",
        f"{found['max_difference_nats']:.1e} nats",
        f"{found['num_answers_changed']} of {found['num_questions']}",
        f"{found['overhead_share']:.1%}",
    )
