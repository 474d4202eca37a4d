"""Times that no clock can give void their call, with a count, and nothing else."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.compare import Runs
from twotower_eval.analyse.compare.calls import Grid, usable
from twotower_eval.analyse.compare.timing import SpeedPoint, speed_points
from twotower_eval.analyse.report.gates import gates
from twotower_eval.analyse.words import finding_text, found_text
from twotower_eval.measure import harness, speed, suites
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import (
    Claim,
    CostSample,
    GateLimits,
    OperatingPoint,
    SpeedSample,
    TimeFault,
    Verdict,
    to_json,
)
from twotower_eval.rules import fault_of, time_fault, total_finite_s
from twotower_eval.strict import from_json

TASKS = ("miniature_sort",)
ROUNDS, CALLS = 5, 8
ODD_READING = 100


class Ticking:
    """A clock that moves by a hundredth of a second whenever it is read, and may jump at one reading."""

    def __init__(self, jump_s: float = 0.0) -> None:
        self.num_readings, self.jump_s = 0, jump_s

    def __call__(self) -> float:
        self.num_readings += 1
        return 0.01 * self.num_readings + (self.jump_s if self.num_readings >= ODD_READING else 0.0)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    root = tmp_path_factory.mktemp("timed")
    return measure(root, Ticking())


def measure(root: Path, clock: Any, **changes: Any) -> store.Run:
    pair = root / "pair" if (root / "pair").exists() else write_pair(root / "pair")
    setting: dict[str, Any] = {
        "model": str(pair), "tasks": TASKS, "block_sizes": (4,), "num_prompts": CALLS, "new_tokens": 2,
        "min_rounds": ROUNDS, "warmup_rounds": 0, "costs": False, "probes": 0, "threads": 1,
    }  # fmt: skip
    requests = suites.build_requests(suites.resolve_tasks(TASKS))
    path = speed.run(SpeedPlan(**{**setting, **changes}), requests, root=root / "results", now=clock)
    return store.load(harness.score_journal(path))


def edited(run: store.Run, edits: dict[int, float], arm: str = "candidate") -> store.Run:
    """The run with other seconds in some of an arm's calls, by their place."""
    places = [at for at, s in enumerate(run.speed) if run.cells[s.cell].arm == arm and s.replica == 0]
    speed_rows = list(run.speed)
    for at, wall_s in edits.items():
        speed_rows[places[at]] = dataclasses.replace(speed_rows[places[at]], wall_s=wall_s)
    return dataclasses.replace(run, speed=speed_rows)


def point_of(run: store.Run) -> SpeedPoint:
    (point,) = Runs([run]).speed
    return point


def verdict_of(run: store.Run, **limits: float) -> Verdict:
    cell = next(cell for cell in run.manifest.cells if cell.arm == "candidate")
    at = OperatingPoint(name="here", decoder=cell.decoder, batch_size=1, num_devices=1, workload="answer")
    claim = Claim(
        name="fast", quantity="speedup_time", subject=cell.checkpoint.name, baseline="context-tower", source="us",
        point=at, expected=1.0, margin=0.05, limits=GateLimits(**limits),
    )  # fmt: skip
    (found,) = judge([claim], [run])
    return found


# What is impossible


@pytest.mark.parametrize(
    ("wall_s", "moments_s", "fault"),
    [
        (1.0, (0.5, 1.0), None), (1.0, (), None), (1.0, (0.0,), None), (1.0, (1.00001,), None),
        (0.0, (), "no time"), (1e-12, (), "no time"), (-1.0, (), "negative"), (1.0, (-0.1,), "negative"),
        (math.nan, (), "not finite"), (math.inf, (), "not finite"), (1.0, (math.nan,), "not finite"),
        (1.0, (1.5,), "after the end"),
    ],
)  # fmt: skip
def test_what_no_clock_can_give(wall_s: float, moments_s: tuple[float, ...], fault: TimeFault | None) -> None:
    assert time_fault(wall_s, moments_s) == fault


