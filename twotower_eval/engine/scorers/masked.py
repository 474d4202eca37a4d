"""Log-likelihoods of masked diffusion models as their papers estimate them, from masks that the caller draws.

Shape letters: N draws, T tokens of the answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower_eval.engine.models.protocol import Masked

ROWS = 64  # of one call


def sampled_masks_logprob(model: Masked, prompt: Sequence[int], answer: Sequence[int], masked_NT: Tensor) -> float:
    """Monte-Carlo bound on log p(answer | prompt) in nats: the mean over the draws of T / m times the log-probabilities
    of the m masked tokens (LLaDA, arXiv 2502.09992, equation 6).

    >>> sampled_masks_logprob(model, [5, 7], [9, 4], torch.tensor([[True, True], [True, False]]))  # doctest: +SKIP
    -5.31
    """
    return weighted_masks_logprob(model, prompt, answer, masked_NT, masked_NT.shape[1] / masked_NT.sum(1))


def weighted_masks_logprob(
    model: Masked, prompt: Sequence[int], answer: Sequence[int], masked_NT: Tensor, weight_N: Tensor
) -> float:
    """The mean over the draws of a weight times the log-probabilities (nats) of the masked tokens.

    Dream's evaluation weights by one over the probability at which it masked.
    """
    logprob_NT = _logprobs(model, prompt, answer, masked_NT)
    return float((weight_N * (logprob_NT * masked_NT).sum(1)).mean())


def left_to_right_logprob(model: Masked, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The sum over tokens of the log-probability (nats) of each, where it and all behind it are masked."""
    masked_TT = torch.ones(len(answer), len(answer), dtype=torch.bool).triu()
    return float(_logprobs(model, prompt, answer, masked_TT).diagonal().sum())


def _logprobs(model: Masked, prompt: Sequence[int], answer: Sequence[int], masked_NT: Tensor) -> Tensor:
    """Log-probability (nats) of every token of the answer where the given ones are masked, (N, T)."""
    answer_T = torch.tensor(list(answer))
    noisy_NT = torch.where(masked_NT, model.mask_token_id, answer_T)
    found = []
    for rows_RT in noisy_NT.split(ROWS):
        context = model.prefill(torch.tensor([list(prompt)] * len(rows_RT)))
        logits_RTV = model.denoise(rows_RT, context, None)
        targets_RT = answer_T.to(logits_RTV.device).expand(len(rows_RT), -1)
        found.append(logits_RTV.log_softmax(-1).gather(-1, targets_RT[..., None])[..., 0].cpu())
    return torch.cat(found)


def greedy_match(model: Masked, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether filling the answer's masks one by one, the most confident first, gives the answer (LLaDA's way)."""
    context = model.prefill(torch.tensor([list(prompt)]))
    canvas_1T = torch.full((1, len(answer)), model.mask_token_id)
    for _ in answer:
        probability_TV = model.denoise(canvas_1T, context, None)[0].softmax(-1).cpu()
        confidence_T, token_T = probability_TV.max(-1)
        best = int(confidence_T.masked_fill(canvas_1T[0] != model.mask_token_id, -torch.inf).argmax())
        canvas_1T[0, best] = token_T[best]
    return canvas_1T[0].tolist() == list(answer)


def first_token_logprob(model: Masked, prompt: Sequence[int], answer: Sequence[int], *, eos_token_id: int) -> float:
    """Log-probability (nats) of an answer's first token where only that is masked, and all that stands behind it in its
    block is given: the rest of the answer, one end of text, masks (Fast-dLLM v2's evaluation).

    Meant for answers of one token: later tokens of a longer one tell of the first.
    """
    size: int = model.block_size  # type: ignore[attr-defined]
    num_read = len(prompt) - len(prompt) % size
    given = [*prompt[num_read:], model.mask_token_id, *answer[1:], eos_token_id, *[model.mask_token_id] * size]
    context = model.prefill(torch.tensor([list(prompt[:num_read])], dtype=torch.int64))
    logits_1KV = model.denoise(torch.tensor([given[:size]]), context, None)
    return float(logits_1KV[0, len(prompt) - num_read].log_softmax(-1)[answer[0]])
