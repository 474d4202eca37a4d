"""Token sequences with common beginnings as one tree, and how a model with states reads it: rows, level by level.

A tree grows out of a context and is given as segments, parents before children. Where attention is all there is, the
whole tree is one row with a mask (see transformers_tree); Mamba states need a row for every branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import ContextT, Segment

LEAST_SHARED = 8  # an inner segment shorter than this is read by each of its children: a pass less for a few tokens
MAX_ROWS = 64  # rows per pass; each carries a copy of its context
WELL_FILLED = 256  # tokens of a pass, padding too, from which a larger one is no faster per token
LEAST_FILL = 0.75  # of the longest row


@dataclass
class Branch:
    """A segment as rows read it. ``wanted``: positions in ``tokens``, and which result each of them gives."""

    tokens: tuple[int, ...]
    wanted: list[tuple[int, int]]
    children: list[Branch] = field(default_factory=list)


class ReadsRows(Protocol[ContextT]):
    """A model that extends contexts and gives logits behind any of the new positions."""

    vocab_size: int

    def extend_logits(
        self, context: ContextT, ids_BK: Tensor, lengths_B: Sequence[int], wanted: Sequence[tuple[int, int]]
    ) -> tuple[ContextT, Tensor]:
        """The context after each row's new tokens, and logits (M, V) behind the wanted (row, column)."""


# (context of B rows, ids (B, K) padded on the right, lengths, the rows' branches) -> extended context
Read = Callable[[ContextT, Tensor, Sequence[int], Sequence[Branch]], ContextT]


def branches(segments: Sequence[Segment], *, contexts: bool = False) -> list[Branch]:
    """The tree's topmost branches. Results are numbered in the order of segments and wanted positions.

    Short inner segments go in front of each of their children, the first of which gives their results; not those
    where results are ``contexts``, which stand behind a segment's end.
    """
    made: list[Branch] = []
    roots: list[Branch] = []
    number = 0
    for segment in segments:
        numbers = range(number, number + len(segment.wanted))
        branch = Branch(segment.tokens, list(zip(segment.wanted, numbers, strict=True)))
        number += len(segment.wanted)
        made.append(branch)
        (roots if segment.parent < 0 else made[segment.parent].children).append(branch)
    for branch in reversed(made):  # children before parents
        branch.children = [one for child in branch.children for one in _merged(child, contexts)]
    return [one for root in roots for one in _merged(root, contexts)]


def _merged(branch: Branch, contexts: bool) -> Iterator[Branch]:
    if not branch.children or len(branch.tokens) >= LEAST_SHARED or (contexts and branch.wanted):
        yield branch
        return
    for child in branch.children:
        moved = [(position + len(branch.tokens), result) for position, result in child.wanted]
        yield Branch(branch.tokens + child.tokens, branch.wanted + moved, child.children)
        branch.wanted = []


def walk(context: ContextT, roots: Sequence[Branch], read: Read[ContextT], *, max_rows: int = MAX_ROWS) -> None:
    """Read a tree on a context of one row, depth first in batches of rows, so that few contexts live at a time."""
    _walk_level(context, [(0, root) for root in roots], read, max_rows)


def _walk_level(context: ContextT, pending: list[tuple[int, Branch]], read: Read[ContextT], max_rows: int) -> None:
    pending.sort(key=lambda item: -len(item[1].tokens))
    for batch in _batches(pending, max_rows):
        lengths = [len(branch.tokens) for _, branch in batch]
        rows = [
            branch.tokens + (0,) * (lengths[0] - length) for (_, branch), length in zip(batch, lengths, strict=True)
        ]
        chosen = context.select([row for row, _ in batch])
        extended = read(chosen, torch.tensor(rows, dtype=torch.int64), lengths, [branch for _, branch in batch])
        inner = [row for row, (_, branch) in enumerate(batch) if branch.children]
        if inner:
            below = [(at, child) for at, row in enumerate(inner) for child in batch[row][1].children]
            _walk_level(extended.select(inner), below, read, max_rows)


def _batches(pending: Sequence[tuple[int, Branch]], max_rows: int) -> Iterator[Sequence[tuple[int, Branch]]]:
    """Rows of like lengths together, longest first: a well-filled pass takes no row that would be much padding."""
    start = 0
    for end, (_, branch) in enumerate(pending):
        longest = len(pending[start][1].tokens)
        filled = (end - start) * longest >= WELL_FILLED and len(branch.tokens) < LEAST_FILL * longest
        if end - start == max_rows or filled:
            yield pending[start:end]
            start = end
    if pending:
        yield pending[start:]


def logits_by_rows(model: ReadsRows[ContextT], context: ContextT, segments: Sequence[Segment]) -> Tensor:
    """Logits (M, V) float32 behind every wanted position, by a model that has ``extend_logits``."""
    numbers: list[int] = []
    found: list[Tensor] = []

    def read(chosen: ContextT, ids_BK: Tensor, lengths: Sequence[int], rows: Sequence[Branch]) -> ContextT:
        wanted = [(row, position, result) for row, branch in enumerate(rows) for position, result in branch.wanted]
        places = [(row, position) for row, position, _ in wanted]
        extended, logits_MV = model.extend_logits(chosen, ids_BK, lengths, places)
        numbers.extend(result for *_, result in wanted)
        found.append(logits_MV)
        return extended

    walk(context, branches(segments), read)
    if not found:
        return torch.empty(0, model.vocab_size)
    joined_MV = torch.cat(found)
    return joined_MV[torch.tensor(numbers, dtype=torch.int64, device=joined_MV.device).argsort()]
