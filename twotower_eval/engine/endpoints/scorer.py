"""Log-likelihoods from a server that gives those of a prompt's own tokens: vLLM's ``prompt_logprobs``, or ``echo`` with
``logprobs`` as in OpenAI's first completions.

Both need prompts as token ids: only then is it known where a continuation begins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from twotower_eval.engine.endpoints.client import PROBE, Ask, EndpointError
from twotower_eval.engine.endpoints.model import COMPLETIONS, EndpointModel
from twotower_eval.engine.endpoints.streams import Reply
from twotower_eval.engine.models.tokenizer import prompt_ids
from twotower_eval.engine.scorers.pieces import Piece, Scorer, ScoreRequest, check_requests
from twotower_eval.errors import UserError
from twotower_eval.records import Likelihood, LikelihoodKind

Way = Literal["prompt_logprobs", "echo"]
WAYS: Mapping[Way, Mapping[str, object]] = {
    "prompt_logprobs": {"prompt_logprobs": 1},
    "echo": {"echo": True, "logprobs": 1},
}
TokenLogprob = tuple[float, bool]  # nats, and whether no other token is likelier


class EndpointScorer(Scorer):
    """Each request is a prompt of context and continuation; of the one token made behind it nothing is used."""

    def __init__(self, model: EndpointModel, kind: LikelihoodKind) -> None:
        if kind != "exact":
            raise UserError(f"likelihood {kind!r} needs a model that is here, not one behind a server: take exact")
        if model.asks_chats:
            raise UserError(f"{model.checkpoint.source}: chat completions give no log-likelihoods")
        self.model, self.kind = model, kind
        self._way = self._probed()

    def plan(self, requests: Sequence[ScoreRequest], batch_size: int) -> list[Piece]:
        """See :meth:`Scorer.plan`; ``batch_size`` requests at a time, contexts must not be empty."""
        check_requests(requests, self.model, needs_context=True)  # type: ignore[arg-type]
        starts = range(0, len(requests), max(1, batch_size))
        batches = [tuple(range(start, min(start + batch_size, len(requests)))) for start in starts]
        return [Piece(batch, partial(self._score, [requests[i] for i in batch])) for batch in batches]

    def _score(self, requests: Sequence[ScoreRequest]) -> list[Likelihood]:
        asks = [self._ask(request.context_ids + request.continuation_ids, self._way, "a text") for request in requests]
        replies: dict[int, Reply] = {}
        self.model.client.ask(asks, on_reply=replies.__setitem__, on_retry=self.model.on_retry)
        found = []
        for index, request in enumerate(requests):
            ids = request.context_ids + request.continuation_ids
            scored = token_logprobs(replies[index], ids, self._way)
            if scored is None:
                raise EndpointError(f"{self.model.checkpoint.source}: gave no log-probabilities of {len(ids)} tokens")
            logprobs, likeliest = zip(*scored[-len(request.continuation_ids) :], strict=True)
            found.append(
                Likelihood(logprob_nats=min(0.0, math.fsum(logprobs)), is_greedy=all(likeliest), kind=self.kind)
            )
        return found

    def _ask(self, ids: Sequence[int], way: Way, label: str) -> Ask:
        return Ask(path=COMPLETIONS, body=self.model.body(ids, 1, **WAYS[way]), label=label)

    def _probed(self) -> Way:
        """How the server gives log-probabilities of a prompt. UserError if it does not."""
        ids = prompt_ids(self.model, PROBE)  # type: ignore[arg-type]
        for way in WAYS if self.model.sends_ids else ():
            replies: dict[int, Reply] = {}
            try:
                self.model.client.ask([self._ask(ids, way, "a probe")], on_reply=replies.__setitem__)
            except EndpointError as error:
                if error.status is None:
                    raise
                continue
            if token_logprobs(replies[0], ids, way) is not None:
                return way
        why = "gives none of a prompt" if self.model.sends_ids else "takes no prompts as token ids, which they need"
        raise UserError(
            f"{self.model.checkpoint.source}: log-likelihoods need the log-probabilities of a prompt's tokens, and "
            f"this server {why}: leave out the tasks that are scored by them"
        )


def token_logprobs(reply: Reply, ids: Sequence[int], way: Way) -> list[TokenLogprob] | None:
    """Of every prompt token but the first, in order; None where a reply does not hold them."""
    choice = reply.choice or {}
    found = _of_prompt(choice, ids) if way == "prompt_logprobs" else _of_echo(choice, len(ids))
    known = found is not None and len(found) == len(ids) - 1 and all(math.isfinite(nats) for nats, _ in found)
    return found if known else None


def _of_prompt(choice: Mapping[str, object], ids: Sequence[int]) -> list[TokenLogprob] | None:
    """vLLM's: for each token a table of ids with their log-probability and rank, the token's own among them."""
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(ids):
        return None
    found = []
    for token, row in zip(ids[1:], rows[1:], strict=True):
        told = row.items() if isinstance(row, dict) else ()
        nats = {key: float(one["logprob"]) for key, one in told if isinstance(one, dict) and _is_number(one, "logprob")}
        own = nats.get(str(token))
        if own is None:
            return None
        rank = row[str(token)].get("rank")
        found.append((own, own >= max(nats.values()) if rank is None else rank == 1))
    return found


def _of_echo(choice: Mapping[str, object], num_prompt_tokens: int) -> list[TokenLogprob] | None:
    """OpenAI's: lists over the prompt's tokens and the one made behind them, of which there may be none."""
    said: Any = choice.get("logprobs")
    if not isinstance(said, dict):
        return None
    own, top = said.get("token_logprobs"), said.get("top_logprobs")
    if not isinstance(own, list) or not isinstance(top, list) or not 0 <= len(own) - num_prompt_tokens <= 1:
        return None
    found = []
    for nats, others in zip(own[1:num_prompt_tokens], top[1:num_prompt_tokens], strict=False):
        if not isinstance(nats, int | float) or not isinstance(others, dict):
            return None
        likeliest = max((others[key] for key in others if _is_number(others, key)), default=nats)
        found.append((float(nats), nats >= likeliest))
    return found


def _is_number(table: Mapping[str, Any], key: str) -> bool:
    return isinstance(table.get(key), int | float)
