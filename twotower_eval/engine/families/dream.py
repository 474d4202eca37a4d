"""Dream: a Qwen2 whose tokens all see each other (Ye et al., arXiv 2508.15487). Logits at p predict token p + 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.families.backbone import Backbone
from twotower_eval.engine.families.canvas import CanvasModel
from twotower_eval.engine.families.settings import load_on_backbone

MASK_TOKEN_ID = 151666  # of the published checkpoints


class Dream(CanvasModel):
    """The network; ``backbone`` is transformers' Qwen2."""

    shift = 1

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def canvas_logits(self, ids_BS: Tensor, lengths: Sequence[int]) -> Tensor:
        """Every token sees every token of its row; positions count from 0, and padding neither sees nor is seen."""
        return self.backbone.logits(ids_BS, *_seen(ids_BS, lengths))

    def logits_at(self, ids_BS: Tensor, lengths: Sequence[int], places_BK: Tensor, t_B: object) -> Tensor:
        """The head reads these places alone."""
        return self.backbone.logits(ids_BS, *_seen(ids_BS, lengths), places_BM=places_BK)


def _seen(ids_BS: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Positions (B, S), and what each token sees (B, S, S)."""
    positions_S = torch.arange(ids_BS.shape[1])
    real_BS = positions_S < torch.tensor(lengths)[:, None]
    return positions_S.expand_as(ids_BS), real_BS[:, :, None] & real_BS[:, None, :]


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> Dream:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    return load_on_backbone(
        Dream, "qwen2", folder, family="dream", devices=devices, dtype=dtype, published_mask=MASK_TOKEN_ID
    )
