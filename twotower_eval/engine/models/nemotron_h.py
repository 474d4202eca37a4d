"""NemotronH: one tower of Mamba-2 (M), attention (*), mixture-of-experts (E) and plain MLP (-) layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from twotower_eval.engine.models.config import NemotronHConfig
from twotower_eval.engine.models.weights import Conv1d, Derived, DerivedByKey, Direct, Linear, RMSNorm
from twotower_eval.engine.ops import kernels, mamba, moe, norm, product, ssd


class MambaState(NamedTuple):
    """A Mamba layer's state: the last W raw convolution inputs (B, C, W) and the float32 SSM state."""

    conv_BCW: Tensor
    ssm_BhPN: Tensor


class Mamba(Direct):
    """Mamba-2 mixer. ``forward`` continues from a state; the steps are public because training needs states at block
    boundaries."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.config = config
        heads, inner, channels = config.mamba_num_heads, config.mamba_inner_size, config.conv_channels
        states = config.n_groups * config.ssm_state_size
        self.in_sizes, self.mixed_sizes = (inner, channels, heads), (inner, states, states)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.conv1d = Conv1d(
            channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias, padding=0
        )
        self.in_proj = Linear(config.hidden_size, inner + channels + heads, bias=False)
        self.norm = RMSNorm(inner, config.layer_norm_epsilon)
        self.out_proj = Linear(inner, config.hidden_size, bias=False)
        self._decay_rate = Derived(lambda A_log: -torch.exp(A_log.float()))
        # (C, W) laid out tap by tap: strided taps would not be multiplied in vectors.
        self._taps_CW = Derived(lambda weight: weight[:, 0].t().contiguous().t())

    def empty_state(self, batch_size: int) -> MambaState:
        """The state before the first token: zeros."""
        cfg, weight = self.config, self.in_proj.weight
        conv_BCW = torch.zeros(batch_size, cfg.conv_channels, cfg.conv_kernel, dtype=weight.dtype, device=weight.device)
        shape = (batch_size, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size)
        return MambaState(conv_BCW, torch.zeros(shape, dtype=torch.float32, device=weight.device))

    def forward(
        self, x_BSH: Tensor, state: MambaState, valid_BS: Tensor | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Mix S positions. ``valid_BS`` and ``lengths_B`` say which are real; padding leaves the state alone."""
        scan = self._kernel(x_BSH, state) if valid_BS is None else None
        if scan is not None:
            after = MambaState(*(tensor.new_empty(tensor.shape) for tensor in state))
            return self._by_kernel(scan, x_BSH, state, after), after
        if x_BSH.shape[1] == 1 and valid_BS is None and x_BSH.device.type == "cpu":
            return self.step(x_BSH, state)
        z, u_BSC, delta_BSh = self.project(x_BSH, valid_BS)
        x, b, c = self.convolve(u_BSC, state.conv_BCW)
        precision = self.out_proj.weight.dtype
        y, ssm_BhPN = ssd.ssd(x, delta_BSh, self.decay_rate(), b, c, state.ssm_BhPN, precision=precision)
        return self.finish(y, x, z), MambaState(mamba.next_conv_state(u_BSC, state.conv_BCW, lengths_B), ssm_BhPN)

    def step(self, x_B1H: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Like :meth:`forward` for one position, in fewer calls."""
        z, u_B1C, delta_B1h = self.project(x_B1H)
        taps_CW = self._taps_CW(self.conv1d.weight)
        mixed_B1C, conv_BCW = mamba.causal_conv_step(u_B1C, state.conv_BCW, taps_CW, self.conv1d.bias)
        x, b, c = self.split_mixed(mixed_B1C.float())
        y, ssm_BhPN = ssd.ssd_step(x, delta_B1h, self.decay_rate(), b, c, state.ssm_BhPN)
        return self.finish(y, x, z), MambaState(conv_BCW, ssm_BhPN)

    def advance(self, x_BSH: Tensor, state: MambaState, after: MambaState) -> Tensor:
        """Like :meth:`forward`; the new state is left in ``after``, whose SSM state may be the one read."""
        scan = self._kernel(x_BSH, state)
        if scan is not None:
            return self._by_kernel(scan, x_BSH, state, after)
        y_BSH, made = self.forward(x_BSH, state)
        after.conv_BCW.copy_(made.conv_BCW)
        after.ssm_BhPN.copy_(made.ssm_BhPN)
        return y_BSH

    def outputs(self, x_BSH: Tensor, state: MambaState) -> Tensor:
        """Like :meth:`forward`, without the state after it."""
        scan = self._kernel(x_BSH, state)
        if scan is not None:
            return self._by_kernel(scan, x_BSH, state, None)
        z, u_BSC, delta_BSh = self.project(x_BSH)
        x, b, c = self.convolve(u_BSC, state.conv_BCW)
        return self.finish(ssd.ssd_outputs(x, delta_BSh, self.decay_rate(), b, c, state.ssm_BhPN), x, z)

    def _kernel(self, x_BSH: Tensor, state: MambaState) -> Callable[..., Tensor] | None:
        """The kernel for the middle of the layer, if it serves these positions and has proved itself."""
        convolution = (self.conv1d.weight, self.conv1d.bias)
        if not kernels.may_serve(x_BSH, self.in_proj.weight, *convolution, self.A_log, self.D, self.dt_bias, *state):
            return None
        if not mamba.fits(x_BSH.shape[1], self.config.mamba_head_dim, self.config.ssm_state_size):
            return None
        return mamba.SCAN.on(x_BSH.device, self.in_proj.weight.dtype)

    def _by_kernel(
        self, scan: Callable[..., Tensor], x_BSH: Tensor, state: MambaState, after: MambaState | None
    ) -> Tensor:
        cfg, convolution = self.config, self.conv1d
        projected_BSZ = product.linear(x_BSH, self.in_proj.weight)
        y_BSI = scan(
            projected_BSZ, *state, convolution.weight, convolution.bias, self.A_log, self.D, self.dt_bias,
            cfg.n_groups, cfg.time_step_limit, after,
        )  # fmt: skip
        return self._gated(y_BSI, projected_BSZ[..., : self.in_sizes[0]])

    def project(self, x_BSH: Tensor, valid_BS: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z (B, S, di), raw convolution inputs u (B, S, C) and step sizes delta (B, S, h), float32."""
        z, u, dt = product.linear(x_BSH, self.in_proj.weight).split_with_sizes(self.in_sizes, dim=-1)
        delta = functional.softplus(dt.float() + self.dt_bias.float())
        if self.config.time_step_limit is not None:
            delta = delta.clamp(*self.config.time_step_limit)
        if valid_BS is not None:
            delta = delta * valid_BS[..., None]
            u = u * valid_BS[..., None]
        return z, u, delta

    def convolve(self, u_BSC: Tensor, conv_BCW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, h, P), b and c (B, S, G, N), float32."""
        taps_CW = self._taps_CW(self.conv1d.weight)
        return self.split_mixed(mamba.causal_conv(u_BSC, conv_BCW, taps_CW, self.conv1d.bias).float())

    def split_mixed(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The convolution's output as heads of x and groups of b and c."""
        cfg = self.config
        x, b, c = mixed.split_with_sizes(self.mixed_sizes, dim=-1)
        groups = (*mixed.shape[:-1], cfg.n_groups, cfg.ssm_state_size)
        return x.view(*mixed.shape[:-1], cfg.mamba_num_heads, -1), b.view(groups), c.view(groups)

    def decay_rate(self) -> Tensor:
        """A (h,), negative, float32."""
        return self._decay_rate(self.A_log)

    def finish(self, y_BShP: Tensor, x_BShP: Tensor, z: Tensor) -> Tensor:
        """Skip connection, gate, group norm, output projection."""
        return self._gated(torch.addcmul(y_BShP, x_BShP, self.D.float()[:, None]).flatten(-2), z)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate, group norm, output projection."""
        normed = norm.gated_group_rms_norm(y, z, self.norm.weight, self.norm.eps, self.config.n_groups)
        return product.linear(normed, self.out_proj.weight)


class Attention(Direct):
    """Projections of grouped-query attention; the caller decides which keys a query sees."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.config = config
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * dim, bias=False)
        self.k_proj = Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.v_proj = Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.o_proj = Linear(config.num_attention_heads * dim, hidden, bias=False)

    def project(self, x_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, Q, S, D), keys and values (B, J, S, D)."""
        heads, weights = (-1, self.config.head_dim), (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        q, k, v = (product.linear(x_BSH, weight).unflatten(-1, heads).transpose(1, 2) for weight in weights)
        return q, k, v

    def finish(self, o_BQSD: Tensor) -> Tensor:
        """Join heads and project out, (B, S, H)."""
        return product.linear(o_BQSD.transpose(1, 2).flatten(-2), self.o_proj.weight)


class Mlp(Direct):
    """``down(relu(up x)^2)``."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden, width, bias=False)
        self.down_proj = Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return moe.mlp(x, self.up_proj.weight, self.down_proj.weight)


