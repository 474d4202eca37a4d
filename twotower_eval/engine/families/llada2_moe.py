"""LLaDA2: a mixture of experts whose tokens see their own block and all earlier ones (inclusionAI, LLaDA2.0). Logits at
p predict the token at p.

In plain torch under the checkpoint's own names. Shape letters: B rows, S new tokens, T key columns, N query heads, J
key-value heads, D head dim, H hidden, E experts, C chosen experts, M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from twotower_eval.engine.families.backbone import Backbone, Past, not_blind
from twotower_eval.engine.families.blocks import BlockModel
from twotower_eval.engine.families.settings import identify, mask_token, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole
from twotower_eval.errors import FileError
from twotower_eval.strict import JsonObject

MASK_TOKEN_ID, EOS_TOKEN_ID = 156895, 156892  # of the published checkpoints
BLOCK_LENGTH = 32  # of the published sampler


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the network, by the names of a config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    routed_scaling_factor: float = 1.0
    partial_rotary_factor: float = 1.0
    rope_theta: float = 600000.0
    rms_norm_eps: float = 1e-6
    use_qkv_bias: bool = False
    use_bias: bool = False
    use_qk_norm: bool = True
    moe_router_enable_expert_bias: bool = True

    @classmethod
    def read(cls, folder: Path, config: JsonObject) -> Settings:
        """FileError for what is missing, wrong, or would make another network."""
        for name, known in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("rope_scaling", None)):
            if config.get(name, known) != known:
                raise FileError(
                    f"{folder}: config.json has {name} {config[name]!r}; LLaDA2 is known with {known!r} only"
                )
        derived = {"head_dim": whole_number(folder, config, "hidden_size")}
        derived["head_dim"] //= max(1, whole_number(folder, config, "num_attention_heads"))
        found: dict[str, Any] = {}
        for each in fields(cls):
            if each.type == "int":
                default = derived.get(each.name, each.default if isinstance(each.default, int) else None)
                found[each.name] = whole_number(folder, config, each.name, default=default)
            elif config.get(each.name) is not None:
                found[each.name] = config[each.name]
        return cls(**found)


class MLP(nn.Module):
    """SiLU-gated, of one expert, of the shared ones, or dense."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, hidden_MH: Tensor) -> Tensor:
        """(M, H)."""
        out_MH: Tensor = self.down_proj(silu(self.gate_proj(hidden_MH)) * self.up_proj(hidden_MH))
        return out_MH


