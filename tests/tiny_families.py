"""Tiny checkpoints of families of diffusion language models, of random weights, in their public layouts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from twotower_eval.engine.families.dit import DiT, Sizes
from twotower_eval.engine.families.llada import IN_BLOCK, PREFIX, TOP
from twotower_eval.engine.families.llada2_moe import Network, Settings
from twotower_eval.miniature.export import EOS_ID, MASK_ID, write_tokenizer

VOCAB = 112  # the miniature's tokens, the mask among them
LENGTH = 256
QWEN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": EOS_ID,
}
QWEN3 = {**QWEN, "head_dim": 8}
LLADA: dict[str, Any] = {
    "model_type": "llada",
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "max_sequence_length": LENGTH,
    "rope_theta": 10000.0,
    "mask_token_id": MASK_ID,
    "eos_token_id": EOS_ID,
}
DIT: dict[str, Any] = {"vocab_size": VOCAB + 1, "hidden_dim": 32, "n_blocks": 2, "n_heads": 4, "cond_dim": 8}
LLADA2: dict[str, Any] = {
    **{name: value for name, value in QWEN3.items() if name != "rms_norm_eps"},
    "model_type": "llada2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llada": LLADA,
    "dream": {**QWEN, "model_type": "Dream"},
    "sdar": {**QWEN3, "model_type": "sdar", "block_size": 4},
    "fast_dllm_v2": {**QWEN, "model_type": "Fast_dLLM_Qwen"},
    "a2d_mdlm": {**QWEN3, "model_type": "a2d-qwen3"},
    "llada2_moe": LLADA2,
    "mdlm": {**DIT, "model_type": "mdlm", "model_length": LENGTH, "eos_token_id": EOS_ID},
    "bd3lm": {**DIT, "model_type": "bd3lm", "model_length": LENGTH, "block_size": 4, "eos_token_id": EOS_ID},
    "radd": {
        "tokens": VOCAB,
        "model": {"hidden_size": 32, "n_blocks": 2, "n_heads": 4, "length": LENGTH},
        "noise": {},
        "training": {},
        "eos_token_id": EOS_ID,
    },
}  # the family of each is its name


def save_family(family: str, folder: Path, *, tokenizer: bool = True, **changes: Any) -> Path:
    """A checkpoint of the family, its config.json with some changes, with the miniature's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIGS[family], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_spread_out(WEIGHTS[family](config)), folder / "model.safetensors")
    if tokenizer:
        write_tokenizer(folder)
    return folder


def _spread_out(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights large enough that answers vary; norms scale by about 1, and rotations stay."""
    draws = torch.Generator().manual_seed(0)
    spread = {name: torch.randn(tensor.shape, generator=draws) * 0.3 for name, tensor in tensors.items()}
    return {
        name: tensors[name].clone() if name.endswith("inv_freq") else drawn + (drawn.dim() == 1)
        for name, drawn in spread.items()
    }


def _qwen(kind: str) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    def made(config: dict[str, Any]) -> dict[str, Tensor]:
        own = {name: value for name, value in config.items() if name in QWEN3}
        model: Any = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**own))
        state: dict[str, Tensor] = model.state_dict()
        return state

    return made


def _llada(config: dict[str, Any]) -> dict[str, Tensor]:
    settings = transformers.LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
    )
    inside = {theirs: own for own, theirs in IN_BLOCK.items()}
    on_top = {theirs: own for own, theirs in TOP.items()}
    named = {}
    for name, tensor in transformers.LlamaForCausalLM(settings).state_dict().items():
        short = name.removesuffix(".weight")
        if short in on_top:
            named[f"{PREFIX}{on_top[short]}.weight"] = tensor
            continue
        _, _, number, rest = short.split(".", 3)
        named[f"{PREFIX}blocks.{number}.{inside[rest]}.weight"] = tensor
    return named


def _dit(prefix: str) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    def made(config: dict[str, Any]) -> dict[str, Tensor]:
        sizes = Sizes(
            vocab_size=config.get("vocab_size", VOCAB + 1),
            hidden_size=32,
            num_blocks=2,
            num_heads=4,
            condition=config.get("cond_dim"),
        )
        return {f"{prefix}{name}": tensor for name, tensor in DiT(sizes).state_dict().items()}

    return made


def _llada2(config: dict[str, Any]) -> dict[str, Tensor]:
    return dict(Network(Settings.read(Path("config.json"), config)).state_dict())


WEIGHTS: dict[str, Callable[[dict[str, Any]], dict[str, Tensor]]] = {
    "llada": _llada,
    "dream": _qwen("Qwen2"),
    "sdar": _qwen("Qwen3"),
    "fast_dllm_v2": _qwen("Qwen2"),
    "a2d_mdlm": _qwen("Qwen3"),
    "llada2_moe": _llada2,
    "mdlm": _dit("backbone."),
    "bd3lm": _dit("backbone."),
    "radd": _dit(""),
}
