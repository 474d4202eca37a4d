"""Sigmoid routing in two launches: float64 scores, then the choice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_eval.engine.ops.fused.overlap import let_next_begin, overlapping, wait_for_previous

COLUMNS = 1024  # that a program reads at a time


@triton.jit
def _scores_kernel(
    x_ptr, gate_ptr, out_ptr, num_experts, hidden: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    let_next_begin(OVERLAP)
    row, expert = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros([COLUMNS], dtype=tl.float64)
    wait_for_previous(OVERLAP)
    for start in tl.static_range(0, hidden, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < hidden
        gate = tl.load(gate_ptr + expert * hidden + columns, mask=inside, other=0.0).to(tl.float64)
        total += gate * tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float64)
    tl.store(out_ptr + row * num_experts + expert, tl.sum(total, axis=0))


@triton.jit
def _choose_kernel(
    scores_ptr, bias_ptr, chosen_ptr, weights_ptr, num_experts, scale,
    PER_TOKEN: tl.constexpr, SLOTS: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    row, experts = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    known = experts < num_experts
    score = tl.load(scores_ptr + row * num_experts + experts, mask=known, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-score))
    wanted = score + tl.load(bias_ptr + experts, mask=known, other=0.0).to(tl.float64)
    wanted = tl.where(known, wanted, float("-inf"))
    slots = tl.arange(0, SLOTS)
    chosen, weights = tl.zeros([SLOTS], dtype=tl.int64), tl.zeros([SLOTS], dtype=tl.float64)
    for slot in tl.static_range(PER_TOKEN):
        # Of equals the first; numbers that are none (NaN) must not lead out of the table.
        best = tl.min(tl.where(wanted == tl.max(wanted, axis=0), experts, num_experts - 1), axis=0)
        chosen = tl.where(slots == slot, best.to(tl.int64), chosen)
        weights = tl.where(slots == slot, tl.sum(tl.where(experts == best, score, 0.0), axis=0), weights)
        wanted = tl.where(experts == best, float("-inf"), wanted)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    at = row * PER_TOKEN + slots
    tl.store(chosen_ptr + at, chosen, mask=slots < PER_TOKEN)
    tl.store(weights_ptr + at, (weights * scale).to(tl.float32), mask=slots < PER_TOKEN)


def route(
    x_RH: Tensor, gate_EH: Tensor, bias_E: Tensor, experts_per_token: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`twotower_eval.engine.ops.moe.route`; experts of one group only."""
    (num_rows, hidden), num_experts = x_RH.shape, gate_EH.shape[0]
    x_RH, gate_EH = x_RH.contiguous(), gate_EH.contiguous()
    scores_RE = torch.empty(num_rows, num_experts, dtype=torch.float64, device=x_RH.device)
    chosen_RA = torch.empty(num_rows, experts_per_token, dtype=torch.int64, device=x_RH.device)
    weights_RA = torch.empty(num_rows, experts_per_token, dtype=torch.float32, device=x_RH.device)
    overlap = overlapping(x_RH.device)
    _scores_kernel[(num_rows, num_experts)](
        x_RH, gate_EH, scores_RE, num_experts, hidden=hidden, COLUMNS=COLUMNS, num_warps=4, **overlap
    )
    _choose_kernel[(num_rows,)](
        scores_RE, bias_E, chosen_RA, weights_RA, num_experts, scale,
        PER_TOKEN=experts_per_token, SLOTS=triton.next_power_of_2(experts_per_token), NORMALISE=normalise,
        BLOCK=triton.next_power_of_2(num_experts), num_warps=1, **overlap,
    )  # fmt: skip
    return chosen_RA, weights_RA
