"""The parts of decoding, timed alone in the rounds of a run: what explains its times, or does not.

For each batch size the baseline's prefill and step, the candidate's prefill, and for each of its block sizes the
denoiser pass and the context pass, at context lengths that span the workload: prompts at their shortest, median and
longest, with none, half and all of the budget behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from twotower_eval.records import CostPart
from twotower_eval.speed import phases
from twotower_eval.speed.clock import CallClock
from twotower_eval.speed.lanes import Lane
from twotower_eval.speed.workloads import Call, Calls

# Enough that one repetition's jitter does not matter, few enough to stay a small share of a round.
REPEATS: dict[CostPart, int] = {"prefill": 2, "ar_step": 8, "denoise": 4, "context_pass": 4}


@dataclass(frozen=True, kw_only=True, eq=False)
class CostItem:
    """One part to be timed, as a row of ``costs.jsonl`` names it; ``prepare`` makes it ready off the clock."""

    cell: str
    part: CostPart
    batch_size: int
    context_tokens: int
    block_size: int | None
    prepare: Callable[[], phases.Repeat]

    @property
    def num_repeats(self) -> int:
        """Repetitions of one timing."""
        return REPEATS[self.part]

    def time(self, clock: CallClock) -> float:
        """Seconds of all repetitions together; one before them, not counted, is on whatever the last part left."""
        try:
            with torch.inference_mode():
                repeat = self.prepare()
            return sum(phases.time_repeats(repeat, clock, self.num_repeats + 1)[1:])
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{self.part} at {self.context_tokens} tokens, batch size {self.batch_size}: out of memory: take "
                "smaller --batch-sizes, or --no-costs to leave the parts out"
            ) from error


def make_items(calls: Calls, lanes: Mapping[int, Sequence[Lane]], models: tuple[Any, Any]) -> tuple[CostItem, ...]:
    """Every part of every batch size; ``models`` are those of baseline and candidate.

    A block size is measured once, for the first cell that has it. Decoders without blocks have no parts of theirs.
    """
    items: list[CostItem] = []
    for size, of_size in lanes.items():
        seen: set[Any] = set()
        for lane in of_size:
            baseline = lane.cell.arm == "baseline"
            block_size = None if baseline else lane.cell.decoder.params.get("block_size")
            if lane.replica or (not baseline and not isinstance(block_size, int)) or (baseline, block_size) in seen:
                continue
            model = models[0 if baseline else 1]
            new = _of_cell(lane, calls[size], size, model, block_size if isinstance(block_size, int) else None)
            # The candidate's prefill does not depend on its block size.
            items += [item for item in new if baseline or item.part != "prefill" or (False, None) not in seen]
            seen |= {(baseline, block_size), (baseline, None)}
    return tuple(items)


def _of_cell(lane: Lane, calls: Sequence[Call], size: int, model: Any, block_size: int | None) -> list[CostItem]:
    rows = [ids for call in calls for ids in lane.ids[call.id]]
    prompts, contexts = _lengths(lane, calls, model, block_size)

    def item(part: CostPart, context_tokens: int, prepare: Callable[[Tensor], phases.Repeat]) -> CostItem:
        return CostItem(
            cell=lane.cell.id,
            part=part,
            batch_size=size,
            context_tokens=context_tokens,
            block_size=None if part in ("prefill", "ar_step") else block_size,
            prepare=lambda: prepare(_ids(rows, size, context_tokens)),
        )

    items = [item("prefill", length, lambda ids_BS: phases.prefill(model, ids_BS)) for length in prompts]
    for length in contexts:
        if block_size is None:
            items.append(item("ar_step", length, lambda ids_BS: _ar_step(model, ids_BS)))
        else:
            items.append(item("denoise", length, lambda ids_BS: _denoise(model, ids_BS, block_size)))
            items.append(item("context_pass", length, lambda ids_BS: _context_pass(model, ids_BS, block_size)))
    return items


def _lengths(lane: Lane, calls: Sequence[Call], model: Any, block_size: int | None) -> tuple[list[int], list[int]]:
    """Context lengths of the prefill and of the other parts, from the longest prompt of each call."""
    longest = sorted(max(map(len, lane.ids[call.id])) for call in calls)
    budget = max(call.max_new_tokens for call in calls)
    low, middle, high = longest[0], longest[len(longest) // 2], longest[-1]
    contexts = [low, middle + budget // 2, high + budget]
    if model.max_length is not None:
        # One repetition not counted, one made when it is prepared: each goes on where the last ended.
        room = model.max_length - (max(REPEATS.values()) + 2) * (block_size or 1)
        contexts = [min(length, room) for length in contexts]
    return sorted({low, middle, high}), sorted({length for length in contexts if length > 0})


def _ids(rows: Sequence[Sequence[int]], size: int, length: int) -> Tensor:
    """Token ids (B, S) of the workload's own prompts, each over again until it is long enough: never random ids."""
    return torch.tensor([list(islice(cycle(row), length)) for row in islice(cycle(rows), size)])


def _ar_step(model: Any, ids_BS: Tensor) -> phases.Repeat:
    return phases.ar_step(model, model.prefill(ids_BS), ids_BS[:, :1])


def _denoise(model: Any, ids_BS: Tensor, block_size: int) -> phases.Repeat:
    """Half of the block masked: masks alone would all route to the same experts."""
    block_BK = _block(ids_BS, block_size)
    block_BK[:, ::2] = model.mask_token_id
    t = -(-block_size // 2) / block_size
    return phases.denoise(model, model.prefill(ids_BS), block_BK, [t] * len(ids_BS))


def _context_pass(model: Any, ids_BS: Tensor, block_size: int) -> phases.Repeat:
    return phases.context_pass(model, model.prefill(ids_BS), _block(ids_BS, block_size))


def _block(ids_BS: Tensor, block_size: int) -> Tensor:
    return torch.tensor([list(islice(cycle(row), block_size)) for row in ids_BS.tolist()])
