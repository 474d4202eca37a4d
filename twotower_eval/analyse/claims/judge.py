"""Claims and evidence -> verdicts (docs/trust.md).

A failed gate makes a claim INVALID; without data at its own operating point it is NOT_MEASURED. Else ``stats.decide``
decides, on one-sided bounds at the level that ``looks`` leave: 95 % at the first look. Where a point was measured
several times, one run is judged; if another run decides otherwise, the claim is INCONCLUSIVE. What cannot be computed
is INCONCLUSIVE: an error is never a yes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twotower_eval.analyse import stats
from twotower_eval.analyse.claims import ruling
from twotower_eval.analyse.claims.files import select
from twotower_eval.analyse.claims.looks import Looks, looks_at_quality, looks_at_speed, missing, missing_quality
from twotower_eval.analyse.claims.match import (
    Evidence,
    at_stake,
    differing_at,
    gather,
    has_subject,
    is_equal_by_construction,
    kept_at,
    kept_of,
    measured_points,
    own_score,
    quality_at,
    quality_estimate,
    runs_for,
    same_point,
    speed_at,
    speed_readings,
    standings,
)
from twotower_eval.analyse.claims.ruling import DECIDED, Amount, doubt, outcome_of, ruled, timed_amount
from twotower_eval.analyse.claims.terms import SPEED_QUANTITIES
from twotower_eval.analyse.compare import Measured, QualityPoint, Runs, SpeedPoint, gates
from twotower_eval.analyse.compare.figures import measured
from twotower_eval.analyse.compare.gates import speed_gates
from twotower_eval.analyse.compare.same import run_ids_of, same_prompts_gates
from twotower_eval.analyse.compare.several import PLAIN, baseline_name, baselines_of, strongest
from twotower_eval.analyse.compare.witness import scored_witness_gates
from twotower_eval.analyse.words import gate_text
from twotower_eval.records import AgainstBaseline, Claim, Gate, Outcome, Verdict, VerdictScope
from twotower_eval.rules import unlike_settings
from twotower_eval.store import Run

EXIT_CODES: Mapping[Outcome, int] = {
    "REFUTED": 3,
    "INVALID": 5,
    "INCONCLUSIVE": 4,
    "NOT_MEASURED": 6,
    "SUPPORTED": 0,
}  # in the order in which several outcomes make one


def judge(claims: Sequence[Claim], runs: Sequence[Run], names: Sequence[str] = ()) -> tuple[Verdict, ...]:
    """A verdict for each named claim, or for all without names, in the file's order."""
    together = runs if isinstance(runs, Runs) else Runs(runs)
    wanted = select(claims, names)
    needed = {claim.name for claim in wanted} | {part for claim in wanted for part in claim.parts}
    known: dict[int, Evidence] = {}

    def evidence(claim: Claim) -> Evidence:
        seen = runs_for(claim, together)
        if id(seen) not in known:
            known[id(seen)] = gather(seen)
        return known[id(seen)]

    single = {
        claim.name: _judge_one(claim, evidence(claim))
        for claim in claims
        if claim.name in needed and claim.quantity != "joint"
    }
    judged = [
        single.get(claim.name) or _joined(claim, [single[part] for part in claim.parts], evidence(claim))
        for claim in wanted
    ]
    return tuple(_against(found, together).verdict for found in judged)


def _against(judged: _Judged, runs: Runs) -> _Judged:
    """The verdict with the baseline that it is against, where a run has several or it is not decoded plainly."""
    point = judged.point
    if point is None or (point.baseline.baseline is None and point.baseline.decoder.kind == PLAIN):
        return judged
    own = [run for run in runs.whole if run.manifest.run_id in run_ids_of(point)]
    each = runs.each_baseline(point.key, point if isinstance(point, SpeedPoint) else None)
    best = strongest(each)
    other = best if best is not None and best.name != point.baseline.baseline else None
    against = AgainstBaseline(
        name=baseline_name(point.baseline),
        decoder=point.baseline.decoder.label,
        num_baselines=max(1, len({name for run in own for name in baselines_of(run)})),
        strongest=None if other is None else other.name,
        speedup=None if other is None or other.speed is None else other.speed.time.estimate,
    )
    return dataclasses.replace(judged, verdict=dataclasses.replace(judged.verdict, against=against))


