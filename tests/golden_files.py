"""Checkpoints with reference outputs: those in tests/data, and any other folder beside them that is named from outside.

A folder holds config.json, model.safetensors, golden.safetensors (integers are int32) and golden.json.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from twotower_eval.engine.models import load_model
from twotower_eval.records import Prompt

SHIPPED = Path(__file__).parent / "data" / "golden"
NEEDED = ("config.json", "model.safetensors", "golden.safetensors", "golden.json")


@functools.cache
def checkpoint_folders() -> tuple[Path, ...]:
    """The shipped checkpoint, then those under TWOTOWER_EVAL_GOLDEN that are not shipped."""
    outside = os.environ.get("TWOTOWER_EVAL_GOLDEN")
    found = [SHIPPED / "public"]
    if outside:
        own = {folder.name for folder in SHIPPED.iterdir()}
        for folder in sorted(Path(outside).iterdir()):
            if folder.name not in own and all((folder / name).is_file() for name in NEEDED):
                found.append(folder)
    return tuple(found)


@dataclass(frozen=True)
class Golden:
    """A checkpoint, loaded, and what the reference made of it."""

    folder: Path
    model: Any
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def parents(self, start: str, end: str) -> list[str]:
        """Keys that start and end so, without their ends."""
        return sorted(k.removesuffix(end) for k in self.tensors if k.startswith(start) and k.endswith(end))

    def prompts(self, name: str) -> list[Prompt]:
        """The rows of a golden prompt."""
        rows = self[f"{name}.ids"].tolist()
        return [Prompt(id=f"{name}.{i}", token_ids=tuple(row)) for i, row in enumerate(rows)]


@functools.cache
def golden(folder: Path) -> Golden:
    """Load a folder once."""
    return Golden(folder, load_model(folder), load_file(folder / "golden.safetensors"), described(folder))


@functools.cache
def described(folder: Path) -> dict[str, Any]:
    """golden.json of a folder."""
    meta: dict[str, Any] = json.loads((folder / "golden.json").read_text())
    return meta


def key_cases(suffix: str, *, containing: str = "", single: bool = False) -> list[Any]:
    """(folder, key without suffix) of every golden key that ends so, as test parameters; no tensor is loaded.

    ``single`` leaves out prompts of several rows.
    """
    cases = []
    for folder in checkpoint_folders():
        shapes = {name: prompt["shape"] for name, prompt in described(folder)["prompts"].items()}
        with safe_open(str(folder / "golden.safetensors"), "pt") as handle:
            keys = sorted(key for key in handle.keys() if key.endswith(suffix) and containing in key)  # noqa: SIM118
        for key in keys:
            if not (single and shapes[key.split(".")[0]][0] > 1):
                name = key.removesuffix(suffix)
                cases.append(pytest.param(folder, name, id=f"{folder.name}-{name}"))
    return cases


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape."""
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, reference {tuple(theirs.shape)}"
    return float((ours.double() - theirs.double()).abs().max())


class Spy:
    """A model that keeps what its denoiser was given and what it answered."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: list[Tensor] = []
        self.fractions: list[list[float] | None] = []
        self.logits: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def denoise(self, block_BK: Tensor, context: Any, t_B: Any) -> Tensor:
        logits_BKV: Tensor = self.model.denoise(block_BK, context, t_B)
        self.blocks.append(block_BK.clone())
        self.fractions.append(None if t_B is None else torch.as_tensor(t_B).flatten().tolist())
        self.logits.append(logits_BKV.clone())
        return logits_BKV
