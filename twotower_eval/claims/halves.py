"""What has to hold between quality and speed before they may be said of one thing (PROTOCOL "Claims and verdicts").

A joint claim is of one thing: settings, budgets, tasks and prompts. What differs by how it was measured was not
measured at one point; answers that differ although all of that is the same make the claim INVALID.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from twotower_eval.evidence import Measured, QualityPoint, SpeedPoint
from twotower_eval.evidence.answers import (
    Agreement,
    Differing,
    OtherLength,
    from_round_to_round,
    timed_as_scored,
    unlike_prompts,
)
from twotower_eval.evidence.halves import Unlike, tasks_against, unlike_budgets, unlike_settings
from twotower_eval.evidence.numbers import POINTS, interval
from twotower_eval.records import CheckOutcome, Claim, Gate, GateLimits, Outcome
from twotower_eval.store import Run

SAME_ROUNDS, SAME_ANSWERS, EFFECT, DRAWN = "same rounds", "same answers", "effect on scores", "drawn answers"
ONE_THING, SAME_TASKS, ANSWERED, SAME_PROMPTS = "one thing", "same tasks", "answers are timed", "same prompts"
OF_ONE_POINT = (ONE_THING, SAME_TASKS)  # without them the parts were not measured at one point
FORWARDS_ONLY = "on the fixed workload: a claim about forwards, not about answers"
SHOWN = 3


def speed_gates(
    runs: Sequence[Run], quality: Sequence[QualityPoint], speed: SpeedPoint, limits: GateLimits
) -> list[Gate]:
    """What a speedup's own answers have to be: the same in every round, and those of the newest run that scored them.

    ``quality`` is what was measured at the same point, oldest first.
    """
    scored = next((point for point in reversed(quality) if not point.timed), None)
    found = [same_rounds_gate(runs, speed, limits), *same_answers_gates(runs, scored, speed, limits)]
    return [*found, *same_prompts_gates(runs, speed)]


def same_rounds_gate(runs: Sequence[Run], point: SpeedPoint, limits: GateLimits) -> Gate:
    """Every round gives the same tokens in the same passes: what is timed last is what was timed first."""
    found = from_round_to_round(runs, point)
    wrong = [_differ_text(one) for one in found if one.share > _allowed(one, limits)]
    reasons = list(dict.fromkeys(f"{one.arm}: {one.reason}" for one in found if one.reason))
    detail = "; ".join(wrong or reasons) or "; ".join(_agree_text(one, "timed prompts") for one in found)
    outcome: CheckOutcome = "failed" if wrong else "not_checked" if reasons else "passed"
    return Gate(name=SAME_ROUNDS, outcome=outcome, detail=detail, evidence=point.run_ids)


def same_answers_gates(
    runs: Sequence[Run], quality: QualityPoint | None, speed: SpeedPoint, limits: GateLimits
) -> list[Gate]:
    """Timed answers are the scored ones of the same documents, token for token, and took the same passes.

    In half precision rounding parts some of them: then also, what that does to the scores.
    """
    if quality is None:
        detail = "no run scored this point's answers apart from the clock"
        return [Gate(name=SAME_ANSWERS, outcome="not_checked", detail=detail, evidence=speed.run_ids)]
    found, run_ids = _compared(runs, quality, speed), (quality.run_id, *speed.run_ids)
    wrong = [_differ_text(one) for one in found if one.share > _allowed(one, limits)]
    wrong += [_work_text(one) for one in found if one.work is not None and one.work < limits.least_work]
    reasons = list(dict.fromkeys(f"{one.arm}: {one.reason}" for one in found if one.reason))
    detail = "; ".join(wrong or reasons) or "; ".join(_agree_text(one, "documents timed and scored") for one in found)
    outcome: CheckOutcome = "failed" if wrong else "not_checked" if reasons else "passed"
    gates = [Gate(name=SAME_ANSWERS, outcome=outcome, detail=detail, evidence=run_ids)]
    lengths = [(one.arm, other) for one in found for other in one.other_lengths]
    if lengths:
        detail = "; ".join(dict.fromkeys(f"{arm}: {_length_text(other)}" for arm, other in lengths[:SHOWN]))
        detail = f"{len(lengths)} prompts were timed in other tokens than they were scored in: {detail}"
        gates.append(Gate(name=SAME_PROMPTS, outcome="failed", detail=detail, evidence=run_ids))
    return [*gates, *_effect_gates(found, limits, run_ids)]


def _compared(runs: Sequence[Run], quality: QualityPoint, speed: SpeedPoint) -> list[Agreement]:
    """Both arms' answers, as far as nothing else differs that would make them differ."""
    unlike = {one.arm for one in unlike_settings(quality, speed)}
    budgets = unlike_budgets(runs, quality, speed)
    found = []
    for one in timed_as_scored(runs, quality, speed, budgets):
        if one.arm in unlike:
            reason = "was scored under other settings than timed"
            one = Agreement(arm=one.arm, dtype=one.dtype, num_compared=0, reason=reason)
        found.append(one)
    return found


