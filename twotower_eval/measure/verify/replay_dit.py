"""Replays of diffusion transformers: MDLM. They sample, so that their draws are recorded and fed back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.batch import BatchDecoder
from twotower_eval.engine.decoders.rows import Noise
from twotower_eval.engine.families.mdlm import MDLM
from twotower_eval.engine.models.protocol import Context, Masked, Model, as_masked
from twotower_eval.engine.scorers.bounds import NEVER, mdlm_noised, nll, subs_logprobs
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.replay import (
    Compared,
    Recorded,
    Reference,
    Table,
    counts,
    likelihood,
    logits,
    numbers_of_calls,
    quirk_of,
    tokens,
)
from twotower_eval.records import Generation, Prompt

KINDS = ("ddpm_cache", "ddpm", "analytic")  # samplers by the start of a run's name
MASK_GRID = 0.0625  # how far apart float32 numbers of about NEVER are


def mdlm(model: Model, reference: Reference) -> Iterator[Compared]:
    """MDLM's forwards, runs of all its samplers with recorded draws, and bounds with recorded times and masks."""
    own = cast(MDLM, model)
    yield from _forwards(own, reference)
    for run in reference.entries("sampler_runs", "runs"):
        yield from _mdlm_run(own, reference, run)
    for entry in reference.entries("bounds"):
        yield from _mdlm_bound(own, reference, entry)


def numbered(reference: Reference, prefix: str) -> list[str]:
    """Names of forwards, as in ``fwd.0``."""
    names = {name.rsplit(".", 1)[0] for name in reference.tensors if name.startswith(f"{prefix}.")}
    return sorted(names, key=lambda name: int(name.rsplit(".", 1)[1]))


def _forwards(model: MDLM, reference: Reference) -> Iterator[Compared]:
    for name in numbered(reference, "fwd"):
        ids_BS = reference.tensor(f"{name}.input_ids")
        lengths = [ids_BS.shape[1]] * len(ids_BS)
        ours = model.canvas_logits(ids_BS, lengths)
        yield logits(f"{name}.logits", ours, reference.tensor(f"{name}.logits"))
        if f"{name}.log_probs" in reference.tensors:
            theirs = reference.tensor(f"{name}.log_probs")
            yield from subs_compared(f"{name}.log_probs", ours, ids_BS, model.mask_token_id, theirs)
        if f"{name}.logits_time_conditioned" in reference.tensors:
            ours = model.network.whole(ids_BS, lengths, sigma_B=reference.tensor(f"{name}.sigma"))
            yield logits(f"{name} at a noise level", ours, reference.tensor(f"{name}.logits_time_conditioned"))


def subs_compared(name: str, ours_BSV: Tensor, ids_BS: Tensor, mask_id: int, theirs: Tensor) -> Iterator[Compared]:
    """Log-probabilities: what stands for none is the same exactly, that of the mask on its coarse grid, the rest
    closely."""
    ours = subs_logprobs(ours_BSV, ids_BS, mask_id)
    never = torch.zeros_like(ours, dtype=torch.bool)
    never[ids_BS == mask_id, mask_id] = True
    apart = float((ours - theirs)[never].abs().max()) if never.any() else 0.0
    yield Compared(kind="logits", name=f"{name} of the mask", value=apart, limit=MASK_GRID)
    none = (theirs == NEVER) & ~never
    yield counts(f"{name} of no probability", bool(((ours == NEVER) == none)[~never].all()), True)
    yield logits(name, ours[~none & ~never], theirs[~none & ~never])


@contextmanager
def watched(model: Masked) -> Iterator[list[Tensor]]:
    """The blocks that the model denoises meanwhile, with what stands before them."""
    seen: list[Tensor] = []
    denoise: Callable[..., Tensor] = model.denoise

    def watching(block_BK: Tensor, context: Context, t_B: object) -> Tensor:
        before_BS = torch.tensor(context.rows) if hasattr(context, "rows") else block_BK[:, :0]
        seen.append(torch.cat([before_BS.view(len(block_BK), -1).to(block_BK.dtype), block_BK], dim=1))
        return denoise(block_BK, context, t_B)

    model.denoise = watching  # type: ignore[method-assign]  # of this model alone
    try:
        yield seen
    finally:
        del model.denoise


