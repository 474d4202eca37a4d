"""The tables of a report as CSV files: raw numbers with their units in the column names, nothing rounded.

An empty field is a number that does not exist; where there is a reason, it stands in a column of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import pandas as pd

from twotower_eval.analyse.claims.terms import own_limits
from twotower_eval.analyse.compare.clean import flags
from twotower_eval.analyse.compare.documents import DocumentPair, document_pairs, truncated_by_task
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import OtherScore, QualityPoint, TaskQuality
from twotower_eval.analyse.compare.runs import Runs, is_alone
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.tradeoff import Curve, curves
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.report import alone
from twotower_eval.analyse.report.rendering import csv, frame_of
from twotower_eval.analyse.report.text import (
    Row,
    count_columns,
    ends,
    measured_columns,
    operating_point,
    speed_findings,
    within_columns,
)
from twotower_eval.analyse.report.verdicts import JudgedRuns
from twotower_eval.analyse.words import finding_text
from twotower_eval.records import MEAN, Cell, Check, CostSample, Generation

TRUNCATED = ("baseline_num_truncated", "candidate_num_truncated")  # empty where it was not counted


def tables(runs: Runs) -> dict[str, bytes]:
    """File name -> CSV, for every table that has a row."""
    found = {
        "retention.csv": [row for point in runs.quality for row in _retention(point, truncated_by_task(runs, point))],
        "other_scores.csv": [row for point in runs.quality for row in _others(point)],
        "forwards.csv": [_forwards(point) for point in runs.quality if point.counts.num_prompts],
        "aup.csv": [row for curve in curves(runs, runs.quality) for row in _aup(curve)],
        "speed.csv": [_speed(runs, point) for point in runs.speed],
        "documents.csv": [_sample(p, s) for p in runs.quality for s in document_pairs(runs, p)],
        "flips.csv": [_flip(p, s) for p in runs.quality for s in document_pairs(runs, p) if s.change],
        "answers.csv": [row for point in runs.speed for row in _answers(point)],
        "verdicts.csv": _verdicts(runs),
        "scores_alone.csv": [row for run in runs if is_alone(run) for row in alone.score_rows(run)],
        "speed_alone.csv": [alone.speed_row(one) for one in runs.timed_alone],
        "costs.csv": [row for run in runs for row in _costs(run.manifest.run_id, run.cells, run.costs)],
        "checks.csv": [
            {"run": run.manifest.run_id, **operating_point(run.cells[check.cell]), **_check(check)}
            for run in runs
            for check in run.checks
        ],
    }
    return {name: csv(frame_of(rows)) for name, rows in found.items() if rows}


def speed_frame(runs: Runs, points: Sequence[SpeedPoint]) -> pd.DataFrame:
    """One row for each timed point: speedups, what they rest on, and what they cost."""
    return frame_of(_speed(runs, point) for point in points)


def _outputs(point: QualityPoint) -> Row:
    return {"outputs": "timed" if point.timed else "whole_tasks", "batch_size": point.candidate.workload.batch_size}


def _retention(point: QualityPoint, cut: Mapping[str, tuple[int, int]]) -> Iterator[Row]:
    start = {"run": point.run_id, "complete": point.complete, **operating_point(point.candidate), **_outputs(point)}
    for task in point.tasks:
        yield {
            **start,
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
            **dict(zip(TRUNCATED, cut.get(task.name, (None, None)), strict=True)),
        }
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
        columns = {**measured_columns("retention", found), **measured_columns("retention_above_chance", above)}
        num_documents = sum(task.num_documents for task in used)
        yield {**start, "task": f"({name})", "num_documents": num_documents, **columns}


def _clear(tasks: Sequence[TaskQuality]) -> list[TaskQuality]:
    return [task for task in tasks if task.standing.is_clear]


def _others(point: QualityPoint) -> Iterator[Row]:
    """Scores beside retention; intervals of either arm only of scores of all documents together."""
    scores: list[OtherScore | WholeScore] = [*point.others, *point.wholes]
    for score in scores:
        yield {
            "run": point.run_id,
            "complete": point.complete,
            **operating_point(point.candidate),
            **_outputs(point),
            "task": score.task,
            "metric": score.metric,
            "filter": score.filter,
            "scored_by": " + ".join(score.scored_by),
            "higher_is_better": score.higher_is_better,
            "num_documents": score.num_documents,
            **(_whole_columns(score) if isinstance(score, WholeScore) else _mean_columns(score)),
        }


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
    }


def _whole_columns(score: WholeScore) -> Row:
    return {
        "aggregation": score.aggregation,
        "baseline": score.baseline.value,
        "candidate": score.candidate.value,
        **ends("baseline", score.baseline_interval),
        **ends("candidate", score.candidate_interval),
        **measured_columns("difference", score.difference),
        **measured_columns("retention", score.retention),
    }


def _serial(point: SpeedPoint) -> Row:
    """How much rounds depend on their neighbours, and what the interval of the speedup in time makes of it."""
    serial = point.serial
    return {
        "lag1_correlation": serial.lag1 if serial else None,
        "lag1_correlation_bound": serial.lag1_bound if serial else None,
        "effective_rounds": serial.effective_rounds if serial else None,
        "serial_widening": serial.widening if serial else None,
        "serial_block_rounds": serial.block if serial else None,
    }


def _forwards(point: QualityPoint) -> Row:
    """What the scored answers cost, both arms."""
    return {
        "run": point.run_id,
        "complete": point.complete,
        **operating_point(point.candidate),
        **_outputs(point),
        **count_columns("baseline", point.baseline_counts),
        **count_columns("candidate", point.counts),
    }


def _aup(curve: Curve) -> Iterator[Row]:
    """A curve's points, each with what the curve comes to."""
    for point in curve.points:
        yield {
            "run": curve.run_id,
            **operating_point(point.candidate),
            "task": curve.task,
            "metric": curve.metric,
            "accuracy_percent": point.accuracy,
            "best_accuracy_percent": curve.best,
            **count_columns("candidate", point.counts),
            "aup_by_nfe": curve.aup,
            "aup_by_nfe_and_commit": curve.aup_with_commits,
            "aup_by_all_forwards": curve.aup_with_all,
        }


