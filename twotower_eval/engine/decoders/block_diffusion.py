"""Block diffusion: a block of masks is denoised in parallel steps, then the context tower absorbs it (TWOTOWER:
confidence unmasking). B batch, K block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import BatchDecoder, Call, no_denoiser
from twotower_eval.engine.decoders.commits import commit_step
from twotower_eval.engine.decoders.rows import (
    Noise,
    check_counts,
    check_not_negative,
    check_temperature,
    choose,
    on_host,
)
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.engine.models.protocol import two_tower


def num_commits(above_B: Tensor, masked_B: Tensor, steps_left_B: Tensor) -> Tensor:
    """``max(1, masked above the threshold, ceil(masked / steps left))``, capped at the number masked; (B,) int64."""
    floor_B = torch.div(masked_B + steps_left_B - 1, steps_left_B, rounding_mode="floor")
    return torch.minimum(torch.maximum(above_B, floor_B).clamp(min=1), masked_B)


def commit(confidence_BK: Tensor, masked_BK: Tensor, steps_left_B: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Positions to commit (B, K), and the number of forced commits (B,).

    The most confident masked positions come first; of equal confidences the higher positions (the reference sorts
    ascending and stably, and takes the end). The threshold is strict: a forced commit is one whose confidence does not
    exceed it.
    """
    above_BK = masked_BK & (confidence_BK > threshold)
    wanted_B = num_commits(above_BK.sum(1), masked_BK.sum(1), steps_left_B)
    order_BK = confidence_BK.masked_fill(~masked_BK, -torch.inf).argsort(dim=1, stable=True)
    block_size = confidence_BK.shape[1]
    from_end_K = torch.arange(block_size - 1, -1, -1, device=confidence_BK.device)
    taken_BK = torch.zeros_like(masked_BK).scatter(1, order_BK, from_end_K < wanted_B[:, None])
    return taken_BK, (taken_BK & ~above_BK).sum(1)


@dataclass(frozen=True, kw_only=True)
class Params:
    """``steps_per_block`` None means the block size. ``batch_mean_t`` feeds every row the batch's mean mask fraction,
    as the released sampler does: rows then depend on their neighbours, so it is for parity only. A ``threshold`` above
    1 commits by the schedule alone."""

    block_size: int = 16
    steps_per_block: int | None = None
    threshold: float = 0.8
    temperature: float = 0.0
    batch_mean_t: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_counts(self, "block_size", "steps_per_block")
        check_not_negative(self, "threshold")

    @property
    def num_steps(self) -> int:
        """Steps per block, resolved."""
        return self.steps_per_block or self.block_size


class Blocks:
    """The current block of each of R prompts, on the host: its tokens, its mask, blocks and steps done."""

    def __init__(self, num_prompts: int, block_size: int, mask_id: int) -> None:
        self.mask_id = mask_id
        self.tokens_RK = torch.full((num_prompts, block_size), mask_id)
        self.masked_RK = torch.ones_like(self.tokens_RK, dtype=torch.bool)
        self.num_blocks = [0] * num_prompts
        self.num_steps = [0] * num_prompts

    def renew(self, rows: Sequence[int]) -> None:
        """Start the rows' next blocks: all masks."""
        self.tokens_RK[list(rows)] = self.mask_id
        self.masked_RK[list(rows)] = True
        for row in rows:
            self.num_blocks[row] += 1
            self.num_steps[row] = 0


class Predicted(NamedTuple):
    """A pass's prediction for some rows: token and probability at every position, on the denoiser's device."""

    rows: list[int]
    tokens_BK: Tensor
    confidence_BK: Tensor


