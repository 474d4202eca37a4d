"""Evaluation: the adapter against direct computation and lm-eval's evaluator; resume, kill, sharing, samples."""

import dataclasses
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows
from safetensors.torch import load_file, save_file

from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.claims.files import claims_from
from twotower_eval.api import measuring
from twotower_eval.engine import decoders, scorers
from twotower_eval.engine.models import load_model
from twotower_eval.measure import harness, suites
from twotower_eval.measure.harness import jobs
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.measure.harness.scoring import score_rows
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.progress import Advance, LogProgress, duration_text
from twotower_eval.records import (
    Cell,
    Generation,
    GenerationRow,
    Prompt,
    RunManifest,
    Score,
    Workload,
    derive_seed,
    to_json,
)
from twotower_eval.rules import EXTENDED

TASKS = ("miniature_sort", "miniature_choice", "miniature_perplexity")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def model(pair: Path) -> Any:
    return load_model(pair)


@pytest.fixture
def plan(pair: Path) -> RunPlan:
    return RunPlan(model=str(pair), tasks=TASKS, limit=4, max_new_tokens=12, block_sizes=(4,), batch_size=3)


def values(path: Path) -> dict[tuple[Any, ...], float | None]:
    """All scores of a run by what they are scores of; of a perplexity what the document adds to it."""
    run = store.load(path)
    return {(run.cells[s.cell].arm, *_key(s)): s.parts[0] if s.parts else s.value for s in run.scores}


def _key(score: Score) -> tuple[Any, ...]:
    return (score.cell, score.task, score.doc_id, score.metric, score.filter)


def ask(kind: str, *args: Any, doc_id: int = 0, idx: int = 0) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=idx, metadata=("t", doc_id, 1))  # type: ignore[arg-type]


def exact(model: Any) -> Any:
    return scorers.make_scorer(model, "context_tower")


def direct(model: Any, context: Sequence[int], continuation: Sequence[int]) -> float:
    """Log-probability computed straight from the logits, one token after the other."""
    ids = [*context, *continuation]
    logits_SV = model.context_logits(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(logits_SV[at - 1, ids[at]]) for at in range(len(context), len(ids)))


# The adapter


def test_loglikelihood_equals_direct_computation(model: Any) -> None:
    lm = HarnessLM(model, scorer=exact(model), batch_size=2)
    asked = [("sort up 3 1=", "1 3"), ("sort", " up"), ("a ", "b c"), ("sort up 3 1=", "3")]
    found = lm.loglikelihood([ask("loglikelihood", *args, doc_id=i) for i, args in enumerate(asked)])
    for (context, continuation), (logprob, _) in zip(asked, found, strict=True):
        whole, head = lm.tok_encode(context + continuation), lm.tok_encode(context.rstrip())
        assert logprob == pytest.approx(direct(model, head, whole[len(head) :]), abs=1e-4)


def test_is_greedy_means_that_greedy_decoding_gives_it(model: Any) -> None:
    ids = model.tokenizer.encode("sort up")
    [generation] = decoders.make_decoder(model, "autoregressive").generate(
        [Prompt(id="p", token_ids=tuple(ids))], max_new_tokens=3
    )
    lm = HarnessLM(model, scorer=exact(model))
    found = lm._loglikelihood_tokens(
        [(("", ""), ids, list(generation.token_ids)), (("", ""), ids, [generation.token_ids[0] ^ 1])]
    )
    assert [greedy for _, greedy in found] == [True, False]


def test_empty_context_is_the_prefix_token_and_empty_continuation_is_an_error(model: Any) -> None:
    """Nothing to score was the best of all answers: a log-likelihood of 0.0."""
    lm = HarnessLM(model, scorer=exact(model))
    bos = model.tokenizer.bos_token_id
    assert lm.prefix_token_id == bos
    found = lm.loglikelihood(
        [
            ask("loglikelihood", "", "abc", doc_id=0),
            ask("loglikelihood", "", "<s>abc", doc_id=1),
            ask("loglikelihood", "  ", "x", doc_id=2),
            ask("loglikelihood", "ab ", "", doc_id=3),
        ]
    )
    ids = model.tokenizer.encode("abc")
    expected = direct(model, [bos], ids)
    assert found[0][0] == pytest.approx(expected, abs=1e-4)
    # A continuation that begins with the prefix token brings its own context.
    assert found[1][0] == pytest.approx(expected, abs=1e-4)
    # Blanks alone move to the continuation, which leaves no context.
    assert found[2][0] == pytest.approx(direct(model, [bos], model.tokenizer.encode("  x")), abs=1e-4)
    assert found[3][0] == pytest.approx(
        direct(model, model.tokenizer.encode("ab"), model.tokenizer.encode(" ")), abs=1e-4
    )
    for context in ("ab", ""):
        with pytest.raises(ValueError, match="document 4, option 1: '' adds no token to its context"):
            lm.loglikelihood([ask("loglikelihood", context, "", doc_id=4)])


