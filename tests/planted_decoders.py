"""Decoders that are fast because they cheat, and one that is fast and honest. Time passes only through forwards.

They stand behind one kind so that one run times them all beside one baseline: the block size says which trick.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from twotower_eval.decoders.batch import BatchDecoder, Call
from twotower_eval.models.autoregressive import ContextTower
from twotower_eval.models.twotower import TwoTower

KIND = "tests.planted_decoders:Planted"
TRICKS = {1: "honest", 2: "pads", 3: "writes padding as spaces", 4: "emits EOS", 5: "stops early", 6: "loops"}
TRICKS |= {7: "answers, then loops", 8: "stops early after padding"}
FORWARD_S = 0.01


class Forwards:
    """A clock that moves by one step at each forward of either tower, and a little at each reading."""

    def __init__(self) -> None:
        self.num_forwards = self.num_readings = 0

    def __call__(self) -> float:
        self.num_readings += 1
        # A hair, so that no two calls take exactly the same time; it follows no pattern that a round could share.
        return FORWARD_S * (self.num_forwards + 1e-3 * (self.num_readings * 0.618 % 1))

    def watch(self, patch: Any) -> None:
        """Have every forward counted."""
        for cls, names in ((ContextTower, ("prefill", "extend")), (TwoTower, ("denoise",))):
            for name in names:
                patch.setattr(cls, name, self._counted(getattr(cls, name)))

    def _counted(self, forward: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            self.num_forwards += 1
            return forward(*args, **options)

        return counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """Which trick."""

    block_size: int = 1


class Planted(BatchDecoder):
    """One prefill, then a made-up answer; the honest one gives the baseline's own answers, remembered."""

    KIND = "planted"
    NEEDS_DENOISER = False
    Params = Params
    VERSION = 1
    known: ClassVar[dict[tuple[int, ...], tuple[int, ...]]] = {}

    def _decode(self, call: Call) -> None:
        context = call.prefill()
        budget = call.rules.max_new_tokens
        eos = list(self.model.eos_token_ids[:1]) if call.rules.eos_token_ids else []
        answers = [self._answer(prompt.token_ids, budget) for prompt in call.prompts]
        call.absorb(context.rows, [self._trick(answer, budget, eos)[:budget] for answer in answers])

    def _trick(self, answer: Sequence[int], budget: int, eos: list[int]) -> list[int]:
        space = self.model.tokenizer.encode(" ")
        made = {
            "honest": [*answer, *eos],
            "pads": [0] * budget,
            "writes padding as spaces": space * budget,
            "emits EOS": eos * budget,
            "stops early": [*answer[:2], *eos],
            "loops": [*answer[:3]] * budget,
            "answers, then loops": [*answer, *space, *[*answer[-2:], *space] * budget],
            "stops early after padding": [*answer[:2], *space * 6, *eos],
        }[TRICKS[self.params.block_size]]
        return made if eos else [*made, *space * budget]

    def _answer(self, ids: tuple[int, ...], budget: int) -> tuple[int, ...]:
        """The baseline's answer, from the cache that :func:`remember` filled."""
        return self.known[ids][:budget]


def remember(answers: dict[tuple[int, ...], tuple[int, ...]]) -> None:
    """Give the decoders the baseline's answers by prompt ids."""
    Planted.known.update(answers)
