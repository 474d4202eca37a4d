"""Tokens of answers come from logits of their own call: the rule by itself, and decoders that knew their answers."""

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from tests.oracle_decoders import HONEST, KIND, TRICKS, Oracle
from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.compare import Runs, SpeedPoint
from twotower_eval.analyse.compare.witness import ArmWitnessed, scored_witness_gates, witness_gates, witnessed_arms
from twotower_eval.analyse.words import found_text
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.context import Segment
from twotower_eval.engine.models.counting import WatchedModel, watched_in_place
from twotower_eval.engine.models.witness import LIKELIEST, MOST_TOKENS, Tally, Witness
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.records import (
    Claim,
    Gate,
    GateLimits,
    GenerationRow,
    OperatingPoint,
    Prompt,
    Witnessed,
    WitnessedAnswer,
    canonical_json,
    sha256_text,
)

VOCABULARY, MASK = 40, 39
PROMPT = (1, 2, 3, 4)


def logits(*rows: Sequence[int]) -> Tensor:
    """Rows whose likeliest tokens are these, in their order; behind them tokens of no answer here."""
    found = torch.zeros(len(rows), VOCABULARY)
    for row, tokens in enumerate(rows):
        for rank, token in enumerate([*tokens, *range(30, 38)][:LIKELIEST]):
            found[row, token] = 20.0 - rank
    return found


def witness() -> Witness:
    return Witness(PROMPT, MASK)


def tallied(heard: Witness, *answer: int) -> tuple[int, int]:
    found = heard.tally(answer)
    return found.num_witnessed, found.num_drafted


# The rule


def test_a_row_of_logits_witnesses_one_token() -> None:
    heard = witness()
    heard.prefilled(torch.tensor([PROMPT]))
    heard.asked(logits([10, 11]))
    assert tallied(heard, 10) == tallied(heard, 11) == tallied(heard, 11, 10) == (1, 0)
    heard.extended(torch.tensor([[10]]))
    heard.asked(logits([11, 10]))
    assert tallied(heard, 10, 11) == tallied(heard, 10, 10) == (2, 0)
    assert tallied(heard, 10, 12) == (1, 0)
    assert heard.tally([10, 11, 12]) == Tally(num_rows=2, num_tokens=3, num_witnessed=2, num_drafted=0)


def test_asking_a_context_again_computes_nothing() -> None:
    heard = witness()
    heard.prefilled(torch.tensor([PROMPT]))
    for _ in range(5):
        heard.asked(logits([10]))
    assert tallied(heard, 10, 10, 10) == (1, 0)


def test_what_stands_behind_the_prompts_own_tokens_is_no_answer() -> None:
    rows = logits([10], [11], [12], [13])[None]
    for ids in (PROMPT, (4, 2, 1, 3)):
        heard = witness()
        heard.read(torch.tensor([ids]), None, rows)
        assert tallied(heard, 10, 11, 12, 13) == (1, 0), "the last row alone is one"


def test_drafts_of_the_prompts_own_tokens_are_verified_once_it_is_read() -> None:
    """However it was read: from its beginning, piece by piece, twice."""
    for reading in ([PROMPT], [PROMPT[:2], PROMPT[2:]], [PROMPT[:2], PROMPT[2:], PROMPT]):
        heard = witness()
        heard.prefilled(torch.tensor([reading[0]]))
        for piece in reading[1:]:
            heard.extended(torch.tensor([piece]))
        heard.extended(torch.tensor([[9, 1, 2]]), None, [(0, 0), (0, 1), (0, 2)], logits([1], [2], [3]))
        assert tallied(heard, 1, 2, 3)[0] == 3


def test_contexts_beside_each_other_read_the_same_prompt() -> None:
    heard = witness()
    heard.prefilled(torch.tensor([PROMPT[:2]] * 2))
    heard.extended(torch.tensor([PROMPT[2:]] * 2), None, [(0, 1), (1, 1)], logits([10], [10]))
    heard.extended(torch.tensor([[10, 3], [10, 4]]), None, [(0, 0), (1, 0)], logits([3], [4]))
    assert tallied(heard, 10, 3, 4)[0] == 3


