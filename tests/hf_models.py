"""Tiny random Hugging Face models, saved as folders."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from twotower_eval.miniature.export import EOS_ID, write_tokenizer

VOCAB = 64
READING_VOCAB = 112  # at least the miniature's tokenizer's
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

HYBRID: dict[str, Any] = {
    **SMALL,
    "head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
}
BERT: dict[str, Any] = {**SMALL, "max_position_embeddings": 40}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
# Those that are wrong in the fastest way: positions that restart beside states, states kept in the model itself, a
# window inside modules, no cache that one can hand over, rotary factors that switch, an encoder with a causal mask,
# whose buffers end where its positions do.
ODD: dict[str, transformers.PreTrainedConfig] = {
    "bamba": transformers.BambaConfig(**HYBRID, attn_layer_indices=[1]),
    "recurrent_gemma": transformers.RecurrentGemmaConfig(
        **{**SMALL, "head_dim": 8, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8}
    ),
    "gpt_neo": transformers.GPTNeoConfig(
        **{**SMALL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    ),
    "openai-gpt": transformers.OpenAIGPTConfig(**GPT2),
    "longrope": transformers.Phi3Config(
        **{**SMALL, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
    ),
    "bert_decoder": transformers.BertConfig(**BERT, is_decoder=True),
    "bert": transformers.BertConfig(**BERT),
}


def save_tiny(name: str, folder: Path) -> Path:
    """A model of random weights from a fixed seed, as save_pretrained writes it."""
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config((CONFIGS | ODD)[name])
    with torch.no_grad():
        for parameter in model.parameters() if name in ODD else ():
            if parameter.dim() > 1:  # their own initialisations leave little of attention and recurrence
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def save_reading(name: str, folder: Path) -> Path:
    """A tiny model with the miniature's tokenizer, long enough for its tasks."""
    config = copy.deepcopy((CONFIGS | ODD)[name])
    config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id = READING_VOCAB, EOS_ID, 1, 0
    for limit in ("max_position_embeddings", "n_positions"):
        if hasattr(config, limit):
            setattr(config, limit, 512)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def quantised(full: Path, folder: Path) -> Path:
    """A saved model with int8 weights by torchao, as transformers saves it, beside its tokenizer."""
    shutil.copytree(full, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, as it is imported
        from torchao.quantization import Int8WeightOnlyConfig

        how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        model = transformers.AutoModelForCausalLM.from_pretrained(full, quantization_config=how)
        model.save_pretrained(folder)
    return folder
