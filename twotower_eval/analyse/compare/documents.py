"""Document by document: both arms' scores and outputs for the same document at one operating point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twotower_eval.analyse.compare.points import QualityPoint, cells_of
from twotower_eval.records import Generation, GenerationRow, Score
from twotower_eval.store import Run

Key = tuple[str, int]  # task, number


@dataclass(frozen=True, kw_only=True)
class DocumentPair:
    """One document under its headline metric. Outputs are of its first request and sample, of timed answers of the
    first round; ``None`` where a likelihood answered."""

    run_id: str
    task: str
    doc_id: int
    cluster_id: str
    metric: str
    baseline_score: float | None
    candidate_score: float | None
    baseline: Generation | None
    candidate: Generation | None

    @property
    def change(self) -> str | None:
        """``lost`` or ``gained`` by the candidate; ``None`` where the scores are equal or one is missing."""
        if self.baseline_score is None or self.candidate_score is None or self.baseline_score == self.candidate_score:
            return None
        return "lost" if self.candidate_score < self.baseline_score else "gained"


def document_pairs(runs: Sequence[Run], point: QualityPoint) -> list[DocumentPair]:
    """Every document of a point that both arms have a headline score for, by task and number."""
    run = next(run for run in runs if run.manifest.run_id == point.run_id)
    ids = cells_of(run, point)
    scores = [{(s.task, s.doc_id): s for s in run.scores if s.cell in arm and s.headline} for arm in ids]
    outputs = [_first_outputs(run, arm) for arm in ids]
    return list(_joined(run.manifest.run_id, scores, outputs))


def _joined(
    run_id: str, scores: list[dict[Key, Score]], outputs: list[dict[Key, Generation]]
) -> Iterator[DocumentPair]:
    for key in sorted(scores[0].keys() & scores[1].keys()):
        baseline, candidate = scores[0][key], scores[1][key]
        yield DocumentPair(
            run_id=run_id,
            task=key[0],
            doc_id=key[1],
            cluster_id=baseline.cluster_id,
            metric=baseline.metric,
            baseline_score=baseline.value,
            candidate_score=candidate.value,
            baseline=outputs[0].get(key),
            candidate=outputs[1].get(key),
        )


def _first_outputs(run: Run, cells: set[str]) -> dict[Key, Generation]:
    first: dict[Key, GenerationRow] = {}
    for row in run.generations:
        known = first.get((row.task, row.doc_id))
        if row.cell in cells and (known is None or _order(row) < _order(known)):
            first[row.task, row.doc_id] = row
    return {key: row.generation for key, row in first.items()}


def _order(row: GenerationRow) -> tuple[int, int]:
    return (row.request_index, row.repeat)
