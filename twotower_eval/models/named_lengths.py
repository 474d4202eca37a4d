"""Lengths of context at which a model may begin to behave otherwise, as far as its config names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Windows, chunks and blocks of attention or of a scan, original lengths of rotary factors, positions that scale
# queries, keys that a sparse attention keeps.
LENGTHS = re.compile(
    r"window|chunk|local_att|original_max|floor_scale|n_floor|block_size|index_topk|sparse.*(size|length|topk)"
)
COUNTS = re.compile(r"(layers|pattern|heads|theta|factor|type|types)$")  # of something else, under a name like theirs


def named_lengths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every such number of a config, ascending, from whatever depth."""
    return tuple(sorted({length for length in _walk(config) if length > 1}))


def _walk(value: Any, named: bool = False) -> Iterator[int]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            is_length = bool(LENGTHS.search(str(name))) and not COUNTS.search(str(name))
            yield from _walk(inner, is_length)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _walk(inner, named)
    elif named and isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
        yield int(value)
