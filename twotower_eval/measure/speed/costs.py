"""The parts of decoding (prefill, AR step, denoise step, context pass), timed alone in the rounds of a run. They
explain its times, or show what is unexplained."""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import Call as DecoderCall
from twotower_eval.engine.decoders.rows import Rules, on_host
from twotower_eval.engine.decoders.static_cache import StaticParams, static_model
from twotower_eval.engine.models.protocol import Context, Denoising, Masked, Model, masked
from twotower_eval.errors import UserError
from twotower_eval.measure.speed.clock import CallClock, no_garbage_collection
from twotower_eval.measure.speed.lanes import Lane
from twotower_eval.measure.speed.workloads import Call, Calls, Load
from twotower_eval.records import STATIC_CACHE, CostPart, Passes, Prompt

Repeat = Callable[[], None]  # one repetition of a phase


def prefill(model: Model, ids_BS: Tensor) -> Repeat:
    """Read the prompts and choose the first token of each."""

    def repeat() -> None:
        _choose(model.next_logits(model.prefill(ids_BS)))

    return repeat


def ar_step(model: Model, context: Context, ids_B1: Tensor) -> Repeat:
    """Extend by one token, compute logits, choose. Each repetition continues one token further."""
    with torch.inference_mode():
        # The first extension copies keys and values that others may still read; later steps do not.
        newest = model.extend(context, ids_B1)

    def repeat() -> None:
        nonlocal newest
        newest = model.extend(newest, ids_B1)
        _choose(model.next_logits(newest))

    return repeat


def bookkeeping(prompts: Sequence[Prompt], rules: Rules) -> Repeat:
    """The autoregressive loop's own work beside a step: checks which rows have ended and keeps the others."""
    num_rows = len(prompts)
    call = DecoderCall(
        cast(Model, _Still()), prompts, rules, None, width=num_rows, capacity=num_rows, steady=False, on_finish=None
    )  # fmt: skip
    context = call.admit()
    tokens_B1 = torch.tensor([[prompt.token_ids[-1]] for prompt in prompts])

    def repeat() -> None:
        nonlocal context
        assert context is not None
        going = call.absorb(context.rows, tokens_B1.tolist())
        context = call.admit(call.extended(context, going, tokens_B1))

    return repeat


class _Still:
    """A model whose contexts are all the same and take no time."""

    def prefill(self, *_: object) -> _Still:
        return self

    def extend(self, *_: object) -> _Still:
        return self


def denoise(model: Masked, context: Context, block_BK: Tensor, t_B: Sequence[float] | float | None) -> Repeat:
    """One denoiser pass over a block, with the choice of a token and its probability at every position.

    ``t_B`` is the mask fraction given to the denoiser, as in :meth:`TwoTower.denoise`.
    """

    def repeat() -> None:
        _choose_confident(model.denoise(block_BK, context, t_B), model.mask_token_id)

    with torch.inference_mode():
        repeat()  # a first step may prepare things that later ones reuse
    return repeat


def context_pass(model: Model, context: Context, block_BK: Tensor) -> Repeat:
    """Extend by a whole block, without logits. Each repetition continues one block further."""
    with torch.inference_mode():
        newest = model.extend(context, block_BK)

    def repeat() -> None:
        nonlocal newest
        newest = model.extend(newest, block_BK)

    return repeat


def forced_block(model: Denoising, context: Context, block_size: int, blocks: Sequence[Sequence[int]]) -> Repeat:
    """Denoise a whole block and absorb it; each denoiser call commits a given number of tokens.

    ``blocks`` holds the commits per call of each repetition, the same for all rows. The most confident positions are
    committed, as a decoder would.
    """
    schedules = itertools.cycle(blocks)
    with torch.inference_mode():
        masks_BK = torch.full((len(context.lengths), block_size), model.mask_token_id)
        newest = model.extend(context, masks_BK)
        model.denoise(masks_BK, newest, [1.0] * len(context.lengths))

    def repeat() -> None:
        nonlocal newest
        block_BK = torch.full((len(newest.lengths), block_size), model.mask_token_id)
        masked_BK = torch.ones_like(block_BK, dtype=torch.bool)
        num_masked = block_size
        for num_commits in next(schedules):
            logits_BKV = model.denoise(block_BK, newest, [num_masked / block_size] * len(newest.lengths))
            tokens_BK, confidence_BK = _choose_confident(logits_BKV, model.mask_token_id)
            best_BC = confidence_BK.masked_fill(~masked_BK, -torch.inf).topk(num_commits, dim=1).indices
            block_BK.scatter_(1, best_BC, tokens_BK.gather(1, best_BC))
            masked_BK.scatter_(1, best_BC, False)
            num_masked -= num_commits
        newest = model.extend(newest, block_BK)

    return repeat


