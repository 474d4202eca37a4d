"""Log-likelihoods of continuations, by four kinds that must never be mixed up.

``exact``: a causal model's own. ``context_tower``: the same, of a pair's context tower, which the denoiser never
touches. ``denoiser_left_to_right``: exact chain rule through the denoiser, one position unmasked at a time from the
left. ``bound``: Monte-Carlo estimate of the masked-diffusion bound, with its standard error.

For the last two, blocks of K start at the continuation, positions past its end stay masked as in generation, the mask
fraction fed is the actual one, and the mask token is excluded from the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from twotower_eval.engine.decoders.rows import padded_ids
from twotower_eval.engine.models.protocol import Model, branching, two_tower
from twotower_eval.engine.scorers.denoiser_likelihood import BoundScorer, LeftToRightScorer
from twotower_eval.engine.scorers.pieces import (
    PathContexts,
    Piece,
    Scorer,
    ScoreRequest,
    check_requests,
    target_logprobs,
)
from twotower_eval.engine.scorers.prefixes import Chunk, Row, plan
from twotower_eval.errors import UserError
from twotower_eval.records import Likelihood, LikelihoodKind


def make(model: Model, kind: LikelihoodKind, *, block_size: int, num_draws: int) -> Scorer:
    """The scorer of a kind; UserError where the model cannot give it."""
    if kind in ("exact", "context_tower"):
        if (kind == "context_tower") != model.has_denoiser and model.checkpoint.tower != "context":
            given = "context_tower" if model.has_denoiser else "exact"
            raise UserError(f"likelihood {kind!r} does not fit {model.checkpoint.name}; its causal one is {given!r}")
        return CausalScorer(model, kind)
    if kind not in ("denoiser_left_to_right", "bound"):
        raise UserError(f"likelihood {kind!r} is unknown; choose exact, context_tower, denoiser_left_to_right or bound")
    pair = two_tower(model, f"likelihood {kind!r} needs a denoiser, and {model.checkpoint.name} has none")
    if block_size < 1 or (kind == "bound" and num_draws < 2):
        raise UserError("a denoiser likelihood needs block_size of at least 1, a bound at least 2 draws")
    if kind == "bound":
        return BoundScorer(pair, block_size, num_draws)
    return LeftToRightScorer(pair, block_size)


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
        # Where there is no path, result 0 is nothing that anyone asks for.
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
    """What is read and behind what; the last token is predicted, never read."""
    tokens = (*request.context_ids, *request.continuation_ids)[:-1]
    return Row(tokens, tuple(range(len(request.context_ids) - 1, len(tokens))))
