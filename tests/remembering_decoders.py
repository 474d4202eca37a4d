"""Decoders that read no prompt twice, and one that does: greedy answers, remembered in different places.

They stand behind one kind so that one run times them all beside one baseline: the block size says what remembers. Each
remembers for itself alone. Whatever they remember, they make one forward and say so.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.rows import generation, make_rules
from twotower_eval.measure.speed.probes import NUM_DOCUMENTS, NUM_MADE_UP
from twotower_eval.records import Generation, Prompt, to_json
from twotower_eval.strict import from_json

KIND = "tests.remembering_decoders:Remembering"
TRICKS = {1: "honest", 2: "in its class", 3: "in its module", 4: "in a file", 5: "what it saw twice"}
TRICKS |= {6: "what it saw in the warm-up", 7: "beginnings", 8: "by itself"}
NUM_WARMED = 6  # the number of prompts that are timed
IN_WARMUP = NUM_WARMED + NUM_MADE_UP + NUM_DOCUMENTS  # calls
CHUNK = 4

MEMORY: dict[tuple[int, ...], Generation] = {}
FILE: list[Path] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """Which trick."""

    block_size: int = 1


class Remembering:
    """Answers as the baseline does; what it knows by heart takes one forward."""

    Params = Params
    VERSION = 1
    known: ClassVar[dict[str, dict[tuple[int, ...], Generation]]] = {}
    seen: ClassVar[Counter[tuple[int, ...]]] = Counter()
    contexts: ClassVar[dict[tuple[int, ...], Any]] = {}

    def __init__(self, model: Any, params: Params, **_: Any) -> None:
        self.model, self.trick = model, TRICKS[params.block_size]
        self.own: dict[tuple[int, ...], Generation] = {}

    def generate(self, prompts: Sequence[Prompt], **asked: Any) -> list[Generation]:
        with torch.inference_mode():
            return [self._one(prompt, asked) for prompt in prompts]

    def _one(self, prompt: Prompt, asked: dict[str, Any]) -> Generation:
        if self.trick == "beginnings":
            return self._from_beginning(prompt, asked)
        known = self._recall(prompt.token_ids)
        if known is not None:
            self.model.prefill(torch.tensor([prompt.token_ids]))
            return dataclasses.replace(known, prompt_id=prompt.id, num_context_forwards=1)
        (made,) = make_decoder(self.model, "autoregressive").generate([prompt], **asked)
        self._keep(prompt.token_ids, made)
        return made

    def _recall(self, ids: tuple[int, ...]) -> Generation | None:
        self.seen[ids] += self.trick == "what it saw twice"
        if self.trick == "in a file":
            lines = FILE[0].read_text().splitlines() if FILE[0].exists() else []
            kept = {tuple(key): value for key, value in map(json.loads, lines)}
            return from_json(Generation, kept[ids]) if ids in kept else None
        if self.trick == "what it saw twice" and self.seen[ids] < 3:
            return None
        return self._memory().get(ids)

    def _keep(self, ids: tuple[int, ...], made: Generation) -> None:
        if self.trick == "in a file":
            with FILE[0].open("a") as stream:
                stream.write(json.dumps([list(ids), to_json(made)]) + "\n")
        elif self.trick != "what it saw in the warm-up" or len(self._memory()) < IN_WARMUP:
            self._memory()[ids] = made

    def _memory(self) -> dict[tuple[int, ...], Generation]:
        if self.trick == "in its module":
            return MEMORY
        if self.trick == "by itself":
            return self.own
        return {} if self.trick == "honest" else self.known.setdefault(self.trick, {})

    def _from_beginning(self, prompt: Prompt, asked: dict[str, Any]) -> Generation:
        """Read the prompt in chunks, going on from the longest beginning that was read before; then greedily."""
        ids, begin, num = prompt.token_ids, 0, 0
        context = None
        for end in range(CHUNK, len(ids), CHUNK):  # the last chunk is always read
            if (held := self.contexts.get(ids[:end])) is not None:
                context, begin = held, end
        while begin < len(ids):
            rest = torch.tensor([ids[begin : begin + CHUNK]])
            context = self.model.prefill(rest) if context is None else self.model.extend(context, rest)
            num, begin = num + 1, begin + CHUNK
            self.contexts[ids[:begin]] = context
        made: list[int] = []
        while len(made) < asked["max_new_tokens"] and made[-1:] != [*asked["eos_token_ids"]][:1]:
            context = self.model.extend(context, torch.tensor([made[-1:]])) if made else context
            made.append(int(self.model.next_logits(context).argmax()))
            num += len(made) > 1
        rules = make_rules(self.model, **asked)
        return generation(prompt, made, rules, num_context_forwards=num, num_denoiser_forwards=0)


def forget(file: Path) -> None:
    """Empty every memory; the one on disk is in ``file`` from now on."""
    MEMORY.clear()
    for memory in (Remembering.known, Remembering.seen, Remembering.contexts):
        memory.clear()  # type: ignore[attr-defined]
    FILE[:] = [file]
