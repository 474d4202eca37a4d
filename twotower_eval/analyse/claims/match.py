"""The evidence at exactly a claim's own operating point, and the claim's quantity estimated from it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from twotower_eval.analyse import stats
from twotower_eval.analyse.claims.files import RETENTIONS, SCORE_QUANTITIES
from twotower_eval.analyse.claims.terms import SPEED_QUANTITIES
from twotower_eval.analyse.compare import ArmsDifferError, Measured, PointKey, QualityPoint, Runs, SpeedPoint
from twotower_eval.analyse.compare.clean import subset
from twotower_eval.analyse.compare.contradiction import Contradiction
from twotower_eval.analyse.compare.figures import measured
from twotower_eval.analyse.compare.points import OtherScore, candidate_mean, checkpoint_name, tower_suffix
from twotower_eval.analyse.compare.quality import quality_points
from twotower_eval.analyse.compare.runs import is_alone
from twotower_eval.analyse.compare.several import PLAIN, against, baselines_of, default_baseline, whole
from twotower_eval.analyse.compare.timing import speed_points
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.stats.decide import DECISION_LEVEL
from twotower_eval.errors import NoEstimate
from twotower_eval.plan import CONTEXT_TOWER
from twotower_eval.records import HUB, Arm, Cell, Checkpoint, Claim, DecoderSpec, Estimate, RequestKind, Workload
from twotower_eval.store import Run
from twotower_eval.strict import JsonObject

MIN_DIGEST = 8  # hex digits of a digest that name a checkpoint
HEX = re.compile(rf"[0-9a-fA-F]{{{MIN_DIGEST},}}")
ANY = ""  # the baseline of a claim that names none
UNSTATED = (None, False, 0, 0.0)
WITHOUT_EFFECT = ("trace",)  # keeps a record of decoding and changes nothing


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Every run, the points of runs whose arms can be compared, and why those of others cannot (run id -> reason).

    ``contradictions``: by run id, for runs whose files contradict each other.
    """

    runs: tuple[Run, ...]
    quality: tuple[QualityPoint, ...]
    speed: tuple[SpeedPoint, ...]
    differing: Mapping[str, str]
    contradictions: Mapping[str, Sequence[Contradiction]] = field(default_factory=dict)

    @property
    def alone(self) -> list[str]:
        """Names of the models that were measured without a baseline."""
        cells = [cell for run in self.runs if is_alone(run) for cell in run.manifest.cells]
        return sorted({checkpoint_name(cell.checkpoint) for cell in cells})


def gather(runs: Sequence[Run]) -> Evidence:
    """The points of all runs. A run whose arms were given different inputs has none and is in ``differing``.

    Points that a report's ``Runs`` already hold are not computed again.
    """
    together = runs if isinstance(runs, Runs) else Runs(runs)
    ordered = list(together)
    try:
        found = Evidence(runs=tuple(ordered), quality=together.quality, speed=together.speed, differing={})
    except ArmsDifferError:
        found = _apart(ordered)
    return dataclasses.replace(found, contradictions=together.contradictions)


def _apart(ordered: list[Run]) -> Evidence:
    """The points run by run, so that the runs whose arms differ are found."""
    differing: dict[str, str] = {}
    quality: list[QualityPoint] = []
    for run in ordered:
        try:
            quality += quality_points(run)
        except ArmsDifferError as error:
            differing[run.manifest.run_id] = str(error)
    speed = _speed_of([run for run in ordered if run.manifest.run_id not in differing], differing)
    return Evidence(runs=tuple(ordered), quality=_agreeing(quality, differing), speed=speed, differing=differing)


def _speed_of(runs: Sequence[Run], differing: dict[str, str]) -> tuple[SpeedPoint, ...]:
    """The speed points of the runs that agree; the others are added to ``differing``."""
    try:
        return speed_points(runs)[0]
    except ArmsDifferError as error:
        found = {run.manifest.run_id: str(reason) for run in runs if (reason := _difference(run))}
        # Each may agree with itself and not with what it is pooled with: then none can be trusted.
        found = found or {run.manifest.run_id: str(error) for run in runs if run.speed}
    differing.update(found)
    return _speed_of([run for run in runs if run.manifest.run_id not in found], differing)


