"""The cost card: which layers are measured, their weights, whether they fit, and the fastest possible steps.

It is printed before anything is built, from the config and a short measurement of the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from twotower_eval.engine.models.config import (
    FLOAT32_BYTES,
    NemotronHConfig,
    Step,
    key_value_bytes,
    pair_bytes,
    state_bytes,
    step_bytes,
    step_flops,
    touched_experts,
    tower_bytes,
)
from twotower_eval.engine.models.graphs import num_slot_counts
from twotower_eval.errors import UserError
from twotower_eval.measure.speed.conditions import DevicePeak
from twotower_eval.plan import SizingPlan
from twotower_eval.records import ROUTINGS

GIB, MIB = 2**30, 2**20
SPARE = 0.05  # of the weights: allocator, kernels' workspaces, activations
CONTEXTS_HELD = 3  # the context that steps start from, the one that they extend, and the copy in between


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Lower bound on the seconds of one repetition: what it must read at the measured bandwidth, or compute at the
    measured rate."""

    pattern: str
    part: str
    batch_size: int
    block_size: int | None
    routing: str
    num_experts_touched: float
    bytes_read: float
    flops: float
    floor_s: float


@dataclass(frozen=True, kw_only=True)
class CostCard:
    """What is known before building. ``needed_bytes`` and ``fits`` are per device, in the plan's order."""

    config: str
    pattern: str
    built_pattern: str
    shared_towers: bool
    peaks: tuple[DevicePeak, ...]
    weight_bytes: int
    full_weight_bytes: int
    key_value_bytes_per_token: int
    state_bytes_per_row: int
    needed_bytes: tuple[int, ...]
    floors: tuple[Floor, ...]

    @property
    def fits(self) -> bool:
        """Whether each device has room, as far as is known."""
        pairs = zip(self.needed_bytes, self.peaks, strict=True)
        return all(peak.free_bytes is None or needed <= peak.free_bytes for needed, peak in pairs)


