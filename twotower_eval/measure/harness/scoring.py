"""From journalled answers to scores: lm-eval's filters and metrics per document and sample, and aggregates over all
documents."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, SupportsFloat, cast

import numpy as np

from twotower_eval.measure.harness.filtered import FAILURES, Filtered, Row, filter_rows
from twotower_eval.measure.suites import (
    BuiltDoc,
    BuiltTask,
    aggregation,
    aggregation_name,
    is_lacking,
    lm_tasks,
    needing,
)
from twotower_eval.measure.suites.lm_tasks import sacrebleu_pair
from twotower_eval.measure.suites.lm_types import Aggregation, Task
from twotower_eval.progress import Advance, Progress
from twotower_eval.records import (
    LABEL_AGGREGATIONS,
    MEAN,
    SUMMED_AGGREGATIONS,
    Aggregate,
    Score,
    sha256_text,
)

# Replicates of functions of all documents: minimum and maximum, in between as time allows.
LEAST_REPLICATES, NUM_REPLICATES = 100, 1_000
BUDGET_S = 60.0  # of one metric in one cell
SLOW_S = 5.0  # longer work shows progress
SEED = 0

Items = Sequence[object]  # one of each document
Parts = tuple[float, ...]


def mean_item(source: Task, metric: str, item: object) -> object:
    """A document's value under a metric that is a mean; for the Brier score its own function of one item."""
    from lm_eval.api.metrics import brier_score

    return brier_score([item]) if aggregation(source, metric) is brier_score else item


def parts_of(name: str, item: object) -> Parts | str:
    """A document's part in the sums that an aggregation is a function of, or the reason why it has none.

    It depends only on the document's item. A text may have any number of references.
    """
    try:
        parts = _parts(name, item)
    except FAILURES as error:
        return f"lm-eval's item of this document is not one of {name} ({type(error).__name__})"
    if not all(map(math.isfinite, parts)):
        return f"lm-eval's item of this document is {item!r}"
    return parts


def value_of(source: Task, metric: str, items: Items) -> float | str:
    """lm-eval's aggregate over all documents, or the reason why there is none."""
    value = _called(aggregation(source, metric), items)
    return f"lm-eval's {aggregation_name(source, metric)} of all documents {value}" if isinstance(value, str) else value


def replicates_of(
    source: Task, metric: str, items: Items, clusters: Sequence[str], progress: Progress | None = None
) -> tuple[float, ...] | str:
    """An aggregate's values on resampled clusters, or the reason why there are none.

    Draws depend only on the clusters' names and ``SEED``, so both arms use the same draws in the same order. A slow
    function is called as often as ``BUDGET_S`` allows, but at least ``LEAST_REPLICATES`` times.
    """
    members: dict[str, list[object]] = {cluster: [] for cluster in sorted(set(clusters))}
    for cluster, item in zip(clusters, items, strict=True):
        members[cluster].append(item)
    by_cluster = list(members.values())
    rng = np.random.default_rng(SEED)
    name, function = aggregation_name(source, metric), aggregation(source, metric)
    values: list[float] = []
    started_s = time.monotonic()
    with contextlib.ExitStack() as shown:
        advance: Advance = lambda num=1, /: None  # noqa: E731
        while len(values) < NUM_REPLICATES:
            spent_s = time.monotonic() - started_s
            if len(values) >= LEAST_REPLICATES and spent_s >= BUDGET_S:
                break
            if len(values) == 1 and progress is not None and spent_s * NUM_REPLICATES > SLOW_S:
                advance = shown.enter_context(progress.track(NUM_REPLICATES, f"resampling {metric}, by {name}"))
                advance()
            drawn = rng.integers(0, len(by_cluster), size=len(by_cluster))
            found = _called(function, [item for number in drawn for item in by_cluster[number]])
            if isinstance(found, str):
                return f"lm-eval's {name} of resampled documents {found}"
            values.append(found)
            advance()
    return tuple(values)


