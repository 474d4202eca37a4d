"""The rule of one claim: gates, readings and what they rest on -> an outcome with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from twotower_eval.analyse import stats
from twotower_eval.analyse.claims import joint_gates
from twotower_eval.analyse.claims.files import SPEED_QUANTITIES
from twotower_eval.analyse.claims.looks import Looks
from twotower_eval.analyse.claims.reasons import decision_text, look_text, unit_of
from twotower_eval.analyse.compare import Measured, SpeedPoint, gates
from twotower_eval.analyse.words import found_text, gate_text
from twotower_eval.analyse.words.methods import EQUAL
from twotower_eval.errors import UserError
from twotower_eval.records import Claim, Estimate, Gate, Outcome, VerdictScope

DECIDED = ("SUPPORTED", "REFUTED")
LENGTHS = "; a `run` on all documents of the timed tasks tells how long the other answers are, and narrows the interval"


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What an estimate rests on: clusters, or rounds (``unit`` says if they are launches) and calls of each.

    ``num_calls`` is ``None`` where the prompts are no sample. ``by_construction``: one computation scored both arms.
    ``num_launches`` are those that a speedup was timed in, ``scope`` the launches that it is confined to.
    ``metric`` is the score outside retention that it is of, if it is of one. ``lacks_lengths``: how long the answers to
    the prompts are that were not timed is not known, and a run would tell.
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
    """What a speedup rests on."""
    calls, num_launches = None if point.timed.fixed else point.num_calls, point.num_launches
    known = point.timed.documents is not None and point.timed.documents.whole
    amount = Amount(
        unit="launches",
        num_rounds=num_launches,
        num_calls=calls,
        num_launches=num_launches,
        # A batch lasts as long as its longest answer, of which the documents' lengths do not tell.
        lacks_lengths=calls is not None and not known and point.batch_size == 1,
    )
    if stats.resamples_launches(point.timed.launches):
        return amount
    scope: VerdictScope = "in this launch" if num_launches == 1 else "in these launches"
    return replace(amount, unit="rounds", num_rounds=point.num_rounds, scope=scope)


def outcome_of(claim: Claim, reading: Measured, amount: Amount) -> Outcome:
    """What a look comes to by itself, whatever its gates say."""
    return "INCONCLUSIVE" if reading.estimate is None else _decided(claim, reading.estimate, amount)[0]


def doubt(outcome: Outcome, run_ids: Sequence[str], looks: Looks, others: Mapping[str, Outcome]) -> str | None:
    """Why looking again leaves a decision open: another look comes to another one, or no error rate is left."""
    opposed = [f"{name} is {other}" for name, other in others.items() if other in DECIDED and other != outcome]
    if opposed:
        return f"the looks contradict each other: {', '.join(run_ids)} is {outcome}, {'; '.join(opposed)}"
    if looks.alpha is None:
        looked = look_text(looks.num, looks.declared)
        return f"too many looks ({looked}): no error rate is left, so nothing can be decided"
    return None


def ruled(claim: Claim, checks: Sequence[Gate], readings: Sequence[Measured], amount: Amount) -> tuple[Outcome, str]:
    """What gates and readings come to, and why. Several readings must all clear; the first is the claim's own."""
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
        reason = f"{reason}, {joint_gates.FORWARDS_ONLY}"
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
    """The pure rule; INCONCLUSIVE says how much evidence would decide."""
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
    said_of_it = decision_text(unit_of(claim.quantity, amount.metric), decision)
    blind = amount.num_rounds is not None and stats.too_few_rounds(estimate, amount.num_rounds)
    if decision.outcome != "INCONCLUSIVE" or blind:
        return decision.outcome, said_of_it
    needed = stats.still_needed(
        estimate,
        relation=relation,
        expected=expected,
        margin=margin,
        n=amount.num_rounds,
        log_scale=is_speed,
        least_n=stats.MIN_ROUNDS if is_speed else stats.MIN_CLUSTERS,
    )
    return "INCONCLUSIVE", f"{said_of_it}{_needed_text(needed, amount)}"


def _decided_by_construction(value: float, least: float | None, largest: float | None) -> tuple[Outcome, str]:
    """No sample and no bound: the value is known, and the claim holds at its limits as well."""
    holds = (least is None or value >= least) and (largest is None or value <= largest)
    return "SUPPORTED" if holds else "REFUTED", EQUAL


def _needed_text(needed: stats.Needed, amount: Amount) -> str:
    """What would decide, behind the reason why nothing is decided; nothing where that reason has said it all."""
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
