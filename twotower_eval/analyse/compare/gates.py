"""The gates: what has to hold before a number counts as evidence. A failed gate makes a claim INVALID; reports mark
figures by the same gates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare import fairness
from twotower_eval.analyse.compare.clean import Flagged
from twotower_eval.analyse.compare.contradiction import Contradiction, tells_digests
from twotower_eval.analyse.compare.documents import truncated_at
from twotower_eval.analyse.compare.fairness import busy_faults, busy_of, caution
from twotower_eval.analyse.compare.figures import Measured, measured
from twotower_eval.analyse.compare.gate_facts import (
    AboveChance,
    AllScored,
    BaselineLag,
    BusyArms,
    DegenerateOutputs,
    FilesAgree,
    Handicaps,
    KeptUp,
    Null,
    OwnGenerate,
    PossibleTimes,
    Probes,
    QualityFloor,
    RunComplete,
    SameInputs,
    Stand,
    Unexplained,
    Verified,
    WholePrompts,
)
from twotower_eval.analyse.compare.points import MissingScore, OtherScore, QualityPoint
from twotower_eval.analyse.compare.residual import faults, is_held_up
from twotower_eval.analyse.compare.same import answer_gates, run_ids_of
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.compare.witness import likeness, likeness_warning, witness_gates
from twotower_eval.analyse.stats.decide import DECISION_LEVEL
from twotower_eval.records import CheckOutcome, Estimate, Gate, GateKind, GateLimits
from twotower_eval.store import Run

NEEDED_FOR_SPEED: tuple[GateKind, ...] = ("baseline_lag", "degenerate_outputs", "answers_are_answers")
# A SUPPORTED speedup, or a joint claim with one, names those of these gates that were not checked.
NAMED_WITH_SPEED: tuple[GateKind, ...] = (
    "files_agree",
    "residual",
    "probes",
    "witnessed_answers",
    "drafts",
    "busy_arms",
    "same_rounds",
    "same_answers",
    "same_tasks",
)


def files_agree_gate(found: Mapping[str, Sequence[Contradiction]], run_ids: Sequence[str], runs: Sequence[Run]) -> Gate:
    """No file of these runs contradicts another, and no run repeats another's rows.

    Not checked for runs whose events would not show that journals were changed later.
    """
    wrong = [run_id for run_id in run_ids if run_id in found]
    if wrong:
        facts = FilesAgree(contradictions=tuple((run_id, tuple(found[run_id])) for run_id in wrong))
        return Gate(kind="files_agree", outcome="failed", facts=facts, evidence=tuple(wrong))
    older = [run.manifest.run_id for run in runs if run.manifest.run_id in run_ids and not tells_digests(run)]
    outcome: CheckOutcome = "not_checked" if older else "passed"
    facts = FilesAgree(without_digests=tuple(older))
    return Gate(kind="files_agree", outcome=outcome, facts=facts, evidence=tuple(run_ids))


def complete_gate(point: QualityPoint | SpeedPoint) -> Gate:
    """The run is complete: what is missing from an incomplete run may be missing for a reason."""
    outcome: CheckOutcome = "passed" if point.complete else "failed"
    facts = RunComplete(complete=point.complete)
    return Gate(kind="complete_run", outcome=outcome, facts=facts, evidence=run_ids_of(point))


def scored_gate(point: QualityPoint, scope: Sequence[str], own: OtherScore | WholeScore | None = None) -> Gate:
    """Every document of the scope has a score in both arms: documents without one may differ from the others.

    ``own``: the score outside retention that is judged, if any.
    """
    named = _leaves(point, scope)
    gaps = [gap for gap in point.missing if gap.task in named and (gap.headline if own is None else _is_of(gap, own))]
    gone = {(gap.task, doc) for gap in gaps for doc in gap.doc_ids}
    facts = AllScored(num_documents=len(gone))
    return Gate(kind="all_scored", outcome="failed" if gone else "passed", facts=facts, evidence=(point.run_id,))


def _is_of(gap: MissingScore, own: OtherScore | WholeScore) -> bool:
    return (gap.metric, gap.filter) == (own.metric, own.filter)


def above_chance_gate(standings: Sequence[stats.Standing], run_id: str) -> Gate:
    """The baseline is clearly above chance on at least one task: two models that guess always keep each other's
    quality.
    """
    facts = AboveChance(standings=tuple(standings))
    outcome: CheckOutcome = "failed" if len(facts.unclear) == len(standings) else "passed"
    return Gate(kind="above_chance", outcome=outcome, facts=facts, evidence=(run_id,))


def whole_prompts_gate(
    runs: Sequence[Run], point: QualityPoint | SpeedPoint, run_ids: Sequence[str], scope: Sequence[str] | None = None
) -> Gate:
    """No prompt of the scope was cut in either arm: a cut prompt is not the task any more."""
    tasks = None if scope is None or not isinstance(point, QualityPoint) else _leaves(point, scope)
    own = [run for run in runs if run.manifest.run_id in run_ids]
    found = [one for run in own for one in truncated_at(run, point.key, tasks)]
    facts = WholePrompts(cut=tuple(one for one in found if one.num_truncated), counted=bool(found))
    outcome: CheckOutcome = "failed" if facts.cut else "passed" if found else "not_checked"
    return Gate(kind="whole_prompts", outcome=outcome, facts=facts, evidence=tuple(run_ids))


def _leaves(point: QualityPoint, scope: Sequence[str]) -> set[str]:
    """The tasks of a scope, with the members of those that are groups."""
    members = {member for task in point.tasks if task.name in scope for member, *_ in task.members}
    others: list[OtherScore | WholeScore] = [*point.others, *point.wholes]
    return set(scope) | members | {member for one in others if one.task in scope for member in one.members}


def same_inputs_gate(differing: dict[str, str], run_ids: Sequence[str]) -> Gate:
    """Both arms had the same documents and prompts, by their hashes."""
    outcome: CheckOutcome = "failed" if differing else "passed"
    facts = SameInputs(differing=tuple(differing.values()))
    return Gate(kind="same_inputs", outcome=outcome, facts=facts, evidence=tuple(differing or run_ids))


def verify_gate(runs: Sequence[Run], identity: str) -> Gate:
    """What the newest ``verify`` run of the same weights, settings and tokenizer found."""
    of_it = [run for run in runs if any(cell.checkpoint.identity == identity for cell in run.manifest.cells)]
    found = [run for run in of_it if run.manifest.verb == "verify" and run.checks]
    if not found:
        return Gate(kind="verify", outcome="not_checked", facts=Verified(found=False))
    # One that was stopped takes back nothing that another found.
    telling = [run for run in found if run.complete or any(check.outcome == "failed" for check in run.checks)]
    newest = (telling or found)[-1]
    facts = Verified(
        found=True,
        complete=newest.complete,
        num_passed=sum(check.outcome == "passed" for check in newest.checks),
        unchecked=tuple(check.name for check in newest.checks if check.outcome == "not_checked"),
        failed=tuple((check.name, check.detail) for check in newest.checks if check.outcome == "failed"),
    )
    outcome: CheckOutcome = "failed" if facts.failed else "passed" if newest.complete else "not_checked"
    return Gate(kind="verify", outcome=outcome, facts=facts, evidence=(newest.manifest.run_id,))


def fastest_way_gate(point: SpeedPoint) -> Gate:
    """Neither arm is slowed by how its model is run here: a handicap is not a speedup."""
    outcome: CheckOutcome = "failed" if point.handicaps else "passed"
    facts = Handicaps(handicaps=point.handicaps)
    return Gate(kind="fastest_way", outcome=outcome, facts=facts, evidence=point.run_ids)


def busy_gate(runs: Sequence[Run], point: SpeedPoint, limits: GateLimits) -> Gate:
    """Both arms are busy all the time, on no more processors than planned: no arm waits or has help."""
    found = busy_of(runs, point)
    if isinstance(found, str):
        return Gate(kind="busy_arms", outcome="not_checked", facts=BusyArms(reason=found), evidence=point.run_ids)
    facts = BusyArms(busy=found, faults=busy_faults(found, limits))
    outcome: CheckOutcome = "failed" if facts.faults else "passed"
    return Gate(kind="busy_arms", outcome=outcome, facts=facts, evidence=point.run_ids)


def times_gate(point: SpeedPoint, limits: GateLimits) -> Gate:
    """Few timed calls have impossible times; such calls are left out in both arms."""
    many = point.too_many_faults(limits)
    facts = PossibleTimes(
        num_timed=point.num_paired,
        faults=point.faults,
        share=point.void_share,
        limit=limits.void_share if many else None,
    )
    outcome: CheckOutcome = "failed" if many else "passed"
    return Gate(kind="possible_times", outcome=outcome, facts=facts, evidence=point.run_ids)


def kept_up_gate(point: SpeedPoint) -> Gate | None:
    """Both arms' servers keep up with the rate: of one that does not, latencies grow for as long as it is asked.

    ``None`` where nothing was sent at a rate.
    """
    rate = point.candidate.workload.request_rate
    if rate is None:
        return None
    arms = [one for one in (point.baseline_requests, point.requests) if one is not None]
    behind = [one for one in arms if one.keeps_up is False]
    values = [
        [None if of.estimate is None else of.estimate.value for of in (one.growth, one.answers)] for one in behind
    ]
    facts = KeptUp(
        rate=rate,
        grown=tuple((one.cell.arm, growth, answers) for one, (growth, answers) in zip(behind, values, strict=True)),
        unknown=tuple(one.cell.arm for one in arms if one.keeps_up is None),
    )
    outcome: CheckOutcome = "failed" if facts.grown else "not_checked" if facts.unknown else "passed"
    return Gate(kind="kept_up", outcome=outcome, facts=facts, evidence=point.run_ids)


def probes_gate(point: SpeedPoint, limits: GateLimits) -> Gate:
    """Neither arm is faster on prompts that it has read before: nothing carries over between timed calls.

    Not checked where the intervals include the limit.
    """
    outcome: CheckOutcome = "passed" if point.unseen.checked(limits.seen_gain) else "not_checked"
    if point.unseen.remembered(limits.seen_gain):
        outcome = "failed"
    facts = Probes(unseen=point.unseen, limit=limits.seen_gain)
    return Gate(kind="probes", outcome=outcome, facts=facts, evidence=point.run_ids)


def null_gate(
    point: SpeedPoint, others: Iterable[SpeedPoint], judged: Estimate | None, claimed: float | None, limits: GateLimits
) -> Gate:
    """The baseline timed against itself gives 1, with a narrow interval. A missing null fails."""
    found = fairness.fault(point, others, judged, limits, claimed)
    facts = Null(null=point.null.estimate, fault=found)
    return Gate(kind="aa_null", outcome="failed" if found else "passed", facts=facts, evidence=point.run_ids)


def residual_gate(point: SpeedPoint, limits: GateLimits) -> Gate:
    """No arm is faster than its forwards allow, the baseline not much slower than its parts."""
    found = point.costs.residuals
    wrong = faults(found, limits.residual)
    if wrong:
        return Gate(kind="residual", outcome="failed", facts=Unexplained(faults=wrong), evidence=point.run_ids)
    reasons = [one.whole.reason for one in found.values() if one.whole.estimate is None]
    if reasons:
        facts = Unexplained(reasons=tuple(dict.fromkeys(map(str, reasons))))
        return Gate(kind="residual", outcome="not_checked", facts=facts)
    shares = tuple((arm, one.whole.estimate) for arm, one in found.items() if one.whole.estimate)
    outcome: CheckOutcome = "not_checked" if is_held_up(found, limits.residual) else "passed"
    return Gate(kind="residual", outcome=outcome, facts=Unexplained(shares=shares), evidence=point.run_ids)


def baseline_lag_gate(point: SpeedPoint, limits: GateLimits) -> Gate | None:
    """Not checked where other work may explain a baseline that seems slower than its parts; ``None`` elsewhere."""
    found = point.costs.residuals
    if not is_held_up(found, limits.residual):
        return None
    facts = BaselineLag(whole=found["baseline"].whole.estimate)
    return Gate(kind="baseline_lag", outcome="not_checked", facts=facts, evidence=point.run_ids)


def own_generate_gate(point: SpeedPoint, limits: GateLimits) -> Gate | None:
    """A Hugging Face baseline is not much slower than transformers' own generate; ``None`` for other baselines."""
    if point.best is None or point.best.over_generate is None:
        return None
    outcome: CheckOutcome = "failed" if point.best.is_handicapped(limits.own_generate) else "passed"
    return Gate(kind="own_generate", outcome=outcome, facts=OwnGenerate(best=point.best), evidence=point.run_ids)


