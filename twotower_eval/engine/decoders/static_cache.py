"""One token at a time over a static cache, as transformers decodes with ``cache_implementation="static"``: buffers of
fixed size that no step copies, and with ``compile`` steps that torch.compile has made for that size.

Rows that started together stay together, and a row that has finished is read on until the last of them has: its slot is
dead weight, which no count includes. A smaller last batch leaves slots empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from twotower_eval.engine.decoders.autoregressive import one_by_one
from twotower_eval.engine.decoders.batch import BatchDecoder, Call
from twotower_eval.engine.decoders.rows import Clock, check_temperature
from twotower_eval.engine.models.counting import CountingModel
from twotower_eval.engine.models.protocol import Model, stepping
from twotower_eval.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from twotower_eval.engine.models.protocol import Context
    from twotower_eval.engine.models.transformers_static import StaticSize

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
LEAST_COLUMNS, MORE_COLUMNS = 64, 256  # sizes of a cache that fits its call: few, as each is compiled anew


@dataclass(frozen=True, kw_only=True)
class StaticParams:
    """``compile``: a mode of torch.compile, true for its default, false for none. ``max_cache_len``: the columns of the
    cache, as in transformers; without it, enough for the longest prompt of a call and its answer."""

    temperature: float = 0.0
    compile: bool | str = False
    max_cache_len: int | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if isinstance(self.compile, str) and self.compile in MODES:
            object.__setattr__(self, "compile", self.compile if self.compile != "default" else True)
        elif not isinstance(self.compile, bool):
            raise UserError(f"compile must be true, false or one of {', '.join(MODES)}, not {self.compile!r}")
        columns = self.max_cache_len
        if columns is not None and (isinstance(columns, bool) or not isinstance(columns, int) or columns < 2):
            raise UserError(f"max_cache_len must be a whole number of at least 2, not {columns!r}")

    @property
    def mode(self) -> str | None:
        """The mode of torch.compile; None: not compiled."""
        return "default" if self.compile is True else self.compile or None


class StaticModel:
    """A model as this decoder sees it: what it prefills is in static buffers."""

    def __init__(self, model: Model, size: StaticSize) -> None:
        self._model: Any = model
        self._size, self.num_columns = size, size.columns
        self.joins_contexts, self.shares_beginnings = False, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Context:
        """The model's own, into static buffers."""
        made: Context = self._model.prefill(ids_BS, lengths_B, static=self._size)
        return made


def static_model(model: Model, params: StaticParams, *, slots: int, num_tokens: int) -> Model:
    """The model with static buffers for rows of up to ``num_tokens``. UserError where they have no room."""
    from twotower_eval.engine.models.transformers_static import StaticSize

    columns = params.max_cache_len or columns_for(num_tokens)
    if columns < num_tokens:
        raise UserError(
            f"max_cache_len={columns} has no room for {num_tokens} tokens, the longest prompt and its answer: raise "
            "it, or leave it out"
        )
    return cast(Model, StaticModel(model, StaticSize(slots=slots, columns=columns, compile=params.mode)))


def columns_for(num_tokens: int) -> int:
    """The next size of a cache that holds so many tokens: 64, 128, 256, and then multiples of 256."""
    if num_tokens > MORE_COLUMNS:
        return -(-num_tokens // MORE_COLUMNS) * MORE_COLUMNS
    size = LEAST_COLUMNS
    while size < num_tokens:
        size *= 2
    return size


class StaticCache(BatchDecoder[StaticParams]):
    """n useful tokens cost n context forwards, as of the ``autoregressive`` decoder, and are the same tokens."""

    KIND = "static_cache"
    NEEDS_DENOISER = False
    KEEPS_ROWS = True
    Params = StaticParams
    VERSION = 1

    def __init__(self, model: Model, params: StaticParams, *, clock: Clock | None = None) -> None:
        super().__init__(model, params, clock=clock)
        self._stepping = stepping(model, _cannot(model))
        if params.mode is not None:
            from twotower_eval.engine.models.transformers_static import check_compiler

            check_compiler(torch.device(model.checkpoint.devices[0]))

    def _decode(self, call: Call) -> None:
        longest = max(len(prompt.token_ids) for prompt in call.prompts) + call.rules.max_new_tokens
        limit = self._stepping.verified_up_to
        if limit is not None and longest > limit:
            raise UserError(
                f"decoder {self.KIND!r}: {self.model.checkpoint.name} reads contexts beyond {limit:,} tokens without a "
                f"cache, and {longest:,} are asked for: take autoregressive"
            )
        sized = static_model(self.model, self.params, slots=call.width, num_tokens=longest)
        call.counted = CountingModel(sized, len(call.prompts))
        one_by_one(call, self.params.temperature)


def _cannot(model: Model) -> str:
    return (
        f"decoder 'static_cache' steps through keys and values in buffers of fixed size, and {model.checkpoint.name} "
        "has none, or gives other logits over them (states, windows, own classes): take autoregressive for it"
    )
