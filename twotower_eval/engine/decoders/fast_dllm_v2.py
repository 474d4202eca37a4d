"""Fast-dLLM v2's sampler (arXiv 2509.26328): blocks behind a cache, each in sub-blocks from left to right.

The first token of a block is what the pass over everything before it predicts, and takes no pass of its own. Shape
letters: B rows, K block, M sub-block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.blocks import Block, BlockDecoder, Predicted
from twotower_eval.engine.decoders.commits import above_threshold, commit_step
from twotower_eval.engine.decoders.parts import alike, check_keeps, gathered, spread
from twotower_eval.engine.decoders.rows import Clock, check_counts, check_not_negative, check_temperature
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.engine.models.protocol import Model
from twotower_eval.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Params:
    """A step commits the masks of the current sub-block above the ``threshold``, and always its most confident one.

    With ``use_block_cache`` steps read the sub-block alone once its first token is known, and take the rest of the
    block as the last whole pass has read it: cheaper steps, approximate answers. ``commit_mask``: see decoders.canvas.
    """

    small_block_size: int = 8
    threshold: float = 0.9
    use_block_cache: bool = False
    temperature: float = 0.0
    commit_mask: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_counts(self, "small_block_size")
        check_not_negative(self, "threshold")

    @property
    def approximate(self) -> bool:
        """Whether tokens are predicted from stale keys and values."""
        return self.use_block_cache


OwnParams = Params  # the class below has an attribute of that name


class FastDLLMv2(BlockDecoder[Params]):
    """``batch_sample``, every row as if it were alone."""

    KIND = "fast_dllm_v2"
    Params = Params
    VERSION = 1

    def __init__(self, model: Model, params: OwnParams, *, clock: Clock | None = None) -> None:
        super().__init__(model, params, clock=clock)
        if not getattr(model, "shift", 0):
            raise UserError(
                f"decoder {self.KIND!r} takes the first token of a block from the pass before it, and family "
                f"{model.checkpoint.family} does not predict it there: give --decoder sdar"
            )
        if self.params.use_block_cache:
            check_keeps(model, self.KIND, "use_block_cache")
        size, part = self.block_size(), self.params.small_block_size
        if size % part:
            raise UserError(f"small_block_size {part} does not divide the block of {size}")

    def block_size(self) -> int:
        """The model's. UserError for a model that has none."""
        size: int | None = getattr(self.model, "block_size", None)
        if size is None:
            raise UserError(f"decoder {self.KIND!r} needs a model that reads blocks behind a cache")
        return size

    def begun(self, call: Call, blocks: Sequence[Block], context: CountedContext) -> CountedContext | None:
        """Commit the first tokens of new blocks. A row that needs no more than that is finished."""
        new = [
            position
            for position, (row, length) in enumerate(zip(context.rows, context.inner.lengths, strict=True))
            if blocks[row].step == 0 and blocks[row].masked_K[0] and length
        ]
        if not new:
            return context
        logits_B1V = call.counted.next_logits(context)[new][:, None].clone()
        rows = [context.rows[position] for position in new]
        first = self._predict(call, logits_B1V, self.model.mask_token_id or 0, rows)
        for row, token, confidence in zip(rows, first.tokens_BK[:, 0], first.confidence_BK[:, 0], strict=True):
            self._commit_first(call, blocks[row], row, token, confidence)
        most = call.rules.max_new_tokens
        full = [row for row in rows if len(call.rows[row].produced) + 1 == most and not blocks[row].masked_K[0]]
        call.absorb(full, [[int(blocks[row].tokens_K[0])] for row in full])
        going = [position for position, row in enumerate(context.rows) if row not in full]
        return context.select(going) if going else None

    def _commit_first(self, call: Call, block: Block, row: int, token: Tensor, confidence: Tensor) -> None:
        if token == self.model.mask_token_id:
            return
        block.tokens_K[0], block.masked_K[0] = token, False
        first_K = torch.arange(len(block.tokens_K)) == 0
        if (steps := call.rows[row].steps) is not None:
            steps.append(
                commit_step(block.number, block.step, first_K, block.tokens_K, confidence.expand(len(first_K)))
            )
        block.step += 1

    def together(self, blocks: Sequence[Block], context: CountedContext) -> list[list[int]]:
        """Rows that read their whole blocks, and rows that read a sub-block."""
        return alike(self._reads_part(blocks[row]) for row in context.rows)

    def predicted(self, call: Call, own: Sequence[Block], view: CountedContext, mask_id: int) -> Predicted:
        """From whole blocks or, behind what an earlier pass kept, from sub-blocks alone."""
        if not self.params.use_block_cache:
            return super().predicted(call, own, view, mask_id)
        tokens_BK = torch.stack([block.tokens_K for block in own])
        if not self._reads_part(own[0]):
            logits_BKV, kept = call.counted.denoise_kept(tokens_BK, view)
            for place, block in enumerate(own):
                block.kept = (kept, place)
            return self._predict(call, logits_BKV, mask_id, view.rows)
        starts = [self._start(block) for block in own]
        places_BM = torch.tensor(starts)[:, None] + torch.arange(self.params.small_block_size)
        part_BM = tokens_BK.gather(1, places_BM)
        logits_BMV = call.counted.denoise_part(part_BM, starts, view, gathered([block.kept for block in own]))
        found = self._predict(call, logits_BMV, mask_id, view.rows)
        return Predicted(*(spread(values_BM, starts, tokens_BK.shape[1]) for values_BM in found))

    def taken(self, predicted: Predicted, blocks: Sequence[Block]) -> Tensor:
        """By the threshold, within each row's sub-block."""
        size = self.params.small_block_size
        starts_B1 = torch.tensor([self._start(block) for block in blocks])[:, None]
        places_K = torch.arange(self.block_size())
        within_BK = (places_K >= starts_B1) & (places_K < starts_B1 + size)
        eligible_BK = torch.stack([block.masked_K for block in blocks]) & within_BK
        return above_threshold(predicted.confidence_BK, eligible_BK, self.params.threshold, strict=True)

    def num_forced(self, taken_K: Tensor, confidence_K: Tensor) -> int:
        """Commits that the threshold alone would not have let through."""
        return int((taken_K & ~(confidence_K > self.params.threshold)).sum())

    def _start(self, block: Block) -> int:
        """Where the first sub-block with a mask begins."""
        first = int(block.masked_K.int().argmax())
        return first - first % self.params.small_block_size

    def _reads_part(self, block: Block) -> bool:
        """Whether what was kept of a row's block serves its next step: not while its sub-block's first token is masked,
        as nothing in the sub-block predicts that."""
        return block.kept is not None and not bool(block.masked_K[self._start(block)])
