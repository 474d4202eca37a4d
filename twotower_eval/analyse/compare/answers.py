"""Whether answers to a prompt repeat: in every round of timing, and timed as they were scored.

A decoder that draws nothing at random gives the same tokens in the same forwards every time. One that does not was
timed on other work than what was scored, or remembers earlier answers. Rounding may change an argmax between two nearly
equal logits. In full precision that is too rare to be seen; in half precision it is not, so there the share of
different answers counts, and their effect on scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from twotower_eval.analyse.compare.clean import paired_difference
from twotower_eval.analyse.compare.figures import Measured, measured, once
from twotower_eval.analyse.compare.points import QualityPoint, cells_of
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.records import (
    CONFIG_FILES,
    ROUNDED,
    Arm,
    Cell,
    Generation,
    GenerationRow,
    PromptTiming,
    Score,
    document_prompt_id,
    draws,
)
from twotower_eval.store import Run

Document = tuple[str, int, int]  # task, number, request


@dataclass(frozen=True, kw_only=True)
class Differing:
    """A prompt whose answers differ, by its id in timed calls; ``position`` is the first different token.

    ``None`` where only hashes of the tokens were kept, and where only the forwards differ (``same_tokens``).
    """

    prompt_id: str
    position: int | None
    same_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class OtherLength:
    """A prompt whose text was read as two different numbers of tokens."""

    prompt_id: str
    num_tokens: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One arm's answers compared with each other. ``reason``: why there were none to compare.

    ``other_prompts`` were timed on another text than they were scored on, ``other_lengths`` on the same text with other
    tokens; neither is compared. ``effect``: mean of the timed scores minus that of the others on the same documents,
    ``None`` where all answers are equal. ``work``: forwards of timed answers over those of equal scored answers.
    """

    arm: Arm
    dtype: str
    num_compared: int
    differing: tuple[Differing, ...] = ()
    other_prompts: tuple[str, ...] = ()
    other_lengths: tuple[OtherLength, ...] = ()
    effect: Measured | None = None
    work: float | None = None
    reason: str | None = None

    @property
    def share(self) -> float:
        """Share of the compared prompts whose answers differ."""
        return len(self.differing) / self.num_compared if self.num_compared else 0.0

    @property
    def is_exact(self) -> bool:
        """Whether the arithmetic is precise enough that rounding does not change tokens."""
        return self.dtype not in ROUNDED


# From round to round


def from_round_to_round(runs: Sequence[Run], point: SpeedPoint) -> tuple[Agreement, ...]:
    """Each arm's answers compared over all rounds, with warm-ups and the baseline's second copy."""
    own = [run for run in runs if run.manifest.run_id in point.run_ids]
    return tuple(
        once(own, ("from round to round", cell.id), partial(_rounds, own, cell))
        for cell in (point.baseline, point.candidate)
    )


def _rounds(runs: Sequence[Run], cell: Cell) -> Agreement:
    if draws(cell):
        return _nothing(cell, "its answers are drawn at random")
    timings: dict[tuple[str, str], list[PromptTiming]] = defaultdict(list)
    for sample in (sample for run in runs for sample in run.speed_of({cell.id})):
        of = sample.launch_id if sample.phase == "probe" else ""  # every launch makes up new prompts of its own
        for prompt in sample.prompts:
            timings[of, prompt.prompt_id].append(prompt)
    again = {key: found for key, found in timings.items() if len(found) > 1}
    if not again:
        return _nothing(cell, "no prompt was timed twice")
    places: dict[str, int] = {}
    for document, rows in _kept(runs, {cell.id}).items():
        places |= _first_place(_prompt_id(document), rows[0].generation, rows[1:])
    differing = []
    for (_, prompt_id), found in sorted(again.items()):
        same_tokens = len({one.tokens_sha256 for one in found}) == 1 and prompt_id not in places
        passes = {(one.num_context_forwards, one.num_denoiser_forwards) for one in found}
        if not same_tokens or len(passes) > 1:
            place = places.get(prompt_id)
            differing.append(Differing(prompt_id=prompt_id, position=place, same_tokens=same_tokens))
    return _agreement(cell, num_compared=len(again), differing=differing)


# Timed as scored


