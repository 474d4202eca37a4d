"""The parts of decoding, timed alone in the rounds of a run: what explains its times, or does not.

Which parts those are is what the calls of a run were seen to do: prefills, steps of one token, denoiser passes and
context passes of so many tokens, over as many rows as were seen at least, at most and in between, at context lengths
that span the workload: prompts at their shortest, median and longest, with none, half and all of the budget behind
them. Nothing is read off a decoder's parameters.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import no_denoiser
from twotower_eval.engine.decoders.finish import Rules
from twotower_eval.engine.models.protocol import Denoising, Model, two_tower
from twotower_eval.errors import UserError
from twotower_eval.measure.speed import phases
from twotower_eval.measure.speed.clock import CallClock
from twotower_eval.measure.speed.lanes import Lane
from twotower_eval.measure.speed.workloads import Call, Calls
from twotower_eval.records import Arm, CostPart, Passes, Prompt

# Enough that one repetition's jitter does not matter, few enough to stay a small share of a round.
REPEATS: dict[CostPart, int] = {"prefill": 2, "ar_step": 8, "bookkeeping": 8, "denoise": 4, "context_pass": 4}
NEVER = "\uffff"  # a character that is none

Key = tuple[Arm, CostPart, int, int | None, int, int]  # batch size of the cell, block size, rows, context tokens


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
            raise UserError(
                f"{self.part} at {self.context_tokens} tokens, batch size {self.batch_size}: out of memory: take "
                "smaller --batch-sizes, or --no-costs to leave the parts out"
            ) from error


class Parts:
    """Parts of a run, each from the first call on that was seen to need it. ``models``: baseline and candidate.

    A part is timed once for all cells of an arm and a batch size, under the name of the first that needed it.
    """

    def __init__(self, calls: Calls, lanes: Mapping[int, Sequence[Lane]], models: tuple[Model, Model]) -> None:
        self._calls, self._models = calls, models
        self._lanes = {lane.cell.id: lane for of_size in lanes.values() for lane in of_size if lane.replica == 0}
        self._seen: dict[str, set[Passes]] = defaultdict(set)  # by cell
        self._items: dict[Key, CostItem] = {}

    @property
    def items(self) -> tuple[CostItem, ...]:
        """All that are known so far."""
        return tuple(self._items.values())

    def saw(self, lane: Lane, passes: Iterable[Passes]) -> None:
        """A call of the lane made these passes."""
        if lane.replica == 0:
            self._seen[lane.cell.id] |= {replace(one, num=1) for one in passes}

    def new(self) -> tuple[CostItem, ...]:
        """Those that have been seen to be needed since this was asked last."""
        before = len(self._items)
        for cell, seen in self._seen.items():
            for item in self._needed(self._lanes[cell], seen):
                size = self._lanes[cell].cell.workload.batch_size or 1
                sizes = (item.block_size, item.batch_size, item.context_tokens)
                self._items.setdefault((self._lanes[cell].cell.arm, item.part, size, *sizes), item)
        return self.items[before:]

    def _needed(self, lane: Lane, seen: set[Passes]) -> list[CostItem]:
        model = self._models[0 if lane.cell.arm == "baseline" else 1]
        calls = self._calls[lane.cell.workload.batch_size or 1]
        found = []
        for part, block_size in _parts(lane, seen):
            alike = [one for one in seen if one.part(lane.cell.decoder) == (part, block_size)]
            if part == "prefill":
                lengths = _spread({one.tokens for one in alike})
            else:
                lengths = _contexts(lane, calls, model, block_size or 1)
            widths = _spread({one.rows for one in alike}, middle=True)
            found += [_item(lane, calls, model, part, block_size, rows, n) for rows in widths for n in lengths]
            if part == "ar_step":
                found += [_item(lane, calls, model, "bookkeeping", None, rows, 0) for rows in widths]
        return found


def _parts(lane: Lane, seen: Iterable[Passes]) -> list[tuple[CostPart, int | None]]:
    """Parts that passes are of; of block sizes too many to be timed, the smallest, the largest and one in between."""
    sizes: dict[CostPart, set[int | None]] = defaultdict(set)
    for one in seen:
        part, block_size = one.part(lane.cell.decoder)
        sizes[part].add(block_size)
    found: list[tuple[CostPart, int | None]] = []
    for part, of_part in sizes.items():
        blocks = _spread({size for size in of_part if size is not None})
        found += [(part, size) for size in blocks or (None,)]
    return found


def _spread(values: set[int], *, middle: bool = False) -> list[int]:
    """The smallest, the median and the largest of what was seen; ``middle``: half way between the ends instead."""
    known = sorted(values)
    if len(known) <= 1:
        return known
    between = (known[0] + known[-1]) // 2 if middle else known[len(known) // 2]
    return sorted({known[0], between, known[-1]})


def _contexts(lane: Lane, calls: Sequence[Call], model: Model, num_tokens: int) -> list[int]:
    """Context lengths of passes of so many tokens, from the longest prompt of each call."""
    longest = sorted(max(map(len, lane.ids[call.id])) for call in calls)
    budget = max(call.max_new_tokens for call in calls)
    contexts = [longest[0], longest[len(longest) // 2] + budget // 2, longest[-1] + budget]
    if model.max_length is not None:
        # One repetition not counted, one made when it is prepared: each goes on where the last ended.
        room = model.max_length - (max(REPEATS.values()) + 2) * num_tokens
        contexts = [min(length, room) for length in contexts]
    return sorted({length for length in contexts if length > 0})


def _item(
    lane: Lane,
    calls: Sequence[Call],
    model: Model,
    part: CostPart,
    block_size: int | None,
    num_rows: int,
    context_tokens: int,
) -> CostItem:
    rows = [ids for call in calls for ids in lane.ids[call.id]]

    def prepare() -> phases.Repeat:
        if part == "bookkeeping":  # reads no context
            return _bookkeeping(lane, calls[0], list(islice(cycle(rows), num_rows)))
        ids_BS = _ids(rows, num_rows, context_tokens)
        if part == "prefill":
            return phases.prefill(model, ids_BS)
        if block_size is None:
            return _ar_step(model, ids_BS)
        if part == "denoise":
            return _denoise(two_tower(model, no_denoiser(lane.cell.decoder.kind)), ids_BS, block_size)
        return _context_pass(model, ids_BS, block_size)

    return CostItem(
        cell=lane.cell.id,
        part=part,
        batch_size=num_rows,
        context_tokens=context_tokens,
        block_size=block_size,
        prepare=prepare,
    )


def _ids(rows: Sequence[Sequence[int]], size: int, length: int) -> Tensor:
    """Token ids (B, S) of the workload's own prompts, each over again until it is long enough: never random ids."""
    return torch.tensor([list(islice(cycle(row), length)) for row in islice(cycle(rows), size)])


