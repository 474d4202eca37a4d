"""One call of a batch decoder: checks, counting, random streams, stop events and records, the same for all of them.

A decoder says only how tokens come about (:meth:`BatchDecoder._decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from twotower_eval.decoders import Clock
from twotower_eval.decoders.finish import Rules, check_prompts, generation, is_finished, make_rules
from twotower_eval.decoders.rows import RowNoise, padded_ids
from twotower_eval.models.counting import CountedContext, CountingModel
from twotower_eval.records import CommitStep, Generation, Prompt


@dataclass
class Row:
    """What one prompt has so far. ``num_forced`` stays None for decoders without a threshold, ``steps`` without a
    trace."""

    produced: list[int] = field(default_factory=list)
    finish_s: float | None = None
    num_forced: int | None = None
    steps: list[CommitStep] | None = None


class Call:
    """The batch while it is decoded. Rows that have finished leave it; those that go on are selected by position."""

    def __init__(self, model: Any, prompts: Sequence[Prompt], rules: Rules, clock: Clock | None) -> None:
        self.prompts, self.rules, self.clock = prompts, rules, clock
        self.started = clock() if clock else 0.0
        self.counted = CountingModel(model, len(prompts))
        self.noise = RowNoise(prompts)
        self.rows = [Row() for _ in prompts]

    def prefill(self, *, without_last: int = 0) -> CountedContext:
        """The context of all prompts, but for their last tokens."""
        return self.counted.prefill(
            *padded_ids([prompt.token_ids[: len(prompt.token_ids) - without_last] for prompt in self.prompts])
        )

    def absorb(self, rows: Sequence[int], new_tokens: Sequence[Sequence[int]]) -> list[int]:
        """Add each row's new tokens; positions, within ``rows``, of those that go on."""
        going = []
        for position, (index, tokens) in enumerate(zip(rows, new_tokens, strict=True)):
            row = self.rows[index]
            row.produced.extend(tokens)
            if not is_finished(row.produced, len(tokens), self.rules):
                going.append(position)
            elif self.clock:
                row.finish_s = self.clock() - self.started
        return going

    def generations(self) -> list[Generation]:
        """The finished rows as records, in the order of the prompts."""
        return [
            generation(
                prompt,
                row.produced,
                self.rules,
                num_context_forwards=self.counted.num_context_forwards[index],
                num_denoiser_forwards=self.counted.num_denoiser_forwards[index],
                num_forced_commits=row.num_forced,
                finish_s=row.finish_s,
                trace=None if row.steps is None else tuple(row.steps),
            )
            for index, (prompt, row) in enumerate(zip(self.prompts, self.rows, strict=True))
        ]


class BatchDecoder:
    """Base of the decoders that run all prompts of a call beside each other."""

    KIND: ClassVar[str]
    NEEDS_DENOISER: ClassVar[bool] = True

    def __init__(self, model: Any, params: Any, *, clock: Clock | None = None) -> None:
        if self.NEEDS_DENOISER and not model.has_denoiser:
            raise ValueError(f"{self.KIND} needs a two-tower checkpoint; this one has no denoiser")
        self.model, self.params, self.clock = model, params, clock

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """See :class:`twotower_eval.decoders.Decoder`."""
        rules = make_rules(self.model, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, stop=stop)
        check_prompts(self.model, prompts)
        if not prompts:
            return []
        call = Call(self.model, prompts, rules, self.clock)
        self._decode(call)
        return call.generations()

    def _decode(self, call: Call) -> None:
        """Give every row tokens until none goes on."""
        raise AssertionError(f"{type(self).__name__} says nothing about how to decode")
