"""Steps over buffers at fixed addresses, so that a GPU receives a whole step at once, as a CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from twotower_eval.engine.models.config import NemotronHConfig
from twotower_eval.engine.models.context import Context, Writer, writable_buffer
from twotower_eval.engine.models.nemotron_h import Mamba, MambaState, Modulation, Tower, run_layers
from twotower_eval.engine.models.protocol import Model
from twotower_eval.engine.ops.attention import attend as attend_to
from twotower_eval.errors import UserError
from twotower_eval.records import GRAPH_DEVICES

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

WARMUPS = 3  # runs before a capture, as lazy initialisation must not be captured

T = TypeVar("T")
Pool: TypeAlias = "_POOL_HANDLE | None"  # memory that captures share
MAX_NEW = 256  # maximum token rows of a step: more keep a GPU busy without a graph


class StaticContext:
    """A context at fixed addresses: keys and values with spare slots, and Mamba states of all layers in two tensors.

    Steps of the same batch size and number of slots share it, so that the denoiser reads what an extension leaves
    there. After ``num_slots`` there is room for a block.
    """

    def __init__(self, config: NemotronHConfig, batch_size: int, num_slots: int, template: Tensor) -> None:
        self.attentions = [i for i, kind in enumerate(config.pattern) if kind == "*"]
        self.mambas = [i for i, kind in enumerate(config.pattern) if kind == "M"]
        self.num_slots = num_slots
        slots = (batch_size, config.num_key_value_heads, num_slots + MAX_NEW // batch_size, config.head_dim)
        self.keys = {i: template.new_zeros(slots) for i in self.attentions}
        self.values = {i: template.new_zeros(slots) for i in self.attentions}
        self.conv_LBCW = template.new_zeros(len(self.mambas), batch_size, config.conv_channels, config.conv_kernel)
        self.conv_after_LBCW = torch.empty_like(self.conv_LBCW)
        heads = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        self.ssm_LBhPN = template.new_zeros(len(self.mambas), batch_size, *heads, dtype=torch.float32)
        self.ends_B = torch.zeros(batch_size, dtype=torch.int64, device=template.device)
        self.holds: Context | None = None

    def clear(self) -> None:
        """Forget the loaded context, which is about to be overwritten."""
        self.holds = None
        self.ends_B.zero_()

    def load(self, context: Context) -> None:
        """Copy a context in, unless it is loaded already."""
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
        """A layer's state, in place."""
        position = self.mambas.index(index)
        return MambaState(self.conv_LBCW[position], self.ssm_LBhPN[position])

    def conv_after(self, index: int) -> Tensor:
        """The buffer in which a step leaves a layer's window (B, C, W) until all of it has been read."""
        return self.conv_after_LBCW[self.mambas.index(index)]


class Launch(Generic[T]):
    """A function without arguments over fixed buffers: captured on a GPU, called elsewhere."""

    def __init__(self, body: Callable[[], T], past: StaticContext, device: torch.device, pool: Pool) -> None:
        self._body, self._graph = body, None
        past.clear()  # the warm-up overwrites the buffers
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
        """Run the body; on a GPU its result is overwritten by the next call."""
        if self._graph is None:
            return self._body()
        self._graph.replay()
        return self._result


MIN_SLOTS = 256  # slots are a power of two, so that a growing context rarely changes graphs
MAX_GRAPHS = 8  # kept at once by default; the least recently used is evicted
KINDS = 3  # of steps: the extension, the denoiser with time and without

StepT = TypeVar("StepT")


class Causal(Protocol):
    """What an extension needs: a causal tower and its head."""

    tower: Tower
    head: nn.Linear


class Denoises(Causal, Protocol):
    """What a denoise step needs: a tower with time conditioning, and its head."""

    def modulation(self, t_B: Tensor) -> Modulation:
        """The modulation of all layers at each row's mask fraction."""

    def logits(self, x_BKH: Tensor) -> Tensor:
        """Logits (B, K, V) float32 of the layers' output."""


class Stepped(Protocol):
    """A model whose small steps may run as graphs."""

    @property
    def graphs(self) -> StepGraphs | None:
        """The graphs of its small steps, or None."""

    @property
    def step_devices(self) -> tuple[torch.device, ...]:
        """The devices of its towers."""

    def take_steps_from(self, graphs: StepGraphs) -> None:
        """Use these graphs for small steps of all towers from now on."""