def _called(function: Aggregation, items: Items) -> float | str:
    """A function's value, or what is wrong with it; an error about something missing is raised, as it is no fault of
    the answers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, of labels that do not occur
            value = float(function(items))
    except FAILURES as error:
        if is_lacking(error):
            raise
        return f"fails ({type(error).__name__}: {error})".replace("\n", " ")
    return value if math.isfinite(value) else f"is {value}"


def _parts(name: str, item: object) -> Parts:
    if name in ("bleu", "chrf", "chrf++", "ter"):
        return _text_parts(name, item)
    if name == "nanmean":
        value = _as_float(item)
        return (0.0, 0.0) if math.isnan(value) else (value, 1.0)
    first, second = (item, 1) if name == "perplexity" else cast(tuple[object, object], item)
    number = _label if name in LABEL_AGGREGATIONS else _as_float
    return number(first), number(second)


def _as_float(value: object) -> float:
    """The value as a float; raises if it is no number."""
    return float(cast(SupportsFloat, value))


def _label(label: object) -> float:
    """A number for a label; functions of labels only compare them and ask which is 1."""
    return float(int(sha256_text(label)[:12], 16)) if isinstance(label, str) else _as_float(label)


def _text_parts(name: str, item: object) -> Parts:
    """sacrebleu's statistics of a document, with the settings of lm-eval's functions."""
    references, answers = sacrebleu_pair(*cast(Sequence[object], item)[:2])
    [found] = _sacrebleu(name)._extract_corpus_statistics(answers, references)
    return tuple(float(number) for number in found)


class _SacreBleu(Protocol):
    """The part of sacrebleu's metrics that is used here."""

    def _extract_corpus_statistics(self, answers: list[str], references: list[object]) -> list[list[float]]: ...


@cache
def _sacrebleu(name: str) -> _SacreBleu:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    kinds: dict[str, Any] = {
        "bleu": BLEU,
        "chrf": CHRF,
        "chrf++": partial(CHRF, word_order=2),
        "ter": TER,
    }
    metric: _SacreBleu = kinds[name]()
    return metric


Stored = Callable[[Aggregate], Aggregate | None]


def score_rows(task: BuiltTask, cell: str, rows: Iterable[Row]) -> list[Score]:
    """The scores of these answers; see :func:`filter_rows` and :func:`scores_of`."""
    return scores_of(task, cell, filter_rows(task, rows))


@lm_tasks.quiet()
def scores_of(task: BuiltTask, cell: str, filtered: Sequence[Filtered]) -> list[Score]:
    """Scores of every completely answered document, for each metric and filter of the task.

    A document's value is the mean over its samples; if the task itself asks for several, it is lm-eval's value of all
    of them.
    """
    scores = []
    for found in filtered:
        values = _values(found.docs, found.items)
        for doc in found.docs:
            made = partial(_score, task, cell, doc, found)
            for metric in found.items[doc.doc_id]:
                scores.append(made(metric, values[metric][doc.doc_id]))
            if not found.items[doc.doc_id] and aggregation_name(doc.source, task.metric) == MEAN:
                scores.append(made(task.metric, NOTHING_GIVEN))
    return scores


def aggregate_rows(
    task: BuiltTask,
    cell: str,
    rows: Iterable[Row],
    stored: Stored = lambda made: None,
    progress: Progress | None = None,
) -> list[Aggregate]:
    """The aggregates of these answers; see :func:`filter_rows` and :func:`aggregates_of`."""
    return aggregates_of(task, cell, filter_rows(task, rows), stored, progress)


@lm_tasks.quiet()
def aggregates_of(
    task: BuiltTask,
    cell: str,
    filtered: Sequence[Filtered],
    stored: Stored = lambda made: None,
    progress: Progress | None = None,
) -> list[Aggregate]:
    """lm-eval's aggregates over all documents, for each filter and metric that is no mean.

    ``stored`` gives the row on disk of the same score, whose replicates are reused.
    """
    made = []
    for found in filtered:
        for metric in {metric: None for doc in found.docs for metric in found.items[doc.doc_id]}:
            if aggregation_name(found.source, metric) != MEAN:
                there = [doc for doc in found.docs if metric in found.items[doc.doc_id]]
                of_document = [found.items[doc.doc_id][metric] for doc in there]
                one = _aggregate(task, cell, there, metric, found.filter, of_document)
                made.append(_with_replicates(one, there, of_document, stored, progress))
    return made


@dataclass(frozen=True, kw_only=True)
class _Value:
    """The value fields of a document's score."""

    aggregation: str
    value: float | None = None
    parts: tuple[float, ...] | None = None
    missing_reason: str | None = None


NOTHING_GIVEN = _Value(aggregation=MEAN, missing_reason="the task's own code gives no metric for this answer")


def _values(docs: Sequence[BuiltDoc], items: Mapping[int, Mapping[str, list[object]]]) -> dict[str, dict[int, _Value]]:
    """(metric, document) -> value; only under a mean does a document have a value of its own."""
    source = docs[0].source
    found = {}
    for metric in {metric: None for doc in docs for metric in items[doc.doc_id]}:
        there = [doc.doc_id for doc in docs if metric in items[doc.doc_id]]
        of_document = [items[doc_id][metric] for doc_id in there]
        aggregation = aggregation_name(source, metric)
        if aggregation == MEAN:
            values = [_mean_value(source, metric, item) for item in of_document]
        elif aggregation in SUMMED_AGGREGATIONS:
            values = [_summed_value(metric, aggregation, item) for item in of_document]
        else:
            values = [_Value(aggregation=aggregation, missing_reason=_together(metric, aggregation))] * len(there)
        found[metric] = dict(zip(there, values, strict=True))
    return found


