"""Causal depthwise convolution seeded with the raw inputs before it. Shape letters: see ops/__init__.

The carried state is the last W raw inputs as (B, C, W), zero-padded on the left, of which the convolution needs the
last W - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from twotower_eval.engine.ops import kernels

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
