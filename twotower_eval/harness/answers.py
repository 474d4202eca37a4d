"""Answers of one cell, and the small rules about them: their keys, their seeds, their sums."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from twotower_eval.records import (
    GenerationRow,
    Likelihood,
    LikelihoodKind,
    LikelihoodRow,
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
