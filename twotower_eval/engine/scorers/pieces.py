"""Requests of scorers, the pieces in which they are scored, and what sequences share, so that it is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from twotower_eval.engine.models.context import common_length
from twotower_eval.engine.models.protocol import Context, Model, Segment
from twotower_eval.errors import UserError
from twotower_eval.records import Likelihood

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A sequence, and the ascending positions after which a prediction is wanted; -1 is before its first token."""

    tokens: Tokens
    wanted: Tokens


@dataclass(frozen=True)
class Chunk:
    """What one call reads: a tree after a path of contexts, outermost first.

    Result 0 is for the end of the path; the others for the segments' wanted positions, in order. ``places`` says for
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
            # A position inside the group's common beginning cannot be asked of a context.
            early = [index for index in group if rows[index].wanted[0] < end - 1]
            bundles[:0] = [[index] for index in early]
            late = [index for index in group if rows[index].wanted[0] >= end - 1]
            shared = rows[group[0]].tokens[depth:end]
            if late:
                deeper.append((late, depth, path) if early else (late, end, (*path, shared)))
        chunks += [_chunk(rows, bundle, depth, path) for bundle in bundles if bundle]
        work += reversed(deeper)
    return chunks


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
    """The same tree and results, cut so that every wanted position is a segment's last token."""
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


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """How likely is ``continuation_ids`` after ``context_ids``? ``seed`` fixes the draws of a bound."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True)
class Piece:
    """Some of the requests given to a scorer, by position, and what scores them, in that order."""

    requests: Tokens
    score: Callable[[], list[Likelihood]]


class PathContexts:
    """Contexts of one row along a path, each extending the one before; the next path keeps what it has in common."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._kept: list[tuple[Tokens, Context]] = []

    def at(self, path: Sequence[Tokens]) -> Context | None:
        """The context of the path's tokens; None for the empty path."""
        for depth, tokens in enumerate(path):
            if depth < len(self._kept) and self._kept[depth][0] == tokens:
                continue
            del self._kept[depth:]
            ids_1S = torch.tensor([tokens], dtype=torch.int64)
            before = self._kept[-1][1] if self._kept else None
            self._kept.append(
                (tokens, self.model.prefill(ids_1S) if before is None else self.model.extend(before, ids_1S))
            )
        del self._kept[len(path) :]
        return self._kept[-1][1] if self._kept else None


class Scorer:
    """Scores requests in pieces, each of which can be journalled when it is done."""

    def plan(self, requests: Sequence[ScoreRequest], batch_size: int) -> list[Piece]:
        """Every request in exactly one piece; called in their order, pieces share the most work.

        UserError for requests that cannot be scored. ``batch_size`` counts rows where nothing is shared.
        """
        raise NotImplementedError

    def score(self, requests: Sequence[ScoreRequest]) -> list[Likelihood]:
        """One likelihood per request."""
        found: dict[int, Likelihood] = {}
        for piece in self.plan(requests, len(requests)):
            found.update(zip(piece.requests, piece.score(), strict=True))
        return [found[index] for index in range(len(requests))]


def target_logprobs(logits_MV: Tensor, places: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[float, bool]]:
    """Log-probability (nats) of each target under the logits at its place, and whether it is the likeliest there."""
    place_R = torch.tensor(places, device=logits_MV.device)
    target_R = torch.tensor(targets, device=logits_MV.device)
    logit_R = logits_MV[place_R, target_R]
    logprob_R = (logit_R - logits_MV.logsumexp(-1)[place_R]).clamp(max=0)  # whatever a device's rounding
    # Of equal logits the first is taken; to look for it is slow, so only where it can matter.
    highest_R = logit_R == logits_MV.amax(-1)[place_R]
    rows = highest_R.nonzero()[:, 0]
    highest_R[rows] = logits_MV[place_R[rows]].argmax(-1) == target_R[rows]
    return zip(logprob_R.tolist(), highest_R.tolist(), strict=True)


def check_requests(requests: Sequence[ScoreRequest], model: Model, *, needs_context: bool) -> None:
    for request in requests:
        if not request.continuation_ids:
            raise UserError("a continuation to be scored must have at least one token")
        if needs_context and not request.context_ids:
            raise UserError("a causal likelihood needs at least one context token; put BOS or EOS in front")
        ids = request.context_ids + request.continuation_ids
        if not 0 <= min(ids) <= max(ids) < model.vocab_size:
            raise UserError(f"a request has a token id outside the vocabulary of {model.vocab_size}")