class Gate(Direct):
    """The router's weights, always float32."""

    def __init__(self, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32), requires_grad=False)
        self._wide_EH = Derived(Tensor.double)
        self._biases = Derived(Tensor.tolist)

    def wide_EH(self) -> Tensor:
        """The weight in float64, in which scores are computed."""
        return self._wide_EH(self.weight)

    def biases(self) -> list[float]:
        """The bias on the host."""
        return self._biases(self.e_score_correction_bias)


Steer = Callable[[Tensor, torch.Size], Tensor]  # chosen_RA, shape (B, S) of the rows -> chosen_RA


class MixtureOfExperts(Direct):
    """Routed experts plus the shared expert, which is neither scaled nor gated.

    ``steer`` puts other experts in the place of those that the router chose: random weights are timed at forced
    routings (measure/sizing/pairs.py). Checkpoints have none.
    """

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.steer: Steer | None = None
        num_experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.routing = config.routing
        self.gate = Gate(num_experts, hidden)
        self.experts_up_EIH = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.experts_down_EHI = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.shared_experts = Mlp(hidden, config.moe_shared_expert_intermediate_size)
        self._joined: DerivedByKey[moe.Joined] = DerivedByKey(1)

    def forward(self, x_BSH: Tensor) -> Tensor:
        if x_BSH.numel() == x_BSH.shape[-1] and x_BSH.is_cpu and self.routing.num_groups == 1:
            shared_IH, shared_HI = self.shared_experts.up_proj.weight, self.shared_experts.down_proj.weight
            weights = (self.experts_up_EIH, self.experts_down_EHI, shared_IH, shared_HI)
            if product.reads_halves(x_BSH, weights):
                chosen = moe.route_row(x_BSH, self.gate.wide_EH(), self.gate.biases(), self.routing)
                if self.steer is not None:
                    experts_1A = self.steer(torch.tensor([[expert for expert, _ in chosen]]), x_BSH.shape[:-1])
                    chosen = [(int(expert), weight) for expert, (_, weight) in zip(experts_1A[0], chosen, strict=True)]
                return moe.experts_of_row(x_BSH, chosen, *weights)
        x_RH = x_BSH.flatten(0, -2)
        gate_EH = self.gate.wide_EH() if x_RH.is_cpu else self.gate.weight
        chosen_RA, weights_RA = moe.route(x_RH, gate_EH, self.gate.e_score_correction_bias, self.routing)
        if self.steer is not None:
            chosen_RA = self.steer(chosen_RA, x_BSH.shape[:-1])
        shared = self.shared_experts
        weights = (self.experts_up_EIH, self.experts_down_EHI, shared.up_proj.weight, shared.down_proj.weight)
        if moe.serves_joined(x_RH, *weights):
            joined = self._joined(0.0, weights, lambda: moe.join(*weights))
            out_RH = moe.experts_joined(x_RH, chosen_RA, weights_RA, joined)
        else:
            out_RH = moe.experts_and_shared(x_RH, chosen_RA, weights_RA, *weights)
        return out_RH.view_as(x_BSH)


