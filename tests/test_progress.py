"""Progress: bars for people, few plain lines for logs, nothing lost when a loop ends early."""

import io

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
