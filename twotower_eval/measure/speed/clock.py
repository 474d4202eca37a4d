"""The clock of timed calls: it waits for all devices when read, and stands while text is encoded or decoded."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from threading import get_ident
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.protocol import Context, Model, TextCodec
from twotower_eval.errors import UserError

PERF_COUNTER = time.perf_counter  # taken before any plug-in could replace it

Seconds = Callable[[], float]
T = TypeVar("T")


class Devices:
    """Devices to wait for, and their memory; ``unmeasured`` is why that is not known without CUDA."""

    def __init__(self, names: Sequence[str], unmeasured: str = "not measured on a CPU") -> None:
        self._unmeasured = unmeasured
        kinds = {torch.device(name).type for name in names}
        if others := kinds - {"cpu", "cuda", "mps"}:
            raise UserError(f"cannot wait for a device of type {min(others)!r}, only for cpu, cuda and mps")
        self._has_mps = "mps" in kinds
        self.cuda = [torch.device(name) for name in names if torch.device(name).type == "cuda"]
        self._indexes = {0 if device.index is None else device.index for device in self.cuda}
        self.energy = EnergyMeter(self.cuda)

    def synchronise(self) -> None:
        """Wait until the devices, and any other that this process has used, have finished. A CPU always has."""
        for device in self.cuda:
            torch.cuda.synchronize(device)
        for index in self.others():
            torch.cuda.synchronize(index)
        if self._has_mps:
            torch.mps.synchronize()

    def others(self) -> list[int]:
        """CUDA devices that this process uses besides these."""
        if not torch.cuda.is_initialized():
            return []
        # Most other queries would initialise a device.
        in_use = vars(torch._C).get("_cuda_hasPrimaryContext", torch.cuda.memory_reserved)
        return [i for i in range(torch.cuda.device_count()) if i not in self._indexes and in_use(i)]

    def forget_peak(self) -> None:
        """Reset the peak memory."""
        for device in self.cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def peak_memory(self) -> tuple[int | None, str | None]:
        """Peak bytes of tensors since :meth:`forget_peak`, all devices added up, or why they are unknown."""
        if not self.cuda:
            return None, "not measured on MPS" if self._has_mps else self._unmeasured
        return sum(torch.cuda.max_memory_allocated(device) for device in self.cuda), None


class EnergyMeter:
    """Joules that devices have drawn since some moment, by NVML's counters; unknown without ``pynvml``, a counter, or a
    GPU. A counter ticks some ten times a second."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._nvml: Any = None
        self._handles: list[object] = []
        if not devices:
            return
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
            # By its UUID, as CUDA may number and show devices in another way than NVML.
            uuids = [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices]
            handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            for handle in handles:
                nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError:  # no driver, no counter on this model, or a part of a GPU (MIG)
            return
        self._nvml, self._handles = nvml, handles

    def read_j(self) -> float | None:
        """The counters of all devices added up, or ``None``."""
        if not self._handles:
            return None
        return float(sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)) / 1000

    def since_j(self, before_j: float | None) -> float | None:
        """Joules since a reading; ``None`` where either is unknown, or the counter began anew."""
        now_j = self.read_j()
        return None if before_j is None or now_j is None or now_j < before_j else now_j - before_j


