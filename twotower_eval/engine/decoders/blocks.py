"""Decoding block after block behind a cache: a block of masks is denoised, then read into the context.

Blocks are counted from the first token of a row: what the prompt has of its last block, the head, is given in the first
block that is decoded, and never changes. What a step commits is a decoder's own rule (:meth:`BlockDecoder.taken`). The
block behind which a row ends is not read into the context: nothing would use it. Shape letters: B rows, K block, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import BatchDecoder, Call
from twotower_eval.engine.decoders.commits import commit_step
from twotower_eval.engine.decoders.parts import STEPS_PER_TOKEN, Held, alike
from twotower_eval.engine.decoders.rows import Clock, choose, on_host
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.engine.models.protocol import Model, masked


class BlockParams(Protocol):
    """Parameters that every decoder of blocks has. ``commit_mask``: see decoders.canvas."""

    @property
    def temperature(self) -> float: ...
    @property
    def commit_mask(self) -> bool: ...
    @property
    def trace(self) -> bool: ...


ParamsT = TypeVar("ParamsT", bound=BlockParams)


@dataclass
class Block:
    """One row's block in progress; its first ``num_known`` tokens were given. ``number`` and ``step`` count from 0."""

    tokens_K: Tensor
    masked_K: Tensor
    num_known: int
    number: int = 0
    step: int = 0
    quotas: list[int] = field(default_factory=list)
    kept: Held | None = None
    taken_K: Tensor | None = None  # what its last step committed

    @classmethod
    def behind(cls, known: Sequence[int], size: int, mask_id: int, *, number: int = 0) -> Block:
        """A block whose first tokens are known."""
        tokens_K = torch.tensor([*known, *[mask_id] * (size - len(known))])
        return cls(tokens_K, torch.arange(size) >= len(known), len(known), number)


class Predicted(NamedTuple):
    """Tokens and confidences of every position, (B, K) each, on the host."""

    tokens_BK: Tensor
    confidence_BK: Tensor


