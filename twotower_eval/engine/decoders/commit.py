"""Which masked positions a step commits: a pure rule (TWOTOWER: confidence unmasking). B batch, K block."""

from __future__ import annotations

import torch
from torch import Tensor


def num_commits(above_B: Tensor, masked_B: Tensor, steps_left_B: Tensor) -> Tensor:
    """``max(1, masked above the threshold, ceil(masked / steps left))``, capped at the number masked; (B,) int64."""
    floor_B = torch.div(masked_B + steps_left_B - 1, steps_left_B, rounding_mode="floor")
    return torch.minimum(torch.maximum(above_B, floor_B).clamp(min=1), masked_B)


def commit(confidence_BK: Tensor, masked_BK: Tensor, steps_left_B: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Positions to commit (B, K) and how many of them the floor forced (B,).

    The most confident masked positions go first; of equal confidences the higher positions (the reference sorts
    ascending and stably, and takes the end). "Above" is strict. A forced commit is one whose confidence does not
    exceed the threshold.
    """
    above_BK = masked_BK & (confidence_BK > threshold)
    wanted_B = num_commits(above_BK.sum(1), masked_BK.sum(1), steps_left_B)
    order_BK = confidence_BK.masked_fill(~masked_BK, -torch.inf).argsort(dim=1, stable=True)
    block_size = confidence_BK.shape[1]
    from_end_K = torch.arange(block_size - 1, -1, -1, device=confidence_BK.device)
    taken_BK = torch.zeros_like(masked_BK).scatter(1, order_BK, from_end_K < wanted_B[:, None])
    return taken_BK, (taken_BK & ~above_BK).sum(1)
