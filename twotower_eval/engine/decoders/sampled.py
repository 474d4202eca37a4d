"""Decoding by sampling through time: every step draws a token or a mask anew at each position that is masked.

A canvas behind the prompt starts as masks and goes from time 1 to 0. Logits are read again only where tokens have
changed since, unless a sampler says otherwise. Draws come from the row's own stream. Shape letters: G tokens of a
canvas, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import BatchDecoder, Call
from twotower_eval.engine.decoders.rows import Clock, Noise, padded_ids
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.engine.models.protocol import Model, masked
from twotower_eval.records import CommitStep

LEAST = 1e-10  # keeps a draw of 0 and its logarithm apart from infinity, as published samplers do


class SampledParams(Protocol):
    """Parameters that every sampler has."""

    @property
    def trace(self) -> bool: ...


ParamsT = TypeVar("ParamsT", bound=SampledParams)


@dataclass
class Draft:
    """One row's canvas in progress. ``logits_GV`` None: they have to be read. ``start``: tokens made before it;
    ``num_known``: its first tokens that the prompt gave; ``order`` is that in which positions are filled, and ``times``
    are those of all of a row's canvases, for samplers that have them."""

    tokens_G: Tensor
    mask_id: int
    number: int = 0
    start: int = 0
    num_known: int = 0
    step: int = 0
    logits_GV: Tensor | None = None
    was_read: bool = False
    order: Tensor | None = None
    times: Tensor | None = None

    @property
    def masked_G(self) -> Tensor:
        """Where it is still a mask."""
        return self.tokens_G == self.mask_id

    @property
    def logits(self) -> Tensor:
        """The logits, which have been read."""
        assert self.logits_GV is not None
        return self.logits_GV


