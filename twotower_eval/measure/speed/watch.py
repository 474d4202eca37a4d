"""What the process does during a timed call besides the call: threads, processors, other devices, other clocks.

Everything is read outside the timed region. Not seen: a plug-in that replaces what is read here, work on devices that
torch does not know, and processes that this one did not start.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType

import torch

from twotower_eval.engine.decoders.reported import ReportError
from twotower_eval.engine.models.protocol import TextCodec
from twotower_eval.measure.speed.clock import PERF_COUNTER, CallClock, Seconds

RAW_S: Seconds = time.monotonic
PROCESS_CPU_S, THREAD_CPU_S = time.process_time, time.thread_time
CLOCK_SHARE, CLOCK_S = 0.01, 1e-3  # two clocks of one machine differ by less: 1 % and a millisecond
TEXT_FACTOR, TEXT_S = 10.0, 0.05  # time for texts that goes beyond what they take: ten times that, and 50 ms
TEXT_TOKENS, TEXT_SPARE = 4, 64  # readings of all of a row's text for each of its tokens; tokens of a stop string
MOST_OFF_S, MOST_OFF_SHARE = 0.5, 0.01  # the same over all calls of a cell: a few stalls, and 1 % of their time
# A thread that outlives its call may use so much processor time in the look that follows, and so much later in all.
LOOK_S, IDLE_S, LATER_S, LATER_SHARE = 0.02, 2e-3, 0.05, 0.01
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Busy:
    """Processor seconds during one call; see :class:`twotower_eval.records.SpeedSample`. None on a test's clock, which
    has no relation to them."""

    cpu_s: float | None
    caller_cpu_s: float | None
    off_clock_s: float


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """The state of the process before a call."""

    threads: frozenset[int]
    pools: str
    allocations: Mapping[int, int]
    children_s: float
    cpu_s: float
    caller_cpu_s: float
    off_s: float
    num_texts: int
    num_text_tokens: int
    raw_s: tuple[float, float]  # the second clock, before and after the first was read
    started_s: float


@dataclass(frozen=True, kw_only=True)
class TextCost:
    """A tokenizer's cost: seconds per call, and seconds per token."""

    call_s: float
    token_s: float


@dataclass(kw_only=True)
class _TextTimes:
    """Totals over a cell's calls: seconds off the clock, seconds that their texts need, and seconds on the clock."""

    off_s: float = 0.0
    takes_s: float = 0.0
    wall_s: float = 0.0


@dataclass(kw_only=True)
class _BackgroundThread:
    """A Python thread that outlives the call of ``owner`` that started it, with its processor time at the last look.

    ``later_s`` is the time it used outside its owner's calls, since ``left_s``.
    """

    owner: str
    name: str
    cpu_s: float
    left_s: float
    later_s: float = 0.0