def first_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of several together, in the order of EXIT_CODES; of none it is NOT_MEASURED, never SUPPORTED."""
    return next((outcome for outcome in EXIT_CODES if outcome in outcomes), "NOT_MEASURED")


def exit_code(verdicts: Sequence[Verdict], *, strict: bool = False) -> int:
    """The exit code of the first outcome present: refuted, invalid, inconclusive, not measured, supported.

    ``strict`` counts as inconclusive what is SUPPORTED only in the timed launches, or while runs of the same point in
    the results folder were left out.
    """
    return EXIT_CODES[first_outcome([_counted(verdict, strict) for verdict in verdicts])]


def _counted(verdict: Verdict, strict: bool) -> Outcome:
    lacks = verdict.scope is not None or bool(verdict.not_given)
    return "INCONCLUSIVE" if strict and verdict.outcome == "SUPPORTED" and lacks else verdict.outcome


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A verdict on a claim and the point that it was measured at; ``None`` where there is none."""

    claim: Claim
    verdict: Verdict
    point: QualityPoint | SpeedPoint | None


def _judge_one(claim: Claim, evidence: Evidence) -> _Judged:
    judge_it = _judge_speed if claim.quantity in SPEED_QUANTITIES else _judge_quality
    judged = _unless_contradicting(judge_it(claim, evidence), claim, evidence)
    return dataclasses.replace(
        judged, verdict=dataclasses.replace(judged.verdict, num_points=measured_points(claim, evidence))
    )


def _unless_contradicting(judged: _Judged, claim: Claim, evidence: Evidence) -> _Judged:
    """The verdict, INVALID where files of a run that it rests on contradict each other.

    A claim that was not measured rests on no run. Then every run of its model counts: its point may have been edited.
    """
    verdict = judged.verdict
    run_ids = verdict.evidence or [run.manifest.run_id for run in evidence.runs if has_subject(claim, run)]
    if not run_ids or any(gate.kind == "files_agree" for gate in verdict.gates):
        return judged
    gate = gates.files_agree_gate(evidence.contradictions, run_ids, evidence.runs)
    verdict = dataclasses.replace(verdict, gates=(gate, *verdict.gates))
    if gate.outcome == "failed":
        before = f"; {verdict.reason}" if verdict.outcome == "INVALID" else ""
        reason = f"{gate_text(gate)}{before}"
        shown = tuple(sorted({*verdict.evidence, *gate.evidence}))
        verdict = dataclasses.replace(verdict, outcome="INVALID", reason=reason, evidence=shown, scope=None)
    return dataclasses.replace(judged, verdict=verdict)


def _judge_quality(claim: Claim, evidence: Evidence) -> _Judged:
    found, differing = quality_at(claim, evidence), differing_at(claim, evidence, "run")
    if differing and (not found or max(differing) > max(point.run_id for point in found)):
        return _invalid_inputs(claim, differing)
    if not found:
        return _not_measured(claim, missing_quality(claim, evidence))
    point = found[0]
    own = own_score(claim, point)
    stand = standings(claim, point)
    checks = (
        gates.complete_gate(point),
        gates.same_inputs_gate({}, (point.run_id,)),
        gates.scored_gate(point, claim.scope, own),
        *([gates.above_chance_gate(stand, point.run_id)] if stand else ()),
        gates.whole_prompts_gate(evidence.runs, point, (point.run_id,), claim.scope),
        *same_prompts_gates(evidence.runs, point),
        *scored_witness_gates(evidence.runs, point, claim.limits),
        gates.verify_gate(evidence.runs, point.candidate.checkpoint.identity),
    )
    looks, others = looks_at_quality(claim, evidence, found)
    estimated, amount = _quality_reading(claim, point, looks)
    outcomes = {other.run_id: outcome_of(claim, *_quality_reading(claim, other, looks)) for other in others}
    judged = _ruled(claim, point, (point.run_id,), looks, checks, [estimated], amount, outcomes)
    kept = kept_of(claim, point, estimated.estimate)
    return _warned(_beside_chance(judged, claim, point, stand, looks), point, kept)


