"""The released config.json as a checked record, and the bytes and arithmetic of a tower computed from it.

Fields that the released model ignores are ignored here too.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from twotower_eval.engine.ops.moe import Routing
from twotower_eval.errors import UserError
from twotower_eval.records import Routing as RoutingKind
from twotower_eval.strict import JsonObject

SINUSOID_SIZE = 256  # of the mask fraction, whatever the config says
LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "MLP"}
LAYER_TYPES = {  # as configs written by transformers 5 spell them, in layers_block_type
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}
UNSUPPORTED = (  # true, or anything else but 0 and null, means another model
    "attention_bias",
    "mlp_bias",
    "use_bias",
    "mamba_proj_bias",
    "tie_word_embeddings",
    "sliding_window",
    "moe_latent_size",
)
DEFAULT_MASK_TOKEN_ID = 3  # absent in the released config; 3 by convention


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig:
    """Sizes of one tower. Names are those of the released ``config.json``; both towers of a pair share them."""

    hybrid_override_pattern: str
    hidden_size: int
    vocab_size: int
    layer_norm_epsilon: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int
    intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    residual_in_fp32: bool = False
    use_conv_bias: bool = True
    time_step_limit: tuple[float, float] | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    initializer_range: float = 0.02
    max_position_embeddings: int | None = None
    mask_token_id: int = DEFAULT_MASK_TOKEN_ID
    eos_token_id: tuple[int, ...] = ()

    @property
    def pattern(self) -> str:
        """One letter per layer: M, *, E or -."""
        return self.hybrid_override_pattern

    @property
    def mamba_inner_size(self) -> int:
        """di = heads x head dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """di + 2 x groups x state size."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def routing(self) -> Routing:
        """The router's settings."""
        return Routing(
            experts_per_token=self.num_experts_per_tok,
            num_groups=self.n_group,
            top_groups=self.topk_group,
            normalise=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
        )