class Watch:
    """Checks the process around timed calls. ``num_threads`` are the plan's CPU threads."""

    def __init__(self, clock: CallClock) -> None:
        self.clock = clock
        self._texts: dict[str, _TextTimes] = defaultdict(_TextTimes)
        self._outliving: dict[int, _BackgroundThread] = {}  # by the system's thread id
        self.num_threads = torch.get_num_threads()
        self._num_interop = torch.get_num_interop_threads()

    @contextlib.contextmanager
    def no_threads_left(self, name: str) -> Iterator[None]:
        """ReportError if Python threads started inside this context are at work at its end."""
        before = frozenset(sys._current_frames())
        yield
        self._check_new_threads(before, name)

    def begin(self) -> _Snapshot:
        """Record the state and start the clock. ReportError if a thread of an earlier call worked on after it."""
        self._check_outliving()
        threads, pools, allocations = frozenset(sys._current_frames()), _pools(), self._allocations()
        children_s = _children_s()
        clock = self.clock
        cpu_s, caller_cpu_s, off_s = PROCESS_CPU_S(), THREAD_CPU_S(), clock.off_s
        before_s = RAW_S()
        started_s = clock()
        return _Snapshot(
            threads=threads,
            pools=pools,
            allocations=allocations,
            children_s=children_s,
            cpu_s=cpu_s,
            caller_cpu_s=caller_cpu_s,
            off_s=off_s,
            num_texts=clock.num_texts,
            num_text_tokens=clock.num_text_tokens,
            raw_s=(before_s, RAW_S()),
            started_s=started_s,
        )

    def end(self, look: _Snapshot, name: str) -> tuple[float, Busy]:
        """Stop the clock; the seconds of the call and what else it used. ReportError if it used more than the plan
        allows, or if work continues."""
        before_s = RAW_S()
        wall_s = self.clock() - look.started_s
        raw_s = (before_s, RAW_S())
        cpu_s, caller_cpu_s = PROCESS_CPU_S() - look.cpu_s, THREAD_CPU_S() - look.caller_cpu_s
        off_clock_s = self.clock.off_s - look.off_s
        self._check_outliving(name)
        self._check_new_threads(look.threads, name)
        self._check_clocks(look, raw_s, wall_s + off_clock_s, name)
        if _pools() != look.pools or self._threads_now() != (self.num_threads, self._num_interop):
            raise ReportError(
                f"{name}: changes the number of CPU threads: {self._threads_now()[0]} of torch after a call, and the "
                f"plan has {self.num_threads}"
            )
        for device, num in self._allocations().items():
            if num > look.allocations.get(device, 0):
                raise ReportError(f"{name}: takes memory on cuda:{device}, which is no device of the plan")
        busy_s, is_real = cpu_s + max(0.0, _children_s() - look.children_s), self.clock.is_real
        busy = Busy(
            cpu_s=busy_s if is_real else None,
            caller_cpu_s=caller_cpu_s if is_real else None,
            off_clock_s=max(0.0, off_clock_s),
        )
        return wall_s, busy

    def check_texts(self, look: _Snapshot, cost: TextCost, lengths: list[int], wall_s: float, name: str) -> bool:
        """Whether the time off the clock fits texts of rows with these ``lengths``; a call that was stalled is void.

        ReportError if it is too much over all calls of this ``name``.
        """
        off_s = self.clock.off_s - look.off_s
        num_texts = self.clock.num_texts - look.num_texts
        num_tokens = self.clock.num_text_tokens - look.num_text_tokens
        takes_s = num_texts * cost.call_s + num_tokens * cost.token_s
        total = self._texts[name]
        total.off_s += off_s
        total.takes_s += takes_s
        total.wall_s += max(0.0, wall_s) if math.isfinite(wall_s) else 0.0
        if total.off_s > TEXT_FACTOR * total.takes_s + MOST_OFF_S + MOST_OFF_SHARE * total.wall_s:
            raise ReportError(
                f"{name}: {total.off_s:.3g} s of its calls went by off the clock, for texts that take about "
                f"{total.takes_s:.2g} s: something else ran while the clock stood"
            )
        enough = sum(TEXT_TOKENS * (length + TEXT_SPARE) ** 2 for length in lengths)
        if num_tokens > enough:
            raise ReportError(
                f"{name}: has {num_tokens} tokens made into text off the clock in one call, and {enough} are more "
                "than looking for the ends of its answers takes"
            )
        return off_s <= TEXT_FACTOR * takes_s + TEXT_S

    def _check_new_threads(self, before: frozenset[int], name: str) -> None:
        """ReportError if new threads are at work; idle ones are remembered."""
        new = frozenset(sys._current_frames()) - before
        if not new:
            return
        known = {thread.ident: thread for thread in threading.enumerate() if thread.ident in new}
        began_s = {ident: _thread_s(thread.native_id) for ident, thread in known.items()}
        time.sleep(LOOK_S)
        busy = []
        for ident in new & frozenset(sys._current_frames()):
            thread = known.get(ident)
            cpu_s = _thread_s(thread.native_id) if thread else None
            before_s = began_s.get(ident)
            if thread is None or thread.native_id is None or cpu_s is None or before_s is None:
                busy.append(thread.name if thread else "a thread without a name")
            elif cpu_s - before_s > IDLE_S:
                busy.append(thread.name)
            else:
                left = _BackgroundThread(owner=name, name=thread.name, cpu_s=cpu_s, left_s=RAW_S())
                self._outliving[thread.native_id] = left
        _refuse_threads(name, busy)

    def _check_outliving(self, of_call: str | None = None) -> None:
        """Check threads that outlive their call; ReportError if one worked outside its owner's calls."""
        for number, left in list(self._outliving.items()):
            cpu_s = _thread_s(number)
            if cpu_s is None:  # it has ended
                del self._outliving[number]
                continue
            if left.owner != of_call:
                left.later_s += max(0.0, cpu_s - left.cpu_s)
            left.cpu_s = cpu_s
            if left.later_s > LATER_S + LATER_SHARE * (RAW_S() - left.left_s):
                _refuse_threads(left.owner, [left.name])

    def _threads_now(self) -> tuple[int, int]:
        return torch.get_num_threads(), torch.get_num_interop_threads()

    def _allocations(self) -> dict[int, int]:
        """Allocations so far on CUDA devices outside the plan."""
        stats = {device: torch.cuda.memory_stats(device) for device in self.clock.devices.others()}
        return {device: int(found.get("allocation.all.allocated", 0)) for device, found in stats.items()}

    def _check_clocks(self, look: _Snapshot, raw_s: tuple[float, float], elapsed_s: float, name: str) -> None:
        clock = self.clock
        if not clock.is_intact:
            raise ReportError(f"{name}: the clock was changed from outside")
        if not clock.is_real:
            return
        if time.perf_counter is not PERF_COUNTER or not isinstance(PERF_COUNTER, BuiltinFunctionType):
            raise ReportError(f"{name}: time.perf_counter has been replaced")
        least_s, most_s = raw_s[0] - look.raw_s[1], raw_s[1] - look.raw_s[0]
        spare_s = CLOCK_SHARE * most_s + CLOCK_S
        if not least_s - spare_s <= elapsed_s <= most_s + spare_s:
            raise ReportError(f"{name}: a call took {elapsed_s:.6g} s by one clock and {most_s:.6g} s by another")


