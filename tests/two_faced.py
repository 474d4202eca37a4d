"""Decoders that tell a timed call from a scored one and are quick and careless when timed; and one that remembers."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.records import Generation, Prompt

KIND = "tests.two_faced:TwoFaced"
TELLS = {1: "nothing", 2: "the prompt's text", 3: "its caller", 4: "its options", 5: "what it knows"}
CAREFUL, QUICK = {"steps_per_block": 16, "threshold": 0.99}, {"steps_per_block": 1, "threshold": 0.0}


def is_called_by(name: str) -> bool:
    """Whether a file of this name is among the callers."""
    frame: Any = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith(name):
        frame = frame.f_back
    return frame is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """``block_size`` says what it tells the calls apart by."""

    block_size: int = 1


class TwoFaced:
    """Block diffusion, careful in a run; by what it tells, one pass a block in timed calls, or nothing done again."""

    Params = Params
    VERSION = 1
    known: ClassVar[dict[tuple[int, ...], Generation]] = {}

    def __init__(self, model: Any, params: Params, **_: Any) -> None:
        self.tell = TELLS[params.block_size]
        self.careful, self.quick = (
            make_decoder(model, "block_diffusion", block_size=16, **setting) for setting in (CAREFUL, QUICK)
        )

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Generation]:
        if self.tell == "what it knows":
            return self.remembered(prompts, options)
        timed = {
            "nothing": False,
            "the prompt's text": prompts[0].text is None,
            "its caller": is_called_by("lanes.py"),
            "its options": options.get("on_finish") is None,
        }[self.tell]
        found: list[Generation] = (self.quick if timed else self.careful).generate(prompts, **options)
        return found

    def remembered(self, prompts: Sequence[Prompt], options: dict[str, Any]) -> list[Generation]:
        """What was answered before costs nothing."""
        new = [prompt for prompt in prompts if prompt.token_ids not in self.known]
        for prompt, made in zip(new, self.careful.generate(new, **options) if new else [], strict=True):
            self.known[prompt.token_ids] = made
        nothing = {"num_context_forwards": 0, "num_denoiser_forwards": 0}
        return [
            dataclasses.replace(self.known[prompt.token_ids], prompt_id=prompt.id, **({} if prompt in new else nothing))
            for prompt in prompts
        ]
