"""A few rows times a weight that is read once.

One row is a sum of products over rows of the weight, each read whole before anything else is done; up to ``MAX_ROWS``
rows are one tile of a tensor core, past which the weight streams through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_eval.ops.fused.overlap import let_next_begin, overlapping, wait_for_previous

MAX_ROWS = 16  # of a tile


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Outputs of a program, inputs that it reads at a time, and how it is run."""

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int = 1


# Measured on an H200 in bfloat16; of one row the inputs are read at once, up to so many.
ONE_ROW, ONE_ROW_MAX_INPUTS = Tile(outputs=2, inputs=4096, num_warps=4), 4096
MANY_ROWS = {2: Tile(outputs=32, inputs=128, num_warps=4, num_stages=5),
             4: Tile(outputs=32, inputs=64, num_warps=4, num_stages=2)}  # fmt: skip


@triton.jit
def row_product(
    x_ptr, weight_ptr, outputs, num_outputs, num_inputs: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row times rows of a weight, (outputs,) float32; what earlier kernels write is waited for in here."""
    inputs = tl.arange(0, INPUTS)
    known, inside = (outputs < num_outputs)[:, None], inputs < num_inputs
    weight_ptr += outputs[:, None].to(tl.int64) * num_inputs
    weight = tl.load(weight_ptr + inputs[None, :], mask=known & inside[None, :], other=0.0)
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + inputs, mask=inside, other=0.0)
    partial = weight.to(tl.float32) * x.to(tl.float32)[None, :]
    for start in tl.static_range(INPUTS, num_inputs, INPUTS):
        inside = start + inputs < num_inputs
        weight = tl.load(weight_ptr + start + inputs[None, :], mask=known & inside[None, :], other=0.0)
        x = tl.load(x_ptr + start + inputs, mask=inside, other=0.0)
        partial += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(partial, axis=1)


@triton.jit
def rows_product(
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
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def _linear_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, num_outputs, num_inputs: tl.constexpr,
    ONE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    known = outputs < num_outputs
    if ONE:
        out = row_product(x_ptr, weight_ptr, outputs, num_outputs, num_inputs, OUTPUTS, INPUTS, OVERLAP)
        tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=known)
    else:
        wait_for_previous(OVERLAP)
        rows = tl.arange(0, ROWS)
        real = rows < num_rows
        out = rows_product(x_ptr, rows, real, weight_ptr, outputs, num_outputs, num_inputs, OUTPUTS, INPUTS)
        at = rows[:, None].to(tl.int64) * num_outputs + outputs[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=real[:, None] & known[None, :])


def linear(x: Tensor, weight_OI: Tensor, tile: Tile | None = None) -> Tensor:
    """``x @ weight.T`` for up to ``MAX_ROWS`` rows, (..., O)."""
    num_outputs, num_inputs = weight_OI.shape
    x_RI, weight_OI = x.reshape(-1, num_inputs).contiguous(), weight_OI.contiguous()
    num_rows = len(x_RI)
    tile = tile or tile_for(num_rows, num_inputs, x)
    out = torch.empty(*x.shape[:-1], num_outputs, dtype=x.dtype, device=x.device)
    _linear_kernel[(triton.cdiv(num_outputs, tile.outputs),)](
        x_RI, weight_OI, out, num_rows, num_outputs, num_inputs,
        ONE=num_rows == 1, ROWS=MAX_ROWS, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **overlapping(x.device),
    )  # fmt: skip
    return out


def tile_for(num_rows: int, num_inputs: int, x: Tensor) -> Tile:
    """What was measured to be fast; a single row's inputs as one piece where they are few enough."""
    if num_rows > 1:
        return MANY_ROWS[min(x.element_size(), 4)]
    inputs = min(triton.next_power_of_2(num_inputs), ONE_ROW_MAX_INPUTS)
    outputs = ONE_ROW.outputs * ONE_ROW.inputs // inputs
    return Tile(outputs=outputs, inputs=inputs, num_warps=ONE_ROW.num_warps)
