"""Bounds of masked diffusion models whose papers give numbers without checkpoints: MD4 and absorbing D3PM.

Pure functions of given logits, times and noisy tokens; values are in nats. Shape letters: B rows, L tokens, V
vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twotower_eval.engine.schedules import Masking

TINY = 1e-20  # added to probabilities before their logarithm, as published


# --- MD4 ------------------------------------------------------------------------------------------------------------


def step_ends(t: Tensor, num_steps: int) -> Tensor:
    """Times moved to the end of their step."""
    return (torch.floor(t * num_steps) + 1) / num_steps


def md4_diffusion(
    logits_BLV: Tensor, ids_BL: Tensor, masked_BL: Tensor, t_B: Tensor, schedule: Masking, *, num_steps: int = 0
) -> Tensor:
    """The part of the negative bound that the network is asked for, (B,): continuous, or of so many steps, at whose
    ends the times then are."""
    logprob_BL = logits_BLV.log_softmax(-1).gather(-1, ids_BL[..., None].long())[..., 0]
    sum_B = (logprob_BL * masked_BL).sum(1)
    if not num_steps:
        return schedule.weight(t_B) * sum_B
    s_B = t_B - 1 / num_steps
    grown_B = torch.expm1(schedule.log_snr(t_B) - schedule.log_snr(s_B))
    return num_steps * grown_B * schedule.alpha(s_B) * sum_B


def md4_reconstruction(num_tokens: int, vocab_size: int, schedule: Masking) -> float:
    """The part for tokens that are masked at time 0, taken as guessed evenly."""
    return float(num_tokens * (1 - schedule.alpha(torch.tensor(0.0))) * math.log(vocab_size))


# --- D3PM -----------------------------------------------------------------------------------------------------------


def d3pm_betas(num_steps: int) -> Tensor:
    """The probability that a visible token is masked in each step, (steps,): one over the steps that are left."""
    return 1 / (num_steps - torch.arange(num_steps, dtype=torch.float32))


def d3pm_visible(num_steps: int) -> Tensor:
    """The probability that a token is visible after so many steps, (steps + 1,), float32."""
    kept = 1 - 1 / (num_steps - torch.arange(num_steps, dtype=torch.float64))
    visible = torch.cat([torch.ones(1, dtype=torch.float64), kept.cumprod(0)])
    visible[-1] = 0
    return visible.float()


def d3pm_posterior(clean_LV: Tensor, noisy_L: Tensor, start: int, num: int, num_steps: int, mask_id: int) -> Tensor:
    """Distribution (L, V) of tokens after ``start`` steps, if those after ``start + num`` are these, and the clean ones
    have this distribution."""
    before_LV = d3pm_visible(num_steps)[start] * clean_LV
    if start:
        before_LV[:, mask_id] = 0
        before_LV[:, mask_id] = 1 - before_LV.sum(-1)
    else:
        before_LV = clean_LV.clone()
    visible = torch.prod(1 - d3pm_betas(num_steps)[start : start + num])
    is_mask_L = noisy_L == mask_id
    to_mask_V = torch.full(clean_LV.shape[-1:], float(1 - visible))
    to_mask_V[mask_id] = 1
    to_token_LV = torch.nn.functional.one_hot(noisy_L.long(), clean_LV.shape[-1]) * visible
    joint_LV = before_LV * torch.where(is_mask_L[:, None], to_mask_V, to_token_LV)
    return joint_LV / joint_LV.sum(-1, keepdim=True)


def d3pm_terms(
    logits_LV: Tensor, ids_L: Tensor, noisy_L: Tensor, start: int, num: int, num_steps: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """What a position contributes between ``start`` and ``start + num`` steps, (L,) each: the divergence of the model's
    step from the posterior, and the cross entropy of the clean tokens, which counts at the first step."""
    clean_LV = torch.nn.functional.one_hot(ids_L.long(), logits_LV.shape[-1]).float()
    true_LV = d3pm_posterior(clean_LV, noisy_L, start, num, num_steps, mask_id).relu()
    model_LV = d3pm_posterior(logits_LV.softmax(-1), noisy_L, start, num, num_steps, mask_id).relu()
    log_model_LV = torch.log(model_LV + TINY)
    divergence_L = (true_LV * (torch.log(true_LV + TINY) - log_model_LV)).sum(-1).relu()
    return divergence_L, -(clean_LV * log_model_LV).sum(-1)
