"""A claim's quantity, estimated from the evidence at its point, with one-sided 95 % bounds on either side."""

from __future__ import annotations

from typing import Literal

from twotower_eval.analyse import stats
from twotower_eval.analyse.claims.files import RETENTIONS
from twotower_eval.analyse.compare import Measured, QualityPoint, SpeedPoint
from twotower_eval.analyse.compare.clean import subset
from twotower_eval.analyse.compare.measured import measured
from twotower_eval.analyse.compare.points import OtherScore, candidate_mean
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.stats.decide import DECISION_LEVEL
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Claim, Estimate


def is_equal_by_construction(claim: Claim, point: QualityPoint, own: OtherScore | WholeScore | None = None) -> bool:
    """Whether one computation scored both arms in the claim's whole scope, so that nothing is left to estimate."""
    if own is not None:
        return claim.quantity == "score_difference" and own.is_equal
    comparing = claim.quantity in ("retention", "score_difference")
    scoring = all(task.baseline > 0 for task in point.tasks if task.name in claim.scope)
    return comparing and scoring and bool(claim.scope) and set(claim.scope) <= set(point.equal_tasks)


def tasks_judged(claim: Claim, point: QualityPoint) -> tuple[str, ...]:
    """The tasks that a claim is over: its scope, of a decoder-exercised retention what goes through the decoder."""
    every = claim.quantity != "decoder_exercised_retention"
    return tuple(task.name for task in point.tasks if task.name in claim.scope and (every or task.exercises_decoder))


def standings(claim: Claim, point: QualityPoint) -> tuple[stats.Standing, ...]:
    """How the baseline stands to chance on each task of a retention; nothing for other quantities."""
    if claim.quantity not in RETENTIONS or point.scores is None:
        return ()
    level, tasks = claim.limits.above_chance_level, tasks_judged(claim, point)
    return stats.standings(point.scores.table, level=level, tasks=tasks)


def quality_estimate(
    claim: Claim, point: QualityPoint, own: OtherScore | WholeScore | None = None, *, level: float = DECISION_LEVEL
) -> Estimate:
    """The claim's quantity over its own scope, at the level that its verdict needs; NoEstimate where there is none.

    ``own`` is the score outside retention that it is about, if it is about one.
    """
    if own is not None:
        return own.score_at(level) if claim.quantity == "score" else own.difference_at(level)
    scope = tasks_judged(claim, point)
    if point.scores is None or not scope:
        raise NoEstimate("no task in scope is scored through the candidate's decoder")
    scores = subset(point.scores, [i for i, group in enumerate(point.scores.groups) if group in scope])
    if claim.quantity == "score":
        if len(scope) > 1:
            raise NoEstimate("a score is of one task or one group: claim a retention over several")
        return candidate_mean(scores, level)
    if is_equal_by_construction(claim, point):
        value = 1.0 if claim.quantity == "retention" else 0.0
        return stats.equal_by_construction(value, len(set(scores.clusters)), level=level)
    table = scores.table
    draws = stats.draw_task_means(table)
    if claim.quantity == "score_difference":
        return stats.difference(table, draws, level=level, min_discordant=stats.MIN_DISCORDANT)
    if claim.averaging == "mean_of_ratios":
        return stats.mean_of_ratios(table, draws, level=level)
    return stats.retention(table, draws, level=level)


def speed_readings(claim: Claim, point: SpeedPoint, *, level: float = DECISION_LEVEL) -> list[Measured]:
    """The reading that the claim means; behind it, where the arms' lengths differ much, the other one as well."""
    time = measured(lambda: _scaled(claim, point, _speedup(point, "time", level)))
    throughput = measured(lambda: _scaled(claim, point, _speedup(point, "throughput", level)))
    both = [throughput, time] if claim.quantity == "speedup_throughput" else [time, throughput]
    length, limits = point.length.estimate, claim.limits
    alike = length is not None and limits.min_length_ratio <= length.value <= limits.max_length_ratio
    return both[:1] if alike else both


def _speedup(point: SpeedPoint, quantity: Literal["time", "throughput"], level: float = DECISION_LEVEL) -> Estimate:
    return stats.speedup(point.timed, quantity, level=level)


def _scaled(claim: Claim, point: SpeedPoint, estimate: Estimate) -> Estimate:
    if claim.quantity != "speedup_time_per_device":
        return estimate
    devices = point.baseline.workload.num_devices, point.candidate.workload.num_devices
    if devices[0] is None or devices[1] is None:
        raise NoEstimate("the run does not say how many devices each arm used")
    return stats.per_device(estimate, baseline_devices=devices[0], candidate_devices=devices[1])


def at_stake(claim: Claim, point: SpeedPoint, estimate: Estimate) -> tuple[Estimate, float | None]:
    """The speedup that a null is held against, judged and claimed: both are of the calls, never per device."""
    if claim.quantity != "speedup_time_per_device" or claim.expected is None:
        return estimate, claim.expected
    judged = _speedup(point, "time")
    return judged, claim.expected * judged.value / _scaled(claim, point, judged).value


def kept_of(claim: Claim, point: QualityPoint, estimate: Estimate | None) -> float | None:
    """The share of the baseline's score that the candidate has on a claim's scope; ``None`` where there is none."""
    if claim.quantity in RETENTIONS:
        return None if estimate is None else estimate.value
    here = [task for task in point.tasks if task.name in claim.scope]
    baseline = sum(task.baseline for task in here)
    return sum(task.candidate for task in here) / baseline if baseline > 0 else None


def kept_at(point: QualityPoint) -> float:
    """The same of all tasks of a point that the candidate's decoder has a part in; 0 where the baseline has none."""
    here = [task for task in point.tasks if task.exercises_decoder]
    baseline = sum(task.baseline for task in here)
    return sum(task.candidate for task in here) / baseline if baseline > 0 else 0.0
