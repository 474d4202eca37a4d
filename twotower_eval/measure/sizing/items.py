"""The items of a sizing round: every part of decoding per size, batch, block and forced routing, and the commits per
denoiser call."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import as_pair
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.errors import UserError
from twotower_eval.measure.speed import costs
from twotower_eval.measure.speed.costs import Repeat
from twotower_eval.plan import SizingPlan
from twotower_eval.records import (
    ROUTINGS,
    Arm,
    Cell,
    Checkpoint,
    CostPart,
    DecoderSpec,
    Generation,
    PromptTiming,
    Routing,
    Workload,
    canonical_json,
    derive_seed,
    make_cell,
    sha256_text,
)
from twotower_eval.store import Run

Block = tuple[int, ...]  # tokens committed by each denoiser call; together the block size


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A commit profile: consecutive blocks that are timed together."""

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
    """A profile with a given rate, spread as evenly as whole tokens and calls allow; UserError for a rate no block can
    have."""
    if not 1 <= tokens_per_nfe <= block_size:
        raise UserError(
            f"a block of {block_size} commits 1 to {block_size} tokens per denoiser call, not {tokens_per_nfe:g}"
        )
    num_steps = min(max(round(num_blocks * block_size / tokens_per_nfe), num_blocks), num_blocks * block_size)
    blocks = tuple(even_block(block_size, steps) for steps in _spread(num_steps, num_blocks))
    return Profile(name=f"{tokens_per_nfe:g} tokens per NFE", block_size=block_size, blocks=blocks)


def even_block(block_size: int, num_steps: int) -> Block:
    """One block in ``num_steps`` calls whose commits differ by at most one."""
    return tuple(_spread(block_size, num_steps))


def recorded_profiles(run: Run, block_size: int, num_blocks: int, seed: int) -> tuple[Profile, ...]:
    """One profile for each decoder setting of a run at this block size, drawn from the blocks that it decoded.

    Generations with traces give their steps as recorded; others give each prompt's mean calls per block, spread evenly.
    UserError if the run has no such block.
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
    """A short label of what a block's commits depend on."""
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
    """Blocks of a prompt: n context forwards denoised n blocks, one after the prefill and one after each extension."""
    for prompt in prompts:
        num_blocks, num_steps = prompt.num_context_forwards, prompt.num_denoiser_forwards
        if 0 < num_blocks <= num_steps <= num_blocks * block_size:
            yield from (even_block(block_size, steps) for steps in _spread(num_steps, num_blocks))


def _spread(total: int, parts: int) -> Iterator[int]:
    """Whole numbers that sum to ``total`` and differ by at most one, large and small ones mixed."""
    for index in range(parts):
        yield total * (index + 1) // parts - total * index // parts


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A pair with some of the layers, its cells, and a context of the plan's length per batch size."""

    pair: TwoTower
    baseline: Cell
    candidates: Mapping[int, Cell]  # by block size
    contexts: Mapping[int, Any]  # by batch size

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All of them, the baseline first."""
        return (self.baseline, *self.candidates.values())

    @property
    def pattern(self) -> str:
        """Its layers."""
        return self.pair.config.pattern


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One timed sample of a round. ``make_ready`` runs off the clock and returns one repetition."""

    cell_id: str
    pattern: str
    part: CostPart
    replica: int
    batch_size: int
    block_size: int | None
    routing: Routing
    num_steps: int | None
    num_repeats: int
    make_ready: Callable[[], Repeat]


def make_rigs(plan: SizingPlan, pairs: Sequence[TwoTower]) -> list[Rig]:
    """Cells and contexts of each pair. UserError if the weights give no finite logits in the plan's dtype."""
    return [_rig(plan, pair) for pair in pairs]


