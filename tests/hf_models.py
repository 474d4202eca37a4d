"""Tiny random Hugging Face models, saved as folders."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
MAMBA2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}
# Name -> config: untied, tied with learned positions, sliding window, convolution states beside attention, states only.
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "gpt2": transformers.GPT2Config(**GPT2),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=5),
    "lfm2": transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], conv_L_cache=3),
    "mamba2": transformers.Mamba2Config(**MAMBA2),
}


def save_tiny(name: str, folder: Path) -> Path:
    """A model of random weights from a fixed seed, as save_pretrained writes it."""
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    model.save_pretrained(folder)
    return folder
