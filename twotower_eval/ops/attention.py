"""Grouped-query attention without positional encoding. Shape letters: see ops/__init__."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def attention(
    q_BQSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention, (B, Q, S, D). Query head q reads key-value head ``q // (Q / J)``.

    ``mask`` is boolean, True where a query may look, broadcastable to (B, 1, S, T); every query must see a key.
    """
    grouped = q_BQSD.shape[1] != k_BJTD.shape[1]
    return functional.scaled_dot_product_attention(
        q_BQSD, k_BJTD, v_BJTD, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
    )


def attention_reference(
    q_BQSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """Softmax written out in float32, heads repeated."""
    repeats = q_BQSD.shape[1] // k_BJTD.shape[1]
    k, v = k_BJTD.repeat_interleave(repeats, dim=1), v_BJTD.repeat_interleave(repeats, dim=1)
    scores_BQST = q_BQSD.float() @ k.float().transpose(-1, -2) / math.sqrt(q_BQSD.shape[-1])
    if is_causal:
        causal = torch.ones(scores_BQST.shape[-2:], dtype=torch.bool, device=q_BQSD.device).tril()
        scores_BQST = scores_BQST.masked_fill(~causal, -torch.inf)
    if mask is not None:
        scores_BQST = scores_BQST.masked_fill(~mask, -torch.inf)
    return (scores_BQST.softmax(-1) @ v.float()).to(q_BQSD.dtype)
