"""Checks of a checkpoint: batched against single rows, the same values computed in two ways, what decoding shows.

Shape letters: see ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeGuard

import torch
from torch import Tensor

from twotower_eval.engine.decoders import decoder_spec, from_spec, make_decoder
from twotower_eval.engine.decoders.batch import no_denoiser
from twotower_eval.engine.decoders.rows import padded_ids
from twotower_eval.engine.models.nemotron_h import Mamba
from twotower_eval.engine.models.probes import LIMITS, difference
from twotower_eval.engine.models.protocol import Denoising, Masked, Model, has_denoiser, two_tower
from twotower_eval.engine.ops.ssd import ssd, ssd_chunked, ssd_reference
from twotower_eval.names import plural
from twotower_eval.records import HALF_PRECISION, CheckOutcome, CommitStep, Generation, Prompt, Ways
from twotower_eval.rules import proof_outcome, ways_text


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of one check: a :class:`twotower_eval.records.Check` without its cell."""

    name: str
    outcome: CheckOutcome
    detail: str
    value: float | None = None
    limit: float | None = None


def pass_or_fail(
    name: str, ok: bool, detail: str, *, value: float | None = None, limit: float | None = None
) -> CheckResult:
    """A check that can fail. A value that is not finite fails and goes into the text, as no journal can hold it."""
    if value is not None and not isfinite(value):
        ok, value, detail = False, None, f"{detail}; the value is not finite"
    return CheckResult(name=name, outcome="passed" if ok else "failed", detail=detail, value=value, limit=limit)


def informative(name: str, detail: str, *, value: float | None = None) -> CheckResult:
    """A figure for information, without a limit: it cannot fail."""
    return CheckResult(name=name, outcome="passed", detail=detail, value=value)


def not_checked(name: str, reason: str) -> CheckResult:
    """A check that does not apply or cannot be made here."""
    return CheckResult(name=name, outcome="not_checked", detail=reason)


BLOCK_SIZE = 16
CHUNKS = (4, 16, 32, 128)
SPLITS = (1, 16, 31)  # where the scan is cut and continued from its carried state
SCAN_POSITIONS = 70  # more than two chunks of the fast path, and no multiple of any chunk
SCAN_LIMIT = 1e-5  # relative: float32 sums in another order give 1e-6, a lost state gives 1


def finite_logits(model: Model, prompts: Sequence[Prompt]) -> CheckResult:
    """Whether all logits are finite: the context's at every position, the denoiser's of masked blocks with and without
    t."""
    counted = [torch.isfinite(logits) for logits in _all_logits(model, prompts)]
    num_bad = sum(int((~finite).sum()) for finite in counted)
    total = sum(finite.numel() for finite in counted)
    who = "both towers" if model.has_denoiser else "the model"
    detail = f"{num_bad} of {total:,} logits of {who} are not finite, on {plural(len(prompts), 'prompt')}"
    return pass_or_fail("finite_logits", num_bad == 0, detail, value=num_bad, limit=0)


def _all_logits(model: Model, prompts: Sequence[Prompt]) -> Iterator[Tensor]:
    for prompt in prompts:
        ids_1S = torch.tensor([prompt.token_ids])
        yield model.context_logits(ids_1S)
        if has_denoiser(model):
            block_1K = torch.full((1, BLOCK_SIZE), model.mask_token_id)
            context = model.prefill(ids_1S)
            for t in (1.0, 0.5, 1 / BLOCK_SIZE, None):
                yield model.denoise(block_1K, context, t)


def proved(ways: Ways) -> CheckResult:
    """How a Hugging Face model has to be run. A model that is right in no way was refused earlier."""
    found = informative if proof_outcome(ways) != "not checked" else not_checked
    return found("proved_against_whole_rows", ways_text(ways))


def seeded_scan(model: Model, seed: int) -> CheckResult:
    """The scan from a carried state, cut in several ways, against the plain recurrence over the whole, in float32.

    Sizes and decay rates are those of the model's first and last Mamba layers; inputs are drawn.
    """
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    layers = [module for module in parts if isinstance(module, Mamba)]
    if not layers:
        return not_checked("seeded_scan", "the model has no Mamba layer of ours")
    worst = max(_worst_scan(layer, seed + number) for number, layer in enumerate({*layers[:1], *layers[-1:]}))
    ways = f"chunks of {', '.join(map(str, CHUNKS))} and cuts after {', '.join(map(str, SPLITS))}"
    detail = f"{SCAN_POSITIONS} positions from a carried state by {ways}, against the recurrence"
    return pass_or_fail("seeded_scan", worst <= SCAN_LIMIT, detail, value=worst, limit=SCAN_LIMIT)


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


def blockwise_context(model: Model, prompts: Sequence[Prompt], dtype: str) -> CheckResult:
    """Whether extending a context block by block gives the next-token logits of one prefill."""
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
    return pass_or_fail("blockwise_context", worst <= limit, detail, value=worst, limit=limit)


