"""The released config.json as a checked record. Fields that the released model ignores are ignored here too."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from twotower_eval.engine.ops.moe import Routing
from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject

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
        """What the router needs to know."""
        return Routing(
            experts_per_token=self.num_experts_per_tok,
            num_groups=self.n_group,
            top_groups=self.topk_group,
            normalise=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
        )


def parse_config(data: JsonObject) -> NemotronHConfig:
    """Check a ``config.json`` and keep what the model needs; UserError says what is wrong and with which field."""
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
    """The config with a layer pattern, made from ``layers_block_type`` where it has only that."""
    kinds = data.get("layers_block_type")
    if data.get("hybrid_override_pattern") is not None or kinds is None:
        return data
    named: list[Any] = kinds if isinstance(kinds, list) else [kinds]
    unknown = [kind for kind in named if kind not in LAYER_TYPES]
    if unknown:
        raise UserError(f"config.json: unknown layers_block_type {unknown[0]!r}; known are {', '.join(LAYER_TYPES)}")
    return {**data, "hybrid_override_pattern": "".join(LAYER_TYPES[kind] for kind in named)}


def as_ids(file: str, value: object) -> tuple[int, ...]:
    """The EOS ids that a file's ``eos_token_id`` names: none, one or several."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise UserError(f"{file}: eos_token_id must be a token id or a list of them, not {value!r}")
    return ids


def _as_interval(value: object) -> tuple[float, float]:
    """Two numbers; infinity has no JSON number, so that they may be texts, or ``{"__float__": "Infinity"}``."""
    ends = [v.get("__float__") if isinstance(v, dict) else v for v in value] if isinstance(value, list) else []
    try:
        low, high = (float(v) for v in ends if isinstance(v, int | float | str) and not isinstance(v, bool))
    except ValueError:
        low, high = math.nan, math.nan
    if len(ends) != 2 or not low <= high:
        raise UserError(f"config.json: time_step_limit must be an interval [low, high], not {value!r}")
    return low, high


def _check_type(name: str, value: object, wanted: str) -> None:
    """JSON gives numbers, texts and true or false; ``wanted`` is a field's annotation."""
    if wanted.startswith("tuple"):
        return  # made above
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    kind = wanted.removesuffix(" | None")
    fits = isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool))
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
        raise UserError(f"config.json: {name} must be {words[kind]}, not {value!r}")


def _check(config: NemotronHConfig, data: JsonObject) -> None:
    """Refuse what we would otherwise compute wrongly."""
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