def test_equal_requests_are_scored_once(model: Any) -> None:
    calls: list[int] = []
    scorer = exact(model)

    class Counting:
        def plan(self, requests: Sequence[Any], batch_size: int) -> Any:
            calls.append(len(requests))
            return scorer.plan(requests, batch_size)

    lm = HarnessLM(model, scorer=Counting(), batch_size=64)
    found = lm.loglikelihood([ask("loglikelihood", "ab", "cd", doc_id=i) for i in range(5)])
    assert sum(calls) == 1
    assert len(set(found)) == 1
    assert len(lm.journal.likelihoods) == 5


@pytest.mark.parametrize("text", ["a", "sort up 3 1=1 3", "abc" * 15])
def test_rolling_windows(model: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Every token is predicted exactly once, with lm-eval's windows of at most 16 tokens."""
    lm = HarnessLM(model, scorer=exact(model))
    ids = model.tokenizer.encode(text)
    bos = model.tokenizer.bos_token_id
    whole = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])[0]
    assert whole == pytest.approx(direct(model, [bos], ids), abs=1e-3)
    monkeypatch.setattr(model, "max_length", 16)
    windowed = HarnessLM(model, scorer=exact(model))
    found = windowed.loglikelihood_rolling([ask("loglikelihood_rolling", text)])[0]
    expected = 0.0
    for before, after in get_rolling_token_windows(ids, bos, 16, 1):
        expected += direct(model, before[: len(before) - len(after) + 1], after)
    assert found == pytest.approx(expected, abs=1e-3)
    [row] = windowed.journal.likelihoods.values()
    assert row.num_tokens == len(ids)


def test_long_contexts_are_cut_from_the_left_as_lm_eval_does(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "max_length", 8)
    lm = HarnessLM(model, scorer=exact(model), decoder=decoders.make_decoder(model, "autoregressive"))
    context, continuation = "0123456789", "abc"
    [(found, _)] = lm.loglikelihood([ask("loglikelihood", context, continuation)])
    ids = model.tokenizer.encode(context + continuation)[-9:]
    assert found == pytest.approx(direct(model, ids[:-3], ids[-3:]), abs=1e-4)
    lm.generate_until([ask("generate_until", context, {"until": [], "max_gen_toks": 5}, doc_id=1)])
    assert lm.num_truncated == 2
    assert [row.generation.num_prompt_tokens for row in lm.journal.generations.values()] == [3]
    with pytest.raises(ValueError, match="leaves no room for the prompt in the model's 8 tokens: give"):
        lm.generate_until([ask("generate_until", context, {"until": [], "max_gen_toks": 8}, doc_id=2)])
    with pytest.raises(ValueError, match="does not fit into 8 tokens"):
        lm.loglikelihood([ask("loglikelihood", "a", "0123456789", doc_id=3)])


def test_a_resumed_run_counts_a_cut_context_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left of a piece was planned anew after a resume, and its cut contexts were counted once more."""
    monkeypatch.setattr(model, "max_length", 8)
    asked = [ask("loglikelihood", f"0123456789{i}", "abc", doc_id=i) for i in range(3)]
    lm = HarnessLM(model, scorer=exact(model))
    lm.loglikelihood(asked)
    assert lm.num_truncated == 3
    resumed = HarnessLM(model, scorer=exact(model))
    resumed.journal.likelihoods |= dict(list(lm.journal.likelihoods.items())[:1])
    resumed.loglikelihood(asked)
    assert resumed.num_truncated == 3


def test_budget_aliases_and_the_default(model: Any) -> None:
    decoder = decoders.make_decoder(model, "autoregressive")
    lm = HarnessLM(model, decoder=decoder)
    lm.generate_until(
        [
            ask("generate_until", "a", {"until": [], "max_new_tokens": 3}, doc_id=0),
            ask("generate_until", "", {"max_tokens": 4, "until": "\n"}, doc_id=1),
            ask("generate_until", "b", {}, doc_id=2),
        ]
    )
    rows = {key[1]: row.generation for key, row in lm.journal.generations.items()}
    assert rows[0].num_tokens + rows[0].num_discarded_tokens == 3
    assert rows[1].num_prompt_tokens == 1
    assert rows[2].num_tokens + rows[2].num_discarded_tokens <= 256


def test_a_checkpoint_without_tokenizer_is_one_line(tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair / name).unlink()
    with pytest.raises(ValueError, match="no tokenizer files"):
        harness.run(RunPlan(model=str(pair), tasks=("miniature_sort",), limit=1), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists(), "what cannot be run leaves no run folder"


def test_a_decoder_that_the_model_cannot_serve_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    causal = write_pair(tmp_path / "causal")
    weights, prefix = load_file(str(causal / "model.safetensors")), "context_tower."
    base = {"backbone." + name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    save_file({**base, "lm_head.weight": weights["context_lm_head.weight"]}, str(causal / "model.safetensors"))
    with pytest.raises(ValueError, match="'block_diffusion' needs a two-tower checkpoint"):
        harness.run(RunPlan(model=str(causal), tasks=("miniature_sort",), limit=1), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_scores_equal_lm_evals_own_evaluator(model: Any, plan: RunPlan, tmp_path: Path) -> None:
    """The adapter given to lm-eval's evaluate, against our own journalled and filtered path."""
    path = harness.run(plan, root=tmp_path)
    run = store.load(path)
    with lm_tasks.quiet():
        sources = {name: lm_tasks.load_task(name, {}, None) for name in TASKS}
    for name, source in sources.items():
        if name == "miniature_sort":
            source.config.generation_kwargs["max_gen_toks"] = 12
    lm = HarnessLM(
        model, decoder=decoders.make_decoder(model, "block_diffusion", block_size=4), scorer=exact(model), batch_size=5
    )
    results = lm_eval.evaluator.evaluate(lm, {"tasks": sources}, limit=4, bootstrap_iters=0)
    samples = {name: {s["doc_id"]: s for s in found} for name, found in results["samples"].items()}
    compared = 0
    for score in run.scores:
        if run.cells[score.cell].arm != "candidate":
            continue
        theirs = samples[score.task][score.doc_id]
        assert score.doc_sha256 == theirs["doc_hash"]
        assert score.target_sha256 == theirs["target_hash"]
        if score.task != "miniature_perplexity":
            assert score.value == theirs[score.metric]
        if score.task == "miniature_sort":
            assert score.prompt_sha256 == theirs["prompt_hash"]
        compared += 1
    assert compared == 4 + 4 + 3 * 4
    bits = [s for s in run.scores if s.metric == "bits_per_byte"]
    for score in bits:
        assert score.parts == samples[score.task][score.doc_id]["bits_per_byte"]
    aggregates = {(row.cell, row.metric): row.value for row in run.aggregates}
    for row in run.aggregates:
        theirs = results["results"][row.task][f"{row.metric},none"]
        assert run.cells[row.cell].arm == "baseline" or aggregates[row.cell, row.metric] == theirs
    assert len(aggregates) == 2 * 3


