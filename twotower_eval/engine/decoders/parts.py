"""Steps that read only a part of a block or canvas: which rows share a call, and what an earlier pass kept of them.

Shape letters: B rows, M tokens of a part, K tokens of a block or canvas.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import Keeping, Kept, Model
from twotower_eval.errors import UserError

STEPS_PER_TOKEN = 2  # of a block without a schedule: more are needed only where the mask token wins again and again
Held = tuple[Kept, int]  # what a pass kept of several rows, and the place of one of them in it


def alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """Positions of equal keys, in the order of their first.

    >>> alike("abca")
    [[0, 3], [1], [2]]
    """
    found: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return list(found.values())


def gathered(held: Sequence[Held | None]) -> Kept:
    """What was kept of these rows, in their order; without a copy where it is all that one pass kept."""
    found: list[tuple[Kept, list[int]]] = []
    for each in held:
        assert each is not None
        kept, place = each
        if found and found[-1][0] is kept:
            found[-1][1].append(place)
        else:
            found.append((kept, [place]))
    first, *others = (kept if places == list(range(kept.num_rows)) else kept.select(places) for kept, places in found)
    for other in others:
        first = first.join(other)
    return first


def spread(part_BM: Tensor, starts: Sequence[int], width: int) -> Tensor:
    """Values of a part at its places in a block of ``width``, (B, K); 0 elsewhere."""
    places_BM = torch.tensor(list(starts))[:, None] + torch.arange(part_BM.shape[1])
    return part_BM.new_zeros(len(part_BM), width).scatter(1, places_BM, part_BM)


def check_keeps(model: Model, decoder: str, parameter: str) -> Keeping:
    """The model as one that can read a part again. UserError, naming the parameter, for others."""
    if not hasattr(model, "denoise_part"):
        raise UserError(
            f"decoder {decoder!r} with {parameter} reads parts of a block behind kept keys and values, which family "
            f"{model.checkpoint.family} cannot: leave it out"
        )
    return cast(Keeping, model)
