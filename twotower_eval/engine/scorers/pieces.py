"""What scorers have in common: requests, the pieces in which they are scored, contexts kept along a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import Context, Model
from twotower_eval.engine.scorers.prefixes import Tokens
from twotower_eval.errors import UserError
from twotower_eval.records import Likelihood


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """How likely is ``continuation_ids`` behind ``context_ids``? ``seed`` fixes the draws of a bound."""

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
