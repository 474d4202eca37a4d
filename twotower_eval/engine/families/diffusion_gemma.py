"""DiffusionGemma: an encoder that fills a cache and a denoiser that reads it, one set of weights (transformers' own
class). Logits at p predict the token at p.

The encoder is causal. The denoiser's canvas sees itself and the cache, of which layers with a sliding window see the
last tokens alone; it has no mask token, so that a canvas holds random tokens where nothing is known, and it is told the
logits of the step before. Only text goes in. Shape letters: B rows, S new tokens, T columns, K canvas, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from twotower_eval.engine.families.backbone import Past, load_inner, not_blind
from twotower_eval.engine.families.blocks import NOBODY
from twotower_eval.engine.families.settings import identify, whole_number
from twotower_eval.engine.models.base import LanguageModel
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole
from twotower_eval.engine.models.transformers_ar import LOAD_ERRORS
from twotower_eval.engine.models.transformers_ar import _quiet as quiet
from twotower_eval.engine.models.transformers_types import CausalLM, Config
from twotower_eval.errors import FileError, UserError


@dataclass(frozen=True)
class CacheContext:
    """What was read of B rows: keys and values of all columns in all layers, and every column's position (B, T)."""

    past: Past
    position_BT: Tensor
    lengths: tuple[int, ...]

    def select(self, rows: Sequence[int]) -> Self:
        """Some rows, in that order."""
        chosen = list(rows)
        lengths = tuple(self.lengths[row] for row in chosen)
        return type(self)(self.past.select(chosen), self.position_BT[chosen], lengths)

    def join(self, other: Self) -> Self:
        """These rows, then the other's."""
        width = max(self.position_BT.shape[1], other.position_BT.shape[1])
        position_BT = torch.cat([_wide(self.position_BT, width), _wide(other.position_BT, width)])
        return type(self)(self.past.joined(other.past), position_BT, self.lengths + other.lengths)


def _wide(position_BT: Tensor, width: int) -> Tensor:
    return nn.functional.pad(position_BT, (0, width - position_BT.shape[1]), value=NOBODY)


