"""Checkpoint folders in the released layout, written from the tiny random pairs, whole or in shards."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import ARCHITECTURES, SIZES, tiny_pair
from torch import Tensor

from twotower_eval.engine.models.checkpoint import INDEX_FILE, SINGLE_FILE, pair_slots


def tensors_of(name: str = "all kinds", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a tiny pair under their released names."""
    return {key: slot.target.to(dtype).contiguous() for key, slot in pair_slots(tiny_pair(name)).items()}


def write_config(folder: Path, name: str = "all kinds", **changes: Any) -> None:
    config = {**SIZES, **ARCHITECTURES[name], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_checkpoint(folder: Path, name: str = "all kinds", tensors: dict[str, Tensor] | None = None) -> Path:
    """A pair in one file."""
    write_config(folder, name)
    save_file(tensors or tensors_of(name), str(folder / SINGLE_FILE))
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], num_shards: int = 3) -> Path:
    """The tensors over several files, with the index that Hugging Face writes."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = sorted(tensors), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        own = {name: tensors[name].clone() for name in names[shard::num_shards]}
        save_file(own, str(folder / file))
        weight_map.update(dict.fromkeys(own, file))
    total = sum(t.nbytes for t in tensors.values())
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def base_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The context tower alone, as its AR base checkpoint names it."""
    prefix = "context_tower."
    base = {"backbone." + n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return {**base, "lm_head.weight": tensors["context_lm_head.weight"]}
