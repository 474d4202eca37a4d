"""Every shipped diffusion family with every decoder that fits it.

Rows of a batch are single rows, in tokens, counts and order of commits, whatever their prompts, ends and budgets; what
lies behind an end is never counted; every loop ends.
"""

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
from family_models import FAMILIES, VOCAB, family_model
from test_decoders import assert_same, cut_by_hand
from torch import Tensor

from twotower_eval.engine.decoders import decoder_class, make_decoder
from twotower_eval.engine.decoders.reported import check_forwards
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.records import Prompt

CASES = [(family, kind, params) for family, made in FAMILIES.items() for kind, params in made.decoders]
EVERY_CASE = pytest.mark.parametrize(
    ("family", "kind", "params"), CASES, ids=[f"{family} {kind} {params}" for family, kind, params in CASES]
)


def drawn_prompts(chance: random.Random) -> list[Prompt]:
    """Uneven ones, one of a whole block, one of more."""
    lengths = [1, 4, *chance.choices(range(1, 14), k=3)]
    rows = [tuple(chance.choices(range(5, VOCAB - 1), k=length)) for length in lengths]
    return [Prompt(id=str(i), token_ids=row, seed=chance.randrange(99), trace=True) for i, row in enumerate(rows)]


@EVERY_CASE
def test_rows_of_a_batch_are_single_rows(family: str, kind: str, params: dict[str, Any]) -> None:
    model = WatchedModel(family_model(family))
    decoder = make_decoder(model, kind, **params)  # type: ignore[arg-type]
    for seed in (0, 1):
        chance = random.Random(f"{family} {kind} {params} {seed}")
        prompts, budget = drawn_prompts(chance), chance.randrange(1, 16)
        free = [decoder.generate([prompt], max_new_tokens=budget)[0] for prompt in prompts]
        # Tokens that occur end some of the rows; as strings and as ids.
        eos = [one.token_ids[chance.randrange(one.num_tokens)] for one in free[:2]]
        ends: dict[str, Any] = {"max_new_tokens": budget, "eos_token_ids": eos, "stop": ("abb", "\n")}
        alone = [decoder.generate([prompt], **ends)[0] for prompt in prompts]
        for whole, ours in zip(free, alone, strict=True):
            assert (list(ours.token_ids), ours.text, ours.finish) == cut_by_hand(whole.token_ids, eos, ends["stop"])
            assert ours.num_tokens == len(ours.token_ids) <= budget
            assert ours.num_denoiser_forwards <= whole.num_denoiser_forwards
        for width in (2, None):
            model.forget()
            together = decoder.generate(prompts, max_batch_size=width, **ends)
            check_forwards(together, model, kind)
            for one, ours in zip(alone, together, strict=True):
                assert_same(ours, one)


class OnlyMasks:
    """A model that finds the mask token the likeliest everywhere."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _masks(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., VOCAB - 1] = logits.max() + 50
        return logits

    def denoise(self, *given: Any) -> Any:
        return self._masks(self._model.denoise(*given))

    def denoise_kept(self, *given: Any) -> Any:
        logits, kept = self._model.denoise_kept(*given)
        return self._masks(logits), kept

    def denoise_part(self, *given: Any) -> Any:
        return self._masks(self._model.denoise_part(*given))

    def next_logits(self, context: Any) -> Any:
        return self._masks(self._model.next_logits(context))


def spends(kind: str, params: dict[str, Any]) -> bool:
    """Whether a decoder can commit the mask token, with these parameters."""
    known = {field.name for field in dataclasses.fields(decoder_class(kind).Params)}
    return "commit_mask" in known and (kind != "e2d2" or params.get("strategy") == "posterior")


@pytest.mark.parametrize(("family", "kind", "params"), [case for case in CASES if spends(*case[1:])])
def test_a_mask_that_wins_again_and_again_ends_some_time(family: str, kind: str, params: dict[str, Any]) -> None:
    """With commit_mask a commit of the mask is spent, and the position stays masked: the loop ended never."""
    greedy = {"temperature": 0.0} if "temperature" in params else {}
    model: Any = OnlyMasks(family_model(family))
    decoder = make_decoder(model, kind, **{**params, **greedy, "commit_mask": True})
    prompts = drawn_prompts(random.Random(3))
    for one in decoder.generate(prompts, max_new_tokens=9):
        assert one.num_tokens == 9
        assert one.num_denoiser_forwards <= 2 * 2 * 24, "at most twice as many steps as tokens, and guided ones"


def test_steps_that_were_not_asked_for_are_no_calls() -> None:
    """The last block of 9 tokens in blocks of 4 has one: four calls were made for it."""
    decoder = make_decoder(family_model("llada"), "low_confidence", block_length=4)
    [made] = decoder.generate([Prompt(id="a", token_ids=(5, 6))], max_new_tokens=9)
    assert made.num_denoiser_forwards == 9


def test_a_prompt_of_less_than_a_block_is_no_forward() -> None:
    """Nothing of it is read before its block is decoded; the harness counted one, and refused the decoder's count."""
    model = WatchedModel(copy.copy(family_model("sdar")))
    prompts = [Prompt(id=str(length), token_ids=tuple(range(5, 5 + length))) for length in (1, 3, 6)]
    made = make_decoder(model, "sdar").generate(prompts, max_new_tokens=4)  # type: ignore[arg-type]
    check_forwards(made, model, "sdar")
    assert sum(one.num for one in model.passes if one.kind == "prefill" and one.rows == 1) == 1
    assert torch.tensor([one.num_context_forwards for one in made]).tolist() == [1, 1, 2]
