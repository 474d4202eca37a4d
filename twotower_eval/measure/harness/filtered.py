"""From journalled answers to what lm-eval's filters and metrics make of them, document by document."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from twotower_eval.errors import UserError
from twotower_eval.measure.harness.answers import answer_text
from twotower_eval.measure.suites import LACKING, MISTAKEN, BuiltDoc, BuiltTask, instance_sha256, lm_tasks
from twotower_eval.measure.suites.lm_types import Filter, Instance, Task
from twotower_eval.records import DocumentText, GenerationRow, LikelihoodRow

FAILURES = (*MISTAKEN, *LACKING)  # lm-eval would fail as well
POOLING = ("majority_vote", "take_first_k")  # filters over all samples of a problem together

Row = GenerationRow | LikelihoodRow
Samples = list[list[Row]]  # of one document: per sample, one answer for each request


@dataclass(frozen=True, kw_only=True, eq=False)
class Filtered:
    """What one filter made of the answers to documents of one lm-eval task, and the items of its metrics.

    Only completely answered documents are here. ``answers``: of each document, for each sample, the filtered answer to
    each of its requests; a filter over all samples gives one. ``items``: of each document, by metric, as many items.
    ``rows`` are the journal rows that were filtered.
    """

    filter: str
    source: Task
    docs: Sequence[BuiltDoc]
    rows: Mapping[int, Samples]
    answers: Mapping[int, list[list[object]]]
    items: Mapping[int, dict[str, list[object]]]

    def scored_by(self, doc_id: int) -> str:
        """``generation``, or the kind of the log-likelihoods."""
        first = self.rows[doc_id][0][0]
        return "generation" if isinstance(first, GenerationRow) else first.likelihood.kind

    def other_text(self, doc_id: int) -> str | None:
        """What the filter made of the first sample's answer; ``None`` where that is no text, or the answer as it is."""
        first, answer = self.rows[doc_id][0][0], self.answers[doc_id][0][0]
        if not isinstance(first, GenerationRow) or not isinstance(answer, str):
            return None
        return None if answer == answer_text(first) else answer


@lm_tasks.quiet()
def filter_rows(task: BuiltTask, rows: Iterable[Row]) -> list[Filtered]:
    """The answers to the task's documents under each of its filters, by the lm-eval task that scores them.

    UserError for rows of another prompt, and where the task's own code fails on an answer.
    """
    samples = _samples(task, rows)
    return [
        _filtered(task, filter_, docs, samples)
        for docs in _by_source(task, samples)
        for filter_ in lm_tasks.filters_of(docs[0].source)
    ]


def _by_source(task: BuiltTask, samples: Mapping[int, Samples]) -> Iterable[list[BuiltDoc]]:
    """Answered documents, grouped by the lm-eval task that scores them."""
    by_source: dict[int, list[BuiltDoc]] = defaultdict(list)
    for doc in task.docs:
        if doc.doc_id in samples:
            by_source[id(doc.source)].append(doc)
    return by_source.values()


def _samples(task: BuiltTask, rows: Iterable[Row]) -> dict[int, Samples]:
    """Document -> its complete samples, in order of their numbers."""
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
            raise UserError(
                f"task {task.name!r}, document {doc.doc_id}: the journalled answer belongs to another prompt"
            )


def _filtered(task: BuiltTask, filter_: Filter, docs: Sequence[BuiltDoc], samples: Mapping[int, Samples]) -> Filtered:
    pooled = task.pools_samples or _pools(docs[0].source, filter_.name)
    items: dict[int, dict[str, list[object]]] = defaultdict(lambda: defaultdict(list))
    answers: dict[int, list[list[object]]] = defaultdict(list)
    for number in range(1 if pooled else max(len(samples[doc.doc_id]) for doc in docs)):
        present = [doc for doc in docs if number < len(samples[doc.doc_id])]
        asked = {}
        for doc in present:
            taken = samples[doc.doc_id] if pooled else samples[doc.doc_id][number : number + 1]
            asked[doc.doc_id] = [
                dataclasses.replace(instance, resps=[response(sample[at]) for sample in taken], filtered_resps={})
                for at, instance in enumerate(doc.instances)
            ]
        _apply(task, filter_, [instance for doc in present for instance in asked[doc.doc_id]])
        for doc in present:
            results = [instance.filtered_resps[filter_.name] for instance in asked[doc.doc_id]]
            answers[doc.doc_id].append(results)
            for metric, value in _given(task, doc, results).items():
                items[doc.doc_id][metric].append(value)
    return Filtered(filter=filter_.name, source=docs[0].source, docs=docs, rows=samples, answers=answers, items=items)


def _apply(task: BuiltTask, filter_: Filter, instances: list[Instance]) -> None:
    try:
        filter_.apply(instances)
    except FAILURES as error:
        raise UserError(
            f"task {task.name!r}: its filter {filter_.name!r} fails on these answers ({type(error).__name__}: {error})"
        ) from error


def _given(task: BuiltTask, doc: BuiltDoc, results: list[object]) -> dict[str, object]:
    """The metrics that the task's own code gives for an answer; UserError if it fails, as lm-eval would."""
    try:
        return dict(doc.source.process_results(doc.doc, results))
    except FAILURES as error:
        raise UserError(
            f"task {task.name!r}, document {doc.doc_id}: its own code fails on this answer "
            f"({type(error).__name__}: {error})"
        ) from error


def _pools(source: Task, filter_name: str) -> bool:
    own = [f for f in source.config.filter_list or [] if f["name"] == filter_name]
    return any(step["function"] in POOLING for f in own for step in f["filter"])


def response(row: Row) -> object:
    """An answer in the form that lm-eval's models return."""
    if isinstance(row, GenerationRow):
        return answer_text(row)
    if row.request == "loglikelihood_rolling":
        return row.likelihood.logprob_nats
    return (row.likelihood.logprob_nats, row.likelihood.is_greedy)


def document_text(doc: BuiltDoc) -> DocumentText:
    """A document's own texts, for reports."""
    question: object = doc.source.doc_to_text(dict(doc.doc))
    choices = [] if doc.source.config.doc_to_choice is None else list(map(str, doc.source.doc_to_choice(dict(doc.doc))))
    if not isinstance(question, str):  # the place of the right one of several beginnings, as in WinoGrande
        question, choices = " / ".join(choices), []
    return DocumentText(
        task=doc.instances[0].task_name,
        doc_id=doc.doc_id,
        question=question,
        target=str(doc.source.doc_to_target(dict(doc.doc))),
        choices=tuple(choices),
    )
