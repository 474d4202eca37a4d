"""Transformers' own Llama, Qwen2 and Qwen3 under masks and positions of ours.

Diffusion families share these layers and differ in what a token may see: nothing is hidden, or whatever lies in later
blocks. Shape letters: B rows, S new tokens, T key columns (those of the past first), V vocabulary, J key-value heads,
D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from twotower_eval.engine.models.transformers_ar import LOAD_ERRORS
from twotower_eval.engine.models.transformers_ar import _quiet as quiet
from twotower_eval.engine.models.transformers_types import CausalLM, Config, Loaded
from twotower_eval.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # transformers' model_type -> the name of its classes


@dataclass(frozen=True)
class Past:
    """Keys and values of all layers, each (B, J, T, D). A value: reading with it leaves it as it is."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def nothing(cls, num_rows: int, backbone: Backbone) -> Self:
        """No columns yet."""
        config = backbone.inner.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = next(backbone.inner.parameters())
        empty = weight.new_zeros(num_rows, config.num_key_value_heads, 0, head_dim)
        return cls((empty,) * config.num_hidden_layers, (empty,) * config.num_hidden_layers)

    @property
    def num_rows(self) -> int:
        """Rows."""
        return self.keys[0].shape[0]

    @property
    def num_columns(self) -> int:
        """Key columns, padding included."""
        return self.keys[0].shape[2]

    def select(self, rows: Sequence[int]) -> Self:
        """Some rows, in that order; all of them as they stand without a copy."""
        chosen = list(rows)
        if chosen == list(range(self.num_rows)):
            return self
        return type(self)(tuple(k[chosen] for k in self.keys), tuple(v[chosen] for v in self.values))

    def first(self, num: int) -> Self:
        """The first columns."""
        return type(self)(tuple(k[:, :, :num] for k in self.keys), tuple(v[:, :, :num] for v in self.values))

    def joined(self, other: Self) -> Self:
        """These rows, then the other's, padded on the right to as many columns."""
        width = max(self.num_columns, other.num_columns)
        return type(self)(_stacked(self.keys, other.keys, width), _stacked(self.values, other.values, width))


def _stacked(first: Sequence[Tensor], second: Sequence[Tensor], width: int) -> tuple[Tensor, ...]:
    def wide(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, 0, 0, width - tensor.shape[2]))

    return tuple(torch.cat([wide(a), wide(b)]) for a, b in zip(first, second, strict=True))


class Layer(Protocol):
    """What transformers' cache holds of a layer, each (B, J, T, D)."""

    keys: Tensor
    values: Tensor


class Cache(Protocol):
    """Transformers' cache."""

    layers: list[Layer]


