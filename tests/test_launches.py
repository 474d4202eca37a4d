"""Launches: separate processes into one run, each with its share of the rounds; and what counts as one."""

import dataclasses
import multiprocessing
import os
import signal
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.claims.looks import num_measurings
from twotower_eval.analyse.compare.answers import from_round_to_round
from twotower_eval.analyse.compare.calls import complete_rounds
from twotower_eval.analyse.compare.consistency import contradictions
from twotower_eval.analyse.compare.timing import speed_points
from twotower_eval.analyse.stats import intervals
from twotower_eval.errors import UserError
from twotower_eval.measure import speed, suites
from twotower_eval.measure.speed import launches, session
from twotower_eval.measure.speed.schedule import launches_missing, share_of_launch
from twotower_eval.plan import SpeedPlan
from twotower_eval.plan_files import plan_from_json
from twotower_eval.plugin_calls import PluginError
from twotower_eval.progress import SilentProgress
from twotower_eval.records import SpeedSample
from twotower_eval.rules import EXTENDED

TASKS = ("miniature_sort", "miniature_recall")


@pytest.fixture(scope="module")
def requests() -> list[suites.TimedPrompt]:
    return suites.build_requests(suites.resolve_tasks(TASKS))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SpeedPlan:
    return SpeedPlan(
        model=str(write_pair(tmp_path_factory.mktemp("pair"))), tasks=TASKS, block_sizes=(4,), thresholds=(0.9,),
        num_prompts=2, new_tokens=3, min_rounds=2, warmup_rounds=1, launches=2, costs=False, probes=0,
    )  # fmt: skip


class Noting(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_one_command_makes_its_launches_in_processes_of_their_own(
    plan: SpeedPlan, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    """There was no way to several launches but the same command by hand, each a run of its own."""
    shown = Noting()
    run = store.load(speed.run(dataclasses.replace(plan, probes=1), requests, root=tmp_path, progress=shown))
    assert shown.notes == ["launch 1 of 2", "launch 2 of 2"]
    assert run.complete
    assert len(list(tmp_path.iterdir())) == 1
    told = [event for event in run.events if event["kind"] == "launched"]
    assert len({event["process"] for event in told}) == 2
    assert {event["launch"] for event in told} == {sample.launch_id for sample in run.speed}
    for launch in (event["launch"] for event in told):
        rounds = {(s.phase, s.round) for s in run.speed if s.launch_id == launch and s.phase != "probe"}
        assert sorted(phase for phase, _ in rounds) == ["measure"] * 5 + ["warmup"]
    assert contradictions(run) == ()
    [point] = speed_points([run])[0]
    assert (point.num_launches, point.num_rounds) == (2, 10)
    # Each launch makes up new prompts of its own, under ids that the other has as well.
    assert [one.differing for one in from_round_to_round([run], point)] == [(), ()]
    assert plan_from_json(SpeedPlan, run.manifest.plan).launches == 2
    speed.run(dataclasses.replace(plan, probes=1), requests, root=tmp_path, resume=run.path)
    assert num_measurings(store.load(run.path)) == 1, "nothing was added"


def test_one_process_that_goes_on_is_no_further_launch(
    plan: SpeedPlan, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    """Resuming in a loop made five launches of one process."""
    alone = dataclasses.replace(plan, launches=1, min_rounds=1)
    path = speed.run(alone, requests, root=tmp_path)
    for num, is_look in ((2, True), (3, True), (3, False)):
        shown = Noting()
        more = dataclasses.replace(alone, min_rounds=num)
        speed.run(more, requests, root=tmp_path, resume=path, progress=shown)
        assert shown.notes.count(EXTENDED) == is_look
        assert num_measurings(store.load(path)) == num
    run = store.load(path)
    assert len({sample.launch_id for sample in run.speed}) == 3
    assert contradictions(run) == ()
    [point] = speed_points([run])[0]
    assert (point.num_launches, point.num_rounds) == (1, 3)


def samples_of(*launched: int) -> list[SpeedSample]:
    """One timed call a round of a second each; so many rounds in each launch."""
    return [
        SpeedSample(
            call_id="c", launch_id=f"l{launch}", cell="x", replica=0, round=10 * launch + number, phase="measure",
            batch_size=1, wall_s=1.0, prefill_s=None, first_output_s=None, peak_memory_bytes=None,
            peak_memory_reason="none", started_at="now", prompts=(),
        )
        for launch, num in enumerate(launched)
        for number in range(num)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "launched", "missing"),
    [
        ({"launches": 1, "min_rounds": 5}, (2, 3), 0),
        ({"launches": 1, "min_rounds": 6}, (2, 3), 1),
        ({"launches": 5, "min_rounds": 5}, (), 5),
        ({"launches": 5, "min_rounds": 5}, (4, 4), 3),
        ({"launches": 5, "min_rounds": 5}, (4, 3, 4), 3),
        ({"launches": 2, "min_rounds": 12}, (6, 5), 1),
        ({"launches": 2, "min_rounds": 1, "min_seconds": 12.0}, (6, 5), 1),
        ({"launches": 2, "min_rounds": 1}, (5, 5, 5), 0),
        ({"launches": 4, "min_rounds": 12}, (5, 4, 5, 5), 1),
    ],
)
def test_how_many_launches_are_missing(settings: dict[str, Any], launched: tuple[int, ...], missing: int) -> None:
    assert launches_missing(SpeedPlan(**settings), samples_of(*launched), 1) == missing


def test_a_launch_takes_its_share_and_never_few_rounds_alone() -> None:
    assert share_of_launch(SpeedPlan(launches=5, min_rounds=5)).min_rounds == 4
    assert share_of_launch(SpeedPlan(launches=9, min_rounds=10)).min_rounds == 4
    assert share_of_launch(SpeedPlan(launches=5, min_rounds=16, min_seconds=10.0)).min_rounds == 4
    assert share_of_launch(SpeedPlan(launches=5, min_rounds=16, min_seconds=10.0)).min_seconds == 2.0
    assert share_of_launch(SpeedPlan(min_rounds=1)) == SpeedPlan(min_rounds=1)
    with pytest.raises(ValueError, match="launches must be 1 or more"):
        SpeedPlan(launches=0)


@pytest.mark.parametrize("num_launches", [2, 3, 4])
def test_a_few_launches_make_rounds_enough_to_tell_how_these_depend_on_each_other(num_launches: int) -> None:
    """Three launches of four rounds each could never decide anything: their correlation was taken to be the worst."""
    least = share_of_launch(SpeedPlan(launches=num_launches, min_rounds=12)).min_rounds
    launches_R = [str(number) for number in range(num_launches) for _ in range(least)]
    rounds_R = np.random.default_rng(0).normal(size=len(launches_R))
    assert intervals.serial_dependence(rounds_R, launches_R).facts.lag1 is not None
    assert share_of_launch(SpeedPlan(launches=num_launches)).min_rounds == ceil(20 / num_launches)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ((20,), ""),
        ((12,), ""),
        ((11,), "11 rounds in 1 launch often cannot decide a claim: time 12 or more"),
        ((2,), "2 rounds in 1 launch cannot decide a claim, with fewer than 5 per launch: time 12 or more"),
        ((4, 4, 4), "12 rounds in 3 launches cannot decide a claim, with fewer than 5 per launch: time 15 or more"),
        ((5, 5), "10 rounds in 2 launches often cannot decide a claim: time 12 or more"),
        ((4, 4, 12), ""),
        ((4, 4, 4, 4, 4), ""),
        ((2, 2, 2, 2, 2), "10 rounds in 5 launches often cannot decide a claim: time 20 or more"),
    ],
)
def test_rounds_that_decide_nothing_are_told_beforehand(rounds: tuple[int, ...], words: str) -> None:
    found = session.undecided_text(rounds)
    assert found.startswith(f"warning: {words}" if words else "")
    assert bool(found) == bool(words)