def degenerate_gate(point: SpeedPoint, quality: Sequence[QualityPoint], limits: GateLimits) -> Gate:
    """The timed outputs are degenerate (loops, padding, empty) about as rarely as the baseline's.

    On the ``fixed`` workload, which decodes past the end of answers, the point's scored answers are checked instead.
    """
    seen = [(point.flagged, point.run_ids)] if point.workload == "answer" else []
    seen += [(one.flagged, (one.run_id,)) for one in quality if not seen or not one.timed]
    shares = [(*_shares(flagged), run_ids) for flagged, run_ids in seen if flagged.num_outputs]
    run_ids = tuple(run_id for *_, ids in shares for run_id in ids)
    if not shares:
        return Gate(kind="degenerate_outputs", outcome="not_checked", facts=DegenerateOutputs())
    baseline, candidate, _ = max(shares, key=lambda share: share[1] - share[0])
    broken = candidate - baseline > limits.degenerate_share
    facts = DegenerateOutputs(shares=(baseline, candidate), broken=broken)
    outcome: CheckOutcome = "failed" if broken else "passed"
    return Gate(kind="degenerate_outputs", outcome=outcome, facts=facts, evidence=run_ids)


def _shares(flagged: Flagged) -> tuple[float, float]:
    return flagged.baseline or 0.0, flagged.candidate or 0.0


