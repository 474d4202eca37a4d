"""Scores of the two arms, document by document: which belong together, and what one arm has that the other has not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from twotower_eval.analyse.compare.measured import ArmsDifferError
from twotower_eval.analyse.compare.points import MissingScore
from twotower_eval.analyse.compare.wholes import is_whole
from twotower_eval.records import Cell, Score
from twotower_eval.store import Run

Pair = tuple[Score, Score]
Key = tuple[str, int, str, str]

ARMS = ("baseline", "candidate")
SAME = ("doc_sha256", "prompt_sha256", "target_sha256", "cluster_id", "group", "headline", "chance", "aggregation")
NOT_GIVEN = "the task's own code gives none for this answer"


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Scores of a baseline's and a candidate's cell on the same workload.

    ``lone`` holds, by arm, scores of documents that the other arm answered too, but for whose answer the task's own
    code gave no such metric. ``num_unanswered`` scores wait for the other arm's answer, in runs that did not end.
    """

    pairs: tuple[Pair, ...]
    lone: tuple[tuple[Score, ...], tuple[Score, ...]]
    num_unanswered: int


def paired(run: Run, cells: tuple[Cell, Cell], by_cell: Mapping[str, Sequence[Score]]) -> Pairing:
    """Baseline's and candidate's scores of the same document, metric and filter.

    ArmsDifferError where they cannot be a pair, or where an arm of a run that went to its end lacks an answer.
    """
    by_key = [{_key(score): score for score in by_cell[cell.id]} for cell in cells]
    answered = [{(score.task, score.doc_id) for score in by_cell[cell.id]} for cell in cells]
    one_armed = sorted(by_key[0].keys() ^ by_key[1].keys())
    # Before the end an answer may be there that is not scored yet.
    waiting = [key for key in one_armed if not (run.complete and all(key[:2] in found for found in answered))]
    if waiting and run.complete:
        task, doc_id, metric, _ = waiting[0]
        where = f"task {task!r}, document {doc_id}, metric {metric!r}"
        raise ArmsDifferError(f"run {run.manifest.run_id}: {where} is scored in one arm only: the runs are no pair")
    pairs = tuple((by_key[0][key], by_key[1][key]) for key in sorted(by_key[0].keys() & by_key[1].keys()))
    for pair in pairs:
        _check_alike(run, *pair)
    lone = [key for key in one_armed if key not in set(waiting)]
    baseline, candidate = (tuple(scores[key] for key in lone if key in scores) for scores in by_key)
    return Pairing(pairs=pairs, lone=(baseline, candidate), num_unanswered=len(waiting))


def _key(score: Score) -> Key:
    return (score.task, score.doc_id, score.metric, score.filter)


def _check_alike(run: Run, a: Score, b: Score) -> None:
    for name in SAME:
        if getattr(a, name) != getattr(b, name):
            where = f"run {run.manifest.run_id}: task {a.task!r}, document {a.doc_id}"
            raise ArmsDifferError(f"{where}: {name} differs between baseline and candidate")


def lone_scores(found: Iterable[Pairing]) -> tuple[list[Score], list[Score]]:
    """By arm, what the other arm's answers were not given."""
    pairings = list(found)
    baseline, candidate = ([score for one in pairings for score in one.lone[arm]] for arm in (0, 1))
    return baseline, candidate


def missing_scores(found: Iterable[Pairing]) -> Iterator[MissingScore]:
    """Documents without a value under a metric that is a mean, by arm and reason."""
    groups: dict[tuple[str, str, str, str, bool, str], list[int]] = defaultdict(list)
    for one in found:
        for pair in one.pairs:
            for arm, score in zip(ARMS, pair, strict=True):
                if score.value is None and not is_whole(score):
                    reason = score.missing_reason or "no reason recorded"
                    groups[arm, *_named(score), reason].append(score.doc_id)
        for other, scores in zip(reversed(ARMS), one.lone, strict=True):
            for score in scores:
                if not is_whole(score):
                    groups[other, *_named(score), NOT_GIVEN].append(score.doc_id)
    for (arm, task, metric, filter_, headline, reason), doc_ids in groups.items():
        yield MissingScore(
            arm=arm,
            task=task,
            metric=metric,
            filter=filter_,
            headline=headline,
            reason=reason,
            doc_ids=tuple(doc_ids),
        )


def _named(score: Score) -> tuple[str, str, str, bool]:
    return score.task, score.metric, score.filter, score.headline
