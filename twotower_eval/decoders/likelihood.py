"""Log-likelihoods of continuations, by four kinds that must never be mixed up.

``exact``: a causal model's own. ``context_tower``: the same, of a pair's context tower, which the denoiser never
touches. ``denoiser_left_to_right``: exact chain rule through the denoiser, one position unmasked at a time from the
left. ``bound``: Monte-Carlo estimate of the masked-diffusion bound, with its standard error.

For the last two, blocks of K start at the continuation, positions past its end stay masked as in generation, the mask
fraction fed is the actual one, and the mask token is excluded from the softmax.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower_eval.decoders.rows import padded_ids
from twotower_eval.records import Likelihood, LikelihoodKind

MAX_ROWS = 64  # denoiser rows per call


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """How likely is ``continuation_ids`` behind ``context_ids``? ``seed`` fixes the draws of a bound."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    seed: int = 0


def make(model: Any, kind: LikelihoodKind, *, block_size: int, num_draws: int) -> Any:
    """The scorer of a kind; ValueError where the model cannot give it."""
    if kind in ("exact", "context_tower"):
        if (kind == "context_tower") != model.has_denoiser and model.checkpoint.tower != "context":
            given = "context_tower" if model.has_denoiser else "exact"
            raise ValueError(f"likelihood {kind!r} does not fit {model.checkpoint.name}; its causal one is {given!r}")
        return CausalScorer(model, kind)
    if kind not in ("denoiser_left_to_right", "bound"):
        raise ValueError(
            f"likelihood {kind!r} is unknown; choose exact, context_tower, denoiser_left_to_right or bound"
        )
    if not model.has_denoiser:
        raise ValueError(f"likelihood {kind!r} needs a denoiser, and {model.checkpoint.name} has none")
    if block_size < 1 or (kind == "bound" and num_draws < 2):
        raise ValueError("a denoiser likelihood needs block_size of at least 1, a bound at least 2 draws")
    if kind == "bound":
        return BoundScorer(model, block_size, num_draws)
    return LeftToRightScorer(model, block_size)


class CausalScorer:
    """One causal pass over context and continuation, a batch at a time."""

    def __init__(self, model: Any, kind: LikelihoodKind) -> None:
        self.model, self.kind = model, kind

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Likelihood]:
        """One likelihood per request; the context must not be empty."""
        if not requests:
            return []
        _check(requests, self.model, needs_context=True)
        rows = [[*r.context_ids, *r.continuation_ids][:-1] for r in requests]
        ids_BS, lengths = padded_ids(rows)
        last = max(len(r.continuation_ids) for r in requests)
        logits_BLV = self.model.context_logits(ids_BS, lengths, last=last)
        results = []
        for request, logits_LV in zip(requests, logits_BLV, strict=True):
            targets = torch.tensor(request.continuation_ids, device=logits_LV.device)
            own_LV = logits_LV[last - len(targets) :].log_softmax(-1)
            total = own_LV.gather(1, targets[:, None]).double().sum()
            greedy = bool((own_LV.argmax(-1) == targets).all())
            results.append(Likelihood(logprob_nats=float(total), is_greedy=greedy, kind=self.kind))
        return results


@dataclass(frozen=True)
class _Query:
    """One denoiser row: a noisy block on a known prefix, and the positions whose tokens are asked for."""

    request: int
    draw: int
    prefix: tuple[int, ...]
    block: tuple[int, ...]
    num_true: int
    masked: int
    positions: tuple[int, ...]
    targets: tuple[int, ...]


