"""Accuracy under parallelism (AUP): one number for a decoder's whole curve of accuracy over tokens per forward.

Points of one curve differ in threshold and steps alone, or in other numbers of a decoder's own but its block size and
temperature, on one task of one run. In their order of tokens per forward, rho_1 < rho_2 < ..., with accuracies y in
percent:

    AUP = rho_1 y_1 + sum over i > 1 of (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2
    W(y) = min(1, exp(-3 (1 - y / y_max)))

Points more than 5 points of accuracy below the first are left out. ``y_max`` is the best accuracy that anything in the
run has on the task, the baseline included. Tokens per forward are counted in three ways, with a number for each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from twotower_eval.analyse.compare.counts import Counts, count
from twotower_eval.analyse.compare.naming import number
from twotower_eval.analyse.compare.points import QualityPoint, TaskQuality, point_key
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Cell, DecoderSpec, Generation, canonical_json
from twotower_eval.store import Run

STEEPNESS = 3.0
MAX_LOSS = 5.0  # points of accuracy below the curve's first point
KEPT = ("block_size", "temperature")  # numbers that are the same all along a curve


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One decoder setting on one task: its accuracy in percent, and the counts of the very answers that it is of."""

    candidate: Cell
    accuracy: float
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Settings of one decoder on one task of one run; ``best`` is the best accuracy there, in percent.

    ``aup`` counts denoiser forwards, ``aup_with_commits`` these and commits, ``aup_with_all`` prefills as well; each
    is ``None`` where some point has no such count. ``num_left_out`` of the first are too inaccurate.
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
    """(tokens per forward, accuracy in percent) in order, without those that lie too far below the first."""
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
    """Tasks whose scores are shares of what the decoder wrote."""
    return (
        task for task in point.tasks if task.scored_by == ("generation",) and max(task.baseline, task.candidate) <= 1
    )


def _family(point: QualityPoint) -> str:
    """What a curve's points share: all but what is swept."""
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