def test_too_few_rounds_are_warned_of_before_they_are_measured(
    plan: SpeedPlan, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    shown = Noting()
    alone = dataclasses.replace(plan, launches=1, min_rounds=2)
    path = speed.run(alone, requests, root=tmp_path, progress=shown)
    [warned] = [number for number, note in enumerate(shown.notes) if "cannot decide a claim" in note]
    assert shown.notes[warned].startswith("warning: 2 rounds in 1 launch")
    assert shown.notes[warned - 1].startswith("estimated duration")
    assert "on the clock" in shown.notes[warned + 1]
    more = Noting()
    speed.run(dataclasses.replace(alone, min_rounds=3), requests, root=tmp_path, resume=path, progress=more)
    assert any(note.startswith("warning: 3 rounds in 2 launches cannot") for note in more.notes)


def test_the_tenth_launch_comes_behind_the_ninth() -> None:
    """Launches were put in the order of their names, in which 10 comes before 2: a wander over them was torn up."""
    [sample] = samples_of(1)
    grid = {((f"run/{number // 2 + 1}", number), ("p",)): sample for number in range(24)}
    rounds, _, num_incomplete = complete_rounds(grid)
    assert [number for _, number in rounds] == [*range(24)]
    assert num_incomplete == 0


class StrangeError(UserError):
    """A plug-in's own kind, which does not take one text."""

    def __init__(self) -> None:
        super().__init__("a strange prompt")


StrangeError.__module__ = "somebodys.decoders"


def refusing(**_: Any) -> None:
    raise UserError("no such prompt")


def refusing_strangely(**_: Any) -> None:
    raise StrangeError


def plugged(**_: Any) -> None:
    raise PluginError("decoder x: its generate raised KeyError")


def unwritable(**_: Any) -> None:
    raise FileNotFoundError(2, "No such file", "rows")


def buggy(**_: Any) -> None:
    raise ValueError("operands could not be broadcast together")


def vanishing(**_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted(**_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (refusing, UserError, "^no such prompt$"),
        (refusing_strangely, UserError, "^a strange prompt$"),
        (plugged, PluginError, "^decoder x: its generate raised KeyError$"),
        (unwritable, OSError, "No such file"),
        (buggy, RuntimeError, "^a launch failed: its traceback is above$"),
        (vanishing, ChildProcessError, "by signal 9: run the same command with --resume"),
        (interrupted, KeyboardInterrupt, ""),
    ],
)
def test_what_stops_a_launch_stops_the_command(
    monkeypatch: pytest.MonkeyPatch, made: Any, error: type[BaseException], words: str
) -> None:
    """In a forked process, which does what it is given without reading it anew."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(launches.multiprocessing, "get_context", lambda _: context)
    with pytest.raises(error, match=words or None) as raised:
        launches._in_process(made, True)
    assert raised.type is error
