"""Frames of retention: by task, by measurement, and other scores beside it. ``measurement`` is the place of a
QualityPoint in ``runs.quality``, from 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from twotower_eval.analyse.compare.documents import truncated_by_task
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import OtherScore, QualityPoint, TaskQuality
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.report.rendering import frame_of
from twotower_eval.analyse.report.text import Row, ends, measured_columns, operating_point, outputs_columns
from twotower_eval.records import MEAN

TASK, MEMBER, AVERAGE = "task", "member", "average"  # levels
TRUNCATED = ("baseline_num_truncated", "candidate_num_truncated")  # empty where it was not counted


@dataclass(frozen=True, kw_only=True)
class QualityFrames:
    """The frames of the quality section."""

    by_task: pd.DataFrame
    others: pd.DataFrame
    points: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """By the name of their CSV files; a group's members are no tasks of their own and have another file."""
        level = self.by_task["level"]
        tasks = self.by_task[level != MEMBER].drop(columns="group", errors="ignore")
        members = self.by_task[level == MEMBER].dropna(axis="columns", how="all")
        return {
            "retention_points": self.points,
            "other_scores": self.others,
            "retention": tasks,
            "retention_members": members,
        }


def quality_frames(runs: Runs) -> QualityFrames:
    """The frames of all measurements of retention."""
    return QualityFrames(by_task=by_task(runs), others=other_scores(runs), points=retention_points(runs))


def by_task(runs: Runs) -> pd.DataFrame:
    """Of every measurement of retention: its tasks, each followed by its members, then its averages (in brackets)."""
    return frame_of(
        {**_measurement(point), **row, "measurement": number}
        for number, point in enumerate(runs.quality, start=1)
        for row in (*_task_rows(point, truncated_by_task(runs, point)), *_average_rows(point))
    )


def _measurement(point: QualityPoint) -> Row:
    return {
        "run": point.run_id,
        "complete": point.complete,
        **operating_point(point.candidate),
        **outputs_columns(point.candidate),
    }


def _task_rows(point: QualityPoint, cut: Mapping[str, tuple[int, int]]) -> Iterator[Row]:
    """Each task with its members behind it. ``cut``: prompts that were cut, by name, where they were counted."""
    for task in point.tasks:
        yield {
            "task": task.name,
            "metric": task.metric,
            "filter": task.filter,
            "scored_by": " + ".join(task.scored_by),
            "num_documents": task.num_documents,
            "num_clusters": task.num_clusters,
            "baseline_mean": task.baseline,
            "candidate_mean": task.candidate,
            **measured_columns("retention", task.retention),
            "chance": task.standing.chance,
            "baseline_stands": task.standing.stand,
            "baseline_less_chance_low": task.standing.low,
            "baseline_less_chance_high": task.standing.high,
            "baseline_less_chance_level": task.standing.level,
            **measured_columns("retention_above_chance", task.above_chance),
            "equal_by_construction": task.equal_by_construction,
            "num_lost": task.flips.num_lost,
            "num_gained": task.flips.num_gained,
            "p_holm": task.flips.p_holm,
            **_cut_columns(cut, task.name),
            "level": TASK,
            "num_tasks": None,
            "num_members": len(task.members),
            "by_size": task.by_size,
            "exercises_decoder": task.exercises_decoder,
        }
        for name, num_documents, baseline, candidate in task.members:
            yield {
                "task": name,
                "group": task.name,
                "num_documents": num_documents,
                "baseline_mean": baseline,
                "candidate_mean": candidate,
                **_cut_columns(cut, name),
                "level": MEMBER,
                "exercises_decoder": task.exercises_decoder,
            }


def _cut_columns(cut: Mapping[str, tuple[int, int]], name: str) -> Row:
    return dict(zip(TRUNCATED, cut.get(name, (None, None)), strict=True))


