"""The rule of one claim: gates and readings -> an outcome with its reason. Also what has to hold between quality and
speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from twotower_eval.analyse import stats
from twotower_eval.analyse.claims.looks import Looks
from twotower_eval.analyse.claims.terms import SPEED_QUANTITIES
from twotower_eval.analyse.compare import Measured, QualityPoint, SpeedPoint, gates
from twotower_eval.analyse.compare.answers import timed_as_scored
from twotower_eval.analyse.compare.fairness import tasks_against, unlike_budgets, unlike_settings
from twotower_eval.analyse.compare.figures import OWN, PERCENT, POINTS, TIMES, Unit, compared
from twotower_eval.analyse.compare.gate_facts import AnswersTimed, OneThing, SameTasks
from twotower_eval.analyse.compare.same import run_ids_of, same_answers_gates
from twotower_eval.analyse.words import fact_text, found_text, gate_text
from twotower_eval.analyse.words.facts import EQUAL
from twotower_eval.errors import UserError
from twotower_eval.records import (
    CheckOutcome,
    Claim,
    Estimate,
    Gate,
    GateKind,
    GateLimits,
    Outcome,
    Quantity,
    VerdictScope,
)
from twotower_eval.store import Run

UNITS: Mapping[Quantity, Unit] = {
    "retention": PERCENT,
    "decoder_exercised_retention": PERCENT,
    "score": PERCENT,
    "score_difference": POINTS,
    "speedup_time": TIMES,
    "speedup_throughput": TIMES,
    "speedup_time_per_device": TIMES,
}


def unit_of(quantity: Quantity, metric: str | None = None) -> Unit:
    """The unit of a quantity; a score outside retention has the unit of its ``metric``."""
    return UNITS[quantity] if metric is None else OWN


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def look_text(num: int, declared: int | None = None) -> str:
    """``second look, one was declared``, or ``second look`` where ``declared`` is ``None``."""
    shown = f"{ORDINALS[num - 1]} look" if 1 <= num <= len(ORDINALS) else f"look {num}"
    if declared is None:
        return shown
    return f"{shown}, {'one was' if declared == 1 else f'{declared} were'} declared"


def decision_text(unit: Unit, decision: stats.Decision) -> str:
    """``the upper bound 90.1 % is below 98.2 %``, or what there is too little of."""
    if decision.few is not None:
        return fact_text(decision.few)
    return " and ".join(_comparison(unit, one) for one in decision.comparisons)


def _comparison(unit: Unit, found: stats.Comparison) -> str:
    bound, limit = compared(unit, found.value, found.limit)
    falls_short = "does not clear" if found.bound == "lower" else "does not stay below"
    how = falls_short if found.stands == "open" else f"is {found.stands}"
    return f"the {found.bound} bound {bound} {how} {limit}"


OF_ONE_POINT: tuple[GateKind, ...] = ("one_thing", "same_tasks")  # without: the parts were not measured at one point
FORWARDS_ONLY = "on the fixed workload: a claim about forwards, not about answers"


def between(claim: Claim, runs: Sequence[Run], parts: Sequence[tuple[Claim, QualityPoint | SpeedPoint]]) -> list[Gate]:
    """The gates between the measured parts of a joint claim."""
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
    """The failed gates between a quality and a speed that a report shows side by side; empty if they fit together.

    ``scope`` names the tasks of the quality; by default, all of them.
    """
    names = scope or [task.name for task in quality.tasks]
    pair, timed = (("quality", quality), ("speed", speed)), GateLimits()
    found = [_one_point_gate(*pair), _one_question_gate(runs, *pair), answered_gate(speed)]
    found += [_tasks_gate([quality], names, speed), *same_answers_gates(runs, quality, speed, timed)]
    return [gate for gate in found if gate.outcome == "failed"]


def outcomes(found: Iterable[Gate]) -> list[Outcome]:
    """The outcomes that failed or open gates of a joint claim lead to; none where all passed."""
    outcomes_found: list[Outcome] = []
    for gate in found:
        if gate.outcome == "failed":
            outcomes_found.append("NOT_MEASURED" if gate.kind in OF_ONE_POINT else "INVALID")
        if gate.outcome == "not_checked" and gate.kind == "effect_on_scores":
            outcomes_found.append("INCONCLUSIVE")
    return outcomes_found


def _one_point_gate(one: tuple[str, QualityPoint | SpeedPoint], other: tuple[str, QualityPoint | SpeedPoint]) -> Gate:
    """Whether two parts share checkpoint, dtype, decoder and device type, in both arms."""
    facts = OneThing(of="settings", parts=(one[0], other[0]), unlike=unlike_settings(one[1], other[1]))
    return _one_thing(facts, one[1], other[1])


def _one_question_gate(runs: Sequence[Run], quality: tuple[str, QualityPoint], speed: tuple[str, SpeedPoint]) -> Gate:
    """Whether quality and speed share their budget and their prompts."""
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
    """Whether the timed tasks are those of the scope that are generated, or those that the claim's point names."""
    if claim.point.timed_tasks:
        return Gate(kind="same_tasks", outcome="passed", facts=SameTasks(tasks=None), evidence=speed.run_ids)
    return _tasks_gate(qualities, scope, speed)