def _difference(run: Run) -> ArmsDifferError | None:
    try:
        speed_points([run])
    except ArmsDifferError as error:
        return error
    return None


def _agreeing(points: Iterable[QualityPoint], differing: Mapping[str, str]) -> tuple[QualityPoint, ...]:
    return tuple(point for point in points if point.run_id not in differing)


def quality_at(claim: Claim, evidence: Evidence) -> list[QualityPoint]:
    """Quality points at the claim's decoder with its whole scope: whole tasks first, then by number of documents.

    Among equals the earliest run comes first.
    """
    found = [
        point
        for point in evidence.quality
        if cell_fits(claim, point.candidate) and names_pair(claim, point.baseline, subject_of(point))
        if set(claim.scope) <= {task.name for task in point.tasks} or own_score(claim, point) is not None
        if claim.metric is None or own_score(claim, point) is not None or _is_headline(claim, point)
    ]
    return sorted(found, key=lambda point: (point.timed, -num_documents(claim, point), point.run_id))


def num_documents(claim: Claim, point: QualityPoint) -> int:
    """Number of documents of a point within a claim's scope; of all tasks where the claim names none."""
    by_task = {task.name: task.num_documents for task in point.tasks}
    others: list[OtherScore | WholeScore] = [*point.others, *point.wholes]
    by_task |= {one.task: one.num_documents for one in others if one.task not in by_task}
    return sum(num for name, num in by_task.items() if name in claim.scope or not claim.scope)


def own_score(claim: Claim, point: QualityPoint) -> OtherScore | WholeScore | None:
    """The score outside retention that a claim on one task is about: the metric it names, or the task's main one.

    ``None`` where the claim is about the metric of retention, and where it leaves open which of several is meant.
    """
    if claim.quantity not in SCORE_QUANTITIES or len(claim.scope) != 1 or _is_headline(claim, point):
        return None
    found = scores_of(point, claim.scope[0])
    if claim.metric is not None:
        found = [one for one in found if claim.metric in (one.metric, f"{one.metric},{one.filter}")]
    chosen = [one for one in found if one.main] or found
    return chosen[0] if len(chosen) == 1 else None


def scores_of(point: QualityPoint, task: str) -> list[OtherScore | WholeScore]:
    """Every score of a task outside retention."""
    found: list[OtherScore | WholeScore] = [*point.wholes, *point.others]
    return [one for one in found if one.task == task]


def _is_headline(claim: Claim, point: QualityPoint) -> bool:
    """Whether a claim on one task is about the metric that retention uses."""
    here = [task for task in point.tasks if task.name == claim.scope[0]]
    return any(claim.metric in (None, task.metric, f"{task.metric},{task.filter}") for task in here)


def speed_at(claim: Claim, evidence: Evidence) -> list[SpeedPoint]:
    """Speed points at the claim's whole operating point, newest first."""
    return [point for point in _speed_at_decoder(claim, evidence) if timing_fits(claim, point)]


def quality_near(claim: Claim, evidence: Evidence) -> list[QualityPoint]:
    """Quality points at the claim's decoder with any score of every task in scope, also of another metric."""
    anything = dataclasses.replace(claim, scope=(), metric=None)
    return [
        point
        for point in quality_at(anything, evidence)
        if all(scores_of(point, name) or any(task.name == name for task in point.tasks) for name in claim.scope)
    ]


def _speed_at_decoder(claim: Claim, evidence: Evidence) -> list[SpeedPoint]:
    """Speed points of the claim's decoder, baseline and hardware, with any workload and batch size; newest first."""
    found = [
        point
        for point in evidence.speed
        if cell_fits(claim, point.candidate) and names_pair(claim, point.baseline, subject_of(point))
        if hardware_fits(claim, _machines(point, evidence))
    ]
    return sorted(found, key=lambda point: max(point.run_ids), reverse=True)


def differing_at(claim: Claim, evidence: Evidence, verb: str) -> dict[str, str]:
    """Runs of a verb at the claim's point whose arms were given different inputs (run id -> reason)."""
    return {
        run.manifest.run_id: evidence.differing[run.manifest.run_id]
        for run in evidence.runs
        if run.manifest.run_id in evidence.differing and run.manifest.verb == verb
        if any(cell.arm == "candidate" and cell_fits(claim, cell) for cell in run.manifest.cells)
    }


