"""Answers of one cell, and the small rules about them: their keys, their rows, their sums, what their witness says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twotower_eval.engine.models.witness import Tally
from twotower_eval.measure.suites import instance_sha256
from twotower_eval.records import (
    Generation,
    GenerationRow,
    Likelihood,
    LikelihoodKind,
    LikelihoodRow,
    Witnessed,
    WitnessedAnswer,
)

Key = tuple[str, int, int, int]  # task, doc_id, request_index, repeat


@dataclass(kw_only=True, eq=False)
class CellJournal:
    """The rows of one cell: those on disk, and where new ones go."""

    cell: str
    append: Callable[[GenerationRow | LikelihoodRow], None] = lambda row: None
    generations: dict[Key, GenerationRow] = field(default_factory=dict)
    likelihoods: dict[Key, LikelihoodRow] = field(default_factory=dict)

    def add(self, row: GenerationRow | LikelihoodRow) -> None:
        """Write a row, then keep it."""
        self.append(row)
        self.keep(row)

    def keep(self, row: GenerationRow | LikelihoodRow) -> None:
        """Take up a row that is on disk."""
        key = (row.task, row.doc_id, row.request_index, row.repeat)
        if isinstance(row, GenerationRow):
            self.generations[key] = row
        else:
            self.likelihoods[key] = row


def join_likelihoods(likelihoods: Sequence[Likelihood], kind: LikelihoodKind) -> Likelihood:
    """The likelihood of pieces that follow each other; their errors are independent."""
    if len(likelihoods) == 1:
        return likelihoods[0]
    errors = [piece.stderr_nats for piece in likelihoods if piece.stderr_nats is not None]
    draws = {piece.num_draws for piece in likelihoods}
    return Likelihood(
        logprob_nats=math.fsum(piece.logprob_nats for piece in likelihoods),
        is_greedy=all(piece.is_greedy for piece in likelihoods),
        kind=kind,
        stderr_nats=math.sqrt(math.fsum(error**2 for error in errors)) if errors else None,
        num_draws=draws.pop() if len(draws) == 1 else None,
    )


def with_repeats(requests: Iterable[Any]) -> list[tuple[Any, Key]]:
    """Each request with its key; the same one again is the next sample."""
    seen: Counter[tuple[str, int, int]] = Counter()
    numbered = []
    for request in requests:
        name = (request.task_name, request.doc_id, request.idx)
        numbered.append((request, (*name, seen[name])))
        seen[name] += 1
    return numbered


def missing_of(numbered: Iterable[tuple[Any, Key]], rows: Mapping[Key, GenerationRow | LikelihoodRow]) -> set[Key]:
    """Keys that are not journalled yet. A journalled answer to another prompt is a ValueError."""
    missing = set()
    for request, key in numbered:
        row = rows.get(key)
        if row is None:
            missing.add(key)
        elif row.prompt_sha256 != instance_sha256(request):
            raise ValueError(f"the journal answers {'/'.join(map(str, key))} for another prompt: start a new run")
    return missing


def generation_row(cell: str, key: Key, request: Any, generation: Generation) -> GenerationRow:
    """The journal's row of an answer to lm-eval's request."""
    task, doc_id, index, repeat = key
    return GenerationRow(
        cell=cell,
        task=task,
        doc_id=doc_id,
        request_index=index,
        repeat=repeat,
        prompt_sha256=instance_sha256(request),
        generation=generation,
    )


def likelihood_row(cell: str, key: Key, request: Any, likelihood: Likelihood, num_tokens: int) -> LikelihoodRow:
    """The journal's row of the log-likelihood that lm-eval's request asks for."""
    task, doc_id, index, repeat = key
    return LikelihoodRow(
        cell=cell,
        task=task,
        doc_id=doc_id,
        request_index=index,
        repeat=repeat,
        request=request.request_type,
        prompt_sha256=instance_sha256(request),
        num_tokens=num_tokens,
        likelihood=likelihood,
    )


def witnessed_row(cell: str, generation: Generation, tally: Tally) -> Witnessed:
    """The journal's row of what the witness of a scored answer says."""
    return Witnessed(
        cell=cell,
        launch_id="",
        round=0,
        call_id=generation.prompt_id,
        kind="scored",
        answers=(WitnessedAnswer(prompt_id=generation.prompt_id, token_ids=generation.token_ids),),
        num_rows=tally.num_rows,
        num_tokens=tally.num_tokens,
        num_witnessed=tally.num_witnessed,
        num_drafted=tally.num_drafted,
    )