def time_repeats(repeat: Repeat, clock: CallClock, num_repeats: int) -> tuple[float, ...]:
    """Seconds of each repetition; every device is waited for before and after."""
    walls_s = []
    with torch.inference_mode(), no_garbage_collection():
        for _ in range(num_repeats):
            started_s = clock()
            repeat()
            walls_s.append(clock() - started_s)
    return tuple(walls_s)


def _choose(logits_BV: Tensor) -> None:
    logits_BV.argmax(-1).cpu()


def _choose_confident(logits_BKV: Tensor, mask_token_id: int | None) -> tuple[Tensor, Tensor]:
    """Tokens and confidences (B, K) on the host, as block diffusion chooses at temperature 0."""
    if mask_token_id is not None:
        logits_BKV[..., mask_token_id] = -torch.inf
    confidence_BK, tokens_BK = logits_BKV.float().softmax(-1).max(-1)
    return on_host(tokens_BK, confidence_BK)


# Enough that one repetition's jitter does not matter, few enough to stay a small share of a round.
REPEATS: dict[CostPart, int] = {"prefill": 2, "ar_step": 8, "bookkeeping": 8, "denoise": 4, "context_pass": 4}
NEVER = "\uffff"  # a noncharacter

Key = tuple[str, CostPart, int, int | None, int, int]  # whose; batch size of the cell, block size, rows, context tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class CostItem:
    """One part to time, as a row of ``costs.jsonl`` names it; ``prepare`` sets it up off the clock."""

    cell: str
    part: CostPart
    batch_size: int
    context_tokens: int
    block_size: int | None
    prepare: Callable[[], Repeat]

    @property
    def num_repeats(self) -> int:
        """Repetitions of one timing."""
        return REPEATS[self.part]

    def time(self, clock: CallClock) -> float:
        """Seconds of all repetitions together, after an uncounted one that absorbs what the last part left in
        caches."""
        try:
            with torch.inference_mode():
                repeat = self.prepare()
            return sum(time_repeats(repeat, clock, self.num_repeats + 1)[1:])
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.part} at {self.context_tokens} tokens, batch size {self.batch_size}: out of memory: take "
                "smaller --batch-sizes, or --no-costs to leave the parts out"
            ) from error


class TimedParts:
    """The parts of a run, each timed from the first call that needs it.

    A part is timed once per baseline, for the candidates once, and per batch size, under the first cell that needed it.
    """

    def __init__(self, calls: Calls, lanes: Mapping[Load, Sequence[Lane]]) -> None:
        self._calls = calls
        self._lanes = {lane.cell.id: lane for of_size in lanes.values() for lane in of_size if lane.replica == 0}
        self._seen: dict[str, set[Passes]] = defaultdict(set)  # by cell
        self._items: dict[Key, CostItem] = {}

    @property
    def items(self) -> tuple[CostItem, ...]:
        """All parts known so far."""
        return tuple(self._items.values())

    def note_call(self, lane: Lane, passes: Iterable[Passes]) -> None:
        """Record the passes that a call of the lane made."""
        if lane.replica == 0:
            self._seen[lane.cell.id] |= {replace(one, num=1) for one in passes}

    def take_new(self) -> tuple[CostItem, ...]:
        """The parts newly needed since the last call."""
        before = len(self._items)
        for cell, seen in self._seen.items():
            for item in self._needed(self._lanes[cell], seen):
                size = self._lanes[cell].cell.workload.batch_size or 1
                sizes = (item.block_size, item.batch_size, item.context_tokens)
                own = self._lanes[cell].cell
                self._items.setdefault((f"{own.who} {own.decoder.own_steps}", item.part, size, *sizes), item)
        return self.items[before:]

    def _needed(self, lane: Lane, seen: set[Passes]) -> list[CostItem]:
        calls = self._calls[lane.cell.workload.batch_size or 1]
        model = _as_decoded(lane, calls)
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


