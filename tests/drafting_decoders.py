"""Decoders that draft, one of them what it knows by heart: tokens of earlier answers to the same prompt, verified."""

from collections.abc import Sequence
from typing import ClassVar

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.speculative import Drafter, LookupDrafter, LookupParams, PromptLookup
from twotower_eval.records import Prompt

KNOWING = "tests.drafting_decoders:Knowing"
OWN = "tests.drafting_decoders:Own"


class Own(PromptLookup):
    """A lookup of one's own; honest."""

    KIND = OWN


class Knowing(PromptLookup):
    """Drafts the answers that it was taught, wherever the prompt is one of them."""

    KIND = KNOWING
    taught: ClassVar[dict[tuple[int, ...], tuple[int, ...]]] = {}

    def _drafter(self, call: Call) -> Drafter:
        return KnowingDrafter(call, self.params)


class KnowingDrafter(LookupDrafter):
    """What is not known is looked up."""

    def __init__(self, call: Call, params: LookupParams) -> None:
        super().__init__(call, params)
        self._prompts: Sequence[Prompt] = call.prompts

    def drafts(self, rows: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        found = super().drafts(rows, most)
        for at, (row, num) in enumerate(zip(rows, most, strict=True)):
            answer = Knowing.taught.get(self._prompts[row].token_ids)
            if answer is not None:
                start = len(self._call.rows[row].produced)
                found[at] = list(answer[start : start + num])
        return found
