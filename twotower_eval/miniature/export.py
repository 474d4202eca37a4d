"""Write a trained pair in the released checkpoint layout, so that the one loader reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from twotower_eval.engine.models.checkpoint import FLOAT32_PARAMETERS, pair_slots
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.miniature.recipes import Recipe
from twotower_eval.miniature.tokenizer import BOS_ID, EOS_ID, MASK_ID, PAD_ID, VOCABULARY, write_tokenizer
from twotower_eval.store.publish import TRAINING_LOG


def config_json(recipe: Recipe) -> dict[str, object]:
    """The config.json of the recipe's pair, in the released layout."""
    return {
        "_name_or_path": "miniature",
        "architectures": ["NemotronHTwoTowerForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": len(VOCABULARY),
        "layer_norm_epsilon": 1e-5,
        "num_hidden_layers": len(str(recipe["model"]["hybrid_override_pattern"])),
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "mask_token_id": MASK_ID,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "norm_topk_prob": True,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **recipe["model"],
    }


def export_pair(model: TwoTower, recipe: Recipe, folder: Path) -> Path:
    """Weights rounded to bfloat16 (routers float32), config and tokenizer into ``folder/pair``; that folder."""
    pair = folder / "pair"
    pair.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, slot in pair_slots(model).items():
        dtype = torch.float32 if name.endswith(FLOAT32_PARAMETERS) else torch.bfloat16
        tensors[name] = slot.target.detach().cpu().to(dtype).contiguous()
    save_file(tensors, pair / "model.safetensors", metadata={"format": "pt"})
    (pair / "config.json").write_text(json.dumps(config_json(recipe), indent=1) + "\n", encoding="utf-8")
    write_tokenizer(pair)
    if (folder / TRAINING_LOG).exists():
        shutil.copyfile(folder / TRAINING_LOG, pair / TRAINING_LOG)
    return pair
