"""Mixture of experts with sigmoid routing and correction bias. Shape letters: see ops/__init__."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

GATHER_MAX_ROWS = 4  # up to this many rows, gathering weights beats waiting for the device to say who chose what


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How many experts a token takes, from which groups, and how their weights are scaled."""

    experts_per_token: int
    num_groups: int
    top_groups: int
    normalise: bool
    scale: float


def route(x_RH: Tensor, gate_EH: Tensor, bias_E: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Chosen experts (R, A) and their float32 weights (R, A), in float64 as the reference computes them.

    Choice uses the bias-corrected scores; weights are the uncorrected ones. Experts of dropped groups keep a choice
    score of 0.0 (the reference's habit, not -inf), so a negative bias can let one of them through.
    """
    scores_RE = torch.sigmoid(x_RH.double() @ gate_EH.double().T)
    choice_RE = scores_RE + bias_E.double()
    if routing.num_groups > 1:
        grouped_RGE = choice_RE.unflatten(-1, (routing.num_groups, -1))
        group_scores_RG = grouped_RGE.topk(min(2, grouped_RGE.shape[-1]), dim=-1).values.sum(-1)
        kept_RG = torch.zeros_like(group_scores_RG, dtype=torch.bool)
        kept_RG.scatter_(1, group_scores_RG.topk(routing.top_groups, dim=-1).indices, True)
        choice_RE = grouped_RGE.masked_fill(~kept_RG[..., None], 0.0).flatten(-2)
    chosen_RA = choice_RE.topk(routing.experts_per_token, dim=-1).indices
    weights_RA = scores_RE.gather(1, chosen_RA)
    if routing.normalise:
        weights_RA = weights_RA / (weights_RA.sum(-1, keepdim=True) + 1e-20)
    return chosen_RA, (weights_RA * routing.scale).float()


def mlp(x: Tensor, up_IH: Tensor, down_HI: Tensor) -> Tensor:
    """``down(relu(up x)^2)``, no biases."""
    inner = functional.linear(x, up_IH).relu_()
    return functional.linear(inner * inner, down_HI)


def experts(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Weighted sum of the chosen experts, (R, H) in ``x_RH.dtype``; accumulated in float32."""
    if x_RH.device.type == "cpu":
        # Copying weights costs more than anything here: 68 us at one row, against 19 in turn and 35 sorted.
        trained = x_RH.requires_grad or up_EIH.requires_grad
        path = _experts_in_turn if x_RH.shape[0] == 1 and not trained else _experts_sorted
        return path(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)
    if x_RH.shape[0] <= GATHER_MAX_ROWS:
        return _experts_gathered(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)
    return _experts_sorted(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)


def experts_reference(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    out_RH = torch.zeros_like(x_RH, dtype=torch.float32)
    for row in range(x_RH.shape[0]):
        for slot in range(chosen_RA.shape[1]):
            expert = int(chosen_RA[row, slot])
            out_RH[row] += weights_RA[row, slot] * mlp(x_RH[row], up_EIH[expert], down_EHI[expert]).float()
    return out_RH.to(x_RH.dtype)


def _experts_in_turn(x_1H: Tensor, chosen_1A: Tensor, weights_1A: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """One row: its experts one after the other, each added with its weight by the product itself."""
    out_1H = torch.zeros_like(x_1H, dtype=torch.float32)
    for expert, weight in zip(chosen_1A[0].tolist(), weights_1A[0].tolist(), strict=True):
        inner_1I = torch.mm(x_1H, up_EIH[expert].t()).relu_()
        inner_1I = inner_1I.mul_(inner_1I)
        if x_1H.dtype == torch.float32:
            out_1H = out_1H.addmm_(inner_1I, down_EHI[expert].t(), alpha=weight)
        else:  # an expert's output is rounded before it is weighted
            out_1H = out_1H.add_(torch.mm(inner_1I, down_EHI[expert].t()), alpha=weight)
    return out_1H.to(x_1H.dtype)


def _experts_gathered(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Few rows: fetch each row's experts and multiply as one batch."""
    inner_RAI = (up_EIH[chosen_RA] @ x_RH[:, None, :, None])[..., 0]
    out_RAH = (down_EHI[chosen_RA] @ functional.relu(inner_RAI).square()[..., None])[..., 0]
    return (out_RAH.float() * weights_RA[..., None]).sum(1).to(x_RH.dtype)


def _experts_sorted(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Many rows: sort the (row, expert) pairs by expert, one dense product for each expert in use."""
    per_token = chosen_RA.shape[1]
    flat = chosen_RA.flatten()
    order = flat.argsort(stable=True)
    rows = order // per_token
    counts = torch.bincount(flat, minlength=up_EIH.shape[0]).tolist()
    pieces = x_RH.index_select(0, rows).split(counts)
    outputs = [mlp(piece, up_EIH[expert], down_EHI[expert]) for expert, piece in enumerate(pieces) if counts[expert]]
    weighted = torch.cat(outputs).float() * weights_RA.flatten().index_select(0, order)[:, None]
    out_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
    return out_RH.index_add_(0, rows, weighted).to(x_RH.dtype)
