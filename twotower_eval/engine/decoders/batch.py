"""One call of a batch decoder: checks, counting, random streams, stop events and records, the same for all.

A decoder only defines how tokens are made (:meth:`BatchDecoder._decode`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from twotower_eval.engine.decoders.beginnings import Beginnings, shared_beginnings
from twotower_eval.engine.decoders.rows import (
    Clock,
    Noise,
    OnFinish,
    RowNoise,
    Rules,
    check_batch_size,
    check_prompts,
    generation,
    is_finished,
    make_rules,
    padded_ids,
)
from twotower_eval.engine.models.counting import CountedContext, CountingModel, joined
from twotower_eval.engine.models.protocol import Ability, Model, lacks
from twotower_eval.errors import UserError
from twotower_eval.records import CommitStep, Generation, Prompt

ParamsT = TypeVar("ParamsT")


@dataclass
class Row:
    """The state of one prompt. ``num_forced`` is None for decoders without a threshold, ``steps`` without a trace."""

    produced: list[int] = field(default_factory=list)
    num_forced: int | None = None
    steps: list[CommitStep] | None = None


class Call:
    """The batch during decoding. Finished rows leave it, the others are selected by position, and waiting prompts take
    the free places.

    ``width`` is the maximum of rows per forward, ``capacity`` that of rows in progress. Prompts are prefilled ``width``
    at a time, so up to that many contexts wait for a place. ``steady`` keeps rows together that started together:
    waiting prompts enter only when the last row of the batch has finished. ``ordered``: prompts of like length are
    prefilled together, the longest first. ``share``: what prompts have in common at their beginning is read once.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        rules: Rules,
        clock: Clock | None,
        *,
        width: int,
        capacity: int,
        steady: bool,
        on_finish: OnFinish | None,
        ordered: bool = False,
        share: bool = False,
        make_noise: Callable[[Sequence[Prompt]], Noise] = RowNoise,
    ) -> None:
        self.prompts, self.rules, self.clock = prompts, rules, clock
        self.width, self.capacity, self.steady, self.on_finish = width, capacity, steady, on_finish
        self.started = clock() if clock else 0.0
        self.counted = CountingModel(model, len(prompts))
        self.noise = make_noise(prompts)
        self.rows = [Row() for _ in prompts]
        self.waiting = list(range(len(prompts)))
        self._ordered, self._share = ordered, share
        self._beginnings: Beginnings | None = None
        self.read_up_to: Callable[[int], int] | None = None  # how much of a prompt is read before decoding; None: all
        self._read: CountedContext | None = None  # prefilled prompts, the first of which have places
        self._num_placed = 0
        self.generations: dict[int, Generation] = {}
        self.num_draft_forwards: Callable[[int], int | None] = lambda row: None  # of a row's draft model

    def admit(self, running: CountedContext | None = None, *, without_last: int = 0) -> CountedContext | None:
        """The running rows and as many waiting prompts as there is room for, without their last tokens if
        ``without_last``.

        None if nothing runs and nothing waits: the call is done.
        """
        room = 0 if running and self.steady else self.capacity - (len(running.rows) if running else 0)
        room = min(self.width, room)
        while room > 0 and (self._read or self.waiting):
            if self._read is None:
                self._read, self._num_placed = self._prefill(without_last), 0
            placed = range(self._num_placed, min(self._num_placed + room, len(self._read.rows)))
            context, self._num_placed = self._read.select(placed), placed.stop
            room -= len(placed)
            if placed.stop == len(self._read.rows):
                self._read = None
            running = running.join(context) if running else context
        return running

    def _prefill(self, without_last: int) -> CountedContext:
        """Prefill as many prompts as a forward serves."""
        if self._share and self.read_up_to is None:
            self._find_beginnings(without_last)
        new, self.waiting = self.waiting[: self.width], self.waiting[self.width :]
        if self._beginnings is None:
            return self._read_whole(new, without_last)
        parts = self._beginnings.prefill(new)
        if alone := self._beginnings.alone(new):
            parts.append(self._read_whole(alone, without_last))
        return joined(parts)

    def _read_whole(self, rows: Sequence[int], without_last: int) -> CountedContext:
        ids = [self.prompts[row].token_ids for row in rows]
        ends = [(self.read_up_to(len(row)) if self.read_up_to else len(row)) - without_last for row in ids]
        return self.counted.prefill(rows, *padded_ids([row[:end] for row, end in zip(ids, ends, strict=True)]))

    def _find_beginnings(self, without_last: int) -> None:
        """Before the first prompts are read."""
        self._share = False
        self._beginnings = shared_beginnings(self.counted.model, self.counted, self.prompts, without_last=without_last)
        if self._beginnings and self._ordered:
            self.waiting = self._beginnings.in_order(self.waiting)

    def extended(self, context: CountedContext, going: Sequence[int], ids_BK: Tensor) -> CountedContext | None:
        """The context of the rows at ``going`` extended by their ids; None if no row continues."""
        return self.counted.extend(context.select(going), ids_BK[going]) if going else None

    def absorb(self, rows: Sequence[int], new_tokens: Sequence[Sequence[int]]) -> list[int]:
        """Add each row's new tokens; the positions, within ``rows``, of those that continue. The others are
        finished."""
        going = []
        for position, (index, tokens) in enumerate(zip(rows, new_tokens, strict=True)):
            produced = self.rows[index].produced
            produced.extend(tokens)
            if not is_finished(produced, len(tokens), self.rules):
                going.append(position)
            else:
                self._finish(index)
        return going

    def absorb_verified(self, rows: Sequence[int], new_tokens: Sequence[Sequence[int]]) -> list[int]:
        """As :meth:`absorb`, token by token: what lies behind the end of an answer was drafted, and is not produced."""
        going = []
        for position, (index, tokens) in enumerate(zip(rows, new_tokens, strict=True)):
            produced = self.rows[index].produced
            for token in tokens:
                produced.append(token)
                if is_finished(produced, 1, self.rules):
                    self._finish(index)
                    break
            else:
                going.append(position)
        return going

    def last_token(self, row: int) -> int:
        """The last token of a row, the prompt's if it has none of its own."""
        return (self.rows[row].produced or self.prompts[row].token_ids)[-1]

    def _finish(self, index: int) -> None:
        """Make the record of a finished row, and pass it to ``on_finish``."""
        row = self.rows[index]
        made = self.generations[index] = generation(
            self.prompts[index],
            row.produced,
            self.rules,
            num_context_forwards=self.counted.num_context_forwards[index],
            num_denoiser_forwards=self.counted.num_denoiser_forwards[index],
            num_draft_forwards=self.num_draft_forwards(index),
            num_forced_commits=row.num_forced,
            finish_s=self.clock() - self.started if self.clock else None,
            trace=None if row.steps is None else tuple(row.steps),
        )
        if self.on_finish:
            self.on_finish(made)


