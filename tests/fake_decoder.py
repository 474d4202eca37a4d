"""A decoder that takes known times on a clock that only it moves."""

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch

from twotower_eval.records import Generation, Prompt

PREFILL_S, FIRST_S, REST_S, DECODING_S = 0.25, 0.5, 1.0, 100.0


class FakeTime:
    """Seconds that pass only when asked to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


TIME = FakeTime()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """There are none."""


class Sleepy:
    """Prefill, first output, text decoding and the rest each take their constant time."""

    Params = Params
    VERSION = 1
    num_tokens: int | None = None  # None: as many as asked for
    says_when = True
    out_of_memory = False

    def __init__(self, model: Any, params: Params, *, clock: Any = None) -> None:
        self.model, self.params, self.clock = model, params, clock

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        assert not gc.isenabled()
        if self.out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        started_s = self.clock()
        TIME.sleep(PREFILL_S)
        context = self.model.prefill(torch.tensor([[5]] * len(prompts)))
        TIME.sleep(FIRST_S)
        self.model.extend(context, torch.tensor([[6]] * len(prompts)))
        first_s = self.clock() - started_s
        self.model.tokenizer.decode([5])
        TIME.sleep(REST_S)
        num_tokens = self.num_tokens or max_new_tokens
        generations = []
        for index, prompt in enumerate(prompts):
            finish_s = first_s if index == 0 else self.clock() - started_s
            generation = Generation(
                prompt_id=prompt.id,
                token_ids=(5,) * num_tokens,
                text=None,
                finish="length",
                num_prompt_tokens=len(prompt.token_ids),
                num_tokens=num_tokens,
                num_discarded_tokens=0,
                num_context_forwards=2,
                num_denoiser_forwards=0,
                finish_s=finish_s if self.says_when else None,
            )
            generations.append(generation)
        return generations


class Silent(Sleepy):
    """Does not say when a prompt was finished."""

    says_when = False


class Short(Sleepy):
    """Makes fewer tokens than it was asked for."""

    num_tokens = 5


class Hungry(Sleepy):
    """Does not fit into the device's memory."""

    out_of_memory = True
