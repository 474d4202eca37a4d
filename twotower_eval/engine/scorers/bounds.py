"""Bounds of masked diffusion models as their papers estimate them, from random numbers that the caller draws.

Each paper has its own times, probabilities of a mask and weights: :class:`Noised`. All else they share. Values are in
nats; a bound is a bound only in the mean over draws. Shape letters: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_eval.engine.schedules import LogLinear

NEVER = -1e6  # stands for the logarithm of no probability at all
LEAST_TIME = 1e-3
LAST_TIME = 1 - 1e-4  # no weight is taken from beyond it
SCHEDULE = LogLinear()


@dataclass(frozen=True)
class Noised:
    """Times, the probability that a token is masked, and the weight of a masked token's negative log-probability; each
    (B,), or (B, L) where blocks have times of their own."""

    t: Tensor
    masked: Tensor
    weight: Tensor


def subs_logprobs(logits_BLV: Tensor, ids_BL: Tensor, mask_id: int, *, never: float = NEVER) -> Tensor:
    """Log-probabilities (B, L, V) in MDLM's parameterisation: no mask is predicted, and what is no mask stays."""
    logits_BLV = logits_BLV.clone()
    logits_BLV[..., mask_id] += never
    logprob_BLV = logits_BLV.log_softmax(-1)
    clean_BL1 = (ids_BL != mask_id)[..., None]
    stays_BLV = torch.full_like(logprob_BLV, never).scatter(-1, ids_BL[..., None], 0.0)
    return torch.where(clean_BL1, stays_BLV, logprob_BLV)


def nll(logprob_BLV: Tensor, ids_BL: Tensor, noised: Noised, counted_BL: Tensor) -> Tensor:
    """What each token contributes to the negative bound, (B, L); 0 where it is not counted."""
    weight = noised.weight if noised.weight.ndim == 2 else noised.weight[:, None]
    return -logprob_BLV.gather(-1, ids_BL[..., None])[..., 0] * weight * counted_BL


def spread(uniform: Tensor) -> Tensor:
    """Random numbers of [0, 1), one in each of as many equal parts of it, so that their mean varies less."""
    flat = uniform.flatten()
    return ((flat / len(flat) + torch.arange(len(flat)) / len(flat)) % 1).view_as(uniform)


def mdlm_noised(
    uniform_B: Tensor, *, num_steps: int = 0, importance: bool = False, change_of_variables: bool = False
) -> Noised:
    """MDLM's: continuous, of ``num_steps`` steps, or with times drawn so that all weights are equal, which the paper
    has in two forms. ``t`` are times as drawn, before they are moved to the end of their step."""
    t = (1 - LEAST_TIME) * spread(uniform_B) + LEAST_TIME
    if importance or change_of_variables:
        return _evenly_weighted(t, as_times=importance)
    if not num_steps:
        return Noised(t, SCHEDULE.masked(t), SCHEDULE.weight(t))
    end = (t * num_steps).int() / num_steps + 1 / num_steps
    return Noised(t, SCHEDULE.masked(end), 1 / end.clamp(max=LAST_TIME))


def _evenly_weighted(t: Tensor, *, as_times: bool) -> Noised:
    """Times by which the probability of a mask is even in its logarithm; ``as_times``: they are warped to that."""
    first, last = math.log1p(-math.exp(-LEAST_TIME)), math.log1p(-LEAST_TIME)
    weight = torch.full_like(t, -first)
    if not as_times:
        return Noised(t, torch.exp(first + t * (last - first)), weight)
    sigma = -torch.log1p(-torch.exp(t * last + (1 - t) * first))
    warped = -torch.expm1(-sigma) / (1 - SCHEDULE.eps)
    return Noised(warped, SCHEDULE.masked(warped), weight)


def bd3lm_noised(uniform_BN: Tensor, block_size: int, *, low: float, high: float, mdlm_weight: bool) -> Noised:
    """BD3-LM's, with a time for each of N blocks of a row, between the two limits: a bound only from 0.001 to 1.

    Above 0.5 as the lower limit nothing is weighted; ``mdlm_weight`` takes MDLM's probabilities and weights.
    """
    t = (spread(uniform_BN) * (high - low) + low).repeat_interleave(block_size, dim=1)
    if mdlm_weight:
        return Noised(t, SCHEDULE.masked(t), SCHEDULE.weight(t))
    return Noised(t, t, torch.ones_like(t)) if low > 0.5 else at_times(t)


