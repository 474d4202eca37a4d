"""A two-tower pair of random weights with the character tokenizer, small enough to answer in a millisecond."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from twotower_eval.engine.models.checkpoint import build, pair_slots
from twotower_eval.engine.models.config import parse_config
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.miniature.export import EOS_ID, MASK_ID, write_tokenizer

CONFIG = {
    "model_type": "nemotron_h",
    "hidden_size": 16,
    "vocab_size": 112,
    "hybrid_override_pattern": "M*-",
    "num_hidden_layers": 3,
    "mamba_num_heads": 2,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "ssm_state_size": 4,
    "conv_kernel": 4,
    "chunk_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "layer_norm_epsilon": 1e-5,
    "mlp_hidden_act": "relu2",
    "eos_token_id": EOS_ID,
    "mask_token_id": MASK_ID,
    "max_position_embeddings": 4096,
}


def write_pair(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write the pair in the released layout and return its folder."""
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    model = build(parse_config(config), "pair", torch.float32, ("cpu",))
    assert isinstance(model, TwoTower)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, slot in sorted(pair_slots(model).items()):
        tensors[name] = torch.randn(slot.target.shape, generator=generator) * 0.5
    save_file(tensors, str(folder / "model.safetensors"))
    return folder