def _ar_step(model: Model, ids_BS: Tensor) -> phases.Repeat:
    return phases.ar_step(model, model.prefill(ids_BS), ids_BS[:, :1])


def _bookkeeping(lane: Lane, call: Call, rows: Sequence[tuple[int, ...]]) -> phases.Repeat:
    """For rows that never end, and stop strings as long as the call's that never come."""
    stop = tuple(NEVER * len(text) for text in call.stop)
    rules = Rules(max_new_tokens=sys.maxsize, eos_token_ids=frozenset(), stop=stop, tokenizer=lane.model.tokenizer)
    prompts = [Prompt(id=str(number), token_ids=ids) for number, ids in enumerate(rows)]
    return phases.bookkeeping(prompts, rules)


def _denoise(model: Denoising, ids_BS: Tensor, block_size: int) -> phases.Repeat:
    """Half of the block masked: masks alone would all route to the same experts."""
    block_BK = _block(ids_BS, block_size)
    if model.mask_token_id is not None:
        block_BK[:, ::2] = model.mask_token_id
    t = -(-block_size // 2) / block_size
    return phases.denoise(model, model.prefill(ids_BS), block_BK, [t] * len(ids_BS))


def _context_pass(model: Model, ids_BS: Tensor, block_size: int) -> phases.Repeat:
    return phases.context_pass(model, model.prefill(ids_BS), _block(ids_BS, block_size))


def _block(ids_BS: Tensor, block_size: int) -> Tensor:
    return torch.tensor([list(islice(cycle(row), block_size)) for row in ids_BS.tolist()])
