"""Replays of folders without a checkpoint, which hold schedules and bounds for given logits: MD4 and absorbing D3PM."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from twotower_eval.engine.models.protocol import Model
from twotower_eval.engine.schedules import Masking, time_grid
from twotower_eval.engine.scorers import discrete
from twotower_eval.measure.verify.replay import Compared, Reference, Table, likelihood

NEAR_ZERO = 1e-3  # times at which one minus a probability close to 1 has lost digits


def md4(model: Model | None, reference: Reference) -> Iterator[Compared]:
    """Schedules, sampling grids, and bounds of every case."""
    eps = reference.meta["eps"]
    for name in reference.meta["schedules"]:
        yield from _schedule(Masking(name, eps), reference)
    for entry in reference.entries("cases"):
        yield from _md4_case(reference, entry)


def _schedule(schedule: Masking, reference: Reference) -> Iterator[Compared]:
    t, name = reference.tensor("schedule.t"), schedule.name
    found = {"alpha": schedule.alpha, "dalpha": schedule.dalpha}
    found |= {"dgamma_times_alpha": schedule.weight, "log_snr": schedule.log_snr}
    far = t > NEAR_ZERO
    for what, compute in found.items():
        ours, theirs = compute(t), reference.tensor(f"schedule.{name}.{what}")
        finite = theirs.isfinite()
        same = bool((ours[~finite] == theirs[~finite]).all())
        yield Compared(kind="count", name=f"{name}: infinite {what}", exact=same)
        yield likelihood(f"{name}: {what}", ours[finite & far], theirs[finite & far])
        near = finite & ~far
        apart = ((ours - theirs).abs() / theirs.abs())[near]
        yield Compared(
            kind="likelihood",
            name=f"{name}: {what} near time 0",
            value=float(apart.nan_to_num().max()) if near.any() else 0.0,
            limit=2e-3,
        )
    for grid in ("uniform", "cosine"):
        theirs = reference.tensor(f"grid.{grid}.{name}")
        s, t = time_grid(len(theirs), cosine=grid == "cosine")
        columns = {"s": s, "t": t, "alpha_s": schedule.alpha(s), "alpha_t": schedule.alpha(t)}
        columns["unmask_prob"] = schedule.unmasked(s, t)
        for index, column in enumerate(reference.meta["grid_columns"]):
            known = ~theirs[:, index].isnan()  # where rounding took time below 0, a root of it is recorded as NaN
            yield likelihood(f"grid {grid} of {name}: {column}", columns[column][known], theirs[known, index])


def _md4_case(reference: Reference, entry: Table) -> Iterator[Compared]:
    meta, case = reference.meta, f"case{entry['case']}"
    schedule, num_steps = Masking(entry["schedule"], meta["eps"]), 0 if entry["cont_time"] else entry["timesteps"]
    name = f"{case}.{entry['schedule']}.{f'T{num_steps}' if num_steps else 'cont'}"
    ids_BL, logits_BLV = reference.tensor(f"{case}.x"), reference.tensor(f"{case}.logits")

    def diffusion(what: str) -> torch.Tensor:
        masked_BL = reference.tensor(f"{what}.zt") == meta["mask_index"]
        t_B = reference.tensor(f"{what}.t_used")
        return discrete.md4_diffusion(logits_BLV, ids_BL, masked_BL, t_B, schedule, num_steps=num_steps)

    t_B = reference.tensor(f"{name}.t_in")
    used_B = discrete.step_ends(t_B, num_steps) if num_steps else t_B
    yield likelihood(f"{name}.t_used", used_B, reference.tensor(f"{name}.t_used"))
    yield likelihood(f"{name}.loss_diff", diffusion(name), reference.tensor(f"{name}.loss_diff"))
    num = ids_BL.shape[1]
    bits = num * math.log(2)
    found = {"loss_diff": float(diffusion(f"{name}.full").mean()) / bits, "loss_prior": 0.0}
    found["loss_recon"] = discrete.md4_reconstruction(num, meta["vocab_size"], schedule) / bits
    found["loss"] = sum(found.values())
    for what, ours in found.items():
        yield likelihood(f"{name}: {what}", ours, entry[what])


def d3pm(model: Model | None, reference: Reference) -> Iterator[Compared]:
    """Schedules, and the terms of every bound with their sums."""
    for num_steps in sorted({entry["T"] for entry in reference.entries("cases")}):
        yield likelihood(f"T{num_steps}.beta", discrete.d3pm_betas(num_steps), reference.tensor(f"T{num_steps}.beta"))
        yield likelihood(
            f"T{num_steps}.state", discrete.d3pm_visible(num_steps), reference.tensor(f"T{num_steps}.state")
        )
    for entry in reference.entries("cases"):
        yield from _d3pm_case(reference, entry)


def _d3pm_case(reference: Reference, entry: Table) -> Iterator[Compared]:
    mask_id, num_steps, num = reference.meta["mask_index"], entry["T"], entry["eval_step_size"]
    case = f"T{num_steps}.case{entry['case']}"
    name = f"{case}.step{num}"
    ids_L, counted_L = reference.tensor(f"{case}.x0"), reference.tensor(f"{case}.target_mask")
    logits_TLV, noisy_NL = reference.tensor(f"{case}.logits_by_timestep"), reference.tensor(f"{name}.x_t_plus_step")
    starts = reference.tensor(f"{name}.t").tolist()
    found = [
        discrete.d3pm_terms(logits_TLV[start + num], ids_L, noisy_L, start, num, num_steps, mask_id)
        for start, noisy_L in zip(starts, noisy_NL, strict=True)
    ]
    divergence_NL, entropy_NL = (torch.stack(list(part)) for part in zip(*found, strict=True))
    yield likelihood(f"{name}.kl_per_position", divergence_NL, reference.tensor(f"{name}.kl_per_position"))
    theirs = reference.tensor(f"{name}.cross_entropy_per_position")
    yield likelihood(f"{name}.cross_entropy_per_position", entropy_NL, theirs)
    is_first_N1 = torch.tensor(starts)[:, None] == 0
    term_N = (torch.where(is_first_N1, entropy_NL, divergence_NL) * counted_L).sum(1)
    yield likelihood(f"{name}.term", term_N, reference.tensor(f"{name}.term"))
    total, bits = float(term_N.double().sum()), math.log(2)
    sums = {"elbo": total, "likelihood": total, "prior": 0.0}
    sums["elbo_in_bits_per_dim"] = total / (bits * int(counted_L.sum()))
    sums["elbo_in_bits_per_dim_all_positions"] = total / (bits * len(ids_L))
    for what, ours in sums.items():
        yield likelihood(f"{name}: {what}", ours, entry[what])