class ExtendStep:
    """The context tower over S more tokens per row: the AR step, and the context pass of a block."""

    def __init__(self, model: Causal, past: StaticContext, num_new: int, pool: Pool) -> None:
        self.tower, self.past = model.tower, past
        device = past.ends_B.device
        self.ids_BS = torch.zeros(len(past.ends_B), num_new, dtype=torch.int64, device=device)
        self.launch = Launch(self._body, past, device, pool)

    def __call__(self, context: Context, ids_BS: Tensor) -> Context:
        """Like the ``extend`` of a context tower."""
        self.past.load(context)
        self.ids_BS.copy_(ids_BS)
        self.past.holds = None  # if anything fails from here on, the buffers hold no valid context
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
        # The buffers now hold the new context, so the next step copies nothing in.
        self.past.holds = extended
        return extended

    def _body(self) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        past, num_new = self.past, self.ids_BS.shape[1]
        columns_BS = past.ends_B[:, None] + torch.arange(num_new, device=past.ends_B.device)
        new_keys, new_values = {}, {}

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            where = columns_BS[:, None, :, None].expand_as(k)
            keys, values = past.keys[index].scatter_(2, where, k), past.values[index].scatter_(2, where, v)
            new_keys[index], new_values[index] = k, v
            return attend_to(q, keys, values, past.ends_B, past.num_slots, behind=False)

        def mix(index: int, mixer: Mamba, x: Tensor) -> Tensor:
            before = past.state(index)
            # Several programs read a window at once: the new one stays elsewhere until the step is over.
            return mixer.advance(x, before, MambaState(past.conv_after(index), before.ssm_BhPN))

        x_BSH = run_layers(self.tower, self.tower.embed(self.ids_BS), attend=attend, mix=mix)
        past.conv_LBCW.copy_(past.conv_after_LBCW)
        past.ends_B.add_(num_new)
        return x_BSH[:, -1], new_keys, new_values


class DenoiseStep:
    """The denoiser over one block of K in every row."""

    def __init__(self, denoiser: Denoises, past: StaticContext, block_size: int, timed: bool, pool: Pool) -> None:
        self.denoiser, self.past, self.timed = denoiser, past, timed
        batch_size, device = len(past.ends_B), past.ends_B.device
        self.block_BK = torch.zeros(batch_size, block_size, dtype=torch.int64, device=device)
        self.t_B = torch.zeros(batch_size, dtype=torch.float32, device=device)
        self.launch = Launch(self._body, past, device, pool)

    def __call__(self, block_BK: Tensor, context: Context, t_B: Tensor | None) -> Tensor:
        """Like the ``denoise`` of a pair."""
        self.past.load(context)
        self.block_BK.copy_(block_BK)
        if t_B is not None:
            self.t_B.copy_(t_B)
        logits_BKV: Tensor = self.launch()
        return logits_BKV.clone()

    def _body(self) -> Tensor:
        past, num_slots, block_size = self.past, self.past.num_slots, self.block_BK.shape[1]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The block's keys lie after all slots, at any context length.
            keys, values = (slots[index][:, :, : num_slots + block_size] for slots in (past.keys, past.values))
            keys[:, :, num_slots:].copy_(k)
            values[:, :, num_slots:].copy_(v)
            return attend_to(q, keys, values, past.ends_B, num_slots, behind=True)

        def mix(index: int, mixer: Mamba, x: Tensor) -> Tensor:
            return mixer.outputs(x, past.state(index))

        denoiser = self.denoiser
        modulation = denoiser.modulation(self.t_B) if self.timed else None
        embedded = denoiser.tower.embed(self.block_BK)
        return denoiser.logits(run_layers(denoiser.tower, embedded, attend=attend, mix=mix, modulation=modulation))


