"""Steps from buffers that stay where they are, so that a GPU is given a whole step at once, as a CUDA graph.

At batch 1 a step of many small kernels waits for the host between them. Captured, it is launched as one; what it reads
and writes then lies at fixed places, at fixed sizes: so many rows, new tokens and slots. Contexts stay values: what a
step made is copied out. On a device that is no GPU the same code runs without a capture, which is how it is tested.
Shape letters: see ops/__init__; L Mamba layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from twotower_eval.models.autoregressive import ContextTower
from twotower_eval.models.config import NemotronHConfig
from twotower_eval.models.context import Context, Writer, writable_buffer
from twotower_eval.models.nemotron_h import Mamba, MambaState, run_layers
from twotower_eval.models.twotower import Denoiser, TwoTower
from twotower_eval.ops.attention import attention

MIN_SLOTS = 256  # slots are a power of two, so that a growing context changes graphs seldom
MAX_GRAPHS = 8  # kept at once unless said otherwise, the least recently used given up
WARMUPS = 3  # before a capture: lazy initialisation must not be captured
MAX_NEW = 64  # token rows of a step: more of them keep a GPU busy without a graph


class Remembered:
    """A context at fixed places: keys and values with room, Mamba states of all layers in two tensors."""

    def __init__(self, config: NemotronHConfig, batch_size: int, num_slots: int, like: Tensor) -> None:
        self.attentions = [i for i, kind in enumerate(config.pattern) if kind == "*"]
        self.mambas = [i for i, kind in enumerate(config.pattern) if kind == "M"]
        slots = (batch_size, config.num_key_value_heads, num_slots, config.head_dim)
        self.keys = {i: like.new_zeros(slots) for i in self.attentions}
        self.values = {i: like.new_zeros(slots) for i in self.attentions}
        self.conv_LBCW = like.new_zeros(len(self.mambas), batch_size, config.conv_channels, config.conv_kernel)
        heads = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        self.ssm_LBhPN = like.new_zeros(len(self.mambas), batch_size, *heads, dtype=torch.float32)
        self.ends_B = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        self.holds: Context | None = None

    def load(self, context: Context) -> None:
        """Copy a context in, unless it is there already."""
        if self.holds is context:
            return
        length = context.max_length
        for index in self.attentions:
            self.keys[index][:, :, :length].copy_(context.buffer.keys[index][:, :, :length])
            self.values[index][:, :, :length].copy_(context.buffer.values[index][:, :, :length])
        for position, index in enumerate(self.mambas):
            self.conv_LBCW[position].copy_(context.mamba[index].conv_BCW)
            self.ssm_LBhPN[position].copy_(context.mamba[index].ssm_BhPN)
        self.ends_B.copy_(torch.tensor(context.lengths))
        self.holds = context

    def state(self, index: int) -> MambaState:
        """A layer's state, where it lies."""
        position = self.mambas.index(index)
        return MambaState(self.conv_LBCW[position], self.ssm_LBhPN[position])


class Launch:
    """A function of no arguments over fixed buffers: captured on a GPU, called elsewhere."""

    def __init__(self, body: Callable[[], Any], device: torch.device, pool: Any) -> None:
        self._body, self._graph = body, None
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUPS):
                    body()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._result = body()

    def __call__(self) -> Any:
        """What the body gives; on a GPU tensors that the next call overwrites."""
        if self._graph is None:
            return self._body()
        self._graph.replay()
        return self._result


class ExtendStep:
    """The context tower over S more tokens in every row: the AR step, and the context pass of a block."""

    def __init__(self, tower: ContextTower, batch_size: int, num_new: int, num_slots: int, pool: Any) -> None:
        self.tower, self.num_slots = tower, num_slots
        weight = tower.head.weight
        self.past = Remembered(tower.config, batch_size, num_slots, weight)
        self.ids_BS = torch.zeros(batch_size, num_new, dtype=torch.int64, device=weight.device)
        self.launch = Launch(self._body, weight.device, pool)

    def __call__(self, context: Context, ids_BS: Tensor) -> Context:
        """As :meth:`ContextTower.extend`."""
        self.past.load(context)
        self.ids_BS.copy_(ids_BS)
        self.past.holds = None  # should anything fail from here on, the buffers are nobody's context
        hidden_BH, new_keys, new_values = self.launch()
        buffer = writable_buffer(context, ids_BS.shape[1])
        write = Writer(context.lengths, ids_BS.shape[1], self.ids_BS.device)
        for index in self.past.attentions:
            write(buffer.keys[index], new_keys[index])
            write(buffer.values[index], new_values[index])
        buffer.num_writes += 1
        conv_LBCW, ssm_LBhPN = self.past.conv_LBCW.clone(), self.past.ssm_LBhPN.clone()
        states = zip(self.past.mambas, conv_LBCW.unbind(0), ssm_LBhPN.unbind(0), strict=True)
        extended = Context(
            lengths=tuple(length + ids_BS.shape[1] for length in context.lengths),
            buffer=buffer,
            write_mark=buffer.num_writes,
            mamba={index: MambaState(conv, ssm) for index, conv, ssm in states},
            last_hidden_BH=hidden_BH.clone(),
        )
        # The step has left its buffers as the new context has them: the next step copies nothing in.
        self.past.holds = extended
        return extended

    def _body(self) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        past, num_new = self.past, self.ids_BS.shape[1]
        columns_BS = past.ends_B[:, None] + torch.arange(num_new, device=past.ends_B.device)
        slots_T = torch.arange(self.num_slots, device=past.ends_B.device)
        mask = (slots_T <= columns_BS[..., None])[:, None]
        new_keys, new_values = {}, {}

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            where = columns_BS[:, None, :, None].expand_as(k)
            keys, values = past.keys[index].scatter_(2, where, k), past.values[index].scatter_(2, where, v)
            new_keys[index], new_values[index] = k, v
            return attention(q, keys, values, mask)

        def mix(index: int, mixer: Mamba, x: Tensor) -> Tensor:
            before = past.state(index)
            y, after = mixer(x, before)
            before.conv_BCW.copy_(after.conv_BCW)
            before.ssm_BhPN.copy_(after.ssm_BhPN)
            return cast(Tensor, y)

        tower = self.tower.tower
        x_BSH = run_layers(tower, tower.embed(self.ids_BS), attend=attend, mix=mix)
        past.ends_B.add_(num_new)
        return x_BSH[:, -1], new_keys, new_values


