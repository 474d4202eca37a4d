"""LLaDA2's sampler: block after block behind an exact cache, by threshold or quota.

The original has no cache, and reads everything up to the block's end in every step; the tokens are the same. Shape
letters: B rows, K block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.blocks import Block, BlockDecoder, Predicted
from twotower_eval.engine.decoders.commits import even_quotas, threshold_or_quota
from twotower_eval.engine.decoders.rows import check_counts, check_not_negative, check_temperature
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Params:
    """A step commits all masks above the ``threshold`` where these are as many as its quota, else the quota's most
    confident ones; a block's size is shared evenly over ``steps`` (None: a token a step), which are never more than the
    answer's tokens over ``minimal_topk``.

    ``eos_early_stop``: a row ends in the step that commits an end of text if nothing before the first one is masked,
    not only behind its block. The original looks for the first one in the prompt as well, and answers nothing where it
    finds one there: ``eos_of_prompt``. ``commit_mask``: see decoders.canvas; a block then ends with its steps."""

    steps: int | None = None
    threshold: float = 0.95
    minimal_topk: int = 1
    eos_early_stop: bool = False
    eos_of_prompt: bool = False
    temperature: float = 0.0
    commit_mask: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_counts(self, "steps", "minimal_topk")
        check_not_negative(self, "threshold")
        if self.eos_of_prompt and not self.eos_early_stop:
            raise UserError("eos_of_prompt says where eos_early_stop looks: give both")


class LLaDA2(BlockDecoder[Params]):
    """``generate`` of the published model."""

    KIND = "llada2"
    Params = Params
    VERSION = 1

    def block_size(self) -> int:
        """The model's. UserError for a model that has none."""
        size: int | None = getattr(self.model, "block_size", None)
        if size is None:
            raise UserError(f"decoder {self.KIND!r} needs a model that reads blocks behind a cache")
        return size

    def planned(self, call: Call, size: int) -> list[int]:
        """Quotas are of the block's size, whatever of it is known."""
        most = max(1, call.rules.max_new_tokens // self.params.minimal_topk)
        return list(even_quotas(size, min(self.params.steps or size, most)))

    def begun(self, call: Call, blocks: Sequence[Block], context: CountedContext) -> CountedContext:
        """New blocks get their quotas."""
        for row in context.rows:
            blocks[row].quotas = blocks[row].quotas or self.planned(call, len(blocks[row].tokens_K))
        return context

    def taken(self, predicted: Predicted, blocks: Sequence[Block]) -> Tensor:
        """By threshold or quota."""
        masked_BK = torch.stack([block.masked_K for block in blocks])
        quotas = [block.quotas[min(block.step, len(block.quotas) - 1)] for block in blocks]
        return threshold_or_quota(predicted.confidence_BK, masked_BK, self.params.threshold, quotas)

    def num_forced(self, taken_K: Tensor, confidence_K: Tensor) -> int:
        """Commits that the threshold alone would not have let through."""
        return int((taken_K & ~(confidence_K > self.params.threshold)).sum())

    def made(self, call: Call, row: int, block: Block) -> list[int] | None:
        """A finished block; with ``eos_early_stop`` maybe a part of it."""
        if self.params.eos_early_stop and block.taken_K is not None:
            ends = torch.isin(block.tokens_K, torch.tensor(sorted(call.rules.eos_token_ids), dtype=torch.int64))
            ends[: block.num_known] = False
            if bool((ends & block.taken_K).any()):
                if self.params.eos_of_prompt and call.rules.eos_token_ids & set(call.prompts[row].token_ids):
                    call.rows[row].produced.clear()
                    return [int(block.tokens_K[ends][0])]
                first = int(ends.int().argmax())
                if not block.masked_K[:first].any():
                    return block.tokens_K[block.num_known : first + 1].tolist()
        return super().made(call, row, block)
