"""Log-likelihoods of models whose one network predicts masks and reads the context: bounds, and from left to right.

Where a family reads blocks behind a cache, these are scored one after the other, each behind those before it, as they
are decoded: they are counted from the first token of a row, so that the first may begin with tokens of the context, and
positions behind the end stay masked. Where it reads prompt and answer in every call, a continuation is one block. The
mask token is excluded from the softmax. Shape letters: N rows, K block, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from twotower_eval.engine.models.counting import reads_prompts
from twotower_eval.engine.models.protocol import Context, Masked
from twotower_eval.engine.scorers.pieces import Piece, Scorer, ScoreRequest, Tokens, check_requests
from twotower_eval.errors import UserError
from twotower_eval.records import Likelihood, LikelihoodKind

MAX_ROWS = 64  # of one call


@dataclass(frozen=True)
class Span:
    """A block of a continuation: tokens of the context that stand in it, its own, and the places behind its end."""

    known: Tokens
    truth: Tokens
    num_behind: int

    @property
    def tokens(self) -> Tokens:
        """What is read of it once it is finished."""
        return self.known + self.truth

    def noisy(self, masked: Sequence[int], mask: int) -> Tokens:
        """The block where these places of its own tokens are masked, and all behind its end."""
        hidden = frozenset(masked)
        own = tuple(mask if place in hidden else token for place, token in enumerate(self.truth))
        return self.known + own + (mask,) * self.num_behind


class FamilyScorer(Scorer):
    """Base of both kinds: they score the spans of a request."""

    kind: LikelihoodKind

    def __init__(self, model: Masked) -> None:
        self.model = model

    def scored(self, request: ScoreRequest) -> Likelihood:
        """The likelihood of one request."""
        raise NotImplementedError

    def plan(self, requests: Sequence[ScoreRequest], batch_size: int) -> list[Piece]:
        """See :meth:`Scorer.plan`; contexts may be empty. UserError for a continuation with the mask token."""
        check_requests(requests, self.model, needs_context=False)
        mask = self.model.mask_token_id
        if any(mask in request.continuation_ids for request in requests):
            raise UserError(
                f"a continuation to be scored holds the mask token {mask}, which the model never writes: its "
                "likelihood there is 0; leave its task out"
            )
        return [Piece((i,), partial(self._one, request)) for i, request in enumerate(requests)]

    @torch.inference_mode()
    def _one(self, request: ScoreRequest) -> list[Likelihood]:
        return [self.scored(request)]

    def _spans(self, request: ScoreRequest) -> Iterator[tuple[Span, Context]]:
        """The blocks of a continuation, each with the context of all before it."""
        before, truth = request.context_ids, request.continuation_ids
        if not reads_prompts(self.model):
            yield Span((), truth, 0), self.model.prefill(torch.tensor([before], dtype=torch.int64))
            return
        size = int(self.model.block_size)  # type: ignore[attr-defined]
        ends_with_prompt = bool(getattr(self.model, "ends_with_prompt", False))
        num_known = 0 if ends_with_prompt else len(before) % size
        known, read = before[len(before) - num_known :], before[: len(before) - num_known]
        context = self.model.prefill(torch.tensor([read], dtype=torch.int64))
        while truth:
            own, truth = truth[: size - len(known)], truth[size - len(known) :]
            span = Span(known, own, size - len(known) - len(own))
            yield span, context
            if truth:
                context = self.model.extend(context, torch.tensor([span.tokens]))
            known = ()

    def _logprobs(self, context: Context, span: Span, masked: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """For each set of masked places the log-probabilities (V,) at these, stacked (places, V)."""
        mask = self.model.mask_token_id
        for start in range(0, len(masked), MAX_ROWS):
            sets = masked[start : start + MAX_ROWS]
            noisy_NK = torch.tensor([span.noisy(places, mask) for places in sets])
            fractions = [float((row_K == mask).double().mean()) for row_K in noisy_NK]
            logits_NKV = self.model.denoise(noisy_NK, context.select([0] * len(sets)), fractions)
            logits_NKV[..., mask] = -torch.inf
            for places, logits_KV in zip(sets, logits_NKV, strict=True):
                yield logits_KV[[len(span.known) + place for place in places]].double().log_softmax(-1).cpu()


class FamilyBound(FamilyScorer):
    """Per block of m tokens and draw: mask n of them, n even in 1..m; (m/n) times the sum of their log-probabilities.

    ``is_greedy``: filling the masks one by one, the most confident first, gives the continuation (LLaDA's way).
    """

    kind = "bound"

    def __init__(self, model: Masked, num_draws: int) -> None:
        super().__init__(model)
        self.num_draws = num_draws

    def scored(self, request: ScoreRequest) -> Likelihood:
        """Mean over the draws, which the request's seed fixes, with its standard error."""
        generator = torch.Generator().manual_seed(request.seed)
        values, greedy = [0.0] * self.num_draws, True
        for span, context in self._spans(request):
            masked = [self._drawn(len(span.truth), generator) for _ in values]
            for draw, logprob_MV in enumerate(self._logprobs(context, span, masked)):
                targets = torch.tensor([span.truth[place] for place in masked[draw]])
                total = float(logprob_MV.gather(-1, targets[:, None]).sum())
                values[draw] += len(span.truth) / len(targets) * total
            greedy = greedy and self._matches(context, span)
        return Likelihood(
            logprob_nats=statistics.fmean(values),
            is_greedy=greedy,
            kind=self.kind,
            stderr_nats=statistics.stdev(values) / len(values) ** 0.5,
            num_draws=len(values),
        )

    def _drawn(self, num: int, generator: torch.Generator) -> list[int]:
        num_masked = int(torch.randint(1, num + 1, (1,), generator=generator))
        places: list[int] = torch.randperm(num, generator=generator)[:num_masked].sort().values.tolist()
        return places

    def _matches(self, context: Context, span: Span) -> bool:
        left = list(range(len(span.truth)))
        while left:
            (logprob_MV,) = self._logprobs(context, span, [left])
            best_M, tokens_M = logprob_MV.max(-1)
            first = int(best_M.argmax())
            if int(tokens_M[first]) != span.truth[left[first]]:
                return False
            del left[first]
        return True


class FamilyLeftToRight(FamilyScorer):
    """The chain rule: each token where it and all behind it in its block are masked."""

    kind = "denoiser_left_to_right"

    def scored(self, request: ScoreRequest) -> Likelihood:
        """The sum over tokens. ``is_greedy``: each is the likeliest at its place."""
        total, greedy = 0.0, True
        for span, context in self._spans(request):
            num = len(span.truth)
            masked = [range(place, num) for place in range(num)]
            for token, logprob_MV in zip(span.truth, self._logprobs(context, span, masked), strict=True):
                total += float(logprob_MV[0, token])
                greedy = greedy and int(logprob_MV[0].argmax()) == token
        return Likelihood(logprob_nats=total, is_greedy=greedy, kind=self.kind)
