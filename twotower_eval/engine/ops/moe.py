"""Mixture of experts with sigmoid routing and correction bias. Shape letters: see ops/__init__."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from twotower_eval.engine.ops import kernels, product

GATHER_MAX_ROWS = 4  # up to this many rows, gathering weights beats reading all experts
PADDED_MAX_ROWS = 64  # up to this many rows, reading all experts beats waiting for the device's routing
# On a CPU: experts so small (numbers of one direction) that a call for each of them costs more than reading them all.
SMALL_EXPERTS, SMALL_MAX_ROWS = 1 << 17, 16
# Of the fused kernels: rows of the router, each of which reads the gate again, and pairs of a row and an expert.
KERNEL_ROWS, KERNEL_PAIRS = 256, 1024


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How many experts a token takes, from which groups, and how their weights are scaled."""

    experts_per_token: int
    num_groups: int
    top_groups: int
    normalise: bool
    scale: float


def route(x_RH: Tensor, gate_EH: Tensor, bias_E: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Chosen experts (R, A) and their float32 weights (R, A), computed in float64 as in the reference.

    Choice uses the bias-corrected scores; weights are the uncorrected ones. Experts of dropped groups keep a choice
    score of 0.0 (the reference's habit, not -inf), so a negative bias can let one of them through.
    """
    few = x_RH.shape[0] <= KERNEL_ROWS and routing.num_groups == 1
    if few and kernels.may_serve(x_RH, gate_EH):
        kernel = ROUTER.on(x_RH.device, x_RH.dtype)
        if kernel is not None:
            fused: tuple[Tensor, Tensor] = kernel(
                x_RH, gate_EH, bias_E, routing.experts_per_token, routing.normalise, routing.scale
            )
            return fused
    return route_plainly(x_RH, gate_EH, bias_E, routing)


def route_plainly(x_RH: Tensor, gate_EH: Tensor, bias_E: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """:func:`route` by torch's own operations."""
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
    inner = product.linear(x, up_IH).relu_()
    return product.linear(inner * inner if inner.requires_grad else inner.mul_(inner), down_HI)


def experts(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Weighted sum of the chosen experts, (R, H) in ``x_RH.dtype``; accumulated in float32."""
    if x_RH.device.type == "cpu":
        if x_RH.shape[0] <= SMALL_MAX_ROWS and up_EIH.numel() <= SMALL_EXPERTS:
            return experts_padded(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)
        # Copying weights costs more than anything here.
        if kernels.without_gradients(x_RH, up_EIH, down_EHI):
            return _experts_in_place(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)
        return _experts_sorted(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)
    grouped_product = GROUPED_PRODUCT.on(x_RH.device, x_RH.dtype)
    if grouped_product is not None and _aligned(up_EIH) and kernels.without_gradients(x_RH, up_EIH):
        return experts_grouped(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI, grouped_product)
    if x_RH.shape[0] <= GATHER_MAX_ROWS:
        return _experts_gathered(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)
    # A capture must not wait for the device either.
    if x_RH.shape[0] <= PADDED_MAX_ROWS or torch.cuda.is_current_stream_capturing():
        return experts_padded(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)
    return _experts_sorted(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)


def experts_and_shared(
    x_RH: Tensor,
    chosen_RA: Tensor,
    weights_RA: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    shared_IH: Tensor,
    shared_HI: Tensor,
) -> Tensor:
    """:func:`experts` plus the shared expert, which is neither scaled nor gated."""
    tensors = (weights_RA, up_EIH, down_EHI, shared_IH, shared_HI)
    if chosen_RA.numel() <= KERNEL_PAIRS and kernels.may_serve(x_RH, *tensors):
        kernel = FUSED_EXPERTS.on(x_RH.device, x_RH.dtype)
        if kernel is not None:
            fused: Tensor = kernel(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI, shared_IH, shared_HI)
            return fused
    return experts(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI) + mlp(x_RH, shared_IH, shared_HI)


class Joined(NamedTuple):
    """Small experts and the shared one as one MLP, M wide: the experts side by side, then the shared one."""

    up_MH: Tensor
    down_MH: Tensor
    num_experts: int
    width: int


def join(up_EIH: Tensor, down_EHI: Tensor, shared_IH: Tensor, shared_HI: Tensor) -> Joined:
    """Copies of the weights, one tensor for each direction."""
    up_MH = torch.cat([up_EIH.flatten(0, 1), shared_IH])
    down_MH = torch.cat([down_EHI.transpose(1, 2).flatten(0, 1), shared_HI.t()])
    return Joined(up_MH, down_MH, *up_EIH.shape[:2])


def serves_joined(x_RH: Tensor, *weights: Tensor) -> bool:
    """Whether these are few rows of small experts on a CPU, all of which cost less than a call for each that was
    chosen."""
    few = x_RH.shape[0] <= SMALL_MAX_ROWS and weights[0].numel() <= SMALL_EXPERTS
    return few and x_RH.is_cpu and x_RH.dtype == torch.float32 and kernels.without_gradients(x_RH, *weights)


def experts_joined(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, joined: Joined) -> Tensor:
    """:func:`experts_and_shared` with one product in each direction; experts that were not chosen have weight 0."""
    weights_RE1 = weights_RA.new_zeros(len(x_RH), joined.num_experts, 1).scatter_(
        1, chosen_RA[..., None], weights_RA[..., None]
    )
    inner_RM = torch.mm(x_RH, joined.up_MH.t()).relu_()
    inner_RM.mul_(inner_RM)
    inner_RM[:, : joined.num_experts * joined.width].unflatten(1, (-1, joined.width)).mul_(weights_RE1)
    return torch.mm(inner_RM, joined.down_MH)


def _aligned(up_EIH: Tensor) -> bool:
    """Whether rows of both directions begin at multiples of 16 bytes, as torch's grouped product wants them."""
    return all(size * up_EIH.element_size() % 16 == 0 for size in up_EIH.shape[1:])


def experts_reference(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    out_RH = torch.zeros_like(x_RH, dtype=torch.float32)
    for row in range(x_RH.shape[0]):
        for slot in range(chosen_RA.shape[1]):
            expert = int(chosen_RA[row, slot])
            out_RH[row] += weights_RA[row, slot] * mlp(x_RH[row], up_EIH[expert], down_EHI[expert]).float()
    return out_RH.to(x_RH.dtype)


def route_row(x: Tensor, gate_EH: Tensor, biases: Sequence[float], routing: Routing) -> list[tuple[int, float]]:
    """:func:`route` for one row on the host: experts, most wanted first, and their weights."""
    scores = torch.mv(gate_EH, x.view(-1).double()).sigmoid_().tolist()
    choice = [score + bias for score, bias in zip(scores, biases, strict=True)]
    chosen = sorted(range(len(choice)), key=choice.__getitem__, reverse=True)[: routing.experts_per_token]
    scale = routing.scale / (sum(scores[expert] for expert in chosen) + 1e-20) if routing.normalise else routing.scale
    return [(expert, scores[expert] * scale) for expert in chosen]


def experts_of_row(
    x: Tensor,
    chosen: Sequence[tuple[int, float]],
    up_EIH: Tensor,
    down_EHI: Tensor,
    shared_IH: Tensor,
    shared_HI: Tensor,
) -> Tensor:
    """One row: the shared expert, then the chosen ones, each added with its weight by the product itself.

    Only for weights that :func:`product.reads_halves` accepts.
    """
    columns, (num_experts, width, hidden) = product.as_columns(x), up_EIH.shape
    inner = torch.bmm(product.in_halves(shared_IH), columns).relu_()
    out = torch.bmm(product.in_halves(shared_HI), product.as_columns(inner.mul_(inner)))
    ups, downs = up_EIH.view(2 * num_experts, -1, hidden), down_EHI.view(2 * num_experts, -1, width)
    for expert, weight in chosen:
        inner = torch.bmm(ups.narrow(0, 2 * expert, 2), columns).relu_()
        out.baddbmm_(downs.narrow(0, 2 * expert, 2), product.as_columns(inner.mul_(inner)), alpha=weight)
    return out.view(x.shape)


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


def _experts_in_place(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """:func:`_experts_sorted` in fewer calls: products write into one tensor each way, and what is between them is
    done for all experts at once. Without gradients."""
    order = chosen_RA.flatten().argsort(stable=True)
    rows_M = order.div(chosen_RA.shape[1], rounding_mode="floor")
    counts = torch.bincount(chosen_RA.flatten(), minlength=up_EIH.shape[0]).tolist()
    used = [expert for expert, count in enumerate(counts) if count]
    x_MH, inner_MI = x_RH.index_select(0, rows_M), x_RH.new_empty(len(rows_M), up_EIH.shape[1])
    pieces, inner = x_MH.split(counts), inner_MI.split(counts)
    ups_HI, downs_IH = up_EIH.transpose(1, 2).unbind(0), down_EHI.transpose(1, 2).unbind(0)
    for expert in used:
        torch.mm(pieces[expert], ups_HI[expert], out=inner[expert])
    inner_MI.relu_().mul_(inner_MI)
    for expert in used:  # the input is no longer needed: its memory takes the output
        torch.mm(inner[expert], downs_IH[expert], out=pieces[expert])
    weighted_MH = x_MH.float().mul_(weights_RA.flatten().index_select(0, order)[:, None])
    out_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
    return out_RH.index_add_(0, rows_M, weighted_MH).to(x_RH.dtype)


def experts_grouped(
    x_RH: Tensor,
    chosen_RA: Tensor,
    weights_RA: Tensor,
    up_EIH: Tensor,
    down_EHI: Tensor,
    product: Callable[..., Tensor],
) -> Tensor:
    """Pairs sorted by expert, all experts in one grouped product each way: no copy of weights, no wait for the device.

    ``product`` is torch's grouped matrix product: rows (M, K), groups (E, K, N) and the end of each group (E,).
    """
    order, ends_E = _sorted_pairs(chosen_RA, up_EIH.shape[0])
    x_MH = x_RH.index_select(0, order // chosen_RA.shape[1])
    inner_MI = product(x_MH, up_EIH.transpose(1, 2), offs=ends_E).relu()
    out_MH = product(inner_MI * inner_MI, down_EHI.transpose(1, 2), offs=ends_E)
    # Back in the order of the tokens, so that sums run in one order however the pairs were sorted.
    out_RAH = torch.empty_like(out_MH).index_copy_(0, order, out_MH).view(*chosen_RA.shape, -1)
    return (out_RAH.float() * weights_RA[..., None]).sum(1).to(x_RH.dtype)


def experts_padded(x_RH: Tensor, chosen_RA: Tensor, weights_RA: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """R slots for every expert, most of them empty: two batched products over all experts, no wait for the device."""
    num_rows, num_experts = x_RH.shape[0], up_EIH.shape[0]
    # A token takes an expert at most once, so that its row is its slot.
    slots_RA = chosen_RA * num_rows + torch.arange(num_rows, device=x_RH.device)[:, None]
    x_SH = x_RH.new_zeros(num_experts * num_rows, x_RH.shape[1])
    x_SH.index_copy_(0, slots_RA.flatten(), x_RH.repeat_interleave(chosen_RA.shape[1], dim=0))
    inner_ERI = torch.bmm(x_SH.view(num_experts, num_rows, -1), up_EIH.transpose(1, 2)).relu()
    out_ERH = torch.bmm(inner_ERI * inner_ERI, down_EHI.transpose(1, 2))
    out_RAH = out_ERH.flatten(0, 1).index_select(0, slots_RA.flatten()).view(*chosen_RA.shape, -1)
    return (out_RAH.float() * weights_RA[..., None]).sum(1).to(x_RH.dtype)


def _sorted_pairs(chosen_RA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The (row, expert) pairs in the order of their experts, and where each expert's pairs end, int32."""
    experts_M, order = chosen_RA.flatten().sort(stable=True)
    bounds_E = torch.arange(num_experts, device=chosen_RA.device, dtype=experts_M.dtype)
    return order, torch.searchsorted(experts_M, bounds_E, right=True).to(torch.int32)


def _load_grouped_product() -> Callable[..., Tensor]:
    product: Callable[..., Tensor] | None = getattr(functional, "grouped_mm", getattr(torch, "_grouped_mm", None))
    if product is None:
        raise ImportError("this torch has no grouped matrix product")
    return product


def _grouped_pairs(
    product: Callable[..., Tensor], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """One row, a block and a prompt, most experts left out in the first two. Widths as kernels want them aligned."""
    found = []
    for num_rows, num_experts in ((1, 32), (16, 64), (200, 32)):
        x_RH = kernels.seeded((num_rows, 64), device, precision, seed=num_rows)
        up_EIH = kernels.seeded((num_experts, 96, 64), device, precision, seed=1) / 8
        down_EHI = kernels.seeded((num_experts, 64, 96), device, precision, seed=2) / 8
        scores_RE = kernels.seeded((num_rows, num_experts), device, torch.float32, seed=3)
        weights_RA, chosen_RA = scores_RE.softmax(-1).topk(4, dim=-1)
        with kernels.no_waiting(device):  # in some precisions torch asks the device where the groups end
            ours = experts_grouped(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI, product)
        found.append((ours, _experts_gathered(x_RH, chosen_RA, weights_RA, up_EIH, down_EHI)))
    return found


GROUPED_PRODUCT = kernels.register(
    kernels.Kernel(name="torch grouped_mm", load=_load_grouped_product, pairs=_grouped_pairs)
)


def _load_router() -> Callable[..., tuple[Tensor, Tensor]]:
    from twotower_eval.engine.ops.fused import experts

    return experts.route


def _router_pairs(
    kernel: Callable[..., tuple[Tensor, Tensor]], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """Which experts, and their weights, with and without normalising; a number that is no power of two."""
    found: list[tuple[Tensor, Tensor]] = []
    x_RH = kernels.seeded((9, 200), device, precision, seed=0)
    gate_EH = kernels.seeded((24, 200), device, torch.float32, seed=1) / 8
    bias_E = kernels.seeded((24,), device, torch.float32, seed=2) / 8
    for normalise in (True, False):
        routing = Routing(experts_per_token=6, num_groups=1, top_groups=1, normalise=normalise, scale=2.5)
        ours = kernel(x_RH, gate_EH, bias_E, 6, normalise, 2.5)
        found += zip(ours, route_plainly(x_RH, gate_EH, bias_E, routing), strict=True)
    return found


def _load_fused_experts() -> Callable[..., Tensor]:
    from twotower_eval.engine.ops.fused import experts

    return experts.experts


def _fused_expert_pairs(
    kernel: Callable[..., Tensor], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """One row, rows of which some share experts, and more rows than a tile; sizes that no tile divides."""
    found = []
    shapes = ((24, 72, 200), (24, 200, 72), (136, 200), (200, 136))
    weights = [kernels.seeded(shape, device, precision, seed) / 8 for seed, shape in enumerate(shapes)]
    for num_rows in (1, 7, 16, 40, 150):
        x_RH = kernels.seeded((num_rows, 200), device, precision, seed=num_rows)
        scores_RE = kernels.seeded((num_rows, 24), device, torch.float32, seed=4)
        scores_RE[num_rows // 2 :, 3] += 10  # more rows of one expert than a tile has
        weights_RA, chosen_RA = scores_RE.softmax(-1).topk(6, dim=-1)
        routed_RH = _experts_gathered(x_RH, chosen_RA, weights_RA, *weights[:2])
        shared_RH = functional.linear(functional.relu(functional.linear(x_RH, weights[2])).square(), weights[3])
        found.append((kernel(x_RH, chosen_RA, weights_RA, *weights), routed_RH + shared_RH))
    return found


ROUTER = kernels.register(kernels.Kernel(name="fused router", load=_load_router, pairs=_router_pairs))
FUSED_EXPERTS = kernels.register(
    kernels.Kernel(name="fused experts", load=_load_fused_experts, pairs=_fused_expert_pairs)
)
