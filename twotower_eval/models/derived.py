"""What is computed from a weight, kept until the weight changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """``make`` of a weight on a CPU, where calls cost more than memory; elsewhere, and for weights in training, it is
    made anew each time.

    Assignment and in-place changes of the weight are seen; what writes through ``.data`` is not, and must
    :meth:`drop` it.
    """

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._make = make
        self._kept: tuple[Tensor, int, T] | None = None

    def __call__(self, weight: Tensor) -> T:
        if weight.requires_grad or weight.device.type != "cpu" or weight.is_inference():
            return self._make(weight)
        if self._kept is not None and self._kept[0] is weight and self._kept[1] == weight._version:
            return self._kept[2]
        with torch.inference_mode(False), torch.no_grad():
            value = self._make(weight)
        self._kept = (weight, weight._version, value)
        return value

    def drop(self) -> None:
        """Make it anew at the next call."""
        self._kept = None
