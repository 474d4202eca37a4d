"""Replay of LLaDA2: its experts' choices, and its runs, whose original reads everything in every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.families.llada2_moe import Layer, Layers, LLaDA2, Router
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.measure.verify.replay import (
    Compared,
    Reference,
    Table,
    counts,
    logits,
    numbers_of_calls,
    quirk_of,
    tokens,
)
from twotower_eval.measure.verify.replay_blocks import raw_logits
from twotower_eval.records import Prompt


def llada2(model: Model, reference: Reference) -> Iterator[Compared]:
    """Forwards, the hidden states and experts of one of them, and runs."""
    own = cast(LLaDA2, model)
    sizes = {entry["input_ids"]: entry["block_length"] for entry in reference.entries("forwards")}
    for entry in reference.entries("forwards"):
        ids_BS = reference.tensor(entry["input_ids"])
        yield logits(entry["name"], raw_logits(own, ids_BS, entry["block_length"]), reference.tensor(entry["logits"]))
    if "trace" in reference.meta:
        name = reference.meta["trace"]["input"]
        yield from _trace(own, reference, reference.tensor(name), sizes.get(name, reference.meta["block_size"]))
    for run in reference.entries("runs"):
        yield from _run(own, run)


def _trace(model: LLaDA2, reference: Reference, ids_BS: Tensor, block_size: int) -> Iterator[Compared]:
    hidden: list[Tensor] = []
    routed: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = []
    for part in model.modules():
        if isinstance(part, Layer):
            hooks.append(part.register_forward_pre_hook(lambda _, given: hidden.append(given[0])))
        if isinstance(part, Layers):
            hooks.append(part.norm.register_forward_hook(lambda _, given, made: hidden.append(made)))
        if isinstance(part, Router):
            hooks.append(part.register_forward_hook(lambda _, given, made: routed.append(made)))
    raw_logits(model, ids_BS, block_size)
    for hook in hooks:
        hook.remove()
    for number, state_BSH in enumerate(hidden):
        yield logits(f"hidden {number}", state_BSH, reference.tensor(f"trace.hidden_{number}"))
    for number, (chosen_MC, _, logits_ME) in enumerate(routed):
        theirs_BSE = reference.tensor(f"trace.router_logits_{number}")
        yield logits(f"router {number}", logits_ME.view_as(theirs_BSE), theirs_BSE)
        theirs_BSC = reference.tensor(f"trace.expert_idx_{number}")
        same = torch.equal(chosen_MC.view_as(theirs_BSC).sort(-1).values, theirs_BSC.sort(-1).values)
        yield counts(f"experts {number}", same, True)


def _run(model: LLaDA2, run: Table) -> Iterator[Compared]:
    args, prompt, quirk = run["args"], list(run["prompt"]), quirk_of(run)
    size, length = args["block_length"], args["gen_length"]
    model.block_size = size
    decoder = make_decoder(
        as_masked(model),
        "llada2",
        steps=args["steps"],
        threshold=args["threshold"],
        minimal_topk=args.get("minimal_topk", 1),
        eos_early_stop=args.get("eos_early_stop", False),
        eos_of_prompt=args.get("eos_early_stop", False),
        commit_mask=True,
    )
    asked = [Prompt(id=run["name"], token_ids=tuple(prompt), trace=True)]
    made = decoder.generate(asked, max_new_tokens=length, eos_token_ids=[args["eos_id"]])[0]
    answer = list(made.token_ids)
    if made.finish == "eos" and run["answer"]:
        answer.append(args["eos_id"])
    both = [*prompt, *answer, *answer], [*run["final"], *run["answer"]]
    yield tokens(run["name"], *both, quirk=quirk)
    first = len(prompt) - len(prompt) % size
    windows = [first + (step.block + 1) * size for step in made.trace or ()]
    found = dict.fromkeys(("model_calls", "window_calls_without_cache"), made.num_denoiser_forwards)
    yield numbers_of_calls(run["name"], found, run["nfe"], quirk=quirk)
    yield counts(f"{run['name']}: windows", windows, run["window_lengths"], quirk=quirk)
    committed = {
        first + step.block * size + position: call
        for call, step in enumerate(made.trace or (), 1)
        for position in step.positions
    }
    order = [0] * len(prompt) + [committed.get(position) for position in range(len(prompt), len(run["final"]))]
    yield counts(f"{run['name']}: order of commits", order, run["commit_step"], quirk=quirk)