# Runs


def test_a_run_is_complete_and_says_how_everything_was_scored(plan: RunPlan, tmp_path: Path) -> None:
    run = store.load(harness.run(plan, root=tmp_path))
    assert run.complete
    assert [(cell.arm, cell.workload.name) for cell in run.manifest.cells] == [
        (arm, task) for task in TASKS for arm in ("baseline", "candidate")
    ]
    assert Counter((s.task, s.scored_by, s.headline) for s in run.scores) == {
        ("miniature_sort", "generation", True): 2 * 4,
        ("miniature_choice", "context_tower", True): 2 * 4,
        ("miniature_perplexity", "context_tower", False): 2 * 4 * 3,
    }
    assert run.manifest.seeds == {"run": 0, "fewshot": 1234}
    assert [event["kind"] for event in run.events].count("cell_done") == 6
    for cell in run.manifest.cells:
        asked = {row.prompt_sha256 for row in run.generations if row.cell == cell.id}
        assert cell.workload.name != "miniature_sort" or len(asked) == 4


def test_both_arms_see_the_same_documents_and_prompts(plan: RunPlan, tmp_path: Path) -> None:
    run = store.load(harness.run(plan, root=tmp_path))
    by_arm: dict[str, set[Any]] = {"baseline": set(), "candidate": set()}
    for s in run.scores:
        by_arm[run.cells[s.cell].arm].add(
            (s.task, s.doc_id, s.metric, s.doc_sha256, s.prompt_sha256, s.target_sha256, s.cluster_id)
        )
    assert by_arm["baseline"] == by_arm["candidate"]


def test_scores_do_not_depend_on_the_batch_size(plan: RunPlan, tmp_path: Path) -> None:
    paths = [harness.run(dataclasses.replace(plan, batch_size=n), root=tmp_path / str(n)) for n in (1, 4)]
    assert values(paths[0]) == pytest.approx(values(paths[1]), rel=1e-4)
    runs = [store.load(path) for path in paths]
    texts = [{(r.cell, r.doc_id): discrete(r.generation) for r in run.generations} for run in runs]
    assert texts[0] == texts[1]


def discrete(generation: Generation) -> Generation:
    """Without a trace's confidences, whose last bits depend on the batch; what was committed when must not."""
    steps = [dataclasses.replace(step, confidences=()) for step in generation.trace or ()]
    return dataclasses.replace(generation, trace=tuple(steps))


def test_a_limit_changes_neither_cells_nor_answers(plan: RunPlan, tmp_path: Path) -> None:
    few, more = (store.load(harness.run(dataclasses.replace(plan, limit=n), root=tmp_path / str(n))) for n in (2, 4))
    assert few.cells.keys() == more.cells.keys()
    answers = {(r.cell, r.doc_id): discrete(r.generation) for r in more.generations}
    assert all(answers[r.cell, r.doc_id] == discrete(r.generation) for r in few.generations)


