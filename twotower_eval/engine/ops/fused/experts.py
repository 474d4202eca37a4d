"""Routing and experts: sigmoid scores in two launches; then every expert in use is read once,
whichever rows take it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from twotower_eval.engine.ops.fused.product import (
    Tile,
    let_next_begin,
    overlapping,
    row_product,
    tile_for,
    wait_for_previous,
)

COLUMNS = 1024  # that a program reads at a time


@triton.jit
def _scores_kernel(
    x_ptr, gate_ptr, out_ptr, num_experts, hidden: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    let_next_begin(OVERLAP)
    row, expert = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros([COLUMNS], dtype=tl.float64)
    wait_for_previous(OVERLAP)
    for start in tl.static_range(0, hidden, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < hidden
        gate = tl.load(gate_ptr + expert * hidden + columns, mask=inside, other=0.0).to(tl.float64)
        total += gate * tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float64)
    tl.store(out_ptr + row * num_experts + expert, tl.sum(total, axis=0))


@triton.jit
def _choose_kernel(
    scores_ptr, bias_ptr, chosen_ptr, weights_ptr, num_experts, scale,
    PER_TOKEN: tl.constexpr, SLOTS: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    row, experts = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    known = experts < num_experts
    score = tl.load(scores_ptr + row * num_experts + experts, mask=known, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-score))
    wanted = score + tl.load(bias_ptr + experts, mask=known, other=0.0).to(tl.float64)
    wanted = tl.where(known, wanted, float("-inf"))
    slots = tl.arange(0, SLOTS)
    chosen, weights = tl.zeros([SLOTS], dtype=tl.int64), tl.zeros([SLOTS], dtype=tl.float64)
    for slot in tl.static_range(PER_TOKEN):
        # Ties take the first; a NaN must not index outside the table.
        best = tl.min(tl.where(wanted == tl.max(wanted, axis=0), experts, num_experts - 1), axis=0)
        chosen = tl.where(slots == slot, best.to(tl.int64), chosen)
        weights = tl.where(slots == slot, tl.sum(tl.where(experts == best, score, 0.0), axis=0), weights)
        wanted = tl.where(experts == best, float("-inf"), wanted)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    at = row * PER_TOKEN + slots
    tl.store(chosen_ptr + at, chosen, mask=slots < PER_TOKEN)
    tl.store(weights_ptr + at, (weights * scale).to(tl.float32), mask=slots < PER_TOKEN)


def route(
    x_RH: Tensor, gate_EH: Tensor, bias_E: Tensor, experts_per_token: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`twotower_eval.engine.ops.moe.route`; experts of one group only."""
    (num_rows, hidden), num_experts = x_RH.shape, gate_EH.shape[0]
    x_RH, gate_EH = x_RH.contiguous(), gate_EH.contiguous()
    scores_RE = torch.empty(num_rows, num_experts, dtype=torch.float64, device=x_RH.device)
    chosen_RA = torch.empty(num_rows, experts_per_token, dtype=torch.int64, device=x_RH.device)
    weights_RA = torch.empty(num_rows, experts_per_token, dtype=torch.float32, device=x_RH.device)
    overlap = overlapping(x_RH.device)
    _scores_kernel[(num_rows, num_experts)](
        x_RH, gate_EH, scores_RE, num_experts, hidden=hidden, COLUMNS=COLUMNS, num_warps=4, **overlap
    )
    _choose_kernel[(num_rows,)](
        scores_RE, bias_E, chosen_RA, weights_RA, num_experts, scale,
        PER_TOKEN=experts_per_token, SLOTS=triton.next_power_of_2(experts_per_token), NORMALISE=normalise,
        BLOCK=triton.next_power_of_2(num_experts), num_warps=1, **overlap,
    )  # fmt: skip
    return chosen_RA, weights_RA


MAX_ROWS = 16  # of a tile

# By bytes per number; measured on an H200 in bfloat16, not in float32.
MANY_ROWS = {2: Tile(outputs=64, inputs=128, num_warps=4, num_stages=4),
             4: Tile(outputs=32, inputs=64, num_warps=4, num_stages=2)}  # fmt: skip


