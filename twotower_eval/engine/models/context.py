"""The contexts of the context tower, and token sequences with common beginnings read as one tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from twotower_eval.engine.models.nemotron_h import MambaState
from twotower_eval.engine.models.protocol import ContextT, Segment

LEAST_SHARED = 8  # a shorter inner segment is read again by each of its children: a few tokens instead of a pass
MAX_ROWS = 64  # rows per pass; each carries a copy of its context
WELL_FILLED = 256  # tokens of a pass, with padding, above which it is no faster per token
LEAST_FILL = 0.75  # of the longest row


def common_length(one: Sequence[int], other: Sequence[int], start: int = 0) -> int:
    """How long the common beginning is, known to be at least ``start``."""
    for at in range(start, min(len(one), len(other))):
        if one[at] != other[at]:
            return at
    return min(len(one), len(other))


@dataclass
class Branch:
    """A segment as read by rows. ``wanted``: positions in ``tokens``, and the number of the result at each."""

    tokens: tuple[int, ...]
    wanted: list[tuple[int, int]]
    children: list[Branch] = field(default_factory=list)


class ReadsRows(Protocol[ContextT]):
    """A model that extends contexts and gives logits after any of the new positions."""

    vocab_size: int

    def extend_logits(
        self, context: ContextT, ids_BK: Tensor, lengths_B: Sequence[int], wanted: Sequence[tuple[int, int]]
    ) -> tuple[ContextT, Tensor]:
        """The context after each row's new tokens, and logits (M, V) after the wanted (row, column)."""


# (context of B rows, ids (B, K) padded on the right, lengths, the rows' branches) -> extended context
Read = Callable[[ContextT, Tensor, Sequence[int], Sequence[Branch]], ContextT]


def branches(segments: Sequence[Segment], *, contexts: bool = False) -> list[Branch]:
    """The tree's root branches. Results are numbered in the order of segments and wanted positions.

    Short inner segments are prepended to each of their children, the first of which gives their results; not if results
    are ``contexts``, which stand at a segment's end.
    """
    made: list[Branch] = []
    roots: list[Branch] = []
    number = 0
    for segment in segments:
        numbers = range(number, number + len(segment.wanted))
        branch = Branch(segment.tokens, list(zip(segment.wanted, numbers, strict=True)))
        number += len(segment.wanted)
        made.append(branch)
        (roots if segment.parent < 0 else made[segment.parent].children).append(branch)
    for branch in reversed(made):  # children before parents
        branch.children = [one for child in branch.children for one in _merged(child, contexts)]
    return [one for root in roots for one in _merged(root, contexts)]


def _merged(branch: Branch, contexts: bool) -> Iterator[Branch]:
    if not branch.children or len(branch.tokens) >= LEAST_SHARED or (contexts and branch.wanted):
        yield branch
        return
    for child in branch.children:
        moved = [(position + len(branch.tokens), result) for position, result in child.wanted]
        yield Branch(branch.tokens + child.tokens, branch.wanted + moved, child.children)
        branch.wanted = []


def walk(context: ContextT, roots: Sequence[Branch], read: Read[ContextT], *, max_rows: int = MAX_ROWS) -> None:
    """Read a tree on a context of one row, depth first in batches of rows, so that few contexts exist at a time."""
    _walk_level(context, [(0, root) for root in roots], read, max_rows)


def _walk_level(context: ContextT, pending: list[tuple[int, Branch]], read: Read[ContextT], max_rows: int) -> None:
    pending.sort(key=lambda item: -len(item[1].tokens))
    for batch in _batches(pending, max_rows):
        lengths = [len(branch.tokens) for _, branch in batch]
        rows = [
            branch.tokens + (0,) * (lengths[0] - length) for (_, branch), length in zip(batch, lengths, strict=True)
        ]
        chosen = context.select([row for row, _ in batch])
        extended = read(chosen, torch.tensor(rows, dtype=torch.int64), lengths, [branch for _, branch in batch])
        inner = [row for row, (_, branch) in enumerate(batch) if branch.children]
        if inner:
            below = [(at, child) for at, row in enumerate(inner) for child in batch[row][1].children]
            _walk_level(extended.select(inner), below, read, max_rows)


def _batches(pending: Sequence[tuple[int, Branch]], max_rows: int) -> Iterator[Sequence[tuple[int, Branch]]]:
    """Batches of rows of similar lengths, longest first, with little padding."""
    start = 0
    for end, (_, branch) in enumerate(pending):
        longest = len(pending[start][1].tokens)
        filled = (end - start) * longest >= WELL_FILLED and len(branch.tokens) < LEAST_FILL * longest
        if end - start == max_rows or filled:
            yield pending[start:end]
            start = end
    if pending:
        yield pending[start:]


