"""Speculative decoding: something cheap drafts the next tokens, one pass of the model verifies them all.

Greedy only: the tokens are those of the ``autoregressive`` decoder, as every one of them is the likeliest behind
exactly the tokens before it. A pass over several tokens may round otherwise than steps of one token do, so that two
tokens whose logits nearly tie may swap: ``twotower-eval verify`` counts these on the machine at hand.

A rejected draft leaves its tokens in the model's context. Contexts of attention alone are cut back. States cannot be:
there the row stays at its older context, and the tokens accepted since are read again in the next pass, before its
draft. So every round is one pass of the model, whatever was rejected.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from twotower_eval.engine.decoders.batch import BatchDecoder, Call, ParamsT
from twotower_eval.engine.decoders.rows import Clock, padded_ids
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.engine.models.protocol import Model, verifying
from twotower_eval.errors import UserError

MOST_UNREAD = 8  # tokens of a row that are read again before a pass without a draft takes them up


class Drafter(Protocol):
    """Drafts tokens for the rows of one call. Row numbers are those of the call."""

    def start(self, rows: Sequence[int]) -> None:
        """Take up rows whose first token is chosen."""

    def drafts(self, rows: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """For each row, at most so many tokens that may follow those it has."""

    def accepted(self, rows: Sequence[int], nums: Sequence[int]) -> None:
        """So many tokens of each row's draft were right; the row has these and one more. Rows not named have ended."""

    def num_forwards(self, row: int) -> int | None:
        """Forwards of a draft model for a row; None where there is no model."""


class Speculative(BatchDecoder[ParamsT]):
    """n useful tokens cost the prefill and one context forward for each verified draft, which gives at least one."""

    NEEDS_DENOISER = False

    def __init__(self, model: Model, params: ParamsT, *, clock: Clock | None = None) -> None:
        super().__init__(model, params, clock=clock)
        self._verifying = verifying(model, _cannot(self.KIND, model))

    @abstractmethod
    def _drafter(self, call: Call) -> Drafter:
        """What drafts for the rows of a call."""

    @property
    def _rows_alone(self) -> bool:
        return super()._rows_alone or not self._verifying.uneven_rows or not self.model.joins_contexts

    def _decode(self, call: Call) -> None:
        drafter = self._drafter(call)
        call.num_draft_forwards = drafter.num_forwards
        unread: dict[int, int] = {}  # row -> its last tokens, those that its context does not hold
        context = call.admit()
        while context is not None:
            fresh = [at for at, row in enumerate(context.rows) if row not in unread]
            if fresh:
                context = call.admit(self._started(call, drafter, context, fresh, unread))
            else:
                context = call.admit(self._verified(call, drafter, context, unread))

    def _started(
        self, call: Call, drafter: Drafter, context: CountedContext, fresh: Sequence[int], unread: dict[int, int]
    ) -> CountedContext | None:
        """The rows that go on after the first token of the fresh ones, which their prefill gives."""
        rows = [context.rows[at] for at in fresh]
        tokens_B = call.counted.next_logits(context.select(fresh)).argmax(-1).cpu()
        going = [rows[at] for at in call.absorb_verified(rows, tokens_B[:, None].tolist())]
        unread.update(dict.fromkeys(going, 1))
        drafter.start(going)
        return _selected(context, [at for at, row in enumerate(context.rows) if row in unread])

    def _room(self, call: Call, rows: Sequence[int], unread: Mapping[int, int]) -> list[int]:
        """Tokens that may be drafted for each row: as many as its budget leaves beside the one that verifies them, and
        as the model may read. Shorter rows are padded, so the longest one's limit holds for all."""
        lengths = [len(call.prompts[row].token_ids) + len(call.rows[row].produced) for row in rows]
        known = (self.model.max_length, self._verifying.verified_up_to)
        limit = min((limit for limit in known if limit is not None), default=sys.maxsize) - max(lengths)
        left = [call.rules.max_new_tokens - len(call.rows[row].produced) - 1 for row in rows]
        return [max(0, min(n, limit)) if unread[row] <= MOST_UNREAD else 0 for row, n in zip(rows, left, strict=True)]

    def _verified(
        self, call: Call, drafter: Drafter, context: CountedContext, unread: dict[int, int]
    ) -> CountedContext | None:
        """Draft and verify once; the rows that go on."""
        rows = context.rows
        drafts = drafter.drafts(rows, self._room(call, rows, unread))
        known = [call.rows[row].produced[-unread[row] :] for row in rows]
        ids_BK, lengths = padded_ids([[*own, *draft] for own, draft in zip(known, drafts, strict=True)])
        wanted = [
            (at, length - 1 - back) for at, length in enumerate(lengths) for back in range(len(drafts[at]), -1, -1)
        ]
        extended, logits_MV = call.counted.extend_logits(context, ids_BK, lengths, wanted)
        verified = _verify(drafts, logits_MV)
        going = call.absorb_verified(rows, verified.tokens)
        drafter.accepted([rows[at] for at in going], [verified.num_right[at] for at in going])
        whole = [at for at in going if not verified.num_wrong[at]]
        if len(whole) < len(going) and (cut := extended.cut(verified.num_wrong, verified.last_logits_BV)) is not None:
            extended, whole = cut, going
        unread.update((rows[at], 1) for at in whole)
        behind = [at for at in going if at not in whole]  # these stay at their older context
        for at in behind:
            unread[rows[at]] += verified.num_right[at] + 1
        taken, kept = _selected(extended, whole), _selected(context, behind)
        return taken.join(kept) if taken and kept else taken or kept


