"""E2D2's samplers (arXiv 2510.22852): block after block, in each either all masks are predicted and the least certain
masked again, or every mask is drawn by steps through time. Shape letters: K tokens of a block, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.commits import most_confident
from twotower_eval.engine.decoders.rows import Noise, check_counts
from twotower_eval.engine.decoders.sampled import Draft, SampledDecoder, race, without_mask
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.errors import UserError

STRATEGIES = ("confidence", "margin", "posterior")
OF_POSTERIOR = ("drawn_times", "lost_cache")


@dataclass(frozen=True, kw_only=True)
class Params:
    """``strategy``: ``confidence`` predicts all masks and masks the least likely tokens again; ``margin`` those that
    lead least; ``posterior`` makes each mask a token or leaves it, by its posterior. ``steps`` of a block, from time 1
    to ``min_t``; None: as many as it has tokens. ``threshold``: tokens at least so likely are never masked again.
    ``do_sample`` draws tokens instead of taking the likeliest. ``block_size`` None: the network's.

    ``align`` counts blocks from the first token of a row, and gives what the prompt has of its last block in the first
    that is decoded; without it blocks begin behind the prompt. Without ``use_cache`` every step reads all that stands
    before the block anew, finished blocks like a part of the prompt. ``reread`` reads logits though nothing changed.

    The published sampler's ways with ``posterior``: ``drawn_times`` draws times at random, once for all blocks, which
    its steps' length does not fit; ``lost_cache`` loses all that was read when logits are kept for a step, until the
    block is read behind nothing; ``commit_mask`` leaves what is still masked after the last step.
    """

    strategy: Literal["confidence", "margin", "posterior"] = "confidence"
    steps: int | None = None
    threshold: float | None = None
    do_sample: bool = False
    min_t: float = 1e-5
    block_size: int | None = None
    align: bool = True
    use_cache: bool = True
    reread: bool = False
    drawn_times: bool = False
    lost_cache: bool = False
    commit_mask: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "steps", "block_size")
        if self.strategy not in STRATEGIES:
            raise UserError(f"strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}")
        if not 0 < self.min_t < 1:
            raise UserError(f"min_t must lie between 0 and 1, not {self.min_t!r}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"threshold must lie between 0 and 1, not {self.threshold!r}")
        if self.strategy == "posterior":
            if self.threshold is not None:
                raise UserError("threshold goes with strategy confidence or margin, not with posterior")
        elif named := [name for name in (*OF_POSTERIOR, "commit_mask") if getattr(self, name)]:
            raise UserError(f"{named[0]} goes with strategy posterior, not with {self.strategy}")
        if self.lost_cache and not self.use_cache:
            raise UserError("lost_cache goes with use_cache: there is nothing to lose without it")


class E2D2(SampledDecoder[Params]):
    """E2D2's block-wise samplers."""

    KIND = "e2d2"
    NEEDS_PROMPT = True
    READS_BLOCKS = True
    Params = Params
    VERSION = 1

    def block_size(self) -> int:
        """The one asked for, or that of the network."""
        size = self.params.block_size or getattr(self.model, "block_size", None)
        if size is None:
            raise UserError("decoder 'e2d2' needs a model that reads blocks, as E2D2 does, or a block_size")
        return int(size)

    def num_steps(self, draft: Draft) -> int:
        """Those planned; a step that commits has at least one token to commit."""
        num = self.params.steps or len(draft.tokens_G)
        through_time = self.params.strategy == "posterior" and not self.params.drawn_times
        return num if through_time else min(num, len(draft.tokens_G))

    def rereads(self, draft: Draft) -> bool:
        """As asked for."""
        return self.params.reread

    def num_read(self, num_prompt_tokens: int) -> int:
        """The prompt's whole blocks, or all of it where blocks begin behind it."""
        return super().num_read(num_prompt_tokens) if self.params.align else num_prompt_tokens

    def num_prefilled(self, num_prompt_tokens: int) -> int:
        """The same, or nothing where every step reads it."""
        return self.num_read(num_prompt_tokens) if self.params.use_cache else 0

    def width(self, call: Call, row: int) -> int:
        """A block."""
        return self.block_size()

    def window(self, call: Call, row: int) -> list[int] | None:
        """All that stands before the block, where nothing is kept of it."""
        if self.params.use_cache:
            return None
        prompt, made = call.prompts[row].token_ids, call.rows[row].produced
        return [*prompt, *made] if made else list(prompt[: self.num_read(len(prompt))])

    def opened(self, draft: Draft, noise: Noise, row: int) -> None:
        """Random times fall from 1 as the first of ever fewer masks would."""
        if self.params.drawn_times and draft.times is None:
            num = self.block_size()
            draft.times = torch.cumprod(noise.uniform(row, num) ** (1 / torch.arange(num, 0, -1)), 0)

    def drawn(self, draft: Draft, chosen_G: Tensor, noise: Noise, row: int) -> Tensor:
        """The block one step on."""
        probability_KV = without_mask(draft.logits, draft.mask_id).double()
        t, s = self._times(draft)
        if self.params.strategy == "posterior":
            is_last = draft.step + 1 == self.num_steps(draft) and not self.params.commit_mask
            probability_KV = probability_KV * ((t - s) / t)
            probability_KV[:, draft.mask_id] = -1.0 if is_last else s / t
            return self._picked(probability_KV, noise, row)
        tokens_K = self._picked(probability_KV, noise, row)
        certain_K = probability_KV.gather(-1, tokens_K[:, None])[:, 0]
        ranked_K = certain_K
        if self.params.strategy == "margin":
            first_two_K2 = probability_KV.topk(2, dim=-1).values
            ranked_K = first_two_K2[:, 0] - first_two_K2[:, 1]
        num_masked = int(chosen_G.sum())
        num_again = min(int(s * len(tokens_K)), num_masked - 1)
        kept_K = most_confident(ranked_K[None], chosen_G[None], [num_masked - num_again])[0]
        if self.params.threshold is not None:
            kept_K |= certain_K >= self.params.threshold
        return torch.where(kept_K, tokens_K, draft.mask_id)

    def _picked(self, probability_KV: Tensor, noise: Noise, row: int) -> Tensor:
        if not self.params.do_sample:
            return probability_KV.argmax(-1)
        return race(probability_KV, noise.uniform(row, probability_KV.numel()).view_as(probability_KV))

    def _times(self, draft: Draft) -> tuple[float, float]:
        """Before and after this step. Masks are as likely as their time."""
        num, least = self.num_steps(draft), self.params.min_t
        even = torch.linspace(1, least, num + 1, dtype=torch.float64)
        t = float((even if draft.times is None else draft.times)[draft.step])
        return t, t - (1 - least) / num

    def _advance(self, call: Call, drafts: list[Draft], context: CountedContext, mask_id: int) -> CountedContext | None:
        if self.params.lost_cache:
            context = _without(call, context, [not drafts[row].was_read for row in context.rows])
        return super()._advance(call, drafts, context, mask_id)

    def _followed(self, call: Call, drafts: Sequence[Draft], view: CountedContext) -> CountedContext:
        return super()._followed(call, drafts, view) if self.params.use_cache else view


def _without(call: Call, context: CountedContext, is_lost: Sequence[bool]) -> CountedContext:
    """The same with nothing before the block in some rows, which come last."""
    lost = [row for row, gone in zip(context.rows, is_lost, strict=True) if gone]
    if not lost:
        return context
    empty = call.counted.prefill(lost, torch.zeros(len(lost), 0, dtype=torch.int64), [0] * len(lost))
    left = [position for position, gone in enumerate(is_lost) if not gone]
    return context.select(left).join(empty) if left else empty
