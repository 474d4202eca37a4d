"""The clock of timed calls: read when all devices have finished, off while text is encoded or decoded."""

from __future__ import annotations

import gc
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

PERF_COUNTER = time.perf_counter  # as it was before any plug-in could put another in its place

Seconds = Callable[[], float]
T = TypeVar("T")


class Devices:
    """Devices to wait for, and their memory."""

    def __init__(self, names: Sequence[str]) -> None:
        kinds = {torch.device(name).type for name in names}
        if kinds - {"cpu", "cuda"}:
            raise UserError(f"cannot wait for a device of type {min(kinds - {'cpu', 'cuda'})!r}, only for cpu and cuda")
        self.cuda = [torch.device(name) for name in names if torch.device(name).type == "cuda"]
        self._indexes = {0 if device.index is None else device.index for device in self.cuda}

    def synchronise(self) -> None:
        """Return when everything asked of the devices is done, and of any other that this process has put to use. A
        CPU has always finished."""
        for device in self.cuda:
            torch.cuda.synchronize(device)
        for index in self.others():
            torch.cuda.synchronize(index)

    def others(self) -> list[int]:
        """CUDA devices that this process has put to use besides these."""
        if not torch.cuda.is_initialized():
            return []
        # Asking in most other ways would put a device to use.
        in_use = vars(torch._C).get("_cuda_hasPrimaryContext", torch.cuda.memory_reserved)
        return [i for i in range(torch.cuda.device_count()) if i not in self._indexes and in_use(i)]

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
    """Seconds from an arbitrary start. Reading it waits for the devices; time inside :meth:`stopped` does not count.

    Plug-ins never get it: :meth:`reader` and :meth:`untimed` make plain functions for them, which hold nothing that
    could stop it.
    """

    def __init__(self, devices: Devices, now: Seconds) -> None:
        self.devices = devices
        self.now = now
        self.standing = [False]  # whether it is stopped; shared, as the next is, with what is handed out
        self._off_s = [0.0]
        self.off_s = 0.0  # the same, where nobody else reaches it
        self.num_texts = self.num_text_tokens = 0  # that it was stopped for
        self._owner = get_ident()

    def __call__(self) -> float:
        self.devices.synchronise()
        return self.now() - self._off_s[0]

    @property
    def is_real(self) -> bool:
        """Whether it is this machine's own clock, not one that a test moves."""
        return self.now is PERF_COUNTER

    @property
    def is_intact(self) -> bool:
        """Whether the time that it was off is the sum of the times that it was stopped."""
        return self._off_s[0] == self.off_s

    def reader(self) -> Seconds:
        """A function that gives the seconds, for whoever may read the clock and do nothing else with it."""
        synchronise, now, off_s = self.devices.synchronise, self.now, self._off_s

        def seconds() -> float:
            synchronise()
            return now() - off_s[0]

        return seconds

    def untimed(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function of a tokenizer, off the clock; on it where what it is given is no finished plain value, and in
        any thread but the one that times: nothing else may run while the clock stands."""

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
        """Do something on the host that is not to be timed. What the devices still have to do is waited for first."""
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
    """Whether nothing can run when a value is looked at: a text, a yes or no, or a list of whole numbers."""
    kind = type(value)
    if kind is tuple or kind is list:
        return set(map(type, cast(Sequence[object], value))) <= {int}
    return kind is str or kind is bool


class UntimedTokenizer:
    """A tokenizer off the clock: decoders look for stop strings, one token at a time more often than others.

    Its functions are taken when it is made; what is later put in their place is not called.
    """

    def __init__(self, tokenizer: TextCodec, clock: CallClock) -> None:
        self._tokenizer = tokenizer
        self.encode = clock.untimed(tokenizer.encode)
        self.decode = clock.untimed(tokenizer.decode)
        self.decode_with_special = clock.untimed(tokenizer.decode_with_special)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class TimedModel(WatchedModel):
    """A model as a timed decoder sees it: its tokenizer off the clock, its forwards noted, and two moments of a call.

    ``prefilled_at_s``: the prompts are read. ``extended_at_s``: the context begins to be extended, so the first
    token (of a block decoder: the first block) is on the host. Each costs one synchronisation a call, in all modes.
    ``num_while_stopped`` counts forwards that ran while the clock stood, ``num_threads`` are the numbers of CPU threads
    that forwards were about to run with.
    """

    def __init__(self, model: Model, clock: CallClock) -> None:
        super().__init__(model)
        self._read, self._standing = clock.reader(), clock.standing
        self.raw_tokenizer = model.tokenizer
        self.tokenizer = None if model.tokenizer is None else UntimedTokenizer(model.tokenizer, clock)
        self.forget()

    def forget(self) -> None:
        """Begin a new call."""
        super().forget()
        self.prefilled_at_s: float | None = None
        self.extended_at_s: float | None = None
        self.num_while_stopped = 0
        self.num_threads: set[int] = set()

    def prefill(self, ids_BS: Tensor, *more: object, **options: object) -> Context:
        """The model's own, its end noted."""
        context = super().prefill(ids_BS, *more, **options)
        if self.prefilled_at_s is None:
            self.prefilled_at_s = self._read()
        return context

    def extend(self, context: Context, ids_BK: Tensor, *more: object, **options: object) -> Context:
        """The model's own, its first beginning noted."""
        if self.extended_at_s is None:
            self.extended_at_s = self._read()
        return super().extend(context, ids_BK, *more, **options)

    def _before(self) -> None:
        self.num_while_stopped += self._standing[0]
        self.num_threads.add(torch.get_num_threads())


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
