"""What a run should hold by its plan and events: gaps are named, and runs that were stopped and resumed have none."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_fixture import quality_run, speed_run
from test_consistency import CELLS, PLAN, RUN_ID, Edit, answers, head, honest, scores, speed

from twotower_eval import store
from twotower_eval.analyse.claims.looks import num_measurings
from twotower_eval.analyse.compare.consistency import contradictions
from twotower_eval.analyse.compare.contradiction import remarks, tells_digests
from twotower_eval.analyse.compare.gates import files_agree_gate
from twotower_eval.analyse.words import finding_text, found_text
from twotower_eval.analyse.words.gates import contradiction_text
from twotower_eval.records import SpeedSample, canonical_json, sha256_text
from twotower_eval.store import Run

_ = honest  # the fixture


def both(*edits: Edit) -> Edit:
    def change(run: Run) -> Run:
        for edit in edits:
            run = edit(run)
        return run

    return change


def planned(**plan: Any) -> Edit:
    return head(plan={**PLAN, **plan}, plan_sha256=sha256_text(canonical_json({**PLAN, **plan})))


def events(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Edit:
    return lambda run: dataclasses.replace(run, events=change(run.events))


def without_files(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "files"} for event in told]


def one_launch_more(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    more = [{"at": "t", "kind": "launched", "launch": f"{RUN_ID}/2", "process": "q"}, {"at": "t", "kind": "measured"}]
    return [*told, *[{**event, "files": told[-1]["files"]} for event in more]]


def only(keep: Callable[[Any], bool]) -> Edit:
    """Rows of every journal that are kept."""
    return both(*(kind(lambda row: row if keep(row) else None) for kind in (speed, answers, scores)))


def later_launch(call: SpeedSample) -> SpeedSample:
    return dataclasses.replace(call, launch_id=f"{RUN_ID}/2") if call.round == 2 else call


def warmed_up(run: Run) -> Run:
    calls = [dataclasses.replace(c, phase="warmup", wall_s=1.1) for c in run.speed if c.round == 0]
    return dataclasses.replace(run, speed=[*calls, *run.speed])


def missing_round(row: Any) -> bool:
    return getattr(row, "round", getattr(row, "repeat", None)) != 1


GAPS: dict[str, tuple[Edit, str, str]] = {
    "a round with its answers": (only(missing_round), "round missing", "round 1 is missing, though rounds run up to 2"),
    "a launch": (events(one_launch_more), "launch without calls", f"recorded launch {RUN_ID}/2 as complete, but speed"),
    "a warm-up": (
        both(planned(warmup_rounds=1), warmed_up, speed(later_launch)),
        "launch without warm-up",
        f"launch {RUN_ID}/2 has no warm-up",
    ),
    "rounds": (planned(min_rounds=5), "rounds below plan", "asks for 5 rounds, but speed.jsonl has 3 whole ones"),
    "a cell": (
        only(lambda row: row.cell != CELLS[1].id),
        "cell without rows",
        f"the run is complete, but cell {CELLS[1].id} has no row",
    ),
    "a size of blocks": (
        planned(block_sizes=[16, 32]),
        "plan without cells",
        "the plan has block_sizes 32, but no cell has it: they have 16",
    ),
    "all digests": (events(without_files), "digests missing", "of events.jsonl lacks the journals' line counts"),
    "the last digests": (
        events(lambda told: [*told[:-1], *without_files(told[-1:])]),
        "digests missing",
        "of events.jsonl lacks the journals' line counts",
    ),
}


@pytest.mark.parametrize(("edit", "kind", "words"), GAPS.values(), ids=GAPS)
def test_each_gap_is_named(honest: Run, edit: Edit, kind: str, words: str) -> None:
    """Rounds, launches and cells could be left out, and digests with which an edit would show."""
    found = {one.kind: contradiction_text(one) for one in contradictions(edit(honest))}
    assert kind in found
    assert words in found[kind]


HONEST: dict[str, Edit] = {
    "a torn round that left answers only": speed(lambda call: None if call.round == 1 else call),
    "a launch stopped before its first call": events(
        lambda told: [*told[:2], {"at": "t", "kind": "failed"}, {"at": "t", "kind": "resumed"}, *told[2:]]
    ),
    "a run that is not complete": both(planned(min_rounds=5), lambda run: dataclasses.replace(run, complete=False)),
    "rounds beyond the plan": planned(min_rounds=2),
    "a warm-up in its launch": both(planned(warmup_rounds=1), warmed_up),
    "the sizes of the plan": planned(block_sizes=[16]),
}


@pytest.mark.parametrize("edit", HONEST.values(), ids=HONEST)
def test_what_stopped_runs_leave_is_no_gap(honest: Run, edit: Edit) -> None:
    gaps = {kind for _, kind, _ in GAPS.values()}
    assert gaps.isdisjoint(one.kind for one in contradictions(edit(honest)) if one.kind != "digests missing")


def test_a_run_gone_on_with_under_a_smaller_plan_says_so(honest: Run) -> None:
    """It is complete, with fewer rounds than it was begun with."""
    launches = [{"at": "t", "kind": "measured", "num_missing": 1}, {"at": "t", "kind": "resumed"}]
    fewer = planned(min_rounds=5)(honest)
    one_command = events(lambda told: [*told[:1], *launches, *told[1:]])(fewer)
    assert remarks([one_command]) == []
    assert "rounds below plan" in {one.kind for one in contradictions(one_command)}
    another = events(lambda told: [*told[:1], {"at": "t", "kind": "resumed"}, *told[1:]])(fewer)
    assert "rounds below plan" not in {one.kind for one in contradictions(another)}
    [said] = remarks([another])
    assert "was planned with 5 rounds and resumed with fewer: it has 3 whole rounds" in finding_text(said)
    assert [num_measurings(one) for one in (honest, one_command, another)] == [1, 1, 2], "ended early is another look"


def test_a_finished_run_tells_of_every_journal_a_last_time(tmp_path: Path) -> None:
    """Scores came behind the last event that told of digests, so that their edit showed in the closing file only."""
    run = store.load(quality_run(tmp_path, tasks=("arithmetic",), perplexity=False, num_docs=5))
    assert run.events[-1]["kind"] == "finished"
    assert run.events[-1]["files"].keys() == {"generations.jsonl", "scores.jsonl"}


def test_runs_of_before_have_no_digests_and_that_is_said(tmp_path: Path) -> None:
    """An edit of all files of such a run cannot show: it is neither passed nor failed."""
    run = store.load(speed_run(tmp_path, num_rounds=2))
    older = dataclasses.replace(run, events=[{"at": "t", "kind": "started"}])
    assert tells_digests(run)
    assert not tells_digests(older)
    assert contradictions(older) == ()
    run_id = run.manifest.run_id
    gate = files_agree_gate({}, [run_id], [older])
    assert gate.outcome == "not_checked"
    assert "no digests" in found_text(gate)
    assert files_agree_gate({}, [run_id], [run]).outcome == "passed"
