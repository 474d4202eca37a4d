"""Frames of what was measured, row by row: documents, timed answers, costs of parts, checks.

Raw numbers with their units in the column names, nothing rounded. A missing value is a number that does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import pandas as pd

from twotower_eval.analyse.compare.clean import flags
from twotower_eval.analyse.compare.documents import DocumentPair, document_pairs
from twotower_eval.analyse.compare.points import QualityPoint
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report.answers import all_flips
from twotower_eval.analyse.report.rendering import frame_of
from twotower_eval.analyse.report.text import Row, operating_point, outputs_columns
from twotower_eval.records import Cell, Check, CostSample, Generation


def tables(runs: Runs) -> dict[str, pd.DataFrame]:
    """What was measured, row by row, by the name of the CSV file; what sections show is in their own tables."""
    return {
        "documents": frame_of(_document(p, pair) for p in runs.quality for pair in document_pairs(runs, p)),
        "flips": all_flips(runs),
        "answers": frame_of(row for point in runs.speed for row in _answers(point)),
        "costs": frame_of(row for run in runs for row in _costs(run.manifest.run_id, run.cells, run.costs)),
        "checks": frame_of(
            {"run": run.manifest.run_id, **operating_point(run.cells[check.cell]), **_check(check)}
            for run in runs
            for check in run.checks
        ),
    }


def _document(point: QualityPoint, sample: DocumentPair) -> Row:
    return {
        "run": sample.run_id,
        **operating_point(point.candidate),
        **outputs_columns(point.candidate),
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