class BlockDecoder(BatchDecoder[ParamsT]):
    """Base of decoders of blocks: the loop. They define :meth:`block_size` and :meth:`taken`, maybe the rest."""

    def __init__(self, model: Model, params: ParamsT, *, clock: Clock | None = None) -> None:
        super().__init__(model, params, clock=clock)
        self.block_size()  # a model without blocks is refused now

    def block_size(self) -> int:
        """Tokens of a block."""
        raise AssertionError(f"{type(self).__name__} does not define block_size")

    def taken(self, predicted: Predicted, blocks: Sequence[Block]) -> Tensor:
        """What this step commits, (B, K) boolean; only masks count."""
        raise AssertionError(f"{type(self).__name__} does not define taken")

    def opened(self, block: Block) -> None:
        """A block begins."""

    def limited(self, logits_BKV: Tensor) -> Tensor:
        """The logits that tokens are chosen by, and confidence is taken from."""
        return logits_BKV

    def num_forced(self, taken_K: Tensor, confidence_K: Tensor) -> int | None:
        """Commits whose confidence the rule alone would not have let through; None for rules without a threshold."""
        return None

    def begun(self, call: Call, blocks: Sequence[Block], context: CountedContext) -> CountedContext | None:
        """Before every step: the rows that take part in it, None where all of them are finished."""
        return context

    def made(self, call: Call, row: int, block: Block) -> list[int] | None:
        """The tokens that a block gives its row, once it is finished; before that None. Where the mask token may win, a
        block ends with its schedule, or some time without one, also with masks in it."""
        most = len(block.quotas) or STEPS_PER_TOKEN * len(block.tokens_K)
        is_over = self.params.commit_mask and block.step >= most
        return None if block.masked_K.any() and not is_over else block.tokens_K[block.num_known :].tolist()

    def together(self, blocks: Sequence[Block], context: CountedContext) -> list[list[int]]:
        """Positions in the context of rows that share a call."""
        return alike(len(blocks[row].tokens_K) for row in context.rows)

    def predicted(self, call: Call, own: Sequence[Block], view: CountedContext, mask_id: int) -> Predicted:
        """Tokens and confidences of every position of these rows' blocks, from one call."""
        tokens_BK = torch.stack([block.tokens_K for block in own])
        return self._predict(call, call.counted.denoise(tokens_BK, view, None), mask_id, view.rows)

    def _decode(self, call: Call) -> None:
        mask_id = masked(self.model).mask_token_id
        blocks = []
        for row, prompt in zip(call.rows, call.prompts, strict=True):
            row.steps = [] if self.params.trace or prompt.trace else None
            known = prompt.token_ids[self._num_read(len(prompt.token_ids)) :]
            blocks.append(Block.behind(known, self._width(call, 0, known), mask_id))
            self.opened(blocks[-1])
        call.read_up_to = self._num_read
        context = call.admit()
        while context is not None:
            running = self.begun(call, blocks, context)
            if running is None:
                context = call.admit()
                continue
            for positions in self.together(blocks, running):
                view = running.select(positions)
                own = [blocks[row] for row in view.rows]
                self._commit(call, own, view.rows, self.predicted(call, own, view, mask_id))
            context = call.admit(self._advance(call, blocks, running, mask_id))

    def _num_read(self, num_prompt_tokens: int) -> int:
        """Tokens of a prompt that are read before decoding: its whole blocks, or all where a block ends with it."""
        ends = getattr(self.model, "ends_with_prompt", False)
        return num_prompt_tokens if ends else num_prompt_tokens - num_prompt_tokens % self.block_size()

    def _width(self, call: Call, num_made: int, known: Sequence[int] = ()) -> int:
        """Tokens of a block; the last one of an answer is shorter where the family's sampler makes it so."""
        size = self.block_size()
        short = getattr(self.model, "ends_with_prompt", False)
        return min(size, call.rules.max_new_tokens - num_made + len(known)) if short else size

    def _predict(self, call: Call, logits_BKV: Tensor, mask_id: int, rows: Sequence[int]) -> Predicted:
        """Tokens, and their probabilities under the distribution that they are chosen from."""
        if not self.params.commit_mask:
            logits_BKV[..., mask_id] = -torch.inf
        temperature = self.params.temperature
        logits_BKV = self.limited(logits_BKV if temperature == 0 else logits_BKV / temperature)
        tokens_BK = choose(logits_BKV, 1.0, call.noise, rows) if temperature > 0 else logits_BKV.argmax(-1)
        confidence_BK = logits_BKV.softmax(-1).gather(-1, tokens_BK[..., None])[..., 0]
        return Predicted(*on_host(tokens_BK, confidence_BK))

    def _commit(self, call: Call, blocks: Sequence[Block], rows: Sequence[int], predicted: Predicted) -> None:
        """Commit what the rule takes."""
        taken_BK = self.taken(predicted, blocks)
        for block, index, tokens_K, confidence_K, taken_K in zip(blocks, rows, *predicted, taken_BK, strict=True):
            block.tokens_K = torch.where(taken_K, tokens_K, block.tokens_K)
            block.masked_K = block.masked_K & ~(taken_K & (tokens_K != self.model.mask_token_id))
            row, forced = call.rows[index], self.num_forced(taken_K, confidence_K)
            if forced is not None:
                row.num_forced = (row.num_forced or 0) + forced
            if row.steps is not None:
                taken = (taken_K, tokens_K, confidence_K)
                row.steps.append(commit_step(block.number, block.step, *taken, num_forced=forced or 0))
            block.step, block.taken_K = block.step + 1, taken_K

    def _advance(self, call: Call, blocks: list[Block], context: CountedContext, mask_id: int) -> CountedContext | None:
        """Hand over finished blocks; read those of rows that go on into the context, all in one call."""
        rows = list(context.rows)
        handed_over = [self.made(call, row, blocks[row]) for row in rows]
        closed = [position for position, made in enumerate(handed_over) if made is not None]
        new = [made for made in handed_over if made is not None]
        going = [closed[i] for i in call.absorb([rows[position] for position in closed], new)]
        still_open = [position for position in range(len(rows)) if position not in closed]
        if not going:
            return context.select(still_open) if still_open else None
        view = context.select(going)
        extended = call.counted.extend(view, torch.stack([blocks[row].tokens_K for row in view.rows]))
        for row in view.rows:
            width = self._width(call, len(call.rows[row].produced))
            blocks[row] = Block.behind((), width, mask_id, number=blocks[row].number + 1)
            self.opened(blocks[row])
        return context.select(still_open).join(extended) if still_open else extended
