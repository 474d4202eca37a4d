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
from transformers.cache_utils import LinearAttentionCacheLayerMixin


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
    def lengths_B(self) -> Tensor:
        """Tokens per row, int64, on the model's device."""
        return torch.tensor(self.lengths, device=self.parts[0].last_logits_BV.device)

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