def _tasks_gate(qualities: Sequence[QualityPoint], scope: Sequence[str], speed: SpeedPoint) -> Gate:
    found = tasks_against(speed.tasks, qualities, scope)
    wrong = found.timed and (found.beyond or found.untimed)
    outcome: CheckOutcome = "failed" if wrong else "passed" if found.timed else "not_checked"
    return Gate(kind="same_tasks", outcome=outcome, facts=SameTasks(tasks=found), evidence=speed.run_ids)


def answered_gate(speed: SpeedPoint) -> Gate:
    """Whether answers were timed: the fixed workload decodes past the end of every answer."""
    facts = AnswersTimed(answers=speed.workload != "fixed")
    outcome: CheckOutcome = "passed" if facts.answers else "failed"
    return Gate(kind="answers_are_timed", outcome=outcome, facts=facts, evidence=speed.run_ids)


DECIDED = ("SUPPORTED", "REFUTED")
LENGTHS = (
    "; a `run` on all documents of the timed tasks measures the lengths of the other answers and narrows the interval"
)


@dataclass(frozen=True, kw_only=True)
class Amount:
    """The amount of evidence behind an estimate: clusters, or rounds (``unit`` says if they are launches) and calls.

    ``num_calls`` is ``None`` where the prompts are no sample. ``by_construction``: one computation scored both arms.
    ``num_launches``: launches that a speedup was timed in. ``scope``: the launches that it holds for, ``None`` for any.
    ``metric``: the name of a score outside retention. ``lacks_lengths``: the answer lengths of prompts that were not
    timed are unknown, and a ``run`` would measure them.
    """

    unit: str
    num_clusters: int | None = None
    num_rounds: int | None = None
    num_calls: int | None = None
    by_construction: bool = False
    metric: str | None = None
    num_launches: int | None = None
    scope: VerdictScope | None = None
    lacks_lengths: bool = False


def timed_amount(point: SpeedPoint) -> Amount:
    """The rounds, launches and calls behind a speedup."""
    calls, num_launches = None if point.timed.fixed else point.num_calls, point.num_launches
    known = point.timed.documents is not None and point.timed.documents.whole
    amount = Amount(
        unit="launches",
        num_rounds=num_launches,
        num_calls=calls,
        num_launches=num_launches,
        # A batch lasts as long as its longest answer, which lengths of single documents do not give.
        lacks_lengths=calls is not None and not known and point.batch_size == 1,
    )
    if stats.resamples_launches(point.timed.launches):
        return amount
    scope: VerdictScope = "in this launch" if num_launches == 1 else "in these launches"
    return replace(amount, unit="rounds", num_rounds=point.num_rounds, scope=scope)


def outcome_of(claim: Claim, reading: Measured, amount: Amount) -> Outcome:
    """The outcome of one look, without its gates."""
    return "INCONCLUSIVE" if reading.estimate is None else _decided(claim, reading.estimate, amount)[0]


def doubt(outcome: Outcome, run_ids: Sequence[str], looks: Looks, others: Mapping[str, Outcome]) -> str | None:
    """Why further looks leave a decision open: one of them decides otherwise, or no error rate is left."""
    opposed = [f"{name} is {other}" for name, other in others.items() if other in DECIDED and other != outcome]
    if opposed:
        return f"the looks contradict each other: {', '.join(run_ids)} is {outcome}, {'; '.join(opposed)}"
    if looks.alpha is None:
        looked = look_text(looks.num, looks.declared)
        return f"too many looks ({looked}): no error rate is left to decide with"
    return None