NEEDED: Mapping[Ability, str] = {
    "causal": "a model that predicts the next token",
    "masked": "a model that predicts masked tokens",
    "two towers": "a two-tower checkpoint",
}


def no_denoiser(decoder: str) -> str:
    """Why a decoder cannot use a model, and which one can."""
    return (
        f"decoder {decoder!r} needs a two-tower checkpoint and this one has no denoiser: give --decoder autoregressive"
    )


def check_mask(model: Model, what: str) -> None:
    """UserError for a model without a mask token, of which ``what`` would fill some."""
    if model.mask_token_id is not None:
        return
    other = (
        ": give --decoder entropy_bound"
        if hasattr(model, "denoise_after")
        else ": add mask_token_id to its config.json, or mask_token to its tokenizer_config.json"
    )
    raise UserError(
        f"{what} fills masks, and {model.checkpoint.name} ({model.checkpoint.family}) has no mask token{other}"
    )


def misfit(decoder: str, needed: Ability, model: Model) -> str | None:
    """Why a decoder with this need cannot use a model; None where it can."""
    if not lacks(model, needed):
        return None
    if not model.has_denoiser:
        return f"decoder {decoder!r} needs {NEEDED[needed]}, and this one has no denoiser"
    checkpoint = model.checkpoint
    return f"decoder {decoder!r} needs {NEEDED[needed]}, and {checkpoint.name} is of family {checkpoint.family}"