class Layer(Direct):
    """A norm and a mixer of the kind that the pattern's letter names."""

    def __init__(self, kind: str, config: NemotronHConfig) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _make_mixer(kind, config)

    def forward(
        self,
        x_BSH: Tensor,
        mixed_BSH: Tensor | None,
        gate_B1H: Tensor | None,
        shift_B1H: Tensor | None,
        gain_B1H: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The residual that enters this layer, with what the last one's mixer made and its gate, and what goes into
        this one's mixer. Adaptive layers (adaLN) are modulated in the reference's order: M and * before the norm, E
        and - behind it."""
        weight_H, eps, before = self.norm.weight, self.norm.eps, self.kind in "M*"
        return norm.add_norm(x_BSH, mixed_BSH, gate_B1H, weight_H, eps, shift_B1H, gain_B1H, before)


def _make_mixer(kind: str, config: NemotronHConfig) -> nn.Module:
    match kind:
        case "M":
            return Mamba(config)
        case "*":
            return Attention(config)
        case "E":
            return MixtureOfExperts(config)
        case "-":
            return Mlp(config.hidden_size, config.intermediate_size)
    raise AssertionError(f"layer kind {kind!r} should have been refused with the config")


class Tower(Direct):
    """Embeddings, layers and the final norm; heads belong to the models built from towers."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(kind, config) for kind in config.pattern])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def embed(self, ids_BS: Tensor) -> Tensor:
        """The residual stream's start, (B, S, H); float32 if the config keeps the residual so."""
        x: Tensor = self.embeddings(ids_BS)
        return x.float() if self.config.residual_in_fp32 else x


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q_BQSD, k_BJSD, v_BJSD -> o_BQSD
Mix = Callable[[int, Mamba, Tensor], Tensor]  # layer, mixer, x_BSH -> y_BSH


def run_layers(
    tower: Tower,
    x_BSH: Tensor,
    *,
    attend: Attend,
    mix: Mix,
    modulation: Modulation | None = None,
    wanted: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The residual stream after all layers, (B, S, H).

    ``attend`` and ``mix`` supply what depends on the past: which keys a query sees, and from which state Mamba
    continues. With ``modulation`` the layers are adaptive, see :meth:`Layer.forward`. ``wanted`` are the only positions
    needed: layers after the last that mixes positions (M, *) compute only these.
    """
    num_mixing = 1 + max(tower.config.pattern.rfind(kind) for kind in "M*")
    mixed_BSH: Tensor | None = None
    gate_B1H: Tensor | None = None
    for index, layer in enumerate(cast(Iterable[Layer], tower.layers)):
        if wanted is not None and index == num_mixing:
            x_BSH, mixed_BSH = wanted(x_BSH), None if mixed_BSH is None else wanted(mixed_BSH)
        shift, gain, gate = (None, None, None) if modulation is None else modulation(index)
        x_BSH, normed_BSH = layer(x_BSH, mixed_BSH, gate_B1H, shift, gain)
        mixed_BSH, gate_B1H = _mixed(layer, index, normed_BSH, attend, mix), gate
    if mixed_BSH is not None:
        x_BSH = x_BSH + (mixed_BSH if gate_B1H is None else gate_B1H * mixed_BSH)
    return wanted(x_BSH) if wanted is not None and num_mixing == len(tower.layers) else x_BSH


Modulation = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # layer -> shift, 1 + scale, gate, each (B, 1, H)


def _mixed(layer: Layer, index: int, x_BSH: Tensor, attend: Attend, mix: Mix) -> Tensor:
    mixer = layer.mixer
    if isinstance(mixer, Mamba):
        return mix(index, mixer, x_BSH)
    if isinstance(mixer, Attention):
        return mixer.finish(attend(index, *mixer.project(x_BSH)))
    out: Tensor = mixer(x_BSH)
    return out


@torch.no_grad()
def initialise(tower: Tower, generator: torch.Generator) -> None:
    """Random weights for a tower to be trained: normal(0, initializer_range), outputs shrunk with depth, Mamba's
    step sizes log-uniform between ``time_step_min`` and ``time_step_max`` (arXiv 2312.00752, section 3.6)."""
    config = tower.config
    for name, parameter in tower.named_parameters():
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            parameter.fill_(1.0)
        elif name.endswith("A_log"):
            parameter.copy_(torch.arange(1, config.mamba_num_heads + 1).log())
        elif name.endswith("dt_bias"):
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            step = torch.empty_like(parameter).uniform_(low, high, generator=generator).exp()
            step = step.clamp(min=config.time_step_floor)
            parameter.copy_(step + torch.log(-torch.expm1(-step)))
        elif name.endswith(("conv1d.bias", "e_score_correction_bias")):
            parameter.zero_()
        elif name.endswith("conv1d.weight"):
            bound = 1 / math.sqrt(config.conv_kernel)
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            out = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts_down_EHI"))
            shrink = math.sqrt(len(config.pattern)) if out else 1.0
            parameter.normal_(0.0, config.initializer_range / shrink, generator=generator)