def logits_by_rows(model: ReadsRows[ContextT], context: ContextT, segments: Sequence[Segment]) -> Tensor:
    """Logits (M, V) float32 after every wanted position, from a model that has ``extend_logits``."""
    numbers: list[int] = []
    found: list[Tensor] = []

    def read(chosen: ContextT, ids_BK: Tensor, lengths: Sequence[int], rows: Sequence[Branch]) -> ContextT:
        wanted = [(row, position, result) for row, branch in enumerate(rows) for position, result in branch.wanted]
        places = [(row, position) for row, position, _ in wanted]
        extended, logits_MV = model.extend_logits(chosen, ids_BK, lengths, places)
        numbers.extend(result for *_, result in wanted)
        found.append(logits_MV)
        return extended

    walk(context, branches(segments), read)
    if not found:
        return torch.empty(0, model.vocab_size)
    joined_MV = torch.cat(found)
    return joined_MV[torch.tensor(numbers, dtype=torch.int64, device=joined_MV.device).argsort()]


MIN_SPARE = 64  # extra token slots, so that most extensions write in place
LEAST_SPARE = 16  # the same for gathered rows, which are soon gathered again
CAPACITY_STEP = 32  # capacities are multiples of it, so that most agree


@dataclass
class KeyValueBuffer:
    """Keys and values (B, J, T, D) by layer; ``num_writes`` identifies the newest user."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    capacity: int
    num_writes: int = 0


@dataclass
class Context:
    """B rows of committed tokens. ``lengths`` are on the host, so that no device is waited for."""

    lengths: tuple[int, ...]
    buffer: KeyValueBuffer
    write_mark: int
    mamba: dict[int, MambaState]
    last_hidden_BH: Tensor
    _mirrors: dict[torch.device, Context] = field(default_factory=dict, repr=False)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all rows are equally long, so that no mask is needed."""
        return len(set(self.lengths)) == 1

    def select(self, rows: Sequence[int]) -> Context:
        """A context of the given rows, in that order; a row may be repeated."""
        return Context.gathered([(self, rows)])

    def join(self, other: Context) -> Context:
        """The context of these rows, then of the other's."""
        return Context.gathered([(part, range(part.batch_size)) for part in (self, other)])

    @staticmethod
    def gathered(parts: Sequence[tuple[Context, Sequence[int]]]) -> Context:
        """The context of the given rows of several contexts, with spare slots; each row is copied once."""
        first, num_rows = parts[0][0], sum(len(rows) for _, rows in parts)
        lengths = [tuple(part.lengths[row] for row in rows) for part, rows in parts]
        longest = [max(of_part, default=0) for of_part in lengths]
        capacity = -(-(max(longest) + LEAST_SPARE) // CAPACITY_STEP) * CAPACITY_STEP
        taken = []
        start = 0
        for part, rows in parts:
            index = torch.tensor(list(rows), dtype=torch.int64, device=part.last_hidden_BH.device)
            taken.append((slice(start, start + len(rows)), index))
            start += len(rows)

        def stacked(of_parts: Sequence[Tensor]) -> Tensor:
            if len(of_parts) == 1:
                return of_parts[0].index_select(0, taken[0][1])
            new = of_parts[0].new_empty(num_rows, *of_parts[0].shape[1:])
            for (place, index), old in zip(taken, of_parts, strict=True):
                _copy_rows(new[place], old, index)
            return new

        def slots(of_parts: Sequence[Tensor]) -> Tensor:
            if all(old_BJTD.shape[2] == capacity for old_BJTD in of_parts):
                return stacked(of_parts)  # whole rows are copied faster than their beginnings
            _, num_heads, _, dim = of_parts[0].shape
            new_BJTD = of_parts[0].new_empty(num_rows, num_heads, capacity, dim)
            for (place, index), length, old_BJTD in zip(taken, longest, of_parts, strict=True):
                _copy_rows(new_BJTD[place, :, :length], old_BJTD[:, :, :length], index)
                new_BJTD[place, :, length:] = 0  # zeros, as padding may be read and must be finite
            return new_BJTD

        buffers = [part.buffer for part, _ in parts]
        return Context(
            lengths=tuple(length for of_part in lengths for length in of_part),
            buffer=KeyValueBuffer(
                {i: slots([buffer.keys[i] for buffer in buffers]) for i in first.buffer.keys},
                {i: slots([buffer.values[i] for buffer in buffers]) for i in first.buffer.values},
                capacity,
            ),
            write_mark=0,
            mamba={
                i: MambaState(
                    *(stacked(tensors) for tensors in zip(*(part.mamba[i] for part, _ in parts), strict=True))
                )
                for i in first.mamba
            },
            last_hidden_BH=stacked([part.last_hidden_BH for part, _ in parts]),
        )

    def on(self, device: torch.device) -> Context:
        """This context on ``device`` (itself if it is there already); copied once."""
        if self.last_hidden_BH.device == device:
            return self
        if device not in self._mirrors:
            length = self.max_length
            self._mirrors[device] = Context(
                lengths=self.lengths,
                buffer=KeyValueBuffer(
                    {i: k[:, :, :length].to(device) for i, k in self.buffer.keys.items()},
                    {i: v[:, :, :length].to(device) for i, v in self.buffer.values.items()},
                    length,
                ),
                write_mark=0,
                mamba={i: MambaState(*(t.to(device) for t in state)) for i, state in self.mamba.items()},
                last_hidden_BH=self.last_hidden_BH.to(device),
            )
        return self._mirrors[device]


def ends_of(context: Context, device: torch.device) -> Tensor:
    """Lengths (B,) int64 on a device, which is not waited for if all rows are equally long."""
    if context.uniform:
        return torch.full((context.batch_size,), context.max_length, dtype=torch.int64, device=device)
    return torch.tensor(context.lengths, dtype=torch.int64, device=device)


def writable_buffer(context: Context, num_new: int) -> KeyValueBuffer:
    """A buffer with room for ``num_new`` more tokens per row; shared if ``context`` is its newest user."""
    buffer, needed = context.buffer, context.max_length + num_new
    if buffer.capacity >= needed and buffer.num_writes == context.write_mark and _may_write(buffer):
        return buffer
    capacity = slots_to_allocate(needed)
    length = min(context.max_length, buffer.capacity)
    return KeyValueBuffer(
        keys={i: _grown(k, length, capacity) for i, k in buffer.keys.items()},
        values={i: _grown(v, length, capacity) for i, v in buffer.values.items()},
        capacity=capacity,
    )


def slots_to_allocate(needed: int) -> int:
    """Number of token slots to allocate for ``needed`` tokens."""
    return needed + max(MIN_SPARE, needed // 4)


def room_for_block(context: Context, num_new: int) -> KeyValueBuffer:
    """The context's buffer, with ``num_new`` scratch slots after the longest row.

    The denoiser's appended keys and values go there, so that no step of a block copies the context. If a newer context
    uses these slots, or there are too few, the context moves to its own buffer, once.
    """
    buffer = writable_buffer(context, num_new)
    if buffer is not context.buffer:
        context.buffer, context.write_mark = buffer, buffer.num_writes
    return buffer


def _may_write(buffer: KeyValueBuffer) -> bool:
    """Whether a buffer may be written: tensors made in inference mode cannot be changed outside it."""
    return torch.is_inference_mode_enabled() or not any(keys.is_inference() for keys in buffer.keys.values())


def _grown(old_BJTD: Tensor, length: int, capacity: int) -> Tensor:
    """A copy with ``capacity`` slots; the new ones are zeros, as padding may be read and must be finite."""
    num_rows, num_heads, _, dim = old_BJTD.shape
    new_BJTD = old_BJTD.new_zeros(num_rows, num_heads, capacity, dim)
    new_BJTD[:, :, :length] = old_BJTD[:, :, :length]
    return new_BJTD


def _copy_rows(new: Tensor, old: Tensor, index: Tensor) -> None:
    """Put the rows of ``old`` that ``index`` names into ``new``."""
    if old.is_cpu and not old.requires_grad:
        torch.index_select(old, 0, index, out=new)
    else:
        new.copy_(old.index_select(0, index))


class Writer:
    """Writes S new columns after each row's end, in place; their positions are computed once for all layers."""

    def __init__(self, lengths: tuple[int, ...], num_new: int, device: torch.device) -> None:
        self._slots = slice(lengths[0], lengths[0] + num_new)
        self._columns_B1S1: Tensor | None = None
        if len(set(lengths)) > 1:
            starts_B1 = torch.tensor(lengths, device=device)[:, None]
            self._columns_B1S1 = (starts_B1 + torch.arange(num_new, device=device))[:, None, :, None]

    def __call__(self, slots_BJTD: Tensor, new_BJSD: Tensor) -> None:
        """Write one layer's keys or values."""
        if self._columns_B1S1 is None:
            slots_BJTD[:, :, self._slots] = new_BJSD
        else:
            slots_BJTD.scatter_(2, self._columns_B1S1.expand_as(new_BJSD), new_BJSD)