class Router(nn.Module):
    """Which experts read a token. Scores are sigmoids; a bias takes part in the choice alone."""

    expert_bias: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(settings.num_experts, settings.hidden_size))
        if settings.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(settings.num_experts))

    def forward(self, hidden_MH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts (M, C), their weights (M, C) float32, and the router's logits (M, E) float32."""
        logits_ME = linear(hidden_MH.float(), self.weight.float())
        scores_ME = logits_ME.sigmoid()
        bias_E = self.expert_bias.float() if self.settings.moe_router_enable_expert_bias else 0.0
        chosen_MC = chosen_experts(scores_ME + bias_E, self.settings)
        weights_MC = scores_ME.gather(1, chosen_MC)
        if self.settings.num_experts_per_tok > 1:
            weights_MC = weights_MC / (weights_MC.sum(1, keepdim=True) + 1e-20)
        return chosen_MC, weights_MC * self.settings.routed_scaling_factor, logits_ME


def chosen_experts(choice_ME: Tensor, settings: Settings) -> Tensor:
    """The best experts (M, C) of the best groups, whose score is the sum of their two largest."""
    num_tokens, groups = len(choice_ME), settings.n_group
    grouped_MGe = choice_ME.view(num_tokens, groups, -1)
    score_MG = grouped_MGe.topk(min(2, grouped_MGe.shape[2]), dim=2).values.sum(2)
    best_Mg = score_MG.topk(settings.topk_group, dim=1).indices
    open_MG = torch.zeros_like(score_MG, dtype=torch.bool).scatter(1, best_Mg, torch.ones_like(best_Mg).bool())
    open_ME = open_MG[:, :, None].expand_as(grouped_MGe).reshape(num_tokens, -1)
    return choice_ME.masked_fill(~open_ME, -torch.inf).topk(settings.num_experts_per_tok, dim=1).indices


class Experts(nn.Module):
    """Routed experts, and those that read every token."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        inner = settings.moe_intermediate_size
        self.gate = Router(settings)
        self.experts = nn.ModuleList(MLP(settings.hidden_size, inner) for _ in range(settings.num_experts))
        self.shared_experts = MLP(settings.hidden_size, inner * settings.num_shared_experts)

    def forward(self, hidden_MH: Tensor) -> Tensor:
        """(M, H)."""
        chosen_MC, weights_MC, _ = self.gate(hidden_MH)
        out_MH = torch.zeros_like(hidden_MH, dtype=torch.float32)
        for expert in chosen_MC.unique().tolist():
            token_n, place_n = (chosen_MC == expert).nonzero(as_tuple=True)
            made_nH = self.experts[expert](hidden_MH[token_n]).float() * weights_MC[token_n, place_n, None]
            out_MH.index_add_(0, token_n, made_nH)
        shared_MH: Tensor = self.shared_experts(hidden_MH)
        return out_MH.to(hidden_MH.dtype) + shared_MH


class Attention(nn.Module):
    """Grouped queries; part of every head is rotated."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        heads, kv_heads, dim = settings.num_attention_heads, settings.num_key_value_heads, settings.head_dim
        self.query_key_value = nn.Linear(settings.hidden_size, (heads + 2 * kv_heads) * dim, bias=settings.use_qkv_bias)
        self.dense = nn.Linear(heads * dim, settings.hidden_size, bias=settings.use_bias)
        if settings.use_qk_norm:
            self.query_layernorm = nn.RMSNorm(dim, eps=settings.rms_norm_eps)
            self.key_layernorm = nn.RMSNorm(dim, eps=settings.rms_norm_eps)

    def forward(
        self, hidden_BSH: Tensor, turn: tuple[Tensor, Tensor], visible_B1ST: Tensor, held: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H), and the keys and values of all columns."""
        own, rows = self.settings, hidden_BSH.shape[:2]
        sizes = [own.num_attention_heads, own.num_key_value_heads, own.num_key_value_heads]
        fused_BSAD = self.query_key_value(hidden_BSH).view(*rows, sum(sizes), own.head_dim)
        query_BSND, key_BSJD, value_BSJD = fused_BSAD.split(sizes, dim=2)
        if own.use_qk_norm:
            query_BSND, key_BSJD = self.query_layernorm(query_BSND), self.key_layernorm(key_BSJD)
        query_BNSD, key_BJSD = (turned(part.transpose(1, 2), turn) for part in (query_BSND, key_BSJD))
        key_BJTD = torch.cat([held[0], key_BJSD], dim=2)
        value_BJTD = torch.cat([held[1], value_BSJD.transpose(1, 2)], dim=2)
        each = own.num_attention_heads // own.num_key_value_heads
        key_BNTD, value_BNTD = (part.repeat_interleave(each, dim=1) for part in (key_BJTD, value_BJTD))
        seen_BNSD = scaled_dot_product_attention(query_BNSD, key_BNTD, value_BNTD, attn_mask=visible_B1ST)
        return self.dense(seen_BNSD.transpose(1, 2).reshape(*rows, -1)), key_BJTD, value_BJTD


def turned(part_BASD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """The first dims of every head rotated in halves, the rest as they are."""
    cos_B1SR, sin_B1SR = turn
    width = cos_B1SR.shape[-1]
    turning, rest = part_BASD[..., :width], part_BASD[..., width:]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos_B1SR + torch.cat([-second, first], dim=-1) * sin_B1SR, rest], dim=-1)


class Layer(nn.Module):
    """Attention, then experts or a dense MLP."""

    def __init__(self, settings: Settings, number: int) -> None:
        super().__init__()
        hidden, eps = settings.hidden_size, settings.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.attention = Attention(settings)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        dense = number < settings.first_k_dense_replace
        self.mlp = MLP(hidden, settings.intermediate_size) if dense else Experts(settings)

    def forward(
        self, hidden_BSH: Tensor, turn: tuple[Tensor, Tensor], visible_B1ST: Tensor, held: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H), and the keys and values of all columns."""
        seen_BSH, keys, values = self.attention(self.input_layernorm(hidden_BSH), turn, visible_B1ST, held)
        hidden_BSH = hidden_BSH + seen_BSH
        made_MH = self.mlp(self.post_attention_layernorm(hidden_BSH).flatten(0, 1))
        return hidden_BSH + made_MH.view_as(hidden_BSH), keys, values


class Layers(nn.Module):
    """All below the head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(Layer(settings, number) for number in range(settings.num_hidden_layers))
        self.norm = nn.RMSNorm(settings.hidden_size, eps=settings.rms_norm_eps)


class Network(nn.Module):
    """The whole; ``config`` holds the settings."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.config = settings
        self.model = Layers(settings)
        self.lm_head = nn.Linear(settings.hidden_size, settings.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, by transformers' name of the method."""
        return self.lm_head


class MoEBackbone(Backbone):
    """As transformers' backbones are read, for this network."""

    def __init__(self, network: Network) -> None:
        super().__init__(cast(Any, network))

    def states(
        self, ids_BS: Tensor, positions_BS: Tensor, visible_BST: Tensor, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        """See the base."""
        device, network = self.device, self.inner
        past = Past.nothing(len(ids_BS), self) if past is None else past
        hidden_BSH = network.model.word_embeddings(ids_BS.to(device))
        visible_B1ST = not_blind(visible_BST).to(device)[:, None]
        turn = _turn(network.config, positions_BS.to(device), hidden_BSH.dtype)
        keys, values = [], []
        for layer, held in zip(network.model.layers, zip(past.keys, past.values, strict=True), strict=True):
            hidden_BSH, key_BJTD, value_BJTD = layer(hidden_BSH, turn, visible_B1ST, held)
            keys.append(key_BJTD)
            values.append(value_BJTD)
        return network.model.norm(hidden_BSH), Past(tuple(keys), tuple(values))

    def logits(
        self, ids_BS: Tensor, positions_BS: Tensor, visible_BSS: Tensor, *, places_BM: Tensor | None = None
    ) -> Tensor:
        """See the base."""
        return self.read(ids_BS, positions_BS, visible_BSS, places_BM=places_BM)[0]


def _turn(settings: Settings, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    width = int(settings.head_dim * settings.partial_rotary_factor)
    places = torch.arange(0, width, 2, device=positions_BS.device).float()
    speed_r = 1.0 / (settings.rope_theta ** (places / width))
    angle_B1SR = (positions_BS[:, None, :, None].float() * speed_r).repeat(1, 1, 1, 2)
    return angle_B1SR.cos().to(dtype), angle_B1SR.sin().to(dtype)


class LLaDA2(BlockModel):
    """The network behind an exact cache. ``block_size`` is the sampler's: no checkpoint names one."""

    block_size = BLOCK_LENGTH


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> LLaDA2:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    config = read_json(folder / "config.json")
    settings = Settings.read(folder, config)
    tensors, checkpoint = read_whole(folder, family="llada2_moe", dtype=dtype, devices=devices[:1])
    with torch.device("meta"):
        network = Network(settings)
    try:
        network.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise FileError(
            f"{folder}: checkpoint does not fit its config.json ({' '.join(str(error).split())[:300]})"
        ) from error
    model = identify(
        LLaDA2(MoEBackbone(network.to(devices[0]).eval().requires_grad_(False))),
        folder,
        config,
        checkpoint,
        vocab_size=settings.vocab_size,
        max_length=whole_number(folder, config, "max_position_embeddings"),
        mask_token_id=mask_token(folder, config, vocab_size=settings.vocab_size, published=MASK_TOKEN_ID),
    )
    if not model.eos_token_ids and settings.vocab_size > EOS_TOKEN_ID:
        model.eos_token_ids = (EOS_TOKEN_ID,)
    return model
