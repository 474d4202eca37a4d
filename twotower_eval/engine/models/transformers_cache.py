"""The contexts of transformers models: their caches as values, forked before they are extended, selected, joined and
cut back. Shape letters: B rows, J heads, T columns, D dimensions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from twotower_eval.engine.models.transformers_types import Cache, CacheLayer

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Rows of a context that share a cache, or have none (``None``); ``rows`` are their positions in the context."""

    rows: tuple[int, ...]
    cache: Cache | None
    padding: tuple[int, ...]
    last_logits_BV: Tensor

    def select(self, wanted: Mapping[int, Sequence[int]]) -> Part | None:
        """The rows named by ``wanted`` (old position -> new positions); None where there are none."""
        chosen = [(i, new) for i, row in enumerate(self.rows) for new in wanted.get(row, ())]
        if not chosen:
            return None
        index = torch.tensor([i for i, _ in chosen], device=self.last_logits_BV.device)
        cache = None if self.cache is None else forked(self.cache)
        if cache is not None:
            cache.reorder_cache(index)
        rows, padding = tuple(new for _, new in chosen), tuple(self.padding[i] for i, _ in chosen)
        return Part(rows, cache, padding, self.last_logits_BV.index_select(0, index))


@dataclass(frozen=True)
class CacheContext:
    """Committed tokens of B rows. A value: extending it leaves it usable."""

    tokens: tuple[Tokens, ...]
    parts: tuple[Part, ...]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(len(row) for row in self.tokens)

    def select(self, rows: Sequence[int]) -> CacheContext:
        """A context of the given rows, in that order; a row may be repeated."""
        wanted: dict[int, list[int]] = {}
        for new, row in enumerate(rows):
            wanted.setdefault(row, []).append(new)
        parts = [part.select(wanted) for part in self.parts]
        return CacheContext(tuple(self.tokens[row] for row in rows), tuple(part for part in parts if part))

    def cut(self, num_fewer_B: Sequence[int], logits_BV: Tensor) -> CacheContext | None:
        """The context without each row's last tokens, given the logits behind those that are left; None where a layer
        keeps states or a window, which cannot be cut back."""
        caches = [part.cache for part in self.parts if part.cache is not None]
        if not all(keeps_all(layer) for cache in caches for layer in cache.layers):
            return None
        lengths = [length - fewer for length, fewer in zip(self.lengths, num_fewer_B, strict=True)]
        tokens = tuple(row[:length] for row, length in zip(self.tokens, lengths, strict=True))
        parts = [cut_part(part, lengths, logits_BV[list(part.rows)]) for part in self.parts]
        return CacheContext(tokens, tuple(parts))

    def join(self, other: CacheContext) -> CacheContext:
        """The context of these rows, then of the other's; for caches of attention layers alone, padded on the left."""
        return _joined([self, other])

    @staticmethod
    def gathered(parts: Sequence[tuple[CacheContext, Sequence[int]]]) -> CacheContext:
        """The context of the given rows of several contexts, caches of all of them joined at once."""
        return _joined([context.select(rows) for context, rows in parts])


def _joined(contexts: Sequence[CacheContext]) -> CacheContext:
    """All rows of several contexts, in that order."""
    tokens = tuple(row for context in contexts for row in context.tokens)
    parts: list[Part] = []
    start = 0
    for context in contexts:
        parts += [replace(part, rows=tuple(start + row for row in part.rows)) for part in context.parts]
        start += context.batch_size
    plain = [part for part in parts if part.cache is None]
    cached = [part for part in parts if part.cache is not None]
    if len(cached) > 1 and len(contexts) > 1:
        cached = [_joined_part(cached, [len(row) for row in tokens])]
    return CacheContext(tokens, (*cached, *plain))


def _joined_part(parts: Sequence[Part], lengths: Sequence[int]) -> Part:
    """All as one, as wide as its longest row."""
    rows = tuple(row for part in parts for row in part.rows)
    width = max(lengths[row] for row in rows)
    caches = [part.cache for part in parts if part.cache is not None]
    cache = forked(caches[0])
    layers = zip(*(one.layers for one in caches), strict=True)
    cache.layers = [_joined_layer(of_parts, width) for of_parts in layers]
    padding = tuple(width - lengths[row] for row in rows)
    return Part(rows, cache, padding, torch.cat([part.last_logits_BV for part in parts]))


def keeps_all(layer: CacheLayer) -> bool:
    """Whether a layer keeps the keys of all tokens, and nothing else."""
    kind: type[object] = type(layer)
    return kind is DynamicLayer


def cut_part(part: Part, lengths: Sequence[int], last_logits_BV: Tensor) -> Part:
    """The part's rows with their first ``lengths`` tokens, by row of the context, as wide as the longest of them."""
    if part.cache is None:
        return replace(part, last_logits_BV=last_logits_BV)
    width = max(lengths[row] for row in part.rows)
    ends = [lengths[row] + pad for row, pad in zip(part.rows, part.padding, strict=True)]
    cache = forked(part.cache)
    cache.layers = [_shifted_layer(layer, ends, width) for layer in cache.layers]
    return Part(part.rows, cache, tuple(width - lengths[row] for row in part.rows), last_logits_BV)


def _shifted_layer(layer: CacheLayer, ends: Sequence[int], width: int) -> CacheLayer:
    """The last ``width`` columns of each row before its end; zeros where there are fewer."""
    fork = copy.copy(layer)
    if layer.is_initialized:  # a layer that shares another's keys keeps none
        fork.keys, fork.values = (_shifted(columns, ends, width) for columns in (layer.keys, layer.values))
    return fork


def _shifted(columns_BJTD: Tensor, ends: Sequence[int], width: int) -> Tensor:
    if len(set(ends)) == 1:
        return _fitted(columns_BJTD[:, :, : ends[0]], width)
    rows = [_fitted(row_JTD[None, :, :end], width) for row_JTD, end in zip(columns_BJTD, ends, strict=True)]
    return torch.cat(rows)


def can_join(layers: Sequence[CacheLayer]) -> bool:
    """Whether caches of such layers can be joined: attention over all columns, or over a window of the last ones."""
    kinds: set[type[object]] = set(map(type, layers))
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def _joined_layer(layers: Sequence[CacheLayer], width: int) -> CacheLayer:
    """Rows of all, ``width`` columns wide: padding that nobody needs goes, what is missing is put on the left."""
    layer = copy.copy(layers[0])
    if not layer.is_initialized:  # a layer that shares another's keys keeps none
        return layer
    kept = width
    if isinstance(layer, DynamicSlidingWindowLayer):
        kept, layer.cumulative_length = min(width, layer.sliding_window - 1), width
    layer.keys = torch.cat([_fitted(one.keys, kept) for one in layers])
    layer.values = torch.cat([_fitted(one.values, kept) for one in layers])
    return layer


def _fitted(columns_BJTD: Tensor, num_columns: int) -> Tensor:
    """The last columns, with zeros before them where there are too few."""
    missing = num_columns - columns_BJTD.shape[2]
    return functional.pad(columns_BJTD, (0, 0, missing, 0))  # negative: cut off


def forked(cache: Cache) -> Cache:
    """A copy that may be extended. Attention layers replace their tensors and need no copy of them; states are
    overwritten in place and do."""
    fork = copy.copy(cache)
    fork.layers = [_forked_layer(layer) for layer in cache.layers]
    return fork


def _forked_layer(layer: CacheLayer) -> CacheLayer:
    fork = copy.copy(layer)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
                setattr(fork, name, copies)
    return fork
