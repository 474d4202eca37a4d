"""What the context tower remembers of its tokens: keys and values, Mamba states, the last hidden state.

Contexts behave as values: extending one leaves it usable. Yet keys and values are not copied for each token: several
contexts of one line share a buffer, and the newest of them appends in place (as slices of growing arrays do); an
older one that is extended again gets a copy of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twotower_eval.models.nemotron_h import MambaState

MIN_SPARE = 64  # token slots allocated beyond what is needed, so that most extensions write in place


@dataclass
class KeyValueBuffer:
    """Keys and values (B, J, T, D) by layer; ``num_writes`` tells who wrote last."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    capacity: int
    num_writes: int = 0


@dataclass
class Context:
    """B rows of committed tokens. ``lengths`` are host integers, so that nothing waits for a device."""

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
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.last_hidden_BH.device)
        length = max((self.lengths[row] for row in rows), default=0)
        keys = {i: k[:, :, :length].index_select(0, index) for i, k in self.buffer.keys.items()}
        values = {i: v[:, :, :length].index_select(0, index) for i, v in self.buffer.values.items()}
        mamba = {i: MambaState(*(t.index_select(0, index) for t in state)) for i, state in self.mamba.items()}
        return Context(
            lengths=tuple(self.lengths[row] for row in rows),
            buffer=KeyValueBuffer(keys, values, length),
            write_mark=0,
            mamba=mamba,
            last_hidden_BH=self.last_hidden_BH.index_select(0, index),
        )

    def join(self, other: Context) -> Context:
        """The context of these rows, then of the other's, with room for more tokens."""
        capacity = roomy(max(self.max_length, other.max_length))

        def slots(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> dict[int, Tensor]:
            rows = ((self.max_length, ours), (other.max_length, theirs))
            return {i: _stacked([(length, layers[i]) for length, layers in rows], capacity) for i in ours}

        mamba = {
            i: MambaState(*(torch.cat(pair) for pair in zip(state, other.mamba[i], strict=True)))
            for i, state in self.mamba.items()
        }
        ours, theirs = self.buffer, other.buffer
        return Context(
            lengths=self.lengths + other.lengths,
            buffer=KeyValueBuffer(slots(ours.keys, theirs.keys), slots(ours.values, theirs.values), capacity),
            write_mark=0,
            mamba=mamba,
            last_hidden_BH=torch.cat([self.last_hidden_BH, other.last_hidden_BH]),
        )

    def on(self, device: torch.device) -> Context:
        """This context's tensors on ``device`` (itself where they are there already); copied once."""
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
    """Lengths (B,) int64 on a device, which is not waited for where all rows are equally long."""
    if context.uniform:
        return torch.full((context.batch_size,), context.max_length, dtype=torch.int64, device=device)
    return torch.tensor(context.lengths, dtype=torch.int64, device=device)


def writable_buffer(context: Context, num_new: int) -> KeyValueBuffer:
    """A buffer with room for ``num_new`` more tokens per row, shared if ``context`` is its newest user."""
    buffer, needed = context.buffer, context.max_length + num_new
    if buffer.capacity >= needed and buffer.num_writes == context.write_mark and _may_write(buffer):
        return buffer
    capacity = roomy(needed)
    length = min(context.max_length, buffer.capacity)
    return KeyValueBuffer(
        keys={i: _grown(k, length, capacity) for i, k in buffer.keys.items()},
        values={i: _grown(v, length, capacity) for i, v in buffer.values.items()},
        capacity=capacity,
    )


def roomy(needed: int) -> int:
    """Token slots to allocate where so many are needed."""
    return needed + max(MIN_SPARE, needed // 4)


def room_for_block(context: Context, num_new: int) -> KeyValueBuffer:
    """The context's own buffer, of which ``num_new`` slots behind the longest row may be written to and mean nothing.

    What a denoiser appends for one call lies there, so that no step of a block copies the context. Where a newer
    context uses these slots, or there are too few, the context moves to a buffer of its own, once.
    """
    buffer = writable_buffer(context, num_new)
    if buffer is not context.buffer:
        context.buffer, context.write_mark = buffer, buffer.num_writes
    return buffer


def _may_write(buffer: KeyValueBuffer) -> bool:
    """Tensors made in inference mode cannot be written to outside it."""
    return torch.is_inference_mode_enabled() or not any(keys.is_inference() for keys in buffer.keys.values())


def _grown(old_BJTD: Tensor, length: int, capacity: int) -> Tensor:
    """A copy with ``capacity`` slots."""
    return _stacked([(length, old_BJTD)], capacity)


def _stacked(parts: Sequence[tuple[int, Tensor]], capacity: int) -> Tensor:
    """The first slots of each part, so many as it names, its rows below the last part's.

    Zeros behind them, not garbage: padding may be read, and must then be finite.
    """
    first = parts[0][1]
    num_rows = sum(part.shape[0] for _, part in parts)
    new = first.new_zeros(num_rows, first.shape[1], capacity, first.shape[3])
    row = 0
    for length, old_BJTD in parts:
        new[row : row + old_BJTD.shape[0], :, :length] = old_BJTD[:, :, :length]
        row += old_BJTD.shape[0]
    return new


class Writer:
    """Puts S new columns behind each row's own end, in place; where these lie is worked out once for all layers."""

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