class Backbone(nn.Module):
    """A decoder of transformers with its head. Whoever calls it says what each token sees."""

    def __init__(self, inner: CausalLM) -> None:
        super().__init__()
        self.inner: Any = inner

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        first: Tensor = next(self.inner.parameters())
        return first.device

    def read(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        visible_BST: Tensor,
        past: Past | None = None,
        *,
        places_BM: Tensor | None = None,
    ) -> tuple[Tensor, Past]:
        """Logits float32 behind every token (B, S, V), or at the wanted places (B, M, V); and keys and values of the
        past's columns, then of these.

        ``visible_BST`` says which key columns a token sees; a token that sees none is padding, and gets to see its own.
        """
        hidden_BSH, kept = self.states(ids_BS, positions_BS, visible_BST, past)
        return self._head(hidden_BSH, places_BM), kept

    def logits(
        self, ids_BS: Tensor, positions_BS: Tensor, visible_BSS: Tensor, *, places_BM: Tensor | None = None
    ) -> Tensor:
        """As :meth:`read` of whole rows, without keys and values."""
        return self._head(self._layers(ids_BS, positions_BS, visible_BSS, None), places_BM)

    def _head(self, hidden_BSH: Tensor, places_BM: Tensor | None) -> Tensor:
        if places_BM is not None:
            rows_B1 = torch.arange(len(hidden_BSH), device=hidden_BSH.device)[:, None]
            hidden_BSH = hidden_BSH[rows_B1, places_BM.to(hidden_BSH.device)]
        logits: Tensor = self.inner.get_output_embeddings()(hidden_BSH)
        return logits.float()

    def _layers(self, ids_BS: Tensor, positions_BS: Tensor, visible_BST: Tensor, cache: Cache | None) -> Tensor:
        device = self.device
        if len(positions_BS) > 1 and bool((positions_BS == positions_BS[:1]).all()):
            positions_BS = positions_BS[:1]  # the same in all rows: their angles are computed once
        output: Any = self.inner.model(
            input_ids=ids_BS.to(device),
            position_ids=positions_BS.to(device),
            attention_mask=not_blind(visible_BST).to(device)[:, None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden_BSH: Tensor = output.last_hidden_state
        return hidden_BSH

    def states(
        self, ids_BS: Tensor, positions_BS: Tensor, visible_BST: Tensor, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        """As :meth:`read`, but what the head would read (B, S, H): the last layer's output after the final norm."""
        cache = _cache(past)
        hidden_BSH = self._layers(ids_BS, positions_BS, visible_BST, cache)
        return hidden_BSH, Past(tuple(each.keys for each in cache.layers), tuple(each.values for each in cache.layers))


def _cache(past: Past | None) -> Cache:
    """Transformers' cache that holds the past, without a copy of it."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = cast(Cache, DynamicCache())
    new_layer: Any = DynamicLayer
    for keys, values in zip(past.keys, past.values, strict=True) if past is not None else ():
        layer: Any = new_layer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def not_blind(visible_BST: Tensor) -> Tensor:
    """The same, but a token that would see nothing sees its own column: a softmax over nothing is no number."""
    num, before = visible_BST.shape[1], visible_BST.shape[2] - visible_BST.shape[1]
    own_ST = torch.eye(num, dtype=torch.bool, device=visible_BST.device)
    own_ST = nn.functional.pad(own_ST, (before, 0))
    return visible_BST | (own_ST & ~visible_BST.any(2, keepdim=True))


def new_backbone(kind: str, settings: Mapping[str, object]) -> Backbone:
    """One to be trained: weights drawn from torch's generator."""
    import transformers

    config = getattr(transformers, f"{KINDS[kind]}Config")(**settings, attn_implementation="sdpa")
    model_class: Any = getattr(transformers, f"{KINDS[kind]}ForCausalLM")
    with quiet():
        return Backbone(model_class(config))


def load_backbone(
    folder: Path,
    kind: str,
    settings: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: str,
) -> Backbone:
    """Transformers' model of a kind of :data:`KINDS` with these settings and tensors, both by its own names.

    FileError for names or shapes that do not fit. A tied head may be absent from the tensors.
    """
    import transformers

    config = getattr(transformers, f"{KINDS[kind]}Config")(**settings, attn_implementation="sdpa")
    model_class: object = getattr(transformers, f"{KINDS[kind]}ForCausalLM")
    return Backbone(load_inner(folder, model_class, config, tensors, dtype=dtype, device=device))


def load_inner(
    folder: Path, kind: object, config: Config, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: str
) -> CausalLM:
    """A model of transformers' class ``kind`` with this config and these tensors, by its own names; see
    :func:`load_backbone`."""
    model_class: Any = kind
    try:
        with quiet():
            loaded: Loaded = model_class.from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
            )
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FileError(f"{folder}: transformers cannot load it ({reason})") from error
    inner, report = loaded
    for problem, key in (("lacks", "missing_keys"), ("has unexpected", "unexpected_keys")):
        names = sorted(map(str, report[key]))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise FileError(f"{folder}: checkpoint {problem} tensor {names[0]}{more}; it does not fit its config.json")
    inner.to(device).eval().requires_grad_(False)
    return inner
