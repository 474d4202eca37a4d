"""A transformers model behind the project's protocol of causal models, run in the ways that it was proved to run: its
caches forked before they are extended, drafts verified in one pass, and token trees as one row.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from twotower_eval.engine.models.autoregressive import host_lengths
from twotower_eval.engine.models.base import LanguageModel
from twotower_eval.engine.models.protocol import Segment
from twotower_eval.engine.models.transformers_cache import (
    CacheContext,
    GrowingLayer,
    Part,
    Tokens,
    can_join,
    cut_part,
    forked,
    growing,
    keeps_all,
)
from twotower_eval.engine.models.transformers_static import StaticContext, StaticSize, StaticSteps
from twotower_eval.engine.models.transformers_types import Cache, CacheLayer, CausalLM, Config
from twotower_eval.errors import UserError
from twotower_eval.records import Ways

# Rotary embeddings that depend on how long the whole row is: what is read first would have to be read again.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def packed(segments: Sequence[Segment], known: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids (1, N), positions (1, N), additive mask (1, 1, N, T) and columns (M,) of the wanted logits.

    ``known`` tokens of context stand before the tree.
    """
    starts: list[int] = []
    ends: list[int] = []
    depths: list[int] = []  # tokens before the segment, on its own branch
    for segment in segments:
        starts.append(ends[-1] if ends else 0)
        ends.append(starts[-1] + len(segment.tokens))
        depths.append(known if segment.parent < 0 else depths[segment.parent] + len(segments[segment.parent].tokens))
    seen_NT = torch.zeros(ends[-1], known + ends[-1], dtype=torch.bool)
    seen_NT[:, :known] = True
    for segment, start, end in zip(segments, starts, ends, strict=True):
        if segment.parent >= 0:
            # The parent's last token sees exactly what every token of this segment sees before its own segment.
            seen_NT[start:end] = seen_NT[ends[segment.parent] - 1]
        seen_NT[start:end, known + start : known + end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    ids_1N = torch.tensor([[token for segment in segments for token in segment.tokens]])
    position_1N = torch.cat([torch.arange(d, d + e - s) for s, e, d in zip(starts, ends, depths, strict=True)])[None]
    columns_M = torch.tensor([s + at for segment, s in zip(segments, starts, strict=True) for at in segment.wanted])
    mask_NT = torch.zeros(seen_NT.shape, dtype=dtype).masked_fill_(~seen_NT, torch.finfo(dtype).min)
    return ids_1N, position_1N, mask_NT[None, None], columns_M.long()


def keeps_all_keys(config: Config, layers: Sequence[CacheLayer]) -> bool:
    """Whether every layer keeps all keys (no window that a mask of ours would undo) at positions fixed for good."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    classes: set[type[object]] = set(map(type, layers))
    return classes <= {GrowingLayer} and not kinds & LENGTH_DEPENDENT_ROPE


BRANCH_TOKENS = 512  # more fill the processor no better, while each sees the others' keys behind its mask
CACHE_ARGUMENTS = ("past_key_values", "cache_params")  # what a model's forward may call its cache
FORWARD_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError)


class ForwardError(RuntimeError):
    """A model's own forward raised: what it said, in one line."""


class TransformersModel(LanguageModel):
    """A transformers model behind the project's protocol of causal models."""

    ways: Ways

    def __init__(self, inner: CausalLM) -> None:
        super().__init__()
        self.inner = inner
        arguments = inspect.signature(inner.forward).parameters
        self.cache_argument = next((name for name in CACHE_ARGUMENTS if name in arguments), None)
        self.keeps_logits = "logits_to_keep" in arguments
        self.takes_positions = "position_ids" in arguments
        layers = self._new_cache().layers if self.cache_argument else ()
        self.pads_left = (
            {"attention_mask", "position_ids", "past_key_values"} <= arguments.keys()
            and not inner._is_stateful
            and all(isinstance(layer, DynamicLayer) for layer in layers)
            and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        )
        self.may_pack = self.pads_left and keeps_all_keys(inner.config, layers)
        self.reads_several: bool | None = None  # in one pass behind a context; None: not tried yet
        self.try_several: Callable[[TransformersModel], bool] | None = None  # how that is tried; models.proof has it
        self._goes_on: bool | None = None  # from a shared beginning; None: not tried yet
        self.try_beginnings: Callable[[TransformersModel], bool] | None = None
        self._steps: bool | None = None  # over a static cache; None: not tried yet
        self.try_static: Callable[[TransformersModel], bool] | None = None
        self.static = nn.ModuleList([StaticSteps(inner, self._logits)])
        self._keeps_all = all(keeps_all(layer) for layer in layers)
        self._can_join = self.pads_left and can_join(layers)
        cached = self.cache_argument is not None
        self.run_by(Ways(cached=cached, unlike_lengths_together=self.pads_left or not cached))

    def run_by(self, ways: Ways, unproved: Sequence[int] = ()) -> None:
        """From now on in these ways, beyond the first ``unproved`` length plainly; earlier contexts are void."""
        limits = [ways.plain_beyond, *(length - 2 for length in unproved[:1])]
        self.ways, self.unproved, self.rows_together = ways, tuple(unproved), ways.rows_together
        self.plain_beyond = min((limit for limit in limits if limit is not None), default=None)
        self.joins_contexts = not ways.cached or (self._can_join and ways.rows_together)
        self.branch_tokens = BRANCH_TOKENS if ways.options_packed else 0

    @property
    def uneven_rows(self) -> bool:
        """Whether rows of a batch may read different numbers of tokens in one pass."""
        return not self.ways.cached or (self.joins_contexts and self._keeps_all)

    @property
    def verifies(self) -> bool:
        """Whether several tokens behind a context may be read in one pass; tried once."""
        if self.reads_several is None:
            self.reads_several = self.plain_beyond != 0 and self.try_several is not None and self.try_several(self)
        return self.reads_several

    @property
    def shares_beginnings(self) -> bool:
        """Whether rows may go on beside each other from a beginning that was read once; tried once."""
        if not (self.ways.cached and self.pads_left and self.plain_beyond != 0):
            return False
        if self._goes_on is None:
            self._goes_on = self.try_beginnings is not None and self.try_beginnings(self)
        return self._goes_on

    @property
    def steps_statically(self) -> bool:
        """Whether a static cache may stand for the growing one; tried once."""
        if not (self.ways.cached and self.may_pack and self.rows_together and self.plain_beyond != 0):
            return False
        if self._steps is None:
            self._steps = self.try_static is not None and self.try_static(self)
        return self._steps

    @property
    def static_steps(self) -> StaticSteps:
        """What runs steps over a static cache."""
        return cast(StaticSteps, self.static[0])

    @property
    def verified_up_to(self) -> int | None:
        """The longest context behind which that holds; None: any."""
        return self.plain_beyond if self.ways.cached else None

    @property
    def kind(self) -> str:
        """What its config calls it."""
        return str(self.inner.config.model_type)

    @property
    def precision(self) -> str:
        """The dtype's name."""
        return str(self.inner.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.inner.device
        return device

    def own_generate(self, ids_1S: Tensor, num_new: int) -> list[int]:
        """Greedy tokens behind one prompt by transformers' own ``generate``, however many end-of-text there are.

        ForwardError where it raises.
        """
        ids_1S = ids_1S.to(self.device)
        asked = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = self.inner.generate(ids_1S, attention_mask=torch.ones_like(ids_1S), **asked)
        except FORWARD_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise ForwardError(f"its generate raised {type(error).__name__}: {reason}") from error
        tokens: list[int] = out[0, ids_1S.shape[1] :].tolist()
        return tokens

    def prefill(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, static: StaticSize | None = None
    ) -> CacheContext:
        """Run the model over prompts, right-padded rows of at least one token; with ``static`` into buffers of that
        size, only where the model ``steps_statically``."""
        lengths = host_lengths(ids_BS, lengths_B)
        if min(lengths) < 1:
            raise UserError("this model cannot start from an empty prompt; give every row at least one token")
        tokens = tuple(tuple(row[:length]) for row, length in zip(ids_BS.tolist(), lengths, strict=True))
        context = CacheContext(tokens, tuple(self._read(tokens, range(len(tokens)))))
        return context if static is None else self.static_steps.begin(context, static)

    def extend(self, context: CacheContext, ids_BK: Tensor) -> CacheContext:
        """The context after K more tokens in every row. ``context`` itself stays valid."""
        if isinstance(context, StaticContext):
            stepped: StaticContext = self.static_steps(context, ids_BK)
            return stepped
        tokens = tuple((*old, *new) for old, new in zip(context.tokens, ids_BK.tolist(), strict=True))
        ids_BK = ids_BK.to(device=self.device, dtype=torch.int64)
        parts: list[Part] = []
        anew: list[int] = []  # rows without a cache, and those that have grown out of the lengths that have one
        for part in context.parts:
            going = [row for row in part.rows if part.cache is not None and not self._is_plain(len(tokens[row]))]
            anew += sorted({*part.rows} - {*going})
            kept = part if len(going) == len(part.rows) else part.select({row: (row,) for row in going})
            if kept is not None:
                parts.append(self._extend_part(kept, ids_BK, context.lengths))
        return CacheContext(tokens, (*parts, *self._read(tokens, anew)))

    def extend_logits(
        self, context: CacheContext, ids_BK: Tensor, lengths_B: Sequence[int], wanted: Sequence[tuple[int, int]]
    ) -> tuple[CacheContext, Tensor]:
        """The context after each row's first ``lengths_B`` of K tokens, and logits (M, V) float32 behind the wanted
        (row, column). Only where ``verifies``; rows of unlike lengths only where there are ``uneven_rows``."""
        new = [row[:length] for row, length in zip(ids_BK.tolist(), lengths_B, strict=True)]
        tokens = tuple((*old, *more) for old, more in zip(context.tokens, new, strict=True))
        ids_BK = ids_BK.to(device=self.device, dtype=torch.int64)
        parts: list[Part] = []
        behind: dict[int, Tensor] = {}  # row -> logits (K, V)
        anew: list[int] = []
        for part in context.parts:
            going = [row for row in part.rows if part.cache is not None and not self._is_plain(len(tokens[row]))]
            anew += sorted({*part.rows} - {*going})
            kept = part if len(going) == len(part.rows) else part.select({row: (row,) for row in going})
            if kept is not None:
                extended, logits_BKV = self._verify_part(kept, ids_BK, context.lengths, lengths_B)
                parts.append(extended)
                behind.update(zip(kept.rows, logits_BKV, strict=True))
        for row in anew:
            behind[row] = self.context_logits(torch.tensor([tokens[row]]), last=lengths_B[row])[0]
            if self._is_plain(len(tokens[row])):
                parts.append(Part((row,), None, (0,), behind[row][-1:]))
            else:  # the second token of a row without neighbours: its cache begins here
                parts += self._read(tokens, [row])
        return CacheContext(tokens, tuple(parts)), torch.stack([behind[row][column] for row, column in wanted])

    def _verify_part(
        self, part: Part, ids_BK: Tensor, lengths: Sequence[int], new: Sequence[int]
    ) -> tuple[Part, Tensor]:
        """A part after each row's new tokens, and logits (B, K, V) behind all of them, padding included."""
        cache, known = forked(_cache_of(part)), lengths[part.rows[0]] + part.padding[0]
        num_new = max(new[row] for row in part.rows)
        logits_BKV = self._forward(ids_BK[list(part.rows), :num_new], cache, part.padding, known, last=num_new)
        ends_B = torch.tensor([new[row] - 1 for row in part.rows], device=logits_BKV.device)
        last_BV = logits_BKV[torch.arange(len(part.rows), device=ends_B.device), ends_B]
        extended = replace(part, cache=cache, last_logits_BV=last_BV)
        if any(new[row] < num_new for row in part.rows):
            extended = cut_part(extended, [old + more for old, more in zip(lengths, new, strict=True)], last_BV)
        return extended, logits_BKV

    def next_logits(self, context: CacheContext) -> Tensor:
        """Logits of each row's next token, (B, V) float32."""
        if isinstance(context, StaticContext):
            return context.logits_BV
        order = [row for part in context.parts for row in part.rows]
        joined_BV = torch.cat([part.last_logits_BV for part in context.parts])
        return joined_BV[[order.index(row) for row in range(len(order))]]

    def context_logits(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, last: int | None = None
    ) -> Tensor:
        """Logits after every position, (B, S, V) float32; with ``last`` = n only after each row's last n, (B, n, V).

        Rows shorter than n repeat their first position on the left. Padding stands on the right here, where nothing
        causal can see it. Without a cache: this is what all other ways are held against.
        """
        lengths = host_lengths(ids_BS, lengths_B)
        ids_BS = ids_BS.to(device=self.device, dtype=torch.int64)
        alone = [row for row, n in enumerate(lengths) if not self.ways.passes_together or self._is_beyond(n)]
        together = [row for row in range(len(lengths)) if row not in alone]
        groups = [*([together] if together else []), *([row] for row in alone)]
        found = [self._pass(ids_BS[group], [lengths[row] for row in group], last) for group in groups]
        if len(groups) == 1:
            return found[0]
        order = [row for group in groups for row in group]
        return torch.cat(found)[[order.index(row) for row in range(len(order))]]

    def tree_logits(self, context: CacheContext | None, segments: Sequence[Segment]) -> Tensor:
        """Logits (M, V) float32 behind the wanted positions of a token tree on a context of one row (``None``: none at
        all), in their order. Only where ``branch_tokens`` is not 0."""
        known = 0 if context is None else context.lengths[0]
        num_columns = known + sum(len(segment.tokens) for segment in segments)
        try:
            return self._packed_logits(context, segments, known)
        except ForwardError:
            if self.max_length is None or num_columns <= self.max_length:
                raise
            # No branch is too long, but all in one row are more than some models' buffers hold.
            return self._branch_logits(() if context is None else context.tokens[0], segments)

    def _branch_logits(self, known: Tokens, segments: Sequence[Segment]) -> Tensor:
        """See :meth:`tree_logits`; every branch as a whole row."""
        rows: list[Tokens] = []
        found = []
        for segment in segments:
            rows.append((known if segment.parent < 0 else rows[segment.parent]) + segment.tokens)
            if segment.wanted:
                last = len(segment.tokens) - segment.wanted[0]
                logits_NV = self.context_logits(torch.tensor([rows[-1]]), last=last)[0]
                found.append(logits_NV[[at - segment.wanted[0] for at in segment.wanted]])
        return torch.cat(found)

    def _packed_logits(self, context: CacheContext | None, segments: Sequence[Segment], known: int) -> Tensor:
        """See :meth:`tree_logits`; all branches in one row."""
        tensors = packed(segments, known, self.inner.dtype)
        ids_1N, position_1N, mask, columns_M = (tensor.to(self.device) for tensor in tensors)
        more = {"logits_to_keep": columns_M} if self.keeps_logits else {}
        logits = self._logits(
            input_ids=ids_1N,
            attention_mask=mask,
            position_ids=position_1N,
            past_key_values=self._new_cache() if context is None else forked(_cache_of(context.parts[0])),
            use_cache=True,
            **more,
        )
        return (logits[0] if self.keeps_logits else logits[0, columns_M]).float()

    def _is_beyond(self, length: int) -> bool:
        return self.plain_beyond is not None and length > self.plain_beyond

    def _is_plain(self, length: int) -> bool:
        """Whether a context so long has no cache. Models that keep states of their own take a single token for the
        next one of the row before: where rows run alone, a cache begins with the second."""
        return not self.ways.cached or self._is_beyond(length) or (length < 2 and not self.rows_together)

    def _read(self, tokens: Sequence[Tokens], rows: Sequence[int]) -> Iterator[Part]:
        """Rows from their beginning: those without a cache, then the others, as many together as may be."""
        plain = [row for row in rows if self._is_plain(len(tokens[row]))]
        if plain:
            ids_BS, lengths = _padded([tokens[row] for row in plain])
            yield Part(tuple(plain), None, (0,) * len(plain), self.context_logits(ids_BS, lengths, last=1)[:, 0])
        cached = [row for row in rows if row not in plain]
        if not self.rows_together:
            groups = [[row] for row in cached]
        elif self.pads_left:
            groups = [cached] if cached else []
        else:
            sizes = sorted({len(tokens[row]) for row in cached})
            groups = [[row for row in cached if len(tokens[row]) == size] for size in sizes]
        for group in groups:
            yield self._prefill_part(tuple(group), [tokens[row] for row in group])

    def _prefill_part(self, rows: tuple[int, ...], tokens: Sequence[Tokens]) -> Part:
        ids_BS, lengths = _padded(tokens)
        padding = tuple(max(lengths) - length for length in lengths)
        left_BS = torch.stack([row_S.roll(shift) for row_S, shift in zip(ids_BS, padding, strict=True)])
        cache = self._new_cache()
        return Part(rows, cache, padding, self._forward(left_BS.to(self.device), cache, padding, 0)[:, 0])

    def _extend_part(self, part: Part, ids_BK: Tensor, lengths: Sequence[int]) -> Part:
        cache, known = forked(_cache_of(part)), lengths[part.rows[0]] + part.padding[0]
        logits_BV = part.last_logits_BV
        for piece_BK in [ids_BK[list(part.rows)]] if self.pads_left else ids_BK[list(part.rows)].split(1, dim=1):
            logits_BV = self._forward(piece_BK, cache, part.padding, known)[:, 0]
            known += piece_BK.shape[1]
        return replace(part, cache=cache, last_logits_BV=logits_BV)

    def _new_cache(self) -> Cache:
        make: Any = transformers.DynamicCache
        cache: Cache = make(config=self.inner.config)
        return growing(cache)

    def _forward(self, ids_BS: Tensor, cache: Cache, padding: Sequence[int], known: int, last: int = 1) -> Tensor:
        """Logits (B, last, V) behind the last columns; the cache takes all of them up. ``known`` columns are in it
        already."""
        assert self.cache_argument is not None
        more: dict[str, Any] = {self.cache_argument: cache}
        if any(padding) or self.ways.positions_passed:
            columns_T = torch.arange(known + ids_BS.shape[1], device=ids_BS.device)
            position_BT = columns_T - torch.tensor(padding, device=ids_BS.device)[:, None]
            more["position_ids"] = position_BT[:, known:].clamp(min=0)
            if any(padding):
                more["attention_mask"] = (position_BT >= 0).long()
        if self.keeps_logits:
            more["logits_to_keep"] = last
        return self._logits(input_ids=ids_BS, use_cache=True, **more)[:, -last:].float()

    def _pass(self, ids_BS: Tensor, lengths: Sequence[int], last: int | None) -> Tensor:
        """See :meth:`context_logits`; all rows at once."""
        if self.ways.resets_first and self._is_beyond(max(lengths)):
            self._logits(input_ids=ids_BS[:, :2], use_cache=False)
        width = ids_BS.shape[1]
        # Some models go on from the row before when they are given a single token, so it is given twice.
        ids_BS = ids_BS[:, : max(lengths)] if max(lengths) > 1 else ids_BS[:, :1].expand(-1, 2)
        if last is None:
            logits_BSV = self._logits(input_ids=ids_BS, use_cache=False).float()
            missing = max(0, width - logits_BSV.shape[1])
            return torch.nn.functional.pad(logits_BSV[:, :width], (0, 0, 0, missing))
        columns_BL = torch.tensor([[max(0, n - last + i) for i in range(last)] for n in lengths], device=self.device)
        needed_U = columns_BL.unique()
        more = {"logits_to_keep": needed_U} if self.keeps_logits else {}
        logits_BUV = self._logits(input_ids=ids_BS, use_cache=False, **more)
        if self.keeps_logits:
            columns_BL = torch.searchsorted(needed_U, columns_BL)
        index_BLV = columns_BL[..., None].expand(-1, -1, logits_BUV.shape[-1])
        return logits_BUV.gather(1, index_BLV).float()

    def _logits(self, **arguments: object) -> Tensor:
        """The model's forward. ForwardError where it raises."""
        try:
            logits: Tensor = self.inner(**arguments).logits
        except torch.OutOfMemoryError:
            raise
        except FORWARD_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise ForwardError(f"its forward raised {type(error).__name__}: {reason}") from error
        return logits


def _cache_of(part: Part) -> Cache:
    """That of rows which are read on, or in branches: only rows with a cache are."""
    assert part.cache is not None
    return part.cache


def _padded(tokens: Sequence[Tokens]) -> tuple[Tensor, list[int]]:
    """Ids (B, S) padded on the right with 0, and lengths."""
    lengths = [len(row) for row in tokens]
    return torch.tensor([[*row, *[0] * (max(lengths) - len(row))] for row in tokens], dtype=torch.int64), lengths
