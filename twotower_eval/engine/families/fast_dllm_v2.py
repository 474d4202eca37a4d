"""Fast-dLLM v2: a Qwen2 whose tokens see their own block and all earlier ones (Wu et al., arXiv 2509.26328). Logits at
p predict the token p + 1, so the first token of a block comes from the pass over what stands before it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from twotower_eval.engine.families.blocks import BlockModel
from twotower_eval.engine.families.settings import load_on_backbone

MASK_TOKEN_ID = 151665  # of the published checkpoints


class FastDLLMv2(BlockModel):
    """The network; its backbone is transformers' Qwen2."""

    shift = 1
    block_size = 32  # of the published sampler, whatever the config's bd_size, which is about training


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> FastDLLMv2:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    return load_on_backbone(
        FastDLLMv2, "qwen2", folder, family="fast_dllm_v2", devices=devices, dtype=dtype, published_mask=MASK_TOKEN_ID
    )