def _at_least(token_ids: Sequence[int], num: int) -> list[int]:
    """The prompt, repeated until it is long enough for several blocks."""
    return [*token_ids] * -(-num // len(token_ids))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value; infinite where either is not finite."""
    difference = (ours.double() - theirs.double()).abs().max()
    found = float(difference / theirs.double().abs().max().clamp(min=1e-30))
    return found if torch.isfinite(ours).all() and torch.isfinite(theirs).all() else float("inf")


MARGIN = 1e-4  # between two tokens' logits: closer ones may swap by rounding
NUM_TOKENS = 40  # two and a half blocks
PARAMS: dict[str, dict[str, Any]] = {"autoregressive": {}, "block_diffusion": {"trace": True}}


def batch_logic(model: Model, prompts: Sequence[Prompt]) -> CheckResult:
    """Whether batches change no token, on a float32 model: any difference must come from a margin of at most 1e-4."""
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
    return pass_or_fail("batch_equals_single", num_bad == 0, detail, value=max(margins, default=0.0), limit=MARGIN)


def batch_numerics(model: Model, prompts: Sequence[Prompt], dtype: str) -> CheckResult:
    """Share of prompts with identical outputs in a batch and alone, in the measured dtype; for information."""
    same = [
        batched.token_ids == alone.token_ids
        for kind in _kinds(model)
        for _, batched, alone in _both(model, kind, prompts)
    ]
    detail = f"{sum(same)} of {len(same)} outputs in {dtype} are the same in a batch of {len(prompts)} and alone"
    return informative("batch_numerics", detail, value=sum(same) / len(same))


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
    """Margin between the two best tokens where the outputs part; infinite if one output is the beginning of the
    other."""
    parted = next((i for i, (a, b) in enumerate(zip(batched, alone, strict=False)) if a != b), None)
    if parted is None:
        return float("inf")
    ids_1S = torch.tensor([[*prompt.token_ids, *alone[:parted]]])
    return _top2(model.next_logits(model.prefill(ids_1S))[0])


def _step_margin(model: Model, prompt: Prompt, batched: Sequence[CommitStep], alone: Sequence[CommitStep]) -> float:
    """The largest margin among the choices that differ in the first differing step."""
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
    """Distance of a position's confidence from what decided its commit: the threshold, or another position's."""
    threshold = float(decoder_spec("block_diffusion").params["threshold"] or 0)
    own = float(confidence_K[position])
    others = [abs(own - float(confidence_K[other])) for other in parted if other != position]
    return min([abs(own - threshold), *others])


def _logits_of_step(model: Model, prompt: Prompt, before: Sequence[CommitStep], block: int) -> Tensor:
    """Logits (K, V) of a row decoded alone after the steps ``before``, the mask excluded."""
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


OF_DRAFTS = ("draft_equals_greedy", "draft_tokens_per_pass")  # of the draft model of a plan


def drafts_verified(
    model: Model, prompts: Sequence[Prompt], dtype: str, draft: str | None = None
) -> tuple[CheckResult, CheckResult]:
    """Whether drafts that are verified in one pass leave the greedy tokens as they are, and the tokens of a pass.

    Drafts are looked up in the prompt, or come from the model ``draft``.

    As in :func:`batch_logic` a difference must come from two tokens that nearly tie; in half precision these are too
    common for a limit, and are counted.
    """
    names = ("drafts_equal_greedy", "tokens_per_pass") if draft is None else OF_DRAFTS
    kind, given = "prompt_lookup" if draft is None else "draft", {} if draft is None else {"draft": draft}
    if not getattr(model, "verifies", False):
        reason = "the model gives logits behind one token at a time, so no decoder verifies drafts with it"
        return not_checked(names[0], reason), not_checked(names[1], reason)
    plain = make_decoder(model, "autoregressive").generate(prompts, max_new_tokens=NUM_TOKENS)
    made = from_spec(model, decoder_spec(kind, **given)).generate(prompts, max_new_tokens=NUM_TOKENS)
    num_tokens, num_passes = sum(one.num_tokens for one in made), sum(one.num_context_forwards for one in made)
    per_pass = informative(
        names[1],
        f"{kind}: {num_tokens} useful tokens in {num_passes} passes of the model, prefills included",
        value=num_tokens / num_passes,
    )
    return _held_against_greedy(names[0], kind, model, prompts, made, plain, dtype), per_pass


def static_verified(model: Model, prompts: Sequence[Prompt], dtype: str) -> CheckResult:
    """Whether steps over a static cache give the greedy tokens; differences count as in :func:`drafts_verified`."""
    name = "static_equals_greedy"
    if not getattr(model, "steps_statically", False):
        return not_checked(name, "the model does not step over a static cache: decoder static_cache refuses it")
    plain, made = (
        make_decoder(model, kind).generate(prompts, max_new_tokens=NUM_TOKENS)
        for kind in ("autoregressive", "static_cache")
    )
    return _held_against_greedy(name, "static_cache", model, prompts, made, plain, dtype)


def _held_against_greedy(
    name: str,
    kind: str,
    model: Model,
    prompts: Sequence[Prompt],
    made: Sequence[Generation],
    plain: Sequence[Generation],
    dtype: str,
) -> CheckResult:
    answers = zip(prompts, made, plain, strict=True)
    margins = [_token_margin(model, p, a.token_ids, b.token_ids) for p, a, b in answers if a.token_ids != b.token_ids]
    same = f"{len(prompts) - len(margins)} of {len(prompts)} answers of {kind} are those of autoregressive"
    if dtype in HALF_PRECISION:
        return informative(name, f"{same}, in {dtype}", value=1 - len(margins) / len(prompts))
    worst = max((margin if margin == margin else float("inf") for margin in margins), default=0.0)
    return pass_or_fail(name, worst <= MARGIN, same, value=worst, limit=MARGIN)


NO_DENOISER = "the model has no denoiser"
AGREEMENT_TOKENS = 24
SAMPLE_TOKENS = 48


def mock_ar_agreement(model: Model, prompts: Sequence[Prompt]) -> CheckResult:
    """How often the denoiser, given the last token and no time, chooses the context tower's next token.

    Each comparison continues the context tower's own tokens, so that one difference does not cause the next. A trained
    denoiser need not agree: only logits that are not finite fail.
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
        return pass_or_fail("mock_ar_agreement", False, f"logits are not finite; {detail}", value=share)
    return informative("mock_ar_agreement", detail, value=share)


def _mock_logits(model: Denoising, ids_1S: torch.Tensor, position: int) -> torch.Tensor:
    context = model.prefill(ids_1S[:, :position], [position])
    logits_1V = model.denoise(ids_1S[:, position : position + 1], context, None)[:, 0]
    return logits_1V.to(ids_1S.device)


def block_sample(model: Model, prompts: Sequence[Prompt]) -> tuple[CheckResult, CheckResult]:
    """Tokens per denoiser pass on a short sample at the default operating point, and the share of forced commits."""
    names = ("tokens_per_nfe", "forced_share")
    if not has_denoiser(model):
        return not_checked(names[0], NO_DENOISER), not_checked(names[1], NO_DENOISER)
    decoder = make_decoder(model, "block_diffusion")
    found = decoder.generate(prompts, max_new_tokens=SAMPLE_TOKENS, eos_token_ids=model.eos_token_ids)
    num_tokens, num_passes = sum(g.num_tokens for g in found), sum(g.num_denoiser_forwards for g in found)
    num_committed = num_tokens + sum(g.num_discarded_tokens for g in found)
    num_forced = sum(g.num_forced_commits or 0 for g in found)
    forced = informative(
        names[1],
        f"{num_forced} of {num_committed} commits were forced by the step limit, below the threshold",
        value=num_forced / num_committed,
    )
    if model.tokenizer is None:
        return not_checked(names[0], "no tokenizer: on random ids the model knows nothing to be sure of"), forced
    value = num_tokens / num_passes
    detail = f"{num_tokens} useful tokens in {num_passes} denoiser passes; block 16, 16 steps, threshold 0.8"
    return pass_or_fail(names[0], value > 1, detail, value=value, limit=1), forced


ONLY_MASKED = "the family has no autoregressive part"
OF_BOTH = (
    *("blockwise_context", "batch_numerics", "drafts_equal_greedy", "tokens_per_pass", "static_equals_greedy"),
    "mock_ar_agreement",
)
OF_PAIRS = ("tokens_per_nfe", "forced_share")  # at the default operating point of pairs


def only_masked(model: Model) -> TypeGuard[Masked]:
    """Whether a model predicts masked tokens and has no autoregressive part."""
    return model.has_denoiser and not hasattr(model, "context_tower")


def masked_results(model: Masked, prompts: Sequence[Prompt], dtype: str) -> Iterator[CheckResult]:
    """The checks of such a model: a block of masks behind each prompt, in a batch and alone."""
    size = getattr(model, "block_size", BLOCK_SIZE)
    ids_BS, lengths = padded_ids([prompt.token_ids for prompt in prompts])
    mask: int | None = model.mask_token_id  # a family that starts from random tokens has none
    masks_BK = torch.full((len(prompts), size), 0 if mask is None else mask)
    together_BKV = model.denoise(masks_BK, model.prefill(ids_BS, lengths), [1.0] * len(prompts))
    num_bad = int((~torch.isfinite(together_BKV)).sum())
    behind = f"a block of {size} masks behind {plural(len(prompts), 'prompt')}"
    detail = f"{num_bad} of {together_BKV.numel():,} logits are not finite, of {behind}"
    yield pass_or_fail("finite_logits", num_bad == 0, detail, value=num_bad, limit=0)
    worst = 0.0
    for row, length in enumerate(lengths):
        alone_1KV = model.denoise(masks_BK[:1], model.prefill(ids_BS[row : row + 1, :length]), [1.0])
        worst = max(worst, difference(together_BKV[row], alone_1KV[0], dtype))
    detail = f"logits of {behind}, in a batch and alone, relative to their spread"
    yield pass_or_fail("batch_equals_single", worst <= LIMITS[dtype], detail, value=worst, limit=LIMITS[dtype])
    yield not_checked("seeded_scan", "the model has no Mamba layer of ours")
    yield from (not_checked(name, ONLY_MASKED) for name in (*OF_BOTH, *OF_PAIRS))
