"""Steps of transformers models over a static cache: keys and values in buffers of fixed size, which a compiled step can
read. Shape letters: B rows in progress, S slots of the buffers, C columns, J heads, D dimensions, V vocabulary.

Rows keep their slots: one that has finished is read on as dead weight, so that every step has the same shape. Contexts
here are no values: a step overwrites the buffers, and the context before it is void.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn

from twotower_eval.engine.models.transformers_cache import CacheContext, GrowingLayer, Part
from twotower_eval.engine.models.transformers_types import CausalLM
from twotower_eval.errors import UserError

# Torch's own limit is 8 shapes of a function, beyond which it silently goes on without compiling.
MOST_SHAPES = 256
Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # ids (S, 1), positions (S, 1), additive mask (S, 1, 1, C) -> (S, V)


@dataclass(frozen=True, kw_only=True)
class StaticSize:
    """Buffers for ``slots`` rows of up to ``columns`` tokens. ``compile``: a mode of torch.compile, None: steps are not
    compiled."""

    slots: int
    columns: int
    compile: str | None = None


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A step that was compiled, in seconds of its first run."""

    size: StaticSize
    wall_s: float


class Buffers:
    """The static cache of one size, and what is in it: ``num_columns``, padding included, rows aligned on the right."""

    def __init__(self, inner: CausalLM, size: StaticSize, forward: Callable[..., Tensor]) -> None:
        make: Any = transformers.StaticCache
        self.size = size
        self.cache: Any = make(config=inner.config, max_cache_len=size.columns)
        self.num_columns = 0
        self.padding_S = torch.zeros(size.slots, dtype=torch.int64, device=inner.device)
        self.columns_C = torch.arange(size.columns, device=inner.device)
        self.compiled: Step | None = None
        cache = self.cache

        def given(ids_S1: Tensor, position_S1: Tensor, mask_S11C: Tensor) -> dict[str, Any]:
            inputs = {"input_ids": ids_S1, "position_ids": position_S1, "attention_mask": mask_S11C}
            return {**inputs, "past_key_values": cache, "use_cache": True}

        self.step: Step = lambda *inputs: forward(**given(*inputs))[:, -1]
        self.to_compile: Step = lambda *inputs: inner(**given(*inputs)).logits[:, -1]

    def fill(self, part: Part) -> None:
        """Take the rows of a context into the first slots, and leave nothing of earlier ones."""
        assert part.cache is not None
        for ours, theirs in zip(self.cache.layers, part.cache.layers, strict=True):
            if not theirs.is_initialized:  # a layer that shares another's keys keeps none
                continue
            num_rows, _, width, _ = theirs.keys.shape
            if not ours.is_initialized:
                ours.lazy_initialization(*(one[:1, :, :0].expand(self.size.slots, -1, -1, -1) for one in _held(theirs)))
            for buffer_SJCD, own_BJTD in zip(_held(ours), _held(theirs), strict=True):
                buffer_SJCD.zero_()
                buffer_SJCD[:num_rows, :, :width] = own_BJTD
        self.padding_S.zero_()
        self.padding_S[: len(part.padding)] = torch.tensor(part.padding, device=self.padding_S.device)
        self.rewind(part.padding[0] + len_of(part))

    def rewind(self, num_columns: int) -> None:
        """Hold so many columns; what is behind them is written anew."""
        self.num_columns = num_columns
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(num_columns)

    def inputs(self, ids_B: Tensor, slots: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A step's inputs: the tokens of the rows in these slots, padding in all others."""
        ids_S1 = torch.zeros((self.size.slots, 1), dtype=torch.int64, device=self.padding_S.device)
        ids_S1[list(slots), 0] = ids_B.to(self.padding_S.device)
        seen_SC = (self.columns_C >= self.padding_S[:, None]) & (self.columns_C <= self.num_columns)
        mask_SC = torch.zeros(seen_SC.shape, dtype=dtype, device=seen_SC.device)
        mask_SC.masked_fill_(~seen_SC, torch.finfo(dtype).min)
        return ids_S1, (self.num_columns - self.padding_S)[:, None], mask_SC[:, None, None]


def _held(layer: Any) -> tuple[Tensor, Tensor]:
    """A layer's keys and values."""
    return layer.keys, layer.values


def len_of(part: Part) -> int:
    """Tokens of a part's first row."""
    assert part.cache is not None
    width = next(layer.keys.shape[2] for layer in part.cache.layers if layer.is_initialized)
    return int(width) - part.padding[0]


@dataclass(frozen=True, kw_only=True)
class StaticContext(CacheContext):
    """Rows in slots of static buffers, of which ``num_columns`` were filled when it was made."""

    slots: tuple[int, ...]
    logits_BV: Tensor
    buffers: Buffers
    num_columns: int

    def select(self, rows: Sequence[int]) -> Self:
        """These rows, which keep their slots; all others are dead weight from now on."""
        return replace(
            self,
            tokens=tuple(self.tokens[row] for row in rows),
            slots=tuple(self.slots[row] for row in rows),
            logits_BV=self.logits_BV[list(rows)],
        )

    def cut(self, num_fewer_B: Sequence[int], logits_BV: Tensor) -> None:
        """Not to be had."""

    @staticmethod
    def gathered(parts: Sequence[tuple[CacheContext, Sequence[int]]]) -> CacheContext:
        """Rows of one context; those of several have no buffers in common."""
        ((context, rows),) = parts
        return context.select(rows)


class StaticSteps(nn.Module):
    """Runs the steps of a model over static buffers, which are kept from call to call, one of each size.

    ``made``: the steps that were compiled so far. A module, so that whoever counts what enters a network sees a step
    that is compiled, too; its parameters are the model's and are not listed again.
    """

    def __init__(self, inner: CausalLM, forward: Callable[..., Tensor]) -> None:
        """``forward`` gives the model's logits, and its errors in one line."""
        super().__init__()
        self._inner, self._forward = (inner,), forward  # in a tuple, which is no part of this module
        self._kept: dict[StaticSize, Buffers] = {}
        self.made: list[Compiled] = []
        self.same: Callable[[Tensor, Tensor], bool] = torch.equal  # whether logits are the same but for rounding

    @property
    def num_made(self) -> int:
        """How many steps were compiled so far."""
        return len(self.made)

    def forget(self) -> None:
        """Free all buffers, and what was compiled for them."""
        self._kept.clear()

    def begin(self, context: CacheContext, size: StaticSize) -> StaticContext:
        """The rows of a context in static buffers. UserError where it has no cache, or not one for all rows."""
        if len(context.parts) != 1 or context.parts[0].cache is None:
            raise UserError(f"a static cache of {size.columns} columns: these prompts are read without a cache")
        (part,) = context.parts
        buffers = self._kept.get(size)
        if buffers is None:
            buffers = self._kept[size] = Buffers(self._inner[0], size, self._forward)
        buffers.fill(part)
        order = [part.rows.index(row) for row in range(len(part.rows))]
        return StaticContext(
            tokens=context.tokens,
            parts=(),
            slots=tuple(order),
            logits_BV=part.last_logits_BV[order],
            buffers=buffers,
            num_columns=buffers.num_columns,
        )

    def forward(self, context: StaticContext, ids_B1: Tensor) -> StaticContext:
        """The context after one more token in every row; the one before it is void."""
        buffers = context.buffers
        assert buffers.num_columns == context.num_columns, "a static context is gone on from once"
        assert buffers.num_columns < buffers.size.columns, "a static cache is as long as its call"
        inputs = buffers.inputs(ids_B1[:, 0], context.slots, self._inner[0].dtype)
        if buffers.size.compile is not None and buffers.compiled is None:
            logits_SV = self._compile(buffers, inputs, context.slots)
        else:
            logits_SV = (buffers.compiled or buffers.step)(*inputs)
        buffers.num_columns += 1
        tokens = tuple((*old, int(new)) for old, (new,) in zip(context.tokens, ids_B1.tolist(), strict=True))
        logits_BV = logits_SV[list(context.slots)].float()  # a copy: CUDA graphs overwrite what they gave
        return replace(context, tokens=tokens, logits_BV=logits_BV, num_columns=buffers.num_columns)

    def _compile(self, buffers: Buffers, inputs: tuple[Tensor, Tensor, Tensor], slots: Sequence[int]) -> Tensor:
        """The first step of this size, compiled and held against the same one as it is.

        UserError where torch cannot compile it, or where it gives other logits.
        """
        known, (inner,) = buffers.num_columns, self._inner
        plain_SV = buffers.step(*inputs).clone()
        buffers.rewind(known)
        began_s = time.perf_counter()
        with warnings.catch_warnings(), _without_hooks(inner):
            warnings.simplefilter("ignore")
            buffers.compiled = compiled(buffers.to_compile, buffers.size.compile)
            logits_SV = run_compiled(buffers.compiled, inputs, inner)
        self.made.append(Compiled(size=buffers.size, wall_s=time.perf_counter() - began_s))
        rows = list(slots)
        if not self.same(logits_SV[rows].float(), plain_SV[rows].float()):
            raise UserError(
                f"torch.compile changes the logits of {inner.config.model_type} by more than rounding: "
                "take static_cache without compile"
            )
        return logits_SV


@contextmanager
def _without_hooks(network: nn.Module) -> Iterator[None]:
    """The network without the hooks of whoever counts its forwards, which would be compiled with it."""
    held = [(module, module._forward_pre_hooks) for module in network.modules()]
    for module, hooks in held:
        module._forward_pre_hooks = type(hooks)()
    try:
        yield
    finally:
        for module, hooks in held:
            module._forward_pre_hooks = hooks


def compiled(step: Step, mode: str | None) -> Step:
    """The step under torch.compile, for one shape alone."""
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, MOST_SHAPES)
    made: Step = torch.compile(step, dynamic=False, mode=None if mode == "default" else mode)
    return made


def run_compiled(step: Step, inputs: tuple[Tensor, Tensor, Tensor], inner: CausalLM) -> Tensor:
    """Its first run, which compiles it. UserError in one line where that fails."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        return step(*inputs)
    except (TorchDynamoException, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"torch.compile cannot compile {inner.config.model_type} here: {reason}") from error


def check_compiler(device: torch.device) -> None:
    """UserError where torch.compile has no compiler for steps on this device."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise UserError("compile needs triton on a GPU: install it, or leave compile out") from error
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            "compile needs a C++ compiler on a CPU, and none was found: install g++, name yours in CXX, or leave "
            "compile out"
        ) from error


def has_static_layers(layers: Sequence[object]) -> bool:
    """Whether all layers keep all keys and nothing else, so that static ones can stand for them."""
    kinds = set(map(type, layers))
    return bool(kinds) and kinds <= {GrowingLayer}
