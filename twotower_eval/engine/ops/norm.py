"""RMS normalisation, plain and gated, in float32 whatever the model's dtype. Shape letters: see ops/__init__."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from twotower_eval.engine.ops import kernels


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in float32, cast back to ``x.dtype``."""
    one = x.numel() == x.shape[-1] and eps > 0  # with eps 0 a row of zeros is left to torch
    if one and x.dtype == weight_H.dtype == torch.float32 and _is_plain(x, weight_H):
        return _rms_norm_of_one(x, weight_H, eps)
    wide = x.float()
    if not _is_plain(wide, weight_H):
        return functional.rms_norm(wide, (x.shape[-1],), weight_H.float(), eps).to(x.dtype)
    return (wide * _inverse_rms(wide, eps)).mul_(weight_H).to(x.dtype)


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
    """The residual stream plus the last layer's output, and the next layer's input in the weight's dtype.

    ``x + gate * mixed``, and its norm; adaLN scales and shifts before it (``before``) or after. None: left out.
    Rows of gate, shift and gain are a batch row's, or one for all.
    """
    if kernels.may_serve(x_BSH, weight_H, mixed_BSH, gate_B1H, shift_B1H, gain_B1H):
        kernel = ADD_NORM.on(x_BSH.device, weight_H.dtype)
        if kernel is not None:
            fused: tuple[Tensor, Tensor] = kernel(
                x_BSH, mixed_BSH, gate_B1H, weight_H, eps, shift_B1H, gain_B1H, before
            )
            return fused
    if mixed_BSH is not None:
        x_BSH = x_BSH + (mixed_BSH if gate_B1H is None else gate_B1H * mixed_BSH)
    if shift_B1H is None or gain_B1H is None:
        return x_BSH, _normed(x_BSH, weight_H, eps)
    if before:
        return x_BSH, _normed(x_BSH * gain_B1H + shift_B1H, weight_H, eps)
    return x_BSH, _normed(x_BSH, weight_H, eps) * gain_B1H + shift_B1H


