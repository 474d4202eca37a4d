"""The CPU engine's short cuts change nothing: pieces of a prefill, spare slots, plain attributes; tokens."""

import copy
from typing import Any

import pytest
import torch
from bench.subject import random_pair
from tiny_models import ARCHITECTURES, VOCAB, tiny_config, tiny_pair
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import autoregressive
from twotower_eval.engine.models.checkpoint import build
from twotower_eval.engine.models.twotower import MAX_TIMES
from twotower_eval.engine.models.weights import Derived, Linear, RMSNorm
from twotower_eval.records import Prompt

ATOL = 2e-5
EVERY_MODEL = pytest.mark.parametrize("name", ARCHITECTURES)


def ids(*shape: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@EVERY_MODEL
@torch.inference_mode()
def test_prefill_in_pieces_is_prefill_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows end in different pieces, one of them before the first, and behind a context."""
    model, rows, lengths, block = tiny_pair(name), ids(4, 23), [23, 0, 4, 9], ids(4, 5, seed=1)
    context = model.prefill(ids(4, 3, seed=2), [3, 1, 2, 3])

    def answers() -> list[Tensor]:
        new = model.prefill(rows, lengths)
        longer = model.extend(context, rows)
        every = model.context_logits(rows, lengths)
        logits = [every[row, :length] for row, length in enumerate(lengths)]
        return [
            new.last_hidden_BH,
            model.denoise(block, new, 0.5),
            model.next_logits(longer),
            model.denoise(block, longer, 0.5),
            *logits,
        ]

    at_once = answers()
    monkeypatch.setattr(autoregressive, "PIECE_ROWS", 4)
    monkeypatch.setattr(autoregressive, "MIN_PIECE", 4)
    for ours, wanted in zip(answers(), at_once, strict=True):
        assert torch.allclose(ours, wanted, atol=ATOL)


@EVERY_MODEL
@pytest.mark.parametrize("lengths", [[9, 9], [9, 2]])
@torch.inference_mode()
def test_a_block_in_spare_slots_never_shows(name: str, lengths: list[int]) -> None:
    """A denoise step writes behind the context; tokens that come after it find nothing of that, nor does an older
    context whose slots a newer one has taken, nor the newer one."""
    model, rows = tiny_pair(name), ids(2, 9)
    denoised, untouched = model.prefill(rows, lengths), model.prefill(rows, lengths)
    block = ids(2, 6, seed=1)
    first = model.denoise(block, denoised, 0.5)
    newer = model.extend(denoised, ids(2, 2, seed=2))
    wanted = model.extend(untouched, ids(2, 2, seed=2))
    assert torch.equal(model.next_logits(newer), model.next_logits(wanted))
    assert torch.equal(model.denoise(block, denoised, 0.5), first)
    assert torch.equal(model.denoise(block, newer, 0.5), model.denoise(block, wanted, 0.5))
    newest, wanted = (model.extend(context, ids(2, 1, seed=3)) for context in (newer, wanted))
    assert torch.equal(model.next_logits(newest), model.next_logits(wanted))


@torch.inference_mode()
def test_steps_of_a_block_copy_no_context() -> None:
    """Keys and values stay where they are from step to step; a context without room moves once."""
    model = tiny_pair("mostly attention")
    context = model.prefill(ids(1, 9)).select([0])  # no slot to spare
    places = []
    for step in range(3):
        model.denoise(ids(1, 4, seed=step), context, 0.5)
        places.append([keys.data_ptr() for keys in context.buffer.keys.values()])
    assert places[0] == places[1] == places[2]


def test_denoise_can_be_differentiated_twice() -> None:
    """With gradients, what one call appends is not written over by the next."""
    model = copy.deepcopy(tiny_pair("mostly attention")).requires_grad_()
    with torch.no_grad():
        context = model.prefill(ids(1, 5))
    total = sum(model.denoise(ids(1, 4, seed=seed), context, 0.5).square().mean() for seed in range(2))
    [gradient] = torch.autograd.grad(total, [model.denoiser.head.weight])
    assert gradient.isfinite().all()


def test_plain_attributes_follow_the_parameters() -> None:
    """What was looked up is looked up anew after assignment, deletion, conversion, and filling of a meta module."""
    module: Any = Linear(3, 2, bias=False)
    assert module.weight is module._parameters["weight"]
    assert "weight" in module.__dict__
    replacement = torch.nn.Parameter(torch.ones(2, 3))
    module.weight = replacement
    assert module.weight is replacement
    assert module.to(torch.float64).weight.dtype == torch.float64
    twin = copy.deepcopy(module)
    assert twin.weight is twin._parameters["weight"]
    assert twin.weight is not module.weight
    del module.weight
    with pytest.raises(AttributeError, match="weight"):
        _ = module.weight
    with torch.device("meta"):
        empty: Any = RMSNorm(4, 1e-5)
    assert empty.weight.is_meta
    assert not empty.to_empty(device="cpu").weight.is_meta


def test_a_converted_model_computes_with_its_new_weights() -> None:
    """bfloat16 and back: rounded weights, not those that were looked up before."""
    model = copy.deepcopy(tiny_pair("all kinds"))
    with torch.inference_mode():
        before = model.context_logits(ids(1, 7))
        rounded = model.to(torch.bfloat16).to(torch.float32).context_logits(ids(1, 7))
    fresh = build(tiny_config("all kinds"), "pair", torch.float32, ("cpu",))
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(fresh.context_logits(ids(1, 7)), rounded)
    assert not torch.equal(before, rounded)


def test_what_is_derived_follows_its_weight() -> None:
    """In-place changes, assignment and conversion to and fro; computed once otherwise, and never kept in training."""
    calls = []
    module: Any = Linear(3, 2, bias=False)
    module.weight.requires_grad_(False)
    module.doubled = Derived(lambda weight: calls.append(1) or 2 * weight)

    def follows() -> bool:
        return torch.equal(module.doubled(module.weight), 2 * module.weight)

    assert all([follows(), follows()])
    assert len(calls) == 1
    with torch.inference_mode():
        module.weight.add_(1.0)
        assert follows()
    assert not module.doubled(module.weight).is_inference()
    module.weight = torch.nn.Parameter(torch.ones(2, 3) / 3, requires_grad=False)
    assert follows()
    module.to(torch.bfloat16).to(torch.float32)
    assert follows()
    twin = copy.deepcopy(module)
    twin.weight.mul_(3.0)
    assert torch.equal(twin.doubled(twin.weight), 2 * twin.weight)
    assert follows()
    module.weight.requires_grad_()
    assert module.doubled(module.weight).requires_grad


def test_modulation_is_kept_until_its_weights_change() -> None:
    """Whichever of them, in place, by assignment or by conversion; few mask fractions, and none in training."""
    model = copy.deepcopy(tiny_pair("all kinds"))
    denoiser, block = model.denoiser, ids(1, 4)
    context = model.prefill(ids(1, 5))

    def denoised(t: Any) -> Tensor:
        with torch.inference_mode():
            return model.denoise(block, context, t)

    for change in (
        lambda: denoiser.t_embedder.mlp[0].bias.add_(0.3),
        lambda: denoiser.t_block[1].weight.mul_(1.5),
        lambda: denoiser.scale_shift_tables[1].add_(0.2),
        lambda: denoiser.scale_shift_tables.__setitem__(
            0, torch.nn.Parameter(denoiser.scale_shift_tables[0] + 0.1, requires_grad=False)
        ),
        lambda: denoiser.to(torch.bfloat16).to(torch.float32),
    ):
        before = denoised([0.5])
        with torch.no_grad():
            change()
        for t in (0.5, 0.75, 0.5):
            assert torch.allclose(denoised([t]), denoised(torch.tensor([t])), atol=ATOL)
        with torch.inference_mode():
            rows = model.denoise(block.expand(3, -1), context.select([0, 0, 0]), [0.75, 0.5, 0.75])
        for row, t in enumerate((0.75, 0.5, 0.75)):
            assert torch.allclose(rows[row], denoised([t])[0], atol=ATOL)
        assert not torch.equal(before, denoised([0.5]))
    for n in range(MAX_TIMES + 5):
        denoised([n / 100])
    assert len(denoiser._kept_modulation._kept) == MAX_TIMES
    denoiser.requires_grad_()
    model.denoise(block, context, [0.5]).sum().backward()
    assert denoiser.t_block[1].weight.grad is not None


@pytest.mark.parametrize(("mode", "new"), [("autoregressive", 20), ("block_diffusion", 16)])
def test_tokens_of_the_timed_model_are_the_reference_decoders(mode: str, new: int) -> None:
    """The twelve layers that `bench engine` times, against everything recomputed from the tokens at every step."""
    model = random_pair(seed=5)
    block = {"block_size": 8, "steps_per_block": 5, "threshold": 0.002} if mode == "block_diffusion" else {}
    prompts = [Prompt(id=str(n), token_ids=tuple(ids(n, seed=n, vocab=1024).tolist())) for n in (1, 30)]
    ours, wanted = (
        make_decoder(model, kind, **options).generate(prompts, max_new_tokens=new)
        for kind, options in ((mode, block), ("reference", {"mode": mode, **block}))
    )
    assert [g.token_ids for g in ours] == [g.token_ids for g in wanted]
    assert [g.num_denoiser_forwards for g in ours] == [g.num_denoiser_forwards for g in wanted]