def by_row(draws: Tensor) -> list[Tensor]:
    """Draws (steps, B, …) in the order in which rows make them."""
    return list(draws.flatten(0, 1))


def played(
    model: Masked, kind: str, params: Mapping[str, object], prompts: Sequence[Sequence[int]], length: int, noise: Noise
) -> tuple[list[Generation], list[Tensor]]:
    """What a decoder makes of recorded draws, one generation for each prompt, and what the model read."""
    given: dict[str, Any] = {**params, "trace": True}
    decoder = cast("BatchDecoder[Any]", make_decoder(model, kind, **given))
    decoder.make_noise = lambda prompts: noise
    asked = [Prompt(id=str(index), token_ids=tuple(prompt)) for index, prompt in enumerate(prompts)]
    with watched(model) as seen:
        made = decoder.generate(asked, max_new_tokens=length)
    return made, seen


def trajectory(made: Generation, length: int, mask_id: int, num_steps: int) -> Tensor:
    """The canvas (steps, length) after each step of a run of one canvas."""
    canvas, found, by_step = torch.full((length,), mask_id), [], {step.step: step for step in made.trace or ()}
    for number in range(num_steps):
        if number in by_step:
            canvas = canvas.clone()
            canvas[list(by_step[number].positions)] = torch.tensor(by_step[number].token_ids, dtype=canvas.dtype)
        found.append(canvas)
    return torch.stack(found)


def _mdlm_run(model: MDLM, reference: Reference, run: Table) -> Iterator[Compared]:
    name = run["name"]
    draws, final, path = (reference.tensor(f"sample.{name}.{what}") for what in ("uniforms", "final", "trajectory"))
    quirk, num_rows, per_row = quirk_of(run), draws.shape[1], by_row(draws)
    if "stride_length" in run:
        stride, num_steps = run["stride_length"], round(1 / run["dt"])
        params: dict[str, object] = {"predictor": "ddpm_cache", "stride": stride, "steps": num_steps}
        first = (num_steps + 1) * num_rows  # of the first canvas; the others' draws are also for what is known
        per_row = [*per_row[:first], *(draw[-stride:] for draw in per_row[first:])]
    else:
        predictor = run.get("predictor") or next((kind for kind in KINDS if name.startswith(kind)), name)
        stride, num_steps = 0, run["steps"]
        params = {"predictor": predictor, "steps": num_steps, "eps": run["eps"]}
    params |= {"all_steps": True, "whole_batch": True}
    noise = Recorded(per_row)
    made, seen = played(as_masked(model), "ancestral", params, [()] * num_rows, final.shape[-1], noise)
    finals = final.view(num_rows, -1).tolist()
    for index, (one, theirs) in enumerate(zip(made, finals, strict=True)):
        yield tokens(f"{name}/{index}", one.token_ids, theirs, quirk=quirk)
    numbers = {"backbone_calls_total": len(seen), "batch": num_rows, "length": final.shape[-1]}
    numbers |= _of_strides(made) if stride else _of_steps(made, num_steps, final.shape[-1], len(seen))
    yield numbers_of_calls(name, numbers, run, quirk=quirk)
    yield counts(f"{name}: draws left over", noise.left, 0, quirk=quirk)
    for index, one in enumerate(made):
        if stride:
            ours = _of_windows(one, path.shape[-1], stride, num_steps, model.mask_token_id)
        else:
            ours = trajectory(one, path.shape[-1], model.mask_token_id, len(path))
        yield counts(f"{name}/{index}: order of commits", ours.tolist(), path[:, index].tolist(), quirk=quirk)