def _average_rows(point: QualityPoint) -> Iterator[Row]:
    """Averages over tasks, with the means that they divide; ``chance`` counts 0 for a task without options."""
    everything = Measured(estimate=None, reason="not computed for this average")
    exercised = [task for task in point.tasks if task.exercises_decoder]
    averages = {
        "headline": (point.headline, point.chance.headline, point.tasks),
        "decoder_exercised": (point.exercised, point.chance.exercised, exercised),
        "mean_of_ratios": (point.mean_of_ratios, everything, point.tasks),
        "headline_clearly_above_chance": (point.chance.clear_headline, everything, _clear(point.tasks)),
        "decoder_exercised_clearly_above_chance": (point.chance.clear_exercised, everything, _clear(exercised)),
    }
    for name, (found, above, used) in averages.items():
        chances = [task.standing.chance or 0.0 for task in used]
        yield {
            "task": f"({name})",
            "num_documents": sum(task.num_documents for task in used),
            "baseline_mean": _average([task.baseline for task in used]),
            "candidate_mean": _average([task.candidate for task in used]),
            "chance": _average(chances) if any(chances) else None,
            **measured_columns("retention", found),
            **measured_columns("retention_above_chance", above),
            "level": AVERAGE,
            "num_tasks": len(used),
            "exercises_decoder": point.all_exercise_decoder,
        }


def _average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _clear(tasks: Sequence[TaskQuality]) -> list[TaskQuality]:
    return [task for task in tasks if task.standing.is_clear]


def other_scores(runs: Runs) -> pd.DataFrame:
    """One row for each score beside retention, of every measurement; a mean has no interval in either arm alone."""
    return frame_of(
        {
            "run": point.run_id,
            "complete": point.complete,
            **operating_point(point.candidate),
            **outputs_columns(point.candidate),
            "task": score.task,
            "metric": score.metric,
            "filter": score.filter,
            "scored_by": " + ".join(score.scored_by),
            "higher_is_better": score.higher_is_better,
            "num_documents": score.num_documents,
            **(_whole_columns(score) if isinstance(score, WholeScore) else _mean_columns(score)),
            "measurement": number,
        }
        for number, point in enumerate(runs.quality, start=1)
        for score in _scores_beside(point)
    )


def _scores_beside(point: QualityPoint) -> Iterator[OtherScore | WholeScore]:
    yield from point.others
    yield from point.wholes


def _mean_columns(score: OtherScore) -> Row:
    none = Measured(estimate=None, reason="only the difference of means has an interval")
    difference, retention = Measured(estimate=score.difference), Measured(estimate=None, reason="no headline score")
    return {
        "aggregation": MEAN,
        "baseline": score.baseline,
        "candidate": score.candidate,
        **ends("baseline", none),
        **ends("candidate", none),
        **measured_columns("difference", difference),
        **measured_columns("retention", retention),
        "equal_by_construction": score.difference.method_kind == "equal_by_construction",
    }


def _whole_columns(score: WholeScore) -> Row:
    difference = score.difference.estimate
    return {
        "aggregation": score.aggregation,
        "baseline": score.baseline.value,
        "candidate": score.candidate.value,
        **ends("baseline", score.baseline_interval),
        **ends("candidate", score.candidate_interval),
        **measured_columns("difference", score.difference),
        **measured_columns("retention", score.retention),
        "equal_by_construction": difference is not None and difference.method_kind == "equal_by_construction",
    }


def retention_points(runs: Runs) -> pd.DataFrame:
    """One row for each measurement of retention: its averages over tasks."""
    rows = []
    for point in runs.quality:
        ends = [ratio for _, ratio in point.leave_one_out]
        low, high = (ends[0], ends[-1]) if len(ends) > 1 else (None, None)
        rows.append(
            {
                "run": point.run_id,
                "operating_point": runs.name(point.candidate),
                **operating_point(point.candidate),
                "timed": point.timed,
                "batch_size": point.candidate.workload.batch_size,
                "num_tasks": len(point.tasks),
                "num_documents": sum(task.num_documents for task in point.tasks),
                **measured_columns("headline", point.headline),
                **measured_columns("headline_above_chance", point.chance.headline),
                **measured_columns("decoder_exercised", point.exercised),
                **measured_columns("mean_of_ratios", point.mean_of_ratios),
                "leaving_one_out_low": low,
                "leaving_one_out_high": high,
            }
        )
    return frame_of(rows)
