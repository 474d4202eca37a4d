"""Replays of families that read prompt and answer in every call: LLaDA and Dream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.dream import Dream as DreamDecoder
from twotower_eval.engine.families.dream import Dream
from twotower_eval.engine.families.llada import LLaDA
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.engine.scorers.masked import (
    greedy_match,
    left_to_right_logprob,
    sampled_masks_logprob,
    weighted_masks_logprob,
)
from twotower_eval.measure.verify.replay import (
    Compared,
    Recorded,
    Reference,
    Table,
    commit_calls,
    counts,
    likelihood,
    logits,
    numbers_of_calls,
    quirk_of,
    tokens,
)
from twotower_eval.records import Generation, Prompt


def llada(model: Model, reference: Reference) -> Iterator[Compared]:
    """LLaDA's forwards, runs at temperature 0, Monte-Carlo likelihoods with recorded masks, and greedy matches."""
    own = cast(LLaDA, model)
    for entry in reference.entries("forwards"):
        yield _forward(own, reference, entry)
    for run in reference.entries("runs"):
        yield from _run(own, run)
    for number, entry in enumerate(reference.entries("likelihood")):
        masks_NBT = reference.tensor(entry["masks"])
        found = sampled_masks_logprob(as_masked(own), entry["prompt"], entry["answer"], masks_NBT.flatten(0, 1).bool())
        yield likelihood(f"likelihood {number}", found, entry["value"])
        matched = greedy_match(as_masked(own), entry["prompt"], entry["answer"])
        yield counts(f"greedy match of likelihood {number}", matched, entry["greedy_match"])
    for name in ("greedy_match_case", "greedy_mismatch_case"):
        if name in reference.meta:
            case = reference.meta[name]
            yield counts(name, greedy_match(as_masked(own), case["prompt"], case["answer"]), case["result"])


def _forward(model: LLaDA, reference: Reference, entry: Table) -> Compared:
    ids_BS, theirs = reference.tensor(entry["input_ids"]), reference.tensor(entry["logits"])
    length = ids_BS.shape[1]
    if entry["name"] == "prefix_cache":
        start = length - theirs.shape[1]
        return logits(entry["name"], _behind_cache(model, ids_BS, start), theirs)
    if "attention_mask" in entry:
        real_BS = reference.tensor(entry["attention_mask"]).bool()
        visible_BSS = real_BS[:, None].expand(-1, length, -1)
        ours = model.backbone.read(ids_BS, torch.arange(length).expand_as(ids_BS), visible_BSS)[0]
        return logits(entry["name"], ours[real_BS], theirs[real_BS])
    return logits(entry["name"], model.canvas_logits(ids_BS, [length] * len(ids_BS)), theirs)


def _behind_cache(model: LLaDA, ids_BS: Tensor, start: int) -> Tensor:
    """Logits from ``start`` on, with keys and values before it from a pass over everything."""
    positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    visible_BSS = torch.ones(len(ids_BS), ids_BS.shape[1], ids_BS.shape[1], dtype=torch.bool)
    past = model.backbone.read(ids_BS, positions_BS, visible_BSS)[1].first(start)
    return model.backbone.read(ids_BS[:, start:], positions_BS[:, start:], visible_BSS[:, start:], past)[0]


def _run(model: LLaDA, run: Table) -> Iterator[Compared]:
    args, prompt = run["args"], run["prompt"]
    decoder = make_decoder(
        as_masked(model),
        "low_confidence",
        block_length=args["block_length"],
        steps=args["steps"],
        cfg_scale=args.get("cfg_scale", 0.0),
        commit_mask=True,
    )
    length = args["gen_length"]
    made = decoder.generate([Prompt(id=run["name"], token_ids=prompt, trace=True)], max_new_tokens=length)[0]
    quirk = quirk_of(run)
    yield tokens(run["name"], [*prompt, *made.token_ids], run["final"], quirk=quirk)
    order = [0] * len(prompt) + commit_calls(made, length)
    yield counts(f"{run['name']}: order of commits", order, run["commit_step"], quirk=quirk)
    yield from _calls(run, made, rows_per_call=2 if args.get("cfg_scale") else 1)


def _calls(run: Table, made: Generation, *, rows_per_call: int = 1) -> Iterator[Compared]:
    """All calls read the whole canvas."""
    num = made.num_denoiser_forwards // rows_per_call
    found = {"model_calls": num, "full_canvas_calls": num, "cache_calls": 0, "batch_per_call": rows_per_call}
    yield numbers_of_calls(run["name"], found, run["nfe"], quirk=quirk_of(run))


def dream(model: Model, reference: Reference) -> Iterator[Compared]:
    """Dream's forwards, runs, and likelihoods with recorded masks."""
    own = cast(Dream, model)
    for entry in reference.entries("forwards"):
        ids_BS, theirs = reference.tensor(entry["input_ids"]), reference.tensor(entry["logits"])
        if "attention_mask" not in entry:
            yield logits(entry["name"], own.canvas_logits(ids_BS, [ids_BS.shape[1]] * len(ids_BS)), theirs)
            continue
        real_BS, positions_BS = (reference.tensor(entry[name]) for name in ("attention_mask", "position_ids"))
        visible_BSS = real_BS.bool()[:, :, None] & real_BS.bool()[:, None, :]
        ours = own.backbone.read(ids_BS, positions_BS, visible_BSS)[0]
        yield logits(entry["name"], ours[real_BS.bool()], theirs[real_BS.bool()])
    for run in reference.entries("runs"):
        yield from _dream_run(own, reference, run)
    for number, entry in enumerate(reference.entries("likelihood")):
        prompt, answer = entry["prompt"], entry["answer"]
        masks_NBT, p_NB = reference.tensor(entry["masks"]).bool(), reference.tensor(entry["p_mask"])
        found = -weighted_masks_logprob(as_masked(own), prompt, answer, masks_NBT.flatten(0, 1), 1 / p_NB.flatten())
        yield likelihood(f"likelihood {number}: mc", found, entry["nll_mc_ftb"])
        found = -left_to_right_logprob(as_masked(own), prompt, answer)
        yield likelihood(f"likelihood {number}: ar", found, entry["nll_ar_ftb"])


def _dream_run(model: Dream, reference: Reference, run: Table) -> Iterator[Compared]:
    real = run.get("attention_mask", [1] * len(run["prompt"]))  # pads on the left, which nothing sees
    args, prompt = dict(run["args"]), [token for token, there in zip(run["prompt"], real, strict=False) if there]
    length = args.pop("max_new_tokens")
    decoder = make_decoder(as_masked(model), "dream", **args, commit_mask=True)
    draws = [reference.tensor(name) for name in run.get("uniform_draws", ())]
    if draws:
        cast(DreamDecoder, decoder).make_noise = lambda prompts: Recorded(draws)
    made = decoder.generate([Prompt(id=run["name"], token_ids=tuple(prompt), trace=True)], max_new_tokens=length)[0]
    quirk = quirk_of(run)
    hidden = run["prompt"][: len(run["prompt"]) - len(prompt)]
    yield tokens(run["name"], [*hidden, *prompt, *made.token_ids], run["final"], quirk=quirk)
    order = [0] * len(prompt) + commit_calls(made, length)
    yield counts(f"{run['name']}: order of commits", order, run["commit_step"][-len(order) :], quirk=quirk)
    yield from _calls(run, made)
    if "masks_left_before_call" in run:
        committed = [0, *itertools.accumulate(len(step.positions) for step in made.trace or ())]
        left = [length - num for num in committed[:-1]]
        yield counts(f"{run['name']}: masks left", left, run["masks_left_before_call"], quirk=quirk)
