"""Timings that were copied: a launch under further names, a run under another id. Honest ones never repeat."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixture import SPEED_ID, Row, speed_run
from test_claims_judge import FAST, claims_of
from test_claims_terms import CLAIM_FILE

from twotower_eval import cli, store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.compare.consistency import by_run, contradictions
from twotower_eval.analyse.words.gates import contradiction_text
from twotower_eval.records import SpeedSample
from twotower_eval.store import Run
from twotower_eval.store.journal import DONE, close_run

OTHER_ID = "20261103T120000Z-speed-cccccc"


def changed(run: Run, change: Callable[[SpeedSample], SpeedSample]) -> Run:
    return dataclasses.replace(run, speed=[change(call) for call in run.speed])


def copied(run: Run, num: int, change: Callable[[SpeedSample, int], SpeedSample] = lambda call, _: call) -> Run:
    """All rows under so many more launches, their rounds numbered on."""
    rounds = 1 + max(call.round for call in run.speed)

    def under(call: SpeedSample, number: int) -> SpeedSample:
        moved = dataclasses.replace(call, launch_id=f"launch-{number + 1}", round=call.round + number * rounds)
        return change(moved, number) if number else moved

    return dataclasses.replace(run, speed=[under(call, number) for number in range(num + 1) for call in run.speed])


def kinds(run: Run) -> set[str]:
    return {one.kind for one in contradictions(run)}


@pytest.fixture
def timed(tmp_path: Path) -> Run:
    return store.load(speed_run(tmp_path / "timed", num_rounds=3))


def test_one_launch_copied_under_more_names_is_no_five(tmp_path: Path) -> None:
    """Rows of one launch under four more ids gave SUPPORTED without its scope."""
    run = store.load(speed_run(tmp_path, scored=True))
    [alone] = judge(claims_of({**FAST, "expected": 1.2}), [run])
    assert (alone.outcome, alone.scope) == ("SUPPORTED", "in this launch")
    [verdict] = judge(claims_of({**FAST, "expected": 1.2}), [copied(run, 4)])
    assert verdict.outcome == "INVALID"
    assert "are equal, to the last digit, to those of cell" in verdict.reason


def test_copies_are_told_as_facts(timed: Run) -> None:
    [one] = [one for one in contradictions(copied(timed, 1)) if one.kind == "times repeated"]
    assert one.other is not None
    assert {one.location.launch, one.other.launch} == {"launch-1", "launch-2"}
    assert (one.file, one.field, one.stated) == ("speed.jsonl", "wall_s", 8)
    assert "8 timings of cell" in contradiction_text(one)


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_most_of_a_round_is_enough(timed: Run, share: float) -> None:
    """One call in ten that was changed hides nothing, nor do other moments and another order of prompts."""
    rng = np.random.default_rng(0)

    def change(call: SpeedSample, number: int) -> SpeedSample:
        wall_s = call.wall_s if rng.random() < share else call.wall_s * 1.01
        calls = f"{7 - int(call.call_id)}"
        return dataclasses.replace(call, wall_s=wall_s, started_at=f"2026-12-0{number}T12:00:00", call_id=calls)

    assert "times repeated" in kinds(copied(timed, 1, change))


def test_one_round_copied_within_its_launch(timed: Run) -> None:
    rows = [*timed.speed]
    rows += [dataclasses.replace(c, round=3) for c in timed.speed if (c.phase, c.round) == ("measure", 1)]
    assert "times repeated" in kinds(dataclasses.replace(timed, speed=rows))


def test_few_calls_a_round_are_looked_at_over_all_rounds(tmp_path: Path) -> None:
    run = store.load(speed_run(tmp_path, workload="fixed", num_calls=2, num_rounds=4))
    assert kinds(run) == set()
    assert "times repeated" in kinds(copied(run, 1))


def test_a_second_copy_of_the_baseline_that_is_the_first_one(timed: Run) -> None:
    """A null that fits to the last digit was timed once."""
    first = {(c.cell, c.round, c.phase, c.call_id): c.wall_s for c in timed.speed if c.replica == 0}
    run = changed(
        timed, lambda c: dataclasses.replace(c, wall_s=first[c.cell, c.round, c.phase, c.call_id]) if c.replica else c
    )
    [found] = contradictions(run)
    assert found.kind == "times repeated"
    assert "the second copy of cell" in contradiction_text(found)


def test_the_same_moments_under_other_times(timed: Run) -> None:
    rows = [
        dataclasses.replace(call, started_at=f"2026-11-02T12:{second // 60:02}:{second % 60:02}.125+00:00")
        for second, call in enumerate(timed.speed)
    ]
    jittered = copied(
        dataclasses.replace(timed, speed=rows), 1, lambda c, _: dataclasses.replace(c, wall_s=c.wall_s * 1.003)
    )
    found = {one.kind: one for one in contradictions(jittered)}
    assert found.keys() == {"moments repeated", "launches at once"}
    assert "began while launch launch-" in contradiction_text(found["launches at once"])


def test_launches_one_after_the_other_are_not_at_once(timed: Run) -> None:
    def later(call: SpeedSample) -> SpeedSample:
        second = timed.speed.index(call)
        at = f"2026-11-02T12:{second // 60:02}:{second % 60:02}.125+00:00"
        return dataclasses.replace(call, started_at=at, launch_id=f"l{second // 40}")

    assert kinds(changed(timed, later)) == set()
    woven = changed(changed(timed, later), lambda c: dataclasses.replace(c, launch_id=f"l{c.round % 2}"))
    assert "launches at once" in kinds(woven)


@pytest.mark.parametrize("walls_s", ["alike", "coarse", "of a made-up clock"])
def test_a_clock_that_repeats_itself_contradicts_nothing(timed: Run, walls_s: str) -> None:
    """Times in milliseconds, or all alike, are equal by chance."""

    def change(call: SpeedSample) -> SpeedSample:
        by_name: dict[str, float] = {
            "alike": 0.123456789,
            "coarse": round(call.wall_s, 2),
            "of a made-up clock": 0.1 * int(call.call_id),
        }
        return dataclasses.replace(call, wall_s=by_name[walls_s])

    assert "times repeated" not in kinds(copied(changed(timed, change), 3))


COARSE = [
    (1e-7, 8e-4, 2e-6), (1e-7, 8e-4, 1e-5), (1e-7, 2e-2, 2e-5), (1e-6, 8e-4, 1e-5), (1e-6, 2e-2, 5e-6),
    (1e-3, 3e-2, 1e-4), (1e-3, 2.0, 1e-3), (1 / 64, 1.5, 1e-3), (1 / 24e6, 8e-4, 2e-6), (1e-9, 5e-5, 2e-7),
]  # fmt: skip


@pytest.mark.parametrize("num_calls", [8, 100, 400])
@pytest.mark.parametrize(("tick_s", "call_s", "jitter_s"), COARSE)
def test_a_coarse_clock_on_short_calls_copies_nothing(
    timed: Run, tick_s: float, call_s: float, jitter_s: float, num_calls: int
) -> None:
    """Of 400 calls of 0.8 ms by a clock of 100 ns each launch had the times of the other: INVALID every time."""
    honest = on_a_clock(timed, tick_s, call_s, jitter_s, num_calls)
    assert "times repeated" not in kinds(honest)


def on_a_clock(run: Run, tick_s: float, call_s: float, jitter_s: float, num_calls: int) -> Run:
    """Two launches of three rounds, of calls that last up to twice as long; times to nanoseconds, as floats have."""
    rng, first = np.random.default_rng(num_calls), run.speed[0]
    rows = [
        dataclasses.replace(
            first, launch_id=f"launch-{1 + round_ // 3}", round=round_, call_id=f"{call}", phase="measure",
            wall_s=float(round(round(max(s, tick_s) / tick_s) * tick_s, 9)),
        )
        for round_ in range(6)
        for call in range(num_calls)
        for s in [call_s * (1 + call // 4 * 4 / num_calls) + abs(rng.normal(0, jitter_s))]
    ]  # fmt: skip
    return dataclasses.replace(run, speed=rows)


@pytest.mark.parametrize(("tick_s", "call_s", "jitter_s"), [
    (1e-7, 2e-3, 1e-5), (1e-7, 8e-4, 2e-6), (1e-6, 2e-2, 2e-4), (1e-3, 100.0, 1.0), (1e-9, 5e-5, 2e-7),
])  # fmt: skip
@pytest.mark.parametrize("num_calls", [12, 60])
def test_a_copy_by_a_coarse_clock_is_found(
    timed: Run, tick_s: float, call_s: float, jitter_s: float, num_calls: int
) -> None:
    run = on_a_clock(timed, tick_s, call_s, jitter_s, num_calls)
    one = dataclasses.replace(run, speed=[call for call in run.speed if call.launch_id == "launch-1"])
    assert "times repeated" not in kinds(one)
    assert "times repeated" in kinds(copied(one, 1))


@pytest.mark.parametrize("digits", [9, 8, 7, 6])
def test_a_copy_whose_last_digits_were_rounded_off_is_found(timed: Run, digits: int) -> None:
    """Times without digits below a microsecond were not looked at."""
    rounded = changed(timed, lambda call: dataclasses.replace(call, wall_s=round(call.wall_s, digits)))
    assert "times repeated" not in kinds(rounded)
    assert "times repeated" in kinds(copied(rounded, 1))


def other_run(root: Path, path: Path) -> Path:
    """A run's folder under another id, in its files as well, closed anew."""
    there = root / OTHER_ID
    shutil.copytree(path, there)
    for name in ("manifest.json", "speed.jsonl"):
        text = (there / name).read_text(encoding="utf-8").replace(SPEED_ID, OTHER_ID).replace("launch-1", "launch-2")
        (there / name).write_text(text, encoding="utf-8")
    (there / "events.jsonl").write_text('{"at":"t","kind":"started"}\n', encoding="utf-8")
    (there / DONE).unlink()
    close_run(there, store.FILES)
    return there


