"""Quality against speed over operating points: which points can share a line, the Pareto front, and accuracy under
parallelism (AUP).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any

from twotower_eval.analyse.compare.figures import Counts, count
from twotower_eval.analyse.compare.points import (
    QualityPoint,
    TaskQuality,
    checkpoint_name,
    number,
    point_key,
    setting,
    unusual,
)
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Cell, DecoderSpec, Estimate, GateLimits, Generation, WorkloadKind, canonical_json
from twotower_eval.store import Run

if TYPE_CHECKING:
    from twotower_eval.analyse.compare.points import PointKey, QualityPoint
    from twotower_eval.analyse.compare.timing import SpeedPoint


@dataclass(frozen=True, kw_only=True)
class MeasuredOn:
    """What a figure was measured on; equal records can share a line. ``kind`` is ``task`` for whole tasks.

    ``num_documents`` were scored over ``num_tasks``, or ``num_calls`` were timed; the others are ``None``. ``same``
    holds everything else that has to be equal.
    """

    kind: WorkloadKind
    batch_size: int | None
    run_ids: tuple[str, ...]
    num_tasks: int | None = None
    num_documents: int | None = None
    num_calls: int | None = None
    same: str

    @property
    def wanted(self) -> tuple[int, ...]:
        """Sort key: whole tasks first, then more tasks, then answers before fixed lengths."""
        kind = ("task", "answer", "fixed").index(self.kind)
        sizes = (self.num_tasks or 0, self.num_documents or 0, self.num_calls or 0)
        return (kind, *(-size for size in sizes[:2]), self.batch_size or 0, -sizes[2])


def scored_on(point: QualityPoint) -> MeasuredOn:
    """Documents, tasks, ways of scoring and outputs that a retention rests on."""
    tasks = [[task.name, task.metric, task.filter, task.scored_by] for task in point.tasks]
    baseline = point.baseline.checkpoint
    return MeasuredOn(
        kind=point.candidate.workload.kind,
        batch_size=point.candidate.workload.batch_size,
        run_ids=(point.run_id,),
        num_tasks=len(point.tasks),
        num_documents=sum(task.num_documents for task in point.tasks),
        same=canonical_json([point.documents_sha256, tasks, baseline.identity, baseline.dtype]),
    )


def timed_on(point: SpeedPoint) -> MeasuredOn:
    """Prompts, workload, batch, devices, baseline and runs that a speedup rests on."""
    return MeasuredOn(
        kind=point.candidate.workload.kind,
        batch_size=point.batch_size,
        run_ids=point.run_ids,
        num_calls=point.num_calls,
        same=canonical_json([point.baseline.id, point.candidate.workload.digest, point.candidate.workload.num_devices]),
    )


def any_run(found: MeasuredOn) -> MeasuredOn:
    """The same without the run: scores do not depend on it."""
    return dataclasses.replace(found, run_ids=())


@dataclass(frozen=True, kw_only=True)
class PointFigure:
    """One figure of one operating point. ``invalid``: its timing must not be read as a speedup."""

    candidate: Cell
    on: MeasuredOn
    value: float
    estimate: Estimate | None = None
    invalid: bool = False


@dataclass(frozen=True, kw_only=True)
class Series:
    """Figures over one setting that can share a line, each with its value; ``label`` is what they share."""

    label: str
    on: MeasuredOn
    figures: tuple[tuple[float, PointFigure], ...]

    @property
    def joined(self) -> bool:
        """Whether a line joins the figures."""
        return len(self.figures) > 1

    @property
    def crossed(self) -> bool:
        """Whether any timing among them is INVALID."""
        return any(figure.invalid for _, figure in self.figures)


def families(name: str, candidates: Iterable[Cell]) -> dict[str, str]:
    """Labels of the families of operating points, by key: what they share apart from the setting ``name``."""
    cells = {family_key(name, cell): cell for cell in candidates if number(cell.decoder, name) is not None}
    models = {_model(cell)[:2]: checkpoint_name(cell.checkpoint) for cell in cells.values()}
    names = Counter(models.values())
    dtypes = len({cell.checkpoint.dtype for cell in cells.values()}) > 1
    found = {}
    for key, cell in cells.items():
        name_of, own = checkpoint_name(cell.checkpoint), cell.checkpoint.identity[:8]
        whose = [name_of if names[name_of] == 1 else f"{name_of} {own}"] if len(models) > 1 else []
        whose += [cell.checkpoint.dtype] if dtypes else []
        found[key] = ": ".join([*([", ".join(whose)] if whose else []), _label(name, cell.decoder)])
    return found


def family_key(name: str, cell: Cell) -> str:
    """An operating point without the setting ``name``; steps may follow the block size."""
    params = {key: value for key, value in cell.decoder.params.items() if key != name}
    if name != "steps_per_block" and "block_size" in cell.decoder.params:
        follows = setting(cell.decoder, "steps_per_block") == setting(cell.decoder, "block_size")
        params["steps_per_block"] = "auto" if follows else setting(cell.decoder, "steps_per_block")
    code = [[file.name, file.sha256] for file in cell.decoder.code or ()]
    return canonical_json([_model(cell), cell.decoder.kind, cell.decoder.version, code, params])


def _model(cell: Cell) -> tuple[str, str | None, str]:
    return (cell.checkpoint.identity, cell.checkpoint.tower, cell.checkpoint.dtype)


def _label(name: str, decoder: DecoderSpec) -> str:
    parts = []
    if "block_size" not in decoder.params:
        return ", ".join(unusual(decoder, without=(name,))) or decoder.kind
    if name != "block_size":
        parts.append(f"block {setting(decoder, 'block_size')}")
    if name != "steps_per_block":
        steps = setting(decoder, "steps_per_block")
        parts.append("steps = block" if steps == setting(decoder, "block_size") else f"{steps} steps")
    if name != "threshold" and "threshold" in decoder.params:
        parts.append(f"threshold {decoder.params['threshold']:g}")
    return ", ".join([*parts, *unusual(decoder, without=(name,))])


def series(name: str, label: str, figures: Sequence[PointFigure]) -> tuple[Series, ...]:
    """One family's figures over a setting, grouped by what they were measured on.

    The most telling measurements come first; others follow only where they have further points.
    """
    groups: dict[MeasuredOn, dict[float, PointFigure]] = {}
    for figure in figures:
        value = number(figure.candidate.decoder, name)
        assert value is not None, "families are of decoders that have the setting"
        groups.setdefault(figure.on, {})[value] = figure
    found: list[Series] = []
    seen: set[float] = set()
    for on in sorted(groups, key=lambda on: (on.wanted, -len(groups[on]), on.run_ids, on.same)):
        if groups[on].keys() <= seen:
            continue
        seen |= groups[on].keys()
        found.append(Series(label=label, on=on, figures=tuple(sorted(groups[on].items()))))
    return tuple(found)


BROKEN = GateLimits().min_retention  # broken: the whole interval of retention lies below it


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """One operating point: its box of two intervals, and why it may not count among the others.

    ``on_front``: by the estimates, no other point, the baseline included, is at least as good in both and better in
    one. Points with an ``invalid`` timing are never on the front and beat no other.
    """

    key: PointKey
    candidate: Cell
    retention: Estimate
    speedup: Estimate
    invalid: bool
    broken: bool
    uneven: bool
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Points that were timed alike, with retentions on the same documents and the same kind of outputs.

    ``same_outputs``: retention of the timed outputs themselves, else of whole tasks.
    """

    workload: str
    batch_size: int
    same_outputs: bool
    scored: MeasuredOn
    timed: MeasuredOn
    run_ids: frozenset[str]
    points: tuple[TradeOff, ...]


