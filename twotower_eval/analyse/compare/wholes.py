"""Scores that lm-eval computes from all documents of a task together, with its own functions, instead of a mean."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, isclose, log

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.figures import Measured, measured
from twotower_eval.errors import NoEstimate
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
    """One such score in both arms: lm-eval's number, and the same function over resampled documents.

    ``retention`` only for scores of which more is better. ``main``: the task's main score. ``members`` are those of a
    group.
    """

    task: str
    metric: str
    filter: str
    aggregation: str
    scored_by: tuple[str, ...]
    higher_is_better: bool
    num_documents: int
    baseline: stats.Figure
    candidate: stats.Figure
    baseline_interval: Measured
    candidate_interval: Measured
    difference: Measured
    retention: Measured
    main: bool
    members: tuple[str, ...]
    is_equal: bool
    resampled: Resampled

    def score_at(self, level: float) -> Estimate:
        """The candidate's score with its interval at that level; NoEstimate where there is none."""
        return _known(self.resampled.singles[1]).score(level=level)

    def difference_at(self, level: float) -> Estimate:
        """Candidate minus baseline at that level; NoEstimate where there is none."""
        if self.is_equal:
            return stats.equal_by_construction(0.0, self.resampled.num_clusters, level=level)
        return _known(self.resampled.both).difference(level=level)


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """A score's rows of one arm that has it, both arms resampled together and each alone, or why not.

    ``sizes`` are the arms' documents, ``num_shared`` those that have it in both.
    """

    rows: Sequence[Score]
    sizes: tuple[int, int]
    num_shared: int
    scored_by: tuple[str, ...]
    both: stats.WholeScores | str
    singles: Sequence[stats.WholeScores | str]
    own: Sequence[Aggregate | None]
    same: bool
    members: tuple[str, ...] = ()

    @property
    def num_clusters(self) -> int:
        return len({score.cluster_id for score in self.rows})


def _known(found: stats.WholeScores | str) -> stats.WholeScores:
    if isinstance(found, str):
        raise NoEstimate(found)
    return found


def is_whole(score: Score) -> bool:
    """Whether a row is part of a score of all documents together."""
    return score.aggregation not in (None, MEAN)


def current_scores(run: Run) -> list[Score]:
    """A run's scores; perplexities of older versions get their parts from the run's likelihoods."""
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
    """Log-likelihood and words or bytes of a document, if they reproduce the recorded value."""
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
    run: Run, pairs: Sequence[Pair], lone: tuple[Sequence[Score], Sequence[Score]], answered_once: set[str]
) -> Iterator[WholeScore]:
    """Every such score, then those of groups; each arm's over all documents that have it there.

    ``lone``: by arm, scores of documents that have none in the other.
    """
    made = _made(run)
    arms = ([*(a for a, _ in pairs), *lone[0]], [*(b for _, b in pairs), *lone[1]])
    named = whole_groups([*arms[0], *arms[1]])
    tasks: dict[tuple[str, str, str], tuple[list[Score], list[Score]]] = defaultdict(lambda: ([], []))
    for arm, scores in enumerate(arms):
        for score in scores:
            if is_whole(score) or (score.group, score.metric, score.filter) in named:
                tasks[score.task, score.metric, score.filter][arm].append(score)
    groups: dict[tuple[str, str, str], list[Resampled]] = defaultdict(list)
    for (task, metric, filter_), here in sorted(tasks.items()):
        own_arms = [sorted(scores, key=lambda score: score.doc_id) for scores in here]
        own = [made.get((arm[0].cell, task, metric, filter_, len(arm))) if arm else None for arm in own_arms]
        found = _resampled_arms(own_arms, own, equal=task in answered_once)
        if is_whole(found.rows[0]):
            yield _whole_score(task, found)
        if (group := found.rows[0].group) is not None:
            groups[group, metric, filter_].append(found)
    for (group, *_), members in sorted(groups.items()):
        yield _whole_score(group, _group(members))


def whole_groups(scores: Iterable[Score]) -> set[tuple[str | None, str, str]]:
    """Group, metric and filter of figures to which a score of all documents together belongs, if only of one member."""
    return {(score.group, score.metric, score.filter) for score in scores if score.group and is_whole(score)}


def _made(run: Run) -> dict[tuple[str, str, str, str, int], Aggregate]:
    """lm-eval's own numbers, by task, metric and filter."""
    return {(row.cell, row.task, row.metric, row.filter, row.num_documents): row for row in run.aggregates}


def _resampled_arms(arms: Sequence[Sequence[Score]], own: Sequence[Aggregate | None], *, equal: bool) -> Resampled:
    documents = [[score.doc_id for score in arm] for arm in arms]
    alike = documents[0] == documents[1]
    both = _resampled(arms, own) if alike else "the task gives it for other documents in one arm than in the other"
    return Resampled(
        rows=arms[0] or arms[1],
        sizes=(len(arms[0]), len(arms[1])),
        num_shared=len(set(documents[0]) & set(documents[1])),
        scored_by=tuple(sorted({score.scored_by for score in arms[1] or arms[0]})),
        both=both,
        singles=[
            _resampled(arms[arm : arm + 1], own[arm : arm + 1]) if isinstance(both, str) else both.alone(arm)
            for arm in (0, 1)
        ],
        own=own,
        same=equal and alike and all(_part(a) is not None and _part(a) == _part(b) for a, b in zip(*arms, strict=True)),
    )