def test_such_times_add_nothing_to_the_time_that_passed() -> None:
    assert total_finite_s([1.0, -5.0, math.nan, math.inf, 0.0, 2.0]) == 3.0


def test_rows_with_impossible_times_are_read(timed: store.Run) -> None:
    """A negative time was refused, and with it the whole run."""
    row = to_json(timed.speed[0]) | {"wall_s": -0.5}
    assert fault_of(from_json(SpeedSample, row)) == "negative"
    row["prompts"][0]["finish_s"] = 99.0
    assert fault_of(from_json(SpeedSample, row | {"wall_s": 1.0})) == "after the end"
    assert fault_of(from_json(SpeedSample, row | {"fault": "graph made"})) == "graph made"
    with pytest.raises(ValueError, match="finite"):
        from_json(SpeedSample, row | {"wall_s": math.nan})


# Measuring


def test_a_clock_that_goes_back_voids_one_call_and_the_run_goes_on(tmp_path: Path) -> None:
    """It was an error at the first such answer."""
    run = measure(tmp_path, Ticking(jump_s=-50.0), min_rounds=2, num_prompts=4)
    assert run.complete
    (sample,) = [sample for sample in run.speed if sample.fault is not None]
    assert math.isfinite(sample.wall_s)
    assert len(run.speed) == 2 * 4 * 3
    kept = {(r.cell, r.repeat, f"{r.task}/{r.doc_id}"): r.generation.finish_s for r in run.generations}
    if sample.replica == 0:
        assert kept[sample.cell, sample.round, sample.prompts[0].prompt_id] is None
    assert sum(finish_s is None for finish_s in kept.values()) == (sample.replica == 0)


# Reading


def test_one_negative_time_leaves_one_call_out_of_both_arms(timed: store.Run) -> None:
    point = point_of(edited(timed, {3: -0.2}))
    assert (point.faults, point.num_paired) == (("negative",), ROUNDS * CALLS)
    assert (point.num_rounds, point.num_calls) == (ROUNDS, CALLS - 1)
    assert point.time.estimate is not None
    assert point.timed.baseline_s.shape == point.timed.candidate_s.shape == (ROUNDS, CALLS - 1)
    assert [gate.outcome for gate in point.gates if gate.kind == "possible_times"] == ["passed"]
    [found] = point.warnings
    assert finding_text(found) == (
        "1 of 40 timed calls are void (1 with a negative time); their prompts are left out in every round, or their "
        "rounds are left out"
    )


@pytest.mark.parametrize("arm", ["baseline", "candidate"])
@pytest.mark.parametrize("wall_s", [0.0, -3.0])
def test_one_impossible_time_never_vetoes_a_verdict(timed: store.Run, arm: str, wall_s: float) -> None:
    verdict = verdict_of(edited(timed, {3: wall_s}, arm))
    assert verdict.estimate is not None
    (gate,) = [gate for gate in verdict.gates if gate.kind == "possible_times"]
    assert gate.outcome == "passed"
    assert found_text(gate).startswith("1 of 40 timed calls are void")
    assert "possible times" not in verdict.reason


def test_times_of_one_round_go_with_the_round(timed: store.Run) -> None:
    point = point_of(edited(timed, dict.fromkeys(range(CALLS), 0.0)))
    assert (point.num_rounds, point.num_calls) == (ROUNDS - 1, CALLS)
    assert point.faults == ("no time",) * CALLS


def test_more_than_the_limit_is_invalid(timed: store.Run) -> None:
    several = edited(timed, {0: -1.0, 9: 0.0, 18: -1.0})
    assert point_of(several).invalid
    verdict = verdict_of(several)
    assert verdict.outcome == "INVALID"
    counted = "3 of 40 timed calls are void (2 with a negative time, 1 with no time at all)"
    assert f"possible times: {counted}: 37.5 % of the timings go with them, more than 5 %" in verdict.reason


