"""Does a batch answer as its prompts do alone? Logic in float32, numerics in the measured dtype.

The gate is exact: tokens may differ only where the choice hung by a hair. Where a batch and a single row first part,
all earlier steps were equal, so that the logits of that step can be computed again and its margin looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twotower_eval.engine.decoders import decoder_spec, make_decoder
from twotower_eval.engine.decoders.batch import no_denoiser
from twotower_eval.engine.models.protocol import Model, has_denoiser, two_tower
from twotower_eval.measure.verify.finding import Finding, judged, told
from twotower_eval.records import CommitStep, Generation, Prompt

MARGIN = 1e-4  # PROTOCOL, Speed 7
NUM_TOKENS = 40  # two and a half blocks
PARAMS: dict[str, dict[str, Any]] = {"autoregressive": {}, "block_diffusion": {"trace": True}}


def batch_logic(model: Model, prompts: Sequence[Prompt]) -> Finding:
    """PROTOCOL's gate, on a float32 model: every difference must come from a margin of at most 1e-4."""
    margins = [
        _margin(model, kind, prompt, batched, alone)
        for kind in _kinds(model)
        for prompt, batched, alone in _both(model, kind, prompts)
        if batched.token_ids != alone.token_ids
    ]
    margins = [margin if margin == margin else float("inf") for margin in margins]  # NaN is above no limit
    num_bad = sum(margin > MARGIN for margin in margins)
    compared = f"{len(prompts)} prompts, {' and '.join(_kinds(model))}"
    close = f"{len(margins) - num_bad} of {len(margins)} differences lie within a margin of {MARGIN:g}"
    detail = f"{compared}: {close}" if margins else f"{compared}: all tokens equal"
    return judged("batch_equals_single", num_bad == 0, detail, value=max(margins, default=0.0), limit=MARGIN)


def batch_numerics(model: Model, prompts: Sequence[Prompt], dtype: str) -> Finding:
    """Share of prompts whose outputs are identical in a batch and alone, in the measured dtype: to be read."""
    same = [
        batched.token_ids == alone.token_ids
        for kind in _kinds(model)
        for _, batched, alone in _both(model, kind, prompts)
    ]
    detail = f"{sum(same)} of {len(same)} outputs in {dtype} are the same in a batch of {len(prompts)} and alone"
    return told("batch_numerics", detail, value=sum(same) / len(same))


def _kinds(model: Model) -> list[str]:
    return ["autoregressive", "block_diffusion"] if has_denoiser(model) else ["autoregressive"]


def _both(model: Model, kind: str, prompts: Sequence[Prompt]) -> list[tuple[Prompt, Generation, Generation]]:
    decoder = make_decoder(model, kind, **PARAMS[kind])
    batched = decoder.generate(prompts, max_new_tokens=NUM_TOKENS)
    alone = [decoder.generate([prompt], max_new_tokens=NUM_TOKENS)[0] for prompt in prompts]
    return list(zip(prompts, batched, alone, strict=True))


def _margin(model: Model, kind: str, prompt: Prompt, batched: Generation, alone: Generation) -> float:
    if kind == "autoregressive":
        return _token_margin(model, prompt, batched.token_ids, alone.token_ids)
    return _step_margin(model, prompt, batched.trace or (), alone.trace or ())


def _token_margin(model: Model, prompt: Prompt, batched: Sequence[int], alone: Sequence[int]) -> float:
    """Between the two best tokens where the outputs part; infinite where one is the beginning of the other."""
    parted = next((i for i, (a, b) in enumerate(zip(batched, alone, strict=False)) if a != b), None)
    if parted is None:
        return float("inf")
    ids_1S = torch.tensor([[*prompt.token_ids, *alone[:parted]]])
    return _top2(model.next_logits(model.prefill(ids_1S))[0])


def _step_margin(model: Model, prompt: Prompt, batched: Sequence[CommitStep], alone: Sequence[CommitStep]) -> float:
    """What the first differing step hung by: the largest margin among its differing choices."""
    parted = next(
        (
            i
            for i, (a, b) in enumerate(zip(batched, alone, strict=False))
            if (a.block, a.step, a.positions, a.token_ids) != (b.block, b.step, b.positions, b.token_ids)
        ),
        None,
    )
    if parted is None:
        return float("inf")
    ours, theirs = batched[parted], alone[parted]
    if (ours.block, ours.step) != (theirs.block, theirs.step):
        return float("inf")
    logits_KV = _logits_of_step(model, prompt, alone[:parted], theirs.block)
    confidence_K = logits_KV.softmax(-1).max(-1).values
    tokens = [dict(zip(step.positions, step.token_ids, strict=True)) for step in (ours, theirs)]
    margins = [0.0]
    for position in tokens[0].keys() | tokens[1].keys():
        if position in tokens[0] and position in tokens[1]:
            if tokens[0][position] != tokens[1][position]:
                margins.append(_top2(logits_KV[position]))
        else:
            margins.append(_commit_margin(confidence_K, position, [*tokens[0].keys() ^ tokens[1].keys()]))
    return max(margins)


def _commit_margin(confidence_K: Tensor, position: int, parted: Sequence[int]) -> float:
    """How near a position's confidence is to what decided its commit: the threshold, or another position's."""
    threshold = float(decoder_spec("block_diffusion").params["threshold"] or 0)
    own = float(confidence_K[position])
    others = [abs(own - float(confidence_K[other])) for other in parted if other != position]
    return min([abs(own - threshold), *others])


def _logits_of_step(model: Model, prompt: Prompt, before: Sequence[CommitStep], block: int) -> Tensor:
    """Logits (K, V) that a row alone sees after the steps ``before``, the mask excluded."""
    pair = two_tower(model, no_denoiser("block_diffusion"))
    size = int(decoder_spec("block_diffusion").params["block_size"] or 0)
    context = pair.prefill(torch.tensor([prompt.token_ids]))
    blocks = [torch.full((1, size), pair.mask_token_id) for _ in range(block + 1)]
    for step in before:
        blocks[step.block][0, list(step.positions)] = torch.tensor(step.token_ids)
    for finished_1K in blocks[:-1]:
        context = pair.extend(context, finished_1K)
    masked = sum(len(step.positions) for step in before if step.block == block)
    logits_KV = pair.denoise(blocks[-1], context, [(size - masked) / size])[0].float()
    logits_KV[:, pair.mask_token_id] = -torch.inf
    return logits_KV


def _top2(logits_V: Tensor) -> float:
    best = logits_V.float().topk(2).values
    return float(best[0] - best[1])
