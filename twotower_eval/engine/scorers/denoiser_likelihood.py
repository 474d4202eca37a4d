"""Log-likelihoods through the denoiser; see likelihood.py for what the two kinds are.

Contexts before the blocks come out of the tree of what requests share; every position or draw is one denoiser row.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import Context, Denoising
from twotower_eval.engine.models.token_tree import Branch, branches, walk
from twotower_eval.engine.scorers.pieces import (
    PathContexts,
    Piece,
    Scorer,
    ScoreRequest,
    check_requests,
    target_logprobs,
)
from twotower_eval.engine.scorers.prefixes import Chunk, Row, Tokens, ending_where_wanted, plan
from twotower_eval.errors import UserError
from twotower_eval.records import Likelihood

MAX_ROWS = 64  # denoiser rows per call
MAX_TOKENS = 256  # context tokens per piece: the denoiser costs more, so that larger ones would gain nothing


@dataclass(frozen=True)
class Query:
    """One denoiser row: a noisy block behind the ``before``-th block of its request, and the positions whose tokens
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
        """What must be known of a request."""
        raise NotImplementedError

    def likelihood(self, queries: Sequence[Query], answers: Sequence[Answer]) -> Likelihood:
        """What the answers to a request's queries come to."""
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
        chunks = plan([self._row(request) for request in requests], MAX_TOKENS)
        return [Piece(tuple(chunk.places), partial(self._score_chunk, chunk, requests)) for chunk in chunks]

    def _row(self, request: ScoreRequest) -> Row:
        """What stands before each block, the last block's tokens left out."""
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
            """Whatever is asked behind row i of the context, which is result ``places[i]``."""
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
        """As many as there are draws, for every block; the request's seed fixes them."""
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
