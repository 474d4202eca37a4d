"""Replays of Fast-dLLM: v1 on LLaDA with approximate caches, v2 behind its cache of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.families.fast_dllm_v2 import FastDLLMv2
from twotower_eval.engine.families.llada import LLaDA
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.engine.scorers.masked import first_token_logprob
from twotower_eval.measure.verify.replay import (
    Compared,
    Noted,
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
from twotower_eval.measure.verify.replay_blocks import raw_logits
from twotower_eval.records import Generation, Prompt


def v1(model: Model, reference: Reference) -> Iterator[Compared]:
    """Forwards behind caches, and runs by the original and by ports of it."""
    own = cast(LLaDA, model)
    for entry in reference.entries("forwards"):
        yield from _approximated(own, reference, entry)
    for run in reference.entries("runs"):
        yield from _v1_run(own, run, factor_rule="until_first_failure")
    for port in reference.entries("ports"):
        for run in port["runs"]:
            yield from _v1_run(own, run, factor_rule="all_within")


def _approximated(model: LLaDA, reference: Reference, entry: Table) -> Iterator[Compared]:
    name, (start, stop) = entry["name"], entry["block"]
    before_BS, after_BS = reference.tensor(entry["ids_before"]), reference.tensor(entry["ids_after"])
    nothing = model.prefill(before_BS[:, :0])
    ours, kept = model.denoise_kept(before_BS, nothing)
    yield logits(f"{name}: before", ours, reference.tensor(entry["full_logits_before"]))
    exact = model.canvas_logits(after_BS, [after_BS.shape[1]] * len(after_BS))
    yield logits(f"{name}: after", exact, reference.tensor(entry["full_logits_after"]))
    for cache, part in (("prefix", slice(start, None)), ("dual", slice(start, stop))):
        ours = model.denoise_part(after_BS[:, part], [start] * len(after_BS), nothing, kept)
        yield logits(f"{name}: {cache}", ours, reference.tensor(entry[f"{cache}_logits"]))
        gap = reference.meta.get("approximation_gap", {}).get(cache)
        if gap is not None:
            yield logits(f"{name}: gap of {cache}", (ours - exact[:, part]).abs().max(), torch.tensor(gap))


def _v1_run(model: LLaDA, run: Table, *, factor_rule: str) -> Iterator[Compared]:
    args, prompt, quirk = run["args"], run["prompt"], quirk_of(run)
    if run.get("masks_left"):
        quirk = quirk or "the port leaves masks in its answer"
    cache = next((kind for kind in ("prefix", "dual") if kind in run["sampler"]), "none")
    noted = Noted(model, lambda *_: "S" if cache == "prefix" else "B")
    decoder = make_decoder(
        cast(Model, noted),
        "fast_dllm_v1",
        **{name: args.get(name) for name in ("block_length", "steps", "threshold", "factor")},
        cache=cache,
        factor_rule=factor_rule,
        extra_step="2025-06-27" in run["sampler"],
        commit_mask=True,
    )
    asked, length = [Prompt(id=run["name"], token_ids=tuple(prompt), trace=True)], args["gen_length"]
    made = decoder.generate(asked, max_new_tokens=length)[0]
    yield tokens(run["name"], [*prompt, *made.token_ids], run["final"], quirk=quirk)
    calls = noted.calls.replace("D", "F")
    yield counts(f"{run['name']}: calls", calls, run["calls"], quirk=quirk)
    kinds = {"model_calls": "FSB", "full_canvas_calls": "F", "suffix_calls": "S", "block_calls": "B"}
    found = {name: sum(call in letters for call in calls) for name, letters in kinds.items()}
    found["calls_that_committed_nothing"] = sum(not step.positions for step in made.trace or ())
    found["reported_by_original"] = len(calls)
    given = run["nfe"]
    yield counts(f"{run['name']}: numbers of calls", {name: found[name] for name in given}, given, quirk=quirk)
    order = [0] * len(prompt) + commit_calls(made, length)
    yield counts(f"{run['name']}: order of commits", order, run["commit_step"], quirk=quirk)


def v2(model: Model, reference: Reference) -> Iterator[Compared]:
    """Forwards, runs and first-token likelihoods of Fast-dLLM v2."""
    own = cast(FastDLLMv2, model)
    for entry in reference.entries("forwards"):
        if "input_ids" in entry:
            ids_BS, theirs = reference.tensor(entry["input_ids"]), reference.tensor(entry["logits"])
            yield logits(entry["name"], raw_logits(own, ids_BS, entry["block_size"]), theirs)
        else:
            yield from _cached(own, reference, entry)
    for run in reference.entries("runs"):
        yield from _v2_run(own, run)
    own.block_size = reference.meta["block_size"]
    for number, entry in enumerate(reference.entries("likelihood")):
        found = first_token_logprob(
            as_masked(own), entry["prompt"], entry["answer"], eos_token_id=reference.meta["stop_id"]
        )
        yield likelihood(f"likelihood {number}", found, entry["value"])


def _cached(model: FastDLLMv2, reference: Reference, entry: Table) -> Iterator[Compared]:
    """A block behind a prefix, then a part of the changed block behind what the first pass kept; logits unshifted."""
    model.block_size, model.shift = reference.meta["block_size"], 0
    try:
        context = model.prefill(reference.tensor(entry["prefix_ids"]))
        ours, kept = model.denoise_kept(reference.tensor(entry["block_ids"]), context)
        yield logits(f"{entry['name']}: block", ours, reference.tensor(entry["block_logits"]))
        start, stop = entry["subblock_range"]
        part_BM = reference.tensor(f"{entry['name']}.block_ids_after")[:, start:stop]
        ours = model.denoise_part(part_BM, [start] * len(part_BM), context, kept)
        yield logits(f"{entry['name']}: sub-block", ours, reference.tensor(entry["subblock_logits"]))
    finally:
        model.shift = 1


def _v2_run(model: FastDLLMv2, run: Table) -> Iterator[Compared]:
    args, quirk = run["args"], quirk_of(run)
    in_batch = isinstance(run["prompt"][0], list)
    prompts, finals = (run["prompt"], run["final"]) if in_batch else ([run["prompt"]], [run["final"]])
    if in_batch and args["use_block_cache"]:
        quirk = quirk or "the original decides for all rows of a batch what the next pass reads"
    model.block_size = args["block_size"]
    noted = Noted(model)
    settings = {name: args[name] for name in ("small_block_size", "threshold", "use_block_cache")}
    decoder = make_decoder(cast(Model, noted), "fast_dllm_v2", **settings, commit_mask=True)
    made = []
    for number, (prompt, final) in enumerate(zip(prompts, finals, strict=True)):
        # The token behind the last block, which the pass over that block predicts, belongs to the answer.
        asked = [Prompt(id=f"{run['name']}/{number}", token_ids=tuple(prompt), trace=True)]
        length, stop = len(final) - len(prompt), args["stop_token"]
        made += decoder.generate(asked, max_new_tokens=length, eos_token_ids=[stop])
        name = f"{run['name']}/{number}" if in_batch else run["name"]
        yield tokens(name, _whole(prompt, made[-1], final, stop, args["pad_token"]), final, quirk=quirk)
    if in_batch:
        yield counts(f"{run['name']}: calls", _calls_of_batch(made, args), run["nfe"]["model_calls"], quirk=quirk)
        return
    yield counts(f"{run['name']}: calls", noted.calls, "".join(run["calls"]), quirk=quirk)
    kinds = {"prefill_calls": "P", "full_block_denoise_calls": "D", "sub_block_denoise_calls": "d", "store_calls": "S"}
    found = {kind: noted.calls.count(letter) for kind, letter in kinds.items()} | {"model_calls": len(noted.calls)}
    yield numbers_of_calls(run["name"], found, run["nfe"], quirk=quirk)
    order = _order(made[0], prompts[0], args["block_size"], noted.calls)
    yield counts(f"{run['name']}: order of commits", order, run["commit_step"], quirk=quirk)


def _whole(prompt: Sequence[int], made: Generation, final: Sequence[int], stop: int, pad: int) -> list[int]:
    """The original's canvas at its end: behind a stop there are pads."""
    found = [*prompt, *made.token_ids, *([stop] if made.finish == "eos" else [])]
    return found + [pad] * (len(final) - len(found))


