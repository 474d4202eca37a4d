"""A token tree as one row of a transformers model: every token sees its ancestors alone, at the position it has below
them. Nothing is padded and the context's keys and values are not copied for each branch.

Shape letters: see ops/__init__. N tokens of the tree, T of context and tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from twotower_eval.engine.models.protocol import Segment
from twotower_eval.engine.models.transformers_types import CacheLayer, Config

# Rotary embeddings that depend on how long the whole row is: what is read first would have to be read again.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def packed(segments: Sequence[Segment], known: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids (1, N), positions (1, N), additive mask (1, 1, N, T) and columns (M,) of the wanted logits.

    ``known`` tokens of context stand before the tree.
    """
    starts: list[int] = []
    ends: list[int] = []
    depths: list[int] = []  # tokens before the segment, on its own branch
    for segment in segments:
        starts.append(ends[-1] if ends else 0)
        ends.append(starts[-1] + len(segment.tokens))
        depths.append(known if segment.parent < 0 else depths[segment.parent] + len(segments[segment.parent].tokens))
    seen_NT = torch.zeros(ends[-1], known + ends[-1], dtype=torch.bool)
    seen_NT[:, :known] = True
    for segment, start, end in zip(segments, starts, ends, strict=True):
        if segment.parent >= 0:
            # The parent's last token sees exactly what every token of this segment sees before its own segment.
            seen_NT[start:end] = seen_NT[ends[segment.parent] - 1]
        seen_NT[start:end, known + start : known + end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    ids_1N = torch.tensor([[token for segment in segments for token in segment.tokens]])
    position_1N = torch.cat([torch.arange(d, d + e - s) for s, e, d in zip(starts, ends, depths, strict=True)])[None]
    columns_M = torch.tensor([s + at for segment, s in zip(segments, starts, strict=True) for at in segment.wanted])
    mask_NT = torch.zeros(seen_NT.shape, dtype=dtype).masked_fill_(~seen_NT, torch.finfo(dtype).min)
    return ids_1N, position_1N, mask_NT[None, None], columns_M.long()


def keeps_all_keys(config: Config, layers: Sequence[CacheLayer]) -> bool:
    """Whether every layer keeps all keys (no window that a mask of ours would undo) at positions fixed for good."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    classes: set[type[object]] = set(map(type, layers))
    return classes <= {DynamicLayer} and not kinds & LENGTH_DEPENDENT_ROPE
