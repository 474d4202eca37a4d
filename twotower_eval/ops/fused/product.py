"""A few rows times weights that are read once: products of one weight, and of the chosen experts with the shared one.

One row is a sum of products, spread over programs fine enough that every memory channel is busy; up to
``MAX_ROWS`` rows are one tile of a tensor core, whose weights stream through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 16  # of a tile
MAX_PAIRS = 1024  # of a row and an expert, which every program looks through
FEW_PAIRS = 128  # up to so many, programs are made for the experts in use instead of for all


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Outputs of a program, inputs that it reads at a time, and how it is run."""

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int = 1


ONE_ROW = Tile(outputs=16, inputs=256, num_warps=4)
MANY_ROWS = {2: Tile(outputs=64, inputs=128, num_warps=4, num_stages=4),
             4: Tile(outputs=32, inputs=64, num_warps=4, num_stages=2)}  # fmt: skip


@triton.jit
def _tile(
    x_ptr, rows, real, weight_ptr, outputs, num_outputs, num_inputs: tl.constexpr,
    ONE: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Rows of x (by their numbers) times rows of a weight: (rows, outputs), or (outputs,) for one row; float32."""
    known = outputs < num_outputs
    weight_ptr += outputs[:, None].to(tl.int64) * num_inputs
    if ONE:
        partial = tl.zeros([OUTPUTS, INPUTS], dtype=tl.float32)
        for start in range(0, num_inputs, INPUTS):
            inputs = start + tl.arange(0, INPUTS)
            inside = inputs < num_inputs
            weight = tl.load(weight_ptr + inputs[None, :], mask=known[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_ptr + rows * num_inputs + inputs, mask=inside, other=0.0)
            partial += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        return tl.sum(partial, axis=1)
    else:
        total = tl.zeros([rows.shape[0], OUTPUTS], dtype=tl.float32)
        x_ptr += rows[:, None] * num_inputs
        for start in range(0, num_inputs, INPUTS):
            inputs = start + tl.arange(0, INPUTS)
            inside = inputs < num_inputs
            weight = tl.load(weight_ptr + inputs[None, :], mask=known[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_ptr + inputs[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
        return total


@triton.jit
def _linear_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, num_outputs, num_inputs: tl.constexpr,
    ONE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    known = outputs < num_outputs
    if ONE:
        out = _tile(x_ptr, 0, True, weight_ptr, outputs, num_outputs, num_inputs, ONE, OUTPUTS, INPUTS)
        tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=known)
    else:
        rows = tl.arange(0, ROWS)
        real = rows < num_rows
        out = _tile(x_ptr, rows, real, weight_ptr, outputs, num_outputs, num_inputs, ONE, OUTPUTS, INPUTS)
        at = rows[:, None] * num_outputs + outputs[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=real[:, None] & known[None, :])


def linear(x: Tensor, weight_OI: Tensor, tile: Tile | None = None) -> Tensor:
    """``x @ weight.T`` for up to ``MAX_ROWS`` rows, (..., O)."""
    num_outputs, num_inputs = weight_OI.shape
    x_RI, weight_OI = x.reshape(-1, num_inputs).contiguous(), weight_OI.contiguous()
    num_rows = len(x_RI)
    tile = tile or _tile_for(num_rows, x)
    out = torch.empty(*x.shape[:-1], num_outputs, dtype=x.dtype, device=x.device)
    _linear_kernel[(triton.cdiv(num_outputs, tile.outputs),)](
        x_RI, weight_OI, out, num_rows, num_outputs, num_inputs,
        ONE=num_rows == 1, ROWS=MAX_ROWS, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _tile_for(num_rows: int, x: Tensor) -> Tile:
    return ONE_ROW if num_rows == 1 else MANY_ROWS[min(x.element_size(), 4)]


@triton.jit
def _pairs_of_slot(chosen_ptr, slot, num_pairs, IN_USE: tl.constexpr, PAIRS: tl.constexpr):
    """The expert of a slot, which (row, expert) pairs are its own, each one's place among them, and their number.

    Slots are the experts themselves, or those in use in the order in which they first come up.
    """
    pairs = tl.arange(0, PAIRS)
    there = pairs < num_pairs
    chosen = tl.load(chosen_ptr + pairs, mask=there, other=-1).to(tl.int32)
    expert = slot
    exists = True
    if IN_USE:
        same_before = (chosen[None, :] == chosen[:, None]) & (pairs[None, :] < pairs[:, None])
        first = there & (tl.sum(same_before.to(tl.int32), axis=1) == 0)
        at = first & (tl.cumsum(first.to(tl.int32), axis=0) - 1 == slot)
        expert = tl.sum(tl.where(at, chosen, 0), axis=0)
        exists = tl.sum(at.to(tl.int32), axis=0) > 0
    own = there & (chosen == expert) & exists
    return expert, own, tl.cumsum(own.to(tl.int32), axis=0) - 1, tl.sum(own.to(tl.int32), axis=0)


@triton.jit
def _pairs_of_tile(own, places, start, count, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Pairs at places ``start`` and on, so many as a tile holds, and which of them there are."""
    wanted = start + tl.arange(0, ROWS)
    here = own[None, :] & (places[None, :] == wanted[:, None])
    return tl.sum(tl.where(here, tl.arange(0, PAIRS)[None, :], 0), axis=1), wanted < count


@triton.jit
def _store_up(inner_ptr, value, at, mask):
    """``relu(value)^2``, rounded where the plain form rounds."""
    kept = tl.maximum(value, 0.0).to(inner_ptr.dtype.element_ty).to(tl.float32)
    tl.store(inner_ptr + at, (kept * kept).to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _up_kernel(
    x_ptr, chosen_ptr, up_ptr, shared_ptr, inner_ptr, shared_inner_ptr,
    num_rows, num_slots, width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr,
    PER_TOKEN: tl.constexpr, IN_USE: tl.constexpr, PAIRS: tl.constexpr,
    ONE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    program, num_tiles = tl.program_id(0), tl.cdiv(width, OUTPUTS)
    num_routed = num_slots * num_tiles
    if program < num_routed:
        slot, outputs = program // num_tiles, (program % num_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
        if ONE:
            expert = tl.load(chosen_ptr + slot)
            weight_ptr = up_ptr + expert * width * hidden
            value = _tile(x_ptr, 0, True, weight_ptr, outputs, width, hidden, ONE, OUTPUTS, INPUTS)
            _store_up(inner_ptr, value, slot * width + outputs, outputs < width)
        else:
            expert, own, places, count = _pairs_of_slot(chosen_ptr, slot, num_rows * PER_TOKEN, IN_USE, PAIRS)
            weight_ptr = up_ptr + expert.to(tl.int64) * width * hidden
            start = 0
            while start < count:
                pairs, real = _pairs_of_tile(own, places, start, count, ROWS, PAIRS)
                rows = pairs // PER_TOKEN
                value = _tile(x_ptr, rows, real, weight_ptr, outputs, width, hidden, ONE, OUTPUTS, INPUTS)
                at = pairs[:, None] * width + outputs[None, :]
                _store_up(inner_ptr, value, at, real[:, None] & (outputs < width)[None, :])
                start += ROWS
    else:
        outputs = (program - num_routed) * OUTPUTS + tl.arange(0, OUTPUTS)
        known = outputs < shared_width
        if ONE:
            value = _tile(x_ptr, 0, True, shared_ptr, outputs, shared_width, hidden, ONE, OUTPUTS, INPUTS)
            _store_up(shared_inner_ptr, value, outputs, known)
        else:
            start = 0
            while start < num_rows:
                rows = start + tl.arange(0, ROWS)
                real = rows < num_rows
                value = _tile(x_ptr, rows, real, shared_ptr, outputs, shared_width, hidden, ONE, OUTPUTS, INPUTS)
                at = rows[:, None] * shared_width + outputs[None, :]
                _store_up(shared_inner_ptr, value, at, real[:, None] & known[None, :])
                start += ROWS


@triton.jit
def _down_kernel(
    inner_ptr, shared_inner_ptr, chosen_ptr, down_ptr, shared_ptr, out_ptr, shared_out_ptr,
    num_rows, num_slots, width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr,
    PER_TOKEN: tl.constexpr, IN_USE: tl.constexpr, PAIRS: tl.constexpr,
    ONE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    program, num_tiles = tl.program_id(0), tl.cdiv(hidden, OUTPUTS)
    if program < num_tiles:  # the shared expert first: its sums are the longest
        outputs = program * OUTPUTS + tl.arange(0, OUTPUTS)
        known = outputs < hidden
        if ONE:
            value = _tile(shared_inner_ptr, 0, True, shared_ptr, outputs, hidden, shared_width, ONE, OUTPUTS, INPUTS)
            tl.store(shared_out_ptr + outputs, value.to(shared_out_ptr.dtype.element_ty), mask=known)
        else:
            start = 0
            while start < num_rows:
                rows = start + tl.arange(0, ROWS)
                real = rows < num_rows
                value = _tile(
                    shared_inner_ptr, rows, real, shared_ptr, outputs, hidden, shared_width, ONE, OUTPUTS, INPUTS
                )
                at = rows[:, None] * hidden + outputs[None, :]
                mask = real[:, None] & known[None, :]
                tl.store(shared_out_ptr + at, value.to(shared_out_ptr.dtype.element_ty), mask=mask)
                start += ROWS
    else:
        program -= num_tiles
        slot, outputs = program // num_tiles, (program % num_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
        known = outputs < hidden
        if ONE:
            weight_ptr = down_ptr + tl.load(chosen_ptr + slot) * width * hidden
            value = _tile(inner_ptr, slot, True, weight_ptr, outputs, hidden, width, ONE, OUTPUTS, INPUTS)
            tl.store(out_ptr + slot * hidden + outputs, value.to(out_ptr.dtype.element_ty), mask=known)
        else:
            expert, own, places, count = _pairs_of_slot(chosen_ptr, slot, num_rows * PER_TOKEN, IN_USE, PAIRS)
            weight_ptr = down_ptr + expert.to(tl.int64) * width * hidden
            start = 0
            while start < count:
                pairs, real = _pairs_of_tile(own, places, start, count, ROWS, PAIRS)
                value = _tile(inner_ptr, pairs, real, weight_ptr, outputs, hidden, width, ONE, OUTPUTS, INPUTS)
                at = pairs[:, None] * hidden + outputs[None, :]
                tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=real[:, None] & known[None, :])
                start += ROWS


@triton.jit
def _combine_kernel(
    out_ptr, shared_ptr, weights_ptr, sum_ptr, hidden, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        pair = row * PER_TOKEN + slot
        value = tl.load(out_ptr + pair * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(weights_ptr + pair)
    shared = tl.load(shared_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    tl.store(sum_ptr + row * hidden + columns, (total.to(dtype).to(tl.float32) + shared).to(dtype), mask=inside)


def experts(
    x_RH: Tensor,
    chosen_RA: Tensor,
    weights_RA: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    shared_IH: Tensor,
    shared_HI: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts plus the shared one, (R, H), for up to ``MAX_PAIRS`` choices."""
    (num_rows, hidden), (num_experts, width, _) = x_RH.shape, up_EIH.shape
    per_token, shared_width = chosen_RA.shape[1], shared_IH.shape[0]
    num_pairs = num_rows * per_token
    in_use = num_pairs <= FEW_PAIRS
    num_slots = min(num_experts, num_pairs) if in_use else num_experts
    tile = tile or _tile_for(num_rows, x_RH)
    x_RH, chosen_RA, weights_RA = x_RH.contiguous(), chosen_RA.contiguous(), weights_RA.contiguous()
    up_EIH, down_EHI, shared_IH, shared_HI = (t.contiguous() for t in (up_EIH, down_EHI, shared_IH, shared_HI))
    inner_MI, shared_inner_RI = x_RH.new_empty(num_pairs, width), x_RH.new_empty(num_rows, shared_width)
    out_MH, shared_out_RH, sum_RH = x_RH.new_empty(num_pairs, hidden), torch.empty_like(x_RH), torch.empty_like(x_RH)
    sizes = {
        "PER_TOKEN": per_token, "IN_USE": in_use, "PAIRS": max(16, triton.next_power_of_2(num_pairs)),
        "ONE": num_rows == 1, "ROWS": MAX_ROWS, "OUTPUTS": tile.outputs, "INPUTS": tile.inputs,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    numbers = (num_rows, num_slots, width, shared_width, hidden)
    up_tiles = num_slots * triton.cdiv(width, tile.outputs) + triton.cdiv(shared_width, tile.outputs)
    _up_kernel[(up_tiles,)](x_RH, chosen_RA, up_EIH, shared_IH, inner_MI, shared_inner_RI, *numbers, **sizes)
    down_tiles = (num_slots + 1) * triton.cdiv(hidden, tile.outputs)
    _down_kernel[(down_tiles,)](
        inner_MI, shared_inner_RI, chosen_RA, down_EHI, shared_HI, out_MH, shared_out_RH, *numbers, **sizes
    )
    block = min(512, triton.next_power_of_2(hidden))
    _combine_kernel[(num_rows, triton.cdiv(hidden, block))](
        out_MH, shared_out_RH, weights_RA, sum_RH, hidden, PER_TOKEN=per_token, BLOCK=block, num_warps=4
    )
    return sum_RH
