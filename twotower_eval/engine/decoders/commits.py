"""Which masked positions a denoising step commits: pure rules, apart from the loops that use them.

Shape letters: B rows, K positions. Of equal confidences the lower position comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower_eval.records import CommitStep


def even_quotas(num_masked: int, num_steps: int) -> tuple[int, ...]:
    """Commits of each step: as even as whole numbers allow, the larger ones first (LLaDA).

    >>> even_quotas(8, 5)
    (2, 2, 2, 1, 1)
    """
    each, more = divmod(num_masked, num_steps)
    return tuple(each + (step < more) for step in range(num_steps))


def scheduled_quotas(num_masked: int, num_steps: int) -> tuple[int, ...]:
    """Commits of each step by a linear schedule, rounded half to even; steps without one are left out (dLLM).

    >>> scheduled_quotas(8, 5)
    (2, 2, 1, 2, 1)
    """
    quotas, left = [], num_masked
    for step in range(num_steps):
        t = torch.tensor((num_steps - step) / num_steps, dtype=torch.float32)
        s = torch.tensor((num_steps - step - 1) / num_steps, dtype=torch.float32)
        quotas.append(round(left * float(1 - s / t)))
        left -= quotas[-1]
        if left == 0:
            break
    return tuple(quota for quota in quotas if quota)


def most_confident(confidence_BK: Tensor, eligible_BK: Tensor, num_B: Sequence[int]) -> Tensor:
    """The so many most confident of the eligible positions of each row, never more than there are; (B, K) boolean."""
    order_BK = confidence_BK.masked_fill(~eligible_BK, -torch.inf).argsort(dim=1, descending=True, stable=True)
    wanted_B = torch.minimum(torch.tensor(list(num_B)), eligible_BK.sum(1))
    among_first_BK = torch.arange(confidence_BK.shape[1]) < wanted_B[:, None]
    return torch.zeros_like(eligible_BK).scatter(1, order_BK, among_first_BK)


def above_threshold(confidence_BK: Tensor, eligible_BK: Tensor, threshold: float, *, strict: bool) -> Tensor:
    """Every eligible position above the threshold (or at it, unless ``strict``), and always the most confident one."""
    passes_BK = confidence_BK > threshold if strict else confidence_BK >= threshold
    first_BK = most_confident(confidence_BK, eligible_BK, [1] * len(confidence_BK))
    return (passes_BK & eligible_BK) | first_BK


def threshold_or_quota(confidence_BK: Tensor, eligible_BK: Tensor, threshold: float, num_B: Sequence[int]) -> Tensor:
    """Every eligible position above the threshold where these are at least as many as the row's quota, else the quota's
    most confident ones (SDAR, LLaDA2)."""
    above_BK = eligible_BK & (confidence_BK > threshold)
    enough_B1 = above_BK.sum(1, keepdim=True) >= torch.tensor(list(num_B))[:, None]
    return torch.where(enough_B1, above_BK, most_confident(confidence_BK, eligible_BK, num_B))


def num_by_factor(sorted_confidence: Sequence[float], factor: float) -> int:
    """How many of a row's eligible positions a factor lets through; confidences descending (Fast-dLLM v1, "factor").

    The r-th (from 1) has to reach ``1 - factor / (r + 1)``; the first always does. Committed are those before the first
    that fails, at least one, and all where it is only the last that fails.

    >>> num_by_factor([0.9, 0.8, 0.1, 0.1], factor=1.0), num_by_factor([0.9, 0.8, 0.1], factor=1.0)
    (2, 3)
    """
    num = len(sorted_confidence)
    limits = [-1.0, *(1 - factor / (rank + 1) for rank in range(2, num + 1))]
    failing = (i for i, (value, limit) in enumerate(zip(sorted_confidence, limits, strict=True)) if value < limit)
    first = next(failing, num - 1)
    return first + (first in (0, num - 1))


def num_within_factor(sorted_confidence: Sequence[float], factor: float) -> int:
    """As :func:`num_by_factor` by dLLM's rule: as many as reach their limits, whatever fails among them.

    >>> num_within_factor([0.9, 0.6, 0.76], factor=1.0)
    2
    """
    limits = [-1.0, *(1 - factor / (rank + 1) for rank in range(2, len(sorted_confidence) + 1))]
    return sum(value >= limit for value, limit in zip(sorted_confidence, limits, strict=True))


def within_entropy(entropy_BK: Tensor, bound: float) -> Tensor:
    """The positions of lowest entropy (nats) of each row, as many as the entropies of those before each one sum up to
    ``bound`` at most; the lowest is always among them. (B, K) boolean (DiffusionGemma).

    >>> within_entropy(torch.tensor([[0.3, 0.1, 0.3]]), 0.2).tolist()
    [[True, True, False]]
    """
    ordered_BK, order_BK = entropy_BK.sort(dim=1, stable=True)
    before_BK = ordered_BK.cumsum(1) - ordered_BK
    inside_BK = before_BK <= bound
    inside_BK[:, 0] = True
    return torch.zeros_like(inside_BK).scatter(1, order_BK, inside_BK)


def commit_step(
    block: int, step: int, taken_K: Tensor, tokens_K: Tensor, confidence_K: Tensor, *, num_forced: int = 0
) -> CommitStep:
    """The record of a step on one row's block: what it took, (K,) boolean, as which tokens and how sure."""
    where = taken_K.nonzero().flatten()
    return CommitStep(
        block=block,
        step=step,
        positions=tuple(where.tolist()),
        token_ids=tuple(tokens_K[where].tolist()),
        confidences=tuple(confidence_K[where].tolist()),
        num_forced=num_forced,
    )