class _DenoiserScorer:
    """Runs queries in batches of rows; subclasses say which queries a request needs and how to add them up."""

    def __init__(self, model: Any, block_size: int) -> None:
        self.model, self.block_size = model, block_size

    def _blocks(self, request: ScoreRequest) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Prefix and true tokens (at most K) of every block of the continuation."""
        for start in range(0, len(request.continuation_ids), self.block_size):
            end = start + self.block_size
            yield request.context_ids + request.continuation_ids[:start], request.continuation_ids[start:end]

    def _logprobs(self, queries: Sequence[_Query]) -> list[tuple[list[float], bool]]:
        """For each query the log-probabilities (nats) of its targets, and whether all are the likeliest."""
        results = []
        for start in range(0, len(queries), MAX_ROWS):
            results.extend(self._batch(queries[start : start + MAX_ROWS]))
        return results

    def _batch(self, queries: Sequence[_Query]) -> list[tuple[list[float], bool]]:
        prefixes = list(dict.fromkeys(query.prefix for query in queries))
        context = self.model.prefill(*padded_ids(prefixes))
        context = context.select([prefixes.index(query.prefix) for query in queries])
        blocks_BK = torch.tensor([query.block for query in queries])
        fractions = [query.masked / self.block_size for query in queries]
        logits_BKV: Tensor = self.model.denoise(blocks_BK, context, fractions)
        logits_BKV[..., self.model.mask_token_id] = -torch.inf
        results = []
        for query, logits_KV in zip(queries, logits_BKV, strict=True):
            targets = torch.tensor(query.targets, device=logits_KV.device)
            own = logits_KV[list(query.positions)].log_softmax(-1)
            logprobs = own.gather(1, targets[:, None])[:, 0].tolist()
            results.append((logprobs, bool((own.argmax(-1) == targets).all())))
        return results


class LeftToRightScorer(_DenoiserScorer):
    """Exact chain rule: each token given the context and the committed part of its block, the rest masked."""

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Likelihood]:
        """One likelihood per request."""
        _check(requests, self.model, needs_context=False)
        queries = [query for i, request in enumerate(requests) for query in self._queries(i, request)]
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        for query, (logprobs, likeliest) in zip(queries, self._logprobs(queries), strict=True):
            totals[query.request] += sum(logprobs)
            greedy[query.request] &= likeliest
        return [
            Likelihood(logprob_nats=total, is_greedy=g, kind="denoiser_left_to_right")
            for total, g in zip(totals, greedy, strict=True)
        ]

    def _queries(self, index: int, request: ScoreRequest) -> Iterator[_Query]:
        mask = self.model.mask_token_id
        for prefix, truth in self._blocks(request):
            for position, token in enumerate(truth):
                open_count = self.block_size - position
                block = truth[:position] + (mask,) * open_count
                yield _Query(index, 0, prefix, block, len(truth), open_count, (position,), (token,))


class BoundScorer(_DenoiserScorer):
    """Per block with m tokens: draw n in 1..m, mask n of them, estimate (m/n) times the sum of -log p over these."""

    def __init__(self, model: Any, block_size: int, num_draws: int) -> None:
        super().__init__(model, block_size)
        self.num_draws = num_draws

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Likelihood]:
        """Mean over draws, with its standard error. ``is_greedy``: every masked target of every draw was likeliest."""
        _check(requests, self.model, needs_context=False)
        queries = [query for i, request in enumerate(requests) for query in self._queries(i, request)]
        draws = [[0.0] * self.num_draws for _ in requests]
        greedy = [True] * len(requests)
        for query, (logprobs, likeliest) in zip(queries, self._logprobs(queries), strict=True):
            draws[query.request][query.draw] += query.num_true / len(query.targets) * sum(logprobs)
            greedy[query.request] &= likeliest
        return [
            Likelihood(
                logprob_nats=statistics.fmean(values),
                is_greedy=g,
                kind="bound",
                stderr_nats=statistics.stdev(values) / len(values) ** 0.5,
                num_draws=len(values),
            )
            for values, g in zip(draws, greedy, strict=True)
        ]

    def _queries(self, index: int, request: ScoreRequest) -> Iterator[_Query]:
        mask, generator = self.model.mask_token_id, torch.Generator().manual_seed(request.seed)
        for prefix, truth in self._blocks(request):
            padding = self.block_size - len(truth)
            for draw in range(self.num_draws):
                num_masked = int(torch.randint(1, len(truth) + 1, (1,), generator=generator))
                chosen = torch.randperm(len(truth), generator=generator)[:num_masked].sort().values.tolist()
                block = tuple(mask if i in chosen else token for i, token in enumerate(truth)) + (mask,) * padding
                targets = tuple(truth[i] for i in chosen)
                yield _Query(index, draw, prefix, block, len(truth), num_masked + padding, tuple(chosen), targets)


def _check(requests: Sequence[ScoreRequest], model: Any, *, needs_context: bool) -> None:
    for request in requests:
        if not request.continuation_ids:
            raise ValueError("a continuation to be scored must have at least one token")
        if needs_context and not request.context_ids:
            raise ValueError("a causal likelihood needs at least one context token; put BOS or EOS in front")
        ids = request.context_ids + request.continuation_ids
        if not 0 <= min(ids) <= max(ids) < model.vocab_size:
            raise ValueError(f"a request has a token id outside the vocabulary of {model.vocab_size}")
