"""Numbers of the model's own parts: finite, and the same by two ways of computing them. Shape letters: see ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from twotower_eval.engine.models.nemotron_h import Mamba
from twotower_eval.engine.models.probes import LIMITS, difference
from twotower_eval.engine.models.protocol import Model, has_denoiser
from twotower_eval.engine.ops.ssd import ssd, ssd_chunked, ssd_reference
from twotower_eval.measure.verify.finding import Finding, judged, not_checked, told
from twotower_eval.records import Prompt, Ways
from twotower_eval.ways import proof_outcome, ways_text

BLOCK_SIZE = 16
CHUNKS = (4, 16, 32, 128)
SPLITS = (1, 16, 31)  # where the scan is interrupted and goes on from its carried state
SCAN_POSITIONS = 70  # more than two chunks of the fast path, and no multiple of any chunk
SCAN_LIMIT = 1e-5  # relative: float32 sums in another order give 1e-6, a lost state gives 1


def finite_logits(model: Model, prompts: Sequence[Prompt]) -> Finding:
    """Context logits at every position of every prompt; denoiser logits of masked blocks at several t and without."""
    counted = [torch.isfinite(logits) for logits in _all_logits(model, prompts)]
    num_bad = sum(int((~finite).sum()) for finite in counted)
    total = sum(finite.numel() for finite in counted)
    who = "both towers" if model.has_denoiser else "the model"
    detail = f"{num_bad} of {total:,} logits of {who} are not finite, on {len(prompts)} prompts"
    return judged("finite_logits", num_bad == 0, detail, value=num_bad, limit=0)


def _all_logits(model: Model, prompts: Sequence[Prompt]) -> Iterator[Tensor]:
    for prompt in prompts:
        ids_1S = torch.tensor([prompt.token_ids])
        yield model.context_logits(ids_1S)
        if has_denoiser(model):
            block_1K = torch.full((1, BLOCK_SIZE), model.mask_token_id)
            context = model.prefill(ids_1S)
            for t in (1.0, 0.5, 1 / BLOCK_SIZE, None):
                yield model.denoise(block_1K, context, t)


def proved(ways: Ways) -> Finding:
    """How a Hugging Face model has to be run; one that is right in no way is refused before."""
    found = told if proof_outcome(ways) != "not checked" else not_checked
    return found("proved_against_whole_rows", ways_text(ways))


def seeded_scan(model: Model, seed: int) -> Finding:
    """The scan from a carried state, however cut, against the plain recurrence over the whole, in float32.

    Sizes and decay rates are those of the model's first and last Mamba layers; inputs are drawn.
    """
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    layers = [module for module in parts if isinstance(module, Mamba)]
    if not layers:
        return not_checked("seeded_scan", "the model has no Mamba layer of ours")
    worst = max(_worst_scan(layer, seed + number) for number, layer in enumerate({*layers[:1], *layers[-1:]}))
    ways = f"chunks of {', '.join(map(str, CHUNKS))} and cuts after {', '.join(map(str, SPLITS))}"
    detail = f"{SCAN_POSITIONS} positions from a carried state by {ways}, against the recurrence"
    return judged("seeded_scan", worst <= SCAN_LIMIT, detail, value=worst, limit=SCAN_LIMIT)


def _worst_scan(layer: Mamba, seed: int) -> float:
    """Largest difference of outputs and states, over the largest value."""
    cfg, a_h = layer.config, layer.decay_rate()
    draw = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(a_h.device)

    length, heads, groups = SCAN_POSITIONS, cfg.mamba_num_heads, (cfg.n_groups, cfg.ssm_state_size)
    x, b, c = drawn(2, length, heads, cfg.mamba_head_dim), drawn(2, length, *groups), drawn(2, length, *groups)
    delta = torch.nn.functional.softplus(drawn(2, length, heads) + layer.dt_bias.float())
    state = drawn(2, heads, cfg.mamba_head_dim, cfg.ssm_state_size)
    y, last = ssd_reference(x, delta, a_h, b, c, state)
    found = []
    for chunk in CHUNKS:
        y_chunked, states = ssd_chunked(x, delta, a_h, b, c, state, chunk=chunk)
        found += [(y_chunked, y), (states[:, -1], last)]
    for cut in SPLITS:
        y_0, carried = ssd(x[:, :cut], delta[:, :cut], a_h, b[:, :cut], c[:, :cut], state)
        y_1, end = ssd(x[:, cut:], delta[:, cut:], a_h, b[:, cut:], c[:, cut:], carried)
        found += [(torch.cat([y_0, y_1], dim=1), y), (end, last)]
    return max(relative(ours, theirs) for ours, theirs in found)


def blockwise_context(model: Model, prompts: Sequence[Prompt], dtype: str) -> Finding:
    """A context extended block by block and one prefill of the same tokens give the same next-token logits."""
    worst = 0.0
    for prompt in prompts:
        row = _at_least(prompt.token_ids, 2 * BLOCK_SIZE + 3)
        ids_1S = torch.tensor([row])
        context = model.prefill(ids_1S[:, :3])
        for start in range(3, len(row), BLOCK_SIZE):
            context = model.extend(context, ids_1S[:, start : start + BLOCK_SIZE])
        whole = model.prefill(ids_1S)
        worst = max(worst, difference(model.next_logits(context), model.next_logits(whole), dtype))
    limit = LIMITS[dtype]
    detail = f"next-token logits after blocks of {BLOCK_SIZE} against one prefill, relative to their spread"
    return judged("blockwise_context", worst <= limit, detail, value=worst, limit=limit)


def _at_least(token_ids: Sequence[int], num: int) -> list[int]:
    """The prompt, over again until it is long enough for several blocks."""
    return [*token_ids] * -(-num // len(token_ids))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value; infinite where either is not finite."""
    difference = (ours.double() - theirs.double()).abs().max()
    found = float(difference / theirs.double().abs().max().clamp(min=1e-30))
    return found if torch.isfinite(ours).all() and torch.isfinite(theirs).all() else float("inf")
