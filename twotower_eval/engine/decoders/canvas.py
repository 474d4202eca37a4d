"""Decoding on a canvas: prompt and masks are read whole in every step, and some masks are committed, block after block.

What a step commits is a decoder's own rule (:meth:`CanvasDecoder.taken`). A row ends behind the block that holds an end
of text, or when its canvas is full: what stands behind an end cannot change what stands before it. Shape letters: B
rows, G tokens of a canvas behind the prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import BatchDecoder, Call
from twotower_eval.engine.decoders.commits import commit_step
from twotower_eval.engine.decoders.parts import STEPS_PER_TOKEN, Held
from twotower_eval.engine.decoders.rows import choose, on_host, padded_ids
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.engine.models.protocol import masked


class CanvasParams(Protocol):
    """Parameters that every decoder on a canvas has.

    ``cfg_scale`` above 0 guides away from the answer to a masked prompt, by twice as many forwards. ``commit_mask``
    lets the mask token win, as published samplers do: such a position stays masked, and its commit is spent. A block
    ends with its schedule, or after twice as many steps as it has tokens, also with masks in it.
    """

    @property
    def temperature(self) -> float: ...
    @property
    def cfg_scale(self) -> float: ...
    @property
    def commit_mask(self) -> bool: ...
    @property
    def trace(self) -> bool: ...


ParamsT = TypeVar("ParamsT", bound=CanvasParams)


class Shape(NamedTuple):
    """Blocks of a canvas of ``length`` tokens, the last of which may be shorter, and the steps planned for each."""

    length: int
    block_length: int
    num_steps: int

    @property
    def num_blocks(self) -> int:
        """The last one included."""
        return -(-self.length // self.block_length)


@dataclass
class Canvas:
    """One prompt's answer in progress. ``step`` counts the calls on the current block."""

    tokens_G: Tensor
    masked_G: Tensor
    shape: Shape
    block: int = 0
    step: int = 0
    quotas: list[int] = field(default_factory=list)
    kept: Held | None = None

    @classmethod
    def empty(cls, shape: Shape, mask_id: int) -> Canvas:
        """All masks."""
        return cls(torch.full((shape.length,), mask_id), torch.ones(shape.length, dtype=torch.bool), shape)

    @property
    def span(self) -> slice:
        """The places of the current block."""
        start = self.block * self.shape.block_length
        return slice(start, min(start + self.shape.block_length, self.shape.length))

    def eligible(self, *, earlier_too: bool) -> Tensor:
        """The masks of the current block, (G,); with ``earlier_too`` those that earlier blocks have left as well."""
        found_G = torch.zeros_like(self.masked_G)
        places = slice(0, self.span.stop) if earlier_too else self.span
        found_G[places] = self.masked_G[places]
        return found_G


class Predicted(NamedTuple):
    """Tokens and confidences of every position, (B, G) each, on the host."""

    tokens_BG: Tensor
    confidence_BG: Tensor