def _rig(plan: SizingPlan, pair: TwoTower) -> Rig:
    contexts = {}
    with torch.inference_mode():
        for size in plan.batch_sizes:
            contexts[size] = pair.prefill(_ids(plan, pair, size, plan.prompt_tokens))
            if not torch.isfinite(pair.next_logits(contexts[size])).all():
                raise UserError(f"random weights give logits that are not finite in {plan.dtype}: take another dtype")
    whole = pair.checkpoint
    alone = dataclasses.replace(whole, tower="context", devices=whole.devices[:1])
    baseline = _cell(plan, "baseline", alone, DecoderSpec(kind="autoregressive"))
    candidates = {
        size: _cell(plan, "candidate", whole, DecoderSpec(kind="forced_commits", params={"block_size": size}))
        for size in plan.block_sizes
    }
    return Rig(pair=pair, baseline=baseline, candidates=candidates, contexts=contexts)


def _cell(plan: SizingPlan, arm: Arm, checkpoint: Checkpoint, decoder: DecoderSpec) -> Cell:
    # Everything that defines a round: rounds that differ in it are not comparable.
    asked = [plan.prompt_tokens, plan.seed, plan.batch_sizes, plan.repeats, plan.cuda_graphs]
    asked += [plan.tokens_per_nfe, plan.profile]
    workload = Workload(
        kind="costs",
        name="random weights",
        digest=sha256_text(canonical_json(asked)),
        prompt_tokens=plan.prompt_tokens,
        num_devices=len(checkpoint.devices),
    )
    return make_cell(arm, checkpoint, decoder, workload)


def make_items(plan: SizingPlan, rigs: Sequence[Rig], profiles: Sequence[Profile]) -> list[list[Item]]:
    """Items in groups to compare: one per pair, batch size and block size; AR comes twice in the first of each."""
    groups = []
    for rig in rigs:
        # Whole blocks check what the parts predict: on the largest pair only.
        followed = profiles if rig is rigs[0] else ()
        for size in plan.batch_sizes:
            groups.append(list(_baseline_items(plan, rig, size)))
            for block in plan.block_sizes:
                matching = [profile for profile in followed if profile.block_size == block]
                groups[-1] += _block_items(plan, rig, size, block, matching)
    return groups


def _baseline_items(plan: SizingPlan, rig: Rig, size: int) -> Iterator[Item]:
    pair, context = as_pair(rig.pair), rig.contexts[size]
    common: dict[str, Any] = {"cell_id": rig.baseline.id, "pattern": rig.pattern, "batch_size": size}
    common |= {"block_size": None, "routing": "independent", "num_steps": None}
    ids_B1 = _ids(plan, rig.pair, size, 1)
    ar_step = partial(costs.ar_step, pair, context, ids_B1)
    for replica in (0, 1):
        yield Item(part="ar_step", replica=replica, num_repeats=plan.repeats, make_ready=ar_step, **common)
    prefill = partial(costs.prefill, pair, _ids(plan, rig.pair, size, plan.prompt_tokens))
    yield Item(part="prefill", replica=0, num_repeats=1, make_ready=prefill, **common)


def _block_items(plan: SizingPlan, rig: Rig, size: int, block: int, profiles: Sequence[Profile]) -> Iterator[Item]:
    pair, context = as_pair(rig.pair), rig.contexts[size]
    block_BK = _ids(plan, rig.pair, size, block)
    denoise = partial(costs.denoise, pair, context, block_BK, [0.5] * size)
    context_pass = partial(costs.context_pass, pair, context, block_BK)
    for routing in ROUTINGS:
        common: dict[str, Any] = {"cell_id": rig.candidates[block].id, "pattern": rig.pattern, "batch_size": size}
        common |= {"block_size": block, "routing": routing, "replica": 0, "num_repeats": plan.repeats}
        yield Item(part="denoise", num_steps=None, make_ready=denoise, **common)
        yield Item(part="context_pass", num_steps=None, make_ready=context_pass, **common)
        for profile in profiles:
            ready = partial(costs.forced_block, pair, context, block, profile.blocks)
            yield Item(part="forced_block", num_steps=profile.num_steps, make_ready=ready, **common)


def _ids(plan: SizingPlan, pair: TwoTower, batch_size: int, num_tokens: int) -> Tensor:
    """Seeded token ids (B, S); their values do not matter when experts are forced."""
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, "ids", batch_size, num_tokens))
    return torch.randint(pair.vocab_size, (batch_size, num_tokens), generator=generator)