def parse_config(data: JsonObject) -> NemotronHConfig:
    """Check a ``config.json`` and keep what the model needs; UserError names the field and what is wrong."""
    if data.get("model_type") != "nemotron_h":
        raise UserError(f"config.json: model_type is {data.get('model_type')!r}, expected 'nemotron_h'")
    data = _with_pattern(data)
    names = {f.name: f for f in dataclasses.fields(NemotronHConfig)}
    required = [name for name, f in names.items() if f.default is dataclasses.MISSING]
    missing = [name for name in required if data.get(name) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    values: dict[str, Any] = {name: data[name] for name in names if data.get(name) is not None}
    if "time_step_limit" in values:
        values["time_step_limit"] = _as_interval(values["time_step_limit"])
    values["eos_token_id"] = as_ids("config.json", data.get("eos_token_id"))
    for name, value in values.items():
        _check_type(name, value, str(names[name].type))
    config = NemotronHConfig(**values)
    _check(config, data)
    return config


def _with_pattern(data: JsonObject) -> JsonObject:
    """The config with a layer pattern, derived from ``layers_block_type`` if it has only that."""
    kinds = data.get("layers_block_type")
    if data.get("hybrid_override_pattern") is not None or kinds is None:
        return data
    named: list[Any] = kinds if isinstance(kinds, list) else [kinds]
    unknown = [kind for kind in named if kind not in LAYER_TYPES]
    if unknown:
        raise UserError(f"config.json: unknown layers_block_type {unknown[0]!r}; known are {', '.join(LAYER_TYPES)}")
    return {**data, "hybrid_override_pattern": "".join(LAYER_TYPES[kind] for kind in named)}


def as_ids(file: str, value: object) -> tuple[int, ...]:
    """The EOS ids in a file's ``eos_token_id``: none, one or several."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise UserError(f"{file}: eos_token_id must be a token id or a list of them, not {value!r}")
    return ids


def _as_interval(value: object) -> tuple[float, float]:
    """Two numbers, which may be texts or ``{"__float__": "Infinity"}``, as JSON has no infinity."""
    ends = [v.get("__float__") if isinstance(v, dict) else v for v in value] if isinstance(value, list) else []
    try:
        low, high = (float(v) for v in ends if isinstance(v, int | float | str) and not isinstance(v, bool))
    except ValueError:
        low, high = math.nan, math.nan
    if len(ends) != 2 or not low <= high:
        raise UserError(f"config.json: time_step_limit must be an interval [low, high], not {value!r}")
    return low, high


def _check_type(name: str, value: object, wanted: str) -> None:
    """UserError unless a JSON value fits ``wanted``, the annotation of its field."""
    if wanted.startswith("tuple"):
        return  # made above
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    kind = wanted.removesuffix(" | None")
    fits = isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool))
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
        raise UserError(f"config.json: {name} must be {words[kind]}, not {value!r}")


def _check(config: NemotronHConfig, data: JsonObject) -> None:
    """UserError for settings that would be computed wrongly here."""
    unknown = sorted(set(config.pattern) - set(LAYER_KINDS))
    if unknown:
        raise UserError(
            f"config.json: unknown layer letter {unknown[0]!r} in hybrid_override_pattern; known are "
            + ", ".join(f"{letter} ({kind})" for letter, kind in LAYER_KINDS.items())
        )
    num_layers = data.get("num_hidden_layers", len(config.pattern))
    if num_layers != len(config.pattern) or not config.pattern:
        raise UserError(f"config.json: num_hidden_layers is {num_layers}, but the pattern has {len(config.pattern)}")
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise UserError(f"config.json: mask_token_id {config.mask_token_id} is outside vocab_size {config.vocab_size}")
    for name in UNSUPPORTED:
        if data.get(name):
            raise UserError(f"config.json: {name} = {data[name]!r} is not part of the released model; not supported")
    if data.get("mlp_hidden_act", "relu2") != "relu2" or data.get("mamba_hidden_act", "silu") != "silu":
        raise UserError("config.json: only mlp_hidden_act = relu2 and mamba_hidden_act = silu are supported")
    if config.layer_norm_epsilon < 0:
        raise UserError(f"config.json: layer_norm_epsilon must not be negative, as {config.layer_norm_epsilon} is")
    _check_sizes(config)


def _check_sizes(config: NemotronHConfig) -> None:
    experts = (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    )
    needed = {"E": experts, "-": ("intermediate_size",)}
    always: tuple[str, ...] = (
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "mamba_num_heads",
    )
    always += ("mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "n_group", "topk_group")
    for name in always + tuple(n for letter, names in needed.items() if letter in config.pattern for n in names):
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"config.json: {name} must be a positive whole number, not {value!r}")
    pairs = (
        ("num_attention_heads", "num_key_value_heads"),
        ("mamba_num_heads", "n_groups"),
        *((("n_routed_experts", "n_group"),) if "E" in config.pattern else ()),
    )
    for whole, part in pairs:
        if getattr(config, whole) % getattr(config, part):
            raise UserError(f"config.json: {whole} {getattr(config, whole)} is no multiple of {part}")
    if "E" in config.pattern and config.num_experts_per_tok > config.n_routed_experts:
        raise UserError("config.json: num_experts_per_tok exceeds n_routed_experts")
    if "E" in config.pattern and config.topk_group > config.n_group:
        raise UserError("config.json: topk_group exceeds n_group")


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
    """Bytes of a pair; with shared towers only the second head is added."""
    tower = tower_bytes(config, element_bytes)
    second = config.vocab_size * config.hidden_size * element_bytes if share_towers else tower
    return tower + second + time_parameters(config) * element_bytes


def key_value_bytes(config: NemotronHConfig, element_bytes: int) -> int:
    """Bytes of keys and values per token and row, all layers."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * element_bytes
    return config.pattern.count("*") * per_layer


def state_bytes(config: NemotronHConfig, element_bytes: int) -> int:
    """Bytes of Mamba states per row, all layers: float32 scan states, convolution inputs in the model's dtype."""
    scan = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * FLOAT32_BYTES
    convolution = config.conv_channels * config.conv_kernel * element_bytes
    return config.pattern.count("M") * (scan + convolution)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One repetition of a part of decoding: B rows of S new tokens each, after T tokens of context."""

    part: Part
    batch_size: int
    num_tokens: int
    context_tokens: int
    routing: RoutingKind


def touched_experts(step: Step, config: NemotronHConfig) -> float:
    """Expected number of distinct experts per layer that the step reads."""
    chosen = (config.num_experts_per_tok, config.n_routed_experts)
    return expected_touched(step.routing, step.batch_size, step.num_tokens, *chosen)


def num_common(kind: RoutingKind, experts_per_token: int) -> int:
    """Number of a token's experts that all tokens of its row share."""
    return {"shared": experts_per_token, "half": experts_per_token // 2, "independent": 0}[kind]


def expected_touched(
    kind: RoutingKind, batch_size: int, num_tokens: int, experts_per_token: int, num_experts: int
) -> float:
    """Expected number of distinct experts per layer if B rows of S tokens choose at random within the routing.

    Each expert has the same chance to be missed: by a row's common set, then by each token's own choice among the rest.
    """
    common = num_common(kind, experts_per_token)
    missed = 1 - common / num_experts
    if common < experts_per_token:
        missed *= (1 - (experts_per_token - common) / (num_experts - common)) ** num_tokens
    return float(num_experts * (1 - missed**batch_size))


def step_bytes(step: Step, config: NemotronHConfig, element_bytes: int) -> float:
    """Bytes of weights, keys, values and states that the step must read, and of states that it must write."""
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
    """FLOPs of the step's matrix products, scan and attention."""
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
