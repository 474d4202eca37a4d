"""Prompts that lost their beginning because a model had no room for them, as the runs' events tell."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from twotower_eval.analyse.compare.points import PointKey, QualityPoint, point_key
from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject
from twotower_eval.records import Arm
from twotower_eval.store import Run


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Requests of one task in one cell, and how many of them were cut.

    ``num_requests`` is ``None`` in runs that told of cells with cut requests only.
    """

    cell: str
    arm: Arm
    task: str
    num_requests: int | None
    num_truncated: int


def truncated(run: Run) -> list[Truncated]:
    """What a run tells of each of its cells and tasks; nothing where it did not count."""
    found: dict[tuple[str, str], Truncated] = {}
    for event in run.events:
        if event.get("kind") == "truncated":
            one = _truncated(run, event)
            found[one.cell, one.task] = one  # one that was resumed with more documents counted anew
    return list(found.values())


def _truncated(run: Run, event: JsonObject) -> Truncated:
    cell = run.cells.get(str(event.get("cell")))
    told = [event[name] for name in ("num_requests", "num_truncated") if name in event]
    numbers = [number for number in told if isinstance(number, int)]
    if cell is None or not numbers or len(numbers) < len(told):
        raise UserError(f"{run.path}: an event tells of truncated prompts without a cell of the run and their number")
    return Truncated(
        cell=cell.id,
        arm=cell.arm,
        task=str(event.get("task", cell.workload.name)),
        num_requests=numbers[0] if len(numbers) == 2 else None,
        num_truncated=numbers[-1],
    )


def truncated_at(run: Run, key: PointKey, tasks: Collection[str] | None = None) -> list[Truncated]:
    """What is told of the tasks (``None``: all) in the cells of an operating point and in those of the baseline."""
    return [
        one
        for one in truncated(run)
        if (one.arm == "baseline" or point_key(run.cells[one.cell]) == key) and (tasks is None or one.task in tasks)
    ]


def truncated_by_task(runs: Sequence[Run], point: QualityPoint) -> dict[str, tuple[int, int]]:
    """By task and member, how many prompts of baseline and candidate were cut; of tasks where it was counted."""
    run = next(run for run in runs if run.manifest.run_id == point.run_id)
    counted: dict[str, tuple[int, int]] = {}
    for one in truncated_at(run, point.key):
        baseline, candidate = counted.get(one.task, (0, 0))
        baseline = max(baseline, one.num_truncated if one.arm == "baseline" else 0)
        counted[one.task] = baseline, max(candidate, one.num_truncated if one.arm == "candidate" else 0)
    for task in point.tasks:
        members = [counted[name] for name, *_ in task.members if name in counted]
        if members:
            counted[task.name] = sum(baseline for baseline, _ in members), sum(candidate for _, candidate in members)
    return counted