def _allowed(found: Agreement, limits: GateLimits) -> float:
    return limits.differing_answers if found.is_exact else limits.differing_answers_half


def _effect_gates(found: Iterable[Agreement], limits: GateLimits, run_ids: tuple[str, ...]) -> list[Gate]:
    """Whether answers that may differ are worth as much as the scored ones; nothing where none differs."""
    return [_effect_gate(one, one.effect, limits, run_ids) for one in found if one.effect is not None]


def _effect_gate(one: Agreement, effect: Measured, limits: GateLimits, run_ids: tuple[str, ...]) -> Gate:
    # Where tokens are drawn scores move by chance alone, so that only what is beyond it tells.
    name, found = DRAWN if one.reason else EFFECT, effect.estimate
    if found is None:
        return Gate(name=name, outcome="not_checked", detail=f"{one.arm}: {effect.reason}", evidence=run_ids)
    far = abs(found.value) > limits.score_effect
    outcome: CheckOutcome = "passed" if not far else "not_checked" if found.low <= 0 <= found.high else "failed"
    how = {"passed": "within", "failed": "beyond", "not_checked": "not known to be within"}[outcome]
    moved = f"{one.arm}: timed answers score {interval(POINTS, found)} beside the scored ones"
    detail = f"{moved}, {how} {100 * limits.score_effect:g} points"
    return Gate(name=name, outcome=outcome, detail=detail, evidence=run_ids)


# Of one point


def joint_gates(
    claim: Claim, runs: Sequence[Run], parts: Sequence[tuple[Claim, QualityPoint | SpeedPoint]]
) -> list[Gate]:
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


def apart(runs: Sequence[Run], quality: QualityPoint, speed: SpeedPoint, scope: Sequence[str] = ()) -> list[str]:
    """Why a quality and a speed may not be said of one thing, as a report has them side by side; nothing if they may.

    ``scope`` are the tasks that the quality is over, all of them by default.
    """
    names = scope or [task.name for task in quality.tasks]
    pair, timed = (("quality", quality), ("speed", speed)), GateLimits()
    found = [_one_point_gate(*pair), _one_question_gate(runs, *pair), answered_gate(speed)]
    found += [_tasks_gate([quality], names, speed), *same_answers_gates(runs, quality, speed, timed)]
    return [f"{gate.name}: {gate.detail}" for gate in found if gate.outcome == "failed"]


def outcomes(found: Iterable[Gate]) -> list[Outcome]:
    """What gates of a joint claim make of it: nothing where they passed."""
    said: list[Outcome] = []
    for gate in found:
        if gate.outcome == "failed":
            said.append("NOT_MEASURED" if gate.name in OF_ONE_POINT else "INVALID")
        if gate.outcome == "not_checked" and gate.name == EFFECT:
            said.append("INCONCLUSIVE")
    return said


def _one_point_gate(one: tuple[str, QualityPoint | SpeedPoint], other: tuple[str, QualityPoint | SpeedPoint]) -> Gate:
    """Two parts have one checkpoint, dtype, decoder and kind of device, in both arms."""
    unlike = [_unlike_text(found, (one[0], other[0])) for found in unlike_settings(one[1], other[1])]
    return _one_thing(unlike, "checkpoint, dtype, decoder and device are the same in both arms", one[1], other[1])


def _one_question_gate(runs: Sequence[Run], quality: tuple[str, QualityPoint], speed: tuple[str, SpeedPoint]) -> Gate:
    """Quality and speed are of one budget and of one set of prompts."""
    names, budgets = (quality[0], speed[0]), unlike_budgets(runs, quality[1], speed[1])
    unlike = [
        _unlike_text(Unlike(setting=f"the budget of {task}", values=pair), names) for task, pair in budgets.items()
    ]
    unlike += [
        f"{one.arm}: {len(one.other_prompts)} documents were timed on other prompts than they were scored on, the "
        f"first of them {_prompt_text(one.other_prompts[0])}"
        for one in timed_as_scored(runs, quality[1], speed[1])
        if one.other_prompts
    ]
    return _one_thing(unlike, "budgets and prompts are the same", quality[1], speed[1])


def _one_thing(unlike: Sequence[str], passed: str, *points: QualityPoint | SpeedPoint) -> Gate:
    run_ids = (run_id for point in points for run_id in _run_ids(point))
    detail = "; ".join(dict.fromkeys(unlike)) or passed
    return Gate(
        name=ONE_THING, outcome="failed" if unlike else "passed", detail=detail, evidence=tuple(dict.fromkeys(run_ids))
    )


