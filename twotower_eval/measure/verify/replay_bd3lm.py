"""Replay of BD3-LM: forwards with and without clean blocks, runs with recorded draws, and its bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.families.bd3lm import BD3LM, doubled_mask, uncached
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.engine.scorers.bounds import bd3lm_noised, nll, subs_logprobs
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.replay import (
    Compared,
    Recorded,
    Reference,
    Table,
    counts,
    likelihood,
    logits,
    quirk_of,
    tokens,
)
from twotower_eval.measure.verify.replay_dit import bound_compared, by_row, numbered, played, subs_compared
from twotower_eval.records import Generation

LOWEST = 1e-3  # of a bound's times


def bd3lm(model: Model, reference: Reference) -> Iterator[Compared]:
    """All that the folder holds."""
    own = cast(BD3LM, model)
    yield from _forwards(own, reference)
    for run in reference.entries("sampler_runs", "runs"):
        yield from _run(own, reference, run)
    for entry in reference.entries("bounds"):
        yield from _bound(own, reference, entry)


def _forwards(model: BD3LM, reference: Reference) -> Iterator[Compared]:
    for prefix in ("fwd", "fwd2x"):
        for name in numbered(reference, prefix):
            ids_BS = reference.tensor(f"{name}.input_ids")
            noisy_BS, clean_BS = ids_BS.chunk(2, dim=1) if prefix == "fwd2x" else (ids_BS, None)
            ours = model.plain_logits(ids_BS) if clean_BS is None else model.doubled_logits(noisy_BS, clean_BS)
            yield logits(f"{name}.logits", ours, reference.tensor(f"{name}.logits"))
            if f"{name}.log_probs" in reference.tensors:
                theirs = reference.tensor(f"{name}.log_probs")
                yield from subs_compared(f"{name}.log_probs", ours, noisy_BS, model.mask_token_id, theirs)
            if f"{name}.logits_time_conditioned" in reference.tensors:
                ours = model.plain_logits(ids_BS, sigma_B=reference.tensor(f"{name}.sigma"))
                yield logits(f"{name} at a noise level", ours, reference.tensor(f"{name}.logits_time_conditioned"))
    if "mask_2x" in reference.tensors:
        theirs = reference.tensor("mask_2x").bool()
        yield counts("mask_2x", doubled_mask(len(theirs) // 2, model.block_size).tolist(), theirs.tolist())


def _run(model: BD3LM, reference: Reference, run: Table) -> Iterator[Compared]:
    name, options, quirk = run["name"], run["options"], quirk_of(run)
    unknown = options.keys() - {"sampling__kv_cache", "sampling__first_hitting", "sampling__nucleus_p"}
    if unknown:
        raise UserError(f"golden.json: {name} has the setting {sorted(unknown)[0]!r}, which is not known")
    final_BS, num_rows = reference.tensor(f"sample.{name}.final"), run["batch"]
    draws = reference.tensor(f"sample.{run.get('uniforms_stored_under', name)}.gumbel_uniforms")
    first_hitting = options.get("sampling__first_hitting", True)
    params: dict[str, object] = {"first_hitting": first_hitting, "drop_crossing": True, "zero_at_end": True}
    params["top_p"] = options.get("sampling__nucleus_p")
    if not first_hitting:
        params |= {"steps": run["num_steps"], "whole_batch": True}
    picks = reference.tensor(f"sample.{name}.position_index") if first_hitting else None
    noise = Recorded(_ordered(draws, picks, model.block_size))
    bos = [[reference.meta["bos"]]] * num_rows
    is_cached = options["sampling__kv_cache"]
    reader = as_masked(model) if is_cached else as_masked(uncached(model))
    made, seen = played(reader, "bd3lm", params, bos, final_BS.shape[1] - 1, noise)
    for index, (one, theirs) in enumerate(zip(made, final_BS.tolist(), strict=True)):
        yield tokens(f"{name}/{index}", [*bos[0], *one.token_ids], theirs, quirk=quirk)
    changed = {(step.block, step.step) for one in made for step in one.trace or () if step.positions}
    # The original also reads the last block into its cache, which nothing uses.
    stores = made[0].num_context_forwards + 1 if is_cached else 0
    found = {"steps_recorded": len(reference.tensor(f"sample.{name}.trajectory")), "seqlen": final_BS.shape[1]}
    found |= {"denoise_calls": len(seen), "reported_nfe": len(changed), "cache_store_calls": stores}
    for what, ours in found.items():
        yield counts(f"{name}: {what}", ours, run[what], quirk=quirk)
    path = reference.tensor(f"sample.{name}.trajectory")
    windows = _windows(model, made, bos[0], path)
    yield counts(f"{name}: order of commits", windows.tolist(), path.tolist(), quirk=quirk)
    yield counts(f"{name}: draws left over", noise.left, 0, quirk=quirk)


def _ordered(draws: Tensor, picks: Tensor | None, block_size: int) -> list[Tensor]:
    """Draws in the order in which rows make them: for a block's tokens, and then for the mask that is filled."""
    if picks is None:
        return by_row(draws)
    left = [block_size - 1 - step for step in range(block_size - 1)]  # the first token is given
    while len(left) < len(picks):
        left += range(block_size, 0, -1)
    found = []
    for step_draws, step_picks, num_masked in zip(draws, picks, left, strict=False):
        for draw, pick in zip(step_draws, step_picks, strict=True):
            found += [draw, ((pick + 0.5) / num_masked)[None]]
    return found


