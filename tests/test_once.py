"""What points of a report share is computed once, and never taken for that of other runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from report_fixture import quality_run, speed_run, sweep

from twotower_eval import store
from twotower_eval.analyse.compare import Runs, calls, costs, lengths
from twotower_eval.analyse.compare.figures import forgotten, once


def test_an_answer_is_kept_with_its_runs(tmp_path: Path) -> None:
    one, other = store.load(quality_run(tmp_path)), store.load(speed_run(tmp_path))
    made: list[str] = []

    def note(what: str) -> str:
        made.append(what)
        return what

    assert [once([one, other], ("x", 1), lambda: note("both")) for _ in range(2)] == ["both", "both"]
    assert once([one], ("x", 1), lambda: note("one")) == "one"
    assert once([one, other], ("x", 2), lambda: note("of another point")) == "of another point"
    assert once([dataclasses.replace(one)], ("x", 1), lambda: note("of a changed run")) == "of a changed run"
    assert made == ["both", "one", "of another point", "of a changed run"]
    assert one == dataclasses.replace(one)  # what was found of a run is no part of it


def test_an_error_is_raised_each_time(tmp_path: Path) -> None:
    run = store.load(speed_run(tmp_path))

    def fail() -> Any:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            once([run], ("x",), fail)


def test_the_baseline_is_looked_at_once_for_all_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked at for each of them: half of a report's time."""
    looked: dict[str, list[str]] = {}
    for module, name, cell_of in (
        (calls, "_grid", lambda args: f"{args[1].id} {args[2]}"),
        (costs, "_arm", lambda args: args[3].id),
        (lengths, "_arm", lambda args: args[1].id),
    ):
        own, found = getattr(module, name), looked.setdefault(f"{module.__name__}.{name}", [])

        def spy(*args: Any, own: Any = own, found: list[str] = found, cell_of: Any = cell_of) -> Any:
            found.append(cell_of(args))
            return own(*args)

        monkeypatch.setattr(module, name, spy)
    runs = Runs([store.load(speed_run(tmp_path, decoders=sweep()[:3], num_rounds=4, num_calls=3))])
    assert len(runs.speed) == 3
    assert all(found and len(found) == len(set(found)) for found in looked.values()), looked


def test_what_is_found_within_a_block_is_forgotten(tmp_path: Path) -> None:
    run = store.load(speed_run(tmp_path))
    once([run], ("x",), lambda: 1)
    with forgotten(run):
        assert once([run], ("x",), lambda: 2) == 1
        once([run], ("y",), lambda: 3)
    assert once([run], ("x",), lambda: 4) == 1
    assert once([run], ("y",), lambda: 5) == 5
