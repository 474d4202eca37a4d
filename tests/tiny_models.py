"""Two-tower models of random weights, small enough for property tests, and a model whose denoiser follows a script."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower_eval.engine.models.checkpoint import build
from twotower_eval.engine.models.config import NemotronHConfig, parse_config
from twotower_eval.engine.models.nemotron_h import initialise
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.records import Checkpoint

VOCAB = 40
SIZES = {
    "model_type": "nemotron_h",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "layer_norm_epsilon": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "conv_kernel": 4,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.25,
    "time_step_min": 0.02,  # states that matter after a few tokens, so that masked positions differ from each other
    "time_step_max": 0.3,
    "mask_token_id": 3,
}
# Name -> what differs from SIZES: every layer kind alone or mixed, groups dropped by the router, other head sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "all kinds": {"hybrid_override_pattern": "ME*-M"},
    "mostly attention": {"hybrid_override_pattern": "*M-*", "num_key_value_heads": 1, "head_dim": 12},
    "mamba only": {"hybrid_override_pattern": "MM", "n_groups": 1, "conv_kernel": 2, "mask_token_id": 39},
    "router groups": {
        "hybrid_override_pattern": "E*ME",
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "time_step_limit": [0.01, 0.2],
        "mask_token_id": 0,
        "residual_in_fp32": True,
        "mamba_head_dim": 6,
        "n_groups": 4,
    },
}


def tiny_config(name: str = "all kinds", **changes: Any) -> NemotronHConfig:
    """The checked config of an architecture."""
    return parse_config({**SIZES, **ARCHITECTURES[name], **changes})


@functools.cache
@torch.inference_mode(False)
def tiny_pair(name: str = "all kinds", dtype: torch.dtype = torch.float32) -> TwoTower:
    """A pair of random weights, time modules and tables too. Shared: do not change it."""
    config = tiny_config(name)
    model = build(config, "pair", torch.float32, ("cpu",))
    assert isinstance(model, TwoTower)
    randomise(model, torch.Generator().manual_seed(len(name)))
    if dtype != torch.float32:
        narrow = build(config, "pair", dtype, ("cpu",))
        narrow.load_state_dict(model.state_dict())
        model = narrow
    assert isinstance(model, TwoTower)
    model.vocab_size, model.mask_token_id, model.has_denoiser = config.vocab_size, config.mask_token_id, True
    tower = model.context_tower
    tower.vocab_size, tower.mask_token_id = config.vocab_size, None
    for part in (model, tower):
        part.checkpoint = Checkpoint(
            name=name, family="nemotron_h", source="", digest=name, dtype=str(dtype), devices=("cpu",)
        )
    return model


@torch.no_grad()
def randomise(model: TwoTower, generator: torch.Generator) -> None:
    """Fill all weights so that tokens, layers, time and router biases all matter."""
    for tower in (model.context_tower.tower, model.denoiser.tower):
        initialise(tower, generator)
        for parameter_name, parameter in tower.named_parameters():
            if parameter_name.endswith("embeddings.weight"):
                parameter.normal_(0.0, 1.0, generator=generator)
            elif parameter_name.endswith("e_score_correction_bias"):
                parameter.normal_(-0.3, 0.3, generator=generator)
            elif parameter_name.endswith("conv1d.bias"):
                parameter.normal_(0.0, 0.2, generator=generator)
            elif parameter_name.endswith("mixer.D"):
                parameter.normal_(0.0, 0.3, generator=generator)
    for head in (model.context_tower.head, model.denoiser.head):
        head.weight.normal_(0.0, 0.4, generator=generator)
    for parameter in [*model.denoiser.t_embedder.parameters(), *model.denoiser.t_block.parameters()]:
        parameter.normal_(0.0, 0.15, generator=generator)
    for table in model.denoiser.scale_shift_tables:
        table.normal_(0.0, 0.1, generator=generator)
        table[2] += 1.0  # gates open


@dataclass(frozen=True)
class ScriptedContext:
    """Lengths only."""

    lengths: tuple[int, ...]

    def select(self, rows: Sequence[int]) -> "ScriptedContext":
        return ScriptedContext(tuple(self.lengths[row] for row in rows))


class Scripted:
    """A model of one row whose denoiser answers ``script(block index, step) -> logits (K, V)``; counts its calls."""

    tokenizer: Any = None
    has_denoiser = True
    joins_contexts = True
    vocab_size = 10
    mask_token_id = 9

    def __init__(self, script: Callable[[int, int], Tensor]) -> None:
        self.script = script
        self.block, self.step = -1, 0
        self.calls: list[str] = []

    def prefill(self, ids_BS: Tensor, lengths_B: Any = None) -> ScriptedContext:
        self.calls.append("prefill")
        return ScriptedContext((ids_BS.shape[1],) * ids_BS.shape[0])

    def extend(self, context: ScriptedContext, ids_BK: Tensor) -> ScriptedContext:
        self.calls.append("extend")
        return ScriptedContext(tuple(length + ids_BK.shape[1] for length in context.lengths))

    def denoise(self, block_BK: Tensor, context: ScriptedContext, t_B: Any) -> Tensor:
        self.calls.append("denoise")
        fresh = bool((block_BK == self.mask_token_id).all())
        self.block, self.step = (self.block + 1, 0) if fresh else (self.block, self.step + 1)
        return self.script(self.block, self.step)[None].clone()


class Pieces:
    """A tokenizer that knows only how ids are written: text is the pieces put together; an empty piece is special."""

    eos_token_id = bos_token_id = None
    special_token_ids: frozenset[int] = frozenset()
    name = "pieces"

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.pieces.index(letter) for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.pieces[token] for token in token_ids)

    def decode_with_special(self, token_ids: Sequence[int]) -> str:
        return self.decode(token_ids)