class BlockDiffusion(BatchDecoder[Params]):
    """Block diffusion. The context is not extended after the last block, which is K long like the others.

    Rows are at their own steps and blocks. A row with a finished block waits for others, so that one extension of
    contexts serves as many as it can; the others are denoised meanwhile. So fewer than twice as many rows are in
    progress as a forward serves. The last rows of a call, and all rows of a call whose prompts all have places from the
    start, absorb their blocks when at least half of them have finished one.

    With the towers on two devices both work at the same time: finished blocks are absorbed while other rows are
    denoised, both passes launched before the host waits for either. Rows never depend on each other, so no token
    changes. A single row, or rows that finish their blocks together, cannot overlap: each pass needs the one before it.
    Nor can the prefill or moving contexts between devices.
    """

    KIND = "block_diffusion"
    NEEDS = "two towers"
    Params = Params
    VERSION = 1

    @property
    def _depends_on_neighbours(self) -> bool:
        return bool(self.params.batch_mean_t)

    def _capacity(self, width: int) -> int:
        return 2 * width - 1

    def _decode(self, call: Call) -> None:
        for row, prompt in zip(call.rows, call.prompts, strict=True):
            row.num_forced, row.steps = 0, [] if self.params.trace or prompt.trace else None
        mask_id = two_tower(self.model, no_denoiser(self.KIND)).mask_token_id
        blocks = Blocks(len(call.rows), self.params.block_size, mask_id)
        context = call.admit()
        while context is not None:
            still_open = blocks.masked_RK[list(context.rows)].any(1).tolist()
            open_ = [position for position, is_open in enumerate(still_open) if is_open]
            closed = [position for position, is_open in enumerate(still_open) if not is_open]
            if len(open_) < call.width:
                more = call.admit(context)
                if more is not context:
                    context = more
                    continue
            last_rows = len(context.rows) <= call.width  # all of them, and none waits for a place
            gathering = call.steady or (last_rows and len(closed) < len(open_)) or not closed
            open_, closed = open_[: call.width], closed[: call.width]
            if open_ and closed and not call.steady and getattr(self.model, "towers_apart", False):
                context = self._both(call, blocks, context, open_, closed)
            elif open_ and (len(open_) >= call.width or gathering):
                view = context.select(open_)
                self._commit(call, blocks, self._denoise(call, blocks, context, view))
                context, denoised = _kept_together(blocks, context, view, open_)
                context = _without_ended(call, blocks, context, denoised) or call.admit()
            else:
                context = _extended(call, blocks, context, closed)

    def _both(
        self, call: Call, blocks: Blocks, context: CountedContext, open_: Sequence[int], closed: Sequence[int]
    ) -> CountedContext | None:
        """Denoise some rows while others absorb their blocks."""
        denoised = self._denoise(call, blocks, context, context.select(open_))
        context = _extended(call, blocks, context, closed)
        self._commit(call, blocks, denoised)
        positions = [context.rows.index(row) for row in denoised.rows]
        return _without_ended(call, blocks, context, positions) or call.admit()

    def _denoise(self, call: Call, blocks: Blocks, context: CountedContext, view: CountedContext) -> Predicted:
        """One denoising pass for the rows of ``view``, each at its own step of its block; not waited for."""
        params, rows = self.params, list(view.rows)
        t = (blocks.masked_RK[rows].sum(1) / params.block_size).tolist()
        if params.batch_mean_t:
            t = [float(blocks.masked_RK[list(context.rows)].float().mean(1).mean())] * len(rows)
        logits_BKV = call.counted.denoise(blocks.tokens_RK[rows], view, t)
        return Predicted(rows, *_predict(logits_BKV, blocks.mask_id, params.temperature, call.noise, rows))

    def _commit(self, call: Call, blocks: Blocks, predicted: Predicted) -> None:
        """Wait for a pass, and commit tokens by its confidence."""
        rows = predicted.rows
        tokens_BK, confidence_BK = on_host(predicted.tokens_BK, predicted.confidence_BK)
        masked_BK = blocks.masked_RK[rows]
        steps_left_B = torch.tensor([self.params.num_steps - blocks.num_steps[row] for row in rows])
        taken_BK, forced_B = commit(confidence_BK, masked_BK, steps_left_B, self.params.threshold)
        blocks.tokens_RK[rows] = torch.where(taken_BK, tokens_BK, blocks.tokens_RK[rows])
        blocks.masked_RK[rows] = masked_BK & ~taken_BK
        _record(call, blocks, rows, taken_BK, tokens_BK, confidence_BK, forced_B)
        for row in rows:
            blocks.num_steps[row] += 1


def _kept_together(
    blocks: Blocks, context: CountedContext, view: CountedContext, positions: Sequence[int]
) -> tuple[CountedContext, Sequence[int]]:
    """The context with the rows of ``view`` (at ``positions``) as they were gathered for a pass, if exactly these are
    denoised again; and their positions in it."""
    if view is context or not all(blocks.masked_RK[list(view.rows)].any(1).tolist()):
        return context, positions
    others = context.select([position for position in range(len(context.rows)) if position not in positions])
    return view.join(others), range(len(positions))


def _without_ended(
    call: Call, blocks: Blocks, context: CountedContext, denoised: Sequence[int]
) -> CountedContext | None:
    """Finish the blocks that a pass has completed; the context of the rows that continue, None if none does.

    Rows that depend on each other are finished together, when all of their blocks are complete.
    """
    still_open = blocks.masked_RK[list(context.rows)].any(1).tolist()
    if call.steady:
        denoised = [] if any(still_open) else range(len(context.rows))
    finished = [position for position in denoised if not still_open[position]]
    rows = [context.rows[position] for position in finished]
    going = {finished[i] for i in call.absorb(rows, blocks.tokens_RK[rows].tolist())}
    kept = [position for position in range(len(context.rows)) if position in going or position not in finished]
    return context.select(kept) if kept else None


def _extended(call: Call, blocks: Blocks, context: CountedContext, positions: Sequence[int]) -> CountedContext:
    """The context after the rows at ``positions`` have absorbed their blocks; these rows stand last."""
    view = context.select(positions)
    extended = call.counted.extend(view, blocks.tokens_RK[list(view.rows)])
    blocks.renew(view.rows)
    others = [position for position in range(len(context.rows)) if position not in positions]
    return context.select(others).join(extended) if others else extended


def _record(
    call: Call,
    blocks: Blocks,
    rows: Sequence[int],
    taken_BK: Tensor,
    tokens_BK: Tensor,
    confidence_BK: Tensor,
    forced_B: Tensor,
) -> None:
    """Count forced commits, and keep the step for the trace if one is wanted."""
    for position, (index, num_forced) in enumerate(zip(rows, forced_B.tolist(), strict=True)):
        row = call.rows[index]
        row.num_forced = (row.num_forced or 0) + num_forced
        if row.steps is not None:
            taken = (taken_BK[position], tokens_BK[position], confidence_BK[position])
            number, step = blocks.num_blocks[index], blocks.num_steps[index]
            row.steps.append(commit_step(number, step, *taken, num_forced=num_forced))


def _predict(
    logits_BKV: Tensor, mask_id: int, temperature: float, noise: Noise, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Tokens and their probabilities at temperature 1, mask excluded, (B, K) each, where the logits are."""
    logits_BKV[..., mask_id] = -torch.inf
    probability_BKV = logits_BKV.float().softmax(-1)
    tokens_BK = choose(logits_BKV, temperature, noise, rows) if temperature > 0 else probability_BKV.argmax(-1)
    return tokens_BK, probability_BKV.gather(-1, tokens_BK[..., None])[..., 0]