@dataclass(frozen=True)
class _Verified:
    """By row: how many drafted tokens were right and how many not, the tokens that are known now, and the logits
    behind the last right one."""

    num_right: list[int]
    num_wrong: list[int]
    tokens: list[list[int]]
    last_logits_BV: Tensor


def _verify(drafts: Sequence[Sequence[int]], logits_MV: Tensor) -> _Verified:
    """Hold each draft against the likeliest tokens before it and behind its tokens."""
    likeliest: list[int] = logits_MV.argmax(-1).tolist()
    num_right, tokens, places, start = [], [], [], 0
    for draft in drafts:
        own = likeliest[start : start + len(draft) + 1]
        num = next(
            (at for at, (ours, theirs) in enumerate(zip(draft, own, strict=False)) if ours != theirs), len(draft)
        )
        num_right.append(num)
        tokens.append(own[: num + 1])
        places.append(start + num)
        start += len(own)
    num_wrong = [len(draft) - num for draft, num in zip(drafts, num_right, strict=True)]
    return _Verified(num_right, num_wrong, tokens, logits_MV[places])


def _selected(context: CountedContext, positions: Sequence[int]) -> CountedContext | None:
    return context.select(positions) if positions else None


def _cannot(decoder: str, model: Model) -> str:
    name = model.checkpoint.name
    return (
        f"decoder {decoder!r} verifies several tokens in one pass, and {name} gives logits behind one at a time only: "
        "take autoregressive for it"
    )


@dataclass(frozen=True, kw_only=True)
class LookupParams:
    """As in transformers: the last ``max_matching_ngram_size`` tokens, or fewer, are looked up in the prompt and the
    answer so far, and up to ``prompt_lookup_num_tokens`` that followed them there are drafted."""

    prompt_lookup_num_tokens: int = 10
    max_matching_ngram_size: int = 2

    def __post_init__(self) -> None:
        check_positive(self, "prompt_lookup_num_tokens", "max_matching_ngram_size")


def check_positive(params: object, *names: str) -> None:
    """UserError unless these parameters are whole numbers of at least 1."""
    for name in names:
        value = getattr(params, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")


class Lookup:
    """The n-grams of a growing sequence, each with the place behind its first occurrence."""

    def __init__(self, token_ids: Sequence[int], longest: int) -> None:
        self._ids: list[int] = []
        self._longest = longest
        self._behind: dict[tuple[int, ...], int] = {}
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens."""
        for token in token_ids:
            self._ids.append(token)
            end = len(self._ids)
            for size in range(1, min(self._longest, end) + 1):
                self._behind.setdefault(tuple(self._ids[end - size :]), end)

    def draft(self, most: int) -> list[int]:
        """What followed the first occurrence of the longest known n-gram at the end; nothing if all are new."""
        for size in range(min(self._longest, len(self._ids) - 1), 0, -1):
            behind = self._behind[tuple(self._ids[-size:])]
            if behind < len(self._ids):
                return self._ids[behind : behind + most]
        return []

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._ids)


def lookup_passes(prompt: Sequence[int], answer: Sequence[int], params: LookupParams | None = None) -> int:
    """Passes of a model in which a prompt lookup finds this answer, its prefill included: how often prompt and answer
    repeat themselves, whoever decodes.

    >>> lookup_passes([1, 2, 3, 4, 1, 2], [3, 4, 1, 2, 3])
    2
    >>> lookup_passes([1, 2, 3, 4], [5, 6, 7, 8, 9])
    5
    """
    params = params or LookupParams()
    lookup, at, num = Lookup(prompt, params.max_matching_ngram_size), 0, 0
    while at < len(answer):
        most = min(params.prompt_lookup_num_tokens, len(answer) - at - 1) if num else 0
        draft = lookup.draft(most) if num else []
        right = next((i for i, token in enumerate(draft) if token != answer[at + i]), len(draft))
        lookup.extend(answer[at : at + right + 1])
        at, num = at + right + 1, num + 1
    return num


class LookupDrafter:
    """Drafts from each row's own tokens."""

    def __init__(self, call: Call, params: LookupParams) -> None:
        self._call, self._params = call, params
        self._lookups: dict[int, Lookup] = {}

    def start(self, rows: Sequence[int]) -> None:
        """See :class:`Drafter`."""
        for row in rows:
            ids = self._call.prompts[row].token_ids
            self._lookups[row] = Lookup(ids, self._params.max_matching_ngram_size)

    def drafts(self, rows: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """See :class:`Drafter`."""
        found = []
        for row, num in zip(rows, most, strict=True):
            lookup, produced = self._lookups[row], self._call.rows[row].produced
            lookup.extend(produced[lookup.num_tokens - len(self._call.prompts[row].token_ids) :])
            found.append(lookup.draft(min(num, self._params.prompt_lookup_num_tokens)))
        return found

    def accepted(self, rows: Sequence[int], nums: Sequence[int]) -> None:
        """See :class:`Drafter`."""

    def num_forwards(self, row: int) -> int | None:
        """See :class:`Drafter`."""
        return None


class PromptLookup(Speculative[LookupParams]):
    """Drafts are looked up in the prompt and in the answer so far."""

    KIND = "prompt_lookup"
    Params = LookupParams
    VERSION = 1

    def _drafter(self, call: Call) -> Drafter:
        return LookupDrafter(call, self.params)