def test_many_tokens_are_matched_quickly() -> None:
    """In seconds where each need was searched for by itself."""
    heard = witness()
    for _ in range(40):
        heard.denoised(torch.full((1, 100), MASK), logits(*[[10, 11, 12, 13, 14, 15, 16, 17]] * 100)[None])
    started_s = time.perf_counter()
    found = heard.tally([*[10, 11] * 100, *[20, 21] * 1000])
    assert time.perf_counter() - started_s < 2
    assert (found.num_tokens, found.num_witnessed) == (MOST_TOKENS, 200)


@pytest.mark.parametrize("number", range(3))
def test_a_draft_is_verified_up_to_the_first_token_that_is_unlikely(number: int) -> None:
    """By a whole row, an extension, a tree: 10 and 11 stand, 20 does not and is corrected to 12."""
    heard, draft, rows = witness(), (10, 11, 20, 13), logits([10], [11], [12], [13], [14])
    if number == 0:
        heard.read(torch.tensor([[*PROMPT, *draft]]), None, torch.cat([logits([9], [9], [9]), rows])[None])
    else:
        heard.prefilled(torch.tensor([PROMPT]))
        heard.asked(rows[:1])
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


def test_a_denoisers_row_has_a_place_in_the_answer() -> None:
    """Many masks in one pass held every letter somewhere: any answer was found among them."""
    rows, block = logits([10, 20, 30], [11, 21, 31], [12, 22, 32])[None], torch.tensor([[MASK] * 3])
    for held in (4, 3, 5):  # some denoisers are given the prompt's last token, or predict the next one
        heard = witness()
        heard.denoised(block, rows, (held,))
        assert tallied(heard, 10, 11, 12) == (3, 0)
    heard = witness()
    heard.denoised(block, rows, (4,))
    assert tallied(heard, 20, 21, 22)[0] == 3, "a ban may pass over the likeliest"
    assert tallied(heard, 30, 31, 32)[0] == 0
    assert tallied(heard, 12, 10, 11)[0] == 2, "all moved by one place"
    anywhere = witness()
    anywhere.denoised(block, rows)
    assert tallied(anywhere, 32, 30, 31)[0] == 3, "a context that does not say what it holds"


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
    for prompt in prompts(2):
        watched = WatchedModel(model)
        with watched.witnessed(prompt.token_ids) as heard:
            [made] = make_decoder(watched, kind, **params).generate([prompt], **asked)
        found = heard.tally(made.token_ids)
        assert found.num_tokens == found.num_witnessed > 0
        assert found.num_drafted == 0 or params.get("block_size") in (5, 8)
        with watched_in_place(model) as noted, noted.witnessed(prompt.token_ids) as other:
            assert make_decoder(model, kind, **params).generate([prompt], **asked) == [made]
        assert other.tally(made.token_ids) == found


# Through the harness

TASKS, NUM_PROMPTS, BUDGET = ("miniature_sort",), 8, 8
SIZES = (1, 4)


def documents() -> list[Any]:
    return suites.build_requests(suites.resolve_tasks(TASKS, limit=40))


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
    Oracle.read.clear()