def text_cost(tokenizer: TextCodec, vocab_size: int, now: Seconds) -> TextCost:
    """Seconds that a tokenizer needs to write texts, the fastest of a few trials."""
    many = tuple(range(min(64, vocab_size)))

    def takes_s(ids: tuple[int, ...]) -> float:
        walls_s = []
        for _ in range(3):
            began_s = now()
            tokenizer.decode(ids)
            walls_s.append(now() - began_s)
        return max(0.0, min(walls_s))

    call_s = takes_s(many[:1])
    return TextCost(call_s=call_s, token_s=max(0.0, takes_s(many) - call_s) / len(many))


def _refuse_threads(name: str, busy: list[str]) -> None:
    if busy:
        listed = ", ".join(sorted(busy))
        raise ReportError(f"{name}: leaves threads running ({listed}): their work would not be timed")


def _thread_s(number: int | None) -> float | None:
    """Processor seconds of a thread of this process; None if it has ended or the system does not report it."""
    try:
        return int(Path(f"/proc/self/task/{number}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def _pools() -> str:
    """Torch's report of its thread pools: its own, OpenMP's, MKL's."""
    text: str = torch.__config__.parallel_info()
    return text


def _children_s() -> float:
    """Processor seconds of child processes, living or waited for."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    return gone.ru_utime + gone.ru_stime + sum(map(_process_s, _children()))


def _children() -> set[str]:
    """Ids of living child processes; none if the system does not report them."""
    found: set[str] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(file.read_text().split())
    return found


def _process_s(process: str) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended meanwhile
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS_PER_S  # its own, and that of its children
