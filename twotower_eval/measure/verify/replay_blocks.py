"""Replays of families that decode block after block behind a cache: SDAR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.families.blocks import BlockModel
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
    until,
)
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


def canvas_of_blocks(made: Generation, given: Sequence[int], size: int, length: int, mask_id: int | None) -> list[int]:
    """What was committed in so many places, also behind an end of text; masks where nothing was."""
    first = len(given) - len(given) % size
    found = dict(enumerate(given)) | {
        first + step.block * size + position: token
        for step in made.trace or ()
        for position, token in zip(step.positions, step.token_ids, strict=True)
    }
    return [found.get(place, mask_id or 0) for place in range(length)]


def sdar(model: Model, reference: Reference) -> Iterator[Compared]:
    """SDAR's forwards and runs with the likeliest token in place of a draw."""
    own = cast(BlockModel, model)
    if "block_size" in reference.meta:
        yield counts("block_size", own.block_size, reference.meta["block_size"])
    for entry in reference.entries("forwards"):
        ids_BS, theirs, size = (
            reference.tensor(entry["input_ids"]),
            reference.tensor(entry["logits"]),
            entry["block_length"],
        )
        if not entry["name"].startswith("cached"):
            yield logits(entry["name"], raw_logits(own, ids_BS, size), theirs)
            continue
        yield logits(entry["name"], _behind_cache(own, ids_BS, size), theirs)
        if f"{entry['name']}_full.logits" in reference.tensors:
            whole = reference.tensor(f"{entry['name']}_full.logits")
            yield logits(f"{entry['name']}_full", raw_logits(own, ids_BS, size), whole)
    for run in reference.entries("runs"):
        yield from _sdar_run(own, run)


def _behind_cache(model: BlockModel, ids_BS: Tensor, size: int) -> Tensor:
    """Logits (B, S, V) from a pass over the first blocks, one over the last but one behind it, and one over the last:
    the cache is exact wherever it is cut."""
    model.block_size = size
    last = (ids_BS.shape[1] - 1) // size * size
    before = max(last - size, 0)
    first = model.prefill(ids_BS[:, :before])
    contexts = (model.prefill(ids_BS[:, :0]), first, model.extend(first, ids_BS[:, before:last]))
    pieces = (ids_BS[:, :before], ids_BS[:, before:last], ids_BS[:, last:])
    both = [(piece, context) for piece, context in zip(pieces, contexts, strict=True) if piece.shape[1]]
    return torch.cat([model.denoise(piece, context) for piece, context in both], dim=1)


def _sdar_run(model: BlockModel, run: Table) -> Iterator[Compared]:
    args, prompt, quirk = run["args"], list(run["prompt"]), quirk_of(run)
    size = model.block_size = args["block_length"]
    decoder = make_decoder(
        as_masked(model),
        "sdar",
        steps=args["denoising_steps"],
        strategy=args["remasking_strategy"],
        threshold=args.get("confidence_threshold", 0.85),
        top_k=args.get("top_k") or (1 if run["name"].startswith("top_k_1") else None),
        commit_mask=True,
    )
    length = len(run["final"]) - len(prompt)
    stops = args.get("stopping_criteria_idx", ())
    made = decoder.generate(
        [Prompt(id=run["name"], token_ids=tuple(prompt), trace=True)], max_new_tokens=length, eos_token_ids=stops
    )[0]
    canvas = canvas_of_blocks(made, prompt, size, len(run["final"]), model.mask_token_id)
    wanted = until(run["final"][len(prompt) :], stops)
    yield tokens(run["name"], [*canvas, *made.token_ids], [*run["final"], *wanted], quirk=quirk)
    calls = calls_of(made, prompt, size)
    # The original reads its last block as well, which nothing uses.
    yield counts(f"{run['name']}: calls", calls + "S", "".join(run["calls"]), quirk=quirk)
    kinds = {"prefill_calls": "P", "denoise_calls": "D", "store_calls": "S", "model_calls": "PDS"}
    found = {kind: sum(call in letters for call in calls + "S") for kind, letters in kinds.items()}
    yield numbers_of_calls(run["name"], found, run["nfe"], quirk=quirk)
    order = commit_calls_of_blocks(made, prompt, size, calls)
    yield counts(f"{run['name']}: order of commits", order, run["commit_step"][: len(order)], quirk=quirk)