class DenoiseStep:
    """The denoiser over one block of K in every row."""

    def __init__(
        self, denoiser: Denoiser, config: NemotronHConfig, batch_size: int, block_size: int, num_slots: int,
        timed: bool, pool: Any,
    ) -> None:  # fmt: skip
        self.denoiser, self.num_slots, self.timed = denoiser, num_slots, timed
        weight = denoiser.head.weight
        self.past = Remembered(config, batch_size, num_slots + block_size, weight)
        self.block_BK = torch.zeros(batch_size, block_size, dtype=torch.int64, device=weight.device)
        self.t_B = torch.zeros(batch_size, dtype=torch.float32, device=weight.device)
        self.launch = Launch(self._body, weight.device, pool)

    def __call__(self, block_BK: Tensor, context: Context, t_B: Tensor | None) -> Tensor:
        """As :meth:`TwoTower.denoise`."""
        self.past.load(context)
        self.block_BK.copy_(block_BK)
        if t_B is not None:
            self.t_B.copy_(t_B)
        logits_BKV: Tensor = self.launch()
        return logits_BKV.clone()

    def _body(self) -> Tensor:
        past, num_slots = self.past, self.num_slots
        seen_BT = torch.arange(num_slots, device=past.ends_B.device) < past.ends_B[:, None]
        mask = functional.pad(seen_BT, (0, self.block_BK.shape[1]), value=True)[:, None, None]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The block's own always lie behind all slots, whatever the context's length.
            past.keys[index][:, :, num_slots:].copy_(k)
            past.values[index][:, :, num_slots:].copy_(v)
            return attention(q, past.keys[index], past.values[index], mask)

        def mix(index: int, mixer: Mamba, x: Tensor) -> Tensor:
            return mixer.outputs(x, past.state(index))

        denoiser = self.denoiser
        modulation = denoiser.modulation(self.t_B) if self.timed else None
        embedded = denoiser.tower.embed(self.block_BK)
        return denoiser.logits(run_layers(denoiser.tower, embedded, attend=attend, mix=mix, modulation=modulation))


class StepGraphs:
    """The steps of one pair by their sizes, made when first asked for, at most ``max_graphs`` of them.

    ``variant`` tells apart what is not in the sizes: forced routing changes what a step does. None there means that
    no graph is to be used.
    """

    def __init__(self, variant: Callable[[], Hashable] = lambda: "own", max_graphs: int = MAX_GRAPHS) -> None:
        self.variant, self.max_graphs = variant, max_graphs
        self._steps: OrderedDict[Hashable, Any] = OrderedDict()
        self._pools: dict[torch.device, Any] = {}

    def serves(self, batch_size: int, num_new: int) -> bool:
        """Whether a step of this size is to come from here. Only without gradients; large ones gain nothing."""
        small = batch_size * num_new <= MAX_NEW
        return small and torch.is_inference_mode_enabled() and self.variant() is not None

    def extend(self, tower: ContextTower, context: Context, ids_BS: Tensor) -> Context:
        """See :class:`ExtendStep`."""
        (batch_size, num_new), slots = ids_BS.shape, _num_slots(context.max_length + ids_BS.shape[1])
        key = ("extend", self.variant(), batch_size, num_new, slots)
        step = self._step(key, lambda: ExtendStep(tower, batch_size, num_new, slots, self._pool(tower.device)))
        extended: Context = step(context, ids_BS)
        return extended

    def denoise(self, pair: TwoTower, block_BK: Tensor, context: Context, t_B: Tensor | None) -> Tensor:
        """See :class:`DenoiseStep`; the context is on the denoiser's device."""
        (batch_size, block_size), slots = block_BK.shape, _num_slots(context.max_length)
        timed, pool = t_B is not None, self._pool(pair.denoiser.head.weight.device)
        key = ("denoise", self.variant(), batch_size, block_size, slots, timed)
        sizes = (batch_size, block_size, slots, timed)
        step = self._step(key, lambda: DenoiseStep(pair.denoiser, pair.config, *sizes, pool))
        logits_BKV: Tensor = step(block_BK, context, t_B)
        return logits_BKV

    def _step(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._steps:
            if len(self._steps) >= self.max_graphs:
                self._steps.popitem(last=False)
            self._steps[key] = make()
        self._steps.move_to_end(key)
        return self._steps[key]

    def _pool(self, device: torch.device) -> Any:
        if device.type == "cuda" and device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return self._pools.get(device)


def use_graphs(pair: TwoTower, variant: Callable[[], Hashable] = lambda: "own", max_graphs: int = MAX_GRAPHS) -> None:
    """From now on take the pair's small steps from graphs. ValueError where a tower is on no CUDA device."""
    for device in (pair.context_tower.device, pair.denoiser.head.weight.device):
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need CUDA devices, a tower is on {device}: drop --cuda-graphs")
    pair.graphs = pair.context_tower.graphs = StepGraphs(variant, max_graphs)


def _num_slots(needed: int) -> int:
    return max(MIN_SLOTS, 1 << (needed - 1).bit_length()) if needed > 0 else MIN_SLOTS
