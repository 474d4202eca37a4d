"""One progress display for all long loops: bars with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import builtins
import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

LOG_INTERVAL_S = 10.0


class Advance(Protocol):
    """Called with the number of items just finished."""

    def __call__(self, num: int = 1, /) -> None: ...


class Progress(Protocol):
    """The display that loops receive: a bar per :meth:`track`, and :meth:`note` for a line of text."""

    def track(self, total: int, description: str) -> AbstractContextManager[Advance]: ...

    def note(self, text: str) -> None: ...


class SilentProgress:
    """Shows nothing; for tests and for use as a library."""

    @contextmanager
    def track(self, total: int, description: str) -> Iterator[Advance]:
        yield lambda num=1, /: None

    def note(self, text: str) -> None:
        """Drop the line."""


class LogProgress:
    """Plain lines: one per track at most every ``interval_s`` seconds, and a last one when a track ends."""

    def __init__(self, stream: TextIO, interval_s: float = LOG_INTERVAL_S) -> None:
        self._stream = stream
        self._interval_s = interval_s

    def note(self, text: str) -> None:
        """Write one line."""
        print(text, file=self._stream, flush=True)

    @contextmanager
    def track(self, total: int, description: str) -> Iterator[Advance]:
        """Count to ``total``; the last line says how far it came, also after an error."""
        started_s = last_s = time.monotonic()
        done = 0

        def advance(num: int = 1, /) -> None:
            nonlocal done, last_s
            done += num
            now_s = time.monotonic()
            if now_s - last_s >= self._interval_s:
                last_s = now_s
                left_s = (now_s - started_s) * max(total - done, 0) / done if done else None
                left = "" if left_s is None else f", about {duration_text(left_s)} left"
                self.note(f"{description}: {done}/{total} after {duration_text(now_s - started_s)}{left}")

        try:
            yield advance
        finally:
            self.note(f"{description}: {done}/{total} in {duration_text(time.monotonic() - started_s)}")


class TerminalProgress:
    """Rich bars with the time left; tracks may nest, all share one display."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichProgress | None = None

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def track(self, total: int, description: str) -> Iterator[Advance]:
        """A bar that counts to ``total``; the outermost track opens the display and closes it."""
        outermost = self._bars is None
        bars = self._bars or self._new_bars()
        if outermost:
            bars.start()
            self._bars = bars
        task = bars.add_task(description, total=total)
        try:
            yield lambda num=1, /: bars.advance(task, num)
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    def _new_bars(self) -> RichProgress:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        return RichProgress(*columns, TimeRemainingColumn(), console=self._console)


def choose_progress(stream: TextIO | None = None) -> Progress:
    """Bars if ``stream`` (standard error by default) is a terminal, else plain lines.

    A notebook has no terminal: it shows bars if ``ipywidgets`` is installed, else plain lines on standard output, as
    notebooks colour standard error as errors.
    """
    if (stream or sys.stderr).isatty():
        return TerminalProgress(_console(stream or sys.stderr))
    if stream is None and "get_ipython" in vars(builtins):
        console = _console(sys.stdout)
        if console.is_jupyter:
            shows_bars = all(importlib.util.find_spec(name) is not None for name in ("IPython", "ipywidgets"))
            return TerminalProgress(console) if shows_bars else LogProgress(sys.stdout)
    return LogProgress(stream or sys.stderr)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream)


def duration_text(duration_s: float) -> str:
    """``8.3 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
