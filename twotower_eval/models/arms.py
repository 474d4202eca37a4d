"""The two models of a comparison, loaded so that what they share is in memory once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower_eval import models


def load_arms(model: Path, baseline: Path | None, *, dtype: str, devices: Sequence[str]) -> tuple[Any, Any]:
    """Baseline and candidate; one object where they are the same, shared tensors where one is part of the other.

    Without ``baseline`` it is the candidate's own context tower. A baseline of its own goes on the first device.
    """
    candidate = models.load_model(model, dtype=dtype, devices=devices)
    if baseline is None:
        return context_tower(candidate), candidate
    if baseline.resolve() == model.resolve():
        return candidate, candidate
    return models.load_model(baseline, dtype=dtype, devices=devices[:1]), candidate


def context_tower(pair: Any) -> Any:
    """The pair's context tower as a model of its own, on the same tensors; a causal model is its own."""
    if not pair.has_denoiser:
        return pair
    tower = pair.context_tower
    tower.checkpoint = dataclasses.replace(
        pair.checkpoint, digest=pair.context_digest, tower="context", devices=pair.checkpoint.devices[:1]
    )
    for name in ("tokenizer", "vocab_size", "max_length", "eos_token_ids", "context_digest"):
        setattr(tower, name, getattr(pair, name))
    tower.mask_token_id, tower.has_denoiser = None, False
    return tower
