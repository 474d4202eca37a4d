"""Progress: bars for people, few plain lines for logs, nothing lost when a loop ends early."""

import builtins
import contextlib
import importlib.machinery
import importlib.util
import io
import sys
import types

import pytest
from rich.console import Console

from twotower_eval.progress import LogProgress, SilentProgress, TerminalProgress, choose_progress, duration_text


def test_a_log_gets_the_first_interval_and_the_end_even_after_an_error() -> None:
    stream = io.StringIO()

    def stopped() -> None:
        with LogProgress(stream, interval_s=0.0).track(3, "cell") as advance:
            advance()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("cell: 1/3 after")
    assert "left" in lines[0]
    assert lines[-1].startswith("cell: 1/3 in")


def test_a_log_is_quiet_between_intervals() -> None:
    stream = io.StringIO()
    with LogProgress(stream, interval_s=60.0).track(100, "cell") as advance:
        for _ in range(100):
            advance(1)
    assert stream.getvalue().count("\n") == 1


def test_bars_nest_on_one_terminal_and_close() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, force_terminal=True, width=120))
    for _ in range(2):
        with progress.track(2, "cells [a]") as outer:
            with progress.track(5, "documents") as inner:
                inner(5)
                progress.note("a line [b]")
            outer()
    text = stream.getvalue()
    assert "cells [a]" in text
    assert "documents" in text
    assert "a line [b]" in text


def test_what_is_chosen_depends_on_the_stream() -> None:
    assert isinstance(choose_progress(io.StringIO()), LogProgress)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(choose_progress(Terminal()), TerminalProgress)


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SilentProgress()
    with progress.track(2, "x") as advance:
        advance()
        progress.note("y")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("value", "text"), [(8.31, "8.3 s"), (245, "4 min 05 s"), (7630, "2 h 07 min")])
def test_durations_read_well(value: float, text: str) -> None:
    assert duration_text(value) == text


class ZMQInteractiveShell:
    """A notebook's kernel, by the name that it goes by."""


class TerminalInteractiveShell:
    """IPython in a terminal, or fed from a file."""


def in_ipython(monkeypatch: pytest.MonkeyPatch, shell: type) -> None:
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)


def test_a_notebook_without_widgets_gets_plain_lines_below_the_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They came on standard error, which notebooks colour as a fault."""
    in_ipython(monkeypatch, ZMQInteractiveShell)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    progress = choose_progress()
    assert isinstance(progress, LogProgress)
    with progress.track(1, "cells") as advance:
        advance()
    out, err = capsys.readouterr()
    assert out.startswith("cells: 1/1 in")
    assert err == ""


def test_a_notebook_with_widgets_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []

    class Output(contextlib.nullcontext[None]):
        def clear_output(self, wait: bool) -> None:
            shown.append("redrawn")

    def module(name: str, **names: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(names)
        return made

    display = module("IPython.display", display=lambda *given, **named: shown.append(given))
    for made in (module("IPython", display=display), display, module("ipywidgets", Output=Output)):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    in_ipython(monkeypatch, ZMQInteractiveShell)
    progress = choose_progress()
    assert isinstance(progress, TerminalProgress)
    with progress.track(2, "cells") as advance:
        advance(2)
    assert "redrawn" in shown


def test_ipython_without_a_terminal_or_a_notebook_is_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    in_ipython(monkeypatch, TerminalInteractiveShell)
    assert isinstance(choose_progress(), LogProgress)
    in_ipython(monkeypatch, ZMQInteractiveShell)
    assert isinstance(choose_progress(io.StringIO()), LogProgress), "a stream that is named is written to"
