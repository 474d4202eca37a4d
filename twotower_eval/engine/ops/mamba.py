"""A Mamba-2 layer between its projections: causal depthwise convolution seeded with the raw inputs before it, then the
scan; one kernel where there is one. Shape letters: see ops/__init__.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from twotower_eval.engine.ops import kernels
from twotower_eval.engine.ops.ssd import ssd_reference

WINDOWS_MAX_ROWS = 4  # measured on a CPU: 16 us against 25 at one row, 23 against 27 at 4, 53 against 34 at 16


def causal_conv(u_BSC: Tensor, state_BCW: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """Convolve and apply SiLU; (B, S, C) in ``u_BSC.dtype``.

    Few rows (B S) as one product of windows, which is fewest calls; many as W shifted products added up in place: no
    transposes, no im2col.
    """
    if kernels.may_serve(u_BSC, weight_CW):
        kernel = CONVOLUTION.on(u_BSC.device, u_BSC.dtype)
        if kernel is not None:
            return conv_by_kernel(u_BSC, state_BCW, weight_CW, bias_C, kernel)
    num_taps, num_positions = weight_CW.shape[1], u_BSC.shape[1]
    padded = torch.cat([state_BCW[:, :, 1:].transpose(1, 2).to(u_BSC.dtype), u_BSC], dim=1)
    if u_BSC.shape[0] * num_positions <= WINDOWS_MAX_ROWS:
        out = (padded.unfold(1, num_taps, 1) * weight_CW).sum(-1)
        return functional.silu(out if bias_C is None else out + bias_C)
    taps_WC = weight_CW.t().contiguous()
    first = padded[:, :num_positions]
    out = first * taps_WC[0] if bias_C is None else torch.addcmul(bias_C, first, taps_WC[0])
    for tap in range(1, num_taps):
        out = out.addcmul_(padded[:, tap : tap + num_positions], taps_WC[tap])
    return functional.silu(out, inplace=True)


def causal_conv_step(
    u_B1C: Tensor, state_BCW: Tensor, weight_CW: Tensor, bias_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One position: the convolution with SiLU (B, 1, C), and the state after it, which is the window itself, laid out
    tap by tap."""
    window_BWC = torch.cat([state_BCW.transpose(1, 2)[:, 1:], u_B1C.to(state_BCW.dtype)], dim=1)
    out_B1C = (window_BWC.to(u_B1C.dtype) * weight_CW.t()).sum(1, keepdim=True)
    if bias_C is not None:
        out_B1C = out_B1C.add_(bias_C) if not out_B1C.requires_grad else out_B1C + bias_C
    return functional.silu(out_B1C), window_BWC.transpose(1, 2)


def causal_conv_reference(u_BSC: Tensor, state_BCW: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """One position at a time, from a window of W raw inputs."""
    window_BCW = state_BCW.to(u_BSC.dtype)
    outputs = []
    for position in range(u_BSC.shape[1]):
        window_BCW = torch.cat([window_BCW[:, :, 1:], u_BSC[:, position, :, None]], dim=2)
        out_BC = (window_BCW * weight_CW).sum(-1)
        outputs.append(out_BC if bias_C is None else out_BC + bias_C)
    stacked = torch.stack(outputs, dim=1)
    return stacked * torch.sigmoid(stacked)


def next_conv_state(u_BSC: Tensor, state_BCW: Tensor, lengths_B: Tensor | None) -> Tensor:
    """The last W raw inputs after ``lengths_B`` (None: all) of the new positions, (B, C, W)."""
    num_taps = state_BCW.shape[2]
    joined_BCT = torch.cat([state_BCW, u_BSC.transpose(1, 2).to(state_BCW.dtype)], dim=2)
    if lengths_B is None:
        return joined_BCT[:, :, -num_taps:].contiguous()
    columns_BW = lengths_B[:, None] + torch.arange(num_taps, device=lengths_B.device)
    index_BCW = columns_BW[:, None, :].expand(-1, joined_BCT.shape[1], -1)
    return joined_BCT.gather(2, index_BCW)


def conv_by_kernel(
    u_BSC: Tensor, state_BCW: Tensor, weight_CW: Tensor, bias_C: Tensor | None, kernel: Callable[..., Tensor]
) -> Tensor:
    """:func:`causal_conv` by causal-conv1d's kernel, which wants channels innermost and the last W - 1 inputs."""
    before_BCW = state_BCW[:, :, 1:].to(u_BSC.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    x_BCS = u_BSC.contiguous().transpose(1, 2)
    out_BCS: Tensor = kernel(
        x_BCS, weight_CW.contiguous(), bias_C, initial_states=before_BCW, return_final_states=False, activation="silu"
    )
    return out_BCS.transpose(1, 2)


def _load_convolution() -> Callable[..., Tensor]:
    from causal_conv1d import causal_conv1d_fn

    function: Callable[..., Tensor] = causal_conv1d_fn
    return function


def _convolution_pairs(
    kernel: Callable[..., Tensor], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """Shorter than the taps, a block, a prompt; seeded, with and without a bias."""
    found = []
    for num_positions, with_bias in ((2, True), (16, True), (150, False)):
        u_BSC = kernels.seeded((2, num_positions, 64), device, precision, seed=num_positions)
        state_BCW = kernels.seeded((2, 64, 4), device, precision, seed=1)
        weight_CW = kernels.seeded((64, 4), device, precision, seed=2) / 2
        bias_C = kernels.seeded((64,), device, precision, seed=3) if with_bias else None
        ours = conv_by_kernel(u_BSC, state_BCW, weight_CW, bias_C, kernel)
        found.append((ours, causal_conv_reference(u_BSC, state_BCW, weight_CW, bias_C)))
    return found


CONVOLUTION = kernels.register(kernels.Kernel(name="causal-conv1d", load=_load_convolution, pairs=_convolution_pairs))


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
