"""A2D-Qwen3: a Qwen3 turned into a diffusion model (dLLM), under one of two masks.

``a2d_mdlm``: all tokens see each other. ``a2d_bd3lm``: a token sees its own block and all earlier ones, blocks counted
so that one ends where the prompt does. The checkpoints do not say which of them they were trained for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from twotower_eval.engine.families.blocks import BlockModel
from twotower_eval.engine.families.kept import BackboneCanvas
from twotower_eval.engine.families.settings import load_on_backbone


class A2DCanvas(BackboneCanvas):
    """Every token sees every token."""


class A2DBlocks(BlockModel):
    """A token sees its own block and earlier ones."""

    ends_with_prompt = True
    block_size = 32  # dLLM's default: a checkpoint names none


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> A2DCanvas:
    """Load a checkpoint as ``a2d_mdlm``. UserError for what is wrong with it."""
    return load_on_backbone(A2DCanvas, "qwen3", folder, family="a2d_mdlm", devices=devices, dtype=dtype)


def load_blocks(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> A2DBlocks:
    """Load a checkpoint as ``a2d_bd3lm``. UserError for what is wrong with it."""
    return load_on_backbone(A2DBlocks, "qwen3", folder, family="a2d_bd3lm", devices=devices, dtype=dtype)
