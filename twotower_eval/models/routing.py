"""Forced routing: which experts the tokens of a block share is set from outside, for timing random weights.

Random routers spread a block over nearly as many experts as chance allows, trained ones over fewer, and a denoise
step's time follows the number of experts whose weights are read. So a step is timed at both ends and in the middle.
Shape letters: see ops/__init__.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from twotower_eval.models.nemotron_h import Layer, MixtureOfExperts, Tower
from twotower_eval.records import Routing, derive_seed


class ForcedRouting:
    """Steers the experts of every layer it is attached to. ``kind`` None leaves the routers their choice.

    ``shared``: all tokens of a row go to one set of experts; ``half``: to half of that set, and each token to others
    of its own; ``independent``: each token to its own. Rows never share on purpose, nor do layers.
    """

    def __init__(self, num_experts: int, seed: int) -> None:
        self.num_experts, self.seed = num_experts, seed
        self.kind: Routing | None = None
        self._tables: dict[tuple[int, Routing, torch.Size, torch.device], Tensor] = {}
        self._touched: list[Tensor] | None = None

    def attach(self, tower: Tower) -> None:
        """Steer the tower's experts from now on."""
        for index, layer in enumerate(cast(Iterable[Layer], tower.layers)):
            if isinstance(layer.mixer, MixtureOfExperts):
                layer.mixer.steer = partial(self._steer, index)

    def variant(self) -> str | None:
        """What a captured step must not be mixed up with; None while experts are counted, which no replay does."""
        return None if self._touched is not None else self.kind or "own"

    def count_touched(self) -> None:
        """Begin to note which experts are touched; ask :meth:`mean_touched` afterwards."""
        self._touched = []

    def mean_touched(self) -> float | None:
        """Distinct experts per layer and call since :meth:`count_touched`, the mean; None without such a layer."""
        counts = [chosen.unique().numel() for chosen in self._touched or ()]
        self._touched = None
        return sum(counts) / len(counts) if counts else None

    def _steer(self, layer: int, chosen_RA: Tensor, shape_BS: torch.Size) -> Tensor:
        if self.kind is not None:
            key = (layer, self.kind, shape_BS, chosen_RA.device)
            if key not in self._tables:
                # Drawn on the host, so that all devices time the same routing.
                generator = torch.Generator().manual_seed(derive_seed(self.seed, layer, self.kind, list(shape_BS)))
                table_BSA = draw(self.kind, shape_BS, chosen_RA.shape[1], self.num_experts, generator)
                self._tables[key] = table_BSA.flatten(0, 1).to(chosen_RA)
            chosen_RA = self._tables[key]
        if self._touched is not None:
            self._touched.append(chosen_RA)
        return chosen_RA


def draw(
    kind: Routing, shape_BS: torch.Size, experts_per_token: int, num_experts: int, generator: torch.Generator
) -> Tensor:
    """Experts (B, S, A) for every token, all of a token's distinct."""
    keys_BSE = torch.rand(*shape_BS, num_experts, generator=generator)
    num_common = {"shared": experts_per_token, "half": experts_per_token // 2, "independent": 0}[kind]
    if num_common:
        common_B1E = torch.rand(shape_BS[0], 1, num_experts, generator=generator)
        common_B1A = common_B1E.topk(num_common, dim=-1).indices
        # Keys lie below 1, so that these come first in every token's own order.
        keys_BSE.scatter_(-1, common_B1A.expand(*shape_BS, -1), 2.0)
    return keys_BSE.topk(experts_per_token, dim=-1).indices


def expected_touched(
    kind: Routing, batch_size: int, num_tokens: int, experts_per_token: int, num_experts: int
) -> float:
    """Distinct experts per layer to be expected of :func:`draw` for B rows of S tokens: each expert is missed with
    the same chance, by a row's common set first, then by each token's own experts among the rest."""
    num_common = {"shared": experts_per_token, "half": experts_per_token // 2, "independent": 0}[kind]
    missed = 1 - num_common / num_experts
    if num_common < experts_per_token:
        missed *= (1 - (experts_per_token - num_common) / (num_experts - num_common)) ** num_tokens
    return float(num_experts * (1 - missed**batch_size))
