"""Scores that lm-eval computes from all documents of a task together, by its own functions: no mean stands for them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, isclose, log

from twotower_eval import stats
from twotower_eval.evidence.measured import Measured, measured
from twotower_eval.records import MEAN, SUMMED_AGGREGATIONS, Aggregate, Estimate, LikelihoodRow, Score
from twotower_eval.store import Run

# Rows of versions that did not name the aggregation: a document's own perplexity stood for its likelihood and weight.
UNNAMED = {
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    "perplexity": "perplexity",
}
CLOSE = 1e-9  # relative; how near a recovered weight must come to the value that was written

Pair = tuple[Score, Score]


@dataclass(frozen=True, kw_only=True)
class WholeScore:
    """One such score in both arms: the number by lm-eval's function, and the same function over resampled documents.

    ``retention`` is only of scores of which more is better.
    """

    task: str
    metric: str
    filter: str
    aggregation: str
    scored_by: str
    higher_is_better: bool
    num_documents: int
    baseline: stats.Figure
    candidate: stats.Figure
    baseline_interval: Measured
    candidate_interval: Measured
    difference: Measured
    retention: Measured


def is_whole(score: Score) -> bool:
    """Whether a row is part of a score of all documents together."""
    return score.aggregation not in (None, MEAN)


def current_scores(run: Run) -> list[Score]:
    """A run's scores, perplexities of older versions with their parts, which its likelihoods still tell."""
    if not any(score.aggregation is None and score.metric in UNNAMED for score in run.scores):
        return run.scores
    likelihoods: dict[tuple[str, str, int], LikelihoodRow] = {}
    anyones: dict[tuple[str, int], list[LikelihoodRow]] = defaultdict(list)
    for row in run.likelihoods:
        likelihoods[row.cell, row.task, row.doc_id] = row
        anyones[row.task, row.doc_id].append(row)
    found = []
    for score in run.scores:
        if score.aggregation is not None or score.metric not in UNNAMED:
            found.append(score)
            continue
        own = likelihoods.get((score.cell, score.task, score.doc_id))
        # Likelihoods of equal tensors were computed for one cell and serve others.
        found.append(_with_parts(score, [own] if own else anyones[score.task, score.doc_id]))
    return found


def _with_parts(score: Score, rows: Sequence[LikelihoodRow]) -> Score:
    if score.value is not None and score.metric == "perplexity":
        if not any(row.request == "loglikelihood" and row.likelihood.logprob_nats == score.value for row in rows):
            return score  # another metric of this name
        return dataclasses.replace(score, aggregation="perplexity", value=None, parts=(score.value, 1.0))
    parts = {part for row in rows if row.request == "loglikelihood_rolling" for part in _weighted(score, row)}
    return dataclasses.replace(
        score,
        aggregation=UNNAMED[score.metric],
        value=None,
        parts=next(iter(parts)) if len(parts) == 1 else None,
        missing_reason=None
        if len(parts) == 1
        else f"{score.metric} needs weights that this run's version did not keep",
    )


def _weighted(score: Score, row: LikelihoodRow) -> Iterator[tuple[float, float]]:
    """Log-likelihood and words or bytes of a document, if they give the value that was written."""
    nats, value = row.likelihood.logprob_nats, score.value
    if value is None or value <= 0 or nats == 0:
        return
    nats_per_unit = value * log(2) if score.metric == "bits_per_byte" else log(value)
    weight = round(-nats / nats_per_unit) if nats_per_unit else 0
    if weight > 0:
        again = -nats / weight / log(2) if score.metric == "bits_per_byte" else exp(-nats / weight)
        if abs(again / value - 1) < CLOSE:
            yield nats, float(weight)


