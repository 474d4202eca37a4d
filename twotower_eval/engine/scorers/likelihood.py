"""Log-likelihoods of continuations, by four kinds that must never be mixed up.

``exact``: a causal model's own. ``context_tower``: the same, of a pair's context tower, which the denoiser never
touches. ``denoiser_left_to_right``: exact chain rule through the denoiser, one position unmasked at a time from the
left. ``bound``: Monte-Carlo estimate of the masked-diffusion bound, with its standard error.

For the last two, blocks of K start at the continuation, positions past its end stay masked as in generation, the mask
fraction fed is the actual one, and the mask token is excluded from the softmax.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import check_mask
from twotower_eval.engine.decoders.rows import padded_ids
from twotower_eval.engine.models.context import Branch, branches, walk
from twotower_eval.engine.models.protocol import Context, Denoising, Model, branching, lacks, masked, remote
from twotower_eval.engine.scorers.families import FamilyBound, FamilyLeftToRight
from twotower_eval.engine.scorers.pieces import (
    Chunk,
    PathContexts,
    Piece,
    Row,
    Scorer,
    ScoreRequest,
    Tokens,
    check_requests,
    ending_where_wanted,
    plan,
    target_logprobs,
)
from twotower_eval.errors import UserError
from twotower_eval.names import resolve
from twotower_eval.records import Likelihood, LikelihoodKind

MAX_ROWS = 64  # denoiser rows per call
MAX_TOKENS = 256  # context tokens per piece: the denoiser costs more, so that larger ones would gain nothing


@dataclass(frozen=True)
class Query:
    """One denoiser row: a noisy block after the ``before``-th block of its request, and the positions whose tokens
    are asked for. ``num_true`` of the block's tokens are the request's, ``masked`` of its positions are masked."""

    before: int
    draw: int
    block: Tokens
    num_true: int
    masked: int
    positions: Tokens
    targets: Tokens


Answer = tuple[list[float], bool]  # log-probabilities (nats) of a query's targets; whether all are the likeliest


class _DenoiserScorer(Scorer):
    """Runs queries in batches of rows; subclasses say which queries a request needs and how to add them up."""

    def __init__(self, model: Denoising, block_size: int) -> None:
        self.model, self.block_size = model, block_size
        self._contexts = PathContexts(model)

    def queries(self, request: ScoreRequest) -> list[Query]:
        """The denoiser rows that a request needs."""
        raise NotImplementedError

    def likelihood(self, queries: Sequence[Query], answers: Sequence[Answer]) -> Likelihood:
        """A request's likelihood, from the answers to its queries."""
        raise NotImplementedError

    def plan(self, requests: Sequence[ScoreRequest], batch_size: int) -> list[Piece]:
        """See :meth:`Scorer.plan`; contexts may be empty.

        UserError for a continuation with the mask token: no denoiser writes it, so its log-likelihood is minus
        infinity, which no record can hold.
        """
        check_requests(requests, self.model, needs_context=False)
        mask = self.model.mask_token_id
        if any(mask in request.continuation_ids for request in requests):
            raise UserError(
                f"a continuation to be scored holds the mask token {mask}, which a denoiser never writes: its "
                "likelihood there is 0. Score it by --likelihood context_tower, or leave its task out"
            )
        rows = [self._row(request) for request in requests]
        if getattr(self.model, "two_way", False):  # what requests share is not read as a part: it would see less
            alone = [plan([row], MAX_TOKENS)[0] for row in rows]
            each = zip(alone, requests, strict=True)
            return [Piece((i,), partial(self._score_chunk, chunk, [one])) for i, (chunk, one) in enumerate(each)]
        chunks = plan(rows, MAX_TOKENS)
        return [Piece(tuple(chunk.places), partial(self._score_chunk, chunk, requests)) for chunk in chunks]

    def _row(self, request: ScoreRequest) -> Row:
        """The tokens before each block, without the last block's."""
        starts = range(0, len(request.continuation_ids), self.block_size)
        tokens = request.context_ids + request.continuation_ids[: starts[-1]]
        return Row(tokens, tuple(len(request.context_ids) + start - 1 for start in starts))

    def _blocks(self, request: ScoreRequest) -> Iterator[tuple[int, Tokens]]:
        """Number and true tokens (at most K) of every block of the continuation."""
        for number, start in enumerate(range(0, len(request.continuation_ids), self.block_size)):
            yield number, request.continuation_ids[start : start + self.block_size]

    @torch.inference_mode()
    def _score_chunk(self, chunk: Chunk, requests: Sequence[ScoreRequest]) -> list[Likelihood]:
        asked = {index: self.queries(requests[index]) for index in chunk.places}
        by_place: dict[int, list[tuple[int, int]]] = defaultdict(list)  # result -> (request, query)
        for index, queries in asked.items():
            for number, query in enumerate(queries):
                by_place[chunk.places[index][query.before]].append((index, number))
        answers: dict[tuple[int, int], Answer] = {}

        def answer(context: Context, places: Sequence[int]) -> None:
            """Answer every query after row i of the context; that row is result ``places[i]``."""
            names = [(row, name) for row, place in enumerate(places) for name in by_place.get(place, ())]
            for start in range(0, len(names), MAX_ROWS):
                part = names[start : start + MAX_ROWS]
                queries = [asked[index][number] for _, (index, number) in part]
                found = self._denoise(context.select([row for row, _ in part]), queries)
                answers.update(zip((name for _, name in part), found, strict=True))

        context = self._contexts.at(chunk.path)
        if context is None:
            context = self.model.prefill(torch.zeros(1, 0, dtype=torch.int64))
        answer(context, [0])
        self._walk(context, chunk, answer)
        return [
            self.likelihood(queries, [answers[index, number] for number in range(len(queries))])
            for index, queries in asked.items()
        ]

    def _walk(self, context: Context, chunk: Chunk, answer: Callable[[Context, Sequence[int]], None]) -> None:
        """Call ``answer`` with the contexts behind every wanted position of the chunk's tree."""

        def read(chosen: Context, ids_BS: Tensor, lengths: Sequence[int], rows: Sequence[Branch]) -> Context:
            extended = self.model.extend(chosen, ids_BS, lengths)
            # The path's end is result 0, so those of the tree begin at 1.
            answer(extended, [branch.wanted[-1][1] + 1 if branch.wanted else -1 for branch in rows])
            return extended

        walk(context, branches(ending_where_wanted(chunk.segments), contexts=True), read)

    def _denoise(self, context: Context, queries: Sequence[Query]) -> list[Answer]:
        blocks_BK = torch.tensor([query.block for query in queries])
        fractions = [query.masked / self.block_size for query in queries]
        logits_BKV = self.model.denoise(blocks_BK, context, fractions)
        rows = [row for row, query in enumerate(queries) for _ in query.positions]
        columns = [position for query in queries for position in query.positions]
        logits_MV = logits_BKV[rows, columns]
        logits_MV[:, self.model.mask_token_id] = -torch.inf
        targets = [target for query in queries for target in query.targets]
        found = target_logprobs(logits_MV, range(len(targets)), targets)
        answers = []
        for query in queries:
            logprobs, likeliest = zip(*(next(found) for _ in query.targets), strict=True)
            answers.append((list(logprobs), all(likeliest)))
        return answers


