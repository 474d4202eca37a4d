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
from twotower_eval import harness, speed, store, suites
from twotower_eval.claims import judge
from twotower_eval.decoders import make_decoder
from twotower_eval.evidence import Runs, SpeedPoint
from twotower_eval.evidence.witness import witness_gates, witnessed_arms
from twotower_eval.models import load_model
from twotower_eval.models.counting import WatchedModel, noted_in_place
from twotower_eval.models.token_tree import Segment
from twotower_eval.models.witness import TOP, Tally, Witness
from twotower_eval.plan import RunPlan, SpeedPlan
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