def whole_scores(
    run: Run, pairs: Iterable[Pair], lone: tuple[Iterable[Score], Iterable[Score]], answered_once: set[str]
) -> Iterator[WholeScore]:
    """Every score of all documents together, then those of groups of tasks; each arm's over all that have it there.

    ``lone`` are, by arm, scores of documents that have none in the other.
    """
    made = {(row.cell, row.task, row.metric, row.filter, row.num_documents): row for row in run.aggregates}
    tasks: dict[tuple[str, str, str], tuple[list[Score], list[Score]]] = defaultdict(lambda: ([], []))
    for arm, scores in enumerate(([*(a for a, _ in pairs), *lone[0]], [*(b for _, b in pairs), *lone[1]])):
        for score in filter(is_whole, scores):
            tasks[score.task, score.metric, score.filter][arm].append(score)
    groups: dict[tuple[str, str, str], list[_Resampled]] = defaultdict(list)
    for (task, metric, filter_), here in sorted(tasks.items()):
        arms = [sorted(scores, key=lambda score: score.doc_id) for scores in here]
        own = [made.get((arm[0].cell, task, metric, filter_, len(arm))) if arm else None for arm in arms]
        found = _resampled_arms(arms, own, equal=task in answered_once)
        yield _whole_score(task, found)
        if (group := found.rows[0].group) is not None:
            groups[group, metric, filter_].append(found)
    for (group, *_), members in sorted(groups.items()):
        yield _whole_score(group, _group(members))


@dataclass(frozen=True, kw_only=True)
class _Resampled:
    """A score's rows of one arm that has it, both arms resampled together and each alone, or why not.

    ``sizes`` are the arms' documents, ``num_shared`` those that have it in both.
    """

    rows: Sequence[Score]
    sizes: tuple[int, int]
    num_shared: int
    scored_by: str
    both: stats.WholeScores | str
    singles: Sequence[stats.WholeScores | str]
    own: Sequence[Aggregate | None]
    same: bool


def _resampled_arms(arms: Sequence[Sequence[Score]], own: Sequence[Aggregate | None], *, equal: bool) -> _Resampled:
    documents = [[score.doc_id for score in arm] for arm in arms]
    alike = documents[0] == documents[1]
    both = _resampled(arms, own) if alike else "the task gives it for other documents in one arm than in the other"
    return _Resampled(
        rows=arms[0] or arms[1],
        sizes=(len(arms[0]), len(arms[1])),
        num_shared=len(set(documents[0]) & set(documents[1])),
        scored_by=" + ".join(sorted({score.scored_by for score in arms[1] or arms[0]})),
        both=both,
        singles=[
            _resampled(arms[arm : arm + 1], own[arm : arm + 1]) if isinstance(both, str) else both.alone(arm)
            for arm in (0, 1)
        ],
        own=own,
        same=equal and alike and all(a.parts is not None and a.parts == b.parts for a, b in zip(*arms, strict=True)),
    )


def _group(members: Sequence[_Resampled]) -> _Resampled:
    """Members' mean; missing where one member's score is."""
    rows = [row for member in members for row in member.rows]

    def mean(found: Sequence[stats.WholeScores | str], arm: int) -> stats.WholeScores | str:
        there = [one for one in found if not isinstance(one, str)]
        weights = [float(member.sizes[arm]) if rows[0].by_size else 1.0 for member in members]
        return next((one for one in found if isinstance(one, str)), None) or stats.averaged(there, weights)

    both = mean([member.both for member in members], 0)
    return _Resampled(
        rows=rows,
        sizes=(sum(member.sizes[0] for member in members), sum(member.sizes[1] for member in members)),
        num_shared=sum(member.num_shared for member in members),
        scored_by=" + ".join(sorted({member.scored_by for member in members})),
        both=both,
        singles=[mean([member.singles[arm] for member in members], arm) for arm in (0, 1)],
        own=(None, None),
        same=all(member.same for member in members),
    )