def ruled(claim: Claim, checks: Sequence[Gate], readings: Sequence[Measured], amount: Amount) -> tuple[Outcome, str]:
    """The outcome of gates and readings, with its reason. All readings must clear; the first is the claim's own."""
    failed = [gate for gate in checks if gate.outcome == "failed"]
    if failed:
        return "INVALID", "; ".join(map(gate_text, failed))
    decided: list[tuple[Outcome, str]] = []
    for reading in readings:
        if reading.estimate is None:
            decided.append(("INCONCLUSIVE", str(reading.reason)))
            continue
        decided.append(_decided(claim, reading.estimate, amount))
    outcome, reason = decided[0]
    if outcome in DECIDED and claim.quantity in SPEED_QUANTITIES and claim.point.workload == "fixed":
        reason = f"{reason}, {FORWARDS_ONLY}"
    if outcome != "SUPPORTED":
        return outcome, reason
    if len(decided) > 1 and decided[1][0] != "SUPPORTED":
        throughput_claimed = claim.quantity == "speedup_throughput"
        other = "the wall-clock speedup" if throughput_claimed else "the speedup in useful tokens per second"
        return "INCONCLUSIVE", f"the arms' outputs differ in length, so {other} has to clear too: {decided[1][1]}"
    open_gates = [gate for gate in checks if gate.outcome == "not_checked" and gate.kind in gates.NEEDED_FOR_SPEED]
    if claim.quantity in SPEED_QUANTITIES and open_gates:
        return "INCONCLUSIVE", "; ".join(map(found_text, open_gates))
    return outcome, reason


def _decided(claim: Claim, estimate: Estimate, amount: Amount) -> tuple[Outcome, str]:
    """The outcome by ``stats.decide``; the reason of INCONCLUSIVE says how much evidence would decide."""
    if claim.expected is None or claim.margin is None:
        raise UserError(f"claim {claim.name!r} has no expected value with its margin")
    is_speed = claim.quantity in SPEED_QUANTITIES
    relation, expected = claim.relation, claim.expected
    margin = claim.margin * expected if is_speed else claim.margin
    if amount.by_construction:
        return _decided_by_construction(estimate.value, *stats.limits(relation, expected, margin))
    decision = stats.decide(
        estimate,
        relation=relation,
        expected=expected,
        margin=margin,
        num_clusters=amount.num_clusters,
        num_rounds=amount.num_rounds,
        num_calls=amount.num_calls,
        level=estimate.level,
    )
    reason = decision_text(unit_of(claim.quantity, amount.metric), decision)
    blind = amount.num_rounds is not None and stats.too_few_rounds(estimate, amount.num_rounds)
    if decision.outcome != "INCONCLUSIVE" or blind:
        return decision.outcome, reason
    needed = stats.still_needed(
        estimate,
        relation=relation,
        expected=expected,
        margin=margin,
        n=amount.num_rounds,
        log_scale=is_speed,
        least_n=stats.MIN_ROUNDS if is_speed else stats.MIN_CLUSTERS,
    )
    return "INCONCLUSIVE", f"{reason}{_needed_text(needed, amount)}"


def _decided_by_construction(value: float, least: float | None, largest: float | None) -> tuple[Outcome, str]:
    """The outcome of a value that is known exactly; a claim holds at its limits as well."""
    holds = (least is None or value >= least) and (largest is None or value <= largest)
    return "SUPPORTED" if holds else "REFUTED", EQUAL


def _needed_text(needed: stats.Needed, amount: Amount) -> str:
    """``; about 900 clusters would decide, 250 were measured``; empty where nothing more would help."""
    if needed.decided:
        return ""
    return _more_text(needed, amount) + (LENGTHS if amount.lacks_lengths else "")


def _more_text(needed: stats.Needed, amount: Amount) -> str:
    if needed.more is None or needed.total is None:
        return f"; {needed.reason}"
    there = needed.total - needed.more
    if amount.num_calls is None:
        return f"; about {needed.total:,} {amount.unit} would decide, {there:,} were measured"
    factor = f"{needed.total / there:.1f}"
    return f"; about {factor} times the {there:,} {amount.unit}, each on {factor} times the prompts, would decide"