def _of_steps(made: Sequence[Generation], num_steps: int, length: int, num_calls: int) -> dict[str, int]:
    """Steps and calls of a run of one canvas, whose last call leaves no mask."""
    planned = [[step for step in one.trace or () if step.step < num_steps] for one in made]
    changed = {step.step for steps in planned for step in steps if step.positions}
    filled = sum(len(step.positions) for steps in planned for step in steps)
    return {
        "of_which_noise_removal": 1,
        "saved_calls": num_steps + 1 - num_calls,
        "unchanged_steps": num_steps - len(changed),
        "masked_left_before_noise_removal": len(made) * length - filled,
    }


def _of_strides(made: Sequence[Generation]) -> dict[str, int]:
    """Strides behind the first canvas, and steps that changed anything."""
    changed = {(step.block, step.step) for one in made for step in one.trace or () if step.positions}
    return {"num_strides": max(block for block, _ in changed), "reported_sampling_steps": len(changed)}


def _of_windows(made: Generation, length: int, stride: int, num_steps: int, mask_id: int) -> Tensor:
    """The window after each step, the pass that leaves no mask aside, one canvas after the other."""
    found: list[Tensor] = []
    blocks = range(max(step.block for step in made.trace or ()) + 1)
    whole = torch.tensor(made.token_ids)
    for block in blocks:
        known = length - stride if block else 0
        start = block * stride
        canvas = torch.full((length,), mask_id)
        canvas[:known] = whole[start : start + known]
        by_step = {step.step: step for step in made.trace or () if step.block == block}
        for number in range(num_steps + 1):
            if number in by_step:
                canvas = canvas.clone()
                places = torch.tensor(by_step[number].positions, dtype=torch.int64) - start
                canvas[places] = torch.tensor(by_step[number].token_ids, dtype=torch.int64)
            found.append(canvas)
    return torch.stack(found)


def _mdlm_bound(model: MDLM, reference: Reference, entry: Table) -> Iterator[Compared]:
    name, config = f"bound.{entry['name']}", entry["config"]
    ids_BL, counted_BL = reference.tensor("bound.input_ids"), reference.tensor("bound.attention_mask")
    unknown = config.keys() - {"T", "training__importance_sampling", "training__change_of_variables"}
    if unknown:
        raise UserError(f"golden.json: {name} has the setting {sorted(unknown)[0]!r}, which is not known")
    noised = mdlm_noised(
        reference.tensor(f"{name}.u_time"),
        num_steps=config.get("T", 0),
        importance=config.get("training__importance_sampling", False),
        change_of_variables=config.get("training__change_of_variables", False),
    )
    yield likelihood(f"{name}.t_sampled", noised.t, reference.tensor(f"{name}.t_sampled"))
    yield likelihood(f"{name}.move_chance", noised.masked, reference.tensor(f"{name}.move_chance"))
    masked_BL = reference.tensor(f"{name}.u_mask") < noised.masked[:, None]
    noisy_BL = torch.where(masked_BL, model.mask_token_id, ids_BL)
    yield counts(f"{name}.xt", noisy_BL.tolist(), reference.tensor(f"{name}.xt").tolist())
    ours = model.canvas_logits(noisy_BL, [ids_BL.shape[1]] * len(ids_BL))
    yield from bound_compared(
        reference, entry, nll(subs_logprobs(ours, noisy_BL, model.mask_token_id), ids_BL, noised, counted_BL)
    )


def bound_compared(
    reference: Reference, entry: Table, nll_BL: Tensor, counted_BL: Tensor | None = None
) -> Iterator[Compared]:
    """Contributions of all tokens, and what is made of their sum."""
    name = f"bound.{entry['name']}"
    yield likelihood(f"{name}.nlls", nll_BL, reference.tensor(f"{name}.nlls"))
    counted_BL = reference.tensor("bound.attention_mask") if counted_BL is None else counted_BL
    total, num = float(nll_BL.double().sum()), float(counted_BL.sum())
    yield likelihood(f"{name}.sum_nll", total, entry["sum_nll"])
    yield likelihood(f"{name}.token_nll", total / num, entry["token_nll"])
    yield counts(f"{name}.tokens", num, entry["tokens"])
    yield likelihood(f"{name}.ppl", total / num, float(torch.tensor(entry["ppl"], dtype=torch.float64).log()))
