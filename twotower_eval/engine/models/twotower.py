"""The two-tower model: a causal context tower and a denoiser tower that reads its states layer by layer.

Mathematics and names after the released model (arXiv 2606.26493). Shape letters: see ops/__init__.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from twotower_eval.engine.models.autoregressive import ContextTower
from twotower_eval.engine.models.base import LanguageModel
from twotower_eval.engine.models.config import SINUSOID_SIZE, NemotronHConfig
from twotower_eval.engine.models.context import Context, ends_of, room_for_block
from twotower_eval.engine.models.graphs import StepGraphs
from twotower_eval.engine.models.nemotron_h import Mamba, Modulation, Tower, run_layers
from twotower_eval.engine.models.protocol import Segment
from twotower_eval.engine.models.weights import DerivedByKey
from twotower_eval.engine.ops.attention import attend as attend_to
from twotower_eval.engine.ops.attention import attention, kernel_for_few, seen

TIME_SCALE = 1000.0
MAX_PERIOD = 10_000.0
MAX_TIMES = 64  # mask fractions whose modulation is kept


class TimeEmbedder(nn.Module):
    """Mask fraction t -> r (B, H): a sinusoid of 1000 t, then two linear layers with SiLU between."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_SIZE, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t_B: Tensor) -> Tensor:
        dtype = self.get_parameter("mlp.0.weight").dtype
        out: Tensor = self.mlp(sinusoid(t_B, dtype).to(dtype))
        return out


def sinusoid(t_B: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 256) float32: cosines, then sines, of ``1000 t * 10000^(-i/128)``.

    As in the reference, t is rounded to the model's ``dtype`` and multiplied by 1000 in it (in bfloat16 0.1875 gives
    188, not 187.5); the rest is float32.
    """
    scaled_B = (t_B.to(dtype) * TIME_SCALE).float()
    angles = scaled_B[:, None] * frequencies(t_B.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@cache
def frequencies(device: torch.device) -> Tensor:
    """``10000^(-i/128)``, i = 0..127, float32, correctly rounded.

    Float32 exponentials differ in the last bit between processors, and angles of up to 1000 magnify that to 3e-5;
    rounding from float64 gives the same bits everywhere.
    """
    half = SINUSOID_SIZE // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32) / half
    return exponents.double().exp().float().to(device)


class Denoiser(nn.Module):
    """Denoiser tower, head, and the time modules with one (3, H) table per layer."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.tower = Tower(config)
        self.head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.t_embedder = TimeEmbedder(hidden)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden))
        self.scale_shift_tables = nn.ParameterList([torch.zeros(3, hidden) for _ in config.pattern])
        self._kept_modulation: DerivedByKey[tuple[Tensor, Modulation]] = DerivedByKey(MAX_TIMES)

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._kept_modulation.drop()
        return cast(Self, super()._apply(*args, **options))  # type: ignore[no-untyped-call]

    def modulation_at(self, t: float) -> Modulation:
        """What :meth:`modulation` gives for a row, to be broadcast over rows that are all at ``t``: a block has few
        mask fractions, so that they are computed once."""
        return self._kept(t, self._time_weights())[1]

    def modulation_of_rows(self, times: Sequence[float]) -> Modulation:
        """What :meth:`modulation` gives for rows whose mask fractions the host knows; computed once for each of
        them."""
        weights = self._time_weights()
        tables = {t: self._kept(t, weights)[0] for t in set(times)}
        of_layers_L3B1H = torch.cat([tables[t] for t in times], dim=2)
        shift, gain, gate = of_layers_L3B1H.unbind(1)
        return list(zip(shift.unbind(0), gain.unbind(0), gate.unbind(0), strict=True)).__getitem__

    def _kept(self, t: float, weights: Sequence[Tensor]) -> tuple[Tensor, Modulation]:
        def make() -> tuple[Tensor, Modulation]:
            modulation = self.modulation(_time_tensor(t, 1, self.head.weight.device))
            layers = [torch.stack(modulation(index)) for index in range(len(self.scale_shift_tables))]
            return torch.stack(layers) if layers else self.head.weight.new_empty(0, 3, 1, 1, 0), modulation

        return self._kept_modulation(t, weights, make)

    def _time_weights(self) -> Sequence[Tensor]:
        """All that a modulation is computed from."""
        first, _, last = self.t_embedder.mlp
        parts = (first, last, self.t_block[1], self.scale_shift_tables)
        return [weight for part in parts for weight in part._parameters.values() if weight is not None]

    def modulation(self, t_B: Tensor) -> Modulation:
        """Layer -> shift, 1 + scale, gate (B, 1, H) for mask fractions ``t_B``; of all layers at once."""
        if not len(self.scale_shift_tables):
            return [].__getitem__  # a pair cut down to no layers, whose costs outside them are measured
        time_B3H = self.t_block(self.t_embedder(t_B)).unflatten(-1, (3, -1))
        tables_L13H = torch.stack(list(self.scale_shift_tables))[:, None]
        shift, scale, gate = (tables_L13H + time_B3H)[:, :, :, None].unbind(2)
        return list(zip(shift.unbind(0), (1 + scale).unbind(0), gate.unbind(0), strict=True)).__getitem__

    def logits(self, x_BKH: Tensor) -> Tensor:
        """Final norm (no adaLN) and head, float32."""
        out: Tensor = self.head(self.tower.norm_f(x_BKH))
        return out.float()


