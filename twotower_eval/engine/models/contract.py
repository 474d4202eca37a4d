"""The contract of a user's own model family: checked as it is loaded; a violation is an error of one line.

``load(folder, *, devices, dtype, tower)`` returns a model as in models.protocol.Model, one with a denoiser as in
models.protocol.Denoising, or where it has no autoregressive part as in models.protocol.Masked. Its methods are tried
once on a few tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import Masked, Model
from twotower_eval.errors import UserError
from twotower_eval.plugin_calls import calls_in, calls_of, module_of
from twotower_eval.records import Checkpoint

GIVEN = ("devices", "dtype", "tower")  # keyword arguments of load
PASS_THROUGH = (UserError, torch.OutOfMemoryError)  # errors with a message of their own, whoever raises them
# Attributes of a model, and the kinds of their values.
FIELDS: Mapping[str, tuple[type, ...]] = {
    "checkpoint": (Checkpoint,),
    "context_digest": (str,),
    "vocab_size": (int,),
    "max_length": (int, NoneType),
    "eos_token_ids": (tuple, list),
    "mask_token_id": (int, NoneType),
    "has_denoiser": (bool,),
    "joins_contexts": (bool,),
    "tokenizer": (object,),
}
METHODS = ("prefill", "extend", "next_logits", "context_logits")
OF_MASKED = ("denoise",)
# Largest difference of the same logits computed in two ways, as a share of the largest logit.
APART = {torch.float64: 0.001, torch.float32: 0.01, torch.bfloat16: 0.2, torch.float16: 0.2}


def load_own(
    family: str,
    load: Callable[..., Model],
    folder: Path,
    *,
    devices: tuple[str, ...],
    dtype: torch.dtype,
    tower: str | None,
) -> Model:
    """Load a folder by a user's own ``load``. PluginError for what it raises, UserError for what is missing."""
    try:
        inspect.signature(load).bind(folder, **dict.fromkeys(GIVEN))
    except TypeError as error:
        raise UserError(f"family {family} is called as load(folder, devices=…, dtype=…, tower=…): {error}") from error
    with calls_of(module_of(load), f"family {family}", getattr(load, "__name__", "load"), pass_through=PASS_THROUGH):
        model = load(folder, devices=devices, dtype=dtype, tower=tower)
    if missing := _missing(model):
        raise UserError(f"family {family}: {missing}; docs/family.md has a whole example")
    if "meta" not in devices:  # where nothing can be computed
        with calls_in(module_of(model), f"family {family}", pass_through=PASS_THROUGH):
            is_masked = model.has_denoiser and not hasattr(model, "context_tower")
            wrong = _masked_wrong(model, dtype) if is_masked else _found_wrong(model, dtype)
        if wrong is not None:
            raise UserError(f"family {family}: {wrong}")
    return model


def _missing(model: object) -> str | None:
    """What a model lacks, or has with a wrong type; None if nothing."""
    if model is None:
        return "its load returned nothing, not a model"
    needed = [*FIELDS, *METHODS, *(OF_MASKED if getattr(model, "has_denoiser", False) else ())]
    lacks = [name for name in needed if not hasattr(model, name)]
    if lacks:
        return f"its {type(model).__name__} lacks {', '.join(lacks)}"
    for name, kinds in FIELDS.items():
        value = getattr(model, name)
        if not isinstance(value, kinds):
            wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            return f"{name} of its {type(model).__name__} is a {type(value).__name__}, not a {wanted}"
    return None


@torch.inference_mode()
def _found_wrong(model: Model, dtype: torch.dtype) -> str | None:
    """What is wrong with the model on a few tokens in two rows of different lengths; None if nothing."""
    ids_BS, lengths, num_words = torch.tensor([[1, 2, 3], [2, 1, 0]]) % model.vocab_size, [3, 2], model.vocab_size
    context = model.prefill(ids_BS, lengths)
    if lacking := _lacking(context, model):
        return lacking
    next_BV, whole_BSV = model.next_logits(context), model.context_logits(ids_BS, lengths)
    extended_BV = model.next_logits(model.extend(context.select([1]), ids_BS[:1, 2:]))
    last_BLV = model.context_logits(torch.cat([ids_BS[1:, :2], ids_BS[:1, 2:]], dim=1), last=1)
    for name, logits, shape in (
        ("next_logits", next_BV, (2, num_words)),
        ("context_logits", whole_BSV, (2, 3, num_words)),
        ("next_logits behind extend", extended_BV, (1, num_words)),
        ("context_logits with last=1", last_BLV, (1, 1, num_words)),
    ):
        if wrong := _no_logits(name, logits, shape):
            return wrong
    read_BV = torch.stack([whole_BSV[0, 2], whole_BSV[1, 1]])
    for name, stepped_BV, whole_BV in (("prefill", next_BV, read_BV), ("extend", extended_BV, last_BLV[:, 0])):
        apart = (stepped_BV.float() - whole_BV.float()).abs().max().item()
        limit = APART[dtype] * max(1.0, whole_BV.abs().max().item())
        if apart > limit:
            both = f"next_logits behind its {name} and its context_logits of the same tokens"
            return f"{both} lie {apart:.3g} apart, more than {limit:.3g}"
    return None


@torch.inference_mode()
def _masked_wrong(model: Model, dtype: torch.dtype) -> str | None:
    """The same for a model without an autoregressive part: a block of masks behind rows of different lengths."""
    ids_BS, lengths, mask = torch.tensor([[1, 2, 3], [2, 1, 0]]) % model.vocab_size, [3, 2], model.mask_token_id
    if mask is None:
        return "it has a denoiser and no mask_token_id"
    denoise = cast(Masked, model).denoise
    block_BK, context = torch.full((2, 2), mask), model.prefill(ids_BS, lengths)
    if lacking := _lacking(context, model):
        return lacking
    together_BKV = denoise(block_BK, context, None)
    alone_BKV = denoise(block_BK[:1], model.prefill(ids_BS[1:, :2], [2]), None)
    extended_BKV = denoise(block_BK[:1], model.extend(context.select([0]), ids_BS[:1, :2]), None)
    for name, logits, num_rows in (
        ("denoise", together_BKV, 2),
        ("denoise of one row", alone_BKV, 1),
        ("denoise behind extend", extended_BKV, 1),
    ):
        if wrong := _no_logits(name, logits, (num_rows, 2, model.vocab_size)):
            return wrong
    apart = (together_BKV[1].float() - alone_BKV[0].float()).abs().max().item()
    limit = APART[dtype] * max(1.0, alone_BKV.abs().max().item())
    if apart > limit:
        return f"denoise of a row in a batch and alone lie {apart:.3g} apart, more than {limit:.3g}"
    return None


def _lacking(context: object, model: Model) -> str | None:
    lacks = [name for name in ("select", *(["join"] if model.joins_contexts else [])) if not hasattr(context, name)]
    return f"its contexts lack {', '.join(lacks)}" if lacks else None


def _no_logits(name: str, logits: object, shape: tuple[int, ...]) -> str | None:
    if not isinstance(logits, Tensor) or tuple(logits.shape) != shape:
        return f"its {name} are {_shown(logits)}, not logits of shape {shape}"
    return None if torch.isfinite(logits).all() else f"its {name} hold NaN or infinite values"


def _shown(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