class BatchDecoder(Generic[ParamsT]):
    """Base of the decoders that run the prompts of a call in batches."""

    KIND: ClassVar[str]
    NEEDS_DENOISER: ClassVar[bool] = True
    NEEDS_MASK: ClassVar[bool] = True  # of the denoiser: a token that stands for what is to be filled
    NEEDS: ClassVar[Ability | None] = None  # None: masked tokens, or the next one where it needs no denoiser
    SAMPLES: ClassVar[bool] = False  # whether tokens are drawn also at temperature 0
    NEEDS_PROMPT: ClassVar[bool] = True  # of at least one token
    KEEPS_ROWS: ClassVar[bool] = False  # whether rows that started together stay together until the last has finished
    make_noise: Callable[[Sequence[Prompt]], Noise] = RowNoise  # replaced where recorded draws are played back

    def __init__(self, model: Model, params: ParamsT, *, clock: Clock | None = None) -> None:
        needed = self.needs()
        if reason := misfit(getattr(self, "KIND", type(self).__name__), needed, model):
            raise UserError(reason)
        if needed == "masked" and self.NEEDS_MASK:
            check_mask(model, f"decoder {self.KIND!r}")
        self.model, self.params, self.clock = model, params, clock

    @classmethod
    def needs(cls) -> Ability:
        """What a model has to be able to do."""
        return cls.NEEDS or ("masked" if cls.NEEDS_DENOISER else "causal")

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        max_batch_size: int | None = None,
        on_finish: OnFinish | None = None,
        share_beginnings: bool = False,
    ) -> list[Generation]:
        """See :class:`twotower_eval.engine.decoders.Decoder`.

        ``share_beginnings``: what prompts have in common at their beginning is read once, by models that were proved to
        go on from it. Never where a call is timed: each prompt costs there what it costs a user who brings it alone.
        """
        rules = make_rules(self.model, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, stop=stop)
        check_prompts(self.model, prompts, may_be_empty=not self.NEEDS_PROMPT)
        width = check_batch_size(max_batch_size) or len(prompts)
        if self._rows_alone:
            width = 1
        steady = self._depends_on_neighbours or self.KEEPS_ROWS
        steady = steady or (len(prompts) > 1 and not self.model.joins_contexts)
        capacity = width if steady else self._capacity(width)
        # Prompts of like length are prefilled together without padding, and the longest do not come last.
        ordered = width < len(prompts) and not self._depends_on_neighbours
        call = Call(
            self.model,
            prompts,
            rules,
            self.clock,
            width=width,
            capacity=capacity,
            steady=steady,
            ordered=ordered,
            share=share_beginnings
            and not (self._depends_on_neighbours or self.KEEPS_ROWS)
            and (self.model.joins_contexts or width == 1),
            on_finish=on_finish,
            make_noise=self.make_noise,
        )
        if ordered:
            call.waiting.sort(key=lambda row: -len(prompts[row].token_ids))
        if prompts:
            self._decode(call)
        return [call.generations[index] for index in range(len(prompts))]

    @property
    def _depends_on_neighbours(self) -> bool:
        """Whether a row's tokens depend on its neighbours, so that batches must keep their rows."""
        return False

    @property
    def _rows_alone(self) -> bool:
        """Whether the model is only right with one prompt at a time."""
        return not getattr(self.model, "rows_together", True)

    def _capacity(self, width: int) -> int:
        """Maximum of rows in progress if ``width`` of them run at a time."""
        return width

    def _decode(self, call: Call) -> None:
        """Decode until no row continues."""
        raise AssertionError(f"{type(self).__name__} does not define how to decode")
