"""Timed answers one by one: what each prompt cost in either arm, and what the very same outputs were worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from twotower_eval.analyse.compare.calls import Lane
from twotower_eval.analyse.compare.degenerate import FLAG_NAMES, flags
from twotower_eval.analyse.compare.once import once
from twotower_eval.records import Cell, FinishReason, GenerationRow, Score, SpeedSample
from twotower_eval.store import Run


@dataclass(frozen=True, kw_only=True)
class SampleArm:
    """One arm's answers to one prompt, means over the measured rounds.

    ``wall_s`` is the call's, shared by its batch, ``finish_s`` the prompt's own. ``finish``, ``text`` and
    ``token_ids`` are those of the first round; ``num_different`` counts rounds whose tokens were others. ``flags``
    were raised in any round. ``score`` is ``None`` with ``score_reason``.
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
    """One prompt in both arms. ``metric`` and ``filter`` name the score, ``None`` where there is none."""

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
    """Every prompt that both arms answered in the measured rounds, by task and document; none where no text was kept.

    Baseline and candidate are their calls of the rounds that count.
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
        prompt_id = f"{document[0]}/{document[1]}"
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
