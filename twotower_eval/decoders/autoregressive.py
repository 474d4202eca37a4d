"""One token at a time from the context tower (or any causal model): the baseline."""

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


class Autoregressive:
    """n useful tokens cost n context forwards: the prefill gives the first, each extension one more."""

    Params = Params
    VERSION = 1

    def __init__(self, model: Any, params: _Params, *, clock: Clock | None = None) -> None:
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
        context = counted.prefill(*padded_ids([prompt.token_ids for prompt in prompts]))
        while True:
            tokens = choose(counted.next_logits(context), self.params.temperature, noise, context.rows).tolist()
            going = []
            for position, (row, token) in enumerate(zip(context.rows, tokens, strict=True)):
                produced[row].append(token)
                if not is_finished(produced[row], 1, rules):
                    going.append(position)
                elif self.clock:
                    finish_s[row] = self.clock() - started
            if not going:
                break
            context = context.select(going)
            context = counted.extend(context, torch.tensor([[tokens[position]] for position in going]))
        return [
            generation(
                prompt,
                produced[row],
                rules,
                num_context_forwards=counted.num_context_forwards[row],
                num_denoiser_forwards=0,
                finish_s=finish_s[row],
            )
            for row, prompt in enumerate(prompts)
        ]