def _speed(runs: Runs, point: SpeedPoint) -> Row:
    return {
        "runs": " ".join(point.run_ids),
        "complete": point.complete,
        **operating_point(point.candidate),
        "workload": point.workload,
        "batch_size": point.batch_size,
        "num_rounds": point.num_rounds,
        "num_calls": point.num_calls,
        "num_launches": point.num_launches,
        **_serial(point),
        **measured_columns("time_speedup", point.time),
        **measured_columns("throughput_speedup", point.throughput),
        **measured_columns("length_ratio", point.length),
        **measured_columns("geometric_speedup", point.geometric),
        **measured_columns("baseline_against_itself", point.null),
        **measured_columns("baseline_tokens_per_s", point.baseline_rate),
        **measured_columns("candidate_tokens_per_s", point.candidate_rate),
        **count_columns("baseline", point.baseline_counts),
        **count_columns("candidate", point.counts),
        **within_columns("baseline", point.baseline_within),
        **within_columns("candidate", point.within),
        "baseline_latency_median_s": point.baseline_latency.median_s,
        "baseline_latency_p95_s": point.baseline_latency.p95_s,
        "candidate_latency_median_s": point.latency.median_s,
        "candidate_latency_p95_s": point.latency.p95_s,
        "baseline_degenerate_share": point.flagged.baseline,
        "candidate_degenerate_share": point.flagged.candidate,
        "warnings": "; ".join(map(finding_text, speed_findings(point))),
        "operating_point": runs.name(point.candidate),
        "workload_name": point.candidate.workload.name,
        "invalid": point.invalid,
        "resamples_launches": None if point.serial is None else point.serial.launches,
        **measured_columns("time_speedup_per_device", point.time_per_device),
    }


def _sample(point: QualityPoint, sample: DocumentPair) -> Row:
    return {
        "run": sample.run_id,
        **operating_point(point.candidate),
        **_outputs(point),
        "task": sample.task,
        "doc_id": sample.doc_id,
        "cluster": sample.cluster_id,
        "metric": sample.metric,
        "baseline_score": sample.baseline_score,
        "candidate_score": sample.candidate_score,
        "change": sample.change,
        **_output("baseline", sample.baseline),
        **_output("candidate", sample.candidate),
    }