class LeftToRightScorer(_DenoiserScorer):
    """Exact chain rule: each token given the context and the committed part of its block, the rest masked."""

    def queries(self, request: ScoreRequest) -> list[Query]:
        """One for every token of the continuation."""
        mask = self.model.mask_token_id
        return [
            Query(
                before=number,
                draw=0,
                block=truth[:position] + (mask,) * (self.block_size - position),
                num_true=len(truth),
                masked=self.block_size - position,
                positions=(position,),
                targets=(token,),
            )
            for number, truth in self._blocks(request)
            for position, token in enumerate(truth)
        ]

    def likelihood(self, queries: Sequence[Query], answers: Sequence[Answer]) -> Likelihood:
        """The sum over tokens."""
        total = sum(sum(logprobs) for logprobs, _ in answers)
        greedy = all(likeliest for _, likeliest in answers)
        return Likelihood(logprob_nats=total, is_greedy=greedy, kind="denoiser_left_to_right")


class BoundScorer(_DenoiserScorer):
    """Per block with m tokens: draw n in 1..m, mask n of them, estimate (m/n) times the sum of -log p over these."""

    def __init__(self, model: Denoising, block_size: int, num_draws: int) -> None:
        super().__init__(model, block_size)
        self.num_draws = num_draws

    def queries(self, request: ScoreRequest) -> list[Query]:
        """For every block as many as there are draws; the request's seed fixes them."""
        generator = torch.Generator().manual_seed(request.seed)
        return [
            self._draw(number, truth, draw, generator)
            for number, truth in self._blocks(request)
            for draw in range(self.num_draws)
        ]

    def _draw(self, number: int, truth: Tokens, draw: int, generator: torch.Generator) -> Query:
        mask, padding = self.model.mask_token_id, self.block_size - len(truth)
        num_masked = int(torch.randint(1, len(truth) + 1, (1,), generator=generator))
        chosen = torch.randperm(len(truth), generator=generator)[:num_masked].sort().values.tolist()
        return Query(
            before=number,
            draw=draw,
            block=tuple(mask if i in chosen else token for i, token in enumerate(truth)) + (mask,) * padding,
            num_true=len(truth),
            masked=num_masked + padding,
            positions=tuple(chosen),
            targets=tuple(truth[i] for i in chosen),
        )

    def likelihood(self, queries: Sequence[Query], answers: Sequence[Answer]) -> Likelihood:
        """Mean over draws, with its standard error. ``is_greedy``: every masked target of every draw was likeliest."""
        values = [0.0] * self.num_draws
        for query, (logprobs, _) in zip(queries, answers, strict=True):
            values[query.draw] += query.num_true / len(query.targets) * sum(logprobs)
        return Likelihood(
            logprob_nats=statistics.fmean(values),
            is_greedy=all(likeliest for _, likeliest in answers),
            kind="bound",
            stderr_nats=statistics.stdev(values) / len(values) ** 0.5,
            num_draws=len(values),
        )


