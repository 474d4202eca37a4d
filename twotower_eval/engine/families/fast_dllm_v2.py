"""Fast-dLLM v2: a Qwen2 whose tokens see their own block and all earlier ones (Wu et al., arXiv 2509.26328). Logits at
p predict the token p + 1, so the first token of a block comes from the pass over what stands before it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from twotower_eval.engine.families.backbone import load_backbone
from twotower_eval.engine.families.blocks import BlockModel
from twotower_eval.engine.families.settings import identify, mask_token, transformers_settings, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole

MASK_TOKEN_ID = 151665  # of the published checkpoints


class FastDLLMv2(BlockModel):
    """The network; its backbone is transformers' Qwen2."""

    shift = 1
    block_size = 32  # of the published sampler, whatever the config's bd_size, which is about training


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> FastDLLMv2:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    config = read_json(folder / "config.json")
    vocab_size = whole_number(folder, config, "vocab_size")
    tensors, checkpoint = read_whole(folder, family="fast_dllm_v2", dtype=dtype, devices=devices[:1])
    settings = transformers_settings(folder, config)
    return identify(
        FastDLLMv2(load_backbone(folder, "qwen2", settings, tensors, dtype=dtype, device=devices[0])),
        folder,
        config,
        checkpoint,
        vocab_size=vocab_size,
        max_length=whole_number(folder, config, "max_position_embeddings"),
        mask_token_id=mask_token(folder, config, vocab_size=vocab_size, published=MASK_TOKEN_ID),
    )