def _normed(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    normed = rms_norm(x, weight_H, eps)
    return normed if normed.dtype == weight_H.dtype else normed.to(weight_H.dtype)


def add_norm_reference(
    x_BSH: Tensor,
    mixed_BSH: Tensor | None,
    gate_B1H: Tensor | None,
    weight_H: Tensor,
    eps: float,
    shift_B1H: Tensor | None,
    gain_B1H: Tensor | None,
    before: bool,
) -> tuple[Tensor, Tensor]:
    """Reference for :func:`add_norm`, by the norm's formula."""
    sum_BSH = x_BSH
    if mixed_BSH is not None:
        sum_BSH = x_BSH + (mixed_BSH if gate_B1H is None else gate_B1H * mixed_BSH)
    gain, shift = (1.0, 0.0) if gain_B1H is None or shift_B1H is None else (gain_B1H, shift_B1H)
    if before:
        return sum_BSH, rms_norm_reference(sum_BSH * gain + shift, weight_H, eps).to(weight_H.dtype)
    return sum_BSH, rms_norm_reference(sum_BSH, weight_H, eps).to(weight_H.dtype) * gain + shift


def rms_norm_reference(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """RMS norm exactly as its formula is written."""
    wide = x.float()
    return (weight_H.float() * wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """Mamba-2's output norm: gate first (``y * silu(z)``), then RMS over each of ``num_groups`` contiguous groups.

    ``y`` and ``z`` are (..., di), ``weight`` (di,). Float32 inside; the result has ``z``'s dtype.
    """
    if kernels.may_serve(z, y, weight):
        kernel = GATED_NORM.on(z.device, z.dtype)
        if kernel is not None:
            fused: Tensor = kernel(y, z, weight, eps, num_groups)
            return fused
    gated = y.float() * functional.silu(z.float())
    grouped = gated.unflatten(-1, (num_groups, -1))
    if not _is_plain(gated, weight):
        scaled = functional.rms_norm(grouped, (grouped.shape[-1],), None, eps).flatten(-2)
        return (scaled * weight.float()).to(z.dtype)
    result: Tensor = (grouped * _inverse_rms(grouped, eps)).flatten(-2).mul_(weight).to(z.dtype)
    return result


def gated_group_rms_norm_reference(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """Reference for :func:`gated_group_rms_norm`, one group at a time."""
    gated = y.float() * (z.float() * torch.sigmoid(z.float()))
    groups = [g / torch.sqrt((g * g).mean(-1, keepdim=True) + eps) for g in gated.chunk(num_groups, dim=-1)]
    return (torch.cat(groups, dim=-1) * weight.float()).to(z.dtype)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """On a CPU without gradients, where torch's own norm is not the fastest."""
    return bool(x.is_cpu) and not (x.requires_grad or weight.requires_grad)


def _rms_norm_of_one(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """A single row: its mean square is a number on the host, and one call does the rest."""
    flat = x.view(-1)
    mean_square = torch.dot(flat, flat).item() / flat.shape[0]
    return torch.addcmul(_constant(0.0, x.device), x, weight_H, value=(mean_square + eps) ** -0.5)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, kept: three calls, where torch's own norm makes six on a
    CPU (measured: 6 us against 9 for one row, for rows in two groups 7 against 19)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, device=device)


def _load_add_norm() -> Callable[..., tuple[Tensor, Tensor]]:
    from twotower_eval.engine.ops.fused import norms

    return norms.add_norm


def _load_gated_norm() -> Callable[..., Tensor]:
    from twotower_eval.engine.ops.fused import norms

    return norms.gated_group_rms_norm


def _add_norm_pairs(
    kernel: Callable[..., tuple[Tensor, Tensor]], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """A norm alone, with a sum before it, with adaLN on either side of it, of each row's own and of all rows."""
    found: list[tuple[Tensor, Tensor]] = []
    x_BSH, mixed_BSH = (kernels.seeded((3, 5, 320), device, precision, seed) for seed in (0, 1))
    weight_H = kernels.seeded((320,), device, precision, seed=2)
    # Shift and gate lie apart, between each other, as a model has them; the gain is a tensor of its own.
    shift_B1H, gain_B1H, gate_B1H = kernels.seeded((3, 3, 1, 320), device, precision, seed=3).unbind(1)
    gain_B1H = gain_B1H.contiguous()
    none = (None, None)
    for given in (
        (x_BSH, None, None, weight_H, 1e-5, *none, False),
        (x_BSH, mixed_BSH, None, weight_H, 1e-5, *none, False),
        (x_BSH, mixed_BSH, gate_B1H, weight_H, 1e-5, shift_B1H, gain_B1H, True),
        (x_BSH, mixed_BSH, gate_B1H[:1], weight_H, 1e-5, shift_B1H[:1], gain_B1H[:1], False),
        (x_BSH.float(), mixed_BSH, gate_B1H, weight_H, 1e-5, shift_B1H, gain_B1H, False),
    ):
        found += zip(kernel(*given), add_norm_reference(*given), strict=True)
    return found


def _gated_norm_pairs(
    kernel: Callable[..., Tensor], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """Rows of a gate that lie apart, groups of another length than a power of two."""
    y_RI = kernels.seeded((5, 288), device, torch.float32, seed=0)
    z_RI = kernels.seeded((5, 700), device, precision, seed=1)[:, :288]
    given = (y_RI, z_RI, kernels.seeded((288,), device, precision, seed=2), 1e-5, 3)
    return [(kernel(*given), gated_group_rms_norm_reference(*given))]


ADD_NORM = kernels.register(kernels.Kernel(name="fused norm", load=_load_add_norm, pairs=_add_norm_pairs))
GATED_NORM = kernels.register(kernels.Kernel(name="fused gated norm", load=_load_gated_norm, pairs=_gated_norm_pairs))
