"""Weights: modules whose look-ups cost nothing, and what is computed from a weight and kept until it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from twotower_eval.engine.ops import norm


class Direct(nn.Module):
    """A module whose parameters and parts are plain attributes once they have been looked up.

    nn.Module looks for them in three dictionaries, which costs 0.7 us, two hundred times a token. Assignment and
    deletion take the plain attribute away again, and so does whatever moves or converts the module; what swaps
    parameters behind its back (``torch.func.functional_call``, ``register_parameter`` of a name in use) is not seen.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in self._parameters or name in self._modules:
            self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._parameters or name in self._modules:
            self.__dict__.pop(name, None)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters or name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)

    def _apply(self, *args: Any, **options: Any) -> Any:
        for name in (*self._parameters, *self._modules):
            self.__dict__.pop(name, None)
        for value in self.__dict__.values():
            if isinstance(value, (Derived, DerivedByKey)):
                value.drop()
        return super()._apply(*args, **options)  # type: ignore[no-untyped-call]


class Linear(Direct, nn.Linear):
    """See :class:`Direct`."""


class Conv1d(Direct, nn.Conv1d):
    """See :class:`Direct`."""


class RMSNorm(Direct):
    """Root-mean-square norm with a weight; float32 inside, result in the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = norm.rms_norm(x, self.weight, self.eps)
        return normed if normed.dtype == self.weight.dtype else normed.to(self.weight.dtype)


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
        """Forget the value: the next call computes it again."""
        self._kept = None


class DerivedByKey(Generic[T]):
    """What is computed from several weights and a number, for the last few numbers; as :class:`Derived`."""

    def __init__(self, max_kept: int) -> None:
        self._max_kept = max_kept
        self._stamp: list[tuple[Tensor, int]] = []
        self._kept: dict[float, T] = {}

    def __call__(self, key: float, weights: Sequence[Tensor], make: Callable[[], T]) -> T:
        if any(weight.requires_grad or weight.device.type != "cpu" or weight.is_inference() for weight in weights):
            return make()
        if len(self._stamp) != len(weights) or any(
            kept is not weight or version != weight._version
            for (kept, version), weight in zip(self._stamp, weights, strict=True)
        ):
            self.drop()
            self._stamp = [(weight, weight._version) for weight in weights]
        if key not in self._kept:
            if len(self._kept) >= self._max_kept:
                self._kept.pop(next(iter(self._kept)))
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = make()
        return self._kept[key]

    def drop(self) -> None:
        """Forget all values: the next calls compute them again."""
        self._stamp, self._kept = [], {}
