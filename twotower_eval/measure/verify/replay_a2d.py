"""Replay of A2D-Qwen3, whose one checkpoint runs under two masks: as ``a2d_mdlm`` and as ``a2d_bd3lm``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

import torch

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.families.a2d import A2DBlocks, A2DCanvas
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.measure.verify.replay import (
    Compared,
    Reference,
    Table,
    commit_calls,
    counts,
    logits,
    numbers_of_calls,
    quirk_of,
    tokens,
)
from twotower_eval.measure.verify.replay_blocks import calls_of, canvas_of_blocks, commit_calls_of_blocks, raw_logits
from twotower_eval.records import Prompt

ModelT = TypeVar("ModelT", A2DCanvas, A2DBlocks)


def a2d(model: Model, reference: Reference) -> Iterator[Compared]:
    """Forwards and runs of both forms, whichever of them was loaded."""
    given = cast("A2DCanvas | A2DBlocks", model)
    canvas, blocks = _as(A2DCanvas, given), _as(A2DBlocks, given)
    for entry in reference.entries("forwards"):
        yield _forward(canvas, blocks, reference, entry)
    for run in reference.entries("runs"):
        if run["name"].startswith("mdlm"):
            yield from _canvas_run(canvas, run)
        else:
            yield from _block_run(blocks, reference, run)


def _as(kind: type[ModelT], given: A2DCanvas | A2DBlocks) -> ModelT:
    """The same network as the other form."""
    made = kind(given.backbone)
    for name in ("checkpoint", "vocab_size", "max_length", "mask_token_id", "eos_token_ids", "tokenizer"):
        setattr(made, name, getattr(given, name))
    return made


def _forward(canvas: A2DCanvas, blocks: A2DBlocks, reference: Reference, entry: Table) -> Compared:
    ids_BS, theirs = reference.tensor(entry["input_ids"]), reference.tensor(entry["logits"])
    length, size = ids_BS.shape[1], reference.meta["block_size"]
    if "position_ids" in entry:  # pads on the left, which fill up the first block
        real_BS = ids_BS != reference.meta["pad_id"]
        blocks.block_size = size
        rows = [row[real].tolist() for row, real in zip(ids_BS, real_BS, strict=True)]
        context = blocks.prefill(torch.zeros(len(rows), 0, dtype=torch.int64), [0] * len(rows))
        ours = []
        for index, row in enumerate(rows):
            alone = context.select([index])
            alone = type(alone)(alone.past, alone.block_BT, alone.last_BV, (0,), (length - len(row),))
            ours.append(blocks.denoise(torch.tensor([row]), alone)[0])
        return logits(entry["name"], torch.cat(ours), theirs[real_BS])
    if "attention_mask" in entry:
        real_BS = reference.tensor(entry["attention_mask"]).bool()
        found = canvas.canvas_logits(ids_BS, real_BS.sum(1).tolist())
        return logits(entry["name"], found[real_BS], theirs[real_BS])
    if entry["name"].endswith("_bd"):
        return logits(entry["name"], raw_logits(blocks, ids_BS, size), theirs)
    return logits(entry["name"], canvas.canvas_logits(ids_BS, [length] * len(ids_BS)), theirs)


def _canvas_run(model: A2DCanvas, run: Table) -> Iterator[Compared]:
    args, quirk = run["args"], quirk_of(run)
    prompts = run["prompt"] if isinstance(run["prompt"][0], list) else [run["prompt"]]
    finals = run["final"] if isinstance(run["final"][0], list) else [run["final"]]
    model.shift = int(args.get("right_shift_logits", False))
    decoder = make_decoder(
        as_masked(model),
        "low_confidence",
        block_length=args["block_size"],
        steps=args["steps"],
        quotas="scheduled",
        commit_mask=True,
    )
    length = args["max_new_tokens"]
    asked = [Prompt(id=f"{run['name']}/{i}", token_ids=row, trace=True) for i, row in enumerate(prompts)]
    made = decoder.generate(asked, max_new_tokens=length)
    wanted = [final[len(row) : len(row) + length] for row, final in zip(prompts, finals, strict=True)]
    both = zip([one.token_ids for one in made], wanted, strict=True)
    for index, (found, theirs) in enumerate(both):
        yield tokens(f"{run['name']}/{index}", found, theirs, quirk=quirk)
    known = [final[: len(row)] for row, final in zip(prompts, finals, strict=True)]
    yield counts(f"{run['name']}: prompts", [list(row) for row in prompts], known, quirk=quirk)
    calls = max(one.num_denoiser_forwards for one in made)
    yield counts(f"{run['name']}: calls", "F" * calls, "".join(run["calls"]), quirk=quirk)
    yield numbers_of_calls(run["name"], {"model_calls": calls, "F": calls}, run["nfe"], quirk=quirk)
    if run["commit_step"] is not None:
        order = [0] * len(prompts[0]) + commit_calls(made[0], length)
        yield counts(f"{run['name']}: order of commits", order, run["commit_step"], quirk=quirk)


def _block_run(model: A2DBlocks, reference: Reference, run: Table) -> Iterator[Compared]:
    args, quirk, prompt = run["args"], quirk_of(run), list(run["prompt"])
    size, length = args["block_size"], args["max_new_tokens"]
    model.block_size, model.shift = size, int(args.get("right_shift_logits", False))
    steps = args.get("steps_per_block") or -(-args["steps"] // -(-length // size))
    decoder = make_decoder(
        as_masked(model), "sdar", steps=steps, quotas="scheduled", strategy="low_confidence_static", commit_mask=True
    )
    asked = [Prompt(id=run["name"], token_ids=tuple(prompt), trace=True)]
    made = decoder.generate(asked, max_new_tokens=length, eos_token_ids=[args["eos"]])[0]
    num_pads = -len(prompt) % size
    final = run["final"][num_pads + len(prompt) :]
    wanted = final[: final.index(args["eos"])] if args["eos"] in final else final
    given = [reference.meta["pad_id"]] * num_pads + prompt
    canvas = canvas_of_blocks(made, given, size, len(run["final"]), model.mask_token_id)
    yield tokens(run["name"], [*canvas, *made.token_ids], [*run["final"], *wanted], quirk=quirk)
    # The original reads everything so far anew before every block; here a finished block is read behind the rest.
    calls = "P" + calls_of(made, [], size)
    calls = calls.replace("S", "P")
    yield counts(f"{run['name']}: calls", calls, run["calls"], quirk=quirk)
    found = {"model_calls": len(calls), "P": calls.count("P"), "D": calls.count("D")}
    yield numbers_of_calls(run["name"], found, run["nfe"], quirk=quirk)
    order = [0] * num_pads + commit_calls_of_blocks(made, [0] * (num_pads + len(prompt)), size, calls)[num_pads:]
    yield counts(f"{run['name']}: order of commits", order, run["commit_step"][: len(order)], quirk=quirk)