def _order(made: Generation, prompt: Sequence[int], size: int, calls: str) -> list[int]:
    """For each position the 1-based call that committed it; the prompt shows 1 where a prefill came first, else 0."""
    numbered = list(enumerate(calls, 1))
    denoised = iter([number for number, call in numbered if call in "Dd"])
    read = iter([number for number, call in numbered if call == "S" or (call == "P" and len(prompt) % size == 0)])
    first = len(prompt) - len(prompt) % size
    found = dict.fromkeys(range(len(prompt)), int(calls.startswith("P")))
    for step in made.trace or ():
        call = next(read if step.positions == (0,) else denoised)
        found |= {first + step.block * size + position: call for position in step.positions}
    return [found[position] for position in range(1 + max(found))]


def _calls_of_batch(made: Sequence[Generation], args: Mapping[str, int]) -> int:
    """Calls of the original, whose rows wait for each other in every sub-block, from runs of single rows."""
    size, part = args["block_size"], args["small_block_size"]
    start = min(one.num_prompt_tokens for one in made) // size
    most: dict[tuple[int, int], int] = {}
    for one in made:
        own: dict[tuple[int, int], int] = {}
        for step in one.trace or ():
            if step.positions != (0,):
                where = (one.num_prompt_tokens // size + step.block, min(step.positions) // part)
                own[where] = own.get(where, 0) + 1
        most |= {where: max(most.get(where, 0), num) for where, num in own.items()}
    num_stored = 1 + max(block for block, _ in most) - start
    return int(start > 0) + sum(most.values()) + num_stored