class CanvasDecoder(BatchDecoder[ParamsT]):
    """Base of decoders on a canvas: the loop. They define :meth:`shape` and :meth:`taken`, and may define the rest."""

    def shape(self, max_new_tokens: int) -> Shape:
        """The blocks of an answer. UserError for parameters that do not fit it."""
        raise AssertionError(f"{type(self).__name__} does not define shape")

    def taken(
        self, predicted: Predicted, eligible_BG: Tensor, canvases: Sequence[Canvas], call: Call, rows: Sequence[int]
    ) -> Tensor:
        """What this step commits of the eligible positions, (B, G) boolean."""
        raise AssertionError(f"{type(self).__name__} does not define taken")

    def opened(self, canvas: Canvas) -> None:
        """A block begins."""

    def is_open(self, canvas: Canvas) -> bool:
        """Whether the current block needs another step; where the mask token may win, it ends some time."""
        if self.params.commit_mask and canvas.step >= STEPS_PER_TOKEN * (canvas.span.stop - canvas.span.start):
            return False
        return bool(canvas.eligible(earlier_too=self.params.commit_mask).any())

    def limited(self, logits_BGV: Tensor) -> Tensor:
        """The logits that tokens are chosen by."""
        return logits_BGV

    def confidence(self, logits_BGV: Tensor, tokens_BG: Tensor) -> Tensor:
        """How sure the model is of each token, (B, G): its probability."""
        return logits_BGV.softmax(-1).gather(-1, tokens_BG[..., None])[..., 0]

    def num_forced(self, taken_G: Tensor, confidence_G: Tensor) -> int | None:
        """Commits whose confidence the rule alone would not have let through; None for rules without a threshold."""
        return None

    def _decode(self, call: Call) -> None:
        mask_id = masked(self.model).mask_token_id
        shape = self.shape(call.rules.max_new_tokens)
        canvases = [Canvas.empty(shape, mask_id) for _ in call.prompts]
        for row, prompt, canvas in zip(call.rows, call.prompts, canvases, strict=True):
            row.steps = [] if self.params.trace or prompt.trace else None
            self.opened(canvas)
        context = call.admit()
        while context is not None:
            for positions in self.together(canvases, context):
                view = context.select(positions)
                own = [canvases[row] for row in view.rows]
                self._commit(call, own, view.rows, self.predicted(call, own, view, mask_id))
            context = self._advance(call, canvases, context)

    def together(self, canvases: Sequence[Canvas], context: CountedContext) -> list[list[int]]:
        """Positions in the context of rows that share a call."""
        return [list(range(len(context.rows)))]

    def predicted(self, call: Call, own: Sequence[Canvas], view: CountedContext, mask_id: int) -> Predicted:
        """Tokens and confidences of every position of these rows' canvases, from one call, or two if it is guided."""
        tokens_BG = torch.stack([canvas.tokens_G for canvas in own])
        return self._chosen(call, self._logits(call, view, tokens_BG, mask_id), mask_id, view.rows)

    def _chosen(self, call: Call, logits_BGV: Tensor, mask_id: int, rows: Sequence[int]) -> Predicted:
        """Tokens and confidences from logits."""
        if not self.params.commit_mask:
            logits_BGV[..., mask_id] = -torch.inf
        logits_BGV = self.limited(logits_BGV)
        temperature = self.params.temperature
        drawn = temperature > 0
        new_BG = choose(logits_BGV, temperature, call.noise, rows) if drawn else logits_BGV.argmax(-1)
        return Predicted(*on_host(new_BG, self.confidence(logits_BGV, new_BG)))

    def _logits(self, call: Call, context: CountedContext, tokens_BG: Tensor, mask_id: int) -> Tensor:
        """Logits (B, G, V), guided if that is asked for (classifier-free guidance, as LLaDA's sampler has it)."""
        logits_BGV = call.counted.denoise(tokens_BG, context, None)
        if self.params.cfg_scale == 0:
            return logits_BGV
        lengths = [len(call.prompts[row].token_ids) for row in context.rows]
        hidden = call.counted.prefill(context.rows, *padded_ids([[mask_id] * length for length in lengths]))
        unguided_BGV = call.counted.denoise(tokens_BG, hidden, None)
        return unguided_BGV + (self.params.cfg_scale + 1) * (logits_BGV - unguided_BGV)

    def _commit(self, call: Call, canvases: Sequence[Canvas], rows: Sequence[int], predicted: Predicted) -> None:
        """Commit what the rule takes."""
        earlier_too = self.params.commit_mask
        eligible_BG = torch.stack([canvas.eligible(earlier_too=earlier_too) for canvas in canvases])
        taken_BG = self.taken(predicted, eligible_BG, canvases, call, rows)
        for canvas, index, tokens_G, confidence_G, taken_G in zip(canvases, rows, *predicted, taken_BG, strict=True):
            canvas.tokens_G = torch.where(taken_G, tokens_G, canvas.tokens_G)
            canvas.masked_G = canvas.masked_G & ~(taken_G & (tokens_G != self.model.mask_token_id))
            row, forced = call.rows[index], self.num_forced(taken_G, confidence_G)
            if forced is not None:
                row.num_forced = (row.num_forced or 0) + forced
            if row.steps is not None:
                taken = (taken_G, tokens_G, confidence_G)
                row.steps.append(commit_step(canvas.block, canvas.step, *taken, num_forced=forced or 0))
            canvas.step += 1

    def _advance(self, call: Call, canvases: Sequence[Canvas], context: CountedContext) -> CountedContext | None:
        """Rows at the end of a block hand it over, and begin the next one or are finished."""
        going = []
        for position, index in enumerate(context.rows):
            canvas = canvases[index]
            if self.is_open(canvas) or self._goes_on(call, index, canvas):
                going.append(position)
        return call.admit(context.select(going) if going else None)

    def _goes_on(self, call: Call, index: int, canvas: Canvas) -> bool:
        """Hand over a finished block; whether there is another one for this row.

        With ``commit_mask`` all is handed over at the end, as later blocks may still fill what earlier ones left.
        """
        at_end = canvas.block == canvas.shape.num_blocks - 1
        if self.params.commit_mask and not at_end:
            done = False
        else:
            made_G = canvas.tokens_G if self.params.commit_mask else canvas.tokens_G[canvas.span]
            done = not call.absorb([index], [made_G.tolist()])
        if done:
            return False
        canvas.block, canvas.step = canvas.block + 1, 0
        self.opened(canvas)
        return True
