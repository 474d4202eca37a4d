"""Chance scores of a run's documents; retention above chance, and retention without tasks near chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.figures import PERCENT, Measured, measured
from twotower_eval.records import Score
from twotower_eval.store import Run

RANKED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # right where one option of several comes first
SHARE = replace(PERCENT, most=PERCENT.decimals)  # more only where a baseline would look like its chance
NOT_CLEAR = "the baseline is not clearly above chance"


@dataclass(frozen=True, kw_only=True)
class AgainstChance:
    """Every task against chance; retention above chance; and retention without the tasks that are not clearly above it.

    ``exercised`` and ``clear_exercised`` are over the tasks that the candidate's decoder answers.
    """

    standings: tuple[stats.Standing, ...]
    headline: Measured
    exercised: Measured
    clear_headline: Measured
    clear_exercised: Measured

    @property
    def has_options(self) -> bool:
        """Whether any task can be guessed at."""
        return any(one.chance is not None for one in self.standings)

    @property
    def unclear(self) -> tuple[stats.Standing, ...]:
        """Tasks whose baseline is not clearly above chance, or is zero."""
        return tuple(one for one in self.standings if not one.is_clear)


def against_chance(
    table: stats.ScoreTable,
    draws: stats.Draws,
    standings: tuple[stats.Standing, ...],
    exercising: Sequence[str],
    equal: Sequence[str],
) -> AgainstChance:
    """Both figures for all tasks and for those that the decoder answers; ``equal`` tasks are equal by construction."""
    headline, clear_headline = _averages(table, draws, standings, equal)
    by_decoder = [one for one in standings if one.task in exercising]
    exercised, clear_exercised = _averages(table, draws, by_decoder, equal)
    return AgainstChance(
        standings=standings,
        headline=headline,
        exercised=exercised,
        clear_headline=clear_headline,
        clear_exercised=clear_exercised,
    )


def _averages(
    table: stats.ScoreTable, draws: stats.Draws, standings: Sequence[stats.Standing], equal: Sequence[str]
) -> tuple[Measured, Measured]:
    """Retention above chance over these tasks, and retention over those clearly above it."""
    tasks, kept = [one.task for one in standings], [one.task for one in standings if one.is_clear]
    guessed = any(one.chance is not None for one in standings)
    if not kept:
        none = Measured(estimate=None, reason="no task's baseline is clearly above chance")
        return none, none
    found = []
    for rule, used in ((stats.retention_above_chance if guessed else stats.retention, tasks), (stats.retention, kept)):
        weights_K = table.weights_K(used)
        if set(used) <= set(equal):
            num_clusters = stats.num_discordant(table, weights_K)[1]
            found.append(Measured(estimate=stats.equal_by_construction(1.0, num_clusters)))
        else:
            found.append(measured(partial(rule, table, draws, weights_K)))
    return found[0], found[1]


def chances(run: Run, scores: Sequence[Score]) -> list[float]:
    """The chance score of each score's document; 0 where no options are listed.

    A document without options in a task that has some counts like the others.
    """
    options = _num_options(run)
    known = [_chance(score, options) for score in scores]
    by_task: dict[str, list[float]] = defaultdict(list)
    for score, chance in zip(scores, known, strict=True):
        if chance is not None:
            by_task[score.task].append(chance)
    mean = {task: sum(found) / len(found) for task, found in by_task.items()}
    return [
        mean.get(score.task, 0.0) if chance is None else chance for score, chance in zip(scores, known, strict=True)
    ]


def _chance(score: Score, num_options: Mapping[tuple[str, int], int]) -> float | None:
    """The row's own chance; for older versions, one over the number of scored options.

    That assumes one right option; with several it is too low, and older rows do not show that.
    """
    if score.chance is not None or score.metric not in RANKED:
        return score.chance
    num = num_options.get((score.task, score.doc_id), 0)
    return 1 / num if num > 1 else None


def _num_options(run: Run) -> dict[tuple[str, int], int]:
    """Options scored by likelihood, by task and document; for mutual information each was scored twice."""
    requests: dict[tuple[str, int], set[int]] = defaultdict(set)
    for row in run.likelihoods:
        if row.request == "loglikelihood":
            requests[row.task, row.doc_id].add(row.request_index)
    twice = {score.task for score in run.scores if score.metric == "acc_mutual_info"}
    return {key: len(asked) // (2 if key[0] in twice else 1) for key, asked in requests.items()}