def _whole_score(name: str, found: _Resampled) -> WholeScore:
    first, num_clusters = found.rows[0], len({score.cluster_id for score in found.rows})
    figures = [_figure(single, own) for single, own in zip(found.singles, found.own, strict=True)]
    intervals = [_estimate(single, stats.WholeScores.score) for single in found.singles]
    retention = Measured(estimate=None, reason="less is better")
    if first.higher_is_better:
        known = Measured(estimate=stats.equal_by_construction(1.0, num_clusters))
        retention = known if found.same else _estimate(found.both, stats.WholeScores.retention)
    known = Measured(estimate=stats.equal_by_construction(0.0, num_clusters))
    return WholeScore(
        task=name,
        metric=first.metric,
        filter=first.filter,
        aggregation=str(first.aggregation),
        scored_by=found.scored_by,
        higher_is_better=first.higher_is_better,
        num_documents=found.num_shared,
        baseline=figures[0],
        candidate=figures[1],
        baseline_interval=intervals[0],
        candidate_interval=intervals[1],
        difference=known if found.same else _estimate(found.both, stats.WholeScores.difference),
        retention=retention,
    )


def one_whole(scores: Sequence[Score], run: Run) -> tuple[stats.Figure, Measured]:
    """One arm's score of all documents together, from its rows of one task, metric and filter, and its interval."""
    first = scores[0]
    key = (first.cell, first.task, first.metric, first.filter, len(scores))
    rows = {(row.cell, row.task, row.metric, row.filter, row.num_documents): row for row in run.aggregates}
    own = rows.get(key)
    found = _resampled([scores], [own])
    return _figure(found, own), _estimate(found, stats.WholeScores.score)


def _resampled(arms: Sequence[Sequence[Score]], own: Sequence[Aggregate | None]) -> stats.WholeScores | str:
    """The function over resampled documents, or the reason why there is no such score."""
    if not all(arms):
        return "the task gives it for no document"
    name, clusters = str(arms[0][0].aggregation), [score.cluster_id for score in arms[0]]
    failed = [made.missing_reason or "no reason recorded" for made in own if made is not None and made.value is None]
    if failed:
        return failed[0]
    try:
        if name in SUMMED_AGGREGATIONS:
            return _checked(stats.summed(name, [_parts(arm) for arm in arms], clusters), own)
        values, replicates, seed = [], [], 0
        for made in own:
            if made is None:
                return f"the run has not computed {name} of these documents"
            if made.value is None or made.replicates is None:
                return made.missing_reason or "no reason recorded"
            values.append(made.value)
            replicates.append(made.replicates)
            seed = made.seed
        return stats.replicated(name, values, replicates, len(set(clusters)), seed=seed)
    except ValueError as error:
        return str(error)


def _checked(found: stats.WholeScores, own: Sequence[Aggregate | None]) -> stats.WholeScores:
    """ValueError where parts do not come to lm-eval's own number, as where documents differ in their references."""
    for arm, made in enumerate(own):
        if made is not None and made.value is not None and not isclose(found.value(arm), made.value, rel_tol=1e-6):
            raise ValueError("documents one by one do not come to lm-eval's number of all together")
    return found


def _parts(arm: Sequence[Score]) -> list[tuple[float, ...]]:
    """Of every document: none may be left out."""
    missing = [score for score in arm if score.parts is None]
    if missing:
        where = f"{len(missing)} of {len(arm)} documents"
        raise ValueError(f"{where}: {missing[0].missing_reason or 'no reason recorded'}")
    return [score.parts for score in arm if score.parts is not None]


def _figure(found: stats.WholeScores | str, own: Aggregate | None) -> stats.Figure:
    """lm-eval's own number where the run has it, of these very documents; else what the parts come to."""
    if own is not None and own.value is not None:
        return stats.Figure(value=own.value)
    if isinstance(found, str):
        return stats.Figure(value=None, reason=found)
    try:
        return stats.Figure(value=found.value())
    except ValueError as error:
        return stats.Figure(value=None, reason=str(error))


def _estimate(found: stats.WholeScores | str, compute: Callable[[stats.WholeScores], Estimate]) -> Measured:
    return Measured(estimate=None, reason=found) if isinstance(found, str) else measured(lambda: compute(found))
