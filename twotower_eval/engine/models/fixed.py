"""What a captured step stands on: a context at fixed places, and the launch of a function over fixed buffers.

Shape letters: see ops/__init__; L Mamba layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from twotower_eval.engine.models.config import NemotronHConfig
from twotower_eval.engine.models.context import Context
from twotower_eval.engine.models.nemotron_h import MambaState

WARMUPS = 3  # before a capture: lazy initialisation must not be captured
if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

T = TypeVar("T")
Pool: TypeAlias = "_POOL_HANDLE | None"  # memory that captures share
MAX_NEW = 256  # token rows of a step: more of them keep a GPU busy without a graph


class Remembered:
    """A context at fixed places: keys and values with room, Mamba states of all layers in two tensors.

    Steps of one batch size and as many slots share it, so that what an extension leaves there is what the denoiser
    reads next. Behind ``num_slots`` there is room for a block.
    """

    def __init__(self, config: NemotronHConfig, batch_size: int, num_slots: int, like: Tensor) -> None:
        self.attentions = [i for i, kind in enumerate(config.pattern) if kind == "*"]
        self.mambas = [i for i, kind in enumerate(config.pattern) if kind == "M"]
        self.num_slots = num_slots
        slots = (batch_size, config.num_key_value_heads, num_slots + MAX_NEW // batch_size, config.head_dim)
        self.keys = {i: like.new_zeros(slots) for i in self.attentions}
        self.values = {i: like.new_zeros(slots) for i in self.attentions}
        self.conv_LBCW = like.new_zeros(len(self.mambas), batch_size, config.conv_channels, config.conv_kernel)
        self.conv_after_LBCW = torch.empty_like(self.conv_LBCW)
        heads = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        self.ssm_LBhPN = like.new_zeros(len(self.mambas), batch_size, *heads, dtype=torch.float32)
        self.ends_B = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        self.holds: Context | None = None

    def clear(self) -> None:
        """Hold nobody's context, an empty one: what lies here is overwritten."""
        self.holds = None
        self.ends_B.zero_()

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

    def conv_after(self, index: int) -> Tensor:
        """Where a step leaves a layer's window (B, C, W) until all of it has been read."""
        return self.conv_after_LBCW[self.mambas.index(index)]


class Launch(Generic[T]):
    """A function of no arguments over fixed buffers: captured on a GPU, called elsewhere."""

    def __init__(self, body: Callable[[], T], past: Remembered, device: torch.device, pool: Pool) -> None:
        self._body, self._graph = body, None
        past.clear()  # a warm-up steps on whatever is there
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUPS):
                    past.clear()
                    body()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._result = body()

    def __call__(self) -> T:
        """What the body gives; on a GPU tensors that the next call overwrites."""
        if self._graph is None:
            return self._body()
        self._graph.replay()
        return self._result