@pytest.fixture(scope="module")
def timed(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    remember(pair, BUDGET)
    plan = SpeedPlan(
        model=str(pair), tasks=TASKS, decoder=KIND, block_sizes=tuple(TRICKS | HONEST), num_prompts=NUM_PROMPTS,
        batch_sizes=SIZES, new_tokens=BUDGET, min_rounds=1, warmup_rounds=1, probes=1, costs=False, threads=1,
    )  # fmt: skip
    return store.load(speed.run(plan, documents(), root=tmp_path_factory.mktemp("timed")))


def point_of(run: store.Run, trick: str, size: int) -> SpeedPoint:
    [number] = [number for number, name in (TRICKS | HONEST).items() if name == trick]
    [found] = [
        one
        for one in Runs([run]).speed
        if one.candidate.decoder.params["block_size"] == number and one.batch_size == size
    ]
    return found


def gates_of(point: SpeedPoint) -> dict[str, Gate]:
    return {gate.kind: gate for gate in point.gates}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("trick", TRICKS.values())
def test_whatever_knew_its_answers_is_invalid(timed: store.Run, trick: str, size: int) -> None:
    """All documents were in its file, so that only made-up prompts were new to it, and nobody read its babble."""
    point = point_of(timed, trick, size)
    found, witness_of = gates_of(point), "witnessed_answers"
    if trick == "a file, verified":
        assert found[witness_of].outcome == "passed"
        # Of larger batches four prompts are witnessed, too few to tell: more launches have more of them.
        assert found["drafts"].outcome == ("failed" if size == 1 else "not_checked")
        assert "drafts were" in found_text(found["drafts"])
    elif trick == "a file for what it has read before":
        assert found["same_rounds"].outcome == "failed"
        assert point.unseen.candidate.forwards.estimate is not None
        assert point.unseen.candidate.forwards.estimate.low > 2
    else:
        assert found[witness_of].outcome == "failed"
        assert "no logits of these calls explain the others" in found_text(found[witness_of])
    at = OperatingPoint(name="here", decoder=point.candidate.decoder, batch_size=size, num_devices=1, workload="answer")
    claim = Claim(
        name="fast", quantity="speedup_time", subject=point.candidate.checkpoint.name, baseline="context-tower",
        source="us", point=at, expected=1.5, margin=0.05,
    )  # fmt: skip
    [verdict] = judge([claim], [timed])
    assert verdict.outcome == "INVALID" or (trick, size) == ("a file, verified", 4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("trick", HONEST.values())
def test_honest_drafts_pass(timed: store.Run, trick: str, size: int) -> None:
    found = gates_of(point_of(timed, trick, size))
    assert found["witnessed_answers"].outcome == "passed"
    assert found["same_rounds"].outcome == "passed"
    assert "drafts" not in found or found["drafts"].outcome == "passed"


def test_witnessed_calls_are_in_no_figure(timed: store.Run) -> None:
    without = dataclasses.replace(timed, witnessed=[])
    figures = ("time", "throughput", "length", "null", "counts", "baseline_counts", "latency", "costs", "unseen")
    for one, other in zip(Runs([timed]).speed, Runs([without]).speed, strict=True):
        assert gates_of(other)["witnessed_answers"].outcome == "not_checked"
        for figure in (*figures, "num_rounds", "num_calls", "samples"):
            assert getattr(one, figure) == getattr(other, figure), figure


def test_each_launch_witnesses_a_few_calls_of_one_prompt(timed: store.Run) -> None:
    assert {(row.round, len(row.answers)) for row in timed.witnessed} == {(0, 1)}
    for cell in timed.manifest.cells:
        own = Counter(row.kind for row in timed.witnessed if row.cell == cell.id)
        assert own["timed"] == (8 if cell.workload.batch_size == 1 else 4)
        assert own["made up"] >= 8
    assert Counter(row.kind for row in timed.witnessed)["document"] > 0, "as long as there are any"
    warm = {(one.cell, one.call_id): one.prompts for one in timed.speed if one.phase == "warmup" and not one.replica}
    for row in (row for row in timed.witnessed if row.kind == "timed" and row.call_id.startswith("b1-")):
        [prompt] = warm[row.cell, row.call_id]
        assert prompt.tokens_sha256 == sha256_text(canonical_json(list(row.answers[0].token_ids)))


# The rules of the gates


def made_of(run: store.Run, point: SpeedPoint, known: Sequence[int], new: Sequence[int]) -> dict[str, Gate]:
    """The gates where so many of ten tokens were drafted for each timed and each made-up prompt."""
    rows = [row for row in run.witnessed if row.cell != point.candidate.id]
    for kind, drafted in (("timed", known), ("made up", new)):
        for number, num in enumerate(drafted):
            answer = WitnessedAnswer(prompt_id=f"{kind}/{number}", token_ids=(1,) * 10)
            row = Witnessed(
                cell=point.candidate.id, launch_id="l", round=0, call_id=f"{kind}{number}", kind=kind,  # type: ignore[arg-type]
                answers=(answer,), num_rows=10, num_tokens=10, num_witnessed=10, num_drafted=num,
            )  # fmt: skip
            rows.append(row)
    found = witness_gates([dataclasses.replace(run, witnessed=rows)], point, GateLimits())
    return {gate.kind: gate for gate in found}


def test_drafts_for_known_prompts_alone_have_to_be_no_chance(timed: store.Run) -> None:
    point = point_of(timed, "drafts from the prompt", 1)
    assert made_of(timed, point, [9] * 8, [0] * 8)["drafts"].outcome == "failed"
    assert made_of(timed, point, [9] * 8, [0] * 7)["drafts"].outcome == "not_checked"
    assert made_of(timed, point, [9] * 3 + [1] * 5, [0] * 8)["drafts"].outcome == "not_checked", "a third copies"
    assert made_of(timed, point, [9] * 8, [9] + [0] * 7)["drafts"].outcome == "passed"
    assert "drafts" not in made_of(timed, point, [1] * 8, [0] * 8)


def test_prompts_that_copy_by_chance_are_next_to_never_a_fault(timed: store.Run) -> None:
    """A third of the prompts copy: nine in ten of their tokens are drafted, of the others one in fifty."""
    point = point_of(timed, "drafts from the prompt", 1)
    chance = random.Random(0)
    draw = [[9 if chance.random() < 0.35 else 0 for _ in range(16)] for _ in range(200)]
    found = [made_of(timed, point, one[:8], one[8:]).get("drafts") for one in draw]
    assert not any(gate is not None and gate.outcome == "failed" for gate in found)


def test_answers_that_differ_when_witnessed_are_two_faced(timed: store.Run) -> None:
    """In half precision only where more differ than rounding parts, and surely."""
    point = point_of(timed, "drafts from the prompt", 1)
    cell, limits = point.candidate, GateLimits()
    own = [row for row in timed.witnessed if row.cell == cell.id and row.kind == "timed"]
    changed = [
        dataclasses.replace(row, answers=(dataclasses.replace(row.answers[0], token_ids=(5,) * 30),)) for row in own
    ]

    def arm(num: int, dtype: str) -> ArmWitnessed:
        rows = [row for row in timed.witnessed if row not in own]
        half = dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, dtype=dtype))
        edited = dataclasses.replace(timed, witnessed=[*rows, *changed[:num], *own[num:]])
        return witnessed_arms([edited], dataclasses.replace(point, candidate=half))[1]

    assert arm(0, "float32").num_compared == len(own)
    assert [arm(num, "float32").is_two_faced(limits) for num in (0, 1, 8)] == [False, True, True]
    assert [arm(num, "bfloat16").is_two_faced(limits) for num in (0, 1, 3, 8)] == [False, False, False, True]