def at_point(claim: Claim, parts: Sequence[Claim], evidence: Evidence) -> tuple[QualityPoint | None, SpeedPoint | None]:
    """Quality and speed at a claim's operating point, of the same weights, as its ``parts`` are judged.

    Where no part is about quality (or speed), or tasks of its scope are missing, any quality (or speed) at the point.
    """
    timed = [part for part in parts if part.quantity in SPEED_QUANTITIES]
    quality = [point for part in parts if part not in timed for point in quality_at(part, evidence)]
    anything = dataclasses.replace(claim, scope=(), metric=None)
    quality += sorted(quality_at(anything, evidence), key=lambda point: (point.timed, -len(point.tasks)))
    speed = [point for part in timed for point in speed_at(part, evidence)]
    if not timed:
        speed = sorted(_speed_near(claim, evidence), key=lambda point: (point.workload != "answer", point.batch_size))
    kept = next(iter(quality), None)
    faster = next((point for point in speed if kept is None or point.key == kept.key), None)
    return kept, faster


def _speed_near(claim: Claim, evidence: Evidence) -> list[SpeedPoint]:
    """Speed points of the claim's decoder that fit what its point says of the timing; newest first."""
    found = []
    for point in _speed_at_decoder(claim, evidence):
        workload = point.candidate.workload
        asked = (claim.point.batch_size, claim.point.num_devices, claim.point.workload)
        pairs = zip(asked, (point.batch_size, workload.num_devices, point.workload), strict=True)
        if (
            claim.point.request_rate == workload.request_rate
            and all(wanted in (None, there) for wanted, there in pairs)
            and tasks_fit(claim, point.tasks)
        ):
            found.append(point)
    return found


def same_point(quality: Iterable[QualityPoint], key: PointKey) -> list[QualityPoint]:
    """The quality points with the same weights and decoder as ``key``."""
    return [point for point in quality if point.key == key]


