"""Cutting a distribution before a token is chosen: top-k and top-p. Logits of any shape with the vocabulary last."""

from __future__ import annotations

import torch
from torch import Tensor


def within_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits below the k-th largest at the dtype's minimum; ties of the k-th stay."""
    least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)


def within_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Logits outside of the smallest set of tokens that holds ``top_p`` of the probability at the dtype's minimum.

    The token that crosses ``top_p`` is inside.
    """
    ordered, order = logits.sort(descending=True, dim=-1)
    crossed = ordered.softmax(-1).cumsum(-1) > top_p
    outside = torch.cat([torch.zeros_like(crossed[..., :1]), crossed[..., :-1]], dim=-1)
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), torch.finfo(logits.dtype).min)