def test_calls_of_several_prompts_say_nothing_of_single_tokens(timed: store.Run) -> None:
    """Older runs have them: rows of one prompt were taken for those of another."""
    point = point_of(timed, "drafts from the prompt", 1)
    run = dataclasses.replace(
        timed,
        witnessed=[dataclasses.replace(row, answers=row.answers * 2, num_witnessed=0) for row in timed.witnessed],
    )
    [gate] = witness_gates([run], point, GateLimits())
    assert gate.outcome == "not_checked"


# In a run


@pytest.mark.parametrize("batch_size", SIZES)
def test_a_run_alone_tells_an_oracle(pair: Path, tmp_path: Path, batch_size: int) -> None:
    """Not one that gives its answers to the model as drafts: nothing is made up for it, and drafts may be honest."""
    remember(pair, 8)
    sizes = (1, 2, 3, 5, 7)
    plan = RunPlan(
        model=str(pair), tasks=TASKS, decoder=KIND, block_sizes=sizes, limit=4, max_new_tokens=8, batch_size=batch_size
    )
    run = store.load(harness.run(plan, root=tmp_path))
    assert {row.kind for row in run.witnessed} == {"scored"}
    assert {row.cell for row in run.witnessed} == set(run.cells), "both arms"
    generations = {(row.cell, row.generation.prompt_id): row.generation for row in run.generations}
    assert len(generations) == len(run.generations) == 4 * len(run.cells), "nothing is decoded twice"
    for row in run.witnessed:
        [answer] = row.answers
        assert answer.token_ids == generations[row.cell, answer.prompt_id].token_ids
    for point in Runs([run]).quality:
        [gate] = scored_witness_gates([run], point, GateLimits())
        size = int(point.candidate.decoder.params["block_size"] or 0)
        assert gate.outcome == ("passed" if size in (3, 5) else "failed")
        at = OperatingPoint(name="here", decoder=point.candidate.decoder)
        claim = Claim(
            name="kept", quantity="retention", subject=point.candidate.checkpoint.name, baseline="context-tower",
            source="us", point=at, expected=0.5, margin=0.01, scope=TASKS,
        )  # fmt: skip
        [verdict] = judge([claim], [run])
        assert ("witnessed answers" in verdict.reason) == (size not in (3, 5))
        assert size in (3, 5) or verdict.outcome == "INVALID"