def make(model: Model, kind: LikelihoodKind, *, block_size: int, num_draws: int) -> Scorer:
    """The scorer of a kind; UserError where the model cannot give it."""
    if remote(model) is not None:
        own = cast("Callable[..., Scorer]", resolve("twotower_eval.engine.endpoints.scorer:EndpointScorer"))
        return own(model, kind)
    if kind in ("exact", "context_tower"):
        if lacks(model, "causal"):
            raise UserError(
                f"likelihood {kind} is for models that predict the next token, and {model.checkpoint.name} is of "
                f"family {model.checkpoint.family}: take bound or denoiser_left_to_right"
            )
        if (kind == "context_tower") != model.has_denoiser and model.checkpoint.tower != "context":
            name, is_pair = model.checkpoint.name, model.has_denoiser
            raise UserError(
                f"likelihood exact is for models with one tower, and {name} is a pair: take context_tower"
                if is_pair
                else f"likelihood context_tower is for pairs, and {name} is one tower: take exact"
            )
        return CausalScorer(model, kind)
    if kind not in ("denoiser_left_to_right", "bound"):
        raise UserError(f"likelihood {kind!r} is unknown; choose exact, context_tower, denoiser_left_to_right or bound")
    if lacks(model, "masked"):
        raise UserError(f"likelihood {kind!r} needs a denoiser, and {model.checkpoint.name} has none")
    check_mask(model, f"likelihood {kind!r}")
    if block_size < 1 or (kind == "bound" and num_draws < 2):
        raise UserError("a denoiser likelihood needs block_size of at least 1, a bound at least 2 draws")
    if lacks(model, "two towers"):
        return FamilyBound(masked(model), num_draws) if kind == "bound" else FamilyLeftToRight(masked(model))
    pair = cast(Denoising, model)
    return BoundScorer(pair, block_size, num_draws) if kind == "bound" else LeftToRightScorer(pair, block_size)


