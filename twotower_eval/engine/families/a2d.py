"""A2D-Qwen3: a Qwen3 turned into a diffusion model (dLLM), under one of two masks.

``a2d_mdlm``: all tokens see each other. ``a2d_bd3lm``: a token sees its own block and all earlier ones, blocks counted
so that one ends where the prompt does. The checkpoints do not say which of them they were trained for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import torch

from twotower_eval.engine.families.backbone import load_backbone
from twotower_eval.engine.families.blocks import BlockModel
from twotower_eval.engine.families.kept import BackboneCanvas
from twotower_eval.engine.families.settings import identify, mask_token, transformers_settings, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole


class A2DCanvas(BackboneCanvas):
    """Every token sees every token."""


class A2DBlocks(BlockModel):
    """A token sees its own block and earlier ones."""

    ends_with_prompt = True
    block_size = 32  # dLLM's default: a checkpoint names none


ModelT = TypeVar("ModelT", A2DCanvas, A2DBlocks)


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> A2DCanvas:
    """Load a checkpoint as ``a2d_mdlm``. UserError for what is wrong with it."""
    return _loaded(A2DCanvas, "a2d_mdlm", folder, devices, dtype)


def load_blocks(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> A2DBlocks:
    """Load a checkpoint as ``a2d_bd3lm``. UserError for what is wrong with it."""
    return _loaded(A2DBlocks, "a2d_bd3lm", folder, devices, dtype)


def _loaded(kind: type[ModelT], family: str, folder: Path, devices: tuple[str, ...], dtype: torch.dtype) -> ModelT:
    config = read_json(folder / "config.json")
    tensors, checkpoint = read_whole(folder, family=family, dtype=dtype, devices=devices[:1])
    backbone = load_backbone(
        folder, "qwen3", transformers_settings(folder, config), tensors, dtype=dtype, device=devices[0]
    )
    vocab_size = whole_number(folder, config, "vocab_size")
    return identify(
        kind(backbone),
        folder,
        config,
        checkpoint,
        vocab_size=vocab_size,
        max_length=whole_number(folder, config, "max_position_embeddings"),
        mask_token_id=mask_token(folder, config, vocab_size=vocab_size),
    )
