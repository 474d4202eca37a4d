"""What a round of sizing is made of: every part of decoding, per size, batch, block and forced routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import as_pair
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.errors import UserError
from twotower_eval.measure.sizing.commits import Profile
from twotower_eval.measure.speed import phases
from twotower_eval.measure.speed.phases import Repeat
from twotower_eval.plan import SizingPlan
from twotower_eval.records import (
    ROUTINGS,
    Arm,
    Cell,
    Checkpoint,
    CostPart,
    DecoderSpec,
    Routing,
    Workload,
    canonical_json,
    cell_id,
    derive_seed,
    sha256_text,
)


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A pair of some layers, its cells, and a context of the plan's length for every batch size."""

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
    """One timed sample of a round. ``make_ready`` is off the clock and gives one repetition."""

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
    """Cells and contexts of each pair. UserError where the weights make nothing finite in the plan's dtype."""
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
    # All that makes up a round: one that goes on with another would not be comparable.
    asked = [plan.prompt_tokens, plan.seed, plan.batch_sizes, plan.repeats, plan.cuda_graphs]
    asked += [plan.tokens_per_nfe, plan.profile]
    workload = Workload(
        kind="costs",
        name="random weights",
        digest=sha256_text(canonical_json(asked)),
        prompt_tokens=plan.prompt_tokens,
        num_devices=len(checkpoint.devices),
    )
    identity = cell_id(checkpoint, decoder, workload)
    return Cell(id=identity, arm=arm, checkpoint=checkpoint, decoder=decoder, workload=workload, extra={})


def make_items(plan: SizingPlan, rigs: Sequence[Rig], profiles: Sequence[Profile]) -> list[list[Item]]:
    """Items in groups of what is compared: one group per pair, batch size and block size, AR twice in each first."""
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
    ar_step = partial(phases.ar_step, pair, context, ids_B1)
    for replica in (0, 1):
        yield Item(part="ar_step", replica=replica, num_repeats=plan.repeats, make_ready=ar_step, **common)
    prefill = partial(phases.prefill, pair, _ids(plan, rig.pair, size, plan.prompt_tokens))
    yield Item(part="prefill", replica=0, num_repeats=1, make_ready=prefill, **common)


def _block_items(plan: SizingPlan, rig: Rig, size: int, block: int, profiles: Sequence[Profile]) -> Iterator[Item]:
    pair, context = as_pair(rig.pair), rig.contexts[size]
    block_BK = _ids(plan, rig.pair, size, block)
    denoise = partial(phases.denoise, pair, context, block_BK, [0.5] * size)
    context_pass = partial(phases.context_pass, pair, context, block_BK)
    for routing in ROUTINGS:
        common: dict[str, Any] = {"cell_id": rig.candidates[block].id, "pattern": rig.pattern, "batch_size": size}
        common |= {"block_size": block, "routing": routing, "replica": 0, "num_repeats": plan.repeats}
        yield Item(part="denoise", num_steps=None, make_ready=denoise, **common)
        yield Item(part="context_pass", num_steps=None, make_ready=context_pass, **common)
        for profile in profiles:
            ready = partial(phases.forced_block, pair, context, block, profile.blocks)
            yield Item(part="forced_block", num_steps=profile.num_steps, make_ready=ready, **common)


def _ids(plan: SizingPlan, pair: TwoTower, batch_size: int, num_tokens: int) -> Tensor:
    """Seeded token ids (B, S): which ones does not matter where experts are forced."""
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, "ids", batch_size, num_tokens))
    return torch.randint(pair.vocab_size, (batch_size, num_tokens), generator=generator)