def floor_gate(quality: Sequence[QualityPoint], limits: GateLimits) -> Gate:
    """The quality floor: retention on tasks that the decoder answers lies above ``min_retention``.

    Fails if any upper bound lies below the floor. Passes on the lower bound of the timed answers, where there are
    enough of them, else on that of the same point's whole tasks.
    """
    found = [(one, exercised_retention(one)) for one in quality]
    judged = [(one, est.estimate) for one, est in found if est.estimate is not None]
    below = [pair for pair in judged if pair[1].high < limits.min_retention]
    if below:
        return _against_floor(*below[0], limits)
    enough = sorted((pair for pair in judged if pair[1].n >= stats.MIN_CLUSTERS), key=lambda pair: not pair[0].timed)
    if enough:
        return _against_floor(*enough[0], limits)
    reasons = [str(est.reason) for _, est in found if est.reason] or ["no quality was measured at this point"]
    facts = QualityFloor(
        floor=limits.min_retention,
        reason=None if judged else reasons[0],
        num_clusters=judged[0][1].n if judged else None,
    )
    run_ids = tuple(one.run_id for one, _ in found)
    return Gate(kind="answers_are_answers", outcome="not_checked", facts=facts, evidence=run_ids)


def _against_floor(point: QualityPoint, estimate: Estimate, limits: GateLimits) -> Gate:
    floor = limits.min_retention
    stands: Stand = "below" if estimate.high < floor else "open" if estimate.low <= floor else "above"
    outcome: CheckOutcome = "failed" if stands == "below" else "not_checked" if stands == "open" else "passed"
    facts = QualityFloor(floor=floor, stands=stands, retention=estimate, above_chance=_can_be_guessed(point))
    return Gate(kind="answers_are_answers", outcome=outcome, facts=facts, evidence=(point.run_id,))