class TwoTower(LanguageModel):
    """A pair: ``prefill`` and ``extend`` run the context tower, ``denoise`` the denoiser on one block."""

    branch_tokens = ContextTower.branch_tokens
    verifies = uneven_rows = True
    verified_up_to = None

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.config = config
        self.graphs: StepGraphs | None = None
        self.context_tower = ContextTower(config)
        self.denoiser = Denoiser(config)

    @property
    def towers_apart(self) -> bool:
        """Whether each tower has a device of its own, so that both may work at a time."""
        return self.context_tower.device != self.denoiser.head.weight.device

    @property
    def step_devices(self) -> tuple[torch.device, ...]:
        """Where steps run, see :class:`models.graphs.Stepped`."""
        return (self.context_tower.device, self.denoiser.head.weight.device)

    def take_steps_from(self, graphs: StepGraphs) -> None:
        """From now on take small steps of both towers from there."""
        self.graphs = self.context_tower.graphs = graphs

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Context:
        """See :meth:`ContextTower.prefill`."""
        return self.context_tower.prefill(ids_BS, lengths_B)

    def extend(self, context: Context, ids_BK: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Context:
        """See :meth:`ContextTower.extend`."""
        return self.context_tower.extend(context, ids_BK, lengths_B)

    def extend_logits(
        self, context: Context, ids_BK: Tensor, lengths_B: Sequence[int], wanted: Sequence[tuple[int, int]]
    ) -> tuple[Context, Tensor]:
        """See :meth:`ContextTower.extend_logits`."""
        return self.context_tower.extend_logits(context, ids_BK, lengths_B, wanted)

    def tree_logits(self, context: Context | None, segments: Sequence[Segment]) -> Tensor:
        """See :meth:`ContextTower.tree_logits`."""
        return self.context_tower.tree_logits(context, segments)

    def next_logits(self, context: Context) -> Tensor:
        """See :meth:`ContextTower.next_logits`."""
        return self.context_tower.next_logits(context)

    def context_logits(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, last: int | None = None
    ) -> Tensor:
        """See :meth:`ContextTower.context_logits`."""
        return self.context_tower.context_logits(ids_BS, lengths_B, last=last)

    def denoise(self, block_BK: Tensor, context: Context, t_B: Tensor | Sequence[float] | float | None) -> Tensor:
        """Denoiser logits (B, K, V) float32 for one noisy block per row; ``context`` is not changed.

        ``t_B`` is each row's mask fraction; None means no time conditioning at all, which is not the same as t = 0.
        Attention sees the row's whole context and the whole block; Mamba runs causally over the block from the
        context's state.
        """
        denoiser = self.denoiser
        device = denoiser.head.weight.device
        context = context.on(device)
        block_BK = block_BK.to(device=device, dtype=torch.int64)
        if self.graphs is not None and self.graphs.serves(*block_BK.shape):
            time_B = None if t_B is None else _time_tensor(t_B, block_BK.shape[0], device)
            return self.graphs.denoise(denoiser, block_BK, context, time_B)
        length, end = context.max_length, context.max_length + block_BK.shape[1]
        batch_size, block_size = block_BK.shape
        head_dim, example = self.config.head_dim, denoiser.head.weight
        few = kernel_for_few(example, batch_size, block_size, length, head_dim) is not None
        ends_B = ends_of(context, device) if few else None
        mask = None if few else _block_mask(context, block_BK.shape[1], device)
        appended = None if torch.is_grad_enabled() else room_for_block(context, block_BK.shape[1])

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if appended is None:  # gradients need each call's own
                keys = torch.cat([context.buffer.keys[index][:, :, :length], k], dim=2)
                values = torch.cat([context.buffer.values[index][:, :, :length], v], dim=2)
            else:
                keys, values = appended.keys[index][:, :, :end], appended.values[index][:, :, :end]
                keys[:, :, length:] = k
                values[:, :, length:] = v
            if ends_B is not None:
                return attend_to(q, keys, values, ends_B, length, behind=True)
            return attention(q, keys, values, mask)

        def mix(index: int, mixer: Mamba, x: Tensor) -> Tensor:
            return mixer.outputs(x, context.mamba[index])

        modulation = None if t_B is None else _modulation(denoiser, t_B, block_BK.shape[0], device)
        x_BKH = run_layers(
            denoiser.tower, denoiser.tower.embed(block_BK), attend=attend, mix=mix, modulation=modulation
        )
        return denoiser.logits(x_BKH)


def _modulation(
    denoiser: Denoiser, t_B: Tensor | Sequence[float] | float, batch_size: int, device: torch.device
) -> Modulation:
    """On a CPU what is kept from earlier passes, where the host knows the mask fractions; one for all rows where all
    are at the same."""
    if isinstance(t_B, float) or (isinstance(t_B, list) and len(t_B) == batch_size and len(set(t_B)) == 1):
        return denoiser.modulation_at(t_B if isinstance(t_B, float) else t_B[0])
    if isinstance(t_B, list) and len(t_B) == batch_size and device.type == "cpu":
        return denoiser.modulation_of_rows(t_B)
    return denoiser.modulation(_time_tensor(t_B, batch_size, device))


def _time_tensor(t_B: Tensor | Sequence[float] | float, batch_size: int, device: torch.device) -> Tensor:
    """One mask fraction per row, float32; a single one is meant for all rows."""
    t = torch.as_tensor(t_B, dtype=torch.float32, device=device).flatten()
    if t.numel() not in (1, batch_size):
        raise ValueError(f"t_B has {t.numel()} entries for {batch_size} rows")
    return t.expand(batch_size)


def _block_mask(context: Context, block_size: int, device: torch.device) -> Tensor | None:
    """(B, 1, 1, T + K), True at a row's own context and at the block; None when rows are equally long."""
    if context.uniform:
        return None
    return seen(ends_of(context, device), block_size, context.max_length, behind=True)[1]