def _output(arm: str, made: Generation | None) -> Row:
    return {
        f"{arm}_num_tokens": None if made is None else made.num_tokens,
        f"{arm}_num_context_forwards": None if made is None else made.num_context_forwards,
        f"{arm}_num_denoiser_forwards": None if made is None else made.num_denoiser_forwards,
        f"{arm}_finish": None if made is None else made.finish,
        f"{arm}_flags": None if made is None else " ".join(flags(made).names),
    }


def _flip(point: QualityPoint, sample: DocumentPair) -> Row:
    texts = {"baseline_text": sample.baseline, "candidate_text": sample.candidate}
    return {
        "run": sample.run_id,
        **operating_point(point.candidate),
        **_outputs(point),
        "task": sample.task,
        "doc_id": sample.doc_id,
        "change": sample.change,
        "baseline_score": sample.baseline_score,
        "candidate_score": sample.candidate_score,
        **{name: None if made is None else made.text for name, made in texts.items()},
    }


def _answers(point: SpeedPoint) -> Iterator[Row]:
    """Timed answers one by one: what the very same outputs cost and were worth, means over rounds."""
    for sample in point.samples:
        row = {
            "runs": " ".join(point.run_ids),
            **operating_point(point.candidate),
            "batch_size": point.batch_size,
            "task": sample.task,
            "doc_id": sample.doc_id,
            "speedup": sample.speedup,
        }
        for arm, found in (("baseline", sample.baseline), ("candidate", sample.candidate)):
            row |= {
                f"{arm}_wall_s": found.wall_s,
                f"{arm}_finish_s": found.finish_s,
                f"{arm}_num_tokens": found.num_tokens,
                f"{arm}_num_forwards": found.num_forwards,
                f"{arm}_num_rounds": found.num_rounds,
                f"{arm}_score": found.score,
                f"{arm}_flags": " ".join(found.flags),
            }
        yield row


def _verdicts(runs: Runs) -> list[Row]:
    return [
        {
            "claim": claim.name,
            "outcome": verdict.outcome,
            "scope": verdict.scope,
            "num_launches": verdict.num_launches,
            "quantity": claim.quantity,
            "relation": claim.relation,
            "expected": claim.expected,
            "margin": claim.margin,
            "limits": " ".join(f"{name}={own:g}" for name, (own, _) in own_limits(claim).items()),
            **measured_columns("measured", Measured(estimate=verdict.estimate)),
            **measured_columns("measured_above_chance", Measured(estimate=verdict.above_chance)),
            "tasks_near_chance": " ".join(verdict.near_chance),
            "reason": verdict.reason,
            "runs": " ".join(verdict.evidence),
            "num_points": verdict.num_points,
            "num_looks": verdict.num_looks,
            "declared_looks": claim.looks,
            "judged_at": verdict.level,
            "runs_not_given": " ".join(verdict.not_given),
            "source": claim.source,
        }
        for claim, verdict in (runs.verdicts if isinstance(runs, JudgedRuns) else ())
    ]


def _costs(run_id: str, cells: Mapping[str, Cell], measured: Sequence[CostSample]) -> Iterator[Row]:
    """Each part of decoding once: the median over rounds of its seconds per repeat."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for cost in measured:
        if cost.phase == "measure":
            sizes = (cost.batch_size, cost.context_tokens, cost.block_size, cost.routing, cost.pattern, cost.num_steps)
            groups.setdefault((cost.cell, cost.part, cost.replica, *sizes), []).append(cost.wall_s / cost.num_repeats)
    names = ("part", "replica", "batch_size", "context_tokens", "block_size_timed", "routing", "pattern", "num_steps")
    for (cell, *rest), times_s in groups.items():
        yield {
            "run": run_id,
            **operating_point(cells[cell]),
            **dict(zip(names, rest, strict=True)),
            "num_rounds": len(times_s),
            "median_s": median(times_s),
            "least_s": min(times_s),
            "most_s": max(times_s),
        }


def _check(check: Check) -> Row:
    return {name: getattr(check, name) for name in ("name", "outcome", "value", "limit", "detail")}
