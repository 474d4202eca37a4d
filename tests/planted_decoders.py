"""Decoders that are fast because they cheat, and one that is fast and honest. Time passes only through forwards.

They stand behind one kind so that one run times them all beside one baseline: the block size says which trick.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, ClassVar

from twotower_eval.engine.decoders.rows import generation, make_rules, padded_ids
from twotower_eval.engine.models.autoregressive import ContextTower
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.records import Generation, Prompt

KIND = "tests.planted_decoders:Planted"
TRICKS = {1: "honest", 2: "pads", 3: "writes padding as spaces", 4: "emits EOS", 5: "stops early", 6: "loops"}
TRICKS |= {7: "answers, then loops", 8: "stops early after padding"}
FORWARD_S = 1e-4  # less than a real one: calls would seem to overlap, by the day's clock


class Forwards:
    """A clock that moves by one step at each forward of either tower, and a little at each reading."""

    def __init__(self) -> None:
        self.num_forwards, self._hair = 0, random.Random(0)

    def __call__(self) -> float:
        # A hair, so that no two calls take exactly the same time; it follows no pattern that a round could share.
        return FORWARD_S * (self.num_forwards + 1e-3 * self._hair.random())

    def watch(self, patch: Any) -> None:
        """Have every forward counted."""
        for cls, names in ((ContextTower, ("prefill", "extend", "context_logits")), (TwoTower, ("denoise",))):
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


class Planted:
    """One pass, then a made-up answer; the honest one gives the baseline's own answers, remembered, which the pass
    verifies."""

    Params = Params
    VERSION = 1
    known: ClassVar[dict[tuple[int, ...], tuple[int, ...]]] = {}

    def __init__(self, model: Any, params: Params, **_: Any) -> None:
        self.model, self.params = model, params

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        **_: Any,
    ) -> list[Generation]:
        rules = make_rules(self.model, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, stop=stop)
        self.model.context_logits(
            *padded_ids([[*prompt.token_ids, *self.known[prompt.token_ids]] for prompt in prompts])
        )
        made = [self._trick(self.known[p.token_ids], max_new_tokens, [*eos_token_ids][:1]) for p in prompts]
        return [
            generation(prompt, tokens[:max_new_tokens], rules, num_context_forwards=1, num_denoiser_forwards=0)
            for prompt, tokens in zip(prompts, made, strict=True)
        ]

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


def remember(answers: dict[tuple[int, ...], tuple[int, ...]]) -> None:
    """Give the decoders the baseline's answers by prompt ids."""
    Planted.known.update(answers)