def test_traces_of_the_first_documents_change_neither_cells_nor_tokens(plan: RunPlan, tmp_path: Path) -> None:
    """Two documents of each task have their denoising traced, unless a plan says otherwise."""
    runs = [
        store.load(harness.run(dataclasses.replace(plan, trace=number), root=tmp_path / str(number)))
        for number in (0, plan.trace)
    ]
    assert plan.trace == 2
    assert runs[0].manifest.cells == runs[1].manifest.cells
    assert not any(row.generation.trace for row in runs[0].generations)
    traced = [row for row in runs[1].generations if row.generation.trace]
    assert {row.doc_id for row in traced} == {0, 1}
    assert {runs[1].cells[row.cell].arm for row in traced} == {"candidate"}
    for row in traced:
        steps = row.generation.trace or ()
        assert len(steps) == row.generation.num_denoiser_forwards
        num_committed = sum(len(step.positions) for step in steps)
        assert num_committed == row.generation.num_tokens + row.generation.num_discarded_tokens
    outputs = [
        {(r.cell, r.task, r.doc_id): dataclasses.replace(r.generation, trace=None) for r in run.generations}
        for run in runs
    ]
    assert outputs[0] == outputs[1]


def num_looks(path: Path) -> int:
    """Looks at a claim about all that a run's candidate answered, as `claims check` counts them."""
    run = store.load(path)
    decoder = next(cell.decoder for cell in run.manifest.cells if cell.arm == "candidate" and cell.decoder.params)
    point = {"name": "here", "decoder": {"kind": decoder.kind, **decoder.params}}
    claim = {"name": "kept", "quantity": "retention", "scope": ["miniature_sort"], "expected": 0.9, "point": "here"}
    claim |= {"subject": run.manifest.cells[0].checkpoint.name, "baseline": "context-tower", "source": "a test"}
    [verdict] = judge(claims_from("test", {"title": "t", "point": [point], "claim": [claim]}).claims, [run])
    return verdict.num_looks


def test_resume_may_raise_the_limit(plan: RunPlan, tmp_path: Path) -> None:
    path = harness.run(dataclasses.replace(plan, limit=2), root=tmp_path)
    assert num_looks(path) == 1
    extended, again = _Recorder(), _Recorder()
    for shown in (extended, again):
        assert harness.run(plan, root=tmp_path, resume=path, progress=shown) == path
        assert num_looks(path) == 2
    assert EXTENDED == "this run was complete; extending it counts as another look"
    assert [shown.notes.count(EXTENDED) for shown in (extended, again)] == [1, 0]
    assert values(path) == pytest.approx(values(harness.run(plan, root=tmp_path / "whole")), rel=1e-4)


def test_resume_takes_neither_fewer_documents_nor_another_seed(plan: RunPlan, tmp_path: Path) -> None:
    """A stopped run of 24 documents, resumed with a limit of 3, was closed as complete; another seed was ignored."""
    path = harness.run(plan, root=tmp_path)
    assert plan.limit is not None
    for change, words in (
        ({"limit": plan.limit - 1}, r"limit was \d+, is \d+ \(it may only be raised\)"),
        ({"seed": plan.seed + 1}, "seed was 0, is 1"),
    ):
        with pytest.raises(ValueError, match=words):
            harness.run(dataclasses.replace(plan, **change), root=tmp_path, resume=path)


