"""The denoiser made to decode one token at a time, as a check that it knows the language: no mask, no time.

It is fed the last token on the context before that token; the context then absorbs the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twotower_eval.decoders import Clock
from twotower_eval.decoders.finish import check_prompts, generation, is_finished, make_rules
from twotower_eval.decoders.rows import RowNoise, check_temperature, choose, padded_ids
from twotower_eval.models.counting import CountingModel
from twotower_eval.records import Generation, Prompt


@dataclass(frozen=True, kw_only=True)
class Params:
    """``temperature`` 0 is greedy."""

    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


_Params = Params  # inside the class its attribute hides the name


class MockAR:
    """One denoiser and one context forward per token."""

    Params = Params
    VERSION = 1

    def __init__(self, model: Any, params: _Params, *, clock: Clock | None = None) -> None:
        if not model.has_denoiser:
            raise ValueError("mock_ar needs a two-tower checkpoint; this one has no denoiser")
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
        started = self.clock() if self.clock else 0.0
        counted, noise = CountingModel(self.model, len(prompts)), RowNoise(prompts)
        produced: list[list[int]] = [[] for _ in prompts]
        finish_s: list[float | None] = [None] * len(prompts)
        context = counted.prefill(*padded_ids([prompt.token_ids[:-1] for prompt in prompts]))
        last_B1 = torch.tensor([[prompt.token_ids[-1]] for prompt in prompts])
        while True:
            logits_BV = counted.denoise(last_B1, context, None)[:, 0]
            tokens = choose(logits_BV, self.params.temperature, noise, context.rows).tolist()
            going = []
            for position, (row, token) in enumerate(zip(context.rows, tokens, strict=True)):
                produced[row].append(token)
                if not is_finished(produced[row], 1, rules):
                    going.append(position)
                elif self.clock:
                    finish_s[row] = self.clock() - started
            if not going:
                break
            context = counted.extend(context.select(going), last_B1[going])
            last_B1 = torch.tensor([[tokens[position]] for position in going])
        return [
            generation(
                prompt,
                produced[row],
                rules,
                num_context_forwards=counted.num_context_forwards[row],
                num_denoiser_forwards=counted.num_denoiser_forwards[row],
                finish_s=finish_s[row],
            )
            for row, prompt in enumerate(prompts)
        ]
