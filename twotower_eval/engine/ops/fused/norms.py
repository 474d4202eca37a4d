"""Norms in one launch each: with the residual sum and adaLN before or behind it, and Mamba-2's gated one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_eval.engine.ops.fused.product import let_next_begin, overlapping, wait_for_previous


@triton.jit
def _add_norm_kernel(
    x_ptr, mixed_ptr, gate_ptr, shift_ptr, gain_ptr, weight_ptr, sum_ptr, normed_ptr,
    gate_stride, shift_stride, gain_stride, num_positions, hidden, eps,
    HAS_MIXED: tl.constexpr, HAS_GATE: tl.constexpr, MODULATED: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    batch = row // num_positions
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    residual_type: tl.constexpr = x_ptr.dtype.element_ty
    weight_type: tl.constexpr = weight_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded wherever the plain form rounds.
    if HAS_MIXED:
        mixed = tl.load(mixed_ptr + row * hidden + columns, mask=inside, other=0.0)
        if HAS_GATE:
            gate = tl.load(gate_ptr + batch * gate_stride + columns, mask=inside, other=0.0)
            mixed = (mixed.to(tl.float32) * gate.to(tl.float32)).to(mixed_ptr.dtype.element_ty)
        x = (x + mixed.to(tl.float32)).to(residual_type)
        tl.store(sum_ptr + row * hidden + columns, x, mask=inside)
        x = x.to(tl.float32)
    if MODULATED:
        gain = tl.load(gain_ptr + batch * gain_stride + columns, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + batch * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if BEFORE:
            x = ((x * gain).to(residual_type).to(tl.float32) + shift).to(residual_type).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps) * weight
    if MODULATED and not BEFORE:
        normed = normed.to(residual_type).to(weight_type).to(tl.float32)
        normed = (normed * gain).to(weight_type).to(tl.float32) + shift
    tl.store(normed_ptr + row * hidden + columns, normed.to(weight_type), mask=inside)


def add_norm(
    x_BSH: Tensor,
    mixed_BSH: Tensor | None,
    gate_B1H: Tensor | None,
    weight_H: Tensor,
    eps: float,
    shift_B1H: Tensor | None,
    gain_B1H: Tensor | None,
    before: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`twotower_eval.engine.ops.norm.add_norm_reference`."""
    batch_size, num_positions, hidden = x_BSH.shape
    x_BSH = x_BSH.contiguous()
    normed_BSH = torch.empty(x_BSH.shape, dtype=weight_H.dtype, device=x_BSH.device)
    sum_BSH = x_BSH if mixed_BSH is None else torch.empty_like(x_BSH)
    absent = x_BSH  # a pointer that is not read
    block = triton.next_power_of_2(hidden)
    _add_norm_kernel[(batch_size * num_positions,)](
        x_BSH,
        absent if mixed_BSH is None else mixed_BSH.contiguous(),
        absent if gate_B1H is None else gate_B1H,
        absent if shift_B1H is None else shift_B1H,
        absent if gain_B1H is None else gain_B1H,
        weight_H,
        sum_BSH,
        normed_BSH,
        _batch_stride(gate_B1H),
        _batch_stride(shift_B1H),
        _batch_stride(gain_B1H),
        num_positions,
        hidden,
        eps,
        HAS_MIXED=mixed_BSH is not None,
        HAS_GATE=gate_B1H is not None,
        MODULATED=gain_B1H is not None,
        BEFORE=before,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
        **overlapping(x_BSH.device),
    )
    return sum_BSH, normed_BSH


def _batch_stride(rows_B1H: Tensor | None) -> int:
    """0 where one row serves the whole batch."""
    return 0 if rows_B1H is None or rows_B1H.shape[0] == 1 else rows_B1H.stride(0)


@triton.jit
def _gated_norm_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, z_stride, inner, group_size, eps,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < group_size
    at = group * group_size + columns
    z = tl.load(z_ptr + row * z_stride + at, mask=inside, other=0.0).to(tl.float32)
    gated = tl.load(y_ptr + row * inner + at, mask=inside, other=0.0).to(tl.float32) * (z * tl.sigmoid(z))
    scaled = gated * tl.rsqrt(tl.sum(gated * gated, axis=0) / group_size + eps)
    out = scaled * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * inner + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """See :func:`twotower_eval.engine.ops.norm.gated_group_rms_norm`; rows of ``z`` may lie apart."""
    inner = weight.shape[0]
    y_RI, z_RI = y.reshape(-1, inner), z.reshape(-1, inner)
    z_RI = z_RI if z_RI.stride(1) == 1 else z_RI.contiguous()
    y_RI = y_RI.contiguous()
    out_RI = torch.empty(y_RI.shape, dtype=z.dtype, device=z.device)
    group_size = inner // num_groups
    block = triton.next_power_of_2(group_size)
    _gated_norm_kernel[(len(y_RI), num_groups)](
        y_RI, z_RI, weight, out_RI, z_RI.stride(0), inner, group_size, eps,
        BLOCK=block, num_warps=4 if block >= 512 else 1, **overlapping(z.device),
    )  # fmt: skip
    return out_RI.view(z.shape)