class CausalScorer(Scorer):
    """Causal passes: over what requests share once, where the model can branch and has a cache for rows so long; else
    over each request, in batches."""

    def __init__(self, model: Model, kind: LikelihoodKind) -> None:
        self.model, self.kind, self.branching = model, kind, branching(model)
        self._contexts = PathContexts(model)

    def plan(self, requests: Sequence[ScoreRequest], batch_size: int) -> list[Piece]:
        """See :meth:`Scorer.plan`; contexts must not be empty."""
        check_requests(requests, self.model, needs_context=True)
        rows = [_causal_row(request) for request in requests]
        max_tokens, beyond = (
            self.branching.branch_tokens if self.branching else 0,
            getattr(self.model, "plain_beyond", None),
        )
        shared = [i for i, row in enumerate(rows) if max_tokens and (beyond is None or len(row.tokens) <= beyond)]
        own = [requests[i] for i in shared]
        chunks = plan([rows[i] for i in shared], max_tokens) if shared else []
        pieces = [Piece(tuple(shared[i] for i in c.places), partial(self._score_chunk, c, own)) for c in chunks]
        order = sorted({*range(len(rows))} - {*shared}, key=lambda i: -len(rows[i].tokens))
        batches = [order[start : start + batch_size] for start in range(0, len(order), max(1, batch_size))]
        pieces += [Piece(tuple(batch), partial(self._score_rows, [requests[i] for i in batch])) for batch in batches]
        return pieces

    @torch.inference_mode()
    def _score_chunk(self, chunk: Chunk, requests: Sequence[ScoreRequest]) -> list[Likelihood]:
        context = self._contexts.at(chunk.path)
        logits = [] if context is None else [self.model.next_logits(context)]
        if chunk.segments:
            assert self.branching is not None  # chunks are made for such models alone
            logits.append(self.branching.tree_logits(context, chunk.segments))
        # Without a path nothing asks for result 0.
        places = [[place - (context is None) for place in chunk.places[index]] for index in chunk.places]
        targets = [requests[index].continuation_ids for index in chunk.places]
        return self._likelihoods(torch.cat(logits), places, targets)

    @torch.inference_mode()
    def _score_rows(self, requests: Sequence[ScoreRequest]) -> list[Likelihood]:
        ids_BS, lengths = padded_ids([_causal_row(request).tokens for request in requests])
        last = max(len(request.continuation_ids) for request in requests)
        logits_BLV = self.model.context_logits(ids_BS, lengths, last=last)
        targets = [request.continuation_ids for request in requests]
        places = [[(row + 1) * last - len(own) + i for i in range(len(own))] for row, own in enumerate(targets)]
        return self._likelihoods(logits_BLV.flatten(0, 1), places, targets)

    def _likelihoods(
        self, logits_MV: Tensor, places: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> list[Likelihood]:
        """One for each list of targets, whose logits stand at the places."""
        found = target_logprobs(logits_MV, [p for own in places for p in own], [t for own in targets for t in own])
        results = []
        for own in targets:
            logprobs, likeliest = zip(*(next(found) for _ in own), strict=True)
            results.append(Likelihood(logprob_nats=math.fsum(logprobs), is_greedy=all(likeliest), kind=self.kind))
        return results


def _causal_row(request: ScoreRequest) -> Row:
    """The tokens to read, and the positions whose next token is scored; the last token is predicted, never read."""
    tokens = (*request.context_ids, *request.continuation_ids)[:-1]
    return Row(tokens, tuple(range(len(request.context_ids) - 1, len(tokens))))