def _summed_value(metric: str, aggregation: str, items: Sequence[object]) -> _Value:
    parts = _several(aggregation, [items]) or parts_of(aggregation, items[0])
    if isinstance(parts, str):
        return _Value(aggregation=aggregation, missing_reason=parts)
    return _Value(aggregation=aggregation, parts=parts, missing_reason=_together(metric, aggregation))


def _together(metric: str, aggregation: str) -> str:
    return f"{metric} is of all documents together, by {aggregation}"


def _several(aggregation: str, items: Sequence[Sequence[object]]) -> str | None:
    """Why there is no score if a document's samples differ."""
    if all(repr(item) == repr(samples[0]) for samples in items for item in samples):
        return None
    return f"{aggregation} of all documents takes one sample of each, and there are several that differ"


def _mean_value(source: Task, metric: str, items: Sequence[object]) -> _Value:
    values = [_number(source, metric, item) for item in items]
    numbers = [value for value in values if isinstance(value, float)]
    reasons = [value for value in values if isinstance(value, str)]
    if reasons:
        return _Value(aggregation=MEAN, missing_reason=reasons[0])
    return _Value(aggregation=MEAN, value=math.fsum(numbers) / len(numbers))


def _number(source: Task, metric: str, item: object) -> float | str:
    """One document's value, or the reason why there is none; a text is no number, even of digits."""
    if isinstance(item, str):
        return f"{metric} of this document is a text"
    try:
        number = float(cast(SupportsFloat, mean_item(source, metric, item)))
    except FAILURES as error:
        return f"{metric} of this document is no number ({type(error).__name__})"
    return number if math.isfinite(number) else f"{metric} of this document is {number}"


def _score(task: BuiltTask, cell: str, doc: BuiltDoc, filtered: Filtered, metric: str, found: _Value) -> Score:
    chosen = (metric, filtered.filter) == (task.metric, task.filter)
    return Score(
        cell=cell,
        task=task.name,
        doc_id=doc.doc_id,
        cluster_id=doc.cluster_id,
        doc_sha256=doc.doc_sha256,
        prompt_sha256=doc.prompt_sha256,
        target_sha256=doc.target_sha256,
        metric=metric,
        filter=filtered.filter,
        higher_is_better=doc.source.higher_is_better().get(metric, True) is not False,
        headline=task.headline and chosen,
        scored_by=filtered.scored_by(doc.doc_id),
        value=found.value,
        missing_reason=found.missing_reason,
        group=task.group if chosen else None,
        by_size=task.by_size and chosen,
        aggregation=found.aggregation,
        parts=found.parts,
        chance=doc.chance.get(metric),
        main=chosen,
        filtered=filtered.other_text(doc.doc_id),
    )


def _aggregate(
    task: BuiltTask,
    cell: str,
    docs: Sequence[BuiltDoc],
    metric: str,
    filter_name: str,
    items: Sequence[Sequence[object]],
) -> Aggregate:
    source = docs[0].source
    aggregation, firsts = aggregation_name(source, metric), [samples[0] for samples in items]
    with needing(task.name, f"its metric {metric!r}"):
        value = _several(aggregation, items) or value_of(source, metric, firsts)
    return Aggregate(
        cell=cell,
        task=task.name,
        metric=metric,
        filter=filter_name,
        aggregation=aggregation,
        num_documents=len(docs),
        num_clusters=len({doc.cluster_id for doc in docs}),
        seed=SEED,
        value=None if isinstance(value, str) else value,
        replicates=None,
        missing_reason=value if isinstance(value, str) else None,
    )


def _with_replicates(
    made: Aggregate,
    docs: Sequence[BuiltDoc],
    items: Sequence[Sequence[object]],
    stored: Stored,
    progress: Progress | None,
) -> Aggregate:
    """The aggregate with its values over resampled documents, if reports cannot compute them from parts."""
    if made.value is None or made.aggregation in SUMMED_AGGREGATIONS:
        return made
    if (known := stored(made)) is not None:
        return dataclasses.replace(made, replicates=known.replicates, missing_reason=known.missing_reason)
    firsts, clusters = [samples[0] for samples in items], [doc.cluster_id for doc in docs]
    with needing(made.task, f"its metric {made.metric!r}"):
        found = replicates_of(docs[0].source, made.metric, firsts, clusters, progress)
    if isinstance(found, str):
        return dataclasses.replace(made, missing_reason=found)
    return dataclasses.replace(made, replicates=found)