class SampledDecoder(BatchDecoder[ParamsT]):
    """Base of samplers: the loop. They define :meth:`num_steps` and :meth:`drawn`, and may define the rest.

    ``READS_BLOCKS``: canvases are blocks, counted from the first token of a row, and each is read into the context when
    it is finished; what the prompt has of its last block is given in the first.
    """

    NEEDS_PROMPT: ClassVar[bool] = False
    READS_BLOCKS: ClassVar[bool] = False
    SAMPLES: ClassVar[bool] = True

    def __init__(self, model: Model, params: ParamsT, *, clock: Clock | None = None) -> None:
        super().__init__(model, params, clock=clock)
        if self.READS_BLOCKS:
            self.block_size()  # a model without blocks is refused now

    def block_size(self) -> int:
        """Tokens of a block, if blocks are read."""
        raise AssertionError(f"{type(self).__name__} does not define block_size")

    def num_steps(self, draft: Draft) -> int:
        """Steps of a canvas, all of them counted."""
        raise AssertionError(f"{type(self).__name__} does not define num_steps")

    def drawn(self, draft: Draft, chosen_G: Tensor, noise: Noise, row: int) -> Tensor:
        """What the canvas is after this step, (G,); only ``chosen_G`` may change."""
        raise AssertionError(f"{type(self).__name__} does not define drawn")

    def chosen(self, draft: Draft, noise: Noise, row: int) -> Tensor:
        """Positions that this step draws, (G,) boolean: all masks."""
        return draft.masked_G

    def opened(self, draft: Draft, noise: Noise, row: int) -> None:
        """A canvas begins."""

    def time(self, draft: Draft) -> float | None:
        """The time that a network is told."""
        return None

    def rereads(self, draft: Draft) -> bool:
        """Whether logits are read for this step even if nothing has changed."""
        return False

    def is_done(self, draft: Draft) -> bool:
        """Whether a canvas is finished."""
        return draft.step >= self.num_steps(draft) or not draft.masked_G.any()

    @property
    def reads_together(self) -> bool:
        """Whether a change in one row has all rows of the batch read again, and blocks end together."""
        return False

    def num_read(self, num_prompt_tokens: int) -> int:
        """Tokens of a prompt that stand before the first canvas: its whole blocks, or all."""
        return num_prompt_tokens - num_prompt_tokens % self.block_size() if self.READS_BLOCKS else num_prompt_tokens

    def num_prefilled(self, num_prompt_tokens: int) -> int:
        """Those of them that are read before decoding."""
        return self.num_read(num_prompt_tokens)

    def width(self, call: Call, row: int) -> int:
        """Tokens of the next canvas of a row: the whole answer."""
        return call.rules.max_new_tokens

    def window(self, call: Call, row: int) -> list[int] | None:
        """The tokens before the canvas that are read with it; None: the prompt."""
        return None

    def _decode(self, call: Call) -> None:
        mask_id = masked(self.model).mask_token_id
        drafts = []
        for index, prompt in enumerate(call.prompts):
            call.rows[index].steps = [] if self.params.trace or prompt.trace else None
            drafts.append(self._opened(call, index, mask_id, None))
        call.read_up_to = self.num_prefilled
        context = call.admit()
        while context is not None:
            self._read(call, drafts, context)
            rows = [(row, drafts[row]) for row in context.rows]
            chosen = [self.chosen(draft, call.noise, row) for row, draft in rows]
            changed = []
            for (row, draft), chosen_G in zip(rows, chosen, strict=True):
                tokens_G = torch.where(chosen_G, self.drawn(draft, chosen_G, call.noise, row), draft.tokens_G)
                changed.append(bool((tokens_G != draft.tokens_G).any()))
                _record(call, row, draft, tokens_G)
                draft.tokens_G, draft.step = tokens_G, draft.step + 1
            for (_, draft), new in zip(rows, changed, strict=True):
                if new or self.rereads(draft) or (self.reads_together and any(changed)):
                    draft.logits_GV = None
            context = call.admit(self._advance(call, drafts, context, mask_id))

    def _opened(self, call: Call, row: int, mask_id: int, before: Draft | None) -> Draft:
        prompt, start = call.prompts[row].token_ids, len(call.rows[row].produced)
        known = () if before else prompt[self.num_read(len(prompt)) :]
        tokens_G = torch.tensor([*known, *[mask_id] * (self.width(call, row) - len(known))])
        number, times = (before.number + 1, before.times) if before else (0, None)
        draft = Draft(tokens_G, mask_id, number=number, start=start, num_known=len(known), times=times)
        self.opened(draft, call.noise, row)
        return draft

    def _read(self, call: Call, drafts: Sequence[Draft], context: CountedContext) -> None:
        """Read the logits of rows that have none, those of equal width together."""
        by_width: dict[int, list[int]] = {}
        for position, row in enumerate(context.rows):
            drafts[row].was_read = drafts[row].logits_GV is None
            if drafts[row].was_read:
                by_width.setdefault(len(drafts[row].tokens_G), []).append(position)
        for positions in by_width.values():
            view = self._behind_windows(call, context.select(positions))
            times = [self.time(drafts[row]) for row in view.rows]
            told = None if None in times else [time for time in times if time is not None]
            logits_BGV = call.counted.denoise(torch.stack([drafts[row].tokens_G for row in view.rows]), view, told)
            for row, logits_GV in zip(view.rows, logits_BGV.cpu(), strict=True):
                drafts[row].logits_GV = logits_GV

    def _behind_windows(self, call: Call, view: CountedContext) -> CountedContext:
        windows = [self.window(call, row) for row in view.rows]
        given = [window for window in windows if window is not None]
        return call.counted.prefill(view.rows, *padded_ids(given)) if given else view

    def _advance(self, call: Call, drafts: list[Draft], context: CountedContext, mask_id: int) -> CountedContext | None:
        """Hand over finished canvases; rows that need more tokens begin another."""
        rows = list(context.rows)
        done = [self.is_done(drafts[row]) for row in rows]
        if self.READS_BLOCKS and self.reads_together and not all(done):
            done = [False] * len(rows)
        still_open = [position for position, over in enumerate(done) if not over]
        closed = [position for position, over in enumerate(done) if over]
        made = [drafts[rows[position]] for position in closed]
        new = [draft.tokens_G[draft.num_known :].tolist() for draft in made]
        going = [closed[i] for i in call.absorb([rows[position] for position in closed], new)]
        read = self._followed(call, drafts, context.select(going)) if going else None
        for position in going:
            row = rows[position]
            drafts[row] = self._opened(call, row, mask_id, drafts[row])
        if not still_open or read is None:
            return context.select(still_open) if still_open else read
        return context.select(still_open).join(read)

    def _followed(self, call: Call, drafts: Sequence[Draft], view: CountedContext) -> CountedContext:
        """The context behind finished canvases."""
        if not self.READS_BLOCKS:
            return view
        return call.counted.extend(view, torch.stack([drafts[row].tokens_G for row in view.rows]))


def _record(call: Call, index: int, draft: Draft, tokens_G: Tensor) -> None:
    """A step that read logits or changed something, for the trace."""
    steps, where = call.rows[index].steps, (tokens_G != draft.tokens_G).nonzero().flatten()
    if steps is None or not (draft.was_read or len(where)):
        return
    probabilities = draft.logits[where].softmax(-1).gather(-1, tokens_G[where, None])[:, 0]
    steps.append(
        CommitStep(
            block=draft.number,
            step=draft.step,
            positions=tuple((where + draft.start - draft.num_known).tolist()),
            token_ids=tuple(tokens_G[where].tolist()),
            confidences=tuple(probabilities.tolist()),
            num_forced=0,
        )
    )


def without_mask(logits: Tensor, mask_id: int) -> Tensor:
    """Probabilities over all tokens but the mask, whose own is 0."""
    logits = logits.clone()
    logits[..., mask_id] = -torch.inf
    return logits.softmax(-1)


def race(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The tokens (...) that a race of exponential draws chooses from unnormalised probabilities (..., V); what has a
    negative one never wins.

    >>> race(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.1, 0.9]]))
    tensor([1])
    """
    return (probabilities / (LEAST - torch.log(uniform + LEAST))).argmax(-1)
