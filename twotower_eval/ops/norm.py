"""RMS normalisation, plain and gated, in float32 whatever the model's dtype. Shape letters: see ops/__init__."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in float32, cast back to ``x.dtype``."""
    one = x.numel() == x.shape[-1] and eps > 0  # eps 0 over a row of zeros is torch's to answer
    if one and x.dtype == weight_H.dtype == torch.float32 and _is_plain(x, weight_H):
        return _rms_norm_of_one(x, weight_H, eps)
    wide = x.float()
    if not _is_plain(wide, weight_H):
        return functional.rms_norm(wide, (x.shape[-1],), weight_H.float(), eps).to(x.dtype)
    return (wide * _inverse_rms(wide, eps)).mul_(weight_H).to(x.dtype)


def rms_norm_reference(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The formula, letter by letter."""
    wide = x.float()
    return (weight_H.float() * wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """Mamba-2's output norm: gate first (``y * silu(z)``), then RMS over each of ``num_groups`` contiguous groups.

    ``y`` and ``z`` are (..., di), ``weight`` (di,). Float32 inside; the result has ``z``'s dtype.
    """
    gated = y.float() * functional.silu(z.float())
    grouped = gated.unflatten(-1, (num_groups, -1))
    if not _is_plain(gated, weight):
        scaled = functional.rms_norm(grouped, (grouped.shape[-1],), None, eps).flatten(-2)
        return (scaled * weight.float()).to(z.dtype)
    result: Tensor = (grouped * _inverse_rms(grouped, eps)).flatten(-2).mul_(weight).to(z.dtype)
    return result


def gated_group_rms_norm_reference(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """The same, one group at a time."""
    gated = y.float() * (z.float() * torch.sigmoid(z.float()))
    groups = [g / torch.sqrt((g * g).mean(-1, keepdim=True) + eps) for g in gated.chunk(num_groups, dim=-1)]
    return (torch.cat(groups, dim=-1) * weight.float()).to(z.dtype)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """On a CPU and not to be differentiated: where torch's own norm is not the fastest."""
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
