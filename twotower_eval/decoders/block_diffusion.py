"""Block diffusion: a block of masks is denoised in parallel steps, then the context tower absorbs it.

Arithmetic of a step is in :mod:`commit`; here is the loop. Each row has its own mask fraction, steps and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_eval.decoders.batch import BatchDecoder, Call, Row
from twotower_eval.decoders.commit import commit
from twotower_eval.decoders.rows import RowNoise, check_temperature, choose
from twotower_eval.models.counting import CountedContext
from twotower_eval.records import CommitStep


@dataclass(frozen=True, kw_only=True)
class Params:
    """``steps_per_block`` None means the block size. ``batch_mean_t`` feeds every row the batch's mean mask fraction,
    as the released sampler does: rows then depend on their neighbours, so it is for parity only."""

    block_size: int = 16
    steps_per_block: int | None = None
    threshold: float = 0.8
    temperature: float = 0.0
    batch_mean_t: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        for name in ("block_size", "steps_per_block"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be a number of at least 0, not {self.threshold}")

    @property
    def num_steps(self) -> int:
        """Steps per block, resolved."""
        return self.steps_per_block or self.block_size


class BlockDiffusion(BatchDecoder):
    """No extension of the context behind the last block; the last block is K long like the others."""

    KIND = "block_diffusion"
    Params = Params
    VERSION = 1

    def _decode(self, call: Call) -> None:
        for row in call.rows:
            row.num_forced, row.steps = 0, [] if self.params.trace else None
        context = call.prefill()
        block = 0
        while True:
            block_BK = self._denoise_block(call, context, block)
            going = call.absorb(context.rows, block_BK.tolist())
            if not going:
                return
            context = call.counted.extend(context.select(going), block_BK[going])
            block += 1

    def _denoise_block(self, call: Call, context: CountedContext, block: int) -> Tensor:
        """Denoise one block of every row of ``context``; (B, K) token ids."""
        params, mask_id = self.params, self.model.mask_token_id
        num_rows = len(context.rows)
        block_BK = torch.full((num_rows, params.block_size), mask_id)
        masked_BK = torch.ones_like(block_BK, dtype=torch.bool)
        active, view = list(range(num_rows)), context
        for step in range(params.num_steps):
            num_masked = masked_BK.sum(1).tolist()
            still = [row for row in active if num_masked[row]]
            if not still:
                break
            if still != active:
                view = view.select([active.index(row) for row in still])
                active = still
            # All rows, as is usual, are a slice: an index would copy them.
            these = slice(None) if len(active) == num_rows else torch.tensor(active)
            t = [num_masked[row] / params.block_size for row in active]
            if params.batch_mean_t:
                t = [float(masked_BK.float().mean(1).mean())] * len(active)
            logits_BKV = call.counted.denoise(block_BK[these], view, t)
            tokens_BK, confidence_BK = _predict(logits_BKV, mask_id, params.temperature, call.noise, view.rows)
            steps_left_B = torch.full((len(active),), params.num_steps - step)
            taken_BK, forced_B = commit(confidence_BK, masked_BK[these], steps_left_B, params.threshold)
            block_BK[these] = torch.where(taken_BK, tokens_BK, block_BK[these])
            masked_BK[these] &= ~taken_BK
            _record([call.rows[row] for row in view.rows], block, step, taken_BK, tokens_BK, confidence_BK, forced_B)
        return block_BK


def _record(
    rows: Sequence[Row],
    block: int,
    step: int,
    taken_BK: Tensor,
    tokens_BK: Tensor,
    confidence_BK: Tensor,
    forced_B: Tensor,
) -> None:
    """Count forced commits, and keep the step if a trace is wanted."""
    for position, (row, num_forced) in enumerate(zip(rows, forced_B.tolist(), strict=True)):
        row.num_forced = (row.num_forced or 0) + num_forced
        if row.steps is not None:
            where = taken_BK[position].nonzero().flatten()
            row.steps.append(
                CommitStep(
                    block=block,
                    step=step,
                    positions=tuple(where.tolist()),
                    token_ids=tuple(tokens_BK[position][where].tolist()),
                    confidences=tuple(confidence_BK[position][where].tolist()),
                    num_forced=num_forced,
                )
            )


def _predict(
    logits_BKV: Tensor, mask_id: int, temperature: float, noise: RowNoise, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Tokens and their probabilities at temperature 1, mask excluded, (B, K) each, on the host."""
    logits_BKV[..., mask_id] = -torch.inf
    probability_BKV = logits_BKV.float().softmax(-1)
    tokens_BK = choose(logits_BKV, temperature, noise, rows) if temperature > 0 else probability_BKV.argmax(-1)
    confidence_BK = probability_BKV.gather(-1, tokens_BK[..., None])[..., 0]
    return tokens_BK.cpu(), confidence_BK.cpu()
