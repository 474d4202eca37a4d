"""What all families read alike: numbers of a config.json, special ids, the tokenizer, and a model's identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from twotower_eval.engine.families.backbone import Backbone, load_backbone
from twotower_eval.engine.models.base import LanguageModel
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.config import as_ids
from twotower_eval.engine.models.identity import read_whole
from twotower_eval.engine.models.tokenizer import load_tokenizer
from twotower_eval.errors import FileError
from twotower_eval.records import Checkpoint
from twotower_eval.strict import JsonObject

ModelT = TypeVar("ModelT", bound=LanguageModel)


def whole_number(folder: Path, config: JsonObject, name: str, *, default: object = None) -> int:
    """A whole number of at least 0 from a config.json. FileError where it is missing without a default, or wrong."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        said = "is missing" if value is None else f"must be a whole number, not {value!r}"
        raise FileError(f"{folder}: config.json: {name} {said}")
    return value


# Of a config.json in the words of transformers: what decides the network. All else is about training or generation.
NETWORK = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
)


def transformers_settings(folder: Path, config: JsonObject) -> dict[str, object]:
    """The settings of transformers' own class for a backbone. FileError for a window of attention, which is not
    followed."""
    if config.get("use_sliding_window"):
        raise FileError(f"{folder}: config.json: use_sliding_window is on, and hides tokens; that is not supported")
    return {name: config[name] for name in NETWORK if config.get(name) is not None}


def mask_token(folder: Path, config: JsonObject, *, vocab_size: int, published: int | None = None) -> int | None:
    """The id of the mask token: the config's, else that of the tokenizer's ``mask_token``, else the one that the family
    publishes, if the vocabulary has it; None where nothing names one, and whoever decodes has to."""
    if config.get("mask_token_id") is not None:
        return whole_number(folder, config, "mask_token_id")
    named = _named_mask(folder, vocab_size)
    return named if named is not None else published if published is not None and published < vocab_size else None


def _named_mask(folder: Path, vocab_size: int) -> int | None:
    file, tokenizer = folder / "tokenizer_config.json", load_tokenizer(folder, vocab_size=vocab_size)
    named = read_json(file).get("mask_token") if tokenizer is not None and file.exists() else None
    content = named.get("content") if isinstance(named, dict) else named
    ids = tokenizer.encode(content) if tokenizer is not None and isinstance(content, str) else []
    return ids[0] if len(ids) == 1 else None


def identify(
    model: ModelT,
    folder: Path,
    config: JsonObject,
    checkpoint: Checkpoint,
    *,
    vocab_size: int,
    max_length: int | None,
    mask_token_id: int | None,
) -> ModelT:
    """The model with its identity, tokenizer and limits. FileError for a mask token outside the vocabulary."""
    if mask_token_id is not None and not 0 <= mask_token_id < vocab_size:
        raise FileError(
            f"{folder}: config.json: mask_token_id {mask_token_id} is outside the vocabulary of {vocab_size}"
        )
    model.checkpoint, model.context_digest = checkpoint, checkpoint.digest
    model.vocab_size, model.max_length, model.mask_token_id = vocab_size, max_length, mask_token_id
    model.tokenizer = load_tokenizer(folder, vocab_size=vocab_size)
    model.eos_token_ids = _eos_ids(folder, config, model)
    return model


def load_on_backbone(
    make: Callable[[Backbone], ModelT],
    kind: str,
    folder: Path,
    *,
    family: str,
    devices: tuple[str, ...],
    dtype: torch.dtype,
    published_mask: int | None = None,
) -> ModelT:
    """A family whose checkpoints are those of transformers' own ``kind`` (see backbone), tensors and settings by its
    names. ``published_mask``: see :func:`mask_token`. UserError for what is wrong with the folder."""
    config = read_json(folder / "config.json")
    vocab_size = whole_number(folder, config, "vocab_size")
    tensors, checkpoint = read_whole(folder, family=family, dtype=dtype, devices=devices[:1])
    settings = transformers_settings(folder, config)
    return identify(
        make(load_backbone(folder, kind, settings, tensors, dtype=dtype, device=devices[0])),
        folder,
        config,
        checkpoint,
        vocab_size=vocab_size,
        max_length=whole_number(folder, config, "max_position_embeddings"),
        mask_token_id=mask_token(folder, config, vocab_size=vocab_size, published=published_mask),
    )


def _eos_ids(folder: Path, config: JsonObject, model: LanguageModel) -> tuple[int, ...]:
    """The ids that generation settings, config and tokenizer name: each of them ends a text."""
    file = folder / "generation_config.json"
    chosen = as_ids(file.name, read_json(file).get("eos_token_id")) if file.exists() else ()
    named = as_ids("config.json", config.get("eos_token_id"))
    own = model.tokenizer.eos_token_id if model.tokenizer else None
    return tuple(dict.fromkeys([*chosen, *named, *([] if own is None else [own])]))
