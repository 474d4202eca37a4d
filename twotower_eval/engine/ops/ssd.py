"""The Mamba-2 state space recurrence, seeded and carried. Shape letters: see ops/__init__.

For each head, with ``a = exp(delta * A)``: ``state = state * a + delta * x (outer) b`` and ``y = state @ c``
(state-space duality, arXiv 2405.21060, section 6). All in float32. ``delta == 0`` leaves the state as it is, which
is how padding is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twotower_eval.engine.ops import kernels

CHUNK = 32  # measured: 16-32 beats one long quadratic scan on a CPU; the result does not depend on it


def ssd(
    x_BShP: Tensor,
    delta_BSh: Tensor,
    a_h: Tensor,
    b_BSGN: Tensor,
    c_BSGN: Tensor,
    state_BhPN: Tensor,
    *,
    precision: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, S, h, P) and the state after the last position (B, h, P, N).

    ``precision`` is the model's: how exact a foreign kernel must be to be used on a GPU.
    """
    if kernels.may_serve(x_BShP, a_h):
        step = x_BShP.shape[1] == 1
        served = step or x_BShP.shape[1] > KERNEL_CHUNK
        kernel = (STATE_UPDATE if step else CHUNK_SCAN).on(x_BShP.device, precision) if served else None
        if kernel is not None:
            by_kernel = step_by_kernel if step else scan_by_kernel
            return by_kernel(x_BShP, delta_BSh, a_h, b_BSGN, c_BSGN, state_BhPN, kernel)
    if x_BShP.shape[1] == 1:
        return ssd_step(x_BShP, delta_BSh, a_h, b_BSGN, c_BSGN, state_BhPN)
    if x_BShP.is_cpu and kernels.without_gradients(x_BShP, delta_BSh, a_h, state_BhPN):
        return ssd_by_chunks(x_BShP, delta_BSh, a_h, b_BSGN, c_BSGN, state_BhPN)
    y_BShP, boundaries_BchPN = ssd_chunked(x_BShP, delta_BSh, a_h, b_BSGN, c_BSGN, state_BhPN, chunk=CHUNK)
    return y_BShP, boundaries_BchPN[:, -1]


def ssd_outputs(
    x_BShP: Tensor, delta_BSh: Tensor, a_h: Tensor, b_BSGN: Tensor, c_BSGN: Tensor, state_BhPN: Tensor
) -> Tensor:
    """Outputs (B, S, h, P) alone, where no position follows the last: one chunk, and no state after it."""
    without_gradients = kernels.without_gradients(x_BShP, delta_BSh, a_h, state_BhPN)
    if not (1 < x_BShP.shape[1] <= CHUNK and without_gradients):
        return ssd(x_BShP, delta_BSh, a_h, b_BSGN, c_BSGN, state_BhPN)[0]
    cumulative_BSh = (delta_BSh * a_h).cumsum(1)
    return _chunk_outputs(delta_BSh[..., None] * x_BShP, cumulative_BSh, b_BSGN, c_BSGN, state_BhPN)


