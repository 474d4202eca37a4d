"""What decoding shows: how near the towers are, whether parallel decoding pays at all, and what the floor forces."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.protocol import Denoising, Model, has_denoiser
from twotower_eval.measure.verify.finding import Finding, judged, not_checked, told
from twotower_eval.records import Prompt

NO_DENOISER = "the model has no denoiser"
AGREEMENT_TOKENS = 24
SAMPLE_TOKENS = 48


def mock_ar_agreement(model: Model, prompts: Sequence[Prompt]) -> Finding:
    """How often the denoiser, fed the last token without time, chooses the context tower's own next token.

    On the context tower's tokens, so that one difference does not cause the next. A denoiser trained away from its
    start need not agree: only logits that are not finite fail.
    """
    if not has_denoiser(model):
        return not_checked("mock_ar_agreement", NO_DENOISER)
    same, finite, margins = [], True, []
    for prompt in prompts:
        tokens = make_decoder(model, "autoregressive").generate([prompt], max_new_tokens=AGREEMENT_TOKENS)[0].token_ids
        ids_1S = torch.tensor([[*prompt.token_ids, *tokens]])
        first = len(prompt.token_ids) - 1
        ar_SV = model.context_logits(ids_1S)[0, first:-1]
        mock_SV = torch.cat([_mock_logits(model, ids_1S, position) for position in range(first, ids_1S.shape[1] - 1)])
        finite &= bool(torch.isfinite(mock_SV).all())
        equal_S = (mock_SV.argmax(-1) == ar_SV.argmax(-1)).tolist()
        same += equal_S
        if not all(equal_S):
            top2 = ar_SV[equal_S.index(False)].topk(2).values
            margins.append(float(top2[0] - top2[1]))
    share = sum(same) / len(same)
    apart = f"; first divergences at margins of {min(margins):.3g} to {max(margins):.3g} nats" if margins else ""
    detail = f"{sum(same)} of {len(same)} tokens are the context tower's{apart}"
    if not finite:
        return judged("mock_ar_agreement", False, f"logits are not finite; {detail}", value=share)
    return told("mock_ar_agreement", detail, value=share)


def _mock_logits(model: Denoising, ids_1S: torch.Tensor, position: int) -> torch.Tensor:
    context = model.prefill(ids_1S[:, :position], [position])
    logits_1V = model.denoise(ids_1S[:, position : position + 1], context, None)[:, 0]
    return logits_1V.to(ids_1S.device)


def block_sample(model: Model, prompts: Sequence[Prompt]) -> tuple[Finding, Finding]:
    """Tokens per denoiser pass on a short sample, at the default operating point, and the share forced by the floor."""
    names = ("tokens_per_nfe", "forced_share")
    if not has_denoiser(model):
        return not_checked(names[0], NO_DENOISER), not_checked(names[1], NO_DENOISER)
    decoder = make_decoder(model, "block_diffusion")
    found = decoder.generate(prompts, max_new_tokens=SAMPLE_TOKENS, eos_token_ids=model.eos_token_ids)
    num_tokens, num_passes = sum(g.num_tokens for g in found), sum(g.num_denoiser_forwards for g in found)
    num_committed = num_tokens + sum(g.num_discarded_tokens for g in found)
    num_forced = sum(g.num_forced_commits or 0 for g in found)
    forced = told(
        names[1],
        f"{num_forced} of {num_committed} commits were forced by the step limit, below the threshold",
        value=num_forced / num_committed,
    )
    if model.tokenizer is None:
        return not_checked(names[0], "no tokenizer: on random ids the model knows nothing to be sure of"), forced
    value = num_tokens / num_passes
    detail = f"{num_tokens} useful tokens in {num_passes} denoiser passes; block 16, 16 steps, threshold 0.8"
    return judged(names[0], value > 1, detail, value=value, limit=1), forced
