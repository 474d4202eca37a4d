"""One row through its experts, as they come, and through the shared one: two streams of weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_eval.ops.fused import product
from twotower_eval.ops.fused.overlap import let_next_begin, num_at_once, num_programs, overlapping, wait_for_previous
from twotower_eval.ops.fused.product import row_of, times_row, weight_rows


@triton.jit
def store_squared_relu(inner_ptr, value, at, mask):
    """``relu(value)^2``, rounded where the plain form rounds."""
    kept = tl.maximum(value, 0.0).to(inner_ptr.dtype.element_ty).to(tl.float32)
    tl.store(inner_ptr + at, (kept * kept).to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _up_rows(
    chosen_ptr, up_ptr, shared_ptr, tile, num_shared, width: tl.constexpr, shared_width: tl.constexpr,
    hidden: tl.constexpr, PER_TOKEN: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """The rows of a tile's weight: the shared expert's tiles first, then those of the chosen ones in turn."""
    if tile < num_shared:
        weight = weight_rows(shared_ptr, tile * OUTPUTS, shared_width, hidden, OUTPUTS, INPUTS)
    else:
        routed = tile - num_shared
        expert_ptr = up_ptr + tl.load(chosen_ptr + routed % PER_TOKEN) * width * hidden
        weight = weight_rows(expert_ptr, (routed // PER_TOKEN) * OUTPUTS, width, hidden, OUTPUTS, INPUTS)
    return weight


@triton.jit
def _up_row_kernel(
    x_ptr, chosen_ptr, up_ptr, shared_ptr, inner_ptr, shared_inner_ptr,
    width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr,
    PER_TOKEN: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tile, step = tl.program_id(0), tl.num_programs(0)
    num_shared = tl.cdiv(shared_width, OUTPUTS)
    num_tiles = num_shared + PER_TOKEN * tl.cdiv(width, OUTPUTS)
    # The shared expert's weight need not wait for who was chosen.
    weight = weight_rows(shared_ptr, tile * OUTPUTS, shared_width, hidden, OUTPUTS, INPUTS)
    wait_for_previous(OVERLAP)
    let_next_begin(OVERLAP)  # only now: the next kernel reads who was chosen before it waits
    x = row_of(x_ptr, hidden, INPUTS)
    if tile >= num_shared:
        weight = _up_rows(
            chosen_ptr, up_ptr, shared_ptr, tile, num_shared, width, shared_width, hidden, PER_TOKEN, OUTPUTS, INPUTS
        )
    while tile < num_tiles:
        coming = _up_rows(
            chosen_ptr, up_ptr, shared_ptr, tile + step, num_shared, width, shared_width, hidden, PER_TOKEN, OUTPUTS,
            INPUTS,
        )  # fmt: skip
        value = times_row(weight, x)
        if tile < num_shared:
            outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
            store_squared_relu(shared_inner_ptr, value, outputs, outputs < shared_width)
        else:
            routed = tile - num_shared
            outputs = (routed // PER_TOKEN) * OUTPUTS + tl.arange(0, OUTPUTS)
            store_squared_relu(inner_ptr, value, (routed % PER_TOKEN) * width + outputs, outputs < width)
        weight = coming
        tile += step


@triton.jit
def _down_row_kernel(
    inner_ptr, shared_inner_ptr, chosen_ptr, down_ptr, shared_ptr, out_ptr, shared_out_ptr,
    width: tl.constexpr, shared_width: tl.constexpr, hidden: tl.constexpr, PER_TOKEN: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SHARED_OUTPUTS: tl.constexpr, SHARED_INPUTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    first, step = tl.program_id(0) * SHARED_OUTPUTS, tl.num_programs(0) * SHARED_OUTPUTS
    weight = weight_rows(shared_ptr, first, hidden, shared_width, SHARED_OUTPUTS, SHARED_INPUTS)
    # Who was chosen is there: the kernel before had waited for it when it let this one begin.
    slot = tl.program_id(0) % PER_TOKEN
    expert_ptr = down_ptr + tl.load(chosen_ptr + slot, cache_modifier=".cg") * width * hidden
    wait_for_previous(OVERLAP)
    x = row_of(shared_inner_ptr, shared_width, SHARED_INPUTS)
    while first < hidden:
        coming = weight_rows(shared_ptr, first + step, hidden, shared_width, SHARED_OUTPUTS, SHARED_INPUTS)
        outputs = first + tl.arange(0, SHARED_OUTPUTS)
        value = times_row(weight, x).to(shared_out_ptr.dtype.element_ty)
        tl.store(shared_out_ptr + outputs, value, mask=outputs < hidden)
        weight = coming
        first += step

    first, step = (tl.program_id(0) // PER_TOKEN) * OUTPUTS, (tl.num_programs(0) // PER_TOKEN) * OUTPUTS
    routed_weight = weight_rows(expert_ptr, first, hidden, width, OUTPUTS, INPUTS)
    routed_x = row_of(inner_ptr + slot * width, width, INPUTS)
    while first < hidden:
        routed_coming = weight_rows(expert_ptr, first + step, hidden, width, OUTPUTS, INPUTS)
        outputs = first + tl.arange(0, OUTPUTS)
        value = times_row(routed_weight, routed_x).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + slot * hidden + outputs, value, mask=outputs < hidden)
        routed_weight = routed_coming
        first += step


def outputs_of_row(
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
    device, most = x_1H.device, num_at_once(product.PER_PROCESSOR, x_1H.device)
    sizes = {"width": width, "shared_width": shared_width, "hidden": hidden, "PER_TOKEN": per_token}
    sizes |= {"num_warps": product.NUM_WARPS} | overlapping(device, up_EIH, down_EHI, shared_IH, shared_HI)
    up_EIH, down_EHI, shared_IH, shared_HI = (t.contiguous() for t in (up_EIH, down_EHI, shared_IH, shared_HI))
    outputs, inputs = product.tile(hidden)
    num_tiles = triton.cdiv(shared_width, outputs) + per_token * triton.cdiv(width, outputs)
    _up_row_kernel[(num_programs(num_tiles, most),)](
        x_1H, chosen_1A, up_EIH, shared_IH, inner_AI, shared_inner_1I, **sizes, OUTPUTS=outputs, INPUTS=inputs
    )
    outputs, inputs = product.tile(width)
    shared_outputs, shared_inputs = product.tile(shared_width)
    of_expert = num_programs(triton.cdiv(hidden, outputs), max(1, most // per_token))
    _down_row_kernel[(per_token * of_expert,)](
        inner_AI, shared_inner_1I, chosen_1A, down_EHI, shared_HI, out_AH, shared_out_1H,
        **sizes, OUTPUTS=outputs, INPUTS=inputs, SHARED_OUTPUTS=shared_outputs, SHARED_INPUTS=shared_inputs,
    )  # fmt: skip
    return out_AH, shared_out_1H
