"""The chosen experts and the shared one: every expert in use is read once, whichever rows take it.

For more than one row a first launch lists the (row, expert) pairs by expert and the experts in use, so that nothing
waits for the host; up to ``ROWS`` rows of an expert are a tile of a tensor core, past which its weight streams through
shared memory. For more rows than that the shared expert is a product like others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from twotower_eval.ops.fused.expert_row import outputs_of_row, store_squared_relu
from twotower_eval.ops.fused.overlap import let_next_begin, num_at_once, num_programs, overlapping, wait_for_previous

ROWS = 16  # of a tile


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Outputs of a tile, inputs that it reads at a time, and how it is run."""

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    per_processor: int


# By bytes of a number; measured on an H200 in bfloat16.
TILES = {2: Tile(outputs=64, inputs=128, num_warps=4, num_stages=4, per_processor=3),
         4: Tile(outputs=32, inputs=64, num_warps=4, num_stages=2, per_processor=3)}  # fmt: skip


@triton.jit
def _plan_kernel(
    chosen_ptr, order_ptr, starts_ptr, used_ptr, num_pairs, num_experts,
    PAIRS: tl.constexpr, EXPERTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Pairs in the order of their experts, where each expert's begin, the experts in use, and behind these how many
    there are."""
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    expert, pairs = tl.program_id(0), tl.arange(0, PAIRS)
    there = pairs < num_pairs
    chosen = tl.load(chosen_ptr + pairs, mask=there, other=EXPERTS - 1).to(tl.int32)  # of which there is none
    own = there & (chosen == expert)
    start = tl.sum((chosen < expert).to(tl.int32), axis=0)
    place = tl.cumsum(own.to(tl.int32), axis=0) - 1
    tl.store(order_ptr + start + place, pairs, mask=own)
    tl.store(starts_ptr + expert, start)
    taken, experts = (tl.histogram(chosen, EXPERTS) > 0).to(tl.int32), tl.arange(0, EXPERTS)
    slot = tl.sum(tl.where(experts < expert, taken, 0), axis=0)
    in_use = tl.sum(own.to(tl.int32), axis=0) > 0
    tl.store(used_ptr + slot, expert, mask=in_use)
    if expert == num_experts - 1:
        tl.store(starts_ptr + num_experts, num_pairs)
        tl.store(used_ptr + num_experts, slot + in_use.to(tl.int32))


@triton.jit
def _rows_product(
    x_ptr, rows, real, weight_ptr, outputs, num_outputs, num_inputs: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Rows of x (by their numbers) times rows of a weight, (rows, outputs) float32."""
    known = outputs < num_outputs
    weight_ptr += outputs[:, None].to(tl.int64) * num_inputs
    x_ptr += rows[:, None] * num_inputs
    total = tl.zeros([rows.shape[0], OUTPUTS], dtype=tl.float32)
    for start in range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        inside = inputs < num_inputs
        weight = tl.load(weight_ptr + inputs[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + inputs[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="tf32x3")
    return total


@triton.jit
def _up_kernel(
    x_ptr, order_ptr, starts_ptr, used_ptr, up_ptr, shared_ptr, inner_ptr, shared_inner_ptr, num_rows, num_experts,
    width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr, PER_TOKEN: tl.constexpr,
    WITH_SHARED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    tiles_each: tl.constexpr = (width + OUTPUTS - 1) // OUTPUTS
    num_shared: tl.constexpr = (shared_width + OUTPUTS - 1) // OUTPUTS if WITH_SHARED else 0
    tile, num_tiles = tl.program_id(0), num_shared + tl.load(used_ptr + num_experts) * tiles_each
    while tile < num_tiles:
        if tile < num_shared:
            outputs, rows = tile * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
            real = rows < num_rows
            value = _rows_product(x_ptr, rows, real, shared_ptr, outputs, shared_width, hidden, OUTPUTS, INPUTS)
            at = rows[:, None] * shared_width + outputs[None, :]
            store_squared_relu(shared_inner_ptr, value, at, real[:, None] & (outputs < shared_width)[None, :])
        else:
            routed = tile - num_shared
            expert = tl.load(used_ptr + routed // tiles_each)
            outputs = (routed % tiles_each) * OUTPUTS + tl.arange(0, OUTPUTS)
            start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
            weight_ptr = up_ptr + expert.to(tl.int64) * width * hidden
            while start < end:
                places = start + tl.arange(0, ROWS)
                real = places < end
                pairs = tl.load(order_ptr + places, mask=real, other=0)
                rows = pairs // PER_TOKEN
                value = _rows_product(x_ptr, rows, real, weight_ptr, outputs, width, hidden, OUTPUTS, INPUTS)
                at = pairs[:, None] * width + outputs[None, :]
                store_squared_relu(inner_ptr, value, at, real[:, None] & (outputs < width)[None, :])
                start += ROWS
        tile += tl.num_programs(0)


@triton.jit
def _down_kernel(
    inner_ptr, shared_inner_ptr, order_ptr, starts_ptr, used_ptr, down_ptr, shared_ptr, out_ptr, shared_out_ptr,
    num_rows, num_experts, width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr,
    WITH_SHARED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    tiles_each: tl.constexpr = (hidden + OUTPUTS - 1) // OUTPUTS
    num_shared: tl.constexpr = tiles_each if WITH_SHARED else 0
    tile, num_tiles = tl.program_id(0), num_shared + tl.load(used_ptr + num_experts) * tiles_each
    while tile < num_tiles:
        outputs = (tile % tiles_each) * OUTPUTS + tl.arange(0, OUTPUTS)
        known = (outputs < hidden)[None, :]
        if tile < num_shared:  # the longest sums first
            rows = tl.arange(0, ROWS)
            real = rows < num_rows
            value = _rows_product(
                shared_inner_ptr, rows, real, shared_ptr, outputs, hidden, shared_width, OUTPUTS, INPUTS
            )
            at = rows[:, None] * hidden + outputs[None, :]
            tl.store(shared_out_ptr + at, value.to(shared_out_ptr.dtype.element_ty), mask=real[:, None] & known)
        else:
            expert = tl.load(used_ptr + (tile - num_shared) // tiles_each)
            start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
            weight_ptr = down_ptr + expert.to(tl.int64) * width * hidden
            while start < end:
                places = start + tl.arange(0, ROWS)
                real = places < end
                pairs = tl.load(order_ptr + places, mask=real, other=0)
                value = _rows_product(inner_ptr, pairs, real, weight_ptr, outputs, hidden, width, OUTPUTS, INPUTS)
                at = pairs[:, None] * hidden + outputs[None, :]
                tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=real[:, None] & known)
                start += ROWS
        tile += tl.num_programs(0)


@triton.jit
def _combine_kernel(
    out_ptr, shared_ptr, weights_ptr, sum_ptr, hidden,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The routed outputs by their weights, in float32, plus the shared one."""
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
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
    """See :func:`twotower_eval.ops.moe.experts_and_shared`; (R, H)."""
    x_RH, chosen_RA, weights_RA = x_RH.contiguous(), chosen_RA.contiguous(), weights_RA.contiguous()
    weights = (up_EIH, down_EHI, shared_IH, shared_HI)
    if len(x_RH) == 1:
        out_MH, shared_out_RH = outputs_of_row(x_RH, chosen_RA, *weights)
    else:
        out_MH, shared_out_RH = _outputs_of_rows(x_RH, chosen_RA, *weights, tile)
    (num_rows, hidden), sum_RH = x_RH.shape, torch.empty_like(x_RH)
    block = min(512, triton.next_power_of_2(hidden))
    _combine_kernel[(num_rows, triton.cdiv(hidden, block))](
        out_MH, shared_out_RH, weights_RA, sum_RH, hidden,
        PER_TOKEN=chosen_RA.shape[1], BLOCK=block, num_warps=4, **overlapping(x_RH.device),
    )  # fmt: skip
    return sum_RH


def _outputs_of_rows(
    x_RH: Tensor,
    chosen_RA: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    shared_IH: Tensor,
    shared_HI: Tensor,
    tile: Tile | None,
) -> tuple[Tensor, Tensor]:
    """Outputs of each pair's expert (R A, H) and of the shared one (R, H)."""
    num_rows, (num_experts, width, hidden), shared_width = len(x_RH), up_EIH.shape, shared_IH.shape[0]
    num_pairs, with_shared, device = chosen_RA.numel(), num_rows <= ROWS, x_RH.device
    tile, overlap = tile or TILES[min(x_RH.element_size(), 4)], overlapping(device)
    up_EIH, down_EHI, shared_IH, shared_HI = (t.contiguous() for t in (up_EIH, down_EHI, shared_IH, shared_HI))
    order_M, starts_E, used_E = (
        torch.empty(length, dtype=torch.int32, device=device)
        for length in (num_pairs, num_experts + 1, num_experts + 1)
    )
    _plan_kernel[(num_experts,)](
        chosen_RA, order_M, starts_E, used_E, num_pairs, num_experts, PAIRS=max(16, triton.next_power_of_2(num_pairs)),
        EXPERTS=triton.next_power_of_2(num_experts + 1), num_warps=4, **overlap,
    )  # fmt: skip
    inner_MI, out_MH = x_RH.new_empty(num_pairs, width), x_RH.new_empty(num_pairs, hidden)
    if with_shared:
        shared_inner_RI, shared_out_RH = x_RH.new_empty(num_rows, shared_width), torch.empty_like(x_RH)
    else:
        shared_inner_RI = functional.linear(x_RH, shared_IH).relu_()
        shared_out_RH = functional.linear(shared_inner_RI * shared_inner_RI, shared_HI)
    sizes = {
        "width": width, "shared_width": shared_width, "hidden": hidden, "WITH_SHARED": with_shared, "ROWS": ROWS,
        "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    } | overlap  # fmt: skip
    most, most_experts = num_at_once(tile.per_processor, device), min(num_experts, num_pairs)
    shared_tiles = [triton.cdiv(size, tile.outputs) if with_shared else 0 for size in (shared_width, hidden)]
    routed_tiles = [most_experts * triton.cdiv(size, tile.outputs) for size in (width, hidden)]
    _up_kernel[(num_programs(shared_tiles[0] + routed_tiles[0], most),)](
        x_RH, order_M, starts_E, used_E, up_EIH, shared_IH, inner_MI, shared_inner_RI, num_rows, num_experts,
        **sizes, PER_TOKEN=chosen_RA.shape[1],
    )  # fmt: skip
    _down_kernel[(num_programs(shared_tiles[1] + routed_tiles[1], most),)](
        inner_MI, shared_inner_RI, order_M, starts_E, used_E, down_EHI, shared_HI, out_MH, shared_out_RH,
        num_rows, num_experts, **sizes,
    )  # fmt: skip
    return out_MH, shared_out_RH
