"""One row times a weight, and kernels that begin while the one before them ends (programmatic dependent launch)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIRST_CAPABILITY = (9, 0)


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """Lets the next kernel begin once all programs reach this line; it still waits for the end of this one."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Waits until everything that earlier kernels wrote can be read."""
    if OVERLAP:
        gdc_wait()


def overlapping(device: torch.device, *weights: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch on this device; weights that have to be laid out anew first are not there at once."""
    able = _can_overlap(device) and all(weight.is_contiguous() for weight in weights)
    return {"OVERLAP": able, "launch_pdl": able} if able else {"OVERLAP": False}


@cache
def _can_overlap(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    )


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Outputs of a program, inputs that it reads at a time, and how it is run."""

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int = 1


# Measured on an H200 in bfloat16; inputs are read at once, up to so many.
ONE_ROW = Tile(outputs=2, inputs=4096, num_warps=4)


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
def _row_kernel(
    x_ptr, weight_ptr, out_ptr, num_outputs, num_inputs: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    out = row_product(x_ptr, weight_ptr, outputs, num_outputs, num_inputs, OUTPUTS, INPUTS, OVERLAP)
    tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=outputs < num_outputs)


def linear_of_row(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x @ weight.T`` for a single row, (..., O)."""
    num_outputs, num_inputs = weight_OI.shape
    tile = tile_for(num_inputs)
    out = torch.empty(*x.shape[:-1], num_outputs, dtype=x.dtype, device=x.device)
    _row_kernel[(triton.cdiv(num_outputs, tile.outputs),)](
        x.contiguous(), weight_OI.contiguous(), out, num_outputs, num_inputs,
        OUTPUTS=tile.outputs, INPUTS=tile.inputs, num_warps=tile.num_warps, **overlapping(x.device, weight_OI),
    )  # fmt: skip
    return out


def tile_for(num_inputs: int) -> Tile:
    """All inputs at once where they are few; then as many rows as make up a usual tile."""
    inputs = min(triton.next_power_of_2(num_inputs), ONE_ROW.inputs)
    return Tile(outputs=ONE_ROW.outputs * ONE_ROW.inputs // inputs, inputs=inputs, num_warps=ONE_ROW.num_warps)
