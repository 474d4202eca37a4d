"""What has to be in order before evidence may speak. A failed gate makes a claim INVALID.

A gate that could not be checked is said: in the verdict itself for those in ``SAID_WITH_SPEED``. Where a speedup would
lean on it, it keeps the claim from SUPPORTED: see ``NEEDED_FOR_SPEED``. Loops, padding and early ends are the fastest
outputs there are, so a speedup always answers for the outputs that it was timed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare import nulls
from twotower_eval.analyse.compare.best import generate_text
from twotower_eval.analyse.compare.busy import busy_faults, busy_of, busy_text
from twotower_eval.analyse.compare.chance import standing_text
from twotower_eval.analyse.compare.clean import Flagged
from twotower_eval.analyse.compare.contradiction import Contradiction, contradictions_text
from twotower_eval.analyse.compare.gaps import tells_digests
from twotower_eval.analyse.compare.measured import Measured, measured
from twotower_eval.analyse.compare.numbers import PERCENT, interval
from twotower_eval.analyse.compare.points import MissingScore, OtherScore, QualityPoint
from twotower_eval.analyse.compare.residual import fault_text, faults, held_up_text, is_held_up, residual_text
from twotower_eval.analyse.compare.same import run_ids_of
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.truncation import truncated_at
from twotower_eval.analyse.compare.unseen import unseen_text
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.stats.decide import DECISION_LEVEL
from twotower_eval.records import CheckOutcome, Estimate, Gate, GateKind, GateLimits
from twotower_eval.shortfalls import truncation_line
from twotower_eval.store import Run
from twotower_eval.times import void_text
from twotower_eval.ways import handicap_text

BROKEN = "fast and broken"
NO_DIGESTS = "whether journals were changed later is not known, as events of older versions hold no digests"
NEEDED_FOR_SPEED: tuple[GateKind, ...] = ("baseline_lag", "degenerate_outputs", "answers_are_answers")
# A SUPPORTED speedup, or a joint claim with one, says which of these was not checked.
SAID_WITH_SPEED: tuple[GateKind, ...] = (
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
    """No file of these runs says something else than another: what contradicts itself is no evidence.

    Not checked where nothing would show that journals were changed after they were written.
    """
    wrong = [run_id for run_id in run_ids if run_id in found]
    if not wrong:
        older = [run.manifest.run_id for run in runs if run.manifest.run_id in run_ids and not tells_digests(run)]
        outcome: CheckOutcome = "not_checked" if older else "passed"
        detail = "no file of a run contradicts another"
        detail += f"; {NO_DIGESTS} ({', '.join(older)})" if older else ""
        return Gate(kind="files_agree", outcome=outcome, detail=detail, evidence=tuple(run_ids))
    detail = "; ".join(f"run {run_id} contradicts itself: {contradictions_text(found[run_id])}" for run_id in wrong)
    return Gate(kind="files_agree", outcome="failed", detail=detail, evidence=tuple(wrong))


def complete_gate(point: QualityPoint | SpeedPoint) -> Gate:
    """The run went to its end: what is missing from it may not be missing by chance."""
    run_ids = run_ids_of(point)
    detail = "the run went to its end" if point.complete else "the run did not go to its end: resume it"
    return Gate(kind="complete_run", outcome="passed" if point.complete else "failed", detail=detail, evidence=run_ids)


def scored_gate(point: QualityPoint, scope: Sequence[str], own: OtherScore | WholeScore | None = None) -> Gate:
    """No document of the scope was left out for want of a score: those left out need not be like the others.

    ``own`` is the score outside retention that is judged, if it is one.
    """
    named = _leaves(point, scope)
    gaps = [gap for gap in point.missing if gap.task in named and (gap.headline if own is None else _is_of(gap, own))]
    gone = {(gap.task, doc) for gap in gaps for doc in gap.doc_ids}
    detail = f"{len(gone)} documents have no score in one arm" if gone else "every document is scored in both arms"
    return Gate(kind="all_scored", outcome="failed" if gone else "passed", detail=detail, evidence=(point.run_id,))


def _is_of(gap: MissingScore, own: OtherScore | WholeScore) -> bool:
    return (gap.metric, gap.filter) == (own.metric, own.filter)


def above_chance_gate(standings: Sequence[stats.Standing], run_id: str) -> Gate:
    """The baseline does better than guessing on some task: models that guess keep each other's quality whole."""
    unclear = [one for one in standings if not one.is_clear]
    named = "; ".join(standing_text(one) for one in unclear)
    if len(unclear) == len(standings):
        detail = f"no task in scope has a baseline clearly above chance: {named}"
        return Gate(kind="above_chance", outcome="failed", detail=detail, evidence=(run_id,))
    detail = f"the baseline is clearly above chance on {len(standings) - len(unclear)} of {len(standings)} tasks"
    detail += f"; not on {named}" if unclear else ""
    return Gate(kind="above_chance", outcome="passed", detail=detail, evidence=(run_id,))


