"""What has to hold between quality and speed before they may be said of one thing (PROTOCOL "Claims and verdicts").

A joint claim is of one thing: settings, budgets, tasks and prompts. What differs by how it was measured was not
measured at one point; answers that differ although all of that is the same make the claim INVALID.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from twotower_eval.analyse.compare import QualityPoint, SpeedPoint
from twotower_eval.analyse.compare.answers import timed_as_scored
from twotower_eval.analyse.compare.gate_facts import AnswersTimed, OneThing, SameTasks
from twotower_eval.analyse.compare.same import run_ids_of, same_answers_gates
from twotower_eval.analyse.compare.unlike import tasks_against, unlike_budgets, unlike_settings
from twotower_eval.records import CheckOutcome, Claim, Gate, GateKind, GateLimits, Outcome
from twotower_eval.store import Run

OF_ONE_POINT: tuple[GateKind, ...] = ("one_thing", "same_tasks")  # without: the parts were not measured at one point
FORWARDS_ONLY = "on the fixed workload: a claim about forwards, not about answers"


def between(claim: Claim, runs: Sequence[Run], parts: Sequence[tuple[Claim, QualityPoint | SpeedPoint]]) -> list[Gate]:
    """What holds between the parts of a joint claim, of those that were measured."""
    qualities = [(part.name, point) for part, point in parts if isinstance(point, QualityPoint)]
    scope = list(dict.fromkeys(task for part, _ in parts for task in part.scope))
    found = [_one_point_gate(*pair) for pair in combinations([(part.name, point) for part, point in parts], 2)]
    for part, speed in parts:
        if isinstance(speed, SpeedPoint) and qualities:
            found += [answered_gate(speed), same_tasks_gate(claim, [point for _, point in qualities], scope, speed)]
            for name, quality in qualities:
                asked = _one_question_gate(runs, (name, quality), (part.name, speed))
                found += [asked, *same_answers_gates(runs, quality, speed, part.limits)]
    return list(dict.fromkeys(found))


def apart(runs: Sequence[Run], quality: QualityPoint, speed: SpeedPoint, scope: Sequence[str] = ()) -> list[Gate]:
    """Why a quality and a speed may not be said of one thing, as a report has them side by side; nothing if they may.

    ``scope`` are the tasks that the quality is over, all of them by default.
    """
    names = scope or [task.name for task in quality.tasks]
    pair, timed = (("quality", quality), ("speed", speed)), GateLimits()
    found = [_one_point_gate(*pair), _one_question_gate(runs, *pair), answered_gate(speed)]
    found += [_tasks_gate([quality], names, speed), *same_answers_gates(runs, quality, speed, timed)]
    return [gate for gate in found if gate.outcome == "failed"]


def outcomes(found: Iterable[Gate]) -> list[Outcome]:
    """What gates of a joint claim make of it: nothing where they passed."""
    said: list[Outcome] = []
    for gate in found:
        if gate.outcome == "failed":
            said.append("NOT_MEASURED" if gate.kind in OF_ONE_POINT else "INVALID")
        if gate.outcome == "not_checked" and gate.kind == "effect_on_scores":
            said.append("INCONCLUSIVE")
    return said


def _one_point_gate(one: tuple[str, QualityPoint | SpeedPoint], other: tuple[str, QualityPoint | SpeedPoint]) -> Gate:
    """Two parts have one checkpoint, dtype, decoder and kind of device, in both arms."""
    facts = OneThing(of="settings", parts=(one[0], other[0]), unlike=unlike_settings(one[1], other[1]))
    return _one_thing(facts, one[1], other[1])


def _one_question_gate(runs: Sequence[Run], quality: tuple[str, QualityPoint], speed: tuple[str, SpeedPoint]) -> Gate:
    """Quality and speed are of one budget and of one set of prompts."""
    facts = OneThing(
        of="question",
        parts=(quality[0], speed[0]),
        budgets=tuple(unlike_budgets(runs, quality[1], speed[1]).items()),
        other_prompts=tuple(one for one in timed_as_scored(runs, quality[1], speed[1]) if one.other_prompts),
    )
    return _one_thing(facts, quality[1], speed[1])


def _one_thing(facts: OneThing, *points: QualityPoint | SpeedPoint) -> Gate:
    run_ids = dict.fromkeys(run_id for point in points for run_id in run_ids_of(point))
    if facts.unlike or facts.budgets or facts.other_prompts:
        return Gate(kind="one_thing", outcome="failed", facts=facts, evidence=tuple(run_ids))
    return Gate(kind="one_thing", outcome="passed", facts=replace(facts, parts=None), evidence=tuple(run_ids))


def same_tasks_gate(claim: Claim, qualities: Sequence[QualityPoint], scope: Sequence[str], speed: SpeedPoint) -> Gate:
    """The timed tasks are those in scope that are generated, or those that the claim's point names."""
    if claim.point.timed_tasks:
        return Gate(kind="same_tasks", outcome="passed", facts=SameTasks(tasks=None), evidence=speed.run_ids)
    return _tasks_gate(qualities, scope, speed)


def _tasks_gate(qualities: Sequence[QualityPoint], scope: Sequence[str], speed: SpeedPoint) -> Gate:
    found = tasks_against(speed.tasks, qualities, scope)
    wrong = found.timed and (found.beyond or found.untimed)
    outcome: CheckOutcome = "failed" if wrong else "passed" if found.timed else "not_checked"
    return Gate(kind="same_tasks", outcome=outcome, facts=SameTasks(tasks=found), evidence=speed.run_ids)


def answered_gate(speed: SpeedPoint) -> Gate:
    """A fixed workload goes on past the end of every answer: it says nothing of answers."""
    facts = AnswersTimed(answers=speed.workload != "fixed")
    outcome: CheckOutcome = "passed" if facts.answers else "failed"
    return Gate(kind="answers_are_timed", outcome=outcome, facts=facts, evidence=speed.run_ids)
