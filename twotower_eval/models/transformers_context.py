"""What a transformers model remembers of its tokens, as a value: caches that are forked before they are extended.

Shape letters: see ops/__init__.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class Part:
    """Rows of a context that share a cache; ``rows`` are their positions in the context."""

    rows: tuple[int, ...]
    cache: Any
    padding: tuple[int, ...]
    last_logits_BV: Tensor

    def select(self, wanted: Mapping[int, Sequence[int]]) -> Part | None:
        """The rows named by ``wanted`` (old position -> new positions); None where there are none."""
        chosen = [(i, new) for i, row in enumerate(self.rows) for new in wanted.get(row, ())]
        if not chosen:
            return None
        index = torch.tensor([i for i, _ in chosen], device=self.last_logits_BV.device)
        cache = forked(self.cache)
        cache.reorder_cache(index)
        rows, padding = tuple(new for _, new in chosen), tuple(self.padding[i] for i, _ in chosen)
        return Part(rows, cache, padding, self.last_logits_BV.index_select(0, index))


@dataclass(frozen=True)
class CacheContext:
    """Committed tokens of B rows. A value: extending it leaves it usable."""

    lengths: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def select(self, rows: Sequence[int]) -> CacheContext:
        """A context of the given rows, in that order; a row may be repeated."""
        wanted: dict[int, list[int]] = {}
        for new, row in enumerate(rows):
            wanted.setdefault(row, []).append(new)
        parts = [part.select(wanted) for part in self.parts]
        return CacheContext(tuple(self.lengths[row] for row in rows), tuple(part for part in parts if part))

    def join(self, other: CacheContext) -> CacheContext:
        """The context of these rows, then of the other's; for caches of attention layers alone, padded on the left."""
        [ours], [theirs] = self.parts, other.parts
        lengths = self.lengths + other.lengths
        width = max(lengths)
        rows = (*ours.rows, *(self.batch_size + row for row in theirs.rows))
        cache = forked(ours.cache)
        cache.layers = [
            _joined_layer(*pair, width) for pair in zip(ours.cache.layers, theirs.cache.layers, strict=True)
        ]
        padding = tuple(width - lengths[row] for row in rows)
        last_logits_BV = torch.cat([ours.last_logits_BV, theirs.last_logits_BV])
        return CacheContext(lengths, (Part(rows, cache, padding, last_logits_BV),))


def can_join(layers: Sequence[Any]) -> bool:
    """Whether caches of such layers can be joined: attention over all columns, or over a window of the last ones."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _joined_layer(ours: Any, theirs: Any, width: int) -> Any:
    """Rows of both, all ``width`` columns wide: padding that nobody needs goes, what is missing is put on the left."""
    layer = copy.copy(ours)
    if not ours.is_initialized:  # a layer that shares another's keys keeps none
        return layer
    kept = width
    if isinstance(layer, DynamicSlidingWindowLayer):
        kept, layer.cumulative_length = min(width, layer.sliding_window - 1), width
    layer.keys = torch.cat([_fitted(ours.keys, kept), _fitted(theirs.keys, kept)])
    layer.values = torch.cat([_fitted(ours.values, kept), _fitted(theirs.values, kept)])
    return layer


def _fitted(columns_BJTD: Tensor, num_columns: int) -> Tensor:
    """The last columns, with zeros before them where there are too few."""
    missing = num_columns - columns_BJTD.shape[2]
    return functional.pad(columns_BJTD, (0, 0, missing, 0))  # negative: cut off


def forked(cache: Any) -> Any:
    """A copy that may be extended. Attention layers replace their tensors and need no copy of them; states are
    overwritten in place and do."""
    fork = copy.copy(cache)
    fork.layers = [_forked_layer(layer) for layer in cache.layers]
    return fork


def _forked_layer(layer: Any) -> Any:
    fork = copy.copy(layer)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
                setattr(fork, name, copies)
    return fork
