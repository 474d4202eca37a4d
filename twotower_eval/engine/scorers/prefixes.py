"""What sequences of tokens share, and in which order to read them: a pure rule, no model and no tensor in it.

Rows with a common beginning make a tree. Parts of the tree that are small enough are read in one go; what larger parts
have in common becomes a context, read once and kept while anything below it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from twotower_eval.engine.models.protocol import Segment

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A sequence, and the ascending positions in it behind which something is asked for; -1 is before its first."""

    tokens: Tokens
    wanted: Tokens


@dataclass(frozen=True)
class Chunk:
    """What is read in one go: a tree behind a path of contexts, outermost first.

    Result 0 stands behind the path; the others behind the segments' wanted positions, in order. ``places`` says for
    each row of the chunk which results its wanted positions are.
    """

    path: tuple[Tokens, ...]
    segments: tuple[Segment, ...]
    places: Mapping[int, Tokens]


def plan(rows: Sequence[Row], max_tokens: int) -> list[Chunk]:
    """Every row in exactly one chunk, chunks with a path in common one after the other.

    A chunk reads at most ``max_tokens`` tokens, unless a single row has more that no other shares.
    """
    chunks = []
    order = sorted(range(len(rows)), key=lambda index: rows[index].tokens)
    work: list[tuple[list[int], int, tuple[Tokens, ...]]] = [(order, 0, ())]  # sorted rows, tokens read, their path
    while work:
        members, depth, path = work.pop()
        deeper: list[tuple[list[int], int, tuple[Tokens, ...]]] = []
        bundles: list[list[int]] = [[]]
        total = 0
        sized = [(_size(rows, group, depth), group, end) for group, end in _groups(rows, members, depth)]
        # Large with large: what is read together is padded to one length where it cannot be packed.
        for size, group, end in sorted(sized, key=lambda item: -item[0]):
            if size <= max_tokens or all(len(rows[index].tokens) == end for index in group):
                if total and total + size > max_tokens:
                    bundles.append([])
                    total = 0
                bundles[-1] += group
                total += size
                continue
            # Who asks for something inside what the group shares cannot have it from a context.
            early = [index for index in group if rows[index].wanted[0] < end - 1]
            bundles[:0] = [[index] for index in early]
            late = [index for index in group if rows[index].wanted[0] >= end - 1]
            shared = rows[group[0]].tokens[depth:end]
            if late:
                deeper.append((late, depth, path) if early else (late, end, (*path, shared)))
        chunks += [_chunk(rows, bundle, depth, path) for bundle in bundles if bundle]
        work += reversed(deeper)
    return chunks


def common_length(one: Tokens, other: Tokens, start: int = 0) -> int:
    """How long the common beginning is, known to be at least ``start``."""
    for at in range(start, min(len(one), len(other))):
        if one[at] != other[at]:
            return at
    return min(len(one), len(other))


def _groups(rows: Sequence[Row], members: Sequence[int], depth: int) -> Iterator[tuple[list[int], int]]:
    """Sorted rows by their token at ``depth``, with the length of what each group shares; rows that end there first."""
    for _, found in groupby(members, key=lambda index: rows[index].tokens[depth : depth + 1]):
        group = list(found)
        yield group, common_length(rows[group[0]].tokens, rows[group[-1]].tokens, depth)


def _size(rows: Sequence[Row], group: Sequence[int], depth: int) -> int:
    """Tokens of the tree of sorted rows, below ``depth``."""
    size = 0
    before: Tokens = ()
    for index in group:
        tokens = rows[index].tokens
        size += len(tokens) - (common_length(before, tokens, depth) if before else depth)
        before = tokens
    return size


def _chunk(rows: Sequence[Row], members: Sequence[int], depth: int, path: tuple[Tokens, ...]) -> Chunk:
    """The tree of sorted rows below ``depth``."""
    segments: list[Segment] = []
    places: dict[int, dict[int, int]] = {index: {depth - 1: 0} for index in members}  # position -> result
    num_results = 1
    work = [(list(members), depth, -1)]
    while work:
        below, start, parent = work.pop()
        for group, end in _groups(rows, below, start):
            if end == start:
                continue
            asked = {at for index in group for at in rows[index].wanted if start <= at < end}
            numbers = {at: num_results + i for i, at in enumerate(sorted(asked))}
            num_results += len(numbers)
            for index in group:
                places[index].update((at, numbers[at]) for at in rows[index].wanted if at in numbers)
            wanted = tuple(at - start for at in numbers)
            segments.append(Segment(parent, rows[group[0]].tokens[start:end], wanted))
            work.append((group, end, len(segments) - 1))
    found = {index: tuple(places[index][at] for at in rows[index].wanted) for index in members}
    return Chunk(path, tuple(segments), found)


def ending_where_wanted(segments: Sequence[Segment]) -> list[Segment]:
    """The same tree and results, cut so that whatever is wanted is wanted behind a segment's last token."""
    cut: list[Segment] = []
    last: list[int] = []  # of each given segment, the piece that ends it
    for segment in segments:
        parent = -1 if segment.parent < 0 else last[segment.parent]
        ends = [at + 1 for at in segment.wanted]
        if not ends or ends[-1] < len(segment.tokens):
            ends.append(len(segment.tokens))
        for start, end in zip([0, *ends], ends, strict=False):
            wanted = (end - start - 1,) if end - 1 in segment.wanted else ()
            cut.append(Segment(parent, segment.tokens[start:end], wanted))
            parent = len(cut) - 1
        last.append(parent)
    return cut
