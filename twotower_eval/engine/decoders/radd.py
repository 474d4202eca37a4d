"""RADD's samplers (arXiv 2406.03736): each mask becomes a token at a rate that follows from the schedule, or masks do
one after the other in some order. Shape letters: G tokens of a canvas, N chosen ones, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.decoders.limits import within_top_p
from twotower_eval.engine.decoders.rows import Noise, check_counts, check_top_p
from twotower_eval.engine.decoders.sampled import Draft, SampledDecoder, race
from twotower_eval.engine.schedules import LogLinear
from twotower_eval.errors import UserError

METHODS = ("tweedie", "euler", "ordered")
LAST_RATE = 1.001  # of the last step, so that staying a mask has a weight below 0
SCHEDULE = LogLinear()


@dataclass(frozen=True, kw_only=True)
class Params:
    """``method``: the rate of a step is exact (``tweedie``) or to first order (``euler``), or it fills one position, in
    an order drawn at the start (``ordered``, as many steps as tokens). ``steps`` None: as many as tokens. Time runs
    from 1 to ``eps``. ``top_p`` and ``top_k`` choose positions first, then tokens from the cut distribution.

    Published samplers' ways: ``commit_mask`` lets the mask be drawn with ``top_p`` and ``top_k``, in the last step too;
    ``half`` rounds probabilities to float16; ``all_steps`` goes on when nothing is masked any more.
    """

    method: Literal["tweedie", "euler", "ordered"] = "tweedie"
    steps: int | None = None
    eps: float = 1e-5
    top_p: float | None = None
    top_k: int | None = None
    commit_mask: bool = False
    half: bool = False
    all_steps: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "steps", "top_k")
        if self.method not in METHODS:
            raise UserError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if not 0 < self.eps < 1:
            raise UserError(f"eps must lie between 0 and 1, not {self.eps!r}")
        check_top_p(self.top_p)
        if self.top_p is not None and self.top_k is not None:
            raise UserError("top_p and top_k are two ways to cut a distribution: give one of them")


class RADD(SampledDecoder[Params]):
    """RADD's samplers."""

    KIND = "radd"
    Params = Params
    VERSION = 1

    @property
    def _ordered(self) -> bool:
        return self.params.method == "ordered"

    @property
    def _cut(self) -> bool:
        return self.params.top_p is not None or self.params.top_k is not None

    def num_steps(self, draft: Draft) -> int:
        """Those planned; in order, one for each token."""
        num = len(draft.tokens_G)
        return num if self._ordered else self.params.steps or num

    def opened(self, draft: Draft, noise: Noise, row: int) -> None:
        """Draw the order."""
        if self._ordered:
            draft.order = noise.uniform(row, len(draft.tokens_G)).argsort()

    def is_done(self, draft: Draft) -> bool:
        """Also when nothing is masked any more, unless all steps are asked for."""
        over = draft.step >= self.num_steps(draft)
        return over if self.params.all_steps else over or not bool(draft.masked_G.any())

    def chosen(self, draft: Draft, noise: Noise, row: int) -> Tensor:
        """All masks; where the distribution is cut those that a draw below the rate falls on; or the next in order."""
        masked_G = draft.masked_G
        if draft.order is not None:
            return torch.arange(len(masked_G)) == draft.order[draft.step]
        if not self._cut or self._is_last(draft):
            return masked_G
        return masked_G & (noise.uniform(row, len(masked_G)) < self._rate(draft))

    def drawn(self, draft: Draft, chosen_G: Tensor, noise: Noise, row: int) -> Tensor:
        """Tokens at the chosen positions."""
        logits_NV = draft.logits[chosen_G].clone()
        if self._ordered:
            logits_NV = logits_NV[:, : draft.mask_id]
        elif not (self._cut and self.params.commit_mask):
            logits_NV[:, draft.mask_id] = -torch.inf
        tokens_G = draft.tokens_G.clone()
        tokens_G[chosen_G] = self._tokens(draft, logits_NV, noise, row)
        return tokens_G

    def _tokens(self, draft: Draft, logits_NV: Tensor, noise: Noise, row: int) -> Tensor:
        if self.params.top_k is not None:
            best_NK, tokens_NK = logits_NV.topk(min(self.params.top_k, logits_NV.shape[1]), dim=-1)
            won_N = _race(best_NK.softmax(-1), noise, row)
            return tokens_NK.gather(-1, won_N[:, None])[:, 0]
        if self.params.top_p is not None:
            return _race(within_top_p(logits_NV, self.params.top_p).softmax(-1), noise, row)
        probability_NV = logits_NV.softmax(-1)
        if not self._ordered:
            rate = torch.tensor(LAST_RATE) if self._is_last(draft) else self._rate(draft)
            probability_NV = step_weights(probability_NV, draft.mask_id, rate, half=self.params.half)
        return _race(probability_NV, noise, row)

    def _is_last(self, draft: Draft) -> bool:
        return draft.step == self.num_steps(draft) - 1

    def _rate(self, draft: Draft) -> Tensor:
        return rates(self.num_steps(draft), self.params.eps, euler=self.params.method == "euler")[draft.step]


def _race(probability_NV: Tensor, noise: Noise, row: int) -> Tensor:
    return race(probability_NV, noise.uniform(row, probability_NV.numel()).view_as(probability_NV))


def rates(num_steps: int, eps: float, *, euler: bool) -> Tensor:
    """The probability of each step that a mask becomes a token, (steps,).

    >>> rates(4, 1e-5, euler=False).round(decimals=3)
    tensor([0.2500, 0.3330, 0.5000, 1.0000])
    """
    t = torch.linspace(1, eps, num_steps + 1)[:-1]
    dt = (1 - eps) / num_steps
    visible_t = torch.exp(-SCHEDULE.sigma(t))
    if euler:
        return dt * SCHEDULE.rate(t) * visible_t / (1 - visible_t)
    return (torch.exp(-SCHEDULE.sigma(t - dt)) - visible_t) / (1 - visible_t)


def step_weights(probability_NV: Tensor, mask_id: int, rate: Tensor, *, half: bool) -> Tensor:
    """Unnormalised probabilities of what a mask becomes in a step at this rate; ``half``: rounded to float16 before and
    after they are multiplied by it."""
    weight_NV = probability_NV.half() * rate if half else probability_NV * rate
    weight_NV[:, mask_id] = 1 - rate
    return weight_NV