class StepGraphs:
    """The steps of one model by size, made when first needed, at most ``max_graphs`` of them.

    ``variant`` distinguishes what sizes do not, such as forced routing; if it returns None, no graph is used.
    ``widths`` are the recurring numbers of new tokens (pieces of prompts have any number, once each, and run without
    graphs); None: all. ``num_made`` counts the steps made so far: on a GPU each is a capture, which takes longer than
    many steps.
    """

    def __init__(
        self,
        variant: Callable[[], Hashable] = lambda: "own",
        max_graphs: int = MAX_GRAPHS,
        widths: Collection[int] | None = None,
    ) -> None:
        self.variant, self.max_graphs, self.widths, self.num_made = variant, max_graphs, widths, 0
        self._steps: OrderedDict[Hashable, object] = OrderedDict()
        self._pasts: WeakValueDictionary[Hashable, StaticContext] = WeakValueDictionary()
        self._pools: dict[torch.device, Pool] = {}

    def serves(self, batch_size: int, num_new: int) -> bool:
        """Whether steps of this size run as graphs: only without gradients; large ones gain nothing."""
        small = batch_size * num_new <= MAX_NEW and (self.widths is None or num_new in self.widths)
        return small and torch.is_inference_mode_enabled() and self.variant() is not None

    def extend(self, model: Causal, context: Context, ids_BS: Tensor) -> Context:
        """See :class:`ExtendStep`."""
        (batch_size, num_new), slots = ids_BS.shape, slots_for(context.max_length + ids_BS.shape[1])

        def make() -> ExtendStep:
            past = self._past(model.tower.config, batch_size, slots, model.head.weight)
            return ExtendStep(model, past, num_new, self._pool(model.head.weight.device))

        return self._step(("extend", self.variant(), batch_size, num_new, slots), make)(context, ids_BS)

    def denoise(self, denoiser: Denoises, block_BK: Tensor, context: Context, t_B: Tensor | None) -> Tensor:
        """See :class:`DenoiseStep`; the context is on the denoiser's device."""
        (batch_size, block_size), slots = block_BK.shape, slots_for(context.max_length)
        timed, weight = t_B is not None, denoiser.head.weight

        def make() -> DenoiseStep:
            past = self._past(denoiser.tower.config, batch_size, slots, weight)
            return DenoiseStep(denoiser, past, block_size, timed, self._pool(weight.device))

        step = self._step(("denoise", self.variant(), batch_size, block_size, slots, timed), make)
        return step(block_BK, context, t_B)

    def _step(self, key: Hashable, make: Callable[[], StepT]) -> StepT:
        if key not in self._steps:
            if len(self._steps) >= self.max_graphs:
                self._steps.popitem(last=False)
            self._steps[key] = make()
            self.num_made += 1
        self._steps.move_to_end(key)
        return cast(StepT, self._steps[key])

    def _past(self, config: NemotronHConfig, batch_size: int, slots: int, template: Tensor) -> StaticContext:
        """A static context, kept while steps use it."""
        key = (template.device, batch_size, slots)
        past = self._pasts.get(key)
        if past is None:
            past = self._pasts[key] = StaticContext(config, batch_size, slots, template)
        return past

    def _pool(self, device: torch.device) -> Pool:
        if device.type == "cuda" and device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return self._pools.get(device)


def stepped(model: Model) -> Stepped:
    """The model as :class:`Stepped`; UserError if its family has no graphs."""
    if not hasattr(model, "take_steps_from"):
        raise UserError(
            f"checkpoint {model.checkpoint.name} is of family {model.checkpoint.family}, whose steps cannot come from "
            "CUDA graphs: drop --cuda-graphs"
        )
    return cast(Stepped, model)


def use_graphs(
    model: Stepped,
    variant: Callable[[], Hashable] = lambda: "own",
    max_graphs: int = MAX_GRAPHS,
    widths: Collection[int] | None = None,
) -> StepGraphs:
    """Use these graphs for small steps of all towers from now on."""
    for device in model.step_devices:
        if device.type not in GRAPH_DEVICES:
            raise UserError(f"CUDA graphs need CUDA devices, a tower is on {device}: drop --cuda-graphs")
    graphs = StepGraphs(variant, max_graphs, widths)
    model.take_steps_from(graphs)
    return graphs


def slots_for(num_tokens: int) -> int:
    """Slots of the steps on contexts of up to that many tokens."""
    return max(MIN_SLOTS, 1 << (num_tokens - 1).bit_length()) if num_tokens > 0 else MIN_SLOTS


def num_slot_counts(shortest: int, longest: int) -> int:
    """Number of slot counts that contexts growing from ``shortest`` to ``longest`` tokens go through."""
    return (slots_for(longest) // slots_for(shortest)).bit_length()


def num_sizes(max_rows: int, widths: Collection[int], longest: int) -> int:
    """The maximum number of steps with up to ``max_rows`` rows, which become fewer as they finish.

    ``widths`` are the new tokens per row: 1, and block sizes. Contexts have up to ``longest`` tokens, including those
    of the last step.
    """
    of_rows = sum(min(max_rows, MAX_NEW // width) for width in set(widths))
    return KINDS * of_rows * num_slot_counts(0, longest)
