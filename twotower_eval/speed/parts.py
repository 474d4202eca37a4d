"""Which layers are measured where not all fit: parts of the first layers, chosen so that each kind's cost shows."""

from __future__ import annotations


def measured_layers(pattern: str, num_layers: int | None) -> tuple[tuple[int, ...], ...]:
    """Layer indices of every part to be measured, the largest first.

    All layers where they are all built. Else the first ``num_layers``, the same with every second layer of one kind
    left out, for each kind, no layer at all, and the first half, which no fit needs and which therefore tests it.
    ValueError where the first layers lack a kind that the others have, so that nothing could be said of it.
    """
    if num_layers is None or num_layers == len(pattern):
        return (tuple(range(len(pattern))),)
    if num_layers > len(pattern):
        raise ValueError(f"--layers {num_layers}: the config has {len(pattern)} layers")
    first = pattern[:num_layers]
    lacking = sorted(set(pattern) - set(first))
    if lacking:
        enough = max(pattern.index(kind) for kind in set(pattern)) + 1
        raise ValueError(
            f"the first {num_layers} layers ({first}) have no {lacking[0]} layer to extrapolate from: take --layers "
            f"{enough} or more"
        )
    parts = [tuple(range(num_layers))]
    parts += [_thinned(first, kind) for kind in sorted(set(first))]
    half = tuple(range(num_layers // 2))
    return tuple(dict.fromkeys([*parts, half, ()]))


def _thinned(pattern: str, kind: str) -> tuple[int, ...]:
    """Without every second layer of a kind, the first of them included."""
    of_kind = [index for index, letter in enumerate(pattern) if letter == kind]
    return tuple(index for index in range(len(pattern)) if index not in of_kind[::2])
