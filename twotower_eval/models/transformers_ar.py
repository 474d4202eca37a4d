"""Any Hugging Face causal language model as autoregressive baseline: safetensors only, local files, no foreign code.

A row of a batch gives what it gives alone. Models whose cache is attention alone run unequal rows padded on the left,
with a mask and their own positions. Models that carry states (Mamba, convolutions) cannot pass over padding: rows of
one length run together, and tokens are appended one at a time.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from twotower_eval.models.autoregressive import host_lengths
from twotower_eval.models.base import LanguageModel, source_text
from twotower_eval.models.checkpoint import (
    file_weights,
    joint_digest,
    opened,
    read_json,
    tensor_digest,
    tensor_files,
)
from twotower_eval.models.config import as_ids
from twotower_eval.models.token_tree import Segment
from twotower_eval.models.tokenizer import load_tokenizer
from twotower_eval.models.transformers_context import CacheContext, Part, can_join, forked
from twotower_eval.models.transformers_tree import may_pack, packed, packing_agrees
from twotower_eval.records import Checkpoint

LOAD_ERRORS = (  # what transformers raises for folders that are wrong in one way or another
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)
BRANCH_TOKENS = 512  # more fill the processor no better, while each sees the others' keys behind its mask
CACHE_ARGUMENTS = ("past_key_values", "cache_params")  # what a model's forward may call its cache


class TransformersModel(LanguageModel):
    """A transformers model behind the project's protocol of causal models."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        arguments = inspect.signature(inner.forward).parameters
        self.cache_argument = next((name for name in CACHE_ARGUMENTS if name in arguments), None)
        self.keeps_logits = "logits_to_keep" in arguments
        layers = self._new_cache().layers
        self.pads_left = (
            {"attention_mask", "position_ids", "past_key_values"} <= arguments.keys()
            and not inner._is_stateful
            and all(isinstance(layer, DynamicLayer) for layer in layers)
            and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        )
        self.joins_contexts = self.pads_left and can_join(layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.inner.device
        return device

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> CacheContext:
        """Run the model over prompts, right-padded rows of at least one token."""
        lengths = host_lengths(ids_BS, lengths_B)
        if min(lengths) < 1:
            raise ValueError("this model cannot start from an empty prompt; give every row at least one token")
        ids_BS = ids_BS.to(device=self.device, dtype=torch.int64)
        groups = [tuple(range(len(lengths)))]
        if not self.pads_left:
            groups = [tuple(i for i, n in enumerate(lengths) if n == length) for length in sorted(set(lengths))]
        return CacheContext(lengths, tuple(self._prefill_part(rows, ids_BS, lengths) for rows in groups))

    def _prefill_part(self, rows: tuple[int, ...], ids_BS: Tensor, lengths: Sequence[int]) -> Part:
        width = max(lengths[row] for row in rows)
        padding = tuple(width - lengths[row] for row in rows)
        left_BS = torch.stack([ids_BS[row, :width].roll(shift) for row, shift in zip(rows, padding, strict=True)])
        cache = self._new_cache()
        return Part(rows, cache, padding, self._forward(left_BS, cache, padding, 0))

    def extend(self, context: CacheContext, ids_BK: Tensor) -> CacheContext:
        """The context after K more tokens in every row. ``context`` itself stays valid."""
        ids_BK = ids_BK.to(device=self.device, dtype=torch.int64)
        lengths = tuple(length + ids_BK.shape[1] for length in context.lengths)
        return CacheContext(lengths, tuple(self._extend_part(part, ids_BK, context.lengths) for part in context.parts))

    def _extend_part(self, part: Part, ids_BK: Tensor, lengths: Sequence[int]) -> Part:
        cache, known = forked(part.cache), lengths[part.rows[0]] + part.padding[0]
        logits_BV = part.last_logits_BV
        for piece_BK in [ids_BK[list(part.rows)]] if self.pads_left else ids_BK[list(part.rows)].split(1, dim=1):
            logits_BV = self._forward(piece_BK, cache, part.padding, known)
            known += piece_BK.shape[1]
        return Part(part.rows, cache, part.padding, logits_BV)

    def next_logits(self, context: CacheContext) -> Tensor:
        """Logits of each row's next token, (B, V) float32."""
        order = [row for part in context.parts for row in part.rows]
        joined_BV = torch.cat([part.last_logits_BV for part in context.parts])
        return joined_BV[[order.index(row) for row in range(len(order))]]

    def context_logits(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, last: int | None = None
    ) -> Tensor:
        """Logits after every position, (B, S, V) float32; with ``last`` = n only after each row's last n, (B, n, V).

        Rows shorter than n repeat their first position on the left. Padding stands on the right here, where nothing
        causal can see it.
        """
        lengths = host_lengths(ids_BS, lengths_B)
        ids_BS = ids_BS.to(device=self.device, dtype=torch.int64)
        if last is None:
            logits: Tensor = self.inner(input_ids=ids_BS, use_cache=False).logits
            return logits.float()
        columns_BL = torch.tensor([[max(0, n - last + i) for i in range(last)] for n in lengths], device=self.device)
        needed_U = columns_BL.unique()
        more = {"logits_to_keep": needed_U} if self.keeps_logits else {}
        logits_BUV = self.inner(input_ids=ids_BS, use_cache=False, **more).logits
        if self.keeps_logits:
            columns_BL = torch.searchsorted(needed_U, columns_BL)
        index_BLV = columns_BL[..., None].expand(-1, -1, logits_BUV.shape[-1])
        picked: Tensor = logits_BUV.gather(1, index_BLV)
        return picked.float()

    def tree_logits(self, context: CacheContext | None, segments: Sequence[Segment]) -> Tensor:
        """Logits (M, V) float32 behind the wanted positions of a token tree on a context of one row (``None``: none at
        all), in their order. Only where ``branch_tokens`` is not 0."""
        known = 0 if context is None else context.lengths[0]
        tensors = packed(segments, known, self.inner.dtype)
        ids_1N, position_1N, mask, columns_M = (tensor.to(self.device) for tensor in tensors)
        more = {"logits_to_keep": columns_M} if self.keeps_logits else {}
        logits: Tensor = self.inner(
            input_ids=ids_1N,
            attention_mask=mask,
            position_ids=position_1N,
            past_key_values=self._new_cache() if context is None else forked(context.parts[0].cache),
            use_cache=True,
            **more,
        ).logits
        return (logits[0] if self.keeps_logits else logits[0, columns_M]).float()

    def _new_cache(self) -> Any:
        return transformers.DynamicCache(config=self.inner.config)

    def _forward(self, ids_BS: Tensor, cache: Any, padding: Sequence[int], known: int) -> Tensor:
        """Logits (B, V) behind the last column; the cache takes the columns up. ``known`` columns are in it already."""
        assert self.cache_argument is not None
        more: dict[str, Any] = {self.cache_argument: cache}
        if any(padding):
            columns_T = torch.arange(known + ids_BS.shape[1], device=ids_BS.device)
            position_BT = columns_T - torch.tensor(padding, device=ids_BS.device)[:, None]
            more["attention_mask"] = (position_BT >= 0).long()
            more["position_ids"] = position_BT[:, known:].clamp(min=0)
        if self.keeps_logits:
            more["logits_to_keep"] = 1
        logits: Tensor = self.inner(input_ids=ids_BS, use_cache=True, **more).logits
        return logits[:, -1].float()


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> TransformersModel:
    """Load a causal language model. ValueError with one line for whatever is wrong with the folder."""
    if tower is not None:
        raise ValueError(f"{folder}: is no two-tower checkpoint, so it has no context tower to take out")
    data = read_json(folder / "config.json")
    _check_config(folder, data)
    files = tensor_files(folder)
    inner = _load_inner(folder, dtype)
    model = TransformersModel(inner.to(devices[0]).eval().requires_grad_(False))
    if model.cache_argument is None:
        raise ValueError(f"{folder}: {data['model_type']} keeps its cache in a way that is not supported")
    digests = _digests(files)
    model.context_digest = joint_digest(digests)
    model.checkpoint = Checkpoint(
        name=folder.resolve().name,
        family="transformers",
        source=source_text(folder),
        digest=joint_digest(digests),
        dtype=str(dtype).removeprefix("torch."),
        devices=devices[:1],
        weights=file_weights(files, digests),
    )
    text_config = inner.config.get_text_config()
    model.vocab_size = inner.get_output_embeddings().weight.shape[0]
    if model.pads_left and may_pack(inner.config, model._new_cache().layers) and packing_agrees(model):
        model.branch_tokens = BRANCH_TOKENS
    model.tokenizer = load_tokenizer(folder, vocab_size=model.vocab_size, unnamed=_class_tokens)
    model.max_length = getattr(text_config, "max_position_embeddings", None)
    model.eos_token_ids = _eos_ids(inner, model)
    return model


def _check_config(folder: Path, data: Mapping[str, Any]) -> None:
    kind = data.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = "; it needs code of its own, which is never run" if "auto_map" in data else ""
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} has no causal language model {kind!r}{own}"
        )
    if kind == "nemotron_h":  # transformers clamps its time steps otherwise than the released model
        raise ValueError(f"{folder}: nemotron_h is read by this project's own family; leave family out")
    if data.get("quantization_config"):
        raise ValueError(f"{folder}: quantised weights are not supported; give the full-precision checkpoint")