class DiffusionGemma(LanguageModel):
    """The network behind a cache. ``block_size`` is the length of its canvas."""

    has_denoiser = one_network = True

    def __init__(self, inner: CausalLM) -> None:
        super().__init__()
        self.inner = inner
        config: Any = inner.config
        self.block_size = int(config.canvas_length)
        self.window: int | None = config.get_text_config().sliding_window

    @property
    def _parts(self) -> Any:
        """Encoder and decoder, by transformers' names."""
        return cast(Any, self.inner).model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.inner.parameters()).device

    def nothing(self, num_rows: int) -> CacheContext:
        """The context before the first token."""
        empty = []
        for layer in self._parts.encoder.language_model.layers:
            attention = layer.self_attn
            head_dim = len(attention.k_norm.weight)  # layers of two kinds have heads of two sizes
            weight = attention.k_proj.weight
            empty.append(weight.new_zeros(num_rows, len(weight) // head_dim, 0, head_dim))
        past = Past(tuple(empty), tuple(empty))
        return CacheContext(past, torch.zeros(num_rows, 0, dtype=torch.int64), (0,) * num_rows)

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> CacheContext:
        """Read prompts, rows padded on the right; a row may have no token."""
        context = self.nothing(len(ids_BS))
        return self.extend(context, ids_BS, lengths_B) if ids_BS.shape[1] else context

    def extend(
        self, context: CacheContext, ids_BK: Tensor, lengths_B: Tensor | Sequence[int] | None = None
    ) -> CacheContext:
        """The context after K more tokens in every row, or each row's own number of them. The old one stays valid."""
        return self.encode(context, ids_BK, lengths_B)[0]

    def encode(
        self, context: CacheContext, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None
    ) -> tuple[CacheContext, Tensor]:
        """As :meth:`extend`; and the encoder's last hidden states (B, S, H)."""
        num = ids_BS.shape[1]
        lengths_B = [num] * len(ids_BS) if lengths_B is None else [int(length) for length in lengths_B]
        position_BS = torch.tensor(context.lengths)[:, None] + torch.arange(num)
        real_BS = torch.arange(num) < torch.tensor(lengths_B)[:, None]
        position_BT = torch.cat([context.position_BT, torch.where(real_BS, position_BS, NOBODY)], dim=1)
        visible_BST = (position_BT[:, None] <= position_BS[:, :, None]) & (position_BT != NOBODY)[:, None]
        first_BS1 = (position_BS - (self.window or 0) + 1)[:, :, None]
        near_BST = visible_BST & (position_BT[:, None] >= first_BS1)
        cache = _cache(context.past)
        output: Any = self._parts.encoder(
            input_ids=ids_BS.to(self.device),
            position_ids=position_BS.to(self.device),
            attention_mask=self._masks(not_blind(visible_BST), not_blind(near_BST)),
            past_key_values=cache,
        )
        past = Past(tuple(layer.keys for layer in cache.layers), tuple(layer.values for layer in cache.layers))
        total = tuple(before + new for before, new in zip(context.lengths, lengths_B, strict=True))
        return CacheContext(past, position_BT, total), output.last_hidden_state

    def denoise(self, block_BK: Tensor, context: CacheContext, t_B: object = None) -> Tensor:
        """Logits (B, K, V) float32 of a canvas at its first step. ``t_B`` has no effect: no time goes in."""
        return self.denoise_after(block_BK, context, [None] * len(block_BK))

    def denoise_after(self, canvas_BK: Tensor, context: CacheContext, previous: Sequence[Tensor | None]) -> Tensor:
        """See protocol.SelfConditioned; the context is not changed."""
        num = canvas_BK.shape[1]
        length_B1 = torch.tensor(context.lengths)[:, None]
        seen_BT = context.position_BT != NOBODY
        near_BT = seen_BT & (context.position_BT > length_B1 - (self.window or 0))
        own_BK = torch.ones_like(canvas_BK, dtype=torch.bool, device="cpu")
        masks = [torch.cat([held_BT, own_BK], dim=1)[:, None].expand(-1, num, -1) for held_BT in (seen_BT, near_BT)]
        output: Any = self.inner(
            decoder_input_ids=canvas_BK.to(self.device),
            decoder_position_ids=(length_B1 + torch.arange(num)).to(self.device),
            decoder_attention_mask=self._masks(*masks),
            past_key_values=_cache(context.past),
            **self._told(previous),
        )
        logits_BKV: Tensor = output.logits
        return logits_BKV.float()

    def _masks(self, all_BST: Tensor, near_BST: Tensor) -> dict[str, Tensor]:
        """What is seen in layers of either kind."""
        near_BST = all_BST if self.window is None else near_BST
        pair = {"full_attention": all_BST, "sliding_attention": near_BST}
        return {kind: visible_BST[:, None].to(self.device) for kind, visible_BST in pair.items()}

    def _told(self, previous: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """The earlier logits, and which rows have some."""
        known = [logits_KV for logits_KV in previous if logits_KV is not None]
        if not known:
            return {}
        none_KV = torch.zeros_like(known[0])
        logits_BKV = torch.stack([none_KV if logits_KV is None else logits_KV for logits_KV in previous])
        has_B = torch.tensor([logits_KV is not None for logits_KV in previous])
        weight = next(self.inner.parameters())
        return {
            "self_conditioning_logits": logits_BKV.to(weight.device, weight.dtype),
            "self_conditioning_mask": has_B.to(weight.device),
        }

    def next_logits(self, context: CacheContext) -> Tensor:
        """UserError: a canvas is denoised whole."""
        raise UserError(
            f"{self.checkpoint.name} ({self.checkpoint.family}) predicts no single next token: give --decoder "
            "entropy_bound"
        )

    def context_logits(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, last: int | None = None
    ) -> Tensor:
        """UserError: the encoder has no head, and no bound for uniform noise is known."""
        raise UserError(
            f"{self.checkpoint.name} ({self.checkpoint.family}) has no log-likelihoods: leave out tasks that need them"
        )


def _cache(past: Past) -> Any:
    """Transformers' cache of these keys and values; it keeps all columns in layers with a window too, where masks hide
    them, so that rows of all lengths go together."""
    from transformers import DynamicCache

    return DynamicCache(ddp_cache_data=list(zip(past.keys, past.values, strict=True)))


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> DiffusionGemma:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    from transformers import DiffusionGemmaForBlockDiffusion

    data = read_json(folder / "config.json")
    text = data.get("text_config")
    if not isinstance(text, dict):
        raise FileError(f"{folder}: config.json: text_config is missing")
    whole_number(folder, text, "vocab_size")
    config = _config(folder)
    tensors, checkpoint = read_whole(folder, family="diffusion_gemma", dtype=dtype, devices=devices[:1])
    kind = DiffusionGemmaForBlockDiffusion
    model = DiffusionGemma(load_inner(folder, kind, config, tensors, dtype=dtype, device=devices[0]))
    settings: Any = config.get_text_config()
    return identify(
        model,
        folder,
        {**data, **{name: text[name] for name in ("eos_token_id",) if name in text}},
        checkpoint,
        vocab_size=settings.vocab_size,
        max_length=settings.max_position_embeddings,
        mask_token_id=None,
    )


def _config(folder: Path) -> Config:
    from transformers import DiffusionGemmaConfig

    try:
        with quiet():
            config: Any = DiffusionGemmaConfig.from_pretrained(
                str(folder), local_files_only=True, attn_implementation="sdpa"
            )
    except LOAD_ERRORS as error:
        raise FileError(
            f"{folder}: config.json: transformers cannot read it ({' '.join(str(error).split())[:300]})"
        ) from error
    own: Config = config
    return own
