"""Pairs of random weights with forced experts, made on their devices: step costs without a checkpoint.

The outputs of such a pair mean nothing, and its checkpoint's name says so. Random routers spread a block over nearly as
many experts as chance allows, trained ones over fewer, and a denoise step's time grows with the number of experts read.
So experts are forced, and a step is timed at both extremes and in the middle. Shape letters: see ops/__init__.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from twotower_eval.engine.models.checkpoint import materialise
from twotower_eval.engine.models.config import NemotronHConfig, num_common
from twotower_eval.engine.models.nemotron_h import Layer, MixtureOfExperts, Tower, initialise
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.errors import UserError
from twotower_eval.records import Checkpoint, Routing, canonical_json, derive_seed, sha256_text


def build_random_pair(
    config: NemotronHConfig, *, name: str, dtype: torch.dtype, devices: tuple[str, ...], seed: int, share_towers: bool
) -> TwoTower:
    """A pair of seeded random weights, each made on the device where it stays.

    With ``share_towers`` both towers use one set of layers, which halves the memory: a step runs one tower and reads as
    much either way. That needs a single device.
    """
    if share_towers and len(set(devices)) > 1:
        raise UserError("towers that share their weights are on one device: name one, or drop --share-towers")
    with torch.device("meta"):
        pair = TwoTower(config)
    if share_towers:
        pair.denoiser.tower = pair.context_tower.tower
    materialise(pair.context_tower, dtype, devices[0])
    materialise(pair.denoiser, dtype, devices[-1])
    _fill(pair, seed)
    _identify(pair, name, dtype, devices, seed, share_towers)
    return pair.eval()


def steer(pair: TwoTower, seed: int) -> ForcedRouting:
    """Force the routing of both towers' experts; every layer serves all positions, wherever it stands, so that layers
    that are not built cost the same as built ones."""
    pair.context_tower.last_alone = False
    routing = ForcedRouting(pair.config.n_routed_experts, seed)
    for tower in (pair.context_tower.tower, pair.denoiser.tower):
        routing.attach(tower)
    return routing


def with_layers(pair: TwoTower, kept: Sequence[int]) -> TwoTower:
    """A pair with some of the layers, on the same tensors: its steps cost what those layers cost."""
    config = pair.config
    pattern = "".join(config.pattern[index] for index in kept)
    config = dataclasses.replace(config, hybrid_override_pattern=pattern)
    with torch.device("meta"):
        small = TwoTower(config)
    towers = ((small.context_tower.tower, pair.context_tower.tower), (small.denoiser.tower, pair.denoiser.tower))
    for ours, whole in towers:
        ours.embeddings, ours.norm_f = whole.embeddings, whole.norm_f
        ours.layers = nn.ModuleList([whole.layers[index] for index in kept])
    small.context_tower.last_alone = pair.context_tower.last_alone
    small.context_tower.head, small.denoiser.head = pair.context_tower.head, pair.denoiser.head
    small.denoiser.t_embedder, small.denoiser.t_block = pair.denoiser.t_embedder, pair.denoiser.t_block
    tables = [pair.denoiser.scale_shift_tables[index] for index in kept]
    small.denoiser.scale_shift_tables = nn.ParameterList(tables)
    before = pair.checkpoint
    digest = sha256_text(canonical_json([before.digest, list(kept)]))
    small.checkpoint = dataclasses.replace(before, revision=f"layers {pattern or 'none'}", digest=digest)
    _limits(small)
    return small.eval()


@torch.no_grad()
def _fill(pair: TwoTower, seed: int) -> None:
    """Draw every weight from a generator on its own device; time tables keep gates at 1, so that all layers count."""
    config, denoiser = pair.config, pair.denoiser
    for offset, (tower, head) in enumerate(
        ((pair.context_tower.tower, pair.context_tower.head), (denoiser.tower, denoiser.head))
    ):
        generator = torch.Generator(head.weight.device).manual_seed(seed + offset)
        if offset == 0 or tower is not pair.context_tower.tower:
            initialise(tower, generator)
        head.weight.normal_(0.0, config.initializer_range, generator=generator)
    for parameter in [*denoiser.t_embedder.parameters(), *denoiser.t_block.parameters()]:
        parameter.normal_(0.0, config.initializer_range, generator=generator)
    for table_3H in denoiser.scale_shift_tables:
        table_3H.zero_()
        table_3H[2] = 1.0


def _identify(
    pair: TwoTower, name: str, dtype: torch.dtype, devices: tuple[str, ...], seed: int, share_towers: bool
) -> None:
    identity = ["random weights", dataclasses.asdict(pair.config), seed, share_towers]
    digest = sha256_text(canonical_json(identity))
    towers = ", one set for both towers" if share_towers else ""
    pair.checkpoint = Checkpoint(
        name=f"{name} (random weights{towers})",
        family="nemotron_h",
        source=f"random weights, seed {seed}",
        digest=digest,
        dtype=str(dtype).removeprefix("torch."),
        devices=devices,
    )
    _limits(pair)


def _limits(pair: TwoTower) -> None:
    pair.context_digest = sha256_text(canonical_json([pair.checkpoint.digest, "context"]))
    pair.vocab_size, pair.max_length = pair.config.vocab_size, pair.config.max_position_embeddings
    pair.mask_token_id, pair.has_denoiser = pair.config.mask_token_id, True


class ForcedRouting:
    """Forces the experts of every layer it is attached to. ``kind`` None leaves the routers their choice.

    ``shared``: all tokens of a row use one set of experts; ``half``: half of that set, and other experts per token;
    ``independent``: each token its own set. Rows and layers are drawn separately.
    """

    def __init__(self, num_experts: int, seed: int) -> None:
        self.num_experts, self.seed = num_experts, seed
        self.kind: Routing | None = None
        self._tables: dict[tuple[int, Routing, torch.Size, torch.device], Tensor] = {}
        self._touched: list[Tensor] | None = None

    def attach(self, tower: Tower) -> None:
        """Force the tower's experts from now on."""
        for index, layer in enumerate(cast(Iterable[Layer], tower.layers)):
            if isinstance(layer.mixer, MixtureOfExperts):
                layer.mixer.steer = partial(self._steer, index)

    def variant(self) -> str | None:
        """Key of captured steps, which depend on the routing; None while experts are counted, as replays count
        nothing."""
        return None if self._touched is not None else self.kind or "own"

    def count_touched(self) -> None:
        """Start counting touched experts; :meth:`mean_touched` gives the result."""
        self._touched = []

    def mean_touched(self) -> float | None:
        """Mean distinct experts per layer and call since :meth:`count_touched`; None without such a layer."""
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
    """Experts (B, S, A) for every token, distinct within a token."""
    keys_BSE = torch.rand(*shape_BS, num_experts, generator=generator)
    common = num_common(kind, experts_per_token)
    if common:
        common_B1E = torch.rand(shape_BS[0], 1, num_experts, generator=generator)
        common_B1A = common_B1E.topk(common, dim=-1).indices
        # Keys lie below 1, so that these come first in every token's own order.
        keys_BSE.scatter_(-1, common_B1A.expand(*shape_BS, -1), 2.0)
    return keys_BSE.topk(experts_per_token, dim=-1).indices