@triton.jit
def _plan_kernel(
    chosen_ptr, order_ptr, starts_ptr, num_pairs, num_experts, PAIRS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Pairs sorted by expert, and where each expert's pairs begin."""
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    expert, pairs = tl.program_id(0), tl.arange(0, PAIRS)
    there = pairs < num_pairs
    chosen = tl.load(chosen_ptr + pairs, mask=there, other=0)
    own = there & (chosen == expert)
    start = tl.sum((there & (chosen < expert)).to(tl.int32), axis=0)
    place = tl.cumsum(own.to(tl.int32), axis=0) - 1
    tl.store(order_ptr + start + place, pairs, mask=own)
    tl.store(starts_ptr + expert, start)
    if expert == num_experts - 1:
        tl.store(starts_ptr + num_experts, num_pairs)


@triton.jit
def _store_up(inner_ptr, value, at, mask):
    """``relu(value)^2``, rounded where the plain form rounds."""
    kept = tl.maximum(value, 0.0).to(inner_ptr.dtype.element_ty).to(tl.float32)
    tl.store(inner_ptr + at, (kept * kept).to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _up_row_kernel(
    x_ptr, chosen_ptr, up_ptr, shared_ptr, inner_ptr, shared_inner_ptr,
    width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr,
    PER_TOKEN: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    program, num_shared = tl.program_id(0), tl.cdiv(shared_width, OUTPUTS)
    if program < num_shared:  # the shared expert first: it does not wait for the routing
        let_next_begin(OVERLAP)
        outputs = program * OUTPUTS + tl.arange(0, OUTPUTS)
        value = row_product(x_ptr, shared_ptr, outputs, shared_width, hidden, OUTPUTS, INPUTS, OVERLAP)
        _store_up(shared_inner_ptr, value, outputs, outputs < shared_width)
    else:
        wait_for_previous(OVERLAP)
        let_next_begin(OVERLAP)  # only now: the next kernel reads the routing before it waits
        program -= num_shared
        slot, outputs = program % PER_TOKEN, (program // PER_TOKEN) * OUTPUTS + tl.arange(0, OUTPUTS)
        weight_ptr = up_ptr + tl.load(chosen_ptr + slot) * width * hidden
        value = row_product(x_ptr, weight_ptr, outputs, width, hidden, OUTPUTS, INPUTS, False)
        _store_up(inner_ptr, value, slot * width + outputs, outputs < width)


@triton.jit
def _down_row_kernel(
    inner_ptr, shared_inner_ptr, chosen_ptr, down_ptr, shared_ptr, out_ptr, shared_out_ptr,
    width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr,
    PER_TOKEN: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SHARED_INPUTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    program, num_tiles = tl.program_id(0), tl.cdiv(hidden, OUTPUTS)
    if program < num_tiles:
        outputs = program * OUTPUTS + tl.arange(0, OUTPUTS)
        value = row_product(
            shared_inner_ptr, shared_ptr, outputs, hidden, shared_width, OUTPUTS, SHARED_INPUTS, OVERLAP
        )
        tl.store(shared_out_ptr + outputs, value.to(shared_out_ptr.dtype.element_ty), mask=outputs < hidden)
    else:
        program -= num_tiles
        slot, outputs = program % PER_TOKEN, (program // PER_TOKEN) * OUTPUTS + tl.arange(0, OUTPUTS)
        # The routing is there: the kernel before waited for it, then let this one begin.
        weight_ptr = down_ptr + tl.load(chosen_ptr + slot, cache_modifier=".cg") * width * hidden
        value = row_product(inner_ptr + slot * width, weight_ptr, outputs, hidden, width, OUTPUTS, INPUTS, OVERLAP)
        at = slot * hidden + outputs
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=outputs < hidden)


@triton.jit
def _rows_product(
    x_ptr, rows, real, weight_ptr, outputs, num_outputs, num_inputs: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Rows of x (by index) times rows of a weight, (rows, outputs) float32."""
    known = outputs < num_outputs
    weight_ptr += outputs[:, None].to(tl.int64) * num_inputs
    x_ptr += rows[:, None] * num_inputs
    total = tl.zeros([rows.shape[0], OUTPUTS], dtype=tl.float32)
    for start in range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        inside = inputs < num_inputs
        weight = tl.load(weight_ptr + inputs[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + inputs[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def _up_kernel(
    x_ptr, order_ptr, starts_ptr, up_ptr, shared_ptr, inner_ptr, shared_inner_ptr, num_rows,
    width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr, PER_TOKEN: tl.constexpr,
    WITH_SHARED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    program, num_tiles = tl.program_id(0), tl.cdiv(width, OUTPUTS)
    num_shared = tl.cdiv(shared_width, OUTPUTS) if WITH_SHARED else 0
    if program >= num_shared:
        program -= num_shared
        expert, outputs = program // num_tiles, (program % num_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
        start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
        weight_ptr = up_ptr + expert.to(tl.int64) * width * hidden
        while start < end:
            places = start + tl.arange(0, ROWS)
            real = places < end
            pairs = tl.load(order_ptr + places, mask=real, other=0)
            rows = pairs // PER_TOKEN
            value = _rows_product(x_ptr, rows, real, weight_ptr, outputs, width, hidden, OUTPUTS, INPUTS)
            at = pairs[:, None] * width + outputs[None, :]
            _store_up(inner_ptr, value, at, real[:, None] & (outputs < width)[None, :])
            start += ROWS
    else:
        outputs, rows = program * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
        real = rows < num_rows
        value = _rows_product(x_ptr, rows, real, shared_ptr, outputs, shared_width, hidden, OUTPUTS, INPUTS)
        at = rows[:, None] * shared_width + outputs[None, :]
        _store_up(shared_inner_ptr, value, at, real[:, None] & (outputs < shared_width)[None, :])


@triton.jit
def _down_kernel(
    inner_ptr, shared_inner_ptr, order_ptr, starts_ptr, down_ptr, shared_ptr, out_ptr, shared_out_ptr,
    num_rows,
    width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr,
    WITH_SHARED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    program, num_tiles = tl.program_id(0), tl.cdiv(hidden, OUTPUTS)
    num_shared = num_tiles if WITH_SHARED else 0
    outputs = (program % num_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
    known = outputs < hidden
    if program >= num_shared:
        expert = (program - num_shared) // num_tiles
        start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
        weight_ptr = down_ptr + expert.to(tl.int64) * width * hidden
        while start < end:
            places = start + tl.arange(0, ROWS)
            real = places < end
            pairs = tl.load(order_ptr + places, mask=real, other=0)
            value = _rows_product(inner_ptr, pairs, real, weight_ptr, outputs, hidden, width, OUTPUTS, INPUTS)
            at = pairs[:, None] * hidden + outputs[None, :]
            tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=real[:, None] & known[None, :])
            start += ROWS
    else:
        rows = tl.arange(0, ROWS)
        real = rows < num_rows
        value = _rows_product(shared_inner_ptr, rows, real, shared_ptr, outputs, hidden, shared_width, OUTPUTS, INPUTS)
        at = rows[:, None] * hidden + outputs[None, :]
        tl.store(shared_out_ptr + at, value.to(shared_out_ptr.dtype.element_ty), mask=real[:, None] & known[None, :])


@triton.jit
def _combine_kernel(
    out_ptr, shared_ptr, weights_ptr, sum_ptr, hidden,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weighted sum of the routed outputs, in float32, plus the shared expert's."""
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
) -> Tensor:
    """See :func:`twotower_eval.engine.ops.moe.experts_and_shared`; (R, H)."""
    x_RH, chosen_RA, weights_RA = x_RH.contiguous(), chosen_RA.contiguous(), weights_RA.contiguous()
    weights = (up_EIH, down_EHI, shared_IH, shared_HI)
    if len(x_RH) == 1:
        out_MH, shared_out_RH = _of_row(x_RH, chosen_RA, *weights)
    else:
        out_MH, shared_out_RH = _of_rows(x_RH, chosen_RA, *weights)
    (num_rows, hidden), sum_RH = x_RH.shape, torch.empty_like(x_RH)
    block = min(512, triton.next_power_of_2(hidden))
    _combine_kernel[(num_rows, triton.cdiv(hidden, block))](
        out_MH, shared_out_RH, weights_RA, sum_RH, hidden,
        PER_TOKEN=chosen_RA.shape[1], BLOCK=block, num_warps=4, **overlapping(x_RH.device),
    )  # fmt: skip
    return sum_RH


def _of_row(
    x_1H: Tensor,
    chosen_1A: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    shared_IH: Tensor,
    shared_HI: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs of each chosen expert (A, H) and of the shared one (1, H)."""
    (_, width, hidden), per_token, shared_width = up_EIH.shape, chosen_1A.shape[1], shared_IH.shape[0]
    inner_AI, shared_inner_1I = x_1H.new_empty(per_token, width), x_1H.new_empty(1, shared_width)
    out_AH, shared_out_1H = x_1H.new_empty(per_token, hidden), torch.empty_like(x_1H)
    sizes = {"width": width, "shared_width": shared_width, "hidden": hidden, "PER_TOKEN": per_token}
    sizes |= overlapping(x_1H.device, up_EIH, down_EHI, shared_IH, shared_HI)
    up_EIH, down_EHI, shared_IH, shared_HI = (t.contiguous() for t in (up_EIH, down_EHI, shared_IH, shared_HI))
    up, down, shared_inputs = tile_for(hidden), tile_for(width), tile_for(shared_width).inputs
    _up_row_kernel[(triton.cdiv(shared_width, up.outputs) + per_token * triton.cdiv(width, up.outputs),)](
        x_1H, chosen_1A, up_EIH, shared_IH, inner_AI, shared_inner_1I,
        **sizes, OUTPUTS=up.outputs, INPUTS=up.inputs, num_warps=up.num_warps,
    )  # fmt: skip
    _down_row_kernel[((1 + per_token) * triton.cdiv(hidden, down.outputs),)](
        inner_AI, shared_inner_1I, chosen_1A, down_EHI, shared_HI, out_AH, shared_out_1H,
        **sizes, OUTPUTS=down.outputs, INPUTS=down.inputs, SHARED_INPUTS=shared_inputs, num_warps=down.num_warps,
    )  # fmt: skip
    return out_AH, shared_out_1H


def _of_rows(
    x_RH: Tensor,
    chosen_RA: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    shared_IH: Tensor,
    shared_HI: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs of each pair's expert (R A, H) and of the shared one (R, H)."""
    num_rows, (num_experts, width, hidden), shared_width = len(x_RH), up_EIH.shape, shared_IH.shape[0]
    num_pairs, with_shared, overlap = chosen_RA.numel(), num_rows <= MAX_ROWS, overlapping(x_RH.device)
    tile = MANY_ROWS[min(x_RH.element_size(), 4)]
    up_EIH, down_EHI, shared_IH, shared_HI = (t.contiguous() for t in (up_EIH, down_EHI, shared_IH, shared_HI))
    order_M = torch.empty(num_pairs, dtype=torch.int32, device=x_RH.device)
    starts_E = torch.empty(num_experts + 1, dtype=torch.int32, device=x_RH.device)
    _plan_kernel[(num_experts,)](
        chosen_RA, order_M, starts_E, num_pairs, num_experts,
        PAIRS=max(16, triton.next_power_of_2(num_pairs)), num_warps=4, **overlap,
    )  # fmt: skip
    inner_MI, out_MH = x_RH.new_empty(num_pairs, width), x_RH.new_empty(num_pairs, hidden)
    if with_shared:
        shared_inner_RI, shared_out_RH = x_RH.new_empty(num_rows, shared_width), torch.empty_like(x_RH)
    else:
        shared_inner_RI = functional.linear(x_RH, shared_IH).relu_()
        shared_out_RH = functional.linear(shared_inner_RI * shared_inner_RI, shared_HI)
    sizes = {
        "width": width, "shared_width": shared_width, "hidden": hidden, "WITH_SHARED": with_shared, "ROWS": MAX_ROWS,
        "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    } | overlap  # fmt: skip
    shared_tiles = [triton.cdiv(size, tile.outputs) if with_shared else 0 for size in (shared_width, hidden)]
    _up_kernel[(shared_tiles[0] + num_experts * triton.cdiv(width, tile.outputs),)](
        x_RH, order_M, starts_E, up_EIH, shared_IH, inner_MI, shared_inner_RI, num_rows,
        **sizes, PER_TOKEN=chosen_RA.shape[1],
    )  # fmt: skip
    _down_kernel[(shared_tiles[1] + num_experts * triton.cdiv(hidden, tile.outputs),)](
        inner_MI, shared_inner_RI, order_M, starts_E, down_EHI, shared_HI, out_MH, shared_out_RH,
        num_rows, **sizes,
    )  # fmt: skip
    return out_MH, shared_out_RH
