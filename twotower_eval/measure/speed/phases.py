"""The phases that decoding is made of, each measured alone: prefill, AR step, denoise step, context pass.

A phase is made ready off the clock, as a function of one repetition, and repeated on it. Each repetition does what a
decoder does there, the choice of tokens on the device and its way to the host included, so that seconds times counts
predict a whole call. Shape letters: see ops/__init__; all rows of a batch are equally long here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.finish import Rules
from twotower_eval.engine.decoders.rows import on_host
from twotower_eval.engine.models.protocol import Context, Denoising, Model
from twotower_eval.measure.speed.clock import CallClock, no_garbage_collection
from twotower_eval.records import Prompt

Repeat = Callable[[], None]  # one repetition of a phase


def prefill(model: Model, ids_BS: Tensor) -> Repeat:
    """Read the prompts and choose the first token of each."""

    def repeat() -> None:
        _choose(model.next_logits(model.prefill(ids_BS)))

    return repeat


def ar_step(model: Model, context: Context, ids_B1: Tensor) -> Repeat:
    """Extend by one token, logits, choice. Each repetition goes on where the last ended, one token further."""
    with torch.inference_mode():
        # The first extension copies the keys and values that others may still read: not part of any later step.
        newest = model.extend(context, ids_B1)

    def repeat() -> None:
        nonlocal newest
        newest = model.extend(newest, ids_B1)
        _choose(model.next_logits(newest))

    return repeat


def bookkeeping(prompts: Sequence[Prompt], rules: Rules) -> Repeat:
    """What the autoregressive loop does for its rows beside a step: looks for their ends, takes on those that go on."""
    num_rows = len(prompts)
    call = Call(
        cast(Model, _Still()), prompts, rules, None, width=num_rows, capacity=num_rows, steady=False, on_finish=None
    )  # fmt: skip
    context = call.admit()
    tokens_B1 = torch.tensor([[prompt.token_ids[-1]] for prompt in prompts])

    def repeat() -> None:
        nonlocal context
        assert context is not None
        going = call.absorb(context.rows, tokens_B1.tolist())
        context = call.admit(call.extended(context, going, tokens_B1))

    return repeat


class _Still:
    """A model whose contexts are all the same and take no time."""

    def prefill(self, *_: object) -> _Still:
        return self

    def extend(self, *_: object) -> _Still:
        return self


def denoise(model: Denoising, context: Context, block_BK: Tensor, t_B: Sequence[float] | float | None) -> Repeat:
    """One denoiser pass over a block, and the choice of a token with its probability at every position.

    ``t_B`` is the mask fraction that the denoiser is told, as in :meth:`TwoTower.denoise`.
    """

    def repeat() -> None:
        _choose_confident(model.denoise(block_BK, context, t_B), model.mask_token_id)

    with torch.inference_mode():
        repeat()  # a first step may have things to make ready that no later one has
    return repeat


def context_pass(model: Model, context: Context, block_BK: Tensor) -> Repeat:
    """Extend by a whole block, no logits. Each repetition goes on where the last ended, one block further."""
    with torch.inference_mode():
        newest = model.extend(context, block_BK)

    def repeat() -> None:
        nonlocal newest
        newest = model.extend(newest, block_BK)

    return repeat


def forced_block(model: Denoising, context: Context, block_size: int, blocks: Sequence[Sequence[int]]) -> Repeat:
    """Denoise a whole block and absorb it, each denoiser call committing as many tokens as it is told.

    ``blocks`` holds the commits per call of the first, second, ... repetition, the same for all rows. The most
    confident positions are committed, as a decoder would.
    """
    schedules = itertools.cycle(blocks)
    with torch.inference_mode():
        masks_BK = torch.full((len(context.lengths), block_size), model.mask_token_id)
        newest = model.extend(context, masks_BK)
        model.denoise(masks_BK, newest, [1.0] * len(context.lengths))

    def repeat() -> None:
        nonlocal newest
        block_BK = torch.full((len(newest.lengths), block_size), model.mask_token_id)
        masked_BK = torch.ones_like(block_BK, dtype=torch.bool)
        num_masked = block_size
        for num_commits in next(schedules):
            logits_BKV = model.denoise(block_BK, newest, [num_masked / block_size] * len(newest.lengths))
            tokens_BK, confidence_BK = _choose_confident(logits_BKV, model.mask_token_id)
            best_BC = confidence_BK.masked_fill(~masked_BK, -torch.inf).topk(num_commits, dim=1).indices
            block_BK.scatter_(1, best_BC, tokens_BK.gather(1, best_BC))
            masked_BK.scatter_(1, best_BC, False)
            num_masked -= num_commits
        newest = model.extend(newest, block_BK)

    return repeat


def time_repeats(repeat: Repeat, clock: CallClock, num_repeats: int) -> tuple[float, ...]:
    """Seconds of each repetition, every device waited for before and after it."""
    walls_s = []
    with torch.inference_mode(), no_garbage_collection():
        for _ in range(num_repeats):
            started_s = clock()
            repeat()
            walls_s.append(clock() - started_s)
    return tuple(walls_s)


def _choose(logits_BV: Tensor) -> None:
    logits_BV.argmax(-1).cpu()


def _choose_confident(logits_BKV: Tensor, mask_token_id: int | None) -> tuple[Tensor, Tensor]:
    """Tokens and confidences (B, K) on the host, as block diffusion chooses at temperature 0."""
    if mask_token_id is not None:
        logits_BKV[..., mask_token_id] = -torch.inf
    confidence_BK, tokens_BK = logits_BKV.float().softmax(-1).max(-1)
    return on_host(tokens_BK, confidence_BK)
