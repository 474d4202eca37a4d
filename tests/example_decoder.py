"""The decoder of docs/trust.md, word for word: greedy, all prompts at once, finished rows kept in the batch."""

import dataclasses
from typing import Any

import torch

from twotower_eval.engine.decoders.rows import (
    check_batch_size,
    check_prompts,
    generation,
    is_finished,
    make_rules,
    padded_ids,
)
from twotower_eval.engine.models.counting import CountingModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """What the command line may set; here nothing."""


class Greedy:
    """Rows that have finished stay in the batch, so every call of the model counts for them as well."""

    Params = Params
    VERSION = 1

    def __init__(self, model: Any, params: Params, *, clock: Any = None) -> None:
        self.model = model

    @torch.inference_mode()
    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int,
        eos_token_ids: Any = (),
        stop: Any = (),
        max_batch_size: int | None = None,
        on_finish: Any = None,
    ) -> list[Any]:
        check_prompts(self.model, prompts)
        size = check_batch_size(max_batch_size) or max(1, len(prompts))
        rules = make_rules(self.model, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, stop=stop)
        made = []
        for start in range(0, len(prompts), size):
            made += self._batch(prompts[start : start + size], rules)
        for answer in made if on_finish else ():
            on_finish(answer)
        return made

    def _batch(self, prompts: Any, rules: Any) -> list[Any]:
        counted = CountingModel(self.model, len(prompts))
        rows = range(len(prompts))
        context = counted.prefill(rows, *padded_ids([prompt.token_ids for prompt in prompts]))
        produced: list[list[int]] = [[] for _ in rows]
        done = [False for _ in rows]
        while True:
            tokens = counted.next_logits(context).argmax(dim=-1).tolist()
            for row in rows:
                if not done[row]:
                    produced[row].append(tokens[row])
                    done[row] = is_finished(produced[row], 1, rules)
            if all(done):
                break
            context = counted.extend(context, torch.tensor(tokens)[:, None])
        return [
            generation(
                prompt,
                produced[row],
                rules,
                num_context_forwards=counted.num_context_forwards[row],
                num_denoiser_forwards=counted.num_denoiser_forwards[row],
            )
            for row, prompt in enumerate(prompts)
        ]
