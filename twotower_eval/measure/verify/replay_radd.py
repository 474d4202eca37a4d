"""Replay of RADD: forwards, runs of all its samplers with recorded draws, and its bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from twotower_eval.engine.decoders.radd import rates
from twotower_eval.engine.families.radd import RADD
from twotower_eval.engine.models.protocol import Model, as_masked
from twotower_eval.engine.schedules import LogLinear
from twotower_eval.engine.scorers import bounds
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.replay import (
    Compared,
    Reference,
    Stream,
    Table,
    counts,
    likelihood,
    logits,
    quirk_of,
    tokens,
)
from twotower_eval.measure.verify.replay_dit import numbered, played
from twotower_eval.records import Generation


def radd(model: Model, reference: Reference) -> Iterator[Compared]:
    """All that the folder holds."""
    own = cast(RADD, model)
    for name in numbered(reference, "fwd"):
        ids_BS = reference.tensor(f"{name}.input_ids")
        ours = _logits(own, ids_BS)
        yield logits(f"{name}.logits", ours, reference.tensor(f"{name}.logits"))
        if f"{name}.log_condition" in reference.tensors:
            ours = bounds.unmasked_logprobs(ours, own.mask_token_id)
            yield logits(f"{name}.log_condition", ours, reference.tensor(f"{name}.log_condition"))
    if "noise.t" in reference.tensors:
        t = reference.tensor("noise.t")
        yield likelihood("noise.total", LogLinear().sigma(t), reference.tensor("noise.total"))
        yield likelihood("noise.rate", LogLinear().rate(t), reference.tensor("noise.rate"))
    for run in reference.entries("sampler_runs", "runs"):
        yield from _run(own, reference, run)
    for entry in reference.entries("bounds"):
        yield from _bound(own, reference, entry)


def _logits(model: RADD, ids_BS: Tensor) -> Tensor:
    return model.canvas_logits(ids_BS, [ids_BS.shape[1]] * len(ids_BS))


def _run(model: RADD, reference: Reference, run: Table) -> Iterator[Compared]:
    name, method, quirk = run["name"], run["method"], quirk_of(run)
    final_BS = reference.tensor(f"sample.{name}.final")
    draws = [reference.tensor(f"sample.{name}.draw{index:03d}") for index in range(len(run["draw_kinds"]))]
    known = reference.tensors.get(f"sample.{name}.prompt", torch.zeros(0, dtype=torch.int64)).flatten().tolist()
    params: dict[str, object] = {"method": method, "commit_mask": True, "all_steps": True}
    params["half"] = run.get("probability_buffer_dtype") == "float16"
    if run["strategy"] != "direct":
        params[run["strategy"]] = run["strategy_para"]
    if method == "ordered":
        order = reference.tensor(f"sample.{name}.order")
        draws = [order.argsort() / len(order), *draws]  # numbers that are in this order
    else:
        params |= {"steps": run["steps"], "eps": run["eps"]}
        theirs = reference.tensor(f"sample.{name}.update_rate")
        yield likelihood(f"{name}: rates", rates(run["steps"], run["eps"], euler=method == "euler"), theirs)
    noise = Stream(draws)
    made, seen = played(as_masked(model), "radd", params, [known] * run["batch"], run["length"] - len(known), noise)
    for index, (one, theirs) in enumerate(zip(made, final_BS, strict=True)):
        yield tokens(f"{name}/{index}", [*known, *one.token_ids], theirs.tolist(), quirk=quirk)
    found = {
        "model_calls": len(seen),
        "rows_per_call": [len(ids_BS) for ids_BS in seen],
        "rows_evaluated": sum(one.num_denoiser_forwards for one in made),
        "mask_tokens_in_final": sum(one.token_ids.count(model.mask_token_id) for one in made),
        "update_cnt": _updates(made, run),
    }
    for what, ours in found.items():
        yield counts(f"{name}: {what}", ours, run[what], quirk=quirk)
    wanted = sorted(key for key in reference.tensors if key.startswith(f"sample.{name}.eval_input"))
    inputs = [reference.tensor(key).tolist() for key in wanted]
    yield counts(f"{name}: order of commits", [ids_BS.tolist() for ids_BS in seen], inputs, quirk=quirk)
    yield counts(f"{name}: draws left over", noise.left, 0, quirk=quirk)


def _updates(made: Sequence[Generation], run: Table) -> int | None:
    """What the original counts: rows that have changed, rows that were read, or nothing."""
    if run["method"] == "ordered":
        return None
    if run["strategy"] == "direct":
        return sum(bool(step.positions) for one in made for step in one.trace or ())
    return sum(one.num_denoiser_forwards for one in made)


def _bound(model: RADD, reference: Reference, entry: Table) -> Iterator[Compared]:
    kind, ids_BL = entry["loss_type"], reference.tensor("bound.input_ids")
    name, mask_id, (num_rows, length) = f"bound.{kind}", model.mask_token_id, ids_BL.shape

    def logprobs(noisy_BL: Tensor) -> Tensor:
        return bounds.unmasked_logprobs(_logits(model, noisy_BL), mask_id)

    if kind in ("ar_forward", "ar_backward"):
        order = range(length) if kind == "ar_forward" else range(length - 1, -1, -1)
        loss_B = -bounds.in_order(logprobs, ids_BL, order, mask_id)
    else:
        draws = [reference.tensor(f"{name}.draw{index}") for index in range(len(entry["draw_kinds"]))]
        noised = bounds.radd_noised(draws[0], num_rows) if kind in ("t_DCE", "t_DSE") else None
        if kind == "lambda_DCE":
            chance_B = (draws[0] + torch.arange(num_rows)) / num_rows
            masked_BL = draws[1] < chance_B[:, None]
        elif noised is not None:
            masked_BL = draws[1] < noised.masked[:, None]
        elif kind == "k_DCE":
            masked_BL = torch.stack(draws[1:]) < draws[0][:, None]
        else:
            raise UserError(f"golden.json: the bound {kind!r} is not known")
        noisy_BL = torch.where(masked_BL, mask_id, ids_BL)
        yield counts(f"{name}.xt", noisy_BL.tolist(), reference.tensor(f"{name}.xt").tolist())
        logprob_BLV = logprobs(noisy_BL)
        own_BL = logprob_BLV.gather(-1, ids_BL[..., None])[..., 0]
        if kind == "lambda_DCE":
            loss_B = bounds.lambda_bound(own_BL, masked_BL, chance_B)
        elif noised is None:
            loss_B = bounds.count_bound(own_BL, masked_BL)
        elif kind == "t_DCE":
            loss_B = bounds.cross_entropy_bound(own_BL, masked_BL, noised, as_published=True)
        else:
            loss_B = bounds.score_entropy_bound(logprob_BLV, ids_BL, masked_BL, noised)
    yield likelihood(f"{name}.loss_per_sequence", loss_B, reference.tensor(f"{name}.loss_per_sequence"))
    mean = float(loss_B.double().mean())
    yield likelihood(f"{name}: mean", mean, entry["mean_loss"])
    yield likelihood(f"{name}: ppl", mean / length, float(torch.tensor(entry["ppl"], dtype=torch.float64).log()))