def _load_inner(folder: Path, dtype: torch.dtype) -> Any:
    """The transformers model; missing, unexpected or misshapen weights are errors, not warnings."""
    auto: Any = transformers.AutoModelForCausalLM
    try:
        with _quiet():
            inner, report = auto.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{folder}: transformers cannot load it ({reason})") from error
    for problem, key in (("lacks", "missing_keys"), ("has unexpected", "unexpected_keys")):
        names = sorted(map(str, report[key]))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{folder}: checkpoint {problem} tensor {names[0]}{more}; it does not fit its config.json")
    return inner


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no reports on stderr while transformers loads; we report ourselves."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Tensor name -> digest, as stored; ValueError for NaN or infinite weights."""
    digests = {}
    for file in sorted(set(files.values())):
        with opened(file) as handle:
            for name in sorted(name for name, where in files.items() if where == file):
                tensor = handle.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{file}: {name} holds NaN or infinite values")
                digests[name] = tensor_digest(name, tensor)
    return digests


def _class_tokens(folder: Path) -> dict[str, str]:
    """BOS and EOS that a folder's tokenizer has by its class alone, as GPT-2's has; none where there is no class."""
    auto: Any = transformers.AutoTokenizer
    try:
        with _quiet():
            tokenizer = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except LOAD_ERRORS:
        return {}  # nobody else reads this tokenizer by its class either
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    return {name: str(token) for name, token in named.items() if token is not None}


def _eos_ids(inner: Any, model: TransformersModel) -> tuple[int, ...]:
    """All that the generation settings, the config and the tokenizer name: each of them stops."""
    own = model.tokenizer.eos_token_id if model.tokenizer else None
    settings = (inner.generation_config, inner.config.get_text_config())
    named = [value for one in settings for value in as_ids(type(one).__name__, one.eos_token_id)]
    return tuple(dict.fromkeys([*named, *([] if own is None else [own])]))