def _can_be_guessed(point: QualityPoint) -> bool:
    """Whether the decoder may be right by guessing one of a document's options."""
    return any(task.standing.chance is not None for task in point.tasks if task.exercises_decoder)


def exercised_retention(point: QualityPoint) -> Measured:
    """Retention over the tasks that the decoder answers, with one-sided 95 % bounds.

    Retention above chance if any of these tasks can be guessed: a broken decoder may still name an option.
    """
    names = [task.name for task in point.tasks if task.exercises_decoder]
    if point.scores is None or not names:
        return Measured(estimate=None, reason="no task is scored through the candidate's decoder")
    table, draws = point.scores.table, point.scores.draws
    weights_K = table.weights_K(names)
    rule = stats.retention_above_chance if _can_be_guessed(point) else stats.retention
    return measured(lambda: rule(table, draws, weights_K, level=DECISION_LEVEL))


Contradictions = Mapping[str, Sequence[Contradiction]]  # by run id


def speed_gates(
    point: SpeedPoint,
    runs: Sequence[Run],
    limits: GateLimits,
    *,
    quality: Sequence[QualityPoint],
    speed: Sequence[SpeedPoint],
    contradictions: Contradictions,
    judged: Estimate | None = None,
    claimed: float | None = None,
) -> tuple[Gate, ...]:
    """All gates of a timed point, by these limits.

    ``quality`` and ``speed`` are all points of the runs: quality at the same point, and the nulls that are corrected
    together. ``judged`` is the speedup that the null is compared with, ``claimed`` its claimed value; without them the
    null has its own limits only.
    """
    own = [one for one in quality if one.key == point.key]
    found = [*_gates(point, runs, own, limits)]
    if point.time.estimate is not None:
        found.append(null_gate(point, speed, judged, claimed, limits))
    run_ids = dict.fromkeys([*point.run_ids, *(run_id for gate in found for run_id in gate.evidence)])
    return (files_agree_gate(contradictions, [*run_ids], runs), *found)


