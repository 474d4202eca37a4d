"""Tokens of answers come from logits of their own call: the rule by itself, and decoders that knew their answers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle_decoders import HONEST, KIND, TRICKS, Oracle
from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.compare import Runs, SpeedPoint
from twotower_eval.analyse.compare.witness import scored_witness_gates, witness_gates, witnessed_arms
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.counting import WatchedModel, noted_in_place
from twotower_eval.engine.models.token_tree import Segment
from twotower_eval.engine.models.witness import TOP, Tally, Witness
from twotower_eval.measure import harness, speed, suites
from twotower_eval.plan import RunPlan, SpeedPlan, data_path
from twotower_eval.records import Claim, Gate, GateLimits, OperatingPoint, Prompt

VOCABULARY, MASK = 40, 39
PROMPT = (1, 2, 3, 4)


def logits(*rows: Sequence[int]) -> Tensor:
    """Rows whose likeliest tokens are these, in their order; behind them tokens of no answer here."""
    found = torch.zeros(len(rows), VOCABULARY)
    for row, tokens in enumerate(rows):
        for rank, token in enumerate([*tokens, *range(30, 38)][:TOP]):
            found[row, token] = 20.0 - rank
    return found


def witness() -> Witness:
    return Witness([PROMPT], MASK)


def tallied(heard: Witness, *answer: int) -> tuple[int, int]:
    found = heard.tally([answer])
    return found.num_witnessed, found.num_drafted


# The rule


def test_a_row_of_logits_witnesses_one_token() -> None:
    heard = witness()
    heard.prefilled(torch.tensor([PROMPT]))
    heard.told(logits([10, 11]))
    assert tallied(heard, 10) == tallied(heard, 11) == tallied(heard, 11, 10) == (1, 0)
    heard.extended(torch.tensor([[10]]))
    heard.told(logits([11, 10]))
    assert tallied(heard, 10, 11) == tallied(heard, 10, 10) == (2, 0)
    assert tallied(heard, 10, 12) == (1, 0)
    assert heard.tally([[10, 11], [12]]) == Tally(num_rows=2, num_tokens=3, num_witnessed=2, num_drafted=0)


def test_asking_a_context_again_computes_nothing() -> None:
    heard = witness()
    heard.prefilled(torch.tensor([PROMPT]))
    for _ in range(5):
        heard.told(logits([10]))
    assert tallied(heard, 10, 10, 10) == (1, 0)


def test_what_stands_behind_the_prompts_own_tokens_is_no_answer() -> None:
    rows = logits([10], [11], [12], [13])[None]
    for ids in (PROMPT, (4, 2, 1, 3)):
        heard = witness()
        heard.read(torch.tensor([ids]), None, rows)
        assert tallied(heard, 10, 11, 12, 13) == (1, 0), "the last row alone is one"


def test_the_prompt_of_a_row_is_the_one_that_it_begins_with() -> None:
    """A longer one may have more in common with the prompt and its answer together."""
    heard = Witness([(1, 2), (5, 6, 1, 7, 8)], MASK)
    heard.read(torch.tensor([[1, 2, 5, 6, 7, 8]]), None, logits([2], [5], [6], [7], [8], [9])[None])
    assert tallied(heard, 5, 6, 7, 8, 9) == (5, 4)


@pytest.mark.parametrize("number", range(3))
def test_a_draft_is_verified_up_to_the_first_token_that_is_unlikely(number: int) -> None:
    """By a whole row, an extension, a tree: 10 and 11 stand, 20 does not and is corrected to 12."""
    heard, draft, rows = witness(), (10, 11, 20, 13), logits([10], [11], [12], [13], [14])
    if number == 0:
        heard.read(torch.tensor([[*PROMPT, *draft]]), None, torch.cat([logits([9], [9], [9]), rows])[None])
    else:
        heard.prefilled(torch.tensor([PROMPT]))
        heard.told(rows[:1])
        places = [(0, at) for at in range(4)]
        if number == 1:
            heard.extended(torch.tensor([draft]), None, places, rows[1:])
        else:
            tree = [Segment(-1, draft[:2], (0, 1)), Segment(0, draft[2:], (0, 1))]
            heard.read_tree(tree, rows[1:])
    assert tallied(heard, 10, 11, 12) == (3, 2 if number == 0 else 1)
    assert tallied(heard, 10, 11, 12, 14) == (3, 2 if number == 0 else 1)


def test_a_masks_row_is_an_answer_and_no_draft() -> None:
    heard = witness()
    heard.prefilled(torch.tensor([PROMPT]))
    heard.denoised(torch.tensor([[MASK, MASK]]), logits([10], [11])[None])
    heard.denoised(torch.tensor([[10, MASK]]), logits([10], [12])[None])
    heard.extended(torch.tensor([[10, 12]]))
    assert tallied(heard, 10, 12) == (2, 0)
    drafted = witness()
    drafted.denoised(torch.tensor([[10, 12]]), logits([10], [12])[None])
    assert tallied(drafted, 10, 12) == (2, 2)


def test_rows_are_given_out_so_that_most_tokens_find_one() -> None:
    heard = witness()
    heard.denoised(torch.tensor([[MASK] * 4]), logits([10, 11, 12], [10, 11], [10], [12])[None])
    assert tallied(heard, 10, 11, 12, 12) == (4, 0)
    assert tallied(heard, 10, 10, 10, 11) == (3, 0)


# The decoders


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


def prompts(num: int) -> list[Prompt]:
    return [Prompt(id=str(n), token_ids=tuple(range(5 + n, 25 + 3 * n)), seed=n) for n in range(num)]


DECODERS: list[tuple[str, dict[str, Any]]] = [
    ("autoregressive", {}),
    ("mock_ar", {}),
    ("block_diffusion", {"block_size": 4}),
    ("block_diffusion", {"block_size": 8, "threshold": 0.0}),
    ("reference", {"block_size": 4}),
    ("reference", {"mode": "autoregressive"}),
    ("tests.example_decoder:Greedy", {}),
    *((KIND, {"block_size": size}) for size in HONEST),
]


@pytest.mark.parametrize(("kind", "params"), DECODERS, ids=[f"{kind} {params}" for kind, params in DECODERS])
def test_whatever_an_honest_decoder_answers_is_witnessed(pair: Path, kind: str, params: dict[str, Any]) -> None:
    model = load_model(pair)
    asked = {"max_new_tokens": 11, "eos_token_ids": model.eos_token_ids, "stop": ("e",)}
    watched = WatchedModel(model)
    with watched.witnessed(prompt.token_ids for prompt in prompts(3)) as heard:
        made = make_decoder(watched, kind, **params).generate(prompts(3), **asked)
    found = heard.tally(answer.token_ids for answer in made)
    assert found.num_tokens == found.num_witnessed > 0
    assert found.num_drafted == 0 or params.get("block_size") == 5
    with noted_in_place(model) as noted, noted.witnessed(prompt.token_ids for prompt in prompts(3)) as other:
        assert make_decoder(model, kind, **params).generate(prompts(3), **asked) == made
    assert other.tally(answer.token_ids for answer in made) == found


# Through the harness

TASKS, NUM_PROMPTS, BUDGET = ("miniature_sort",), 3, 24


def documents() -> list[Any]:
    return suites.build_requests(suites.resolve_tasks(TASKS, limit=NUM_PROMPTS))


def remember(pair: Path, budget: int) -> None:
    """Write the baseline's answers to all documents of the task into the oracle's file, as a run before would."""
    model = load_model(pair)
    requests = documents()
    asked = [Prompt(id=str(n), token_ids=model.tokenizer.encode(one.text)) for n, one in enumerate(requests)]
    stop = requests[0].stop
    with torch.inference_mode():
        answers = make_decoder(model, "autoregressive").generate(
            asked, max_new_tokens=budget, eos_token_ids=model.eos_token_ids, stop=stop
        )
    Oracle.known.update({one.token_ids: made.token_ids for one, made in zip(asked, answers, strict=True)})


@pytest.fixture(scope="module")
def timed(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    remember(pair, BUDGET)
    plan = SpeedPlan(
        model=str(pair), tasks=TASKS, decoder=KIND, block_sizes=tuple(TRICKS | HONEST), num_prompts=NUM_PROMPTS,
        new_tokens=BUDGET, min_rounds=2, warmup_rounds=0, costs=False, threads=1,
    )  # fmt: skip
    return store.load(speed.run(plan, documents(), root=tmp_path_factory.mktemp("timed")))


def points(run: store.Run) -> dict[str, SpeedPoint]:
    tricks = TRICKS | HONEST
    return {tricks[int(one.candidate.decoder.params["block_size"] or 0)]: one for one in Runs([run]).speed}


def gates_of(point: SpeedPoint) -> dict[str, Gate]:
    return {gate.kind: gate for gate in point.gates}


@pytest.mark.parametrize("trick", TRICKS.values())
def test_whatever_knew_its_answers_is_invalid(timed: store.Run, trick: str) -> None:
    """All documents were in its file, so that only made-up prompts were new to it, and nobody read its babble."""
    point = points(timed)[trick]
    kind = "drafts" if trick == "a file, verified" else "witnessed_answers"
    assert gates_of(point)[kind].outcome == "failed"
    at = OperatingPoint(name="here", decoder=point.candidate.decoder, batch_size=1, num_devices=1, workload="answer")
    claim = Claim(
        name="fast", quantity="speedup_time", subject=point.candidate.checkpoint.name, baseline="context-tower",
        source="us", point=at, expected=1.5, margin=0.05,
    )  # fmt: skip
    [verdict] = judge([claim], [timed])
    assert verdict.outcome == "INVALID"
    said = "were given to the model before it had computed them" if kind == "drafts" else "not made by the model"
    assert said in verdict.reason


@pytest.mark.parametrize("trick", HONEST.values())
def test_honest_drafts_pass(timed: store.Run, trick: str) -> None:
    found = gates_of(points(timed)[trick])
    assert found["witnessed_answers"].outcome == "passed"
    assert "drafts" not in found or found["drafts"].outcome != "failed"


def test_witnessed_calls_are_in_no_figure(timed: store.Run) -> None:
    without = points(dataclasses.replace(timed, witnessed=[]))
    figures = ("time", "throughput", "length", "null", "counts", "baseline_counts", "latency", "costs", "unseen")
    for trick, point in points(timed).items():
        assert gates_of(without[trick])["witnessed_answers"].outcome == "not_checked"
        for figure in (*figures, "num_rounds", "num_calls", "samples"):
            assert getattr(point, figure) == getattr(without[trick], figure), figure
    assert {row.kind for row in timed.witnessed} >= {"timed", "made up"}
    assert {sample.phase for sample in timed.speed} == {"measure", "probe"}


def test_answers_that_differ_before_a_witness_are_two_faced(timed: store.Run) -> None:
    point = points(timed)["drafts from the prompt"]
    rows = [
        dataclasses.replace(
            row, answers=tuple(dataclasses.replace(one, token_ids=(*one.token_ids, 5)) for one in row.answers)
        )
        if row.cell == point.candidate.id and row.kind == "timed"
        else row
        for row in timed.witnessed
    ]
    [gate, *_] = witness_gates([dataclasses.replace(timed, witnessed=rows)], point, GateLimits())
    assert gate.outcome == "failed"
    assert "answers are others before a witness than without" in gate.detail
    baseline, candidate = witnessed_arms([timed], point)
    assert not baseline.differing
    assert not candidate.differing
    assert candidate.num_compared


# In a run


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_alone_tells_an_oracle(tmp_path: Path, size: int) -> None:
    """On the shipped pair: scored answers that were in its file, and honest ones."""
    pair = data_path("miniature", "pair")
    remember(pair, 8)
    plan = RunPlan(
        model=str(pair), tasks=TASKS, decoder=KIND, block_sizes=(size,), limit=2, max_new_tokens=8, batch_size=2
    )
    run = store.load(harness.run(plan, root=tmp_path))
    assert {row.kind for row in run.witnessed} == {"scored"}
    assert {row.cell for row in run.witnessed} == set(run.cells), "both arms"
    [point] = Runs([run]).quality
    [gate, *_] = scored_witness_gates([run], point, GateLimits())
    assert gate.outcome == ("passed" if size in HONEST else "failed")
    at = OperatingPoint(name="here", decoder=point.candidate.decoder)
    claim = Claim(
        name="kept", quantity="retention", subject=point.candidate.checkpoint.name, baseline="context-tower",
        source="us", point=at, expected=0.5, margin=0.01, scope=TASKS,
    )  # fmt: skip
    [verdict] = judge([claim], [run])
    assert ("witnessed answers" in verdict.reason) == (size not in HONEST)
    assert size in HONEST or verdict.outcome == "INVALID"