def front(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """For each (retention, speedup) whether it is on the Pareto front; equal points are on it together."""
    return tuple(not any(_beats(other, point) for other in points) for point in points)


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def is_fast_and_broken(retention: Estimate, speedup: Estimate) -> bool:
    """Faster than the baseline by its estimate, and with an upper bound of retention below ``BROKEN``."""
    return speedup.value > 1 and retention.high < BROKEN


def panels(speed: Iterable[SpeedPoint], quality: Sequence[QualityPoint]) -> tuple[Panel, ...]:
    """A panel for each way of timing in which some point has both estimates."""
    alike: dict[MeasuredOn, list[SpeedPoint]] = {}
    for point in speed:
        if point.time.estimate is not None:
            alike.setdefault(timed_on(point), []).append(point)
    found = (_panel(on, alike[on], quality) for on in sorted(alike, key=_order))
    return tuple(panel for panel in found if panel is not None)


def _order(on: MeasuredOn) -> tuple[object, ...]:
    return (on.kind, on.batch_size, on.run_ids, on.same)


def _panel(on: MeasuredOn, timed: Sequence[SpeedPoint], quality: Sequence[QualityPoint]) -> Panel | None:
    """The kind of retention that most points have, as two kinds cannot share a front."""
    kinds: dict[MeasuredOn, dict[str, QualityPoint]] = {}
    for point in timed:
        for one in quality:
            if one.key == point.key and one.headline.estimate is not None and _is_of(one, point):
                kinds.setdefault(any_run(scored_on(one)), {})[point.candidate.id] = one
    if not kinds:
        return None
    scored = max(kinds, key=lambda kind: (len(kinds[kind]), kind.kind != "task", kind.num_tasks, kind.num_documents))
    kept = kinds[scored]
    points = [point for point in timed if point.candidate.id in kept]
    return Panel(
        workload=timed[0].workload,
        batch_size=timed[0].batch_size,
        same_outputs=scored.kind != "task",
        scored=scored,
        timed=on,
        run_ids=frozenset(i for p in points for i in (*p.run_ids, kept[p.candidate.id].run_id)),
        points=_trade_offs(points, [kept[point.candidate.id] for point in points]),
    )


def _is_of(quality: QualityPoint, point: SpeedPoint) -> bool:
    """Whether a retention is that of the timed outputs themselves, or of whole tasks."""
    same = quality.candidate.id == point.candidate.id and quality.run_id in point.run_ids
    return same or not quality.timed


def _trade_offs(timed: Sequence[SpeedPoint], quality: Sequence[QualityPoint]) -> tuple[TradeOff, ...]:
    boxes = []
    for speed, kept in zip(timed, quality, strict=True):
        assert kept.headline.estimate is not None
        assert speed.time.estimate is not None
        boxes.append((kept.headline.estimate, speed.time.estimate))
    valid = [not point.invalid for point in timed]
    corners = [(retention.value, speedup.value) for (retention, speedup), ok in zip(boxes, valid, strict=True) if ok]
    best = {corner for corner, on in zip(corners, front([*corners, (1.0, 1.0)]), strict=False) if on}
    return tuple(
        TradeOff(
            key=point.key,
            candidate=point.candidate,
            retention=box[0],
            speedup=box[1],
            invalid=not ok,
            broken=is_fast_and_broken(*box),
            uneven=point.lengths_differ,
            on_front=ok and (box[0].value, box[1].value) in best,
        )
        for point, box, ok in zip(timed, boxes, valid, strict=True)
    )


STEEPNESS = 3.0
MAX_LOSS = 5.0  # points of accuracy below the curve's first point
KEPT = ("block_size", "temperature")  # numbers that are the same all along a curve


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One decoder setting on one task: its accuracy in percent, with the counts of the same answers."""

    candidate: Cell
    accuracy: float
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Settings of one decoder on one task of one run; ``best`` is the best accuracy there, in percent.

    ``aup`` counts denoiser forwards, ``aup_with_commits`` these and commits, ``aup_with_all`` prefills as well; each is
    ``None`` where some point lacks the count. ``num_left_out`` points are too inaccurate for the first.
    """

    run_id: str
    task: str
    metric: str
    best: float
    points: tuple[CurvePoint, ...]
    aup: float | None
    aup_with_commits: float | None
    aup_with_all: float | None
    num_left_out: int


def kept(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """(tokens per forward, accuracy in percent) in order, without those too far below the first."""
    ordered = sorted(points)
    return [point for point in ordered if point[1] >= ordered[0][1] - MAX_LOSS]


def accuracy_under_parallelism(points: Iterable[tuple[float, float]], best: float) -> float:
    """AUP of (tokens per forward, accuracy in percent); NoEstimate without a point, or where nothing is ever right."""
    curve = kept(points)
    if not curve:
        raise NoEstimate("no point to compute AUP of")
    if best <= 0:
        raise NoEstimate("no accuracy is above 0, so AUP has no scale")
    weighted = [accuracy * min(1.0, exp(-STEEPNESS * (1 - accuracy / best))) for _, accuracy in curve]
    area = curve[0][0] * curve[0][1]
    for i in range(1, len(curve)):
        area += (curve[i][0] - curve[i - 1][0]) * (weighted[i] + weighted[i - 1]) / 2
    return area


def curves(runs: Iterable[Run], quality: Sequence[QualityPoint]) -> tuple[Curve, ...]:
    """Every curve of two points or more, task by task; of whole tasks, since timed answers are of few prompts."""
    found = []
    for run in runs:
        points = [one for one in quality if one.run_id == run.manifest.run_id and not one.timed]
        best: dict[str, float] = defaultdict(float)
        families: dict[tuple[str, str], list[tuple[TaskQuality, CurvePoint]]] = defaultdict(list)
        answers = _answers(run) if points else {}
        for point in points:
            for task in _answered(point):
                best[task.name] = max(best[task.name], 100 * task.baseline, 100 * task.candidate)
                own = CurvePoint(
                    candidate=point.candidate,
                    accuracy=100 * task.candidate,
                    counts=count(_of_task(answers, run, point, task)),
                )
                if own.counts.num_prompts:
                    families[_family(point), task.name].append((task, own))
        found += [_curve(run, own, best[task]) for (_, task), own in families.items() if len(own) > 1]
    return tuple(found)


def _answered(point: QualityPoint) -> Iterator[TaskQuality]:
    """Tasks whose scores are shares of the decoder's answers."""
    return (
        task for task in point.tasks if task.scored_by == ("generation",) and max(task.baseline, task.candidate) <= 1
    )


def _family(point: QualityPoint) -> str:
    """What a curve's points share: everything but the swept settings."""
    decoder = point.candidate.decoder
    params = {name: value for name, value in decoder.params.items() if not is_swept(decoder, name)}
    return canonical_json([*point.key[:-1], decoder.kind, decoder.version, params])


def is_swept(decoder: DecoderSpec, name: str) -> bool:
    """Whether a parameter may differ along a curve."""
    return name not in KEPT and (name == "steps_per_block" or number(decoder, name) is not None)


Answers = dict[tuple[str, str], list[Generation]]  # by cell and task


def _answers(run: Run) -> Answers:
    found: Answers = defaultdict(list)
    for row in run.generations:
        found[row.cell, row.task].append(row.generation)
    return found


def _of_task(answers: Answers, run: Run, point: QualityPoint, task: TaskQuality) -> list[Generation]:
    names = [name for name, *_ in task.members] or [task.name]
    cells = [cell.id for cell in run.manifest.cells if cell.arm == "candidate" and point_key(cell) == point.key]
    return [made for cell in cells for name in names for made in answers.get((cell, name), ())]


def _curve(run: Run, own: Sequence[tuple[TaskQuality, CurvePoint]], best: float) -> Curve:
    points = tuple(sorted((point for _, point in own), key=lambda point: point.counts.tokens_per_nfe or 0.0))
    ways: dict[str, Any] = {
        "aup": [point.counts.tokens_per_nfe for point in points],
        "aup_with_commits": [point.counts.tokens_per_nfe_and_commit for point in points],
        "aup_with_all": [point.counts.tokens_per_forward for point in points],
    }
    accuracies = [point.accuracy for point in points]
    areas = {name: _area(rates, accuracies, best) for name, rates in ways.items()}
    pairs = [(rate or 0.0, accuracy) for rate, accuracy in zip(ways["aup"], accuracies, strict=True)]
    task = own[0][0]
    return Curve(
        run_id=run.manifest.run_id,
        task=task.name,
        metric=task.metric,
        best=best,
        points=points,
        num_left_out=len(pairs) - len(kept(pairs)),
        **areas,
    )


def _area(rates: Sequence[float | None], accuracies: Sequence[float], best: float) -> float | None:
    known = [(rate, accuracy) for rate, accuracy in zip(rates, accuracies, strict=True) if rate is not None]
    return accuracy_under_parallelism(known, best) if len(known) == len(rates) and best > 0 else None
