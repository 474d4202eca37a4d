"""The clock of timed calls: read when all devices have finished, stopped while text is encoded or decoded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Devices:
    """Devices to wait for, and their memory."""

    def __init__(self, names: Sequence[str]) -> None:
        kinds = {torch.device(name).type for name in names}
        if kinds - {"cpu", "cuda"}:
            raise ValueError(
                f"cannot wait for a device of type {min(kinds - {'cpu', 'cuda'})!r}, only for cpu and cuda"
            )
        self.cuda = [torch.device(name) for name in names if torch.device(name).type == "cuda"]

    def synchronise(self) -> None:
        """Return when everything asked of the devices is done. A CPU has always finished."""
        for device in self.cuda:
            torch.cuda.synchronize(device)

    def forget_peak(self) -> None:
        """Let the peak begin anew."""
        for device in self.cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def peak_memory(self) -> tuple[int | None, str | None]:
        """Bytes that tensors took at most since :meth:`forget_peak`, all devices added up, or why it is not known."""
        if not self.cuda:
            return None, "not measured on a CPU"
        return sum(torch.cuda.max_memory_allocated(device) for device in self.cuda), None


class CallClock:
    """Seconds from an arbitrary start. Reading it waits for the devices; time inside :meth:`stopped` does not count."""

    def __init__(self, devices: Devices, now: Callable[[], float]) -> None:
        self._devices = devices
        self._now = now
        self._stopped_s = 0.0

    def __call__(self) -> float:
        self._devices.synchronise()
        return self._now() - self._stopped_s

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do something on the host that is not to be timed. What the devices still have to do is waited for first."""
        self._devices.synchronise()
        began_s = self._now()
        try:
            yield
        finally:
            self._stopped_s += self._now() - began_s


class UntimedTokenizer:
    """A tokenizer that stops the clock: decoders look for stop strings, one token at a time more often than others."""

    def __init__(self, tokenizer: Any, clock: CallClock) -> None:
        self._tokenizer = tokenizer
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, *args: Any, **options: Any) -> list[int]:
        """Token ids, off the clock."""
        with self._clock.stopped():
            ids: list[int] = self._tokenizer.encode(*args, **options)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text, off the clock."""
        with self._clock.stopped():
            text: str = self._tokenizer.decode(token_ids)
        return text

    def decode_with_special(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens, off the clock."""
        with self._clock.stopped():
            text: str = self._tokenizer.decode_with_special(token_ids)
        return text


class TimedModel:
    """A model as a timed decoder sees it: its tokenizer off the clock, two moments of each call noted.

    ``prefilled_at_s``: the prompts are read. ``extended_at_s``: the context begins to be extended, so the first
    token (of a block decoder: the first block) is on the host. Each costs one synchronisation a call, in all modes.
    """

    def __init__(self, model: Any, clock: CallClock) -> None:
        self._model = model
        self._clock = clock
        self.tokenizer = None if model.tokenizer is None else UntimedTokenizer(model.tokenizer, clock)
        self.forget()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forget(self) -> None:
        """Begin a new call."""
        self.prefilled_at_s: float | None = None
        self.extended_at_s: float | None = None

    def prefill(self, *args: Any) -> Any:
        """The model's own, its end noted."""
        context = self._model.prefill(*args)
        if self.prefilled_at_s is None:
            self.prefilled_at_s = self._clock()
        return context

    def extend(self, *args: Any) -> Any:
        """The model's own, its first beginning noted."""
        if self.extended_at_s is None:
            self.extended_at_s = self._clock()
        return self._model.extend(*args)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's cycle collector, which strikes at random, out of a timed call."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    """CPU threads of torch, ``None`` its own choice; put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
