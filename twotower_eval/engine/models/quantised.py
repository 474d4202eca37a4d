"""Quantised checkpoints of transformers: what their config.json says of them, and the bytes that their weights take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from twotower_eval.records import Quantisation
from twotower_eval.strict import JsonObject

SETTING = "quantization_config"


def quantisation_of(config: JsonObject) -> Quantisation | None:
    """How a checkpoint's weights are quantised by its config.json, or by the part of it about text; ``None``: not."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    said = next((part[SETTING] for part in parts if part.get(SETTING)), None)
    if not isinstance(said, Mapping):
        return None
    method = str(said.get("quant_method") or ("bitsandbytes" if _is_bitsandbytes(said) else "unknown"))
    return Quantisation(method=method, scheme=_scheme(method, said))


def _is_bitsandbytes(said: Mapping[str, object]) -> bool:
    return bool(said.get("load_in_8bit") or said.get("load_in_4bit"))


def _scheme(method: str, said: Mapping[str, object]) -> str | None:
    """What the settings of a method say of numbers and widths."""
    if method == "torchao":
        return _torchao_scheme(said.get("quant_type"))
    if method == "bitsandbytes":
        return "int8" if said.get("load_in_8bit") else f"4-bit {said.get('bnb_4bit_quant_type', 'fp4')}"
    if method in ("fp8", "fbgemm_fp8"):
        return "float8"
    bits, form = said.get("bits"), said.get("format")
    return f"{bits}-bit" if bits else str(form) if form else None


def _torchao_scheme(kind: object) -> str | None:
    """``int8 weight-only`` of ``{"default": {"_type": "Int8WeightOnlyConfig", …}}`` or of ``int8_weight_only``."""
    held = kind.get("default", kind) if isinstance(kind, Mapping) else kind
    name = held.get("_type") if isinstance(held, Mapping) else held
    if not isinstance(name, str):
        return None
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name.removesuffix("Config")).replace("_", " ").lower()
    return spaced.replace("weight only", "weight-only")


def is_packed(tensor: Tensor) -> bool:
    """Whether it stands for numbers that are stored in another form, as a quantised weight of torchao does."""
    return bool(is_traceable_wrapper_subclass(tensor))


def held_bytes(tensors: Iterable[Tensor]) -> float:
    """The bytes that tensors take as they are held: of packed ones those of their parts."""
    total = 0.0
    for tensor in tensors:
        if is_packed(tensor):
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            total += held_bytes(getattr(tensor, name) for name in names)
        else:
            total += tensor.numel() * tensor.element_size()
    return total
