"""Decoders of a user's own that raise: in ``Params``, in ``__init__``, in ``generate``, or in what they call."""

import dataclasses
import os
from typing import Any

import torch

from tests.example_decoder import Greedy
from twotower_eval.records import Generation

WHERE = "TWOTOWER_TEST_RAISES_IN"  # a setting of the environment, so that the code stays the same where it does not


class Odd(Exception):
    """An exception that nobody knows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    def __post_init__(self) -> None:
        if os.environ.get(WHERE) == "Params":
            raise KeyError("width")


class Raising(Greedy):
    """Greedy, until it raises: at the second prompt of all that it is given."""

    Params = Params

    def __init__(self, model: Any, params: Params, *, clock: Any = None) -> None:
        super().__init__(model, params, clock=clock)  # type: ignore[arg-type]
        self.num = 0
        if os.environ.get(WHERE) == "__init__":
            raise Odd

    def generate(self, prompts: Any, **asked: Any) -> list[Generation]:
        where, on_finish = os.environ.get(WHERE), asked.pop("on_finish", None)
        made = []
        for prompt in prompts:
            self.num += 1
            if self.num > 1 and where == "generate":
                self.step()
            if self.num > 1 and where == "model":
                self.model.prefill(torch.zeros(3, dtype=torch.float64))
            made += super().generate([prompt], on_finish=on_finish, **asked)
        return made

    def step(self) -> None:
        raise ZeroDivisionError("no steps\nleft")


class TakesNothing(Raising):
    """Cannot be called as decoders are."""

    def generate(self, prompts: Any) -> list[Generation]:  # type: ignore[override]
        return []


class Short(Greedy):
    """Answers all prompts, and gives one answer less back."""

    def generate(self, prompts: Any, **asked: Any) -> list[Generation]:
        return super().generate(prompts, **asked)[:-1]


class Swapped(Greedy):
    """Gives its answers back in another order."""

    def generate(self, prompts: Any, **asked: Any) -> list[Generation]:
        return super().generate(prompts, **asked)[::-1]


class Lying(Greedy):
    """Gives other answers back than it told of."""

    def generate(self, prompts: Any, **asked: Any) -> list[Generation]:
        made = super().generate(prompts, **asked)
        return [dataclasses.replace(one, text=f"{one.text}!") for one in made]


class Twice(Greedy):
    """Tells of every answer twice."""

    def generate(self, prompts: Any, *, on_finish: Any = None, **asked: Any) -> list[Generation]:
        def tell(generation: Generation) -> None:
            on_finish(generation)
            on_finish(generation)

        return super().generate(prompts, on_finish=on_finish and tell, **asked)


class Silent(Greedy):
    """Honest; it says nothing of answers as they finish."""

    def generate(self, prompts: Any, *, on_finish: Any = None, **asked: Any) -> list[Generation]:
        return super().generate(prompts, **asked)


class Unnamed(Greedy):
    """Honest; it draws its tokens as it was asked to, and keeps its parameters to itself."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Params:
        temperature: float = 0.0
