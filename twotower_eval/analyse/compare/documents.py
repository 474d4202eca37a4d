"""Document by document: both arms' scores and outputs at one operating point, timed answers one by one, and prompts
that were cut because a model had no room for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from twotower_eval.analyse.compare.calls import Lane
from twotower_eval.analyse.compare.clean import FLAG_NAMES, flags
from twotower_eval.analyse.compare.figures import once
from twotower_eval.analyse.compare.points import PointKey, QualityPoint, cells_of, point_key
from twotower_eval.errors import UserError
from twotower_eval.records import (
    Arm,
    Cell,
    DocumentText,
    FinishReason,
    Generation,
    GenerationRow,
    Score,
    SpeedSample,
    document_prompt_id,
    sha256_text,
)
from twotower_eval.store import Run
from twotower_eval.strict import JsonObject


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Requests of one task in one cell, and how many of them were cut.

    ``num_requests`` is ``None`` in older runs, which recorded only cells with cut requests.
    """

    cell: str
    arm: Arm
    task: str
    num_requests: int | None
    num_truncated: int


def truncated(run: Run) -> list[Truncated]:
    """The cut requests that a run recorded, by cell and task; empty where it did not count them."""
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
    """Cut requests of these tasks (``None``: all) in the cells of an operating point and its baseline."""
    return [
        one
        for one in truncated(run)
        if (one.arm == "baseline" or point_key(run.cells[one.cell]) == key) and (tasks is None or one.task in tasks)
    ]


def truncated_by_task(runs: Sequence[Run], point: QualityPoint) -> dict[str, tuple[int, int]]:
    """By task and member, how many prompts of baseline and candidate were cut; only tasks where they were counted."""
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


Key = tuple[str, int]  # task, number


@dataclass(frozen=True, kw_only=True)
class DocumentPair:
    """One document under its headline metric, in both arms. Outputs are those of its first request and sample, for
    timed answers of the first round; ``None`` for likelihoods. ``…_filtered`` is what the task's filter made of them,
    where that is another text. ``text`` holds question and right answer, where the run keeps them.
    """

    run_id: str
    task: str
    doc_id: int
    cluster_id: str
    metric: str
    baseline_score: float | None
    candidate_score: float | None
    baseline: Generation | None
    candidate: Generation | None
    baseline_filtered: str | None = None
    candidate_filtered: str | None = None
    text: DocumentText | None = None

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
    return list(_joined(run, scores, outputs))


def _joined(run: Run, scores: list[dict[Key, Score]], outputs: list[dict[Key, Generation]]) -> Iterator[DocumentPair]:
    texts = {(one.task, one.doc_id): one for one in run.documents}
    for key in sorted(scores[0].keys() & scores[1].keys()):
        baseline, candidate = scores[0][key], scores[1][key]
        yield DocumentPair(
            run_id=run.manifest.run_id,
            task=key[0],
            doc_id=key[1],
            cluster_id=baseline.cluster_id,
            metric=baseline.metric,
            baseline_score=baseline.value,
            candidate_score=candidate.value,
            baseline=outputs[0].get(key),
            candidate=outputs[1].get(key),
            baseline_filtered=baseline.filtered,
            candidate_filtered=candidate.filtered,
            text=_own(texts.get(key), baseline),
        )


def _own(text: DocumentText | None, score: Score) -> DocumentText | None:
    """A document's texts, if its target is the one that was scored."""
    return text if text is not None and sha256_text(text.target) == score.target_sha256 else None


def _first_outputs(run: Run, cells: set[str]) -> dict[Key, Generation]:
    first: dict[Key, GenerationRow] = {}
    for row in run.generations:
        known = first.get((row.task, row.doc_id))
        if row.cell in cells and (known is None or _order(row) < _order(known)):
            first[row.task, row.doc_id] = row
    return {key: row.generation for key, row in first.items()}


def _order(row: GenerationRow) -> tuple[int, int]:
    return (row.request_index, row.repeat)


