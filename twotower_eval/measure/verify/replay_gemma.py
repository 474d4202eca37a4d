"""Replay of DiffusionGemma: its encoder and denoiser, runs with recorded draws, and each step's logits on recorded
canvases. Shape letters: B rows, S prompt, K canvas, V vocabulary.

Draws are recorded as tokens, so that a run follows the recording wherever the original drew. The original decodes all
rows of a batch until the last has ended; here each ends on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.entropy_bound import EntropyBound
from twotower_eval.engine.families.diffusion_gemma import CacheContext, DiffusionGemma
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.replay import Compared, Reference, Table, counts, logits, quirk_of, tokens
from twotower_eval.records import Generation, Prompt

SETTINGS = ("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold")
# Settings that are read here; a table of one that is not would be another run.
KNOWN = {*SETTINGS, "max_new_tokens", "eos_token_id", "pad_token_id", "sampler_config", "entropy_bound"}
KNOWN |= {"decoder_input_ids", "attention_mask"}  # these two as tensors
NO_START = "the canvas that it starts from is not recorded"
ENDED = "the original goes on with rows of a batch that have ended"


def diffusion_gemma(model: Model, reference: Reference) -> Iterator[Compared]:
    """All that the folder holds."""
    own = cast(DiffusionGemma, model)
    names = sorted(name.removesuffix(".logits") for name in reference.tensors if name.endswith(".logits"))
    for name in names:
        yield from _forwards(own, reference, name)
    for run in reference.entries("generate_runs"):
        yield from _Run(own, reference, run).compared()
    if "greedy.sequences" in reference.tensors:
        yield Compared(kind="run", name="greedy", skipped=NO_START)


def _forwards(model: DiffusionGemma, reference: Reference, name: str) -> Iterator[Compared]:
    """The prompt read, a canvas denoised twice, and another canvas behind the first."""
    held = {what for what in reference.tensors if what.startswith(f"{name}.")}
    ids_BS, canvas_BK = (reference.tensor(f"{name}.{what}") for what in ("input_ids", "canvas"))
    context, hidden_BSH = model.encode(model.nothing(len(ids_BS)), ids_BS)
    if f"{name}.encoder_last_hidden_state" in held:
        theirs = reference.tensor(f"{name}.encoder_last_hidden_state")
        yield logits(f"{name}.encoder_last_hidden_state", hidden_BSH, theirs)
    first_BKV = model.denoise(canvas_BK, context)
    yield logits(f"{name}.logits", first_BKV, reference.tensor(f"{name}.logits"))
    if f"{name}.logits_self_conditioned" in held:
        again_BKV = model.denoise_after(canvas_BK, context, list(reference.tensor(f"{name}.logits")))
        theirs = reference.tensor(f"{name}.logits_self_conditioned")
        yield logits(f"{name}.logits_self_conditioned", again_BKV, theirs)
    if f"{name}.logits_next_canvas" in held:
        next_BKV = model.denoise(reference.tensor(f"{name}.canvas2"), model.extend(context, canvas_BK))
        yield logits(f"{name}.logits_next_canvas", next_BKV, reference.tensor(f"{name}.logits_next_canvas"))


@dataclass
class _Place:
    """Where a row is in the recording: its canvas, its steps there, and whether the last draw was a step's tokens."""

    canvas: int = -1
    step: int = 0
    has_drawn: bool = False