class _Interrupting:
    """Keeps the prompts that are answered; Ctrl-C before the nth answer of block diffusion or the nth scored piece."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at_answer: int | None = None, at_piece: int | None = None
    ) -> None:
        from twotower_eval.engine.decoders.block_diffusion import BlockDiffusion
        from twotower_eval.engine.scorers.likelihood import CausalScorer

        self.prompts: list[str] = []
        self.scored = self.num_pieces = 0
        self.at_piece = at_piece
        generate, plan = BlockDiffusion.generate, CausalScorer.plan

        def counted(decoder: Any, prompts: Sequence[Prompt], *, on_finish: Any, **options: Any) -> Any:
            def finished(generation: Generation) -> None:
                if len(self.prompts) + 1 == at_answer:
                    raise KeyboardInterrupt
                self.prompts.append(generation.prompt_id)
                on_finish(generation)

            return generate(decoder, prompts, on_finish=finished, **options)

        def counted_plan(scorer: Any, requests: Sequence[Any], batch_size: int) -> Any:
            return [
                dataclasses.replace(piece, score=functools.partial(self._scored, piece))
                for piece in plan(scorer, requests, batch_size)
            ]

        running = importlib.import_module("twotower_eval.measure.harness.run")
        monkeypatch.setattr(running, "MOST_WITNESSED", 0)  # nothing is decoded but to be answered
        monkeypatch.setattr(BlockDiffusion, "generate", counted)
        monkeypatch.setattr(CausalScorer, "plan", counted_plan)

    def _scored(self, piece: Any) -> Any:
        self.num_pieces += 1
        if self.num_pieces == self.at_piece:
            raise KeyboardInterrupt
        self.scored += len(piece.requests)
        return piece.score()


@pytest.mark.parametrize("at_answer", [1, 2, 3, 5])
def test_resume_recomputes_nothing_and_gives_the_same_scores(plan: RunPlan, tmp_path: Path, at_answer: int) -> None:
    """What was finished before Ctrl-C is in the journal, though its batch was not."""
    plan = dataclasses.replace(plan, batch_size=2, limit=5)
    whole = harness.run(plan, root=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        first = _Interrupting(patch, at_answer)
        with pytest.raises(KeyboardInterrupt):
            harness.run(plan, root=tmp_path)
    [path] = store.find_runs(tmp_path)
    assert not store.load(path).complete
    assert len(first.prompts) == at_answer - 1
    with pytest.MonkeyPatch.context() as patch:
        second = _Interrupting(patch)
        harness.run(plan, root=tmp_path, resume=path)
    assert sorted(first.prompts + second.prompts) == [f"miniature_sort/{i}/0/0" for i in range(5)]
    assert set(first.prompts) & set(second.prompts) == set()
    assert store.load(path).complete
    assert values(path) == values(whole)


class _Recorder:
    """Keeps what a progress display is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total = self.done = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def track(self, total: int, description: str) -> Iterator[Advance]:
        self.total = total
        yield self._advance

    def _advance(self, num: int = 1, /) -> None:
        self.done += num


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_progress_counts_every_request_once(plan: RunPlan, tmp_path: Path, batch_size: int) -> None:
    """The batch that the estimate takes was once counted twice where it was the only one."""
    plan = dataclasses.replace(plan, batch_size=batch_size)
    first, again = _Recorder(), _Recorder()
    path = harness.run(plan, root=tmp_path, progress=first)
    harness.run(plan, root=tmp_path, resume=path, progress=again)
    total = 2 * 4 + 4 * 4 + 4
    assert (first.total, first.done) == (again.total, again.done) == (total, total)
    said = [note for note in first.notes if not note.startswith("auto: ")]
    assert said[0] == f"6 cells over 3 tasks, {total} requests"
    assert said[1].startswith("estimated duration: about")
    assert [note.startswith(f"[{at}/6]") for at, note in enumerate(said[2:], start=1)] == [True] * 6
    assert not any("estimated" in note for note in again.notes)


