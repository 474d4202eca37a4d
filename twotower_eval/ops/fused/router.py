"""Sigmoid routing in two launches: float64 scores, then the choice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EXPERTS, COLUMNS = 4, 512  # experts of a program, columns that it reads at a time


@triton.jit
def _scores_kernel(
    x_ptr, gate_ptr, out_ptr, num_experts, hidden: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, experts = tl.program_id(0).to(tl.int64), tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    known = experts < num_experts
    total = tl.zeros([EXPERTS, COLUMNS], dtype=tl.float64)
    for start in range(0, hidden, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < hidden
        x = tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float64)
        gate_at = gate_ptr + experts[:, None] * hidden + columns[None, :]
        gate = tl.load(gate_at, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float64)
        total += gate * x[None, :]
    tl.store(out_ptr + row * num_experts + experts, tl.sum(total, axis=1), mask=known)


@triton.jit
def _choose_kernel(
    scores_ptr, bias_ptr, chosen_ptr, weights_ptr, num_experts, scale,
    PER_TOKEN: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, experts = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    known = experts < num_experts
    score = tl.load(scores_ptr + row * num_experts + experts, mask=known, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-score))
    wanted = score + tl.load(bias_ptr + experts, mask=known, other=0.0).to(tl.float64)
    wanted = tl.where(known, wanted, float("-inf"))
    # An expert's place is the number of those that are wanted more; of equals the first comes first.
    more = wanted[None, :] > wanted[:, None]
    equal = (wanted[None, :] == wanted[:, None]) & (experts[None, :] < experts[:, None])
    place = tl.sum((more | equal).to(tl.int32), axis=1)
    total = scale
    if NORMALISE:
        total = scale / (tl.sum(tl.where(place < PER_TOKEN, score, 0.0), axis=0) + 1e-20)
    for slot in tl.static_range(PER_TOKEN):
        here = place == slot
        tl.store(chosen_ptr + row * PER_TOKEN + slot, tl.sum(tl.where(here, experts, 0), axis=0).to(tl.int64))
        weight = tl.sum(tl.where(here, score, 0.0), axis=0) * total
        tl.store(weights_ptr + row * PER_TOKEN + slot, weight.to(tl.float32))


def route(
    x_RH: Tensor, gate_EH: Tensor, bias_E: Tensor, experts_per_token: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`twotower_eval.ops.moe.route`; experts of one group only."""
    (num_rows, hidden), num_experts = x_RH.shape, gate_EH.shape[0]
    x_RH = x_RH.contiguous()
    scores_RE = torch.empty(num_rows, num_experts, dtype=torch.float64, device=x_RH.device)
    chosen_RA = torch.empty(num_rows, experts_per_token, dtype=torch.int64, device=x_RH.device)
    weights_RA = torch.empty(num_rows, experts_per_token, dtype=torch.float32, device=x_RH.device)
    _scores_kernel[(num_rows, triton.cdiv(num_experts, EXPERTS))](
        x_RH, gate_EH, scores_RE, num_experts, hidden=hidden, EXPERTS=EXPERTS, COLUMNS=COLUMNS, num_warps=4
    )
    _choose_kernel[(num_rows,)](
        scores_RE, bias_E, chosen_RA, weights_RA, num_experts, scale,
        PER_TOKEN=experts_per_token, NORMALISE=normalise, BLOCK=triton.next_power_of_2(num_experts), num_warps=8,
    )  # fmt: skip
    return chosen_RA, weights_RA