def test_a_run_copied_under_another_id_is_no_second_one(tmp_path: Path) -> None:
    path = speed_run(tmp_path / "a", scored=True)
    runs = [store.load(path), store.load(other_run(tmp_path / "b", path))]
    assert by_run(runs[1:]) == {}
    found = by_run(runs)
    assert found.keys() == {SPEED_ID, OTHER_ID}
    [one] = found[OTHER_ID]
    assert contradiction_text(one).split(" (and")[0].endswith(f"of run {SPEED_ID}")
    [verdict] = judge(claims_of({**FAST, "expected": 1.2}), runs)
    assert verdict.outcome == "INVALID"


def test_two_honest_runs_of_the_same_prompts_are_no_copies(tmp_path: Path) -> None:
    def named(row: Row) -> Row:
        return dataclasses.replace(row, launch_id=f"{OTHER_ID}/1") if isinstance(row, SpeedSample) else row

    runs = [store.load(speed_run(tmp_path / "a")), store.load(speed_run(tmp_path / "b", run_id=OTHER_ID, edit=named))]
    assert by_run(runs) == {}


def test_a_run_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under two names of its folder as well."""
    path = speed_run(tmp_path / "a", scored=True)
    (tmp_path / "claims.toml").write_text(CLAIM_FILE, encoding="utf-8")
    shutil.copytree(path, tmp_path / "b" / "another-name")
    words: list[Any] = ["claims", "check", tmp_path / "claims.toml", path, tmp_path / "b" / "another-name"]
    assert cli.main([*map(str, words)]) == 2
    assert f"run {SPEED_ID} is named twice" in capsys.readouterr().err
