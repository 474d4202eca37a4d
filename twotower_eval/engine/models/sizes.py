"""Bytes and arithmetic of a tower from its config alone: what a step must at least read and compute.

Lower bounds: activations, logits and whatever a kernel reads twice are left out. Letters as in ops/__init__.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twotower_eval.engine.models.config import SINUSOID_SIZE, NemotronHConfig
from twotower_eval.records import Routing

Part = Literal["prefill", "ar_step", "denoise", "context_pass"]
FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """Parameters of one layer: those that every token reads, float32 ones apart, and those of a single expert."""

    always: int
    always_float32: int = 0
    per_expert: int = 0


def layer_size(kind: str, config: NemotronHConfig) -> LayerSize:
    """Parameters of a layer of the given letter, its norm included."""
    hidden, inner, channels = config.hidden_size, config.mamba_inner_size, config.conv_channels
    if kind == "M":
        projections = hidden * (inner + channels + config.mamba_num_heads) + inner * hidden
        convolution = channels * (config.conv_kernel + config.use_conv_bias)
        return LayerSize(always=hidden + projections + convolution + 3 * config.mamba_num_heads + inner)
    if kind == "*":
        width = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        return LayerSize(always=hidden + hidden * width)
    if kind == "E":
        return LayerSize(
            always=hidden + 2 * hidden * config.moe_shared_expert_intermediate_size,
            always_float32=config.n_routed_experts * (hidden + 1),
            per_expert=2 * hidden * config.moe_intermediate_size,
        )
    return LayerSize(always=hidden + 2 * hidden * config.intermediate_size)


def tower_bytes(config: NemotronHConfig, element_bytes: int) -> int:
    """All weights of one tower with its embeddings and its head."""
    total = (2 * config.vocab_size + 1) * config.hidden_size * element_bytes
    for kind in config.pattern:
        size = layer_size(kind, config)
        experts = config.n_routed_experts * size.per_expert
        total += (size.always + experts) * element_bytes + size.always_float32 * FLOAT32_BYTES
    return total


def time_parameters(config: NemotronHConfig) -> int:
    """Parameters of the time modules and of one table per layer."""
    hidden = config.hidden_size
    embedder = hidden * (SINUSOID_SIZE + 1) + hidden * (hidden + 1)
    return embedder + 3 * hidden * (hidden + 1) + 3 * hidden * len(config.pattern)


def pair_bytes(config: NemotronHConfig, element_bytes: int, *, share_towers: bool) -> int:
    """All weights of a pair; with one set of layers and embeddings for both towers only the second head is added."""
    tower = tower_bytes(config, element_bytes)
    second = config.vocab_size * config.hidden_size * element_bytes if share_towers else tower
    return tower + second + time_parameters(config) * element_bytes


def key_value_bytes(config: NemotronHConfig, element_bytes: int) -> int:
    """Keys and values of one token of one row, all layers."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * element_bytes
    return config.pattern.count("*") * per_layer


def state_bytes(config: NemotronHConfig, element_bytes: int) -> int:
    """Mamba states of one row, all layers: float32 scan states, convolution inputs in the model's dtype."""
    scan = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * FLOAT32_BYTES
    convolution = config.conv_channels * config.conv_kernel * element_bytes
    return config.pattern.count("M") * (scan + convolution)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One repetition of a part of decoding: B rows of S new tokens each behind T tokens of context."""

    part: Part
    batch_size: int
    num_tokens: int
    context_tokens: int
    routing: Routing


def touched_experts(step: Step, config: NemotronHConfig) -> float:
    """Distinct experts per layer that the step is expected to read."""
    chosen = (config.num_experts_per_tok, config.n_routed_experts)
    return expected_touched(step.routing, step.batch_size, step.num_tokens, *chosen)


def num_common(kind: Routing, experts_per_token: int) -> int:
    """Experts of a token that all tokens of its row take."""
    return {"shared": experts_per_token, "half": experts_per_token // 2, "independent": 0}[kind]


def expected_touched(
    kind: Routing, batch_size: int, num_tokens: int, experts_per_token: int, num_experts: int
) -> float:
    """Distinct experts per layer to be expected where B rows of S tokens choose at random within the routing: each
    expert is missed with the same chance, by a row's common set first, then by each token's own among the rest."""
    common = num_common(kind, experts_per_token)
    missed = 1 - common / num_experts
    if common < experts_per_token:
        missed *= (1 - (experts_per_token - common) / (num_experts - common)) ** num_tokens
    return float(num_experts * (1 - missed**batch_size))


def step_bytes(step: Step, config: NemotronHConfig, element_bytes: int) -> float:
    """Weights, keys, values and states that the step must read, and states that it must write."""
    touched = touched_experts(step, config) if "E" in config.pattern else 0.0
    total = 0.0 if step.part == "context_pass" else config.vocab_size * config.hidden_size * element_bytes
    for kind in config.pattern:
        size = layer_size(kind, config)
        total += (size.always + touched * size.per_expert) * element_bytes + size.always_float32 * FLOAT32_BYTES
    if step.part == "denoise":
        total += time_parameters(config) * element_bytes
    passes = 1 if step.part == "denoise" else 2  # the denoiser reads states, the context tower writes them too
    total += step.batch_size * step.context_tokens * key_value_bytes(config, element_bytes)
    return total + passes * step.batch_size * state_bytes(config, element_bytes)


def step_flops(step: Step, config: NemotronHConfig) -> float:
    """Additions and multiplications of the step's matrix products, scan and attention."""
    with_head = {"prefill": 1, "ar_step": 1, "denoise": step.num_tokens, "context_pass": 0}[step.part]
    total = 2.0 * with_head * config.vocab_size * config.hidden_size
    scan = 6 * config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    in_block = step.num_tokens if step.part == "denoise" else (step.num_tokens + 1) / 2  # causal: half of it, the mean
    seen = step.context_tokens + in_block
    look = 4 * config.num_attention_heads * config.head_dim * seen
    for kind in config.pattern:
        size = layer_size(kind, config)
        active = size.always + size.always_float32 + config.num_experts_per_tok * size.per_expert
        total += step.num_tokens * (2 * active + {"M": scan, "*": look}.get(kind, 0))
    return step.batch_size * total
