"""What we use of transformers' objects, which carry no types of their own: its models, their configs and their caches.

Nothing here is ever made: transformers' own classes have these parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn import Embedding, Linear


HALF_ONLY = ("flash_attention_2",)  # kernels of attention that take numbers of half precision alone


class Config(Protocol):
    """A model's settings, or the part of them that is about text."""

    model_type: str
    eos_token_id: object

    def get_text_config(self) -> Config:
        """The part about text; the whole where there is no other."""

    def to_dict(self) -> dict[str, object]:
        """All settings as plain values."""


class GenerationConfig(Protocol):
    """What a model's generation settings name."""

    eos_token_id: object


class Output(Protocol):
    """What a forward gives."""

    logits: Tensor


class CacheLayer(Protocol):
    """Keys and values of one layer, (B, heads, T, D); ``is_initialized`` is False where it shares another's."""

    keys: Tensor
    values: Tensor
    is_initialized: bool


class Cache(Protocol):
    """What all layers remember of the tokens that were read."""

    layers: list[CacheLayer]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows, in place."""


class CausalLM(nn.Module):
    """A causal language model."""

    config: Config
    generation_config: GenerationConfig
    dtype: torch.dtype
    device: torch.device
    _is_stateful: bool

    if TYPE_CHECKING:
        forward: Callable[..., Output]
        __call__: Callable[..., Output]

        def generate(self, inputs: Tensor, **settings: object) -> Tensor:
            """Token ids (B, T), the prompt in front."""

        def set_attn_implementation(self, attn_implementation: str) -> None:
            """Compute attention by other kernels."""

        def get_input_embeddings(self) -> Embedding:
            """The table of tokens."""

        def get_output_embeddings(self) -> Linear:
            """The head."""


Loaded = tuple[CausalLM, Mapping[str, Iterable[object]]]  # a model, and by kind the tensors that did not fit it
