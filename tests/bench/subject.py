"""The model that the engine is timed on: twelve layers of all kinds but plain MLP, random weights, both towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from twotower_eval.engine.models.autoregressive import ContextTower
from twotower_eval.engine.models.checkpoint import SINGLE_FILE, build, pair_slots
from twotower_eval.engine.models.config import parse_config
from twotower_eval.engine.models.nemotron_h import initialise
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.records import Checkpoint

# Widths of the inner layers stand to the hidden size as in the released model: 1.5, experts 0.69, shared 1.38.
CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEM*EMEM*EME",
    "hidden_size": 256,
    "vocab_size": 1024,
    "layer_norm_epsilon": 1e-5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "mamba_num_heads": 8,
    "mamba_head_dim": 48,
    "n_groups": 2,
    "ssm_state_size": 64,
    "conv_kernel": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 176,
    "moe_shared_expert_intermediate_size": 352,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.02,
    "mask_token_id": 3,
    # Only transformers' model reads these.
    "chunk_size": 128,
    "n_shared_experts": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@torch.no_grad()
def random_pair(seed: int = 0, **changes: Any) -> TwoTower:
    """A pair of random weights on the CPU in float32, gates of the time tables open."""
    config = parse_config({**CONFIG, **changes})
    model = build(config, "pair", torch.float32, ("cpu",))
    assert isinstance(model, TwoTower)
    generator = torch.Generator().manual_seed(seed)
    for tower in (model.context_tower.tower, model.denoiser.tower):
        initialise(tower, generator)
        tower.embeddings.weight.normal_(0.0, 1.0, generator=generator)
    for head in (model.context_tower.head, model.denoiser.head):
        head.weight.normal_(0.0, config.hidden_size**-0.5, generator=generator)
    for module in (model.denoiser.t_embedder, model.denoiser.t_block):
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    for table in model.denoiser.scale_shift_tables:
        table.zero_()[2] = 1.0
    checkpoint = Checkpoint(
        name="random", family="nemotron_h", source="", digest=f"random-{seed}", dtype="float32", devices=("cpu",)
    )
    for part in (model, model.context_tower):
        part.vocab_size, part.checkpoint = config.vocab_size, checkpoint
    model.mask_token_id, model.has_denoiser = config.mask_token_id, True
    return model


def write_tower(folder: Path, model: TwoTower, tower: str, **changes: Any) -> None:
    """One tower ("context_tower" or "denoiser_tower") with its head as an AR checkpoint, as transformers reads it."""
    head = {"context_tower": "context_lm_head.weight", "denoiser_tower": "lm_head.weight"}[tower]
    tensors = {
        name.replace(f"{tower}.", "backbone.") if name != head else "lm_head.weight": slot.target.contiguous()
        for name, slot in pair_slots(model).items()
        if name.startswith(f"{tower}.") or name == head
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    save_file(tensors, str(folder / SINGLE_FILE), {"format": "pt"})


def num_parameters(model: TwoTower | ContextTower) -> int:
    """Of a pair or of one tower."""
    return sum(parameter.numel() for parameter in model.parameters())
