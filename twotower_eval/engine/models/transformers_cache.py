"""The contexts of transformers models: their caches as values, forked before they are extended, selected, joined and
cut back. Shape letters: B rows, J heads, T columns, C columns with room, D dimensions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from twotower_eval.engine.models.transformers_types import Cache, CacheLayer

Tokens = tuple[int, ...]
LEAST_ROOM, ROOM_SHARE = 32, 8  # columns: where keys are copied, they get room for an eighth more, at least for so many


class Room:
    """Keys and values of some rows, with room behind them that whoever comes first fills: ``num_taken`` columns are."""

    def __init__(self, keys_BJCD: Tensor, values_BJCD: Tensor, num_taken: int) -> None:
        self.keys_BJCD, self.values_BJCD, self.num_taken = keys_BJCD, values_BJCD, num_taken

    def follows(self, keys_BJTD: Tensor, num_new: int) -> bool:
        """Whether so many columns may be written behind these keys: they are this room's, and nobody did it before."""
        room = self.keys_BJCD
        return (
            self.num_taken == keys_BJTD.shape[2]
            and self.num_taken + num_new <= room.shape[2]
            and room.data_ptr() == keys_BJTD.data_ptr()  # transformers may have put other tensors into the layer
            and room.shape[0] == keys_BJTD.shape[0]
            and (torch.is_inference_mode_enabled() or not room.is_inference())
        )


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """Transformers' layer that keeps all keys, with room for those of steps to come: torch.cat would copy all of them
    at every step.

    Forks share the room. The first that goes on writes behind the columns that all of them know, the next one copies.
    """

    room: Room | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Take up new columns; all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.held or (key_states[:, :, :0], value_states[:, :, :0])
        known, num_new = held[0].shape[2], key_states.shape[2]
        room = self.room
        if room is None or not room.follows(held[0], num_new):
            room = roomy([held], [(0, row) for row in range(len(key_states))], known, num_new)
        for all_BJCD, new_BJND in ((room.keys_BJCD, key_states), (room.values_BJCD, value_states)):
            all_BJCD[:, :, known : known + num_new].copy_(new_BJND)
        return self.take(room, known + num_new)

    @property
    def held(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values; None where there are none yet."""
        if self.keys is None or self.values is None or not self.keys.numel():
            return None
        return self.keys, self.values

    def take(self, room: Room, width: int) -> tuple[Tensor, Tensor]:
        """Hold the first columns of a room."""
        self.room, room.num_taken = room, width
        keys, values = self.keys, self.values = room.keys_BJCD[:, :, :width], room.values_BJCD[:, :, :width]
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows, with room behind them."""
        if (held := self.held) is not None:
            width = held[0].shape[2]
            self.take(roomy([held], [(0, row) for row in beam_idx.tolist()], width), width)


def growing(cache: Cache) -> Cache:
    """A new cache, its layers that keep all keys replaced by those with room; all others as transformers has them."""
    make: Any = GrowingLayer
    kinds: list[type[object]] = [type(layer) for layer in cache.layers]
    cache.layers = [make() if kind is DynamicLayer else layer for kind, layer in zip(kinds, cache.layers, strict=True)]
    return cache


def roomy(
    columns: Sequence[tuple[Tensor, Tensor]], rows: Sequence[tuple[int, int]], width: int, num_new: int = 0
) -> Room:
    """Copies of (source, row), the last ``width`` columns of each, zeros before them where there are fewer."""

    def copied(which: int) -> Tensor:
        like = columns[0][which]
        room = max(num_new, LEAST_ROOM, width // ROOM_SHARE)
        made_BJCD = like.new_empty((len(rows), like.shape[1], width + room, like.shape[3]))
        for to, (source, row) in enumerate(rows):
            found_JTD = columns[source][which][row, :, max(0, columns[source][which].shape[2] - width) :]
            missing = width - found_JTD.shape[1]
            made_BJCD[to, :, :missing] = 0
            made_BJCD[to, :, missing:width] = found_JTD
        return made_BJCD

    return Room(copied(0), copied(1), width)


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
        return _joined([(one, range(one.batch_size)) for one in (self, other)])

    @staticmethod
    def gathered(parts: Sequence[tuple[CacheContext, Sequence[int]]]) -> CacheContext:
        """The context of the given rows of several contexts, caches of all of them joined at once."""
        return _joined(parts)


def _joined(contexts: Sequence[tuple[CacheContext, Sequence[int]]]) -> CacheContext:
    """These rows of several contexts, in that order."""
    tokens = tuple(context.tokens[row] for context, rows in contexts for row in rows)
    parts: list[tuple[Part, list[int], list[int]]] = []  # with the rows of each, by place within it, and their new ones
    start = 0
    for context, rows in contexts:
        for part in context.parts:
            taken = [(part.rows.index(row), start + at) for at, row in enumerate(rows) if row in part.rows]
            if taken:
                parts.append((part, [place for place, _ in taken], [new for _, new in taken]))
        start += len(rows)
    cached = [one for one in parts if one[0].cache is not None]
    if len(cached) > 1 and len(contexts) > 1:
        others = [_of_part(*one) for one in parts if one[0].cache is None]
        return CacheContext(tokens, (_joined_part(cached, [len(row) for row in tokens]), *others))
    ordered = [*cached, *(one for one in parts if one[0].cache is None)]
    return CacheContext(tokens, tuple(_of_part(*one) for one in ordered))


def _of_part(part: Part, places: Sequence[int], new: Sequence[int]) -> Part:
    """Some rows of a part, as rows of another context."""
    if list(places) == list(range(len(part.rows))):
        return replace(part, rows=tuple(new))
    wanted: dict[int, list[int]] = {}
    for place, row in zip(places, new, strict=True):
        wanted.setdefault(part.rows[place], []).append(row)
    chosen = part.select(wanted)
    assert chosen is not None
    return chosen


def _joined_part(parts: Sequence[tuple[Part, Sequence[int], Sequence[int]]], lengths: Sequence[int]) -> Part:
    """All as one, as wide as its longest row."""
    rows = tuple(row for _, _, new in parts for row in new)
    width = max(lengths[row] for row in rows)
    caches = [part.cache for part, _, _ in parts if part.cache is not None]
    sources = [(number, place) for number, (_, places, _) in enumerate(parts) for place in places]
    cache = forked(caches[0])
    cache.layers = [
        _joined_layer(of_parts, sources, width) for of_parts in zip(*(one.layers for one in caches), strict=True)
    ]
    padding = tuple(width - lengths[row] for row in rows)
    logits = [part.last_logits_BV[list(places)] for part, places, _ in parts]
    return Part(rows, cache, padding, torch.cat(logits))


def keeps_all(layer: CacheLayer) -> bool:
    """Whether a layer keeps the keys of all tokens, and nothing else."""
    kind: type[object] = type(layer)
    return kind is GrowingLayer


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
    return kinds <= {GrowingLayer, DynamicSlidingWindowLayer}


def _joined_layer(layers: Sequence[CacheLayer], sources: Sequence[tuple[int, int]], width: int) -> CacheLayer:
    """These (layer, row), ``width`` columns wide: padding that nobody needs goes, missing columns come on the left."""
    layer = copy.copy(layers[0])
    if not layer.is_initialized:  # a layer that shares another's keys keeps none
        return layer
    kept = width
    if isinstance(layer, DynamicSlidingWindowLayer):
        kept, layer.cumulative_length = min(width, layer.sliding_window - 1), width
    room = roomy([(one.keys, one.values) for one in layers], sources, kept)
    if isinstance(layer, GrowingLayer):
        layer.take(room, kept)
    else:
        layer.keys, layer.values = room.keys_BJCD[:, :, :kept], room.values_BJCD[:, :, :kept]
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
