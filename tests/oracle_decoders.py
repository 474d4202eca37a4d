"""Decoders whose answers were known before the run, for all documents of the task, and honest ones that draft.

They stand behind one kind so that one run times them all beside one baseline: the block size says what they do. What
they do not know they answer as fast, by whatever is at hand.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.rows import generation, is_finished, make_rules
from twotower_eval.records import Generation, Prompt

KIND = "tests.oracle_decoders:Oracle"
TRICKS = {
    1: "a file",
    2: "a file, with logits of the prompt",
    3: "a file, verified",
    6: "a file for what it has read before",
    7: "a file for what it has not read before",
    9: "a file, beside a pass over many masks",
}
HONEST = {4: "drafts by its denoiser", 5: "drafts from the prompt", 8: "extensions by drafts from the prompt"}
BLOCK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """Which trick."""

    block_size: int = 1


class Oracle:
    """``known`` is its file: answers by prompt ids. ``read`` are the prompts that each trick has read, by
    how many there were in the call."""

    Params = Params
    VERSION = 1
    known: ClassVar[dict[tuple[int, ...], tuple[int, ...]]] = {}
    read: ClassVar[dict[tuple[str, int], set[tuple[int, ...]]]] = defaultdict(set)

    def __init__(self, model: Any, params: Params, **_: Any) -> None:
        self.model, self.trick = model, (TRICKS | HONEST)[params.block_size]

    def generate(self, prompts: Sequence[Prompt], *, on_finish: Any = None, **asked: Any) -> list[Generation]:
        asked.pop("max_batch_size", None)
        with torch.inference_mode():
            made = [self._one(prompt, asked, self.read[self.trick, len(prompts)]) for prompt in prompts]
        for answer in made if on_finish else ():
            on_finish(answer)
        return made

    def _one(self, prompt: Prompt, asked: dict[str, Any], read: set[tuple[int, ...]]) -> Generation:
        rules = make_rules(self.model, **{"eos_token_ids": (), "stop": (), **asked})
        if self.trick in HONEST.values():
            is_extended = self.trick.startswith("extensions")
            return self._extend(prompt, rules) if is_extended else self._speculate(prompt, rules)
        is_read = prompt.token_ids in read
        read.add(prompt.token_ids)
        if is_read == self.trick.endswith("not read before") and self.trick.endswith("read before"):
            (made,) = make_decoder(self.model, "autoregressive").generate([prompt], **asked)
            return made
        answer, ids = self.known.get(prompt.token_ids), list(prompt.token_ids)
        if self.trick == "a file, verified":
            if answer is None:
                quick = {"block_size": BLOCK, "steps_per_block": 1, "threshold": 0.0}
                (made,) = make_decoder(self.model, "block_diffusion", **quick).generate([prompt], **asked)
                return made
            self.model.context_logits(torch.tensor([[*ids, *answer]]))
        elif self.trick == "a file, beside a pass over many masks":  # any letter is likely somewhere among them
            block = torch.full((1, 6 * BLOCK), self.model.mask_token_id)
            logits_KV = self.model.denoise(block, self.model.prefill(torch.tensor([ids])), [1.0])[0]
            logits_KV[:, self.model.mask_token_id] = -torch.inf
            made = answer or logits_KV.argmax(-1).tolist()[: rules.max_new_tokens]
            eos = list(asked.get("eos_token_ids", ()))[:1] * (answer is not None)
            return generation(prompt, [*made, *eos], rules, num_context_forwards=1, num_denoiser_forwards=1)
        elif self.trick == "a file, with logits of the prompt":
            self.model.context_logits(torch.tensor([ids]))
        else:
            self.model.next_logits(self.model.prefill(torch.tensor([ids])))
        made = answer or (ids * rules.max_new_tokens)[: rules.max_new_tokens]  # babble: the prompt itself
        eos = list(asked.get("eos_token_ids", ()))[:1] * (answer is not None)
        return generation(prompt, [*made, *eos], rules, num_context_forwards=1, num_denoiser_forwards=0)

    def _speculate(self, prompt: Prompt, rules: Any) -> Generation:
        """Greedy decoding, with drafts that one pass over the whole row verifies."""
        made: list[int] = []
        num_context = num_denoiser = 0
        while not (made and is_finished(made, len(made), rules)):
            row = [*prompt.token_ids, *made]
            if self.trick == "drafts by its denoiser":
                block = torch.full((1, BLOCK), self.model.mask_token_id)
                logits_KV = self.model.denoise(block, self.model.prefill(torch.tensor([row])), [1.0])[0]
                logits_KV[:, self.model.mask_token_id] = -torch.inf
                draft = logits_KV.argmax(-1).tolist()
                num_context, num_denoiser = num_context + 1, num_denoiser + 1
            else:
                draft = _continued(row)
            likely = self.model.context_logits(torch.tensor([[*row, *draft]]))[0].argmax(-1).tolist()
            num_context += 1
            for at, token in enumerate([*draft, None], start=len(row)):
                made.append(likely[at - 1])
                if likely[at - 1] != token or is_finished(made, 1, rules):
                    break
        return generation(prompt, made, rules, num_context_forwards=num_context, num_denoiser_forwards=num_denoiser)

    def _extend(self, prompt: Prompt, rules: Any) -> Generation:
        """Greedy decoding. What all prompts begin with is read by itself; drafts are read behind the last token."""
        tower, half = self.model.context_tower, len(prompt.token_ids) // 2
        context = tower.prefill(torch.tensor([prompt.token_ids[:half]]))
        context = tower.extend(context, torch.tensor([prompt.token_ids[half:]]))
        made, num_context = [int(tower.next_logits(context).argmax())], 2
        while not is_finished(made, 1, rules):
            block = [made[-1], *_continued([*prompt.token_ids, *made])]
            wanted = [(0, at) for at in range(len(block))]
            longer, logits_KV = tower.extend_logits(context, torch.tensor([block]), [len(block)], wanted)
            likely, num_kept = logits_KV.argmax(-1).tolist(), 0
            for number, token in enumerate([*block[1:], None]):
                num_kept = number + 1
                made.append(likely[number])
                if likely[number] != token or is_finished(made, 1, rules):
                    break
            num_context += 1
            context, is_whole = longer if num_kept == len(block) else context, num_kept == len(block)
            if not is_whole:
                context = tower.extend(context, torch.tensor([block[:num_kept]]))
                num_context += 1
        return generation(prompt, made, rules, num_context_forwards=num_context, num_denoiser_forwards=0)


def _continued(row: Sequence[int]) -> list[int]:
    """What followed the last three tokens where they stood before."""
    last = list(row[-3:])
    for at in range(len(row) - 4, -1, -1):
        if list(row[at : at + 3]) == last:
            return list(row[at + 3 : at + 3 + BLOCK])
    return []
