"""A model card's metadata: what was measured as ``model-index`` of the Hugging Face hub, with the sentence to quote.

The YAML is made by huggingface_hub itself, so that ``metadata_load``, the hub and its widgets read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from twotower_eval.analyse.compare.points import QualityPoint, checkpoint_name
from twotower_eval.analyse.compare.runs import Runs, TimedAlone
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report import alone
from twotower_eval.analyse.report.rendering import Raw, raw_rows
from twotower_eval.analyse.report.text import retention, times
from twotower_eval.analyse.report.verdicts import headline_sentence, verdict_line
from twotower_eval.names import plural
from twotower_eval.records import Cell, Estimate
from twotower_eval.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

FILE, TASK_TYPE = "model-card.md", "text-generation"
SPEED = "twotower-eval speed"  # what stands for a data set where prompts were timed


def model_card(runs: Runs, report: str) -> str:
    """Markdown with the metadata in front; ``report`` is the name of the file that the card links to as its source.

    Scores are those of the candidate at the point that the report begins with; of runs without a comparison, of the
    model that was measured alone.
    """
    from huggingface_hub import ModelCardData

    found = list(_compared(runs, report)) if runs.compare else list(_alone(runs, report))
    name = _model_name(runs)
    if not found:
        return f"# {name}\n\nNothing has been scored or timed completely yet.\n"
    data = ModelCardData(model_name=name, eval_results=found, tags=["twotower-eval"])
    lines = [headline_sentence(runs), verdict_line(runs)]
    body = "\n\n".join(line for line in lines if line)
    source = f"Measured with twotower-eval {__version__}; all figures with their intervals: [{report}]({report})."
    return f"---\n{data.to_yaml()}\n---\n\n# Evaluation results\n\n{body}\n\n{source}\n"


def _model_name(runs: Runs) -> str:
    point = runs.shown.quality or runs.shown.speed
    if point is not None:
        return checkpoint_name(point.candidate.checkpoint)
    cells = [cell for run in runs for cell in run.manifest.cells]
    return checkpoint_name(cells[0].checkpoint) if cells else "model"


def _compared(runs: Runs, report: str) -> Iterator[EvalResult]:
    quality, speed = runs.shown.quality, runs.shown.speed
    if quality is not None:
        yield from _scores(runs, quality, report)
    if speed is not None:
        yield from _speed(runs, speed, report)


def _scores(runs: Runs, point: QualityPoint, report: str) -> Iterator[EvalResult]:
    at, against = runs.name(point.candidate), checkpoint_name(point.baseline.checkpoint)
    for task in point.tasks:
        name = f"{task.metric} at {at}"
        args = {"filter": task.filter, "num_documents": task.num_documents, "baseline": task.baseline}
        yield _result(task.name, task.metric, task.candidate, name, report, args)
        if task.retention.estimate is not None:
            kept = f"retention of {against} at {at}: {retention(task.retention)}"
            found = task.retention.estimate
            yield _result(task.name, "retention", found.value, kept, report, _ends(found))
    if len(point.tasks) > 1 and point.headline.estimate is not None:
        kept = f"retention of {against} at {at}: {retention(point.headline)}"
        mean = f"mean of {plural(len(point.tasks), 'task')}"
        yield _result(mean, "retention", point.headline.estimate.value, kept, report, _ends(point.headline.estimate))


def _speed(runs: Runs, point: SpeedPoint, report: str) -> Iterator[EvalResult]:
    """The speedup, unless it must not be quoted."""
    found = point.time.estimate
    if found is None or point.invalid:
        return
    at, against = runs.name(point.candidate), checkpoint_name(point.baseline.checkpoint)
    name = f"speedup in time over {against} at {at}, batch {point.batch_size}: {times(point.time)}"
    args = {**_ends(found), "batch_size": point.batch_size, "workload": point.workload}
    yield _result(SPEED, "speedup", found.value, name, report, args)


def _alone(runs: Runs, report: str) -> Iterator[EvalResult]:
    _, frame = alone.scores(runs)
    for row in raw_rows(frame) if not frame.empty else ():
        if row["score"] is not None:
            name = f"{row['metric']} of {row['model']}"
            yield _result(row["task"], row["metric"], row["score"], name, report, _args(row))
    for one in runs.timed_alone:
        yield from _rate(one, report)


def _args(row: Raw) -> dict[str, object]:
    ends = {} if row["score_low"] is None else {"low": row["score_low"], "high": row["score_high"]}
    return {"filter": row["filter"], "num_documents": int(row["num_documents"]), **ends}


def _rate(one: TimedAlone, report: str) -> Iterator[EvalResult]:
    found = one.rate.estimate
    if found is not None and not one.null_fault:
        name = f"useful tokens per second of {alone.model_name(one.baseline)}, batch {_batch(one.baseline)}"
        yield _result(SPEED, "tokens_per_second", found.value, name, report, _ends(found))


def _batch(cell: Cell) -> int:
    return cell.workload.batch_size or 1


def _ends(estimate: Estimate) -> dict[str, object]:
    return {"low": estimate.low, "high": estimate.high, "level": estimate.level}


def _result(task: str, metric: str, value: float, name: str, report: str, args: Mapping[str, object]) -> EvalResult:
    """One figure; the interval and all else that belongs to it are the metric's arguments."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=TASK_TYPE,
        dataset_type=task,
        dataset_name=task,
        metric_type=metric,
        metric_value=value,
        metric_name=name,
        metric_args=dict(args),
        source_name=f"twotower-eval {__version__}",
        source_url=report,
    )
