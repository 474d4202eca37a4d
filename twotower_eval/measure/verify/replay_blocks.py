"""Replays of families that decode block after block behind a cache: SDAR."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.families.blocks import BlockModel
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.measure.verify.replay import Compared, Reference, Table, counts, logits, quirk_of, tokens, until
from twotower_eval.records import Generation, Prompt


def raw_logits(model: BlockModel, ids_BS: Tensor, block_size: int) -> Tensor:
    """Logits (B, S, V) of whole rows under blocks of this size, as the backbone gives them."""
    model.block_size, own = block_size, model.block_size
    try:
        nothing = model.prefill(ids_BS[:, :0], [0] * len(ids_BS))  # blocks from the first token on
        positions_BS, visible_BSS, _ = model.seen(nothing, ids_BS.shape[1], [ids_BS.shape[1]] * len(ids_BS))
        return model.backbone.read(ids_BS, positions_BS, visible_BSS)[0]
    finally:
        model.block_size = own


def calls_of(made: Generation, prompt: list[int], size: int) -> str:
    """The order of a run's calls, one letter each: P prefill, D denoise, S a finished block read into the context."""
    found = "P" if len(prompt) >= size else ""
    steps = made.trace or ()
    for number, step in enumerate(steps):
        found += "D"
        if number + 1 < len(steps) and steps[number + 1].block != step.block:
            found += "S"
    return found


def commit_calls_of_blocks(made: Generation, prompt: list[int], size: int, calls: str) -> list[int]:
    """For each position the 1-based call that committed it, 0 for the prompt."""
    first = len(prompt) - len(prompt) % size
    denoise_calls = [number for number, call in enumerate(calls, 1) if call == "D"]
    found = {
        first + step.block * size + position: call
        for step, call in zip(made.trace or (), denoise_calls, strict=True)
        for position in step.positions
    }
    return [0] * len(prompt) + [found[position] for position in range(len(prompt), 1 + max(found))]


def sdar(model: Model, reference: Reference) -> Iterator[Compared]:
    """SDAR's forwards and runs with the likeliest token in place of a draw."""
    own = cast(BlockModel, model)
    for entry in reference.entries("forwards"):
        ids_BS, theirs, size = (
            reference.tensor(entry["input_ids"]),
            reference.tensor(entry["logits"]),
            entry["block_length"],
        )
        if entry["name"] != "cached":
            yield logits(entry["name"], raw_logits(own, ids_BS, size), theirs)
            continue
        own.block_size = size
        contexts = [own.prefill(ids_BS[:, :0]), own.prefill(ids_BS[:, :8])]
        contexts.append(own.extend(contexts[1], ids_BS[:, 8:12]))
        pieces = (ids_BS[:, :8], ids_BS[:, 8:12], ids_BS[:, 12:])
        ours = [own.denoise(piece, context) for piece, context in zip(pieces, contexts, strict=True)]
        yield logits(entry["name"], torch.cat(ours, dim=1), theirs)
    for run in reference.entries("runs"):
        yield from _sdar_run(own, run)


def _sdar_run(model: BlockModel, run: Table) -> Iterator[Compared]:
    args, prompt, quirk = run["args"], list(run["prompt"]), quirk_of(run)
    size = model.block_size = args["block_length"]
    decoder = make_decoder(
        as_masked(model),
        "sdar",
        steps=args["denoising_steps"],
        strategy=args["remasking_strategy"],
        threshold=args.get("confidence_threshold", 0.85),
        top_k=1 if run["name"].startswith("top_k_1") else None,
        commit_mask=True,
    )
    length = len(run["final"]) - len(prompt)
    stops = args.get("stopping_criteria_idx", ())
    made = decoder.generate(
        [Prompt(id=run["name"], token_ids=tuple(prompt), trace=True)], max_new_tokens=length, eos_token_ids=stops
    )[0]
    wanted = until(run["final"][len(prompt) :], stops)
    yield tokens(run["name"], made.token_ids, wanted, quirk=quirk)
    calls = calls_of(made, prompt, size)
    # The original reads its last block as well, which nothing uses.
    yield counts(f"{run['name']}: calls", calls + "S", "".join(run["calls"]), quirk=quirk)
    order = commit_calls_of_blocks(made, prompt, size, calls)
    yield counts(f"{run['name']}: order of commits", order, run["commit_step"][: len(order)], quirk=quirk)