def names_subject(claim: Claim, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is the claim's subject."""
    return _names(claim.subject, checkpoint)


def has_subject(claim: Claim, run: Run) -> bool:
    """Whether the claim's model is a candidate in a run."""
    return any(cell.arm == "candidate" and names_subject(claim, cell.checkpoint) for cell in run.manifest.cells)


def names_baseline(claim: Claim, cell: Cell) -> bool:
    """Whether a cell is the claim's baseline; ``context-tower`` is the subject's own context tower.

    A claim names a baseline by its checkpoint, by its decoder, or by its name among several. A claim that names none
    is about any. What a plug-in decodes has to be named as such: nobody knows whether that is a baseline's best.
    """
    wanted = claim.baseline
    if wanted == CONTEXT_TOWER:
        return cell.checkpoint.tower == "context" and not cell.decoder.is_plug_in
    if wanted == cell.decoder.kind or (wanted == cell.baseline and not HEX.fullmatch(wanted)):
        return True
    return not cell.decoder.is_plug_in and (wanted == ANY or _names(wanted, cell.checkpoint))


def names_pair(claim: Claim, baseline: Cell, candidate: Checkpoint) -> bool:
    """Whether these are the claim's two models. A ``context-tower`` baseline comes from the candidate's folder."""
    own = claim.baseline != CONTEXT_TOWER or baseline.checkpoint.source == candidate.source
    return own and names_subject(claim, candidate) and names_baseline(claim, baseline)


def chosen_baseline(claim: Claim, run: Run) -> str | None:
    """Which of a run's baselines a claim is judged against; ``None`` where the run has only one.

    The one of that name if there is one. Else, of those that the claim's ``baseline`` fits, the first of the plan that
    decodes one token at a time, and where none does the first. No result decides.
    """
    names = baselines_of(run)
    if claim.baseline in names or len(names) < 2:
        return claim.baseline if claim.baseline in names else None
    cells = [cell for cell in run.manifest.cells if cell.arm == "baseline" and names_baseline(claim, cell)]
    plain = [cell for cell in cells if cell.decoder.kind == PLAIN]
    return next((cell.baseline for cell in (*plain, *cells)), default_baseline(run))


def runs_for(claim: Claim, runs: Runs) -> Runs:
    """The runs, those with several baselines against the one that the claim is judged against."""
    chosen = tuple(chosen_baseline(claim, run) for run in runs.whole)
    views = tuple(against(run, name) for run, name in zip(runs.whole, chosen, strict=True))
    if not any(chosen) or all(view is run for view, run in zip(views, runs, strict=True)):
        return runs
    return runs.seen_as(views)


def is_about(claim: Claim, runs: Iterable[Run]) -> bool:
    """Whether some run has the claim's two models, or its subject measured without a baseline."""
    for run in map(whole, runs):
        arms: dict[Arm, list[Cell]] = {"baseline": [], "candidate": []}
        for cell in run.manifest.cells:
            arms[cell.arm].append(cell)
        alone = is_alone(run) or not arms["baseline"]
        if any(names_pair(claim, one, other.checkpoint) for one in arms["baseline"] for other in arms["candidate"]):
            return True
        if alone and any(names_subject(claim, one.checkpoint) for one in arms["candidate"]):
            return True
    return False


def _names(name: str, checkpoint: Checkpoint) -> bool:
    digests = (checkpoint.digest, checkpoint.identity)
    by_digest = len(name) >= MIN_DIGEST and any(digest.startswith(name.lower()) for digest in digests)
    return by_digest or name in (checkpoint.name, checkpoint_name(checkpoint)) or _names_on_hub(name, checkpoint)


def _names_on_hub(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a claim's ``org/name`` or ``org/name@revision`` is a checkpoint of the hub.

    Without a revision it is the model at any. A revision is the one that was asked for, or the beginning of a commit.
    """
    if not checkpoint.source.startswith(HUB):
        return False
    repo, at, wanted = name.removesuffix(tower_suffix(checkpoint)).partition("@")
    asked_repo, _, asked = checkpoint.source.removeprefix(HUB).partition("@")
    if repo != asked_repo or (at and not wanted):
        return False
    commit = checkpoint.revision or ""
    return not at or wanted == asked or bool(HEX.fullmatch(wanted) and commit.startswith(wanted.lower()))


def cell_fits(claim: Claim, cell: Cell) -> bool:
    wanted, decoder = claim.point.decoder, cell.decoder
    if not names_subject(claim, cell.checkpoint) or decoder.kind != wanted.kind:
        return False
    if claim.point.dtype not in (None, cell.checkpoint.dtype):
        return False
    if any(name not in decoder.params or decoder.params[name] != value for name, value in wanted.params.items()):
        return False
    return all(value in UNSTATED for value in unnamed(claim, decoder).values())


def unnamed(claim: Claim, decoder: DecoderSpec) -> dict[str, object]:
    """The decoder parameters that a claim's point does not name, apart from those without effect on answers."""
    named = (*claim.point.decoder.params, *WITHOUT_EFFECT)
    return {name: value for name, value in decoder.params.items() if name not in named}


def timing_fits(claim: Claim, point: SpeedPoint) -> bool:
    """Whether a point has the claim's batch size, devices, workload and, where it names any, timed tasks."""
    return workload_fits(claim, point.candidate.workload) and tasks_fit(claim, point.tasks)


def workload_fits(claim: Claim, workload: Workload) -> bool:
    point = claim.point
    sent: RequestKind | None = workload.requests
    if point.requests == "closed" and workload.num_devices is None and workload.batch_size == 1:
        sent = "closed"  # one request at a time is a closed loop of one
    asked = (point.batch_size, point.num_devices, point.workload, point.requests, point.request_rate)
    return asked == (workload.batch_size, workload.num_devices, workload.kind, sent, workload.request_rate)


def tasks_fit(claim: Claim, timed_tasks: Iterable[str]) -> bool:
    return not claim.point.timed_tasks or set(claim.point.timed_tasks) == set(timed_tasks)


def _machines(point: SpeedPoint, evidence: Evidence) -> list[JsonObject]:
    return [run.manifest.machine for run in evidence.runs if run.manifest.run_id in point.run_ids]


def hardware_fits(claim: Claim, machines: Iterable[JsonObject]) -> bool:
    """Whether every device of these machines is the claim's hardware, where it names any."""
    if claim.point.hardware is None:
        return True
    described: list[str] = []
    for machine in machines:
        devices: Any = machine.get("devices", [])
        described += [str(device.get("name", device)) for device in devices]
    return bool(described) and all(claim.point.hardware.lower() in text.lower() for text in described)


def measured_points(claim: Claim, evidence: Evidence) -> int:
    """Number of different operating points of the claim's subject in all runs."""
    points: list[QualityPoint | SpeedPoint] = [*evidence.quality, *evidence.speed]
    return len({point.key for point in points if names_subject(claim, subject_of(point))})


def subject_of(point: QualityPoint | SpeedPoint) -> Checkpoint:
    """The candidate's weights."""
    return point.candidate.checkpoint


def is_equal_by_construction(claim: Claim, point: QualityPoint, own: OtherScore | WholeScore | None = None) -> bool:
    """Whether one computation scored both arms on the claim's whole scope, so that their scores cannot differ."""
    if own is not None:
        return claim.quantity == "score_difference" and own.is_equal
    comparing = claim.quantity in ("retention", "score_difference")
    scoring = all(task.baseline > 0 for task in point.tasks if task.name in claim.scope)
    return comparing and scoring and bool(claim.scope) and set(claim.scope) <= set(point.equal_tasks)


def tasks_judged(claim: Claim, point: QualityPoint) -> tuple[str, ...]:
    """The tasks that a claim is about: its scope; for a decoder-exercised retention, those that the decoder answers."""
    every = claim.quantity != "decoder_exercised_retention"
    return tuple(task.name for task in point.tasks if task.name in claim.scope and (every or task.exercises_decoder))


def standings(claim: Claim, point: QualityPoint) -> tuple[stats.Standing, ...]:
    """Per task of a retention, whether the baseline is above chance; empty for other quantities."""
    if claim.quantity not in RETENTIONS or point.scores is None:
        return ()
    level, tasks = claim.limits.above_chance_level, tasks_judged(claim, point)
    return stats.standings(point.scores.table, level=level, tasks=tasks)


def quality_estimate(
    claim: Claim, point: QualityPoint, own: OtherScore | WholeScore | None = None, *, level: float = DECISION_LEVEL
) -> Estimate:
    """The claim's quantity over its own scope, with an interval at ``level``. NoEstimate where it cannot be computed.

    ``own``: the score outside retention that the claim is about, if any.
    """
    if own is not None:
        return own.score_at(level) if claim.quantity == "score" else own.difference_at(level)
    scope = tasks_judged(claim, point)
    if point.scores is None or not scope:
        raise NoEstimate("no task in scope is scored through the candidate's decoder")
    scores = subset(point.scores, [i for i, group in enumerate(point.scores.groups) if group in scope])
    if claim.quantity == "score":
        if len(scope) > 1:
            raise NoEstimate("a score is of one task or one group: for several tasks, claim a retention")
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
    """The claimed speedup; where the arms' output lengths differ much, also the other kind of speedup."""
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
    """The judged and the claimed speedup that the A/A null is compared with; never per device."""
    if claim.quantity != "speedup_time_per_device" or claim.expected is None:
        return estimate, claim.expected
    judged = _speedup(point, "time")
    return judged, claim.expected * judged.value / _scaled(claim, point, judged).value


def kept_of(claim: Claim, point: QualityPoint, estimate: Estimate | None) -> float | None:
    """The candidate's share of the baseline's score on a claim's scope; ``None`` where the baseline scores 0."""
    if claim.quantity in RETENTIONS:
        return None if estimate is None else estimate.value
    here = [task for task in point.tasks if task.name in claim.scope]
    baseline = sum(task.baseline for task in here)
    return sum(task.candidate for task in here) / baseline if baseline > 0 else None


def kept_at(point: QualityPoint) -> float:
    """The same over all tasks that the candidate's decoder answers; 0 where the baseline scores 0."""
    here = [task for task in point.tasks if task.exercises_decoder]
    baseline = sum(task.baseline for task in here)
    return sum(task.candidate for task in here) / baseline if baseline > 0 else 0.0
