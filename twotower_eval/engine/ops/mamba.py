"""A Mamba-2 layer between its projections, as one kernel where there is one. Shape letters: see ops/__init__.

Z are the input projection's outputs: the gate, the convolution's inputs, a step size for each head; I the heads' dims
one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from twotower_eval.engine.ops import kernels
from twotower_eval.engine.ops.conv import causal_conv_reference, next_conv_state
from twotower_eval.engine.ops.ssd import ssd_reference

MAX_SIZE = 128  # of a head and of its state: more would not fit into a processor's shared memory
MAX_POSITIONS = 32  # of the kernel, which holds a block's quadratic form at once


def scan_reference(
    projected_BSZ: Tensor,
    conv_BCW: Tensor,
    ssm_BhPN: Tensor,
    weight_C1W: Tensor,
    bias_C: Tensor | None,
    A_log_h: Tensor,
    D_h: Tensor,
    dt_bias_h: Tensor,
    num_groups: int,
    limits: tuple[float, float] | None,
    after: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Convolution, step sizes, recurrence and skip: (B, S, I) float32, what the gated norm takes.

    The states after the last position are left in ``after``: the last W raw inputs (B, C, W), not those read, and the
    SSM state (B, h, P, N), which may be the one read. ``limits`` clamp the step sizes.
    """
    heads, dim, state_size = ssm_BhPN.shape[1:]
    inner, states = heads * dim, num_groups * state_size
    _, u_BSC, dt_BSh = projected_BSZ.split_with_sizes((inner, inner + 2 * states, heads), dim=-1)
    delta_BSh = functional.softplus(dt_BSh.float() + dt_bias_h.float())
    if limits is not None:
        delta_BSh = delta_BSh.clamp(*limits)
    mixed_BSC = causal_conv_reference(u_BSC, conv_BCW, weight_C1W[:, 0], bias_C).float()
    x_BSI, b_BSn, c_BSn = mixed_BSC.split_with_sizes((inner, states, states), dim=-1)
    x_BShP = x_BSI.unflatten(-1, (heads, dim))
    b_BSGN, c_BSGN = (t.unflatten(-1, (num_groups, state_size)) for t in (b_BSn, c_BSn))
    y_BShP, ssm_after = ssd_reference(x_BShP, delta_BSh, -A_log_h.float().exp(), b_BSGN, c_BSGN, ssm_BhPN)
    if after is not None:
        after[0].copy_(next_conv_state(u_BSC, conv_BCW, None))
        after[1].copy_(ssm_after)
    y_BSI: Tensor = (y_BShP + D_h.float()[:, None] * x_BShP).flatten(-2)
    return y_BSI


def fits(num_positions: int, head_dim: int, state_size: int) -> bool:
    """Whether the kernel takes such a block: its tiles are powers of two."""
    powers = all(16 <= size <= MAX_SIZE and size & (size - 1) == 0 for size in (head_dim, state_size))
    return num_positions <= MAX_POSITIONS and powers


def _load_scan() -> Callable[..., Tensor]:
    from twotower_eval.engine.ops.fused import mamba

    return mamba.scan


def _scan_pairs(
    kernel: Callable[..., Tensor], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """A token, blocks of even and odd length and the longest, behind a seed: outputs and states, with and without
    limits of the step sizes (the released config has none) and a bias."""
    found: list[tuple[Tensor, Tensor]] = []
    heads, dim, groups, state_size, taps = 8, 64, 2, 128, 4
    channels = heads * dim + 2 * groups * state_size
    for num_positions, wants_state in ((1, True), (8, True), (16, True), (16, False), (23, False), (32, True)):
        limits = (1e-3, 0.5) if num_positions in (1, 23) else None

        def given(*shape: int, seed: int, dtype: torch.dtype = precision) -> Tensor:
            return kernels.seeded(shape, device, dtype, seed)

        projected_BSZ = given(2, num_positions, heads * dim + channels + heads, seed=num_positions)
        conv_BCW = given(2, channels, taps, seed=1)
        ssm_BhPN = given(2, heads, dim, state_size, seed=2, dtype=torch.float32)
        weight_C1W = given(channels, 1, taps, seed=3) / 2
        bias_C = None if num_positions == 8 else given(channels, seed=4)
        A_log_h, D_h, dt_bias_h = (given(heads, seed=seed) for seed in (5, 6, 7))
        outputs = []
        for scan in (kernel, scan_reference):
            conv_after, ssm_after = torch.zeros_like(conv_BCW), ssm_BhPN.clone()
            after = (conv_after, ssm_after) if wants_state else None
            y_BSI = scan(
                projected_BSZ,
                conv_BCW,
                ssm_after,
                weight_C1W,
                bias_C,
                A_log_h,
                D_h,
                dt_bias_h,
                groups,
                limits,
                after,
            )
            outputs.append((y_BSI, ssm_after, *((conv_after,) if wants_state else ())))
        found += zip(*outputs, strict=True)
    return found


SCAN = kernels.register(kernels.Kernel(name="fused Mamba scan", load=_load_scan, pairs=_scan_pairs))
