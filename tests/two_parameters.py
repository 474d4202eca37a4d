"""A plug-in decoder with two parameters of its own, one a number and one a word, both of which change its answers."""

import dataclasses
from typing import Any, Literal

import torch

from tests import example_decoder
from twotower_eval.engine.decoders.rows import generation, is_finished, padded_ids
from twotower_eval.engine.models.counting import CountingModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """``patience`` tokens are written at most, 0 for as many as may be; of the likeliest tokens ``choice`` is taken."""

    patience: int = 0
    choice: Literal["first", "second"] = "first"

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise ValueError(f"patience must be 0 or more, not {self.patience}")


class Impatient(example_decoder.Greedy):
    """The example's loop; behind so many tokens the likeliest of those that end an answer is taken."""

    Params = Params
    VERSION = 1

    def __init__(self, model: Any, params: Params, *, clock: Any = None) -> None:
        super().__init__(model, example_decoder.Params(), clock=clock)
        self.params = params

    def _batch(self, prompts: Any, rules: Any) -> list[Any]:
        counted = CountingModel(self.model, len(prompts))
        rows = range(len(prompts))
        context = counted.prefill(rows, *padded_ids([prompt.token_ids for prompt in prompts]))
        produced: list[list[int]] = [[] for _ in rows]
        done = [False for _ in rows]
        while not all(done):
            tokens = self._chosen(counted.next_logits(context), produced, rules)
            for row in rows:
                if not done[row]:
                    produced[row].append(tokens[row])
                    done[row] = is_finished(produced[row], 1, rules)
            if not all(done):
                context = counted.extend(context, torch.tensor(tokens)[:, None])
        forwards = zip(counted.num_context_forwards, counted.num_denoiser_forwards, strict=True)
        return [
            generation(prompt, made, rules, num_context_forwards=context_n, num_denoiser_forwards=denoiser_n)
            for prompt, made, (context_n, denoiser_n) in zip(prompts, produced, forwards, strict=True)
        ]

    def _chosen(self, logits_BV: Any, produced: list[list[int]], rules: Any) -> list[int]:
        rank = 1 if self.params.choice == "second" else 0
        tokens = logits_BV.topk(2, dim=-1).indices[:, rank].tolist()
        eos = next(iter(rules.eos_token_ids), None)
        for row, made in enumerate(produced):
            if eos is not None and self.params.patience and len(made) >= self.params.patience:
                tokens[row] = eos
        return [int(token) for token in tokens]
