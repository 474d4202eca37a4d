"""Runs with Hugging Face baselines: right however they are run, said in the manifest, refused before a row, and no
speedup over a handicap."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import save_reading
from report_fixture import CONTEXT, speed_run
from tiny_pair import write_pair

from twotower_eval import cli, store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.claims.files import claims_from
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.gates import gates as gates_section
from twotower_eval.measure import harness
from twotower_eval.measure.suites import resolve_tasks
from twotower_eval.measure.verify.checks import proved
from twotower_eval.plan import RunPlan
from twotower_eval.records import FailedTrial, SpeedSample, Ways
from twotower_eval.rules import (
    Handicap,
    ProofOutcome,
    handicap_text,
    handicaps,
    proof_outcome,
    slower_lines,
    ways_text,
)
from twotower_eval.store import load
from twotower_eval.store.resume import what_differs

TASKS = ("miniature_sort", "miniature_choice")
CLAIM: dict[str, Any] = {
    "title": "t",
    "point": [
        {
            "name": "here",
            "batch_size": 1,
            "num_devices": 1,
            "workload": "answer",
            "decoder": {
                "kind": "block_diffusion",
                "block_size": 16,
                "steps_per_block": "auto",
                "threshold": 0.8,
                "temperature": 0.0,
            },
        }
    ],
    "claim": [
        {
            "name": "fast",
            "quantity": "speedup_time",
            "expected": 1.2,
            "subject": "pair",
            "baseline": "context-tower",
            "point": "here",
            "source": "a test",
        }
    ],
}
LIMIT, NEW_TOKENS = 2, 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


def baseline_rows(run: store.Run) -> tuple[list[Any], list[Any]]:
    baseline = {cell.id for cell in run.manifest.cells if cell.arm == "baseline"}
    return [g for g in run.generations if g.cell in baseline], [row for row in run.likelihoods if row.cell in baseline]


@pytest.mark.parametrize("name", ["bamba", "gpt_neo"])
def test_a_run_is_that_of_passes_without_cache_at_every_batch_size(name: str, pair: Path, tmp_path: Path) -> None:
    """Positions that restart beside states made every text of a Bamba wrong, and a window inside modules every
    log-likelihood of a GPT-Neo."""
    folder = save_reading(name, tmp_path / name)
    native = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    docs = [(task.name, doc) for task in resolve_tasks(TASKS, limit=LIMIT) for doc in task.docs]
    texts = {(task, doc.doc_id, one.idx): one.args for task, doc in docs for one in doc.instances}
    for batch_size in (1, 8):
        plan = RunPlan(
            model=str(pair), baseline=str(folder), tasks=TASKS, limit=LIMIT, max_new_tokens=NEW_TOKENS,
            block_sizes=(4,), batch_size=batch_size,
        )  # fmt: skip
        run = load(harness.run(plan, root=tmp_path / str(batch_size)))
        [ways] = run.manifest.ways
        assert ways.checkpoint == next(c for c in run.manifest.cells if c.arm == "baseline").checkpoint.identity
        assert ways.positions_passed is (name == "bamba")
        assert [line.startswith(f"{name}: ") for line in slower_lines(run.manifest)] == [True]
        tokenizer = harness.jobs.load_models(plan)[0].tokenizer
        generations, likelihoods = baseline_rows(run)
        assert (len(generations), len(likelihoods) > LIMIT) == (LIMIT, True)
        for row in generations:
            prompt, _ = texts[row.task, row.doc_id, row.request_index]
            known = list(tokenizer.encode(prompt, add_special_tokens=True))
            assert len(known) == row.generation.num_prompt_tokens
            for token in row.generation.token_ids:
                assert token == int(native(input_ids=torch.tensor([known]), use_cache=False).logits[0, -1].argmax())
                known.append(token)
        for row in likelihoods:
            context, option = texts[row.task, row.doc_id, row.request_index]
            ids = tokenizer.encode(context + option)
            start = len(ids) - row.num_tokens
            logprobs = native(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
            right = sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))
            assert row.likelihood.logprob_nats == pytest.approx(right, abs=2e-3)


@pytest.mark.parametrize("verb", ["run", "speed"])
def test_an_encoder_is_refused_before_anything_is_written(
    verb: str, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_reading("bert", tmp_path / "bert")
    arguments = [verb, "--model", str(pair), "--baseline", str(folder), "--tasks", "miniature_sort"]
    assert cli.main([*arguments, "--out", str(tmp_path / "results")]) == 2
    assert "is not causal as its config.json has it" in capsys.readouterr().err
    assert not store.find_runs(tmp_path / "results")


def test_verify_says_how_a_model_is_run(tmp_path: Path) -> None:
    folder = save_reading("gpt_neo", tmp_path / "gpt_neo")
    assert cli.main(["verify", str(folder), "--out", str(tmp_path)]) == 0
    [path] = store.find_runs(tmp_path, "verify")
    [check] = [check for check in load(path).checks if check.name == "proved_against_whole_rows"]
    assert check.outcome == "passed"
    assert check.detail.startswith(
        "every option of a question in a row of its own; tried on up to 17 tokens against whole rows"
    )


def test_what_slows_an_arm() -> None:
    """Prompts one after the other slow nobody who times them so, and contexts that stay short miss no cache."""
    assert handicaps("baseline", Ways(positions_passed=True, passes_together=False), batch_size=8, longest=99) == ()
    assert handicaps("baseline", Ways(rows_together=False), batch_size=1, longest=99) == ()
    [alone] = handicaps("baseline", Ways(rows_together=False), batch_size=2, longest=99)
    assert alone == Handicap(arm="baseline", way="one prompt after the other")
    assert handicaps("candidate", Ways(plain_beyond=99), batch_size=2, longest=99) == ()
    assert [h.way for h in handicaps("candidate", Ways(plain_beyond=98), batch_size=2, longest=99)] == [
        "no cache for long contexts"
    ]
    assert [h.way for h in handicaps("baseline", Ways(cached=False), batch_size=1, longest=9)] == ["no cache"]


def test_a_speedup_over_a_baseline_without_cache_is_invalid(tmp_path: Path) -> None:
    """What a handicap gives is no speedup: INVALID in tables, among the gates and for a claim."""
    slow = Ways(checkpoint=CONTEXT.identity, cached=False, proved_tokens=11)
    quick = Ways(checkpoint=CONTEXT.identity, proved_tokens=11)
    for ways in (slow, quick):
        run = load(speed_run(tmp_path / str(ways.cached), ways=(ways,)))
        assert run.manifest.ways == (ways,)
        [point] = Runs([run]).speed
        assert point.invalid is (ways is slow)
        section = gates_section(Runs([run])).markdown
        assert ways_text(ways) in section
        assert ("the baseline was timed without a cache" in section) is (ways is slow)
        [verdict] = judge(claims_from("test", CLAIM).claims, [run])
        assert (verdict.outcome == "INVALID") is (ways is slow)
        assert ("fastest way: the baseline was timed without a cache" in verdict.reason) is (ways is slow)


def test_a_hybrid_baseline_timed_length_by_length_is_invalid(tmp_path: Path) -> None:
    """Its batches of unlike lengths took several times the forwards, and the speedup over it was valid."""

    def unlike(row: Any) -> Any:
        if not isinstance(row, SpeedSample):
            return row
        return replace(row, prompts=tuple(replace(p, num_prompt_tokens=9 + i) for i, p in enumerate(row.prompts)))

    hybrid = Ways(checkpoint=CONTEXT.identity, unlike_lengths_together=False, proved_tokens=11)
    for name, size, edit in (("unlike", 2, unlike), ("like", 2, None), ("alone", 1, unlike)):
        run = load(speed_run(tmp_path / name, ways=(hybrid,), batch_sizes=(size,), edit=edit))
        [point] = Runs([run]).speed
        assert point.invalid is (name == "unlike")


def test_a_gate_says_how_far_a_proof_went(tmp_path: Path) -> None:
    """It said passed of every model, also of one that could not be tried."""
    alone = FailedTrial(check="options in one row", num_tokens=11, difference=1.6, limit=5e-4)
    known = Ways(proved_tokens=11, precision="float32")
    outcomes: dict[Ways, ProofOutcome] = {
        known: "fastest",
        replace(known, positions_passed=True): "fastest",
        replace(known, cached=False): "slower",
        replace(known, rows_together=False): "slower",
        replace(known, passes_together=False): "slower",
        replace(known, unlike_lengths_together=False): "slower",
        replace(known, plain_beyond=9): "slower",
        replace(known, failed=(alone,)): "slower",
        replace(known, cached=False, precision="bfloat16"): "not checked",
    }
    words = {"fastest": "passed", "slower": "slower way", "not checked": "not checked"}
    for number, (ways, outcome) in enumerate(outcomes.items()):
        assert proof_outcome(ways) == outcome
        run = load(speed_run(tmp_path / str(number), ways=(replace(ways, checkpoint=CONTEXT.identity),)))
        [row] = [line for line in gates_section(Runs([run])).markdown.splitlines() if "proved against" in line]
        assert row.split("|")[2].strip() == words[outcome]
        assert bool(slower_lines(run.manifest)) is (outcome != "fastest")
        assert proved(ways).outcome == ("not_checked" if outcome == "not checked" else "passed")


def test_ways_are_told_in_plain_words() -> None:
    assert ways_text(Ways(proved_tokens=11, precision="float32")) == (
        "with a cache, the rows of a batch together; tried on up to 11 tokens against whole rows without a cache"
    )
    half = Ways(cached=False, proved_tokens=11, precision="bfloat16")
    assert "not proved: float32 does not fit into memory, and in bfloat16 rounding hides faults" in ways_text(half)
    long = Ways(plain_beyond=4094, resets_first=True, short_of_memory_at=4096)
    assert "contexts of more than 4,094 tokens without a cache, one by one, with a short row before" in ways_text(long)
    slow = handicaps("baseline", Ways(unlike_lengths_together=False), batch_size=2, longest=9)
    assert handicap_text(slow) == (
        "the baseline was timed with prompts of one length together only, several passes a step for a mixed batch: "
        "a model that is slowed down gives no speedup"
    )


def test_a_run_that_is_timed_goes_on_in_the_same_ways_only(tmp_path: Path) -> None:
    old = load(speed_run(tmp_path / "a", ways=(Ways(cached=False),))).manifest
    new = load(speed_run(tmp_path / "b", ways=(Ways(proved_tokens=9),))).manifest
    assert any("how models are run" in line for line in what_differs(old, new))
    assert not any("how models are run" in line for line in what_differs(new, new))
