"""SDAR: a Qwen3 whose tokens see their own block and all earlier ones (Cheng et al., arXiv 2510.06303). Logits at p
predict the token at p."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from twotower_eval.engine.families.backbone import load_backbone
from twotower_eval.engine.families.blocks import BlockModel
from twotower_eval.engine.families.settings import identify, mask_token, transformers_settings, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole

MASK_TOKEN_ID = 151669  # of the published checkpoints


class SDAR(BlockModel):
    """The network; its backbone is transformers' Qwen3."""


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> SDAR:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    config = read_json(folder / "config.json")
    vocab_size = whole_number(folder, config, "vocab_size")
    tensors, checkpoint = read_whole(folder, family="sdar", dtype=dtype, devices=devices[:1])
    settings = transformers_settings(folder, config)
    model = SDAR(load_backbone(folder, "qwen3", settings, tensors, dtype=dtype, device=devices[0]))
    model.block_size = whole_number(folder, config, "block_size", default=4)
    return identify(
        model,
        folder,
        config,
        checkpoint,
        vocab_size=vocab_size,
        max_length=whole_number(folder, config, "max_position_embeddings"),
        mask_token_id=mask_token(folder, config, vocab_size=vocab_size, published=MASK_TOKEN_ID),
    )
