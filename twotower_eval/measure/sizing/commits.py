"""Commit profiles: how many tokens each denoiser call of a block commits, given as a rate or recorded from a run.

Random weights have no confidence of their own, so their commits follow a profile. All rows of a batch follow the
same one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from twotower_eval.errors import UserError
from twotower_eval.records import DecoderSpec, Generation, PromptTiming, derive_seed
from twotower_eval.store import Run

Block = tuple[int, ...]  # tokens committed by each denoiser call; together the block size


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Blocks one after the other, as they are timed together."""

    name: str
    block_size: int
    blocks: tuple[Block, ...]

    @property
    def num_steps(self) -> int:
        """Denoiser calls of all blocks together."""
        return sum(map(len, self.blocks))

    @property
    def tokens_per_nfe(self) -> float:
        """Tokens over denoiser calls."""
        return self.block_size * len(self.blocks) / self.num_steps


def even_profile(tokens_per_nfe: float, block_size: int, num_blocks: int) -> Profile:
    """A rate spread as evenly as whole tokens and whole calls allow; UserError for a rate no block can have."""
    if not 1 <= tokens_per_nfe <= block_size:
        raise UserError(
            f"a block of {block_size} commits 1 to {block_size} tokens per denoiser call, not {tokens_per_nfe:g}"
        )
    num_steps = min(max(round(num_blocks * block_size / tokens_per_nfe), num_blocks), num_blocks * block_size)
    blocks = tuple(even_block(block_size, steps) for steps in _spread(num_steps, num_blocks))
    return Profile(name=f"{tokens_per_nfe:g} tokens per NFE", block_size=block_size, blocks=blocks)


def even_block(block_size: int, num_steps: int) -> Block:
    """One block in so many calls, their commits differing by at most one."""
    return tuple(_spread(block_size, num_steps))


def recorded_profiles(run: Run, block_size: int, num_blocks: int, seed: int) -> tuple[Profile, ...]:
    """One profile for each decoder setting that a run has at this block size: blocks drawn from those it decoded.

    Where generations carry traces their steps are taken as they were; elsewhere each prompt's calls per block, spread
    evenly. UserError where the run has no such block.
    """
    pools = {_label(cell.decoder): _blocks(run, cell.id, block_size) for cell in run.manifest.cells
             if cell.decoder.params.get("block_size") == block_size}  # fmt: skip
    profiles = []
    for label, pool in pools.items():
        if pool:
            chosen = random.Random(derive_seed(seed, "profile", label, block_size)).choices(pool, k=num_blocks)
            name = f"{label}, run {run.manifest.run_id}"
            profiles.append(Profile(name=name, block_size=block_size, blocks=tuple(chosen)))
    if not profiles:
        sizes = sorted({str(cell.decoder.params.get("block_size")) for cell in run.manifest.cells} - {"None"})
        raise UserError(
            f"run {run.manifest.run_id} has no denoised block of {block_size} tokens to take a profile from; "
            f"it has blocks of {', '.join(sizes) or 'no size at all'}"
        )
    return tuple(profiles)


def _label(decoder: DecoderSpec) -> str:
    """What a block's commits depend on, in short."""
    named = {"steps_per_block": "steps", "threshold": "threshold", "temperature": "temperature"}
    given = [f"{word} {decoder.params[key]:g}" for key, word in named.items() if decoder.params.get(key)]
    others = {key: value for key, value in decoder.params.items() if key not in (*named, "block_size", "trace")}
    given += [f"{key.replace('_', ' ')} {value}" for key, value in others.items() if value or decoder.is_plug_in]
    kind = decoder.kind if decoder.is_plug_in else decoder.kind.replace("_", " ")
    return ", ".join([kind, *given])


def _blocks(run: Run, cell_id: str, block_size: int) -> list[Block]:
    """Every block that a cell decoded."""
    generations = [row.generation for row in run.generations if row.cell == cell_id]
    samples = (sample for sample in run.speed if sample.cell == cell_id and sample.phase != "probe")
    timed = [prompt for sample in samples for prompt in sample.prompts]
    traced = [block for generation in generations for block in _traced(generation, block_size)]
    return traced or list(_averaged(generations or timed, block_size))


def _traced(generation: Generation, block_size: int) -> Iterator[Block]:
    steps: dict[int, list[int]] = {}
    for step in generation.trace or ():
        steps.setdefault(step.block, []).append(len(step.positions))
    yield from (tuple(commits) for commits in steps.values() if sum(commits) == block_size)


def _averaged(prompts: Iterable[Generation | PromptTiming], block_size: int) -> Iterator[Block]:
    """A prompt of n context forwards denoised n blocks: one after the prefill, one after each extension."""
    for prompt in prompts:
        num_blocks, num_steps = prompt.num_context_forwards, prompt.num_denoiser_forwards
        if 0 < num_blocks <= num_steps <= num_blocks * block_size:
            yield from (even_block(block_size, steps) for steps in _spread(num_steps, num_blocks))


def _spread(total: int, parts: int) -> Iterator[int]:
    """Whole numbers that add up to ``total``, differing by at most one, large and small ones mixed."""
    for index in range(parts):
        yield total * (index + 1) // parts - total * index // parts