def _windows(model: BD3LM, made: Sequence[Generation], bos: list[int], path: Tensor) -> Tensor:
    """What the window holds after each step, (steps, B, length): -1 behind it."""
    size, mask_id = model.block_size, model.mask_token_id
    canvas = torch.full(path.shape[1:], mask_id)
    canvas[:, : len(bos)] = torch.tensor(bos)
    by_step = [{(step.block, step.step): step for step in one.trace or ()} for one in made]
    found, block, number = [], 0, 0
    for _ in path:
        for row, steps in enumerate(by_step):
            if (block, number) in steps:
                places = torch.tensor(steps[block, number].positions, dtype=torch.int64) + len(bos)
                canvas[row, places] = torch.tensor(steps[block, number].token_ids, dtype=torch.int64)
        end = (block + 1) * size
        start = max(end - model.max_length, 0)
        found.append(torch.full_like(canvas, -1))
        found[-1][:, : end - start] = canvas[:, start:end]
        number += 1
        if not (canvas[:, :end] == mask_id).any():
            block, number = block + 1, 0
    return torch.stack(found)


def _bound(model: BD3LM, reference: Reference, entry: Table) -> Iterator[Compared]:
    name, options = f"bound.{entry['name']}", entry["options"]
    unknown = options.keys() - {"algo__var_min", "algo__mdlm_loss_scale"}
    if unknown:
        raise UserError(f"golden.json: {name} has the setting {sorted(unknown)[0]!r}, which is not known")
    ids_BL, uniform_BN = reference.tensor("bound.input_ids"), reference.tensor(f"{name}.u_time")
    # Without var_min the original replaces the limits that it is given.
    low, high = (entry["eps_min"], entry["eps_max"]) if options.get("algo__var_min") else (LOWEST, 1.0)
    size = ids_BL.shape[1] // uniform_BN.shape[1]
    by_mdlm = options.get("algo__mdlm_loss_scale", False)
    noised = bd3lm_noised(uniform_BN, size, low=low, high=high, mdlm_weight=by_mdlm)
    yield likelihood(f"{name}.t", noised.t, reference.tensor(f"{name}.t"))
    masked_BL = reference.tensor(f"{name}.u_mask") <= noised.masked
    masked_BL[:, 0] = False
    noisy_BL = torch.where(masked_BL, model.mask_token_id, ids_BL)
    yield counts(f"{name}.xt", noisy_BL.tolist(), reference.tensor(f"{name}.xt").tolist())
    counted_BL = reference.tensor("bound.attention_mask").clone()
    counted_BL[:, 0] = 0
    yield counts(f"{name}.token_mask", counted_BL.tolist(), reference.tensor(f"{name}.token_mask").tolist())
    logprob_BLV = subs_logprobs(model.doubled_logits(noisy_BL, ids_BL, size), noisy_BL, model.mask_token_id)
    yield from bound_compared(reference, entry, nll(logprob_BLV, ids_BL, noised, counted_BL), counted_BL)