@dataclass(frozen=True, kw_only=True)
class SampleArm:
    """One arm's answers to one prompt; numbers are means over the measured rounds.

    ``wall_s`` is the call's, shared by its batch, ``finish_s`` the prompt's own. ``finish``, ``text`` and ``token_ids``
    are those of the first round; ``num_different`` counts rounds with other tokens. ``flags`` were raised in any round.
    ``score`` may be ``None``, with ``score_reason``.
    """

    wall_s: float
    finish_s: float
    num_tokens: float
    num_forwards: float
    finish: FinishReason
    num_rounds: int
    num_different: int
    flags: tuple[str, ...]
    score: float | None
    score_reason: str | None
    text: str | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt in both arms. ``metric`` and ``filter`` name its score; ``None`` without one."""

    task: str
    doc_id: int
    metric: str | None
    filter: str | None
    baseline: SampleArm
    candidate: SampleArm

    @property
    def speedup(self) -> float | None:
        """Seconds of the baseline's calls over the candidate's; one prompt alone, so no interval."""
        return self.baseline.wall_s / self.candidate.wall_s if self.candidate.wall_s > 0 else None


Document = tuple[str, int]


def answer_samples(baseline: Lane, candidate: Lane) -> tuple[Sample, ...]:
    """Every prompt that both arms answered in the measured rounds, by task and document; empty where no text was kept.

    Baseline and candidate are the lanes of the rounds that count.
    """
    scores = [_headline_scores(arm.runs, arm.cell) for arm in (baseline, candidate)]
    arms = [_answers(arm, own) for arm, own in zip((baseline, candidate), scores, strict=True)]
    found = []
    for document in sorted(arms[0].keys() & arms[1].keys()):
        score = next(iter([*scores[0].get(document, []), *scores[1].get(document, [])]), None)
        sample = Sample(
            task=document[0],
            doc_id=document[1],
            metric=score.metric if score else None,
            filter=score.filter if score else None,
            baseline=arms[0][document],
            candidate=arms[1][document],
        )
        found.append(sample)
    return tuple(found)


def _answers(arm: Lane, scores: dict[Document, list[Score]]) -> dict[Document, SampleArm]:
    def made() -> dict[Document, SampleArm]:
        return _arm(_kept(arm.runs, arm.cell, {call.round for call in arm.samples}), arm.samples, scores)

    return once(arm.runs, ("answers", arm), made)


def _arm(
    kept: dict[Document, list[GenerationRow]], calls: Iterable[SpeedSample], scores: dict[Document, list[Score]]
) -> dict[Document, SampleArm]:
    walls: dict[str, list[SpeedSample]] = defaultdict(list)
    for call in calls:
        for prompt in call.prompts:
            walls[prompt.prompt_id].append(call)
    found = {}
    for document, rows in kept.items():
        prompt_id = document_prompt_id(*document[:2])
        if prompt_id in walls:
            found[document] = _sample_arm(prompt_id, rows, walls[prompt_id], scores.get(document, []))
    return found


def _sample_arm(prompt_id: str, rows: list[GenerationRow], calls: list[SpeedSample], scores: list[Score]) -> SampleArm:
    first = rows[0].generation
    prompts = [prompt for call in calls for prompt in call.prompts if prompt.prompt_id == prompt_id]
    values = [score.value for score in scores if score.value is not None]
    raised = {name for row in rows for name in flags(row.generation).names}
    reasons = [score.missing_reason for score in scores if score.value is None]
    return SampleArm(
        wall_s=fmean(call.wall_s for call in calls),
        finish_s=fmean(prompt.finish_s for prompt in prompts),
        num_tokens=fmean(prompt.num_tokens for prompt in prompts),
        num_forwards=fmean(prompt.num_context_forwards + prompt.num_denoiser_forwards for prompt in prompts),
        finish=first.finish,
        num_rounds=len(rows),
        num_different=sum(row.generation.token_ids != first.token_ids for row in rows),
        flags=tuple(name for name in FLAG_NAMES if name in raised),
        score=fmean(values) if values and not reasons else None,
        score_reason=None if values and not reasons else next(iter(reasons), None) or "not scored",
        text=first.text,
        token_ids=first.token_ids,
    )


def _kept(runs: Sequence[Run], cell: Cell, rounds: set[int]) -> dict[Document, list[GenerationRow]]:
    found: dict[Document, list[GenerationRow]] = defaultdict(list)
    for row in (row for run in runs for row in run.generations_of({cell.id}) if row.repeat in rounds):
        found[row.task, row.doc_id].append(row)
    return {document: sorted(rows, key=lambda row: row.repeat) for document, rows in found.items()}


def _headline_scores(runs: Sequence[Run], cell: Cell) -> dict[Document, list[Score]]:
    found: dict[Document, list[Score]] = defaultdict(list)
    for score in (score for run in runs for score in run.scores_of({cell.id}) if score.headline):
        found[score.task, score.doc_id].append(score)
    return found