def _group(members: Sequence[Resampled]) -> Resampled:
    """Members' mean; missing where one member's score is."""
    rows = [row for member in members for row in member.rows]
    sizes = [[member.sizes[arm] for member in members] for arm in (0, 1)]
    by_size = rows[0].by_size
    return Resampled(
        rows=rows,
        sizes=(sum(member.sizes[0] for member in members), sum(member.sizes[1] for member in members)),
        num_shared=sum(member.num_shared for member in members),
        scored_by=tuple(sorted({way for member in members for way in member.scored_by})),
        both=_mean([member.both for member in members], sizes[0] if by_size else None),
        singles=[_mean([one.singles[arm] for one in members], sizes[arm] if by_size else None) for arm in (0, 1)],
        own=(None, None),
        same=all(member.same for member in members),
        members=tuple(member.rows[0].task for member in members),
    )


def _mean(found: Sequence[stats.WholeScores | str], sizes: Sequence[int] | None) -> stats.WholeScores | str:
    """Mean over members, by their sizes or all alike; missing where one member's score is."""
    there = [one for one in found if not isinstance(one, str)]
    weights = [1.0] * len(found) if sizes is None else [float(size) for size in sizes]
    return next((one for one in found if isinstance(one, str)), None) or stats.averaged(there, weights)


def _whole_score(name: str, found: Resampled) -> WholeScore:
    first, num_clusters = found.rows[0], found.num_clusters
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
        aggregation=next(str(row.aggregation) for row in found.rows if is_whole(row)),
        scored_by=found.scored_by,
        higher_is_better=first.higher_is_better,
        num_documents=found.num_shared,
        baseline=figures[0],
        candidate=figures[1],
        baseline_interval=intervals[0],
        candidate_interval=intervals[1],
        difference=known if found.same else _estimate(found.both, stats.WholeScores.difference),
        retention=retention,
        main=bool(first.main or found.members),
        members=found.members,
        is_equal=found.same,
        resampled=found,
    )


def one_whole(scores: Sequence[Score], run: Run) -> tuple[stats.Figure, Measured]:
    """One arm's score of all documents together, from its rows of one task, metric and filter, and its interval."""
    found, own = _one_arm(scores, run)
    return _figure(found, own), _estimate(found, stats.WholeScores.score)


def one_group(members: Sequence[Sequence[Score]], run: Run) -> tuple[stats.Figure, Measured]:
    """One arm's figure of a group, from its rows of each member under the group's metric and filter."""
    sizes = [len(scores) for scores in members] if members[0][0].by_size else None
    found = _mean([_one_arm(scores, run)[0] for scores in members], sizes)
    return _figure(found, None), _estimate(found, stats.WholeScores.score)


def _one_arm(scores: Sequence[Score], run: Run) -> tuple[stats.WholeScores | str, Aggregate | None]:
    first = scores[0]
    own = _made(run).get((first.cell, first.task, first.metric, first.filter, len(scores)))
    return _resampled([scores], [own]), own


def _resampled(arms: Sequence[Sequence[Score]], own: Sequence[Aggregate | None]) -> stats.WholeScores | str:
    """The function over resampled documents, or the reason why there is no such score."""
    if not all(arms):
        return "the task gives it for no document"
    # Means of all documents are here only as members of a group whose other members are none.
    name = str(arms[0][0].aggregation) if is_whole(arms[0][0]) else "nanmean"
    clusters = [score.cluster_id for score in arms[0]]
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
            if made.value is None or not made.replicates:
                return made.missing_reason or "no reason recorded"
            values.append(made.value)
            replicates.append(made.replicates)
            seed = made.seed
        return stats.replicated(name, values, replicates, len(set(clusters)), seed=seed)
    except NoEstimate as error:
        return str(error)


def _checked(found: stats.WholeScores, own: Sequence[Aggregate | None]) -> stats.WholeScores:
    """NoEstimate where the parts do not reproduce lm-eval's number, for instance where documents
    differ in references.
    """
    for arm, made in enumerate(own):
        if made is not None and made.value is not None and not isclose(found.value(arm), made.value, rel_tol=1e-6):
            raise NoEstimate("documents one by one do not come to lm-eval's number of all together")
    return found


def _parts(arm: Sequence[Score]) -> list[tuple[float, ...]]:
    """The part of every document; none may be missing."""
    found = [(score, _part(score)) for score in arm]
    missing = [score for score, part in found if part is None]
    if missing:
        where = f"{len(missing)} of {len(arm)} documents"
        raise NoEstimate(f"{where}: {missing[0].missing_reason or 'no reason recorded'}")
    if len({len(part) for _, part in found if part is not None}) > 1:
        raise NoEstimate("the documents' parts in the score are not all of one kind")
    return [part for _, part in found if part is not None]


def _part(score: Score) -> tuple[float, ...] | None:
    """A document's part in its task's score; in a mean its own value, once."""
    if is_whole(score):
        return score.parts
    return None if score.value is None else (score.value, 1.0)


def _figure(found: stats.WholeScores | str, own: Aggregate | None) -> stats.Figure:
    """lm-eval's own number where the run has it for exactly these documents, else the function of the parts."""
    if own is not None and own.value is not None:
        return stats.Figure(value=own.value)
    if isinstance(found, str):
        return stats.Figure(value=None, reason=found)
    try:
        return stats.Figure(value=found.value())
    except NoEstimate as error:
        return stats.Figure(value=None, reason=str(error))


def _estimate(found: stats.WholeScores | str, compute: Callable[[stats.WholeScores], Estimate]) -> Measured:
    return Measured(estimate=None, reason=found) if isinstance(found, str) else measured(lambda: compute(found))
