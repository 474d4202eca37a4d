"""E2D2: block diffusion with an encoder of clean tokens and a smaller decoder of noisy ones, both of Qwen3's layers
(Arriola et al., arXiv 2510.22852).

What the decoder's layers see of clean tokens never depends on the noisy ones, so that it is kept: either keys and
values that each layer makes of the encoder's output, or those of an encoder's layer. Shape letters: B rows, S new
tokens, T key columns, K block, J key-value heads, D head dim, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from twotower_eval.engine.families.backbone import Backbone, Past, load_backbone
from twotower_eval.engine.families.one_network import OneNetwork, own_lengths
from twotower_eval.engine.families.settings import identify, mask_token, transformers_settings, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import file_digest, read_whole
from twotower_eval.errors import FileError
from twotower_eval.sources import located, read_source
from twotower_eval.strict import JsonObject

SHARES_KEYS = {
    "LLMasEncoderDecoder": False,
    "LLMasEncoderDecoderShareKV": True,
}  # by the end of backbone_config's class
ENCODER, DECODER = "backbone.encoder.", "backbone.decoder."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Encoded:
    """What was read of B rows: the encoder's keys and values, those that the decoder's layers made of its output (None
    where they see the encoder's), and which columns are no padding."""

    past: Past
    shown: Past | None
    real_BT: Tensor
    lengths: tuple[int, ...]

    def select(self, rows: Sequence[int]) -> Self:
        """Some rows, in that order."""
        chosen = list(rows)
        shown = None if self.shown is None else self.shown.select(chosen)
        return type(self)(self.past.select(chosen), shown, self.real_BT[chosen], tuple(self.lengths[r] for r in chosen))

    def join(self, other: Self) -> Self:
        """These rows, then the other's."""
        width = max(self.real_BT.shape[1], other.real_BT.shape[1])
        wide = [nn.functional.pad(one.real_BT, (0, width - one.real_BT.shape[1])) for one in (self, other)]
        shown = None if self.shown is None or other.shown is None else self.shown.joined(other.shown)
        return type(self)(self.past.joined(other.past), shown, torch.cat(wide), self.lengths + other.lengths)


class E2D2(OneNetwork[Encoded]):
    """The network. ``places`` are the encoder's layers whose keys and values the decoder's layers see, one for each;
    None where these make their own.

    Prompts are read as a whole, every token seeing all of them, and so is each finished block, which also sees all that
    stands before it; with ``causal_cache`` a token sees none behind it. ``causal`` is the same for rows that are read
    whole, as in training. ``keeps_first``: a bound never masks the first token of a row.
    """

    two_way = True
    ends_with_prompt = True  # blocks are counted from there
    causal = causal_cache = keeps_first = False

    def __init__(self, encoder: Backbone, decoder: Backbone, places: Sequence[int] | None, block_size: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.places = None if places is None else tuple(places)
        self.block_size = block_size

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Encoded:
        """Read prompts, rows padded on the right; a row may have no token."""
        nothing, lengths = self.nothing(len(ids_BS)), own_lengths(ids_BS, lengths_B)
        return nothing if max(lengths) == 0 else self.extend(nothing, ids_BS, lengths)

    def nothing(self, num_rows: int) -> Encoded:
        """The context of rows without a token."""
        shown = None if self.places is not None else Past.nothing(num_rows, self.decoder)
        real_BT = torch.zeros(num_rows, 0, dtype=torch.bool)
        return Encoded(Past.nothing(num_rows, self.encoder), shown, real_BT, (0,) * num_rows)

    def extend(self, context: Encoded, ids_BK: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Encoded:
        """The context after K more tokens in every row, or each row's own number of them. The old one stays valid."""
        return self.encoded(context, ids_BK, own_lengths(ids_BK, lengths_B))[1]

    def encoded(self, context: Encoded, ids_BK: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Encoded]:
        """The encoder's output (B, K, H) behind new tokens, and the context after them."""
        num_new = ids_BK.shape[1]
        positions_BK, visible_BKT, real_BT = _seen(context, num_new, lengths)
        if self.causal_cache:
            before = real_BT.shape[1] - num_new
            visible_BKT = visible_BKT & torch.ones(num_new, before + num_new, dtype=torch.bool).tril(before)
        hidden_BKH, past = self.encoder.states(ids_BK, positions_BK, visible_BKT, context.past)
        shown = None
        if context.shown is not None:
            shown = _behind(context.shown, self._projected(hidden_BKH, positions_BK))
        total = tuple(before + new for before, new in zip(context.lengths, lengths, strict=True))
        return hidden_BKH, Encoded(past, shown, real_BT, total)

    def denoise(self, block_BK: Tensor, context: Encoded, t_B: object = None) -> Tensor:
        """Logits (B, K, V) float32 of the token at each position of a block behind the context, which is not changed.

        ``t_B`` has no effect: the network takes no time.
        """
        num_new = block_BK.shape[1]
        positions_BK, visible_BKT, _ = _seen(context, num_new, [num_new] * len(block_BK))
        return self.decoder.read(block_BK, positions_BK, visible_BKT, self._shown(context.past, context.shown))[0]

    def doubled_logits(
        self,
        noisy_BS: Tensor,
        clean_BS: Tensor,
        *,
        real_BS: Tensor | None = None,
        given_BS: Tensor | None = None,
        block_size: int | None = None,
    ) -> Tensor:
        """Logits (B, S, V) of noisy rows, each of whose blocks sees itself and the clean blocks before it, from one
        pass of each part over whole rows (training's way).

        A clean token sees its own block, those before it, and what is ``given``, which all tokens see; where the
        encoder is causal, what stands before it. What is not ``real`` is padding: nothing sees it, and its logits mean
        nothing.
        """
        real_BS = torch.ones_like(clean_BS, dtype=torch.bool) if real_BS is None else real_BS.bool()
        given_BS = torch.zeros_like(real_BS) if given_BS is None else given_BS.bool()
        block_S = torch.arange(clean_BS.shape[1]) // (block_size or self.block_size)
        positions_BS = torch.arange(clean_BS.shape[1]).expand_as(clean_BS)
        earlier_SS, own_SS = block_S[:, None] > block_S, block_S[:, None] == block_S
        seen_BSS = torch.ones_like(own_SS).tril() if self.causal else (earlier_SS | own_SS) | given_BS[:, None]
        hidden_BSH, past = self.encoder.states(clean_BS, positions_BS, seen_BSS & real_BS[:, None])
        made = None if self.places is not None else self._projected(hidden_BSH, positions_BS)
        visible_BST = torch.cat([earlier_SS & real_BS[:, None], own_SS & real_BS[:, None]], dim=2)
        return self.decoder.read(noisy_BS, positions_BS, visible_BST, self._shown(past, made))[0]

    def _shown(self, past: Past, made: Past | None) -> Past:
        """Keys and values that the decoder's layers see of clean tokens."""
        if made is not None:
            return made
        assert self.places is not None
        return Past(tuple(past.keys[p] for p in self.places), tuple(past.values[p] for p in self.places))

    def _projected(self, hidden_BSH: Tensor, positions_BS: Tensor) -> Past:
        """Keys and values that each of the decoder's layers makes of the encoder's output."""
        from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

        inner: Any = self.decoder.inner.model
        cos, sin = inner.rotary_emb(hidden_BSH, positions_BS.to(hidden_BSH.device))
        keys, values = [], []
        for layer in inner.layers:
            attention, normed_BSH = layer.self_attn, layer.input_layernorm(hidden_BSH)
            heads = (*hidden_BSH.shape[:2], -1, attention.head_dim)
            key_BJSD = attention.k_norm(attention.k_proj(normed_BSH).view(heads)).transpose(1, 2)
            keys.append(apply_rotary_pos_emb(key_BJSD, key_BJSD, cos, sin)[1])
            values.append(attention.v_proj(normed_BSH).view(heads).transpose(1, 2))
        return Past(tuple(keys), tuple(values))


def _seen(context: Encoded, num_new: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (B, S) of new tokens, the columns (B, S, T) that they see, which are all, and which are no padding."""
    positions_BS = torch.tensor(context.lengths)[:, None] + torch.arange(num_new)
    new_BS = torch.arange(num_new) < torch.tensor(list(lengths))[:, None]
    real_BT = torch.cat([context.real_BT, new_BS], dim=1)
    return positions_BS, real_BT[:, None].expand(-1, num_new, -1), real_BT


def _behind(first: Past, then: Past) -> Past:
    """The columns of both."""
    both = [
        tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        for old, new in ((first.keys, then.keys), (first.values, then.values))
    ]
    return Past(*both)


@dataclass(frozen=True)
class _Parts:
    """What a config.json says of the two parts: their layers, whether these are the same, and which keys are seen."""

    num_encoder: int
    num_decoder: int
    tied: bool
    places: tuple[int, ...] | None


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> E2D2:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    config = read_json(folder / "config.json")
    _check(folder, config)
    own: Any = config.get("backbone_config")
    if not isinstance(own, dict):
        raise FileError(f"{folder}: config.json: backbone_config must be a table")
    base_file = _base_config(folder, own)
    merged = {**read_json(base_file), **own}
    if merged.get("model_type") != "qwen3":
        raise FileError(f"{base_file}: E2D2 is known on qwen3 only, not on {merged.get('model_type')!r}")
    base = base_file.parent
    parts = _parts(folder, own, whole_number(base, merged, "num_hidden_layers"))
    settings, vocab_size = transformers_settings(base, merged), whole_number(base, merged, "vocab_size")
    block_size = whole_number(folder, config, "eval_block_size", default=config.get("block_size"))
    tensors, checkpoint = read_whole(folder, family="e2d2", dtype=dtype, devices=devices[:1])
    model = _built(folder, settings, parts, tensors, block_size=block_size, dtype=dtype, device=devices[0])
    model.causal = model.causal_cache = bool(own.get("use_encoder_causal_mask"))
    model.keeps_first = bool(config.get("keep_clean_bos"))
    based = dataclasses.replace(file_digest(base_file), name="base/config.json")
    return identify(
        model,
        folder,
        config,
        dataclasses.replace(checkpoint, files=(based,)),
        vocab_size=vocab_size,
        max_length=whole_number(base, merged, "max_position_embeddings"),
        mask_token_id=mask_token(folder, config, vocab_size=vocab_size),
    )


def _check(folder: Path, config: JsonObject) -> None:
    """FileError for a network or a schedule of masks that is not known."""
    for name, known in (("diffusion_type", "absorbing"), ("time_conditioned_backbone", False)):
        if config.get(name, known) != known:
            raise FileError(f"{folder}: config.json has {name} {config[name]!r}; E2D2 is known with {known!r} only")
    noise = config.get("noise_config")
    schedule = str(noise.get("_target_")) if isinstance(noise, dict) else "LinearNoise"
    if schedule.rpartition(".")[2] != "LinearNoise":
        raise FileError(f"{folder}: config.json: noise_config names {schedule}; E2D2 is known with LinearNoise only")


def _base_config(folder: Path, own: JsonObject) -> Path:
    """The config.json that holds the layers' sizes: in a folder inside the checkpoint's, or of a model of the hub."""
    named = own.get("pretrained_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise FileError(f"{folder}: config.json: backbone_config names no pretrained_model_name_or_path")
    inside = folder / named / "config.json"
    return inside if inside.is_file() else located(read_source(named), extent="config").files / "config.json"


def _parts(folder: Path, own: JsonObject, num_base: int) -> _Parts:
    shares = SHARES_KEYS.get(str(own.get("_target_")).rpartition(".")[2])
    if shares is None:
        raise FileError(
            f"{folder}: config.json: backbone_config has _target_ {own.get('_target_')!r}, "
            f"not one of {', '.join(SHARES_KEYS)}"
        )
    num_encoder = whole_number(folder, own, "num_encoder_layers", default=num_base)
    num_decoder = whole_number(folder, own, "num_decoder_layers", default=num_base)
    tied = bool(own.get("tie_encoder_decoder_weights"))
    # A layer of the base model sees the keys of the same layer of the base model.
    first = num_encoder - num_decoder if tied else 0
    if not tied:
        first += num_base - num_decoder if own.get("keep_top_decoder_layers") else 0
        first -= num_base - num_encoder if own.get("keep_top_encoder_layers") else 0
    if (shares or tied) and not 0 <= first <= num_encoder - num_decoder:
        raise FileError(
            f"{folder}: config.json: {num_decoder} layers of the decoder need as many of the encoder's {num_encoder} "
            f"from layer {first} on"
        )
    return _Parts(num_encoder, num_decoder, tied, tuple(range(first, first + num_decoder)) if shares else None)


def _built(
    folder: Path,
    settings: Mapping[str, object],
    parts: _Parts,
    tensors: Mapping[str, Tensor],
    *,
    block_size: int,
    dtype: torch.dtype,
    device: str,
) -> E2D2:
    """The network, what both parts have in common held once."""
    of_encoder = {name.removeprefix(ENCODER): t for name, t in tensors.items() if name.startswith(ENCODER)}
    of_decoder = {name.removeprefix(DECODER): t for name, t in tensors.items() if name.startswith(DECODER)}
    other = [name for name in tensors if not name.startswith((ENCODER, DECODER))]
    if other or EMBEDDING not in of_encoder:
        said = f"has unexpected tensor {other[0]}" if other else f"lacks tensor {ENCODER}{EMBEDDING}"
        raise FileError(f"{folder}: checkpoint {said}; it does not fit its config.json")
    embedding, head = of_encoder[EMBEDDING], of_decoder.get(HEAD, of_encoder.get(HEAD) if parts.tied else None)
    if head is None and settings.get("tie_word_embeddings"):
        head = embedding
    of_encoder.pop(HEAD, None)  # nothing reads tokens off the encoder
    repeated = of_decoder if parts.tied else {name: of_decoder[name] for name in of_decoder if name == EMBEDDING}
    for name, tensor in repeated.items():
        if name != HEAD and (name not in of_encoder or not torch.equal(tensor, of_encoder[name])):
            raise FileError(f"{folder}: tensor {DECODER}{name} must repeat that of the encoder, and does not")
    if parts.tied:
        of_decoder = _top_layers(of_encoder, parts)
    of_decoder |= {EMBEDDING: embedding, **({} if head is None else {HEAD: head})}
    networks = []
    for num_layers, of_part in ((parts.num_encoder, of_encoder), (parts.num_decoder, of_decoder)):
        tied_head = {"num_hidden_layers": num_layers, "tie_word_embeddings": of_part is of_encoder}
        own = {**settings, **tied_head}
        networks.append(load_backbone(folder, "qwen3", own, of_part, dtype=dtype, device=device))
    encoder, decoder = networks
    _share(decoder, encoder, parts, ties_head=head is not None and torch.equal(head, embedding))
    return E2D2(encoder, decoder, parts.places, block_size)


def _top_layers(of_encoder: Mapping[str, Tensor], parts: _Parts) -> dict[str, Tensor]:
    """The decoder's tensors where it is the encoder's top."""
    first, found = parts.num_encoder - parts.num_decoder, {}
    for name, tensor in of_encoder.items():
        _, _, behind = name.partition("model.layers.")
        if not behind:
            found[name] = tensor
            continue
        number, _, rest = behind.partition(".")
        if number.isdecimal() and int(number) >= first:
            found[f"model.layers.{int(number) - first}.{rest}"] = tensor
    return found


def _share(decoder: Backbone, encoder: Backbone, parts: _Parts, *, ties_head: bool) -> None:
    """What is the same in both parts is held once."""
    upper, lower = decoder.inner.model, encoder.inner.model
    upper.embed_tokens = lower.embed_tokens
    if ties_head:
        decoder.inner.lm_head.weight = lower.embed_tokens.weight
    if not parts.tied:
        return
    upper.norm = lower.norm
    tops = lower.layers[parts.num_encoder - parts.num_decoder :]
    for layer, of_encoder in zip(upper.layers, tops, strict=True):  # a layer knows its number, which is not the same
        for name, weight in of_encoder.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, weight)