def _run_ids(point: QualityPoint | SpeedPoint) -> tuple[str, ...]:
    return (point.run_id,) if isinstance(point, QualityPoint) else point.run_ids


def same_tasks_gate(claim: Claim, qualities: Sequence[QualityPoint], scope: Sequence[str], speed: SpeedPoint) -> Gate:
    """The timed tasks are those in scope that are generated, or those that the claim's point names."""
    if claim.point.timed_tasks:
        return Gate(name=SAME_TASKS, outcome="passed", detail="timed as the point says", evidence=speed.run_ids)
    return _tasks_gate(qualities, scope, speed)


def _tasks_gate(qualities: Sequence[QualityPoint], scope: Sequence[str], speed: SpeedPoint) -> Gate:
    found, name = tasks_against(speed.tasks, qualities, scope), SAME_TASKS
    if not found.timed:
        detail = "the run does not say of which tasks its timed prompts are"
        return Gate(name=name, outcome="not_checked", detail=detail, evidence=speed.run_ids)
    wrong = [f"timed were also {', '.join(found.beyond)}, outside the claimed quality"] if found.beyond else []
    wrong += [f"not timed: {', '.join(found.untimed)}"] if found.untimed else []
    if not wrong:
        detail = "the timed tasks are those of the claimed quality"
        return Gate(name=name, outcome="passed", detail=detail, evidence=speed.run_ids)
    detail = f"{'; '.join(wrong)}: time the tasks in scope, or name those of the speed in the point (timed_tasks)"
    return Gate(name=name, outcome="failed", detail=detail, evidence=speed.run_ids)


def answered_gate(speed: SpeedPoint) -> Gate:
    """A fixed workload goes on past the end of every answer: it says nothing of answers."""
    fixed = speed.workload == "fixed"
    detail = "outputs of the fixed workload are no answers: time the answer workload" if fixed else "answers were timed"
    return Gate(name=ANSWERED, outcome="failed" if fixed else "passed", detail=detail, evidence=speed.run_ids)


def same_prompts_gates(runs: Sequence[Run], point: QualityPoint | SpeedPoint) -> list[Gate]:
    """Arms of one tokenizer that read some prompts as other tokens; nothing where they do not."""
    found = unlike_prompts(runs, point)
    if not found:
        return []
    shown = "; ".join(_length_text(one, ("in the baseline", "in the candidate")) for one in found[:SHOWN])
    detail = f"{len(found)} prompts are not the same tokens in both arms: {shown}"
    return [Gate(name=SAME_PROMPTS, outcome="failed", detail=detail, evidence=_run_ids(point))]


# Words


def _unlike_text(unlike: Unlike, names: tuple[str, str]) -> str:
    whose = f"{unlike.arm}: " if unlike.arm else ""
    one, other = (_value_text(value) for value in unlike.values)
    return f"{whose}{unlike.setting} {one} in {names[0]}, {other} in {names[1]}"


def _value_text(value: object) -> str:
    text = "none" if value is None else f"{value}"
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:8] if is_digest else text


def _agree_text(one: Agreement, what: str) -> str:
    if not one.differing:
        return f"{one.arm}: {one.num_compared:,} {what}, all alike"
    return _differ_text(one)


def _differ_text(one: Agreement) -> str:
    shown = "; ".join(_place_text(differing) for differing in one.differing[:SHOWN])
    more = f" and {len(one.differing) - SHOWN} more" if len(one.differing) > SHOWN else ""
    percent = 100 * one.share
    share = f"{percent:.1f}" if percent < 10 else f"{percent:.0f}"
    count = f"{len(one.differing)} of {one.num_compared:,} answers ({share} %)"
    return f"{one.arm}: {count} differ in {one.dtype} at temperature 0: {shown}{more}"


def _place_text(one: Differing) -> str:
    if one.same_tokens:
        return f"{_prompt_text(one.prompt_id)} in its passes"
    return _prompt_text(one.prompt_id) + ("" if one.position is None else f" from token {one.position + 1} on")


def _work_text(one: Agreement) -> str:
    share = f"{100 * (one.work or 0):.3g} %"
    return f"{one.arm}: timed answers took {share} of the passes that the same answers took when they were scored"


def _length_text(one: OtherLength, whose: tuple[str, str] = ("scored", "timed")) -> str:
    return f"{_prompt_text(one.prompt_id)} ({one.num_tokens[0]} tokens {whose[0]}, {one.num_tokens[1]} {whose[1]})"


def _prompt_text(prompt_id: str) -> str:
    task, _, number = prompt_id.rpartition("/")
    return f"task {task}, document {number}" if task and number.isdigit() else f"prompt {prompt_id}"