def whole_prompts_gate(
    runs: Sequence[Run], point: QualityPoint | SpeedPoint, run_ids: Sequence[str], scope: Sequence[str] | None = None
) -> Gate:
    """No prompt of the scope lost its beginning in either arm: what is cut is not the task any more."""
    tasks = None if scope is None or not isinstance(point, QualityPoint) else _leaves(point, scope)
    own = [run for run in runs if run.manifest.run_id in run_ids]
    found = [one for run in own for one in truncated_at(run, point.key, tasks)]
    cut = dict.fromkeys(
        truncation_line(one.task, one.arm, one.num_requests, one.num_truncated) for one in found if one.num_truncated
    )
    outcome: CheckOutcome = "failed" if cut else "passed" if found else "not_checked"
    detail = "; ".join(cut) or ("no prompt was cut" if found else "prompts that were cut were not counted in this run")
    return Gate(kind="whole_prompts", outcome=outcome, detail=detail, evidence=tuple(run_ids))


def _leaves(point: QualityPoint, scope: Sequence[str]) -> set[str]:
    """The tasks of a scope and, of those that are a mean over several, their members."""
    members = {member for task in point.tasks if task.name in scope for member, *_ in task.members}
    others: list[OtherScore | WholeScore] = [*point.others, *point.wholes]
    return set(scope) | members | {member for one in others if one.task in scope for member in one.members}


def same_inputs_gate(differing: dict[str, str], run_ids: Sequence[str]) -> Gate:
    """Both arms were given the same documents and prompts, by their hashes."""
    if differing:
        return Gate(
            kind="same_inputs", outcome="failed", detail="; ".join(differing.values()), evidence=tuple(differing)
        )
    return Gate(kind="same_inputs", outcome="passed", detail="hashes agree between the arms", evidence=tuple(run_ids))


def verify_gate(runs: Sequence[Run], identity: str) -> Gate:
    """What the newest ``verify`` of the same weights, settings and tokenizer found."""
    of_it = [run for run in runs if any(cell.checkpoint.identity == identity for cell in run.manifest.cells)]
    found = [run for run in of_it if run.manifest.verb == "verify" and run.checks]
    if not found:
        detail = "no verify run of these weights is among the runs: kernels and batches are taken on trust"
        return Gate(kind="verify", outcome="not_checked", detail=detail)
    # One that was stopped takes back nothing that another found.
    telling = [run for run in found if run.complete or any(check.outcome == "failed" for check in run.checks)]
    newest = (telling or found)[-1]
    failed = [check for check in newest.checks if check.outcome == "failed"]
    unchecked = [check.name for check in newest.checks if check.outcome == "not_checked"]
    detail = f"{len(newest.checks) - len(unchecked) - len(failed)} checks passed"
    if unchecked:
        detail += f", not checked: {', '.join(unchecked)}"
    if failed:
        detail = "failed: " + "; ".join(f"{check.name} ({check.detail})" for check in failed)
    elif not newest.complete:
        detail = f"verify did not go to its end; {detail}"
    outcome: CheckOutcome = "failed" if failed else "passed" if newest.complete else "not_checked"
    return Gate(kind="verify", outcome=outcome, detail=detail, evidence=(newest.manifest.run_id,))


def fastest_way_gate(point: SpeedPoint) -> Gate:
    """Neither arm was slowed by how its model has to be run here: a handicap is no speedup."""
    outcome: CheckOutcome = "failed" if point.handicaps else "passed"
    detail = handicap_text(point.handicaps) if point.handicaps else "neither arm is slowed by how it is run"
    return Gate(kind="fastest_way", outcome=outcome, detail=detail, evidence=point.run_ids)