class CallClock:
    """Seconds from an arbitrary start. Reading waits for the devices; time inside :meth:`stopped` does not count.

    Plug-ins never get the clock: :meth:`reader` and :meth:`untimed` make plain functions for them that cannot stop it.
    """

    def __init__(self, devices: Devices, now: Seconds) -> None:
        self.devices = devices
        self.now = now
        self.standing = [False]  # whether it is stopped; shared, like the next, with the functions handed out
        self._off_s = [0.0]
        self.off_s = 0.0  # the same, out of reach of plug-ins
        self.num_texts = self.num_text_tokens = 0  # total time that it was stopped
        self._owner = get_ident()

    def __call__(self) -> float:
        self.devices.synchronise()
        return self.now() - self._off_s[0]

    @property
    def is_real(self) -> bool:
        """Whether it is this machine's clock, not a test's."""
        return self.now is PERF_COUNTER

    @property
    def is_intact(self) -> bool:
        """Whether the time off the clock equals the sum of its stops."""
        return self._off_s[0] == self.off_s

    def reader(self) -> Seconds:
        """A function that returns the seconds and allows nothing else."""
        synchronise, now, off_s = self.devices.synchronise, self.now, self._off_s

        def seconds() -> float:
            synchronise()
            return now() - off_s[0]

        return seconds

    def untimed(self, function: Callable[..., T]) -> Callable[..., T]:
        """A tokenizer's function, run off the clock.

        It stays on the clock for arguments that are no plain values, and in any thread but the timing one: nothing else
        may run while the clock stands.
        """

        def off_the_clock(*given: object, **named: object) -> T:
            if named or self.standing[0] or get_ident() != self._owner or not all(map(_is_plain, given)):
                return function(*given, **named)
            copies = [tuple(value) if type(value) is list else value for value in given]
            began_s = self._stop()
            try:
                self.num_texts += 1
                self.num_text_tokens += len(cast(Sized, copies[0])) if copies else 0
                return function(*copies)
            finally:
                self._restart(began_s)

        return off_the_clock

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Context for untimed work on the host; pending work on the devices is waited for first."""
        began_s = self._stop()
        try:
            yield
        finally:
            self._restart(began_s)

    def _stop(self) -> float:
        self.devices.synchronise()
        began_s = self.now()
        self.standing[0] = True
        return began_s

    def _restart(self, began_s: float) -> None:
        self.standing[0] = False
        took_s = self.now() - began_s
        self._off_s[0] += took_s
        self.off_s += took_s


def _is_plain(value: object) -> bool:
    """Whether a value runs no code when looked at: a text, a bool, or a list of whole numbers."""
    kind = type(value)
    if kind is tuple or kind is list:
        return set(map(type, cast(Sequence[object], value))) <= {int}
    return kind is str or kind is bool


class UntimedTokenizer:
    """A tokenizer off the clock, because decoders look for stop strings at different rates.

    Its functions are bound when it is made; later replacements are not called.
    """

    def __init__(self, tokenizer: TextCodec, clock: CallClock) -> None:
        self._tokenizer = tokenizer
        self.encode = clock.untimed(tokenizer.encode)
        self.decode = clock.untimed(tokenizer.decode)
        self.decode_with_special = clock.untimed(tokenizer.decode_with_special)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class TimedModel(WatchedModel):
    """A model as a timed decoder sees it: tokenizer off the clock, forwards counted, and two moments of a call
    recorded.

    ``prefilled_at_s``: the prompts are read. ``extended_at_s``: the first extension of the context starts, so the first
    token (for a block decoder, the first block) is on the host. Each costs one synchronisation per call, in all modes.
    ``num_while_stopped`` counts forwards that ran while the clock stood; ``num_threads`` are the CPU thread counts seen
    before forwards.
    """

    def __init__(self, model: Model, clock: CallClock) -> None:
        super().__init__(model)
        self._read, self._standing = clock.reader(), clock.standing
        self.raw_tokenizer = model.tokenizer
        self.tokenizer = None if model.tokenizer is None else UntimedTokenizer(model.tokenizer, clock)
        self.forget()

    def forget(self) -> None:
        """Reset for a new call."""
        super().forget()
        self.prefilled_at_s: float | None = None
        self.extended_at_s: float | None = None
        self.num_while_stopped = 0
        self.num_threads: set[int] = set()

    def prefill(self, ids_BS: Tensor, *more: object, **options: object) -> Context:
        """The model's prefill; its end is recorded."""
        context = super().prefill(ids_BS, *more, **options)
        if self.prefilled_at_s is None:
            self.prefilled_at_s = self._read()
        return context

    def extend(self, context: Context, ids_BK: Tensor, *more: object, **options: object) -> Context:
        """The model's extend; the start of the first one is recorded."""
        if self.extended_at_s is None:
            self.extended_at_s = self._read()
        return super().extend(context, ids_BK, *more, **options)

    def _before(self) -> None:
        self.num_while_stopped += self._standing[0]
        self.num_threads.add(torch.get_num_threads())


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause Python's cycle collector, which runs at arbitrary moments, during a timed call."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    """Set torch's CPU threads (``None``: its own choice) and restore them afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