def test_the_limit_is_on_what_goes_and_not_on_what_is_void(timed: store.Run) -> None:
    """Two of forty calls take two of eight prompts along: that was 5 % and is a quarter."""
    two = point_of(edited(timed, {0: -1.0, 9: -1.0}))
    assert (two.num_calls, two.void_share) == (CALLS - 2, 0.25)
    assert two.too_many_faults(GateLimits(void_share=0.2))
    candidates = [s for s in timed.speed if timed.cells[s.cell].arm == "candidate" and s.replica == 0]
    of_one = [at for at, s in enumerate(candidates) if s.prompts[0].prompt_id == candidates[0].prompts[0].prompt_id]
    three = edited(timed, dict.fromkeys(of_one[:3], -1.0))
    one_prompt = point_of(three)
    assert (len(one_prompt.faults), one_prompt.void_share) == (3, 0.125)
    assert not one_prompt.too_many_faults(GateLimits(void_share=0.2)), "one prompt of eight, whatever is void of it"
    assert "possible times" not in verdict_of(three, void_share=0.2).reason


def test_where_every_time_is_impossible_nothing_is_measured(timed: store.Run) -> None:
    points, gaps = speed_points([edited(timed, dict.fromkeys(range(ROUNDS * CALLS), -1.0))])
    assert points == ()
    assert gaps[0].endswith("no call left: 40 of 40 timed calls are void (40 with a negative time)")


def test_the_null_leaves_out_its_own(timed: store.Run) -> None:
    copies = [at for at, sample in enumerate(timed.speed) if sample.replica == 1]
    rows = list(timed.speed)
    rows[copies[0]] = dataclasses.replace(rows[copies[0]], wall_s=-1.0)
    point = point_of(dataclasses.replace(timed, speed=rows))
    assert (point.num_calls, point.faults) == (CALLS, ())
    assert point.null_timed is not None
    assert point.null_timed.baseline_s.shape == (ROUNDS, CALLS - 1)


def test_the_fewest_timings_are_given_up() -> None:
    assert usable(Grid(), Grid()).rounds == []


def test_a_report_counts_them(timed: store.Run) -> None:
    text = gates(Runs([edited(timed, {3: -0.2})])).markdown
    assert "| possible times | passed |" in text
    assert "1 of 40 timed calls are void" in text


def test_costs_that_took_no_time_are_left_out(tmp_path: Path) -> None:
    row = {
        "cell": "c", "launch_id": "l", "round": 0, "phase": "measure", "part": "prefill", "replica": 0, "batch_size": 1,
        "context_tokens": 3, "block_size": None, "num_repeats": 2, "wall_s": -1.0, "started_at": "",
    }  # fmt: skip
    assert from_json(CostSample, row).wall_s == -1.0
    run = measure(tmp_path, Ticking(), costs=True, min_rounds=2)
    (before,), (after,) = (
        speed_points([one])[0]
        for one in (run, dataclasses.replace(run, costs=[*run.costs, dataclasses.replace(run.costs[0], wall_s=-9.0)]))
    )
    assert before.costs == after.costs


def test_a_folder_on_disk_with_a_negative_time_gives_its_verdict(timed: store.Run, tmp_path: Path) -> None:
    folder = tmp_path / timed.manifest.run_id
    folder.mkdir()
    for file in timed.path.iterdir():
        if file.name in ("manifest.json", "speed.jsonl", "generations.jsonl", "scores.jsonl"):
            (folder / file.name).write_bytes(file.read_bytes())
    lines = (folder / "speed.jsonl").read_text().splitlines()
    row = json.loads(lines[5])
    lines[5] = json.dumps(row | {"wall_s": -row["wall_s"]})
    (folder / "speed.jsonl").write_text("\n".join(lines) + "\n")
    point = point_of(store.load(folder))
    assert point.time.estimate is not None