class Draws:
    """Recorded tokens of some rows in place of random ones. ``steps`` are those of each canvas."""

    def __init__(self, random_RBK: Tensor, drawn_MBK: Tensor, steps: Sequence[int], vocab_size: int) -> None:
        # What was changed to be no token differs from whatever is made; it must not stop the replay.
        self._random, self._drawn = (drawn.clamp(0, vocab_size - 1) for drawn in (random_RBK, drawn_MBK))
        self._starts = [sum(steps[:canvas]) for canvas in range(len(steps))]
        self._vocab_size, self._places = vocab_size, [_Place() for _ in range(random_RBK.shape[1])]

    def uniform(self, row: int, num: int) -> Tensor:
        """Numbers that make a canvas's first tokens, or those of a step that are not kept."""
        place = self._places[row]
        if not place.has_drawn:
            place.canvas, place.step = place.canvas + 1, 0
        place.has_drawn = False
        # A canvas has one more of them than it has steps.
        tokens_K = self._at(self._random, place, place.canvas + place.step, row)
        return (tokens_K.double() + 0.5) / self._vocab_size

    def drawn(self, rows: Sequence[int], probability_BKV: Tensor) -> Tensor:
        """The tokens of a step."""
        found = []
        for row in rows:
            place = self._places[row]
            found.append(self._at(self._drawn, place, place.step, row))
            place.step, place.has_drawn = place.step + 1, True
        return torch.stack(found)

    def gumbel(self, rows: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """UserError: none is recorded."""
        raise UserError("golden.safetensors holds drawn tokens, no noise")

    def _at(self, recorded_NBK: Tensor, place: _Place, behind: int, row: int) -> Tensor:
        number = self._starts[place.canvas] + behind if place.canvas < len(self._starts) else len(recorded_NBK)
        if number >= len(recorded_NBK):
            raise UserError("golden.safetensors has fewer draws than the decoder makes")
        return recorded_NBK[number, row]


def num_steps(draws: Sequence[str]) -> list[int]:
    """Steps of each canvas: a canvas begins with a random one, and each step draws tokens and another.

    >>> num_steps(["randint", "multinomial", "randint", "randint", "multinomial", "randint"])
    [1, 1]
    """
    found: list[int] = []
    before = "randint"
    for draw in draws:
        if draw == "multinomial":
            found[-1] += 1
        elif before == "randint":
            found.append(0)
        before = draw
    return found


class _Run:
    """One of the original's runs, and ours with its draws."""

    def __init__(self, model: DiffusionGemma, reference: Reference, run: Table) -> None:
        self.model, self.reference, self.run, self.name = model, reference, run, str(run["name"])
        self.quirk = quirk_of(run)
        chosen = model.folder_settings.get("generation_config.json")
        self.options: dict[str, Any] = {**(chosen if isinstance(chosen, Mapping) else {}), **run["options"]}
        unknown = run["options"].keys() - KNOWN
        if unknown:
            raise UserError(f"golden.json: {self.name} has the setting {sorted(unknown)[0]!r}, which is not known")
        self.steps = num_steps(run["draws"])
        prompt_BS = self.tensor("prompt")
        own_BS = self.tensor("attention_mask").bool() if "attention_mask" in run["options"] else prompt_BS >= 0
        # Positions of padded rows are not shifted in the original, which moves all of a row alike.
        self.prompts = [row[own].tolist() for row, own in zip(prompt_BS, own_BS, strict=True)]

    def tensor(self, what: str) -> Tensor:
        """One of the run's own."""
        return self.reference.tensor(f"gen.{self.name}.{what}")

    @cached_property
    def decoder(self) -> EntropyBound:
        """The decoder with the run's settings."""
        params = {name: self.options[name] for name in SETTINGS if self.options.get(name) is not None}
        sampler = self.options.get("sampler_config")
        bound = self.options.get(
            "entropy_bound", sampler.get("entropy_bound") if isinstance(sampler, Mapping) else None
        )
        bound = float("inf") if self.keeps_all else bound
        params |= {} if bound is None else {"entropy_bound": bound}
        return cast(EntropyBound, make_decoder(as_masked(self.model), "entropy_bound", **params))

    @property
    def keeps_all(self) -> bool:
        """Whether every step keeps all of its tokens. Some runs have a bound of their own for this, which the
        description leaves out; whatever the bound was, one without end gives the same."""
        canvas_MBK = self.tensor("canvas_per_step")
        drawn_MBK = self.tensor("multinomial").view_as(canvas_MBK)
        first, found = 0, True
        for num in self.steps:
            now, then, drawn = (of[first:][: num - 1] for of in (canvas_MBK, canvas_MBK[1:], drawn_MBK))
            kept_MB, frozen_MB = (then == drawn).all(-1), (then == now).all(-1)
            found, first = found and bool((kept_MB | frozen_MB).all()), first + num
        return found

    @property
    def eos_token_ids(self) -> list[int]:
        """One, several or none."""
        named = self.options.get("eos_token_id")
        return [] if named is None else list(named) if isinstance(named, list) else [named]

    def made(self, rows: Sequence[int]) -> tuple[list[Generation], list[tuple[Tensor, Tensor]]]:
        """These rows decoded in one call, and the canvases and logits of all calls of the denoiser."""
        size = self.model.block_size
        random_RBK = self.tensor("random_canvases").clone()
        if "decoder_input_ids" in self.run["options"]:  # the first canvas; the original draws another one all the same
            random_RBK[0] = self.tensor("decoder_input_ids")
        drawn_MBK = self.tensor("multinomial").view(-1, *random_RBK.shape[1:])
        chosen = list(rows)
        draws = Draws(random_RBK[:, chosen], drawn_MBK[:, chosen], self.steps, self.model.vocab_size)
        self.decoder.make_noise = lambda prompts: draws
        asked = [Prompt(id=str(row), token_ids=self.prompts[row], trace=True) for row in rows]
        length = -(-self.options.get("max_new_tokens", 256) // size) * size
        with _seen(self.model) as seen:
            made = self.decoder.generate(asked, max_new_tokens=length, eos_token_ids=self.eos_token_ids)
        return made, seen

    def compared(self) -> Iterator[Compared]:
        """Tokens, counts, canvases of each step, and logits where they are recorded."""
        made, _ = self.made(range(len(self.prompts)))
        theirs_BS = self.tensor("sequences")[:, self.run["prompt_len"] :]
        for row, one in enumerate(made):
            ours = self.padded(one, theirs_BS.shape[1])
            yield tokens(f"{self.name}/{row}", ours, theirs_BS[row].tolist(), quirk=self.quirk)
        yield from self.counted(made)
        for row, one in enumerate(made):
            yield from self.in_order(row, one)
        if f"gen.{self.name}.processed_logits_per_step" in self.reference.tensors:
            yield from self.logits_of_steps(made)

    def padded(self, made: Generation, width: int) -> list[int]:
        """An answer as the original gives it: its end, then padding."""
        size = self.model.block_size
        committed = {
            step.block * size + position: token
            for step in made.trace or ()
            for position, token in zip(step.positions, step.token_ids, strict=True)
        }
        whole = [committed[place] for place in sorted(committed)]
        ends = [place for place, token in enumerate(whole) if token in self.eos_token_ids]
        pad = self.options.get("pad_token_id")
        if ends and pad is not None:
            whole[ends[0] + 1 :] = [pad] * (len(whole) - ends[0] - 1)
        whole += [0 if pad is None else pad] * (width - len(whole))
        return [*made.token_ids, *whole[len(made.token_ids) :]]

    def counted(self, made: Sequence[Generation]) -> Iterator[Compared]:
        """Calls by kind, and what the original reports."""
        size, run = self.model.block_size, self.run
        canvases = [1 + max(step.block for step in one.trace or ()) for one in made]
        quirk = self.quirk or (ENDED if len(set(canvases)) > 1 else "")
        by_row = [
            [sum(step.block == block for step in one.trace or ()) for block in range(max(canvases))] for one in made
        ]
        steps = [max(row[block] for row in by_row) for block in range(max(canvases))]
        num_encoded = max(one.num_context_forwards for one in made)
        draws = [draw for num in steps for draw in ("randint", *("multinomial", "randint") * num)]
        found = {
            "encoder_calls": num_encoded,
            "encoder_call_lengths": [run["prompt_len"], *[size] * (num_encoded - 1)],
            "decoder_calls": sum(steps),
            "draws": draws,
            "cache_len_returned": run["prompt_len"] + (num_encoded - 1) * size,
            "output_len": run["prompt_len"] + max(canvases) * size,
        }
        for what, ours in found.items():
            if what in run:
                yield counts(f"{self.name}: {what}", ours, run[what], quirk=quirk)
        rates = torch.tensor([self.num_reported(one) / one.num_denoiser_forwards for one in made])
        for what, theirs in (
            ("json", run["tokens_per_forward"]),
            ("tensor", self.tensor("tokens_per_forward").tolist()),
        ):
            close = len(theirs) == len(rates) and torch.allclose(rates, torch.tensor(theirs))
            yield counts(f"{self.name}: tokens_per_forward ({what})", close, True, quirk=self.quirk)

    def num_reported(self, made: Generation) -> int:
        """Tokens that the original counts: an end, but no padding, even where the model made it."""
        pad = self.options.get("pad_token_id")
        return sum(token != pad for token in made.token_ids) + (made.finish == "eos")

    def in_order(self, row: int, batched: Generation) -> Iterator[Compared]:
        """A row's canvases, its likeliest tokens in each step, and the steps that committed them. The row is decoded
        alone, and must give what it gives beside others."""
        [made], seen = self.made([row])
        yield counts(f"{self.name}/{row}: alone", made.token_ids, batched.token_ids, quirk=self.quirk)
        canvas_MK, best_MK = (self.tensor(f"{what}_per_step")[:, row] for what in ("canvas", "argmax_canvas"))
        first, done = 0, 0
        for block in range(1 + max(step.block for step in made.trace or ())):
            own = [step for step in made.trace or () if step.block == block]
            calls, end = seen[done : done + len(own)], first + self.steps[block]
            inputs = [canvas_1K[0].tolist() for canvas_1K, _ in calls]
            name = f"{self.name}/{row}: canvas {block}"
            theirs = canvas_MK[first:end][: len(own)].tolist()
            yield counts(f"{name}, noise of each step", inputs, theirs, quirk=self.quirk)
            best = [logits_1KV[0].argmax(-1).tolist() for _, logits_1KV in calls]
            best += best[-1:] * (self.steps[block] - len(best))  # it stands still while other rows go on
            yield counts(f"{name}, likeliest of each step", best, best_MK[first:end].tolist(), quirk=self.quirk)
            order = {place: step.step for step in own for place in step.positions}
            found = [order[place] for place in range(len(order))]
            yield counts(f"{name}, order of commits", found, settled_steps(best_MK[first:end]), quirk=self.quirk)
            first, done = end, done + len(own)

    def logits_of_steps(self, made: Sequence[Generation]) -> Iterator[Compared]:
        """Each step's logits at its temperature, from the recorded canvas and recorded logits of the step before."""
        theirs_MBKV, most = self.tensor("processed_logits_per_step"), self.model.vocab_size - 1
        canvas_MBK = self.tensor("canvas_per_step").clamp(0, most)
        committed_BS = self.tensor("sequences")[:, self.run["prompt_len"] :].clamp(0, most)
        for row, one in enumerate(made):
            context: CacheContext = self.model.prefill(torch.tensor([self.prompts[row]]))
            first = 0
            for block, num in enumerate(self.steps[: 1 + max(step.block for step in one.trace or ())]):
                previous: Tensor | None = None
                for step in range(sum(each.block == block for each in one.trace or ())):
                    canvas_1K = canvas_MBK[first + step, row][None]
                    ours_KV = self.model.denoise_after(canvas_1K, context, [previous])[0]
                    ours_KV = ours_KV / self.decoder.temperature(step)
                    previous = theirs_MBKV[first + step, row]
                    yield logits(f"{self.name}/{row}: canvas {block}, step {step}", ours_KV, previous)
                first += num
                start = block * self.model.block_size
                context = self.model.extend(context, committed_BS[row : row + 1, start : start + self.model.block_size])


def settled_steps(best_MK: Tensor) -> list[int]:
    """The steps, from 0, from which on each place's token stays.

    >>> settled_steps(torch.tensor([[1, 2], [3, 2], [3, 4]]))
    [1, 2]
    """
    last_K = best_MK[-1]
    return [
        max((step + 1 for step, token in enumerate(best_M) if token != last), default=0)
        for best_M, last in zip(best_MK.T.tolist(), last_K.tolist(), strict=True)
    ]


@contextmanager
def _seen(model: DiffusionGemma) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The canvases that the model denoises meanwhile, and the logits that it gives."""
    found: list[tuple[Tensor, Tensor]] = []
    denoise = model.denoise_after

    def watching(canvas_BK: Tensor, context: CacheContext, previous: Sequence[Tensor | None]) -> Tensor:
        logits_BKV = denoise(canvas_BK, context, previous)
        found.append((canvas_BK, logits_BKV))
        return logits_BKV

    cast(Any, model).denoise_after = watching
    try:
        yield found
    finally:
        del cast(Any, model).denoise_after