def ssd_by_chunks(
    x_BShP: Tensor, delta_BSh: Tensor, a_h: Tensor, b_BSGN: Tensor, c_BSGN: Tensor, state_BhPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs (B, S, h, P) and the state after the last position: one chunk after the other, so that what a chunk needs
    stays in a CPU's cache. Without gradients."""
    outputs = []
    for start in range(0, x_BShP.shape[1], CHUNK):
        x, delta, b, c = (
            t if t.shape[1] <= CHUNK else t[:, start : start + CHUNK] for t in (x_BShP, delta_BSh, b_BSGN, c_BSGN)
        )
        cumulative_BSh = (delta * a_h).cumsum(1)
        weighted_BShP = delta[..., None] * x
        outputs.append(_chunk_outputs(weighted_BShP, cumulative_BSh, b, c, state_BhPN))
        last_B1h = cumulative_BSh[:, -1:]
        to_end_BShP = weighted_BShP.mul_((last_B1h - cumulative_BSh).exp_()[..., None])
        # All heads of a group read one b, so that what they add to their states is one matrix.
        to_end_BGnS = to_end_BShP.view(*b.shape[:3], -1).permute(0, 2, 3, 1)
        added_BGnN = to_end_BGnS @ b.transpose(1, 2)
        decayed_BhPN = state_BhPN * last_B1h.exp().view(*state_BhPN.shape[:2], 1, 1)
        state_BhPN = decayed_BhPN.add_(added_BGnN.view(state_BhPN.shape))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state_BhPN


def _chunk_outputs(
    weighted_BShP: Tensor, cumulative_BSh: Tensor, b_BSGN: Tensor, c_BSGN: Tensor, state_BhPN: Tensor
) -> Tensor:
    """Outputs (B, S, h, P) of one chunk, of x weighted by delta and the sums of its logarithmic decays."""
    heads = (b_BSGN.shape[2], -1)
    cumulative_BhS = cumulative_BSh.transpose(1, 2)
    if cumulative_BhS.is_cpu:  # results then have the same layout, and are computed by vector instructions
        cumulative_BhS = cumulative_BhS.contiguous()
    decay_BhSS = (cumulative_BhS[..., :, None] - cumulative_BhS[..., None, :]).tril_().exp_()
    c_BGSN = c_BSGN.transpose(1, 2)
    scores_BGSS = (c_BGSN @ b_BSGN.permute(0, 2, 3, 1)).tril_()
    mixing_BhSS = decay_BhSS.unflatten(1, heads).mul_(scores_BGSS[:, :, None]).flatten(1, 2)
    y_BhSP = mixing_BhSS @ weighted_BShP.transpose(1, 2)
    # All heads of a group read one c, so that their states are one matrix.
    states_BGnN = state_BhPN.unflatten(1, heads).flatten(2, 3)
    from_state_BGSn = c_BGSN @ states_BGnN.transpose(-1, -2)
    from_state_BShP = from_state_BGSn.transpose(1, 2).reshape(weighted_BShP.shape)
    # Not addcmul, whose fused rounding would make the bits differ from those of the chunked form.
    y_BShP: Tensor = (from_state_BShP * cumulative_BSh.exp()[..., None]).add_(y_BhSP.transpose(1, 2))
    return y_BShP


def ssd_reference(
    x_BShP: Tensor, delta_BSh: Tensor, a_h: Tensor, b_BSGN: Tensor, c_BSGN: Tensor, state_BhPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one position at a time."""
    heads_per_group = x_BShP.shape[2] // b_BSGN.shape[2]
    outputs, state = [], state_BhPN
    for s in range(x_BShP.shape[1]):
        b_BhN = b_BSGN[:, s].repeat_interleave(heads_per_group, dim=1)
        c_BhN = c_BSGN[:, s].repeat_interleave(heads_per_group, dim=1)
        delta_Bh = delta_BSh[:, s]
        decay_Bh = torch.exp(delta_Bh * a_h)
        state = state * decay_Bh[..., None, None] + (delta_Bh[..., None] * x_BShP[:, s])[..., None] * b_BhN[:, :, None]
        outputs.append((state * c_BhN[:, :, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def ssd_step(
    x_BShP: Tensor, delta_BSh: Tensor, a_h: Tensor, b_BSGN: Tensor, c_BSGN: Tensor, state_BhPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One position (S = 1), heads kept in their groups so that nothing is repeated."""
    batch_size, _, heads, dim = x_BShP.shape
    groups, state_size = b_BSGN.shape[2:]
    delta_Bh11 = delta_BSh.view(batch_size, heads, 1, 1)
    decay_Bh11 = (delta_Bh11 * a_h.view(heads, 1, 1)).exp_()
    weighted_BhP1 = x_BShP.view(batch_size, heads, dim, 1) * delta_Bh11
    # All heads of a group have one b and one c, so that their states are one matrix.
    state_BGnN = (state_BhPN * decay_Bh11).view(batch_size, groups, -1, state_size)
    weighted_BGn1 = weighted_BhP1.view(batch_size, groups, -1, 1)
    state_BGnN = state_BGnN.addcmul_(weighted_BGn1, b_BSGN.view(batch_size, groups, 1, state_size))
    # c before the states: behind them, as a column, it takes four times as long on a CPU.
    y_BG1n = c_BSGN.view(batch_size, groups, 1, state_size) @ state_BGnN.transpose(-1, -2)
    return y_BG1n.view(x_BShP.shape), state_BGnN.view(state_BhPN.shape)


def ssd_chunked(
    x_BShP: Tensor,
    delta_BSh: Tensor,
    a_h: Tensor,
    b_BSGN: Tensor,
    c_BSGN: Tensor,
    state_BhPN: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, S, h, P) and the states before each chunk and after the last one, (B, c + 1, h, P, N).

    Quadratic inside a chunk, a recurrence between chunks. The last chunk is padded with delta 0.
    """
    num_positions, num_groups = x_BShP.shape[1], b_BSGN.shape[2]
    chunk = min(chunk, num_positions)
    padding = -num_positions % chunk
    x, delta, b, c = (
        torch.nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, padding)).unflatten(1, (-1, chunk)) if padding
        else t.unflatten(1, (-1, chunk))
        for t in (x_BShP, delta_BSh, b_BSGN, c_BSGN)
    )  # fmt: skip
    heads = (num_groups, -1)
    log_decay_BchS = (delta * a_h).permute(0, 1, 3, 2)  # (B, c, h, L)
    cumulative_BchS = log_decay_BchS.cumsum(-1)
    weighted_BcGhSP = (delta[..., None] * x).permute(0, 1, 3, 2, 4).unflatten(2, heads)
    b_BcGSN, c_BcGSN = b.permute(0, 1, 3, 2, 4), c.permute(0, 1, 3, 2, 4)

    causal_SS = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    difference = cumulative_BchS[..., :, None] - cumulative_BchS[..., None, :]
    decay_BcGhSS = difference.masked_fill(~causal_SS, -torch.inf).exp().unflatten(2, heads)
    mixing_BcGhSS = (c_BcGSN @ b_BcGSN.transpose(-1, -2))[:, :, :, None] * decay_BcGhSS
    y_BcGhSP = mixing_BcGhSS @ weighted_BcGhSP

    to_end_BcGhS = (cumulative_BchS[..., -1:] - cumulative_BchS).exp().unflatten(2, heads)
    added_BcGhPN = (weighted_BcGhSP * to_end_BcGhS[..., None]).transpose(-1, -2) @ b_BcGSN[:, :, :, None]
    boundaries_BchPN = _carry(added_BcGhPN.flatten(2, 3), cumulative_BchS[..., -1].exp(), state_BhPN)
    before_BcGhPN = boundaries_BchPN[:, :-1].unflatten(2, heads)
    from_state = c_BcGSN[:, :, :, None] @ before_BcGhPN.transpose(-1, -2)
    y_BcGhSP = y_BcGhSP + from_state * cumulative_BchS.exp().unflatten(2, heads)[..., None]
    y_BShP = y_BcGhSP.flatten(2, 3).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return y_BShP[:, :num_positions], boundaries_BchPN


def _carry(added_BchPN: Tensor, decay_Bch: Tensor, state_BhPN: Tensor) -> Tensor:
    """Run the recurrence between chunks: the seed, then the state after each chunk."""
    states = [state_BhPN]
    for index in range(added_BchPN.shape[1]):
        states.append(states[-1] * decay_Bch[:, index, :, None, None] + added_BchPN[:, index])
    return torch.stack(states, dim=1)


def step_by_kernel(
    x_BShP: Tensor,
    delta_BSh: Tensor,
    a_h: Tensor,
    b_BSGN: Tensor,
    c_BSGN: Tensor,
    state_BhPN: Tensor,
    kernel: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """:func:`ssd_step` by mamba-ssm's kernel, which updates a state in place."""
    state = state_BhPN.clone()
    heads, dim, state_size = state.shape[1:]
    delta_BhP = delta_BSh[:, 0, :, None].expand(-1, -1, dim)
    a_hPN = a_h[:, None, None].expand(heads, dim, state_size)
    none_hP = state.new_zeros(heads, 1).expand(heads, dim)  # its version 2.3 fails without a skip and a bias
    y_BhP: Tensor = kernel(
        state, x_BShP[:, 0], delta_BhP, a_hPN, b_BSGN[:, 0], c_BSGN[:, 0],
        D=none_hP, dt_bias=none_hP, dt_softplus=False,
    )  # fmt: skip
    return y_BhP[:, None].float(), state


def scan_by_kernel(
    x_BShP: Tensor,
    delta_BSh: Tensor,
    a_h: Tensor,
    b_BSGN: Tensor,
    c_BSGN: Tensor,
    state_BhPN: Tensor,
    kernel: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """:func:`ssd_chunked` by mamba-ssm's kernel, for sequences longer than its chunks: shorter ones were seen to go
    wrong behind a seed."""
    y_BShP, state = kernel(
        x_BShP, delta_BSh, a_h, b_BSGN, c_BSGN, KERNEL_CHUNK,
        initial_states=state_BhPN, dt_softplus=False, return_final_states=True,
    )  # fmt: skip
    return y_BShP.float(), state.float()


KERNEL_CHUNK = 64


def _load_state_update() -> Callable[..., Tensor]:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    function: Callable[..., Tensor] = selective_state_update
    return function


def _load_chunk_scan() -> Callable[..., Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    function: Callable[..., Tensor] = mamba_chunk_scan_combined
    return function


def _proof_pairs(
    by_kernel: Callable[..., tuple[Tensor, Tensor]],
    lengths: Sequence[int],
    kernel: Callable[..., Tensor],
    device: torch.device,
) -> Sequence[tuple[Tensor, Tensor]]:
    """Outputs and states behind a seed, beside those of the recurrence as it is written."""
    found: list[tuple[Tensor, Tensor]] = []
    for length in lengths:
        x_BShP = kernels.seeded((2, length, 8, 64), device, torch.float32, seed=length)
        delta_BSh = kernels.seeded((2, length, 8), device, torch.float32, seed=1).abs() / 10
        a_h = -kernels.seeded((8,), device, torch.float32, seed=2).exp()
        b_BSGN, c_BSGN = (kernels.seeded((2, length, 2, 128), device, torch.float32, seed=seed) for seed in (3, 4))
        state_BhPN = kernels.seeded((2, 8, 64, 128), device, torch.float32, seed=5)
        given = (x_BShP, delta_BSh, a_h, b_BSGN, c_BSGN, state_BhPN)
        found += zip(by_kernel(*given, kernel), ssd_reference(*given), strict=True)
    return found


STATE_UPDATE = kernels.register(
    kernels.Kernel(
        name="mamba-ssm state update",
        load=_load_state_update,
        pairs=lambda kernel, device, _precision: _proof_pairs(step_by_kernel, (1,), kernel, device),
    )
)
CHUNK_SCAN = kernels.register(
    kernels.Kernel(
        name="mamba-ssm chunk scan",
        load=_load_chunk_scan,
        # Prompts of a chunk and a bit, and of several. Every chunk size is tuned by trying, which takes half a minute.
        pairs=lambda kernel, device, _precision: _proof_pairs(scan_by_kernel, (70, 300), kernel, device),
    )
)
