"""Scorers behind one protocol: contexts and continuations in, log-likelihoods out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from twotower_eval.records import Likelihood, LikelihoodKind

if TYPE_CHECKING:
    from twotower_eval.engine.models.protocol import Model
    from twotower_eval.engine.scorers.pieces import Piece, ScoreRequest


class Scorer(Protocol):
    """Log-likelihoods of continuations, in the order of the requests; or in pieces, each to be journalled when done."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Likelihood]: ...
    def plan(self, requests: Sequence[ScoreRequest], batch_size: int) -> list[Piece]: ...


def make_scorer(model: Model, kind: LikelihoodKind, *, block_size: int = 16, num_draws: int = 32) -> Scorer:
    """A scorer of the given kind, see :mod:`twotower_eval.engine.scorers.likelihood`; UserError where the model
    cannot give it."""
    from twotower_eval.engine.scorers.likelihood import make

    return make(model, kind, block_size=block_size, num_draws=num_draws)
