"""SDAR: a Qwen3 whose tokens see their own block and all earlier ones (Cheng et al., arXiv 2510.06303). Logits at p
predict the token at p."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from twotower_eval.engine.families.blocks import BlockModel
from twotower_eval.engine.families.settings import load_on_backbone, whole_number
from twotower_eval.engine.models.checkpoint import read_json

MASK_TOKEN_ID = 151669  # of the published checkpoints


class SDAR(BlockModel):
    """The network; its backbone is transformers' Qwen3."""


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> SDAR:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    model = load_on_backbone(
        SDAR, "qwen3", folder, family="sdar", devices=devices, dtype=dtype, published_mask=MASK_TOKEN_ID
    )
    model.block_size = whole_number(folder, read_json(folder / "config.json"), "block_size", default=4)
    return model
