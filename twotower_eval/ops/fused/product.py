"""One row times a weight: nothing but a stream of the weight, whose next rows are asked for before these are summed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_eval.ops.fused.overlap import let_next_begin, num_at_once, num_programs, overlapping, wait_for_previous

# Measured on an H200 in bfloat16: numbers of a weight that a program reads at a time, its warps, and how many such
# programs a processor holds.
PIECE, NUM_WARPS, PER_PROCESSOR = 8192, 4, 4
MAX_INPUTS = 8192


@triton.jit
def weight_rows(
    weight_ptr, first, num_outputs, num_inputs: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):  # fmt: skip
    """Rows of a weight from ``first`` on, whole, (OUTPUTS, INPUTS); zeros behind the last."""
    outputs, inputs = first + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    at = outputs[:, None].to(tl.int64) * num_inputs + inputs[None, :]
    return tl.load(weight_ptr + at, mask=(outputs < num_outputs)[:, None] & (inputs < num_inputs)[None, :], other=0.0)


@triton.jit
def row_of(x_ptr, num_inputs: tl.constexpr, INPUTS: tl.constexpr):
    """A row (INPUTS,) float32, zeros behind its end."""
    inputs = tl.arange(0, INPUTS)
    return tl.load(x_ptr + inputs, mask=inputs < num_inputs, other=0.0).to(tl.float32)


@triton.jit
def times_row(weight, x):
    """Rows of a weight times a row, (OUTPUTS,) float32."""
    return tl.sum(weight.to(tl.float32) * x[None, :], axis=1)


@triton.jit
def _row_kernel(
    x_ptr, weight_ptr, out_ptr, num_outputs, num_inputs: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    first, step = tl.program_id(0) * OUTPUTS, tl.num_programs(0) * OUTPUTS
    weight = weight_rows(weight_ptr, first, num_outputs, num_inputs, OUTPUTS, INPUTS)
    wait_for_previous(OVERLAP)
    x = row_of(x_ptr, num_inputs, INPUTS)
    while first < num_outputs:
        coming = weight_rows(weight_ptr, first + step, num_outputs, num_inputs, OUTPUTS, INPUTS)
        outputs = first + tl.arange(0, OUTPUTS)
        tl.store(out_ptr + outputs, times_row(weight, x).to(out_ptr.dtype.element_ty), mask=outputs < num_outputs)
        weight = coming
        first += step


def tile(num_inputs: int) -> tuple[int, int]:
    """Outputs and inputs of a piece: a power of two of whole rows."""
    inputs = triton.next_power_of_2(num_inputs)
    return max(1, PIECE // inputs), inputs


def linear_of_row(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x @ weight.T`` for a single row of up to ``MAX_INPUTS``, (..., O)."""
    num_outputs, num_inputs = weight_OI.shape
    outputs, inputs = tile(num_inputs)
    out = torch.empty(*x.shape[:-1], num_outputs, dtype=x.dtype, device=x.device)
    _row_kernel[(num_programs(triton.cdiv(num_outputs, outputs), num_at_once(PER_PROCESSOR, x.device)),)](
        x.contiguous(), weight_OI.contiguous(), out, num_outputs, num_inputs,
        OUTPUTS=outputs, INPUTS=inputs, num_warps=NUM_WARPS, **overlapping(x.device, weight_OI),
    )  # fmt: skip
    return out