def busy_gate(runs: Sequence[Run], point: SpeedPoint, limits: GateLimits) -> Gate:
    """Both arms work all the time, on as much of the processor as the plan gives them: no arm waits or has help."""
    found = busy_of(runs, point)
    if isinstance(found, str):
        return Gate(kind="busy_arms", outcome="not_checked", detail=found, evidence=point.run_ids)
    faults = busy_faults(found, limits)
    outcome: CheckOutcome = "failed" if faults else "passed"
    return Gate(kind="busy_arms", outcome=outcome, detail="; ".join(faults) or busy_text(found), evidence=point.run_ids)


def times_gate(point: SpeedPoint, limits: GateLimits) -> Gate:
    """Hardly any timed call took a time that no clock can give; what does is left out in both arms."""
    detail = void_text(point.num_paired, point.faults)
    outcome: CheckOutcome = "passed"
    if point.too_many_faults(limits):
        outcome = "failed"
        detail += (
            f": {100 * point.void_share:.1f} % of the timings go with them, more than {100 * limits.void_share:g} %"
        )
    return Gate(kind="possible_times", outcome=outcome, detail=detail, evidence=point.run_ids)


def probes_gate(point: SpeedPoint, limits: GateLimits) -> Gate:
    """Neither arm is faster on prompts that it has seen than on new ones: nothing carries over between timed calls.

    Where the intervals hold the limit nothing can be told.
    """
    outcome: CheckOutcome = "passed" if point.unseen.checked(limits.seen_gain) else "not_checked"
    if point.unseen.remembered(limits.seen_gain):
        outcome = "failed"
    return Gate(
        kind="probes", outcome=outcome, detail=unseen_text(point.unseen, limits.seen_gain), evidence=point.run_ids
    )


def null_gate(
    point: SpeedPoint, others: Iterable[SpeedPoint], judged: Estimate | None, claimed: float | None, limits: GateLimits
) -> Gate:
    """PROTOCOL "Speed" 5: the baseline timed against itself is 1, and narrowly. A null that is missing fails."""
    found, null = nulls.fault(point, others, judged, limits, claimed), point.null.estimate
    detail = found or "the baseline timed against itself is neither off nor too wide"
    if null is not None:
        detail += f" ({null.value:.3f} [{null.low:.3f}, {null.high:.3f}])"
    return Gate(kind="aa_null", outcome="failed" if found else "passed", detail=detail, evidence=point.run_ids)


def residual_gate(point: SpeedPoint, limits: GateLimits) -> Gate:
    """PROTOCOL "Speed" 6: no arm is faster than its own forwards allow, nor the baseline slower than its parts."""
    found = point.costs.residuals
    wrong = faults(found, limits.residual)
    if wrong:
        return Gate(kind="residual", outcome="failed", detail="; ".join(map(fault_text, wrong)), evidence=point.run_ids)
    unknown = {arm: one.whole.reason for arm, one in found.items() if one.whole.estimate is None}
    if unknown:
        reasons = dict.fromkeys(str(reason) for reason in unknown.values())
        detail = f"whether the times fit the forwards is not known: {'; '.join(reasons)}"
        return Gate(kind="residual", outcome="not_checked", detail=detail)
    shares = [f"{arm} {residual_text(one.whole.estimate)}" for arm, one in found.items() if one.whole.estimate]
    detail = f"unexplained time: {', '.join(shares)}"
    outcome: CheckOutcome = "not_checked" if is_held_up(found, limits.residual) else "passed"
    return Gate(kind="residual", outcome=outcome, detail=detail, evidence=point.run_ids)


def baseline_lag_gate(point: SpeedPoint, limits: GateLimits) -> Gate | None:
    """A baseline that seems slower than its parts was not held up; ``None`` where it does not, or is at fault."""
    found = point.costs.residuals
    if not is_held_up(found, limits.residual):
        return None
    detail = held_up_text(found["baseline"])
    return Gate(kind="baseline_lag", outcome="not_checked", detail=detail, evidence=point.run_ids)


def own_generate_gate(point: SpeedPoint, limits: GateLimits) -> Gate | None:
    """A Hugging Face baseline is not much slower than its own library; ``None`` for other baselines."""
    if point.best is None or point.best.over_generate is None:
        return None
    slow = point.best.is_handicapped(limits.own_generate)
    return Gate(
        kind="own_generate",
        outcome="failed" if slow else "passed",
        detail=f"the baseline takes {generate_text(point.best)}",
        evidence=point.run_ids,
    )