def _quality_reading(claim: Claim, point: QualityPoint, looks: Looks) -> tuple[Measured, Amount]:
    """A claim's quantity at a point, and the amount of evidence behind it."""
    own = own_score(claim, point)
    estimated = measured(lambda: quality_estimate(claim, point, own, level=looks.level))
    amount = Amount(
        unit="clusters",
        num_clusters=None if estimated.estimate is None else estimated.estimate.n,
        by_construction=is_equal_by_construction(claim, point, own),
        metric=None if own is None else own.metric,
    )
    return estimated, amount


def _beside_chance(
    judged: _Judged, claim: Claim, point: QualityPoint, stand: Sequence[stats.Standing], looks: Looks
) -> _Judged:
    """The verdict with the tasks whose baseline is not clearly above chance, and what is measured without them."""
    near, clear = ([one.task for one in stand if one.is_clear == is_clear] for is_clear in (False, True))
    if not near:
        return judged
    rest = dataclasses.replace(claim, scope=tuple(clear))
    found = measured(lambda: quality_estimate(rest, point, level=looks.level)) if clear else None
    verdict = dataclasses.replace(
        judged.verdict, near_chance=tuple(near), above_chance=found.estimate if found else None
    )
    return dataclasses.replace(judged, verdict=verdict)


def _judge_speed(claim: Claim, evidence: Evidence) -> _Judged:
    found, differing = speed_at(claim, evidence), differing_at(claim, evidence, "speed")
    if differing and (not found or max(differing) > max(found[0].run_ids)):
        return _invalid_inputs(claim, differing)
    if not found:
        return _not_measured(claim, missing(claim, evidence.speed, evidence.alone))
    point = found[0]
    quality = same_point(evidence.quality, point.key)
    looks, others = looks_at_speed(claim, evidence, found)
    readings = speed_readings(claim, point, level=looks.level)
    first = readings[0].estimate
    judged, claimed = (None, None) if first is None else at_stake(claim, point, first)
    checks = speed_gates(
        point,
        evidence.runs,
        claim.limits,
        quality=evidence.quality,
        speed=evidence.speed,
        contradictions=evidence.contradictions,
        judged=judged,
        claimed=claimed,
    )
    outcomes = {
        ", ".join(other.run_ids): outcome_of(
            claim, speed_readings(claim, other, level=looks.level)[0], timed_amount(other)
        )
        for other in others
    }
    verdict = _ruled(claim, point, point.run_ids, looks, checks, readings, timed_amount(point), outcomes)
    return _warned(verdict, point, max((kept_at(one) for one in quality), default=0.0))


def _warned(judged: _Judged, point: QualityPoint | SpeedPoint, kept: float | None) -> _Judged:
    """The verdict with its retention noted where that is above the claim's ``warn_retention``, and with what the arms
    differ in besides model and decoder."""
    unlike = unlike_settings(point.baseline.checkpoint, point.candidate.checkpoint)
    if kept is None or kept <= judged.claim.limits.warn_retention:
        kept = None
    verdict = dataclasses.replace(judged.verdict, high_retention=kept, unlike_arms=unlike)
    return dataclasses.replace(judged, verdict=verdict)