def test_a_run_that_is_killed_between_a_witness_and_its_answer_loses_nothing(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RunPlan(model=str(pair), tasks=TASKS, block_sizes=(4,), limit=3, max_new_tokens=8, batch_size=2)
    whole = store.load(harness.run(plan, root=tmp_path / "whole"))
    own = store.RunWriter.append
    killed = []

    def append(writer: store.RunWriter, row: Any) -> None:
        if not killed and isinstance(row, GenerationRow) and any(row.cell == one for one in told):
            killed.append(row)
            raise KeyboardInterrupt
        told.extend([row.cell] if isinstance(row, Witnessed) else [])
        own(writer, row)

    told: list[str] = []
    monkeypatch.setattr(store.RunWriter, "append", append)
    with pytest.raises(KeyboardInterrupt):
        harness.run(plan, root=tmp_path / "killed")
    [path] = store.find_runs(tmp_path / "killed")
    run = store.load(harness.run(plan, root=tmp_path / "killed", resume=path))
    assert killed
    by_key = [sorted(one.witnessed, key=lambda row: (row.cell, row.call_id)) for one in (whole, run)]
    assert by_key[0] == by_key[1]
    assert {(row.cell, row.doc_id): row.generation.token_ids for row in run.generations} == {
        (row.cell, row.doc_id): row.generation.token_ids for row in whole.generations
    }


def test_drawn_answers_are_not_witnessed(pair: Path, tmp_path: Path) -> None:
    plan = RunPlan(model=str(pair), tasks=TASKS, block_sizes=(4,), limit=2, max_new_tokens=8, temperature=0.5)
    assert not store.load(harness.run(plan, root=tmp_path)).witnessed


class Hungry(Oracle):
    def generate(self, prompts: Sequence[Prompt], **asked: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("witnessed", [frozenset(), frozenset({("t", 0, 0, 0)})])
def test_a_run_without_memory_names_its_batch_size(pair: Path, witnessed: frozenset[Any]) -> None:
    model = load_model(pair)
    lm = HarnessLM(model, decoder=Hungry(model, Hungry.Params()), batch_size=2, witnessed=witnessed)
    arguments = ("12", {"until": ["e"], "max_gen_toks": 4})
    request = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1))
    with pytest.raises(ValueError, match="Hungry: out of memory: take a smaller --batch-size or shorter prompts"):
        lm.generate_until([request])