def measured_layers(pattern: str, num_layers: int | None) -> tuple[tuple[int, ...], ...]:
    """Layer indices of every set of layers to measure, the largest first.

    All layers, if all are built. Else the first ``num_layers``; the same without every second layer of one kind, for
    each kind; no layers; and the first half, which no fit uses and which therefore tests it. UserError if the first
    layers lack a kind that the others have, as its cost could not be extrapolated.
    """
    if num_layers is None or num_layers == len(pattern):
        return (tuple(range(len(pattern))),)
    if num_layers > len(pattern):
        raise UserError(f"--layers {num_layers}: the config has {len(pattern)} layers")
    first = pattern[:num_layers]
    lacking = sorted(set(pattern) - set(first))
    if lacking:
        enough = max(pattern.index(kind) for kind in set(pattern)) + 1
        raise UserError(
            f"the first {num_layers} layers ({first}) have no {lacking[0]} layer to extrapolate from: take --layers "
            f"{enough} or more (M is Mamba, E a mixture of experts, * attention)"
        )
    parts = [tuple(range(num_layers))]
    parts += [_thinned(first, kind) for kind in sorted(set(first))]
    half = tuple(range(num_layers // 2))
    return tuple(dict.fromkeys([*parts, half, ()]))


def _thinned(pattern: str, kind: str) -> tuple[int, ...]:
    """The layers without every second one of a kind, the first of them included."""
    of_kind = [index for index, letter in enumerate(pattern) if letter == kind]
    return tuple(index for index in range(len(pattern)) if index not in of_kind[::2])


def make_card(
    plan: SizingPlan, config: NemotronHConfig, patterns: Sequence[str], peaks: Sequence[DevicePeak], dtype: torch.dtype
) -> CostCard:
    """The card for towers of ``patterns[0]``, with floors for all patterns and for the whole config."""
    built = cut(config, patterns[0])
    weigh = {p: pair_bytes(cut(config, p), dtype.itemsize, share_towers=plan.share_towers)
             for p in (patterns[0], config.pattern)}  # fmt: skip
    floors = [_floor(plan, cut(config, p), step, peaks, dtype)
              for p in dict.fromkeys([*patterns, config.pattern]) for step in _steps(plan)]  # fmt: skip
    return CostCard(
        config=plan.config,
        pattern=config.pattern,
        built_pattern=patterns[0],
        shared_towers=plan.share_towers,
        peaks=tuple(peaks),
        weight_bytes=weigh[patterns[0]],
        full_weight_bytes=weigh[config.pattern],
        key_value_bytes_per_token=key_value_bytes(built, dtype.itemsize),
        state_bytes_per_row=state_bytes(built, dtype.itemsize),
        needed_bytes=_needed(plan, built, len(patterns), dtype),
        floors=tuple(floors),
    )


def graphs_needed(plan: SizingPlan) -> int:
    """Sizes and routings of the steps of a round: AR, and both passes of a block at every routing."""
    return len(plan.batch_sizes) * (1 + 2 * len(ROUTINGS) * len(plan.block_sizes)) * _num_slot_counts(plan)


def _num_slot_counts(plan: SizingPlan) -> int:
    return num_slot_counts(plan.prompt_tokens, _longest(plan))


def _longest(plan: SizingPlan) -> int:
    """Tokens of a context after the last repetition, including one untimed repetition before them."""
    return plan.prompt_tokens + (1 + plan.repeats) * max(plan.block_sizes)


def cut(config: NemotronHConfig, pattern: str) -> NemotronHConfig:
    """The config with other layers."""
    return dataclasses.replace(config, hybrid_override_pattern=pattern)


def describe(card: CostCard) -> Iterator[str]:
    """The card as lines of text."""
    layers = f"{len(card.built_pattern)} of {len(card.pattern)} layers a tower"
    towers = "one set of weights for both towers" if card.shared_towers else "two towers"
    yield f"cost card of {card.config}: RANDOM WEIGHTS, {layers}, {towers}"
    whole = f" (all layers: {_size(card.full_weight_bytes)})" if card.built_pattern != card.pattern else ""
    yield (
        f"weights {_size(card.weight_bytes)}{whole}; keys and values {_size(card.key_value_bytes_per_token)} a "
        f"token; Mamba states {_size(card.state_bytes_per_row)} a row"
    )
    for peak, needed in zip(card.peaks, card.needed_bytes, strict=True):
        known = [] if peak.free_bytes is None else [f"{_size(peak.free_bytes)} free"]
        free = ", ".join([*known, *([peak.free_reason] if peak.free_reason else [])])
        yield (
            f"{peak.device}: {peak.bytes_per_s / 1e9:.0f} GB/s copied, {peak.flops_per_s / 1e12:.3g} TFLOP/s in "
            f"{peak.dtype}; needs about {_size(needed)}, {free}"
        )
    for floor in card.floors:
        if floor.pattern == card.pattern and floor.part in ("ar_step", "denoise"):
            block = "" if floor.block_size is None else f", block {floor.block_size}, {floor.routing} experts"
            yield (
                f"floor of {floor.part}, batch {floor.batch_size}{block}: {_milliseconds(floor.floor_s)} "
                f"({floor.bytes_read / 1e9:.3g} GB, {floor.flops / 1e9:.3g} GFLOP, "
                f"{floor.num_experts_touched:.1f} experts a layer)"
            )


def refuse_if_too_large(card: CostCard, plan: SizingPlan, config: NemotronHConfig, dtype: torch.dtype) -> None:
    """UserError, with the shortfall and what would fit, if a device lacks room."""
    if card.fits:
        return
    peak, needed, free = next(
        (peak, needed, peak.free_bytes)
        for peak, needed in zip(card.peaks, card.needed_bytes, strict=True)
        if peak.free_bytes is not None and needed > peak.free_bytes
    )
    nothing = "more memory, or shorter prompts and smaller batches: no number of layers fits"
    ways = list(_ways_to_fit(plan, config, len(card.built_pattern), card.peaks, dtype))
    raise UserError(
        f"{card.config} with {len(card.built_pattern)} layers needs about {_size(needed)} on {peak.device}, which has "
        f"{_size(free)} free: take {' or '.join(ways) or nothing}"
    )


def _ways_to_fit(
    plan: SizingPlan, config: NemotronHConfig, num_layers: int, peaks: Sequence[DevicePeak], dtype: torch.dtype
) -> Iterator[str]:
    """Options that would fit instead; none that would be refused in turn."""
    # A step on shared towers costs what it does on two, so all of the layers shared come before fewer of them.
    alone = len(plan.devices) == 1 and not plan.share_towers
    shared = dataclasses.replace(plan, share_towers=True) if alone else plan
    all_shared = alone and _fits(shared, config, num_layers, peaks, dtype)
    if all_shared:
        yield "--share-towers"
    if alone and peaks[0].device.startswith("cuda"):
        doubled = dataclasses.replace(plan, devices=("cuda:0", "cuda:1"))
        if _fits(doubled, config, num_layers, (peaks[0], peaks[0]), dtype):
            yield "a second device like it"
    most = 0
    for words, asked in (("", plan),) if all_shared else (("", plan), ("--share-towers ", shared)):
        more = next((n for n in range(num_layers - 1, most, -1) if _fits(asked, config, n, peaks, dtype)), None)
        if more is not None:
            yield f"{words}--layers {more}"
            most = more


def _fits(
    plan: SizingPlan, config: NemotronHConfig, num_layers: int, peaks: Sequence[DevicePeak], dtype: torch.dtype
) -> bool:
    """Whether that many layers can be built, and measured to extrapolate."""
    try:
        num_parts = len(measured_layers(config.pattern, num_layers))
    except UserError:  # they lack a kind
        return False
    needed = _needed(plan, cut(config, config.pattern[:num_layers]), num_parts, dtype)
    return all(p.free_bytes is None or n <= p.free_bytes for n, p in zip(needed, peaks, strict=True))


def _steps(plan: SizingPlan) -> Iterator[Step]:
    """Every timed repetition except the forced blocks."""
    for size in plan.batch_sizes:
        length = plan.prompt_tokens
        yield Step(part="prefill", batch_size=size, num_tokens=length, context_tokens=0, routing="independent")
        yield Step(part="ar_step", batch_size=size, num_tokens=1, context_tokens=length, routing="independent")
        for block in plan.block_sizes:
            for routing in ROUTINGS:
                sized = {"batch_size": size, "num_tokens": block, "context_tokens": length}
                yield Step(part="denoise", routing=routing, **sized)
                yield Step(part="context_pass", routing=routing, **sized)


def _floor(
    plan: SizingPlan, config: NemotronHConfig, step: Step, peaks: Sequence[DevicePeak], dtype: torch.dtype
) -> Floor:
    peak = peaks[-1] if step.part == "denoise" else peaks[0]
    num_bytes, flops = step_bytes(step, config, dtype.itemsize), step_flops(step, config)
    return Floor(
        pattern=config.pattern,
        part=step.part,
        batch_size=step.batch_size,
        block_size=step.num_tokens if step.part in ("denoise", "context_pass") else None,
        routing=step.routing,
        num_experts_touched=touched_experts(step, config) if "E" in config.pattern else 0.0,
        bytes_read=num_bytes,
        flops=flops,
        floor_s=max(num_bytes / peak.bytes_per_s, flops / peak.flops_per_s),
    )


def _needed(plan: SizingPlan, config: NemotronHConfig, num_patterns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Bytes needed on each device: weights, contexts of all batch sizes, logits of the largest block."""
    rows = sum(plan.batch_sizes) * num_patterns + CONTEXTS_HELD * max(plan.batch_sizes)
    if plan.cuda_graphs:  # for each size a context at a fixed place, with up to twice the slots
        rows += 2 * sum(plan.batch_sizes) * num_patterns * _num_slot_counts(plan)
    of_row = int(1.25 * _longest(plan)) * key_value_bytes(config, dtype.itemsize)
    contexts = rows * (of_row + state_bytes(config, dtype.itemsize))
    logits = 3 * max(plan.batch_sizes) * max(plan.block_sizes) * config.vocab_size * FLOAT32_BYTES
    whole = pair_bytes(config, dtype.itemsize, share_towers=plan.share_towers)
    tower = tower_bytes(config, dtype.itemsize)
    weights = [whole] if len(plan.devices) == 1 else [tower, whole - tower]
    return tuple(int((1 + SPARE) * held) + contexts + logits for held in weights)


def _size(num_bytes: float) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1024:.1f} KiB"


def _milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three digits, never with an exponent."""
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
