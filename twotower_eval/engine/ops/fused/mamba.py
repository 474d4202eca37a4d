"""The middle of a Mamba-2 layer in one launch: convolution, step sizes, recurrence and skip, behind its projection.

A token alone goes through the recurrence as it is written; a block through the quadratic form of state-space duality
(arXiv 2405.21060, section 6), in one piece.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_eval.engine.ops.fused.product import let_next_begin, overlapping, wait_for_previous


@triton.jit
def _step_size(dt, bias, smallest, largest):
    """Softplus (above 20 the input itself, as in torch), clamped to the limits."""
    raw = dt.to(tl.float32) + bias.to(tl.float32)
    grown = tl.exp(tl.minimum(raw, 20.0))
    # Near 0 the logarithm's series: 1 + x would round x away.
    soft = tl.where(raw > 20.0, raw, tl.where(raw < -7.0, grown - grown * grown / 2, tl.log(1.0 + grown)))
    return tl.minimum(tl.maximum(soft, smallest), largest)


@triton.jit
def _convolved_one(
    u_ptr, state_ptr, weight_ptr, bias_ptr, channels, state_stride_c, state_stride_w,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One position of some channels, SiLU applied, rounded to the input's type."""
    newest = tl.load(u_ptr + channels)
    out = newest.to(tl.float32) * tl.load(weight_ptr + channels * TAPS + TAPS - 1).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        before = tl.load(state_ptr + channels * state_stride_c + (tap + 1) * state_stride_w)
        out += before.to(tl.float32) * tl.load(weight_ptr + channels * TAPS + tap).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + channels).to(tl.float32)
    return (out * tl.sigmoid(out)).to(u_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _keep_one(
    u_ptr, state_ptr, after_ptr, channels, state_stride_c, state_stride_w, after_stride_c, after_stride_w,
    TAPS: tl.constexpr,
):  # fmt: skip
    """The window after one position."""
    for tap in tl.static_range(TAPS - 1):
        before = tl.load(state_ptr + channels * state_stride_c + (tap + 1) * state_stride_w)
        tl.store(after_ptr + channels * after_stride_c + tap * after_stride_w, before)
    newest = tl.load(u_ptr + channels).to(after_ptr.dtype.element_ty)
    tl.store(after_ptr + channels * after_stride_c + (TAPS - 1) * after_stride_w, newest)


@triton.jit
def _one_kernel(
    projected_ptr, conv_ptr, conv_after_ptr, ssm_ptr, ssm_after_ptr, y_ptr,
    weight_ptr, bias_ptr, a_log_ptr, skip_ptr, dt_bias_ptr,
    projected_stride, conv_stride_b, conv_stride_c, conv_stride_w, after_stride_b, after_stride_c, after_stride_w,
    ssm_stride_b, ssm_after_stride_b, smallest, largest,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    batch, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    inner: tl.constexpr = HEADS * DIM
    channels: tl.constexpr = inner + 2 * GROUPS * STATE
    of_group: tl.constexpr = HEADS // GROUPS
    group = head // of_group
    projected_ptr += batch * projected_stride
    conv_ptr += batch * conv_stride_b
    conv_after_ptr += batch * after_stride_b
    u_ptr = projected_ptr + inner  # behind the gate

    dims, states = tile * TILE + tl.arange(0, TILE), tl.arange(0, STATE)
    x_channels = head * DIM + dims
    b_channels = inner + group * STATE + states
    c_channels = b_channels + GROUPS * STATE
    x = _convolved_one(u_ptr, conv_ptr, weight_ptr, bias_ptr, x_channels, conv_stride_c, conv_stride_w, TAPS, HAS_BIAS)
    b = _convolved_one(u_ptr, conv_ptr, weight_ptr, bias_ptr, b_channels, conv_stride_c, conv_stride_w, TAPS, HAS_BIAS)
    c = _convolved_one(u_ptr, conv_ptr, weight_ptr, bias_ptr, c_channels, conv_stride_c, conv_stride_w, TAPS, HAS_BIAS)

    delta = _step_size(tl.load(u_ptr + channels + head), tl.load(dt_bias_ptr + head), smallest, largest)
    decay = tl.exp(-delta * tl.exp(tl.load(a_log_ptr + head).to(tl.float32)))
    at = (head * DIM + dims)[:, None] * STATE + states[None, :]
    state = tl.load(ssm_ptr + batch * ssm_stride_b + at) * decay + (delta * x)[:, None] * b[None, :]
    tl.store(ssm_after_ptr + batch * ssm_after_stride_b + at, state)
    y = tl.sum(state * c[None, :], axis=1) + tl.load(skip_ptr + head).to(tl.float32) * x
    tl.store(y_ptr + batch * inner + x_channels, y)

    _keep_one(
        u_ptr, conv_ptr, conv_after_ptr, x_channels, conv_stride_c, conv_stride_w, after_stride_c, after_stride_w, TAPS
    )
    if (head % of_group == 0) and (tile == 0):
        _keep_one(
            u_ptr, conv_ptr, conv_after_ptr, b_channels,
            conv_stride_c, conv_stride_w, after_stride_c, after_stride_w, TAPS,
        )  # fmt: skip
        _keep_one(
            u_ptr, conv_ptr, conv_after_ptr, c_channels,
            conv_stride_c, conv_stride_w, after_stride_c, after_stride_w, TAPS,
        )  # fmt: skip


@triton.jit
def _convolved(
    u_ptr, state_ptr, weight_ptr, bias_ptr, channels, positions, num_positions, u_stride, state_stride_c,
    state_stride_w, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A block of positions of some channels, (S, channels), zero behind the last."""
    real = (positions < num_positions)[:, None]
    out = tl.zeros([positions.shape[0], channels.shape[0]], dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        source = (positions + (tap + 1 - TAPS))[:, None]  # below 0: in the state, whose last place is position -1
        inside, before = real & (source >= 0), real & (source < 0)
        value = tl.load(u_ptr + source * u_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        earlier_ptr = state_ptr + channels[None, :] * state_stride_c + (source + TAPS) * state_stride_w
        value += tl.load(earlier_ptr, mask=before, other=0.0).to(tl.float32)
        out += value * tl.load(weight_ptr + channels * TAPS + tap).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + channels).to(tl.float32)[None, :]
    rounded = (out * tl.sigmoid(out)).to(u_ptr.dtype.element_ty).to(tl.float32)
    return tl.where(real, rounded, 0.0)


@triton.jit
def _keep(u_ptr, state_ptr, after_ptr, channels, num_positions, strides, TAPS: tl.constexpr):
    """The window after all positions."""
    u_stride, state_stride_c, state_stride_w, after_stride_c, after_stride_w = strides
    for tap in tl.static_range(TAPS):
        source = num_positions - TAPS + tap
        from_block = channels * 0 + source >= 0
        kept = tl.load(u_ptr + source * u_stride + channels, mask=from_block, other=0.0)
        earlier_ptr = state_ptr + channels * state_stride_c + (source + TAPS) * state_stride_w
        earlier = tl.load(earlier_ptr, mask=channels * 0 + source < 0, other=0.0)
        value = tl.where(from_block, kept.to(tl.float32), earlier.to(tl.float32))
        tl.store(after_ptr + channels * after_stride_c + tap * after_stride_w, value.to(after_ptr.dtype.element_ty))


@triton.jit
def _outputs(x_SP, b_SN, c_SN, state_PN, delta, cumulative, positions):
    """Outputs of a block's positions, from each other and from the state, (S, P)."""
    causal = positions[:, None] >= positions[None, :]
    difference = tl.where(causal, cumulative[:, None] - cumulative[None, :], 0.0)
    scores_SS = tl.dot(c_SN, tl.trans(b_SN), input_precision="tf32x3")
    mixing_SS = tl.where(causal, scores_SS * tl.exp(difference), 0.0)
    y_SP = tl.dot(mixing_SS, delta[:, None] * x_SP, input_precision="tf32x3")
    from_state_SP = tl.dot(c_SN, tl.trans(state_PN), input_precision="tf32x3")
    return y_SP + from_state_SP * tl.exp(cumulative)[:, None]


@triton.jit
def _block_kernel(
    projected_ptr, conv_ptr, conv_after_ptr, ssm_ptr, ssm_after_ptr, y_ptr,
    weight_ptr, bias_ptr, a_log_ptr, skip_ptr, dt_bias_ptr,
    num_positions, stride_b, stride_s, conv_stride_b, conv_stride_c, conv_stride_w,
    after_stride_b, after_stride_c, after_stride_w, ssm_stride_b, ssm_after_stride_b, smallest, largest,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILE: tl.constexpr, POSITIONS: tl.constexpr, WITH_STATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    batch, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    inner: tl.constexpr = HEADS * DIM
    channels: tl.constexpr = inner + 2 * GROUPS * STATE
    of_group: tl.constexpr = HEADS // GROUPS
    group = head // of_group
    u_ptr = projected_ptr + batch * stride_b + inner
    conv_ptr += batch * conv_stride_b
    conv_after_ptr += batch * after_stride_b
    positions, dims, states = tl.arange(0, POSITIONS), tile * TILE + tl.arange(0, TILE), tl.arange(0, STATE)
    x_at, b_at = head * DIM + dims, inner + group * STATE + states
    c_at = b_at + GROUPS * STATE
    # fmt: off
    x_SP = _convolved(u_ptr, conv_ptr, weight_ptr, bias_ptr, x_at, positions, num_positions, stride_s,
                      conv_stride_c, conv_stride_w, TAPS, HAS_BIAS)
    b_SN = _convolved(u_ptr, conv_ptr, weight_ptr, bias_ptr, b_at, positions, num_positions, stride_s,
                      conv_stride_c, conv_stride_w, TAPS, HAS_BIAS)
    c_SN = _convolved(u_ptr, conv_ptr, weight_ptr, bias_ptr, c_at, positions, num_positions, stride_s,
                      conv_stride_c, conv_stride_w, TAPS, HAS_BIAS)
    # fmt: on
    real = positions < num_positions
    dt = tl.load(u_ptr + positions * stride_s + channels + head, mask=real, other=0.0)
    delta = tl.where(real, _step_size(dt, tl.load(dt_bias_ptr + head), smallest, largest), 0.0)
    log_decay = -delta * tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    cumulative = tl.cumsum(log_decay, axis=0)
    state_at = x_at[:, None] * STATE + states[None, :]
    state_PN = tl.load(ssm_ptr + batch * ssm_stride_b + state_at)
    y_SP = _outputs(x_SP, b_SN, c_SN, state_PN, delta, cumulative, positions)
    y_SP += tl.load(skip_ptr + head).to(tl.float32) * x_SP
    y_at = (batch * num_positions + positions)[:, None] * inner + x_at[None, :]
    tl.store(y_ptr + y_at, y_SP, mask=real[:, None])
    if WITH_STATE:
        total = tl.sum(log_decay, axis=0)
        to_end_SP = (delta * tl.exp(total - cumulative))[:, None] * x_SP
        state_PN = state_PN * tl.exp(total) + tl.dot(tl.trans(to_end_SP), b_SN, input_precision="tf32x3")
        tl.store(ssm_after_ptr + batch * ssm_after_stride_b + state_at, state_PN)
        strides = (stride_s, conv_stride_c, conv_stride_w, after_stride_c, after_stride_w)
        _keep(u_ptr, conv_ptr, conv_after_ptr, x_at, num_positions, strides, TAPS)
        if (head % of_group == 0) and (tile == 0):
            _keep(u_ptr, conv_ptr, conv_after_ptr, b_at, num_positions, strides, TAPS)
            _keep(u_ptr, conv_ptr, conv_after_ptr, c_at, num_positions, strides, TAPS)


def scan(
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
    """See :func:`twotower_eval.engine.ops.mamba.scan_reference`."""
    batch_size, num_positions, _ = projected_BSZ.shape
    heads, dim, state_size = ssm_BhPN.shape[1:]
    projected_BSZ, ssm_BhPN, weight_C1W = projected_BSZ.contiguous(), ssm_BhPN.contiguous(), weight_C1W.contiguous()
    y_BSI = torch.empty(batch_size, num_positions, heads * dim, dtype=torch.float32, device=projected_BSZ.device)
    conv_after, ssm_after = after or (conv_BCW, ssm_BhPN)  # not written where there is no ``after``
    given = (
        projected_BSZ, conv_BCW, conv_after, ssm_BhPN, ssm_after, y_BSI, weight_C1W,
        weight_C1W if bias_C is None else bias_C, A_log_h, D_h, dt_bias_h,
    )  # fmt: skip
    strides = (*conv_BCW.stride(), *conv_after.stride(), ssm_BhPN.stride(0), ssm_after.stride(0))
    between = (0.0, math.inf) if limits is None else limits
    sizes = {
        "HEADS": heads, "GROUPS": num_groups, "DIM": dim, "STATE": state_size, "TAPS": weight_C1W.shape[2],
        "HAS_BIAS": bias_C is not None, **overlapping(ssm_BhPN.device),
    }  # fmt: skip
    if num_positions == 1 and after is not None:
        tile = min(dim, 16)
        _one_kernel[(batch_size, heads, dim // tile)](
            *given, projected_BSZ.stride(0), *strides, *between, **sizes, TILE=tile, num_warps=2
        )
    else:
        tile, positions = min(dim, 32), max(16, triton.next_power_of_2(num_positions))
        _block_kernel[(batch_size, heads, dim // tile)](
            *given, num_positions, projected_BSZ.stride(0), projected_BSZ.stride(1), *strides, *between, **sizes,
            TILE=tile, POSITIONS=positions, WITH_STATE=after is not None, num_warps=8,
        )  # fmt: skip
    return y_BSI