def test_elapsed_times_include_what_the_estimate_answered(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that the estimate had answered whole was said to have taken no time."""
    running = importlib.import_module("twotower_eval.measure.harness.run")
    answer = running._Evaluation._answer_some
    now_s = [1000.0]

    def slowly(self: Any, job: Any) -> None:
        answer(self, job)
        now_s[0] += 100.0

    monkeypatch.setattr(running._Evaluation, "_answer_some", slowly)
    monkeypatch.setattr(running.time, "monotonic", lambda: now_s[0])
    recorder = _Recorder()
    harness.run(dataclasses.replace(plan, batch_size=50), root=tmp_path, progress=recorder)
    took = [note.rpartition(" in ")[2] for note in recorder.notes if note.startswith("[")]
    assert took == [duration_text(s) for s in (100, 100, 100, 0, 100, 0)]
    stream = io.StringIO()
    harness.run(dataclasses.replace(plan, batch_size=50), root=tmp_path, progress=LogProgress(stream))
    assert stream.getvalue().splitlines()[-1].endswith(f" in {duration_text(400)}")


def test_what_documents_can_show_is_noted_before_anything_is_computed(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[list[str], set[str]]] = []

    def power_line(tasks: Any, scored_once: Any) -> str:
        given.append(([task.name for task in tasks], set(scored_once)))
        return "a plan"

    monkeypatch.setattr(measuring, "power_line", power_line)
    recorder = _Recorder()
    run = store.load(measuring.evaluated(plan, root=tmp_path, progress=recorder))
    assert recorder.notes[0] == "a plan"
    [(names, scored_once)] = given
    assert names == list(plan.tasks)
    cells = {name: {cell.id for cell in run.manifest.cells if cell.workload.name == name} for name in names}
    likely = {name for name in names if cells[name] & {row.cell for row in run.likelihoods}}
    assert scored_once == likely != set(), "equal context towers: one cell answers for all"


def test_resuming_a_complete_run_computes_nothing(plan: RunPlan, tmp_path: Path) -> None:
    path = harness.run(plan, root=tmp_path)
    before = values(path)
    with pytest.MonkeyPatch.context() as patch:
        again = _Interrupting(patch)
        harness.run(plan, root=tmp_path, resume=path)
    assert (again.prompts, again.scored) == ([], 0)
    assert values(path) == before
    assert store.load(path).complete


KILLED = """
import os, signal, sys
from pathlib import Path
from twotower_eval import harness
from twotower_eval.engine.decoders.block_diffusion import BlockDiffusion
from twotower_eval.plan import RunPlan
generate, answers = BlockDiffusion.generate, []
def killed(decoder, prompts, *, on_finish, **options):
    def finished(generation):
        answers.append(0)
        if len(answers) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        on_finish(generation)
    return generate(decoder, prompts, on_finish=finished, **options)
BlockDiffusion.generate = killed
import importlib
importlib.import_module("twotower_eval.measure.harness.run").MOST_WITNESSED = 0
plan = RunPlan(model=sys.argv[1], tasks=("miniature_sort", "miniature_choice"), limit=6, max_new_tokens=12,
               block_sizes=(4,), batch_size=2)
harness.run(plan, root=Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_where_it_was(pair: Path, tmp_path: Path) -> None:
    """kill -9 leaves no time for any clean-up: what was journalled must be enough, a half-written line no harm."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(pair), str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    [path] = store.find_runs(tmp_path)
    num_kept = len(store.load(path).generations)
    with (path / "generations.jsonl").open("a") as stream:
        stream.write('{"cell": "half a li')
    plan = RunPlan(
        **{"model": str(pair), "tasks": ("miniature_sort", "miniature_choice"), "limit": 6},
        **{"max_new_tokens": 12, "block_sizes": (4,), "batch_size": 2},  # type: ignore[arg-type]
    )
    with pytest.MonkeyPatch.context() as patch:
        rest = _Interrupting(patch)
        harness.run(plan, root=tmp_path, resume=path)
    run = store.load(path)
    assert len(rest.prompts) == 6 - 4
    assert num_kept > 4
    assert values(path) == values(harness.run(plan, root=tmp_path / "whole"))
    assert run.complete


def test_a_resumed_run_refuses_another_plan(plan: RunPlan, tmp_path: Path) -> None:
    path = harness.run(plan, root=tmp_path)
    with pytest.raises(ValueError, match="cannot resume"):
        harness.run(dataclasses.replace(plan, thresholds=(0.5,)), root=tmp_path, resume=path)


def test_an_answer_to_another_prompt_is_an_error(plan: RunPlan, tmp_path: Path) -> None:
    path = harness.run(plan, root=tmp_path)
    (path / "done.json").unlink()
    journal = path / "generations.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[0]["prompt_sha256"] = "0" * 64
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="another prompt"):
        harness.run(plan, root=tmp_path, resume=path)
    [task] = suites.resolve_tasks(["miniature_sort"], limit=4)
    with pytest.raises(ValueError, match="belongs to another prompt"):
        score_rows(task, lines[0]["cell"], [r for r in store.load(path).generations if r.cell == lines[0]["cell"]])


@pytest.mark.parametrize("kind", ["context_tower", "bound"])
def test_likelihoods_go_on_in_the_middle_of_a_piece(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """Only what the journal lacks is scored, whatever it was scored with before; what it holds stays as it is."""
    monkeypatch.setattr("twotower_eval.engine.models.twotower.TwoTower.branch_tokens", 60)
    monkeypatch.setattr("twotower_eval.engine.scorers.likelihood.MAX_TOKENS", 100)
    tasks = ("miniature_choice", "miniature_perplexity")
    plan = dataclasses.replace(plan, tasks=tasks, likelihood=kind)
    path = harness.run(plan, root=tmp_path)
    whole = values(path)
    before = store.load(path).likelihoods
    for name in ("done.json", "scores.jsonl"):
        (path / name).unlink()
    journal = path / "likelihoods.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    lost = set(range(1, len(lines), 3))
    journal.write_text("".join(line for at, line in enumerate(lines) if at not in lost))
    events = (path / "events.jsonl").read_text().splitlines(keepends=True)
    (path / "events.jsonl").write_text(events[0])  # later ones tell of the lines that were there
    with pytest.MonkeyPatch.context() as patch:
        again = _Interrupting(patch)
        harness.run(plan, root=tmp_path, resume=path)
    after = store.load(path).likelihoods
    kept = [row for at, row in enumerate(before) if at not in lost]
    assert after[: len(kept)] == kept
    assert len(after) == len(before)
    assert values(path) == pytest.approx(whole, rel=1e-4)
    if kind == "context_tower":
        assert 0 < again.scored == len({row.prompt_sha256 for at, row in enumerate(before) if at in lost})


def test_ctrl_c_keeps_the_pieces_that_are_done(plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower_eval.engine.models.twotower.TwoTower.branch_tokens", 60)
    plan = dataclasses.replace(plan, tasks=("miniature_choice",), limit=8)
    with pytest.MonkeyPatch.context() as patch:
        first = _Interrupting(patch, at_piece=3)
        with pytest.raises(KeyboardInterrupt):
            harness.run(plan, root=tmp_path)
    [path] = store.find_runs(tmp_path)
    assert 0 < len(store.load(path).likelihoods) == first.scored < 32
    with pytest.MonkeyPatch.context() as patch:
        second = _Interrupting(patch)
        harness.run(plan, root=tmp_path, resume=path)
    assert first.scored + second.scored == 32
    assert values(path) == values(harness.run(plan, root=tmp_path / "whole"))


# Whose likelihoods


def test_context_tower_likelihoods_are_computed_once_for_equal_tensors(plan: RunPlan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, thresholds=(0.5, 0.8), tasks=("miniature_choice",))
    with pytest.MonkeyPatch.context() as patch:
        counted = _Interrupting(patch)
        run = store.load(harness.run(plan, root=tmp_path))
    num_pairs = len({row.prompt_sha256 for row in run.likelihoods})
    assert counted.scored == num_pairs == len(run.likelihoods)
    assert len(run.manifest.cells) == 3
    assert len({row.cell for row in run.likelihoods}) == 1
    assert {s.scored_by for s in run.scores} == {"context_tower"}
    assert any("computed once" in note for note in run.manifest.notes)


def test_another_baseline_is_scored_by_its_own_tensors(plan: RunPlan, tmp_path: Path) -> None:
    other = write_pair(tmp_path / "other", seed=1)
    run = store.load(
        harness.run(dataclasses.replace(plan, baseline=str(other), tasks=("miniature_choice",)), root=tmp_path / "r")
    )
    assert len({row.cell for row in run.likelihoods}) == 2
    by_cell = {cell: [r.likelihood.logprob_nats for r in run.likelihoods if r.cell == cell] for cell in run.cells}
    assert by_cell[run.manifest.cells[0].id] != by_cell[run.manifest.cells[1].id]


@pytest.mark.parametrize("kind", ["denoiser_left_to_right", "bound"])
def test_denoiser_likelihoods_are_the_candidates_and_are_named(plan: RunPlan, tmp_path: Path, kind: Any) -> None:
    plan = dataclasses.replace(plan, likelihood=kind, tasks=("miniature_choice", "miniature_perplexity"), limit=2)
    run = store.load(harness.run(plan, root=tmp_path))
    by_arm = {(run.cells[s.cell].arm, s.scored_by) for s in run.scores}
    assert by_arm == {("baseline", "exact"), ("candidate", kind)}
    errors = [r.likelihood.stderr_nats for r in run.likelihoods if r.likelihood.kind == kind]
    assert errors
    assert all((error is not None) == (kind == "bound") for error in errors)


def test_a_scorer_that_the_decoder_lacks_fails_before_weights_load(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower_eval.engine.models.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    plan = RunPlan(model=plan.model, tasks=TASKS, decoder="autoregressive", likelihood="bound", limit=1)
    with pytest.raises(ValueError, match="miniature_choice, miniature_perplexity need log-likelihoods"):
        harness.run(plan, root=tmp_path)
    assert not store.find_runs(tmp_path)


def test_an_ar_model_against_itself_is_one_cell(plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def context_alone(path: Path, **options: Any) -> Any:
        return load_model(path, **{**options, "tower": "context"})

    monkeypatch.setattr("twotower_eval.engine.models.load_model", context_alone)
    plan = RunPlan(model=plan.model, tasks=TASKS, decoder="autoregressive", limit=2, max_new_tokens=8)
    said: list[str] = []
    monkeypatch.setattr(measuring, "power_line", lambda *_: said.append("power line") or "power line")
    run = store.load(measuring.evaluated(plan, root=tmp_path))
    assert [cell.arm for cell in run.manifest.cells] == ["baseline"] * 3
    assert not said, "nothing is compared, so no drop of retention can be planned for"
    assert {s.scored_by for s in run.scores} == {"generation", "exact"}


def test_the_context_tower_baseline_is_what_loading_it_alone_gives(pair: Path) -> None:
    plan = RunPlan(model=str(pair))
    baseline, candidate = jobs.load_models(plan)
    alone = load_model(pair, tower="context")
    assert baseline.checkpoint == alone.checkpoint
    assert baseline.context_digest == alone.context_digest == candidate.context_digest
    assert candidate.has_denoiser
    assert not baseline.has_denoiser
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(baseline.context_logits(ids), alone.context_logits(ids))


# Samples


def test_a_documents_value_is_the_mean_over_its_samples(plan: RunPlan, tmp_path: Path) -> None:
    sampled = dataclasses.replace(plan, temperature=1.5, samples=3, tasks=("miniature_sort",), limit=3)
    runs = [store.load(harness.run(dataclasses.replace(sampled, batch_size=n), root=tmp_path / str(n))) for n in (2, 5)]
    texts = [{(r.cell, r.doc_id, r.repeat): r.generation.text for r in run.generations} for run in runs]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2 * 3 * 3
    assert len(set(texts[0].values())) > 6
    assert len(runs[0].scores) == 2 * 3


def test_samples_are_scored_one_by_one() -> None:
    [task] = suites.resolve_tasks(["miniature_sort"], limit=2)
    rows = []
    for doc, answers in zip(task.docs, (("right", "wrong", "right", "wrong"), ("wrong", "wrong")), strict=True):
        for repeat, answer in enumerate(answers):
            text = doc.doc["answer"] if answer == "right" else "no"
            rows.append(_row(task, doc, repeat, text))
    scores = score_rows(task, "c", rows)
    assert [score.value for score in scores] == [0.5, 0.0]
    assert {score.headline for score in scores} == {True}


def _row(task: suites.BuiltTask, doc: suites.BuiltDoc, repeat: int, text: str, cell: str = "c") -> GenerationRow:
    generation = Generation(
        **{"prompt_id": "p", "token_ids": (), "text": text, "finish": "eos", "num_prompt_tokens": 1, "num_tokens": 0},
        **{"num_discarded_tokens": 0, "num_context_forwards": 1, "num_denoiser_forwards": 0},  # type: ignore[arg-type]
    )
    key = {"task": task.name, "doc_id": doc.doc_id, "request_index": 0, "repeat": repeat}
    return GenerationRow(cell=cell, prompt_sha256=doc.prompt_sha256, generation=generation, **key)  # type: ignore[arg-type]


def test_several_samples_at_temperature_zero_are_refused(plan: RunPlan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 samples at temperature 0"):
        harness.run(dataclasses.replace(plan, samples=3), root=tmp_path)


def test_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(*parts) for parts in ((0, "t", 1), (1, "t", 1), (0, "u", 1), (0, "t", 2), (0, "t", "1"))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_mean_of_what_is_no_number_is_missing_with_its_reason() -> None:
    from twotower_eval.measure.harness.scoring import _number

    class Source:
        @staticmethod
        def aggregation() -> dict[str, Any]:
            return {}

    assert _number(Source, "likelihood", (1, 0)) == "likelihood of this document is no number (TypeError)"
    assert _number(Source, "acc", float("inf")) == "acc of this document is inf"
    assert _number(Source, "acc", 1) == 1.0


# Timed answers


def _speed_run(root: Path, plan: SpeedPlan, rows: Sequence[GenerationRow], cell: Cell) -> Path:
    manifest = RunManifest(
        **{"schema": 1, "run_id": "20260101T000000Z-speed-000000", "verb": "speed", "argv": (), "plan": to_json(plan)},
        **{"plan_sha256": "", "cells": (cell,), "started_at": "", "project_version": "0", "commit": None},
        **{"dirty": None, "packages": {}, "machine": {}, "seeds": {}},  # type: ignore[arg-type]
    )
    with store.create(root, manifest) as writer:
        for row in rows:
            writer.append(row)
        writer.finish()
    return writer.path


def test_timed_answers_are_scored_by_the_same_code(model: Any, tmp_path: Path) -> None:
    task, other = suites.resolve_tasks(["miniature_sort", "miniature_recall"], limit=3)
    spec = decoders.decoder_spec("autoregressive")
    workload = Workload(kind="answer", name="miniature", digest="d", batch_size=1)
    cell = Cell(id="abc", arm="baseline", checkpoint=model.checkpoint, decoder=spec, workload=workload)
    rows = [_row(task, doc, 0, doc.doc["answer"], "abc") for doc in task.docs]
    rows.append(_row(other, other.docs[1], 0, "no", "abc"))
    plan = SpeedPlan(tasks=("miniature_sort", "miniature_recall"))
    path = _speed_run(tmp_path, plan, rows, cell)
    for _ in range(2):  # a second time adds nothing
        assert harness.score_journal(path) == path
        run = store.load(path)
        assert run.complete
        assert {(s.task, s.doc_id): s.value for s in run.scores} == {
            **{("miniature_sort", i): 1.0 for i in range(3)},
            ("miniature_recall", 1): 0.0,
        }


def test_scores_that_leave_out_later_rounds_are_refused(model: Any, tmp_path: Path) -> None:
    """Scored after one round, timed again: the old scores stayed, and spoke of one round only."""
    (task,) = suites.resolve_tasks(["miniature_sort"], limit=1)
    workload = Workload(kind="answer", name="miniature", digest="d", batch_size=1)
    spec = decoders.decoder_spec("autoregressive")
    cell = Cell(id="abc", arm="baseline", checkpoint=model.checkpoint, decoder=spec, workload=workload)
    rows = [_row(task, task.docs[0], 0, task.docs[0].doc["answer"], "abc")]
    path = harness.score_journal(_speed_run(tmp_path, SpeedPlan(tasks=("miniature_sort",)), rows, cell))
    with store.resume(path, store.load(path).manifest) as writer:
        writer.append(_row(task, task.docs[0], 1, "wrong", "abc"))
        writer.finish()
    with pytest.raises(ValueError, match="document 0 was scored before its last rounds were timed"):
        harness.score_journal(path)
    assert store.load(path).complete


def test_only_timed_answers_can_be_scored_afterwards(model: Any, plan: RunPlan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only timed answers"):
        harness.score_journal(harness.run(dataclasses.replace(plan, limit=1), root=tmp_path))
    spec = decoders.decoder_spec("autoregressive")
    workload = Workload(kind="fixed", name="miniature", digest="d", batch_size=1)
    cell = Cell(id="abc", arm="baseline", checkpoint=model.checkpoint, decoder=spec, workload=workload)
    path = _speed_run(tmp_path / "s", SpeedPlan(workload="fixed", new_tokens=4), [], cell)
    with pytest.raises(ValueError, match="'fixed' workload"):
        harness.score_journal(path)