def e2d2_noised(uniform_BN: Tensor, block_size: int) -> Noised:
    """E2D2's, with a time for each of N blocks of a row: a token is masked with probability t."""
    return at_times(((1 - LEAST_TIME) * uniform_BN + LEAST_TIME).repeat_interleave(block_size, dim=1))


def at_times(t_BL: Tensor) -> Noised:
    """For times of every token, each as likely to be masked as its time."""
    return Noised(t_BL, t_BL, 1 / t_BL)


def unmasked_logprobs(logits_BLV: Tensor, mask_id: int) -> Tensor:
    """RADD's log-probabilities (B, L, V): over all tokens but the mask, whose channel keeps its raw logit."""
    logits_BLV = logits_BLV.clone()
    kept = logits_BLV[..., mask_id].clone()
    logits_BLV[..., mask_id] = -torch.inf
    logprob_BLV = logits_BLV.log_softmax(-1)
    logprob_BLV[..., mask_id] = kept
    return logprob_BLV


def spread_from(uniform: Tensor, num: int) -> Tensor:
    """``num`` evenly spaced numbers of [0, 1) from one random number."""
    return (uniform + torch.arange(num) / num) % 1


def radd_noised(uniform: Tensor, num: int) -> Noised:
    """RADD's times from one random number, and their weights in its bounds over time."""
    t = (1 - LEAST_TIME) * spread_from(uniform, num) + LEAST_TIME
    return Noised(t, SCHEDULE.masked(t), SCHEDULE.weight(t))


def lambda_bound(logprob_BL: Tensor, masked_BL: Tensor, masked_B: Tensor) -> Tensor:
    """RADD's bound by the probability of a mask itself: ``logprob_BL`` are those of the tokens, (B,) float64."""
    return -(logprob_BL.double() * masked_BL).sum(1) / masked_B.double()


def cross_entropy_bound(logprob_BL: Tensor, masked_BL: Tensor, noised: Noised, *, as_published: bool) -> Tensor:
    """RADD's bound over time, (B,). ``as_published`` adds a term whose integral is 0, so that it only adds variance."""
    extra_B = torch.log(torch.expm1(SCHEDULE.sigma(noised.t))) if as_published else torch.zeros_like(noised.t)
    return noised.weight * ((extra_B[:, None] - logprob_BL) * masked_BL).sum(1)


def score_entropy_bound(logprob_BLV: Tensor, ids_BL: Tensor, masked_BL: Tensor, noised: Noised) -> Tensor:
    """The same by the entropy of the scores, (B,): equal up to rounding. The mask is the last token."""
    sigma_B11 = SCHEDULE.sigma(noised.t)[:, None, None]
    log_score_BLV = logprob_BLV[..., :-1] - torch.log(torch.expm1(sigma_B11))
    ratio_B1 = 1 / torch.expm1(sigma_B11[..., 0])
    own_BL = log_score_BLV.gather(-1, ids_BL[..., None])[..., 0]
    entropy_BL = log_score_BLV.exp().sum(-1) - ratio_B1 * own_BL + ratio_B1 * (ratio_B1.log() - 1)
    return SCHEDULE.rate(noised.t) * (entropy_BL * masked_BL).sum(1)


def count_bound(logprob_BL: Tensor, masked_BL: Tensor) -> Tensor:
    """RADD's bound by the number of masks: the tokens over it times the log-probabilities of the masked ones, (B,)."""
    return -logprob_BL.shape[1] / masked_BL.sum(1) * (logprob_BL * masked_BL).sum(1)


def in_order(logprobs: Callable[[Tensor], Tensor], ids_BL: Tensor, order: Sequence[int], mask_id: int) -> Tensor:
    """The exact log-likelihood (B,) of filling positions in an order, one call of ``logprobs`` (B, L, V) for each."""
    noisy_BL, total_B = torch.full_like(ids_BL, mask_id), torch.zeros(len(ids_BL))
    for place in order:
        total_B = total_B + logprobs(noisy_BL)[:, place].gather(-1, ids_BL[:, place, None])[:, 0]
        noisy_BL[:, place] = ids_BL[:, place]
    return total_B
