"""From journalled answers to scores: lm-eval's filters and metrics, one document and one sample at a time.

The same code scores a run as it goes, a resumed run, and the answers that ``speed`` timed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from twotower_eval.records import GenerationRow, LikelihoodRow, Score
from twotower_eval.suites import BuiltDoc, BuiltTask, instance_sha256

POOLING = ("majority_vote", "take_first_k")  # filters that look at all samples of a problem together
PER_DOCUMENT = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # metrics over (nats, weight) pairs

Row = GenerationRow | LikelihoodRow
Samples = list[list[Row]]  # of one document: per sample, one answer for each request


def score_rows(task: BuiltTask, cell: str, rows: Iterable[Row]) -> list[Score]:
    """Scores of every document that the rows answer completely, for each metric and filter of the task.

    A document's value is the mean over its samples. Rows made for another prompt are a ValueError.
    """
    samples = _samples(task, rows)
    by_source: dict[int, list[BuiltDoc]] = defaultdict(list)
    for doc in task.docs:
        if doc.doc_id in samples:
            by_source[id(doc.source)].append(doc)
    scores = []
    for docs in by_source.values():
        for filter_ in docs[0].source._filters:
            metrics = _metrics(filter_, docs, samples)
            for doc in docs:
                first = samples[doc.doc_id][0][0]
                by = "generation" if isinstance(first, GenerationRow) else first.likelihood.kind
                for metric, found in metrics[doc.doc_id].items():
                    scores.append(_score(task, cell, doc, metric, filter_.name, by, found))
    return scores


def _samples(task: BuiltTask, rows: Iterable[Row]) -> dict[int, Samples]:
    """Per document its complete samples, in the order of their numbers."""
    found: dict[int, dict[int, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.task == task.name:
            found[row.doc_id][row.repeat][row.request_index] = row
    complete: dict[int, Samples] = {}
    for doc in task.docs:
        for _, answers in sorted(found[doc.doc_id].items()):
            if all(instance.idx in answers for instance in doc.instances):
                _check_prompts(task, doc, answers)
                sample = [answers[instance.idx] for instance in doc.instances]
                complete.setdefault(doc.doc_id, []).append(sample)
    return complete


def _check_prompts(task: BuiltTask, doc: BuiltDoc, answers: Mapping[int, Row]) -> None:
    for instance in doc.instances:
        if answers[instance.idx].prompt_sha256 != instance_sha256(instance):
            raise ValueError(
                f"task {task.name!r}, document {doc.doc_id}: the journalled answer belongs to another prompt"
            )


def _metrics(filter_: Any, docs: Sequence[BuiltDoc], samples: Mapping[int, Samples]) -> dict[int, dict[str, list[Any]]]:
    """What lm-eval makes of the answers under one filter: per document and metric a value for each sample."""
    found: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    pooled = _pools(docs[0].source, filter_.name)
    for number in range(1 if pooled else max(len(samples[doc.doc_id]) for doc in docs)):
        present = [doc for doc in docs if number < len(samples[doc.doc_id])]
        asked = {}
        for doc in present:
            taken = samples[doc.doc_id] if pooled else samples[doc.doc_id][number : number + 1]
            asked[doc.doc_id] = [
                dataclasses.replace(instance, resps=[_response(sample[at]) for sample in taken], filtered_resps={})
                for at, instance in enumerate(doc.instances)
            ]
        filter_.apply([instance for doc in present for instance in asked[doc.doc_id]])
        for doc in present:
            results = [instance.filtered_resps[filter_.name] for instance in asked[doc.doc_id]]
            for metric, value in doc.source.process_results(doc.doc, results).items():
                found[doc.doc_id][metric].append(value)
    return found


def _pools(source: Any, filter_name: str) -> bool:
    own = [f for f in source.config.filter_list or [] if f["name"] == filter_name]
    return any(step["function"] in POOLING for f in own for step in f["filter"])


def _response(row: Row) -> Any:
    """An answer in the form in which lm-eval's models give it."""
    if isinstance(row, GenerationRow):
        return row.generation.text or ""
    if row.request == "loglikelihood_rolling":
        return row.likelihood.logprob_nats
    return (row.likelihood.logprob_nats, row.likelihood.is_greedy)


def _score(
    task: BuiltTask, cell: str, doc: BuiltDoc, metric: str, filter_name: str, scored_by: str, found: Sequence[Any]
) -> Score:
    values = [_number(doc.source, metric, value) for value in found]
    numbers = [value for value in values if isinstance(value, float)]
    reasons = [value for value in values if isinstance(value, str)]
    return Score(
        cell=cell,
        task=task.name,
        doc_id=doc.doc_id,
        cluster_id=doc.cluster_id,
        doc_sha256=doc.doc_sha256,
        prompt_sha256=doc.prompt_sha256,
        target_sha256=doc.target_sha256,
        metric=metric,
        filter=filter_name,
        higher_is_better=bool(doc.source.higher_is_better().get(metric, True)),
        headline=task.headline and (metric, filter_name) == (task.metric, task.filter),
        scored_by=scored_by,
        value=None if reasons else math.fsum(numbers) / len(numbers),
        missing_reason=reasons[0] if reasons else None,
        group=task.group,
        chance=doc.chance.get(metric),
    )


def _number(source: Any, metric: str, value: Any) -> float | str:
    """One document's value, or the reason why there is none."""
    if metric in PER_DOCUMENT and isinstance(value, tuple):
        try:
            value = source.aggregation()[metric]([value])
        except (OverflowError, ZeroDivisionError) as error:
            return f"{metric} of this document has no value ({type(error).__name__})"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"lm-eval gives {metric} for the whole task only, not per document"
    return number if math.isfinite(number) else f"{metric} of this document is {number}"
