"""Keys and values grow in place, and contexts stay values: what goes on from one of them changes no other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf_models import CONFIGS, save_tiny
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.transformers_cache import LEAST_ROOM, CacheContext, GrowingLayer
from twotower_eval.records import Prompt

ATOL = 2e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: load_model(save_tiny(name, tmp_path_factory.mktemp(name))) for name in CONFIGS}


def layers_of(context: CacheContext) -> list[Any]:
    (part,) = context.parts
    assert part.cache is not None
    return list(part.cache.layers)


def whole(model: Any, row: list[int]) -> Tensor:
    logits: Tensor = model.context_logits(torch.tensor([row]), last=1)[0]
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_writes_its_own_column_and_copies_nothing(name: str, models: dict[str, Any]) -> None:
    context = models[name].prefill(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    before = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers_of(context)]
    places = []
    for token in range(LEAST_ROOM):
        context = models[name].extend(context, torch.tensor([[token], [token + 1]]))
        places.append([(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers_of(context)])
    assert all(type(layer) is GrowingLayer for layer in layers_of(context))
    same = [now == then for then, now in zip([before, *places], places, strict=False)]
    assert same.count(False) == 1  # the room of the prompt ends once, at its last column


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_new", [1, 3, LEAST_ROOM + 5])
def test_branches_of_a_context_know_nothing_of_each_other(name: str, num_new: int, models: dict[str, Any]) -> None:
    """They go on in turns, token by token, from a context that stays what it was."""
    model = models[name]
    prompt, others = [5, 6, 7, 8], ([11, 12, 13], [21, 22, 23], [31, 32, 33])
    start = model.prefill(torch.tensor([prompt]))
    before = model.next_logits(start).clone()
    branches, rows = [start] * len(others), [list(prompt) for _ in others]
    for at in range(num_new):
        for number, tokens in enumerate(others):
            rows[number].append(tokens[at % 3])
            branches[number] = model.extend(branches[number], torch.tensor([[tokens[at % 3]]]))
    for branch, row in zip(branches, rows, strict=True):
        torch.testing.assert_close(model.next_logits(branch), whole(model, row), atol=ATOL, rtol=0)
    again = model.extend(start, torch.tensor([[41]]))
    torch.testing.assert_close(model.next_logits(again), whole(model, [*prompt, 41]), atol=ATOL, rtol=0)
    assert torch.equal(model.next_logits(start), before)


def test_rows_that_are_taken_repeated_and_joined_go_on_as_they_would_alone(models: dict[str, Any]) -> None:
    model = models["llama"]
    rows = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    first = model.extend(model.prefill(ids, [len(row) for row in rows]), torch.tensor([[3], [4], [5]]))
    second = model.prefill(torch.tensor([[20, 21, 22, 23]]))
    joined = CacheContext.gathered([(first, [1, 2]), (second, [0]), (first, [2])])
    known = [[11, 12, 4], [13, 14, 15, 5], [20, 21, 22, 23], [13, 14, 15, 5]]
    assert joined.tokens == tuple(map(tuple, known))
    for context, own in (
        (joined, known),
        (first.join(second), [*([*r, t] for r, t in zip(rows, (3, 4, 5), strict=True)), known[2]]),
    ):
        extended = model.extend(context, torch.tensor([[30 + at] for at in range(len(own))]))
        wanted = torch.cat([whole(model, [*row, 30 + at]) for at, row in enumerate(own)])
        torch.testing.assert_close(model.next_logits(extended), wanted, atol=ATOL, rtol=0)
    # The contexts that they came from have not changed.
    onward = model.extend(first, torch.tensor([[1], [2], [3]]))
    wanted = torch.cat(
        [whole(model, [*row, t, at + 1]) for at, (row, t) in enumerate(zip(rows, (3, 4, 5), strict=True))]
    )
    torch.testing.assert_close(model.next_logits(onward), wanted, atol=ATOL, rtol=0)


def test_what_was_read_in_inference_mode_can_be_read_on_outside_of_it(models: dict[str, Any]) -> None:
    with torch.inference_mode():
        context = models["llama"].prefill(torch.tensor([[5, 6, 7]]))
        context = models["llama"].extend(context, torch.tensor([[8]]))
    with torch.no_grad():
        after = models["llama"].extend(context, torch.tensor([[9]]))
    torch.testing.assert_close(
        models["llama"].next_logits(after), whole(models["llama"], [5, 6, 7, 8, 9]), atol=ATOL, rtol=0
    )


def test_long_answers_with_refilled_places_are_those_of_single_prompts(models: dict[str, Any]) -> None:
    """Beyond several rooms, in rows of unlike lengths that end and make room."""
    decoder = make_decoder(models["llama"], "autoregressive")
    prompts = [Prompt(id=str(at), token_ids=tuple(range(5, 8 + 3 * at))) for at in range(5)]
    alone = [decoder.generate([prompt], max_new_tokens=80)[0] for prompt in prompts]
    eos = [alone[0].token_ids[7], alone[3].token_ids[50]]
    wanted = [decoder.generate([prompt], max_new_tokens=80, eos_token_ids=eos)[0] for prompt in prompts]
    made = decoder.generate(prompts, max_new_tokens=80, eos_token_ids=eos, max_batch_size=2)
    assert [one.token_ids for one in made] == [one.token_ids for one in wanted]