def timed_as_scored(
    runs: Sequence[Run], quality: QualityPoint, speed: SpeedPoint, unlike: Collection[str] = ()
) -> tuple[Agreement, ...]:
    """Each arm's timed answers against its scored ones. ``unlike``: tasks with different budgets."""
    by_id = {run.manifest.run_id: run for run in runs}
    scored, timed = by_id[quality.run_id], [by_id[run_id] for run_id in speed.run_ids]
    arms = zip(cells_of(scored, quality), (speed.baseline, speed.candidate), strict=True)
    return tuple(
        once(
            [scored, *timed],
            ("timed as scored", frozenset(ids), cell.id, frozenset(unlike)),
            partial(_as_scored, scored, ids, timed, cell, unlike),
        )
        for ids, cell in arms
    )


def _as_scored(scored: Run, ids: set[str], timed: Sequence[Run], cell: Cell, unlike: Collection[str]) -> Agreement:
    known = {document: rows for document, rows in _kept([scored], ids).items() if document[0] not in unlike}
    mine = {document: rows for document, rows in _kept(timed, {cell.id}).items() if document in known}
    if draws(cell):
        found = _nothing(cell, "its answers are drawn at random")
        return replace(found, effect=_effect(scored, ids, timed, cell)) if mine else found
    others, lengths = _other_prompts(scored, ids, known, mine)
    left_out = {*others, *(one.prompt_id for one in lengths)}
    compared = {document: rows for document, rows in mine.items() if _prompt_id(document) not in left_out}
    places: dict[str, int] = {}
    for document, rows in sorted(compared.items()):
        places |= _first_place(_prompt_id(document), known[document][0].generation, rows)
    found = _agreement(
        cell,
        num_compared=len(compared),
        differing=[Differing(prompt_id=prompt_id, position=place) for prompt_id, place in places.items()],
    )
    return replace(
        found,
        other_prompts=tuple(others),
        other_lengths=tuple(lengths),
        effect=_effect(scored, ids, timed, cell) if places else None,
        work=_work(
            known, {document: rows for document, rows in compared.items() if _prompt_id(document) not in places}
        ),
        reason=None if compared else _why_none(scored, ids, timed, cell, unlike),
    )


def _why_none(scored: Run, ids: set[str], timed: Sequence[Run], cell: Cell, unlike: Collection[str]) -> str:
    both = _kept([scored], ids).keys() & _kept(timed, {cell.id}).keys()
    budgets = sorted({task for task, *_ in both if task in unlike})
    if budgets:
        return f"{len(both)} documents were both timed and scored, with other budgets of {', '.join(budgets)}"
    return "no document was both timed and scored" if not both else "no document was asked the same both times"


Kept = Mapping[Document, Sequence[GenerationRow]]


def _other_prompts(scored: Run, ids: set[str], known: Kept, mine: Kept) -> tuple[list[str], list[OtherLength]]:
    """Documents with different prompts, and those with the same text in other tokens."""
    hashes: dict[tuple[str, int], set[str]] = defaultdict(set)  # request by request, and of all requests together
    rows: list[GenerationRow | Score] = [*scored.generations_of(ids), *scored.scores_of(ids)]
    for row in rows:
        hashes[row.task, row.doc_id].add(row.prompt_sha256)
    others, lengths = [], []
    for document, timed in sorted(mine.items()):
        length = known[document][0].generation.num_prompt_tokens
        unlike = [row.generation.num_prompt_tokens for row in timed if row.generation.num_prompt_tokens != length]
        if not {row.prompt_sha256 for row in timed} <= hashes[document[:2]]:
            others.append(_prompt_id(document))
        elif unlike:
            lengths.append(OtherLength(prompt_id=_prompt_id(document), num_tokens=(length, unlike[0])))
    return others, lengths


def _work(known: Kept, equals: Kept) -> float | None:
    """Forwards of timed answers over those of scored ones, on documents with the same tokens."""
    scored = sum(_passes(known[document][0].generation) for document in equals)
    timed = sum(_passes(rows[0].generation) for rows in equals.values())
    return timed / scored if scored else None


def _passes(generation: Generation) -> int:
    return generation.num_context_forwards + generation.num_denoiser_forwards


