"""Scores that a run holds already: each has to follow from the answers that the run holds, or the run is refused.

Without its closing file a run may have been edited by hand, or scored by code that was mended since. So whatever is on
disk is made again from the journalled answers, before a resumed run computes anything and once more at its end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from twotower_eval import store
from twotower_eval.engine.models.protocol import text_codec
from twotower_eval.errors import UserError
from twotower_eval.measure.harness.answers import Key
from twotower_eval.measure.harness.jobs import Job
from twotower_eval.measure.harness.scoring import Row, score_rows
from twotower_eval.measure.suites import BuiltTask
from twotower_eval.records import Aggregate, GenerationRow, RunManifest, Score, canonical_json, to_json


class KnownScores:
    """The scores on disk. ``reason`` says in an error how one of them may have come to differ from its answer."""

    def __init__(self, run: store.Run, reason: str = "has another score") -> None:
        self._reason = reason
        name, self._key_of = store.JOURNALS[Score]
        self._file = run.path / name
        self._there = {self._key_of(row): (line, row) for line, row in enumerate(run.scores, start=1)}
        self._left = dict(self._there)
        key_of = store.JOURNALS[Aggregate][1]
        self._aggregates = {key_of(row): (line, row) for line, row in enumerate(run.aggregates, start=1)}

    def new(self, scores: Iterable[Score]) -> list[Score]:
        """Those that are not on disk. UserError with file and line where one on disk says something else."""
        new = []
        for score in scores:
            key = self._key_of(score)
            if key not in self._there:
                new.append(score)
                continue
            line, row = self._there[key]
            if canonical_json(to_json(row)) != canonical_json(to_json(score)):
                raise self._refusal(line, row, f"{self._reason} ({_difference(row, score)})")
            self._left.pop(key, None)
        return new

    def stored(self, made: Aggregate) -> Aggregate | None:
        """The row on disk of the same score of the same documents."""
        return self._aggregates.get(store.JOURNALS[Aggregate][1](made), (0, None))[1]

    def new_aggregates(self, aggregates: Iterable[Aggregate]) -> list[Aggregate]:
        """The same for what functions made of all documents. Those of fewer documents, under an older limit, stay."""
        new = []
        for made in aggregates:
            line, row = self._aggregates.get(store.JOURNALS[Aggregate][1](made), (0, made))
            if canonical_json(to_json(row)) != canonical_json(to_json(made)):
                where = f"{self._file.with_name(store.JOURNALS[Aggregate][0])}, line {line}: task {row.task!r}"
                raise UserError(f"{where} {self._reason}: restore the file or start a new run")
            if not line:
                new.append(made)
        return new

    def check_all_made(self) -> None:
        """UserError where one on disk was not among the scores made."""
        for line, row in self._left.values():
            raise self._refusal(line, row, "has a score that no answer in this run gives")

    def _refusal(self, line: int, row: Score, what: str) -> UserError:
        where = f"{self._file}, line {line}: task {row.task!r}, document {row.doc_id}"
        return UserError(f"{where} {what}: restore the file or start a new run")


def check_known(run: store.Run, manifest: RunManifest, jobs: Sequence[Job]) -> None:
    """UserError, before a run is opened again, where a score on disk is not that of its journalled answer, or an
    answer contradicts itself."""
    store.check_comparable(run, manifest)
    known = KnownScores(run)
    answered: dict[str, dict[Key, Row]] = defaultdict(dict)
    rows: list[Row] = [*run.generations, *run.likelihoods]
    for row in rows:
        answered[row.cell][row.task, row.doc_id, row.request_index, row.repeat] = row
    _check_texts_are_of_tokens(run, jobs)
    for job in jobs if run.scores else ():
        own = answered[job.cell.id if job.task.generates else job.likelihoods_of]
        known.new(score_rows(job.task, job.cell.id, _whole_documents(job.task, own)))


def _check_texts_are_of_tokens(run: store.Run, jobs: Sequence[Job]) -> None:
    """UserError where a text is not that of its tokens. Decoders of others may write their texts as they like, and
    before a stop string stands part of a token that is counted no more."""
    own = {job.cell.id: job for job in jobs if job.task.generates and not job.cell.decoder.is_plug_in}
    for line, row in enumerate(run.generations, start=1):
        made, job = row.generation, own.get(row.cell)
        if job is None or made.finish == "stop" or made.text == text_codec(job.model).decode(made.token_ids):
            continue
        where = f"{run.path / store.JOURNALS[GenerationRow][0]}, line {line}: task {row.task!r}, document {row.doc_id}"
        raise UserError(f"{where} has a text that is not that of its tokens: restore the file or start a new run")


def _whole_documents(task: BuiltTask, answered: Mapping[Key, Row]) -> Iterator[Row]:
    """Answers of the documents that have all of theirs: only these have the scores that they will have at the end."""
    repeats = task.samples if task.generates else 1
    wanted = {doc.doc_id: len(doc.instances) * repeats for doc in task.docs}
    found = Counter(doc_id for name, doc_id, _, _ in answered if name == task.name)
    for (name, doc_id, _, _), row in answered.items():
        if name == task.name and found[doc_id] == wanted.get(doc_id):
            yield row


def _difference(row: Score, score: Score) -> str:
    """The first field in which they differ, the value before all others."""
    fields: tuple[dict[str, Any], dict[str, Any]] = (to_json(row), to_json(score))
    names = sorted(fields[1], key=lambda name: name != "value")
    name = next(name for name in names if fields[0][name] != fields[1][name])
    return f"{name} is {fields[0][name]!r} there, {fields[1][name]!r} by its answer under {row.metric!r}"
