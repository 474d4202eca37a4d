"""GPU kernels, from other packages and our own. Each is used only after it agreed with our reference in this process.

That a package is installed proves nothing: kernels are wrong for some shapes, some devices and some versions. Each is
run beside the reference on the device and in the precision that are wanted, once per process, and refused with one
line that says why. The manifest records which are active.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")  # a kernel's outputs: one tensor or several
# Root-mean-square error relative to the reference's own root mean square. TF32 products pass for bfloat16 models only.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True, kw_only=True)
class Proof(Generic[T]):
    """Whether a kernel may be used; ``reason`` says why, in the same words from run to run."""

    function: Callable[..., T] | None
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel(Generic[T]):
    """One function, from elsewhere or from ops/fused.

    ``load`` imports it (ModuleNotFoundError where it is absent). ``pairs`` runs it beside the reference on a device and
    in a precision, and gives what each of them computed.
    """

    name: str
    load: Callable[[], Callable[..., T]]
    pairs: Callable[[Callable[..., T], torch.device, torch.dtype], Sequence[tuple[Tensor, Tensor]]]
    device_types: tuple[str, ...] = ("cuda",)
    _proofs: dict[tuple[torch.device, torch.dtype], Proof[T]] = field(default_factory=dict)

    def on(self, device: torch.device, precision: torch.dtype) -> Callable[..., T] | None:
        """The function where it has proved itself, else None."""
        return self.proof(device, precision).function

    def proof(self, device: torch.device, precision: torch.dtype) -> Proof[T]:
        """The proof for this device and precision, made at the first call."""
        key = (device, precision)
        if key not in self._proofs:
            self._proofs[key] = self._prove(device, precision)
        return self._proofs[key]

    def _prove(self, device: torch.device, precision: torch.dtype) -> Proof[T]:
        if device.type not in self.device_types:
            return Proof(function=None, reason=f"not for {device.type}")
        try:
            function = _on_device(self.load(), device)
            with torch.inference_mode():
                found = self.pairs(function, device, precision)
                apart = max(relative_error(ours, reference) for ours, reference in found)
        except ModuleNotFoundError as error:
            return Proof(function=None, reason=f"not installed: no module {error.name}")
        except Exception as error:  # whatever foreign code raises is the reason for doing without it
            return Proof(function=None, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        limit = LIMITS[precision]
        if not apart <= limit:  # not ">", so that NaN is refused
            return Proof(function=None, reason=f"differs from the reference by more than {limit:.0e}")
        return Proof(function=function, reason=f"agrees with the reference to {limit:.0e}")


def _on_device(function: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """The function with the device made current: kernels are launched on that, wherever their tensors lie."""
    if device.type != "cuda":
        return function

    @wraps(function)
    def launched(*args: object, **options: object) -> T:
        with torch.cuda.device(device):
            return function(*args, **options)

    return launched


KERNELS: dict[str, Kernel[Any]] = {}
ON_ANY_DEVICE = False  # tests set it: Triton's interpreter runs ops/fused on a CPU


def may_serve(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel can take these tensors: on a GPU, no gradients needed."""
    return (x.is_cuda or ON_ANY_DEVICE) and without_gradients(x, *others)


def register(kernel: Kernel[T]) -> Kernel[T]:
    """Make a kernel known to :func:`describe`."""
    KERNELS[kernel.name] = kernel
    return kernel


def describe(devices: Sequence[str], dtype: str) -> dict[str, str] | None:
    """Kernel -> ``active`` or why it is refused, the same from run to run; None where all devices are CPUs."""
    places = {torch.device(name) for name in devices if torch.device(name).type != "cpu"}
    if not places:
        return None
    precision: torch.dtype = getattr(torch, dtype)
    states = {}
    for name, kernel in sorted(KERNELS.items()):
        proofs = [kernel.proof(place, precision) for place in sorted(places, key=str)]
        states[name] = "; ".join(dict.fromkeys(f"{_state(proof)}: {proof.reason}" for proof in proofs))
    return states


def _state(proof: Proof[object]) -> str:
    return "refused" if proof.function is None else "active"


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Root-mean-square difference over the reference's root mean square."""
    wide = reference.double()
    return float((ours.double() - wide).square().mean().sqrt() / wide.square().mean().sqrt())


def without_gradients(*tensors: Tensor | None) -> bool:
    """Whether no gradients are needed: kernels have no backward pass."""
    return not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On a GPU, raise if the host waits for the device: it would stall every step and break graph capture."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def seeded(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers for a proof, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)