def degenerate_gate(point: SpeedPoint, quality: Sequence[QualityPoint], limits: GateLimits) -> Gate:
    """The timed outputs are not loops, padding or nothing more often than the baseline's.

    Outputs of the ``fixed`` workload go on past their end by design, so there the point's own answers are looked at.
    """
    seen = [(point.flagged, point.run_ids)] if point.workload == "answer" else []
    seen += [(one.flagged, (one.run_id,)) for one in quality if not seen or not one.timed]
    shares = [(*_shares(flagged), run_ids) for flagged, run_ids in seen if flagged.num_outputs]
    run_ids = tuple(run_id for *_, ids in shares for run_id in ids)
    if not shares:
        return Gate(
            kind="degenerate_outputs",
            outcome="not_checked",
            detail="no output of this point was kept, so none was looked at",
        )
    baseline, candidate, _ = max(shares, key=lambda share: share[1] - share[0])
    detail = f"{100 * candidate:.1f} % of the outputs are degenerate, of the baseline's {100 * baseline:.1f} %"
    if candidate - baseline > limits.degenerate_share:
        return Gate(kind="degenerate_outputs", outcome="failed", detail=f"{BROKEN}: {detail}", evidence=run_ids)
    return Gate(kind="degenerate_outputs", outcome="passed", detail=detail, evidence=run_ids)


def _shares(flagged: Flagged) -> tuple[float, float]:
    return flagged.baseline or 0.0, flagged.candidate or 0.0


def floor_gate(quality: Sequence[QualityPoint], limits: GateLimits) -> Gate:
    """The outputs are answers: their retention, on tasks that exercise the decoder, lies above the floor.

    Fails where any upper bound lies below it. Passes on the timed answers' lower bound, where these are enough to
    judge by, else on that of the same point's whole tasks.
    """
    floor = limits.min_retention
    found = [(one, exercised_retention(one)) for one in quality]
    judged = [(one, est.estimate) for one, est in found if est.estimate is not None]
    below = [(one, est) for one, est in judged if est.high < floor]
    if below:
        one, est = below[0]
        detail = f"{BROKEN}: {_against_floor(one, est, floor)} is below the floor of {100 * floor:g} %"
        return Gate(kind="answers_are_answers", outcome="failed", detail=detail, evidence=(one.run_id,))
    enough = sorted((pair for pair in judged if pair[1].n >= stats.MIN_CLUSTERS), key=lambda pair: not pair[0].timed)
    if not enough:
        reasons = [str(est.reason) for _, est in found if est.reason] or ["no quality was measured at this point"]
        if judged:
            reasons = [f"retention rests on {judged[0][1].n} clusters, fewer than {stats.MIN_CLUSTERS}"]
        detail = f"whether the outputs are answers is not known: {reasons[0]}"
        return Gate(
            kind="answers_are_answers",
            outcome="not_checked",
            detail=detail,
            evidence=tuple(one.run_id for one, _ in found),
        )
    one, est = enough[0]
    if est.low <= floor:
        detail = f"{_against_floor(one, est, floor)} does not clear the floor of {100 * floor:g} %"
        return Gate(kind="answers_are_answers", outcome="not_checked", detail=detail, evidence=(one.run_id,))
    detail = f"{_against_floor(one, est, floor)} is above the floor of {100 * floor:g} %"
    return Gate(kind="answers_are_answers", outcome="passed", detail=detail, evidence=(one.run_id,))


def _against_floor(point: QualityPoint, estimate: Estimate, floor: float) -> str:
    above = " above chance" if _can_be_guessed(point) else ""
    return f"retention{above} {interval(PERCENT, estimate, against=floor)}"


def _can_be_guessed(point: QualityPoint) -> bool:
    """Whether the decoder may be right by naming some option."""
    return any(task.standing.chance is not None for task in point.tasks if task.exercises_decoder)


def exercised_retention(point: QualityPoint) -> Measured:
    """Retention over the tasks that go through the decoder, with one-sided 95 % bounds.

    Of what lies above chance where any of them can be guessed at: a broken decoder may still name an option.
    """
    names = [task.name for task in point.tasks if task.exercises_decoder]
    if point.scores is None or not names:
        return Measured(estimate=None, reason="no task is scored through the candidate's decoder")
    table = point.scores.table
    weights_K, draws = table.weights_K(names), stats.draw_task_means(table)
    rule = stats.retention_above_chance if _can_be_guessed(point) else stats.retention
    return measured(lambda: rule(table, draws, weights_K, level=DECISION_LEVEL))
