"""A few small tables of plain text that sum up runs: what the command line shows at the end of a verb."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import QualityPoint, checkpoint_name
from twotower_eval.analyse.compare.runs import Runs, TimedAlone
from twotower_eval.analyse.compare.several import baseline_name, strongest
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report.alone import model_name, scores
from twotower_eval.analyse.report.quality_frames import AVERAGE, TASK, by_task
from twotower_eval.analyse.report.rendering import Raw, measured_at, raw_rows
from twotower_eval.analyse.report.text import NONE, count, rate, retention, significant, times
from twotower_eval.analyse.words import INVALID
from twotower_eval.names import plural
from twotower_eval.records import Workload
from twotower_eval.rules import load_text

HEADLINE = "(headline)"  # the row of the average that is quoted


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts. The first ``num_left`` columns are words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_left: int = 1


def tables(runs: Runs) -> tuple[Table, ...]:
    """The tables that there is anything for: quality by task, then all points, then models measured alone.

    The numbers are those of a report.
    """
    found = [*_by_task(runs), *_points(runs), *_scored_alone(runs), *_timed_alone(runs)]
    return tuple(table for table in found if table.rows)


def _by_task(runs: Runs) -> Iterator[Table]:
    """Quality at the point that a report begins with, task by task and on average."""
    point = runs.shown.quality or next(iter(runs.quality), None)
    if point is None:
        return
    number = next(i for i, one in enumerate(runs.quality, start=1) if one is point)
    rows = [row for row in raw_rows(by_task(runs)) if row["measurement"] == number]
    shown = [row for row in rows if row["level"] == TASK]
    average = [row for row in rows if row["level"] == AVERAGE and row["task"] == HEADLINE and row["num_tasks"] > 1]
    outputs = f"timed answers, batch {point.candidate.workload.batch_size}" if point.timed else "whole tasks"
    baseline = runs.baseline if runs.baselines else checkpoint_name(point.baseline.checkpoint)
    compared = f"{checkpoint_name(point.candidate.checkpoint)} against {baseline}"
    yield Table(
        title=f"Quality at {runs.name(point.candidate)}: {compared} ({outputs})",
        header=("task", "n", "baseline", "candidate", "retention [95 %]"),
        rows=tuple(_task_row(row) for row in (*shown, *average)),
    )


def _task_row(row: Raw) -> tuple[str, ...]:
    name = row["task"] if row["level"] == TASK else f"mean of {plural(int(row['num_tasks']), 'task')}"
    means = (NONE if row[arm] is None else significant(row[arm], 4) for arm in ("baseline_mean", "candidate_mean"))
    return (name, count(int(row["num_documents"])), *means, retention(measured_at(row, "retention")))


def _points(runs: Runs) -> Iterator[Table]:
    """Every operating point, once for each way in which it was timed."""
    found: list[tuple[QualityPoint | None, SpeedPoint | None]] = []
    marked: dict[int, str] = {}  # the strongest of several baselines, by the timing against it
    for key in runs.points:
        timed: list[SpeedPoint | None] = [point for point in runs.speed if point.key == key]
        for speed in timed or [None]:
            each = runs.each_baseline(key, speed)
            found += [(one.quality, one.speed) for one in each] or [(runs.quality_at(key), speed)]
            if (best := strongest(each)) is not None:
                marked[id(best.speed)] = " (strongest)"
    if not runs.speed:
        if len(found) > 1:
            several = bool(runs.baselines)
            yield Table(
                title="All operating points",
                header=("point", *(["baseline"] if several else []), "n", "retention [95 %]"),
                rows=tuple(_quality(runs, quality, several) for quality, _ in found if quality),
                num_left=1 + several,
            )
        return
    several = len({baseline_name(point.baseline) for _, point in found if point}) > 1
    yield Table(
        title="Speed (baseline / candidate)",
        header=(
            *("point", *(["baseline"] if several else []), "workload, batch", "retention [95 %]", "speedup [95 %]"),
            *("A/A null [99 %]", "useful tokens/s", "answers/s"),
        ),
        rows=tuple(
            _speed(runs, quality, speed, [baseline_name(speed.baseline) + marked.get(id(speed), "")] if several else [])
            for quality, speed in found
            if speed
        ),
        num_left=2 + several,
    )


def _quality(runs: Runs, point: QualityPoint, several: bool) -> tuple[str, ...]:
    num = sum(task.num_documents for task in point.tasks)
    whose = [baseline_name(point.baseline)] if several else []
    return (runs.name(point.candidate), *whose, count(num), retention(point.headline))


def _speed(runs: Runs, quality: QualityPoint | None, point: SpeedPoint, baseline: Sequence[str]) -> tuple[str, ...]:
    marked = f" {INVALID}" if point.invalid and point.time.estimate else ""
    return (
        runs.name(point.candidate),
        *baseline,
        _load(point.candidate.workload),
        NONE if quality is None else retention(quality.headline),
        times(point.time) + marked,
        times(point.null),
        _both(point.baseline_rate, point.candidate_rate),
        _both(point.baseline_answers, point.candidate_answers),
    )


def _load(workload: Workload) -> str:
    """``answer, 8``; of a stream of requests ``answer, 4 requests/s (poisson)``."""
    return f"{workload.kind}, {workload.batch_size or 1 if workload.requests is None else load_text(workload)}"


def _both(*arms: Measured) -> str:
    """``412 / 995``: a figure of both arms."""
    return " / ".join(NONE if one.estimate is None else significant(one.estimate.value) for one in arms)


def _scored_alone(runs: Runs) -> Iterator[Table]:
    """Scores where nothing is compared: of one model, or of the one arm that there is so far."""
    if runs.quality:
        return
    _, frame = scores(runs)
    rows = [row for row in raw_rows(frame) if row["score"] is not None] if not frame.empty else []
    yield Table(
        title="Scores",
        header=("task", "model", "metric", "n", "score [95 %]"),
        rows=tuple(_score_row(row) for row in rows),
        num_left=3,
    )


def _score_row(row: Raw) -> tuple[str, ...]:
    metric = row["metric"] + (f" ({row['filter']})" if row["filter"] != "none" else "")
    ends = [row["score_low"], row["score_high"]]
    interval = "" if None in ends else f" [{', '.join(significant(end, 4) for end in ends)}]"
    num = count(int(row["num_documents"]))
    return (row["task"], row["model"], metric, num, significant(row["score"], 4) + interval)


def _timed_alone(runs: Runs) -> Iterator[Table]:
    yield Table(
        title="Speed of one model alone",
        header=("model", "workload, batch", "useful tokens/s [95 %]", "answers/s [95 %]", "A/A null [99 %]"),
        rows=tuple(_alone_row(one) for one in runs.timed_alone),
        num_left=2,
    )


def _alone_row(one: TimedAlone) -> tuple[str, ...]:
    workload = one.baseline.workload
    marked = f" {INVALID}" if one.null_fault else ""
    return (
        model_name(one.baseline),
        _load(workload),
        rate(one.rate) + marked,
        rate(one.answers),
        times(one.null),
    )
