"""RMS normalisation, plain and gated, in float32 whatever the model's dtype. Shape letters: see ops/__init__."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in float32, cast back to ``x.dtype``."""
    scaled = functional.rms_norm(x.float(), (x.shape[-1],), weight_H.float(), eps)
    return scaled.to(x.dtype)


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
    scaled = functional.rms_norm(grouped, (grouped.shape[-1],), None, eps).flatten(-2)
    return (scaled * weight.float()).to(z.dtype)


def gated_group_rms_norm_reference(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """The same, one group at a time."""
    gated = y.float() * (z.float() * torch.sigmoid(z.float()))
    groups = [g / torch.sqrt((g * g).mean(-1, keepdim=True) + eps) for g in gated.chunk(num_groups, dim=-1)]
    return (torch.cat(groups, dim=-1) * weight.float()).to(z.dtype)
