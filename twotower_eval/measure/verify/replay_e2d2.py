"""Replay of E2D2 in both of its forms: two blocks behind a cache, runs of its samplers with recorded draws, and its
bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.batch import BatchDecoder
from twotower_eval.engine.decoders.sampled import Draft, SampledDecoder
from twotower_eval.engine.families.e2d2 import E2D2
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.protocol import Model
from twotower_eval.engine.scorers.bounds import at_times, nll, subs_logprobs
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
from twotower_eval.records import Generation, Prompt

OPTIONS = {  # of a run -> what the original does where it is not given
    "sampling_strategy": "predict_and_noise",
    "first_hitting": True,
    "num_steps": None,
    "do_sample": False,
    "confidence_based_noising": True,
    "confidence_margin_based_noising": False,
    "confidence_threshold": None,
    "align_inputs_to_blocks": True,
    "use_cache": True,
    "use_model_output_cache": True,
    "min_t": 1e-5,
}
CLOSE = 1e-3  # between the states of a prompt that was read in one direction and in both


def e2d2(model: Model, reference: Reference) -> Iterator[Compared]:
    """All that the folder holds."""
    own = cast(E2D2, model)
    own.block_size = reference.meta.get("block_size", own.block_size)
    yield from _blocks(own, reference)
    for run in reference.entries("sampler_runs", "runs"):
        yield from _run(own, reference, run)
    for entry in reference.entries("bounds"):
        yield from _bound(own, reference, entry)


def _blocks(model: E2D2, reference: Reference) -> Iterator[Compared]:
    """The states of a prompt, and logits at two states of each block behind it.

    The original may read prompts in both directions though its encoder was trained in one: the states say which.
    """
    if "stage.prompt" not in reference.tensors:
        return
    prompt_BS, theirs = reference.tensor("stage.prompt"), reference.tensor("stage.prefill_values_last")
    lengths = [prompt_BS.shape[1]] * len(prompt_BS)
    hidden_BSH, context = model.encoded(model.nothing(len(prompt_BS)), prompt_BS, lengths)
    if model.causal and float((context.past.values[-1] - theirs).abs().max()) > CLOSE:
        model.causal_cache = False
        hidden_BSH, context = model.encoded(model.nothing(len(prompt_BS)), prompt_BS, lengths)
    if "stage.prefill_hidden" in reference.tensors:
        yield logits("stage.prefill_hidden", hidden_BSH, reference.tensor("stage.prefill_hidden"))
    yield logits("stage.prefill_values_last", context.past.values[-1], theirs)
    yield logits("stage.prefill_keys_layer0", context.past.keys[0], reference.tensor("stage.prefill_keys_layer0"))
    number = 0
    while f"stage.block{number}.step0.xt" in reference.tensors:
        step = 0
        while (name := f"stage.block{number}.step{step}") and f"{name}.xt" in reference.tensors:
            noisy_BK = reference.tensor(f"{name}.xt")
            ours = model.denoise(noisy_BK, context)
            yield logits(f"{name}.logits", ours, reference.tensor(f"{name}.logits"))
            theirs = reference.tensor(f"{name}.log_probs")
            yield from _logprobs(reference, f"{name}.log_probs", ours, noisy_BK, model.mask_token_id, theirs)
            step += 1
        context = model.extend(context, reference.tensor(f"stage.block{number}.committed"))
        number += 1


def _logprobs(
    reference: Reference, name: str, ours_BSV: Tensor, ids_BS: Tensor, mask_id: int, theirs: Tensor
) -> Iterator[Compared]:
    """Log-probabilities: what stands for none is the same exactly, the rest closely."""
    never = float(torch.tensor(reference.meta["neg_infinity"], dtype=theirs.dtype))
    ours = subs_logprobs(ours_BSV, ids_BS, mask_id, never=never)
    none = theirs == never
    yield counts(f"{name} of no probability", bool(((ours == never) == none).all()), True)
    yield logits(name, ours[~none], theirs[~none])


def _params(run: Table) -> dict[str, Any]:
    """Our decoder's parameters for the settings of a run, with all of its original's ways."""
    given = run["options"]
    unknown = given.keys() - OPTIONS
    if unknown:
        raise UserError(f"golden.json: {run['name']} has the setting {sorted(unknown)[0]!r}, which is not known")
    said = {**OPTIONS, **given}
    by_posterior = said["sampling_strategy"] == "posterior"
    if not by_posterior and not (said["confidence_based_noising"] or said["confidence_margin_based_noising"]):
        raise UserError(f"golden.json: {run['name']} masks tokens again by no confidence, which is not known")
    by_margin = said["confidence_margin_based_noising"]
    params = {
        "strategy": "posterior" if by_posterior else "margin" if by_margin else "confidence",
        "steps": said["num_steps"],
        "threshold": None if by_posterior else said["confidence_threshold"],
        "do_sample": said["do_sample"],
        "min_t": said["min_t"],
        "align": said["align_inputs_to_blocks"],
        "use_cache": said["use_cache"],
        "reread": not said["use_model_output_cache"],
    }
    if by_posterior:
        loses = said["use_cache"] and said["use_model_output_cache"]
        params |= {"drawn_times": said["first_hitting"], "lost_cache": loses, "commit_mask": True}
    return params


def _run(model: E2D2, reference: Reference, run: Table) -> Iterator[Compared]:
    name, quirk = run["name"], quirk_of(run)
    if "error" in run:
        yield tokens(name, (), (), quirk="its original fails")
        return
    params, size = _params(run), model.block_size
    prompt, final = (reference.tensor(f"sample.{name}.{what}")[0].tolist() for what in ("prompt", "final"))
    path = reference.tensor(f"sample.{name}.trajectory")[:, 0]
    behind = len(prompt) % size if params["align"] else 0
    # What the prompt has of a block counts as new in the original, which leaves as many masks at the end.
    length = run["max_new_tokens"] // size * size - behind
    names = ("time_uniforms", "uniforms")
    held = [reference.tensors.get(f"sample.{name}.{what}") for what in names]
    noise = Recorded(([] if held[0] is None else [held[0]]) + ([] if held[1] is None else list(held[1])))
    watched = WatchedModel(model)
    decoder = cast("BatchDecoder[Any]", make_decoder(cast(Model, watched), "e2d2", **params, trace=True))
    decoder.make_noise = lambda prompts: noise
    made = decoder.generate([Prompt(id=name, token_ids=tuple(prompt))], max_new_tokens=length)[0]
    whole = [*prompt, *made.token_ids, *[model.mask_token_id] * behind]
    yield tokens(name, whole, final, quirk=quirk)
    yield counts(f"{name}: masks left", whole.count(model.mask_token_id), run["masks_left_in_output"], quirk=quirk)
    for what in ("reported_nfe", "decoder_calls"):
        yield counts(f"{name}: {what}", made.num_denoiser_forwards, run[what], quirk=quirk)
    read = [num for num in (*watched.prefills.tokens, *watched.extensions.tokens) if num]
    if params["use_cache"]:  # the original also reads its last block, which nothing uses
        read.append(size)
        yield counts(f"{name}: encoder_call_lengths", read, run["encoder_call_lengths"], quirk=quirk)
    encoded = made.num_context_forwards + bool(params["use_cache"])
    yield counts(f"{name}: encoder_calls", encoded, run["encoder_calls"], quirk=quirk)
    yield counts(f"{name}: draws left over", noise.left, 0, quirk=quirk)
    begun = Draft(torch.tensor([*prompt[len(prompt) - behind :], *[model.mask_token_id] * (size - behind)]), -1)
    num_steps = cast(SampledDecoder[Any], decoder).num_steps(begun)
    ours = _trajectory(made, begun.tokens_G, behind, model.mask_token_id, num_steps)
    yield counts(f"{name}: order of commits", ours[: len(path)], path.tolist(), quirk=quirk)
    yield counts(f"{name}: steps", len(ours), run["steps"], quirk=quirk)


def _trajectory(made: Generation, first_K: Tensor, num_known: int, mask_id: int, num_steps: int) -> list[list[int]]:
    """The block in progress after each step of a run; a block ends without masks, or after its last step."""
    found: list[list[int]] = []
    by_step = {(step.block, step.step): step for step in made.trace or ()}
    for block in range(1 + max(number for number, _ in by_step)):
        canvas_K = first_K.clone() if block == 0 else torch.full_like(first_K, mask_id)
        for number in range(num_steps):
            if (block, number) in by_step:
                step = by_step[block, number]
                places = torch.tensor(step.positions, dtype=torch.int64) + num_known - block * len(first_K)
                canvas_K[places] = torch.tensor(step.token_ids, dtype=canvas_K.dtype)
            found.append(canvas_K.tolist())
            if mask_id not in found[-1]:
                break
    return found


def _bound(model: E2D2, reference: Reference, entry: Table) -> Iterator[Compared]:
    """Logits, what is masked, and what each token contributes, for recorded times and draws."""
    name = f"bound.{entry['index']}"
    held = {what: reference.tensor(f"{name}.{what}") for what in ("input_ids", "attention_mask", "context_mask", "t")}
    ids_BL, real_BL, given_BL = held["input_ids"], held["attention_mask"].bool(), held["context_mask"].bool()
    noised = at_times(held["t"])
    masked_BL = (reference.tensor(f"{name}.u_mask") < noised.masked) & ~given_BL
    noisy_BL = torch.where(masked_BL, model.mask_token_id, ids_BL)
    if model.keeps_first:
        noisy_BL[:, 0] = ids_BL[:, 0]
    yield counts(f"{name}.xt", noisy_BL.tolist(), reference.tensor(f"{name}.xt").tolist())
    counted_BL = (real_BL & ~given_BL).to(torch.int64)
    yield counts(f"{name}.tokens_mask", counted_BL.tolist(), reference.tensor(f"{name}.tokens_mask").tolist())
    ours = model.doubled_logits(noisy_BL, ids_BL, real_BS=real_BL, given_BS=given_BL)
    theirs = reference.tensor(f"{name}.logits_mask_channel_overwritten")
    others = torch.arange(ours.shape[-1]) != model.mask_token_id  # the original writes into that of the mask
    yield logits(f"{name}.logits", ours[real_BL][:, others], theirs[real_BL][:, others])
    if f"{name}.log_probs" in reference.tensors:
        theirs = reference.tensor(f"{name}.log_probs")[real_BL]
        yield from _logprobs(
            reference, f"{name}.log_probs", ours[real_BL], noisy_BL[real_BL], model.mask_token_id, theirs
        )
    logprob_BLV = subs_logprobs(ours, noisy_BL, model.mask_token_id, never=float(reference.meta["neg_infinity"]))
    nll_BL = nll(logprob_BLV, ids_BL, noised, counted_BL)
    yield likelihood(f"{name}.nlls", nll_BL, reference.tensor(f"{name}.nlls"))
    total, num = nll_BL.double().sum(), int(counted_BL.sum())
    yield likelihood(f"{name}.loss", (nll_BL.double().sum(1) / counted_BL.sum(1)).mean(), entry["loss"])
    yield likelihood(f"{name}.nll_token_weighted", total / num, entry["nll_token_weighted"])
    log_ppl = torch.tensor(entry["ppl"], dtype=torch.float64).log()
    yield likelihood(f"{name}.ppl", total / num, log_ppl)