def _effect(scored: Run, ids: set[str], timed: Sequence[Run], cell: Cell) -> Measured:
    """Timed minus other scores, over documents that have both."""
    known, mine = _headline_scores([scored], ids), _headline_scores(timed, {cell.id})
    both = sorted(known.keys() & mine.keys())
    if not both:
        return Measured(estimate=None, reason="no timed answer was scored")
    before, now = ([float(scores[key].value or 0) for key in both] for scores in (known, mine))
    return measured(lambda: paired_difference(before, now, [known[key].cluster_id for key in both]))


def _headline_scores(runs: Iterable[Run], cells: Collection[str]) -> dict[tuple[str, int, str, str], Score]:
    return {
        (score.task, score.doc_id, score.metric, score.filter): score
        for score in (score for run in runs for score in run.scores_of(cells))
        if score.headline and score.value is not None
    }


# Between the arms


def unlike_prompts(runs: Sequence[Run], point: QualityPoint | SpeedPoint) -> tuple[OtherLength, ...]:
    """Prompts that arms with the same tokenizer read as different numbers of tokens; empty where they have two."""
    if not _one_tokenizer(point.baseline, point.candidate):
        return ()
    if isinstance(point, SpeedPoint):
        own = [run for run in runs if run.manifest.run_id in point.run_ids]
        lengths = [_timed_lengths(own, cell.id) for cell in (point.baseline, point.candidate)]
    else:
        [run] = [run for run in runs if run.manifest.run_id == point.run_id]
        lengths = [_scored_lengths(run, ids) for ids in cells_of(run, point)]
    one, other = lengths
    unlike = [prompt_id for prompt_id in sorted(one.keys() & other.keys()) if one[prompt_id] != other[prompt_id]]
    return tuple(OtherLength(prompt_id=p, num_tokens=(one[p], other[p])) for p in unlike)


def _one_tokenizer(baseline: Cell, candidate: Cell) -> bool:
    """Whether both arms read texts with the same files; checkpoints of older runs name none."""
    one, other = (
        {file for file in cell.checkpoint.files if file.name not in CONFIG_FILES} for cell in (baseline, candidate)
    )
    return one == other if one or other else baseline.checkpoint.tower == "context"


def _timed_lengths(runs: Sequence[Run], cell: str) -> dict[str, int]:
    return once(runs, ("timed lengths", cell), lambda: _lengths(runs, cell))


def _lengths(runs: Sequence[Run], cell: str) -> dict[str, int]:
    samples = (sample for run in runs for sample in run.speed_of({cell}))
    return {prompt.prompt_id: prompt.num_prompt_tokens for sample in samples for prompt in sample.prompts}


def _scored_lengths(run: Run, cells: Collection[str]) -> dict[str, int]:
    return {_prompt_id(key): rows[0].generation.num_prompt_tokens for key, rows in _kept([run], cells).items()}


# All


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """First position, from 0, at which two answers differ; the shorter one's length where it begins the other."""
    if one == other:
        return None
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other)) if len(one) != len(other) else None


def _first_place(prompt_id: str, known: Generation, rows: Iterable[GenerationRow]) -> dict[str, int]:
    """By prompt, the first token in which any of its answers differ; empty where none do."""
    places = [first_difference(known.token_ids, row.generation.token_ids) for row in rows]
    found = [place for place in places if place is not None]
    return {prompt_id: min(found)} if found else {}


def _kept(runs: Iterable[Run], cells: Collection[str]) -> dict[Document, list[GenerationRow]]:
    """Generations by document, in the order of their samples or rounds."""
    found: dict[Document, list[GenerationRow]] = defaultdict(list)
    for row in (row for run in runs for row in run.generations_of(cells)):
        found[row.task, row.doc_id, row.request_index].append(row)
    return {document: sorted(rows, key=lambda row: row.repeat) for document, rows in found.items()}


def _prompt_id(document: Document) -> str:
    return document_prompt_id(*document[:2])


def _agreement(cell: Cell, *, num_compared: int, differing: Sequence[Differing]) -> Agreement:
    return Agreement(arm=cell.arm, dtype=cell.checkpoint.dtype, num_compared=num_compared, differing=tuple(differing))


def _nothing(cell: Cell, reason: str) -> Agreement:
    return Agreement(arm=cell.arm, dtype=cell.checkpoint.dtype, num_compared=0, reason=reason)