def _gates(point: SpeedPoint, runs: Sequence[Run], own: Sequence[QualityPoint], limits: GateLimits) -> Iterator[Gate]:
    """The gates that do not depend on a claim."""
    yield complete_gate(point)
    yield same_inputs_gate({}, point.run_ids)
    yield whole_prompts_gate(runs, point, point.run_ids)
    yield from answer_gates(runs, own, point, limits)
    if point.handicaps:
        yield fastest_way_gate(point)
    yield busy_gate(runs, point, limits)
    if (beside := own_generate_gate(point, limits)) is not None:
        yield beside
    if point.faults:
        yield times_gate(point, limits)
    if (kept_up := kept_up_gate(point)) is not None:
        yield kept_up
    yield probes_gate(point, limits)
    yield from witness_gates(runs, point, limits)
    yield residual_gate(point, limits)
    if (lag := baseline_lag_gate(point, limits)) is not None:
        yield lag
    yield degenerate_gate(point, own, limits)
    yield floor_gate(own, limits)
    yield verify_gate(runs, point.candidate.checkpoint.identity)


def gated(
    speed: Sequence[SpeedPoint], runs: Sequence[Run], quality: Sequence[QualityPoint], contradictions: Contradictions
) -> tuple[SpeedPoint, ...]:
    """The points with their gates, by the default limits of a claim.

    Adds a warning where the null passes but is wide for so small a speedup, and where answers to made-up prompts are
    much less like the baseline's.
    """
    found = []
    for point in speed:
        own = speed_gates(point, runs, GateLimits(), quality=quality, speed=speed, contradictions=contradictions)
        null_failed = any(gate.kind == "aa_null" and gate.outcome == "failed" for gate in own)
        more = (None if null_failed else caution(point), likeness_warning(likeness(runs, point)))
        warnings = (*point.warnings, *(warning for warning in more if warning is not None))
        found.append(replace(point, gates=own, warnings=warnings))
    return tuple(found)
