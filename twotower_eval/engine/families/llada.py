"""LLaDA: a Llama whose tokens all see each other (Nie et al., arXiv 2502.09992). Logits at p predict the token at p."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from twotower_eval.engine.families.backbone import load_backbone
from twotower_eval.engine.families.kept import BackboneCanvas
from twotower_eval.engine.families.settings import identify, mask_token, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole
from twotower_eval.errors import FileError
from twotower_eval.strict import JsonObject

MASK_TOKEN_ID = 126336  # of the published checkpoints
PREFIX = "model.transformer."
TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",  # a block's; on top the same name is the head's
}
UNLIKE_LLAMA = {  # settings of the public code that would make another network, and the only value known here
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}


class LLaDA(BackboneCanvas):
    """The network; its backbone is transformers' Llama."""


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> LLaDA:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    config = read_json(folder / "config.json")
    for name, known in UNLIKE_LLAMA.items():
        if config.get(name, known) != known:
            raise FileError(f"{folder}: config.json has {name} {config[name]!r}; LLaDA is known with {known!r} only")
    vocab_size = whole_number(folder, config, "embedding_size", default=config.get("vocab_size"))
    tensors, checkpoint = read_whole(folder, family="llada", dtype=dtype, devices=devices[:1])
    named = {_llama_name(folder, name): tensor for name, tensor in tensors.items()}
    model = LLaDA(load_backbone(folder, "llama", _llama_settings(config), named, dtype=dtype, device=devices[0]))
    return identify(
        model,
        folder,
        config,
        checkpoint,
        vocab_size=vocab_size,
        max_length=whole_number(folder, config, "max_sequence_length"),
        mask_token_id=mask_token(folder, config, vocab_size=vocab_size, published=MASK_TOKEN_ID),
    )


def _llama_settings(config: JsonObject) -> Mapping[str, object]:
    heads = config["n_heads"]
    return {
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden_size"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or heads,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_theta": config["rope_theta"],
        "max_position_embeddings": config["max_sequence_length"],
        "tie_word_embeddings": bool(config.get("weight_tying", False)),
        "hidden_act": "silu",
    }


def _llama_name(folder: Path, name: str) -> str:
    """Transformers' name of one of the checkpoint's tensors. FileError for one that LLaDA does not have."""
    own = name.removeprefix(PREFIX)
    if (top := re.fullmatch(r"(\w+)\.weight", own)) and top[1] in TOP:
        return f"{TOP[top[1]]}.weight"
    if (inside := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.weight", own)) and inside[2] in IN_BLOCK:
        return f"model.layers.{inside[1]}.{IN_BLOCK[inside[2]]}.weight"
    raise FileError(f"{folder}: checkpoint has unexpected tensor {name}; LLaDA has none of that name")
