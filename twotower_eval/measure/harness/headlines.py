"""What the terminal says of scores: each task's figure when it is done, and at the end that of every group.

Figures are lm-eval's, without an interval: reports have those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from twotower_eval.measure.suites import BuiltTask
from twotower_eval.records import Aggregate, Cell, Score


@dataclass(frozen=True, kw_only=True)
class TaskFigure:
    """A task's score in one cell, under the metric that stands for it.

    It is over ``num_documents``, and ``num_without`` more have no value. ``value`` is ``None`` where there is none,
    for ``reason`` if one is known.
    """

    task: BuiltTask
    cell: Cell
    value: float | None
    num_documents: int
    num_without: int = 0
    reason: str | None = None

    @property
    def arm(self) -> str:
        """Which arm it is of, and how that decodes."""
        return f"{self.cell.arm} {self.cell.decoder.label}"


def task_figure(task: BuiltTask, cell: Cell, scores: Sequence[Score], aggregates: Sequence[Aggregate]) -> TaskFigure:
    """A mean of documents' values, or by lm-eval's own function where that is no mean."""
    chosen = (task.metric, task.filter)
    for made in aggregates:
        if (made.metric, made.filter) == chosen:
            num, reason = made.num_documents, made.missing_reason
            return TaskFigure(task=task, cell=cell, value=made.value, num_documents=num, reason=reason)
    values = [score.value for score in scores if (score.metric, score.filter) == chosen]
    numbers = [value for value in values if value is not None]
    mean = sum(numbers) / len(numbers) if numbers else None
    without = len(values) - len(numbers)
    return TaskFigure(task=task, cell=cell, value=mean, num_documents=len(numbers), num_without=without)


def headline_text(figure: TaskFigure) -> str:
    """``acc 0.25 over 8 documents``."""
    metric = figure.task.metric
    if figure.value is None:
        return f"{metric} without a value" + (f" ({figure.reason})" if figure.reason else "")
    without = f", {figure.num_without} more without a value" if figure.num_without else ""
    return f"{metric} {figure.value:.4g} over {figure.num_documents} documents{without}"


def group_lines(figures: Iterable[TaskFigure]) -> Iterator[str]:
    """``group g_macro, baseline autoregressive(...): acc 0.1667, mean of 2 tasks``, for each group and arm."""
    groups: dict[tuple[str, str], list[TaskFigure]] = defaultdict(list)
    for figure in figures:
        if figure.task.group is not None:
            groups[figure.task.group, figure.arm].append(figure)
    for (group, arm), members in groups.items():
        yield f"group {group}, {arm}: {_group_text(members)}"


def _group_text(members: Sequence[TaskFigure]) -> str:
    """lm-eval's figure: the mean over its members, by their documents or all alike; none where one has none."""
    task = members[0].task
    without = [member.task.name for member in members if member.value is None]
    if without:
        return f"{task.metric} without a value ({without[0]} has none)"
    weights = [member.num_documents if task.by_size else 1 for member in members]
    values = [member.value for member in members if member.value is not None]
    mean = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    noun = "task" if len(members) == 1 else "tasks"
    return f"{task.metric} {mean:.4g}, mean of {len(members)} {noun}{' by their documents' if task.by_size else ''}"
