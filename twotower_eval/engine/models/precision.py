"""Half-precision weights in float32 for a while: what is proved of a model is code, and there its faults stand out from
rounding.

All of them are widened at once where memory allows it, else those of one layer at a time, while it runs. Both give the
same numbers, and all is put back bit by bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

Widening = Literal["at once", "by layer"]
SLACK = 1.1  # blocks of memory are larger than what is asked for
Narrow = list[tuple[Tensor, torch.dtype]]


def widening(inner: nn.Module, device: torch.device) -> Widening | None:
    """How the free memory allows to widen a model; None where it does not."""
    outside, layers = _parts(inner)
    free = free_bytes(device)
    everything = [tensor for part in (outside, *layers) for tensor in part]
    if _needed(everything) <= free:
        return "at once"
    return "by layer" if max((_needed(outside + layer) for layer in layers), default=free + 1) <= free else None


@contextmanager
def widened(inner: nn.Module, how: Widening | None) -> Iterator[None]:
    """The model in float32; as it is where ``how`` is None."""
    outside, layers = _parts(inner)
    if how == "at once":
        outside, layers = [tensor for part in (outside, *layers) for tensor in part], []
    with ExitStack() as stack:
        if how is not None:
            narrow = _dtypes(outside)
            stack.callback(_narrow, narrow)
            _widen(narrow)
            for layer, tensors in zip(_layers(inner), layers, strict=False):
                _widen_while_running(layer, _dtypes(tensors), stack)
        yield


def free_bytes(device: torch.device) -> int:
    """Memory that may be taken: on a GPU with what torch keeps for later, on Linux with what caches files."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        told = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
        if told is not None:
            return 1024 * int(told)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return 0


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists: a layer's own lists, of experts, run inside it."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _parts(inner: nn.Module) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Half-precision tensors outside all layers, and those of each layer; some are of several."""
    layers = [_half(layer) for layer in _layers(inner)]
    inside = {id(tensor) for layer in layers for tensor in layer}
    return [tensor for tensor in _half(inner) if id(tensor) not in inside], layers


def _half(module: nn.Module) -> list[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]


def _needed(tensors: Sequence[Tensor]) -> float:
    """Bytes beyond today's while they are widened one after the other, each beside its old self."""
    sizes = list({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
    return SLACK * (sum(sizes) + max(sizes, default=0))


def _dtypes(tensors: Sequence[Tensor]) -> Narrow:
    return list({id(tensor): (tensor, tensor.dtype) for tensor in tensors}.values())


def _widen(narrow: Narrow) -> None:
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()


def _narrow(narrow: Narrow) -> None:
    for tensor, dtype in narrow:
        tensor.data = tensor.data.to(dtype)


def _widen_while_running(layer: nn.Module, narrow: Narrow, stack: ExitStack) -> None:
    """Until the stack closes; narrow again whatever the layer raises."""

    def before(*_: object) -> None:
        _widen(narrow)

    def after(*_: object) -> None:
        _narrow(narrow)

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after, always_call=True).remove)
