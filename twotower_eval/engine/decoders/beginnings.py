"""What the prompts of a call share at their beginning, such as examples before a question: read once, then each prompt
goes on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from twotower_eval.engine.models.context import common_length
from twotower_eval.engine.models.counting import CountedContext, CountingModel
from twotower_eval.engine.models.protocol import Model, reads_on
from twotower_eval.records import Prompt

Tokens = tuple[int, ...]

LEAST_SHARED = 64  # tokens; to read a shorter beginning once saves less than the passes that it adds


@dataclass(frozen=True, kw_only=True)
class Family:
    """Sequences, by position, that share their first ``length`` tokens; each has at least one more."""

    length: int
    members: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that are not read because the beginning is read once."""
        return self.length * (len(self.members) - 1)


@dataclass
class _Node:
    """Sorted sequences from ``start`` on that share ``length`` tokens, and the families within."""

    length: int
    start: int
    families: list[Family] = field(default_factory=list)


def families(sequences: Sequence[Tokens], least: int) -> list[Family]:
    """The families, of beginnings of at least ``least`` tokens, that leave few tokens to read. No sequence is in two.

    Those that share tokens stand beside each other when sorted, so one walk over the lengths that neighbours share
    finds them, inner families before outer ones.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    nodes = [_Node(0, 0)]
    for at in range(1, len(order) + 1):
        length = _shared(sequences[order[at - 1]], sequences[order[at]]) if at < len(order) else 0
        found = _Node(length, at - 1)
        while nodes[-1].length > length:
            node = nodes.pop()
            made = _made(node, order[node.start : at]) if node.length >= least else node.families
            if nodes[-1].length >= length:
                nodes[-1].families += made
            else:
                found = _Node(length, node.start, made)
        if nodes[-1].length < length:
            nodes.append(found)
    return nodes[0].families


def _made(node: _Node, members: Sequence[int]) -> list[Family]:
    """The node's own family, of what is in no inner one and of inner ones that save less than they would here; or the
    inner ones, where these save more."""
    kept = [one for one in node.families if one.saved > node.length * len(one.members)]
    inside = {member for one in kept for member in one.members}
    own = Family(length=node.length, members=tuple(member for member in members if member not in inside))
    best = [*kept, own] if len(own.members) > 1 else kept
    return max(node.families, best, key=lambda found: (sum(one.saved for one in found), -len(found)))


def _shared(one: Tokens, other: Tokens) -> int:
    """Tokens that both begin with, leaving each at least one of its own."""
    return max(0, min(common_length(one, other), len(one) - 1, len(other) - 1))


class Beginnings:
    """The shared beginnings of a call's prompts; the context of one of them is kept at a time.

    A beginning is a row of its own in one forward, which is counted for the first prompt that goes on from it.
    """

    def __init__(self, counted: CountingModel, ids: Sequence[Tokens], found: Sequence[Family]) -> None:
        self._counted, self._ids, self._families = counted, ids, found
        self._family_of = {row: number for number, family in enumerate(found) for row in family.members}
        self._num_waiting = Counter(self._family_of.values())
        self._kept: tuple[int, CountedContext] | None = None

    def in_order(self, rows: Sequence[int]) -> list[int]:
        """Rows with the longest first, those of one family beside each other."""
        longest: dict[tuple[bool, int], int] = {}
        for row in rows:
            longest[self._key(row)] = max(len(self._ids[row]), longest.get(self._key(row), 0))
        return sorted(rows, key=lambda row: (-longest[self._key(row)], self._key(row), -len(self._ids[row])))

    def _key(self, row: int) -> tuple[bool, int]:
        return (True, self._family_of[row]) if row in self._family_of else (False, row)

    def alone(self, rows: Sequence[int]) -> list[int]:
        """The rows that share nothing."""
        return [row for row in rows if row not in self._family_of]

    def prefill(self, rows: Sequence[int]) -> list[CountedContext]:
        """Contexts of the rows that share a beginning, those of one length in one pass, without padding."""
        made = []
        met: dict[int, int] = {}  # family -> its place among these rows: the one whose beginning is kept comes first
        for row in (row for row in rows if row in self._family_of):
            met.setdefault(self._family_of[row], len(met))
        shared = sorted(
            (row for row in rows if row in self._family_of),
            key=lambda row: (met[self._family_of[row]], -len(self._ids[row])),
        )
        for (number, _), group in groupby(shared, key=lambda row: (self._family_of[row], len(self._ids[row]))):
            members = list(group)
            beginning = self._beginning(number, members[0])
            rests_BK = torch.tensor([self._ids[row][self._families[number].length :] for row in members])
            self._num_waiting[number] -= len(members)
            if not self._num_waiting[number]:
                self._kept = None
            made.append(self._counted.extend(beginning.repeated(members), rests_BK))
        return made

    def _beginning(self, number: int, row: int) -> CountedContext:
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # one at a time, also while the next is read
            tokens = self._ids[row][: self._families[number].length]
            self._kept = number, self._counted.prefill([row], torch.tensor([tokens]), [len(tokens)])
        return self._kept[1]


def shared_beginnings(
    model: Model, counted: CountingModel, prompts: Sequence[Prompt], *, without_last: int
) -> Beginnings | None:
    """The beginnings that these prompts share, without their last tokens if ``without_last``; None where there are
    none, or where the model is not known to go on from one as it reads whole rows."""
    reading = reads_on(model)
    if reading is None:
        return None
    limit = reading.verified_up_to
    ids = [prompt.token_ids[: len(prompt.token_ids) - without_last] for prompt in prompts]
    usable = [row for row, own in enumerate(ids) if limit is None or len(own) <= limit]
    found = families([ids[row] for row in usable], LEAST_SHARED)
    own = [Family(length=family.length, members=tuple(usable[at] for at in family.members)) for family in found]
    return Beginnings(counted, ids, own) if own else None