def _ruled(
    claim: Claim,
    point: QualityPoint | SpeedPoint,
    run_ids: tuple[str, ...],
    looks: Looks,
    checks: tuple[Gate, ...],
    readings: Sequence[Measured],
    amount: Amount,
    others: Mapping[str, Outcome],
) -> _Judged:
    """The verdict of gates and readings. All readings must clear; the first one is the claim's own.

    ``others`` are the outcomes of further looks at the point, by run id.
    """
    outcome, reason = ruled(claim, checks, readings, amount)
    if outcome in DECIDED and not amount.by_construction and (why := doubt(outcome, run_ids, looks, others)):
        outcome, reason = "INCONCLUSIVE", why
    evidence = sorted({*run_ids, *(run_id for gate in checks for run_id in gate.evidence)})
    verdict = Verdict(
        claim=claim.name,
        outcome=outcome,
        estimate=readings[0].estimate,
        reason=reason,
        evidence=tuple(evidence),
        gates=checks,
        num_looks=looks.num,
        metric=amount.metric,
        num_launches=amount.num_launches,
        level=(1 + looks.level) / 2,
        not_given=looks.not_given,
        scope=amount.scope if outcome in DECIDED else None,
    )
    return _Judged(claim=claim, verdict=verdict, point=point)


def _invalid_inputs(claim: Claim, differing: dict[str, str]) -> _Judged:
    gate = gates.same_inputs_gate(differing, ())
    verdict = Verdict(
        claim=claim.name,
        outcome="INVALID",
        estimate=None,
        reason=gate_text(gate),
        evidence=gate.evidence,
        gates=(gate,),
        num_looks=len(differing),
    )
    return _Judged(claim=claim, verdict=verdict, point=None)


def _not_measured(claim: Claim, reason: str) -> _Judged:
    verdict = Verdict(claim=claim.name, outcome="NOT_MEASURED", estimate=None, reason=reason, evidence=())
    return _Judged(claim=claim, verdict=verdict, point=None)


def _joined(claim: Claim, parts: Sequence[_Judged], evidence: Evidence) -> _Judged:
    """A joint claim: SUPPORTED only if every part is, and if all parts are of one setting and one set of prompts."""
    verdicts = [part.verdict for part in parts]
    measured_parts = [(part.claim, part.point) for part in parts if part.point is not None]
    between = ruling.between(claim, evidence.runs, measured_parts)
    named = {gate.kind for gate in between}
    outcome = first_outcome([*(verdict.outcome for verdict in verdicts), *ruling.outcomes(between)])
    reasons = [f"{verdict.claim} {outcome_text(verdict)}" for verdict in verdicts]
    reasons += [gate_text(gate) for gate in between if ruling.outcomes([gate])]
    own = (gate for one in verdicts for gate in one.gates if gate.outcome != "passed" and gate.kind not in named)
    verdict = Verdict(
        claim=claim.name,
        outcome=outcome,
        estimate=None,
        reason="; ".join(reasons),
        evidence=tuple(sorted({run_id for one in verdicts for run_id in one.evidence})),
        gates=(*own, *between),
        num_points=max((one.num_points for one in verdicts), default=0),
        num_looks=max((one.num_looks for one in verdicts), default=0),
        level=max((one.level for one in verdicts), default=0.95),
        not_given=tuple(dict.fromkeys(run_id for one in verdicts for run_id in one.not_given)),
        near_chance=tuple(dict.fromkeys(task for one in verdicts for task in one.near_chance)),
        num_launches=next((one.num_launches for one in verdicts if one.num_launches is not None), None),
        scope=_joint_scope(outcome, verdicts),
        high_retention=max((one.high_retention for one in verdicts if one.high_retention is not None), default=None),
        unlike_arms=tuple(dict.fromkeys(found for one in verdicts for found in one.unlike_arms)),
    )
    return _Judged(claim=claim, verdict=verdict, point=next((part.point for part in parts), None))


def _joint_scope(outcome: Outcome, verdicts: Sequence[Verdict]) -> VerdictScope | None:
    """The scope of the speed part; none where another part alone refutes the claim."""
    scopes = [one.scope for one in verdicts if one.outcome == outcome]
    refuted_without = outcome == "REFUTED" and None in scopes
    return None if refuted_without else next((scope for scope in scopes if scope), None)


def outcome_text(verdict: Verdict) -> str:
    """``NOT MEASURED``, ``SUPPORTED in this launch``: the outcome as it is printed, with its scope."""
    return " ".join([verdict.outcome.replace("_", " "), *([verdict.scope] if verdict.scope else [])])
