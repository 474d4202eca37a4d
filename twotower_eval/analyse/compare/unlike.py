"""Whether quality and speed at one operating point are of one thing, setting by setting and task by task.

Two runs may share weights and decoder and still differ in what was asked: another baseline, another budget, other
tasks. Each such difference is a record; what it means for a claim is for its reader to say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from twotower_eval.analyse.compare.points import OtherScore, QualityPoint, cells_of
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.records import Arm, Cell, Scalar
from twotower_eval.store import Run


@dataclass(frozen=True, kw_only=True)
class Unlike:
    """A setting that two measurements do not share, with its value in each; ``arm`` is ``None`` for both arms'."""

    setting: str
    values: tuple[Scalar, Scalar]
    arm: Arm | None = None


@dataclass(frozen=True, kw_only=True)
class TimedTasks:
    """What was timed against what a quality is over: ``beyond`` it, and what is generated in it but was not timed.

    ``timed`` is empty in runs whose prompts do not say of which task they are.
    """

    timed: tuple[str, ...]
    beyond: tuple[str, ...]
    untimed: tuple[str, ...]


def unlike_settings(one: QualityPoint | SpeedPoint, other: QualityPoint | SpeedPoint) -> tuple[Unlike, ...]:
    """Settings of either arm that two points do not share."""
    arms = ((one.baseline, other.baseline), (one.candidate, other.candidate))
    return tuple(found for pair in arms for found in _unlike_cells(*pair))


def _unlike_cells(one: Cell, other: Cell) -> Iterator[Unlike]:
    mine, others = _settings(one), _settings(other)
    for setting in {**mine, **others}:
        if mine.get(setting) != others.get(setting):
            yield Unlike(arm=one.arm, setting=setting, values=(mine.get(setting), others.get(setting)))


def _settings(cell: Cell) -> dict[str, Scalar]:
    """All that decides an answer, apart from what is asked: kernels of another kind of device round otherwise, too.

    Checkpoints and plug-ins of older runs know of no files.
    """
    checkpoint, decoder = cell.checkpoint, cell.decoder
    found: dict[str, Scalar] = {"tensors": checkpoint.digest, "tower": checkpoint.tower, "dtype": checkpoint.dtype}
    found |= {file.name: file.sha256 for file in checkpoint.files}
    found |= {"device type": checkpoint.devices[0].split(":")[0], "decoder": decoder.kind, "version": decoder.version}
    found |= {f"code {file.name}": file.sha256 for file in decoder.code or ()}
    return {**found, **decoder.params}


def unlike_budgets(runs: Sequence[Run], quality: QualityPoint, speed: SpeedPoint) -> dict[str, tuple[int, int]]:
    """Timed tasks that were scored with another budget, each with both.

    A timed cell knows its largest budget alone. Where neither plan sets one, tasks have their own, and one within
    their range is theirs.
    """
    by_id = {run.manifest.run_id: run for run in runs}
    scored, timed = by_id[quality.run_id], by_id[speed.run_ids[0]]
    largest = speed.candidate.workload.max_new_tokens
    budgets = {
        scored.cells[cell].workload.name: scored.cells[cell].workload.max_new_tokens
        for cell in cells_of(scored, quality)[1]
    }
    here = {task: budgets[task] for task in speed.tasks if task in budgets}
    known = {task: budget for task, budget in here.items() if budget is not None}
    if quality.timed or largest is None or not known:
        return {}
    unset = scored.manifest.plan.get("max_new_tokens") is None and timed.manifest.plan.get("new_tokens") is None
    if unset and min(known.values()) <= largest <= max(known.values()):
        return {}
    return {task: (budget, largest) for task, budget in sorted(known.items()) if budget != largest}


def tasks_against(timed: Collection[str], quality: Sequence[QualityPoint], scope: Collection[str]) -> TimedTasks:
    """Timed tasks against those in scope, which may be groups: which are beyond it, and which generate but are missing.

    Of a group one timed member is enough. A task that no answer is generated for cannot be timed.
    """
    members = {name: leaves for point in quality for name, leaves in _members(point) if name in scope}
    generated = {name for point in quality for name in _generated(point)}
    inside = {*scope, *(leaf for leaves in members.values() for leaf in leaves)}
    untimed = [name for name in scope if name in generated and not {name, *members.get(name, ())} & set(timed)]
    return TimedTasks(
        timed=tuple(timed),
        beyond=tuple(task for task in timed if task not in inside),
        untimed=tuple(untimed) if timed else (),
    )


def _members(point: QualityPoint) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from ((task.name, tuple(name for name, *_ in task.members)) for task in point.tasks)
    yield from ((one.task, one.members) for one in _other_scores(point))


def _generated(point: QualityPoint) -> Iterator[str]:
    ways = [(task.name, task.scored_by) for task in point.tasks]
    ways += [(one.task, one.scored_by) for one in _other_scores(point)]
    yield from (name for name, scored_by in ways if "generation" in scored_by)


def _other_scores(point: QualityPoint) -> list[OtherScore | WholeScore]:
    return [*point.others, *point.wholes]