def _as_decoded(lane: Lane, calls: Sequence[Call]) -> Model:
    """The model as its decoder runs it: over a static cache as long as the longest call's, or as it is."""
    spec, model = lane.cell.decoder, lane.untimed
    if spec.kind != STATIC_CACHE:
        return model
    given: Mapping[str, Any] = spec.params
    longest = max(max(map(len, lane.ids[call.id])) + call.max_new_tokens for call in calls)
    return static_model(model, StaticParams(**given), slots=lane.cell.workload.batch_size or 1, num_tokens=longest)


def _parts(lane: Lane, seen: Iterable[Passes]) -> list[tuple[CostPart, int | None]]:
    """Parts that passes belong to; of many block sizes, the smallest, the largest and a middle one."""
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
    """The smallest, median and largest value; with ``middle`` the midpoint instead of the median."""
    known = sorted(values)
    if len(known) <= 1:
        return known
    between = (known[0] + known[-1]) // 2 if middle else known[len(known) // 2]
    return sorted({known[0], between, known[-1]})


def _contexts(lane: Lane, calls: Sequence[Call], model: Model, num_tokens: int) -> list[int]:
    """Context lengths of passes with that many tokens, from the longest prompt of each call."""
    longest = sorted(max(map(len, lane.ids[call.id])) for call in calls)
    budget = max(call.max_new_tokens for call in calls)
    contexts = [longest[0], longest[len(longest) // 2] + budget // 2, longest[-1] + budget]
    limits = (model.max_length, getattr(model, "num_columns", None))
    if (limit := min((one for one in limits if one is not None), default=None)) is not None:
        # One repetition is not counted, one runs in the preparation; each continues where the last ended.
        room = limit - (max(REPEATS.values()) + 2) * num_tokens
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

    def prepare() -> Repeat:
        if part == "bookkeeping":  # reads no context
            return _bookkeeping(lane, calls[0], list(islice(cycle(rows), num_rows)))
        ids_BS = _ids(rows, num_rows, context_tokens)
        if part == "prefill":
            return prefill(model, ids_BS)
        if block_size is None:
            return _ar_step(model, ids_BS)
        if part == "denoise":
            return _denoise(masked(model), ids_BS, block_size)
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
    """Token ids (B, S) from the workload's own prompts, repeated to the length; never random ids."""
    return torch.tensor([list(islice(cycle(row), length)) for row in islice(cycle(rows), size)])


def _ar_step(model: Model, ids_BS: Tensor) -> Repeat:
    return ar_step(model, model.prefill(ids_BS), ids_BS[:, :1])


def _bookkeeping(lane: Lane, call: Call, rows: Sequence[tuple[int, ...]]) -> Repeat:
    """The loop's work for rows that never end, with stop strings as long as the call's that never occur."""
    stop = tuple(NEVER * len(text) for text in call.stop)
    rules = Rules(max_new_tokens=sys.maxsize, eos_token_ids=frozenset(), stop=stop, tokenizer=lane.model.tokenizer)
    prompts = [Prompt(id=str(number), token_ids=ids) for number, ids in enumerate(rows)]
    return bookkeeping(prompts, rules)


def _denoise(model: Masked, ids_BS: Tensor, block_size: int) -> Repeat:
    """A denoise step with half of the block masked: masks alone would all route to the same experts."""
    block_BK = _block(ids_BS, block_size)
    if model.mask_token_id is not None:
        block_BK[:, ::2] = model.mask_token_id
    t = -(-block_size // 2) / block_size
    return denoise(model, model.prefill(ids_BS), block_BK, [t] * len(ids_BS))


def _context_pass(model: Model, ids_BS: Tensor, block_size: int) -> Repeat:
    return context_pass(model, model.prefill(ids_BS), _block(ids_BS, block_size))


def _block(ids_BS: Tensor, block_size: int) -> Tensor:
    return torch.tensor([list(islice(cycle(row), block_size)) for row in ids_BS.tolist()])
