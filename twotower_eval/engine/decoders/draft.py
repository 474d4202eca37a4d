"""Speculative decoding with a draft model: a smaller one of the same tokenizer drafts, token by token."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.rows import Clock, padded_ids
from twotower_eval.engine.decoders.speculative import Drafter, Speculative, check_positive
from twotower_eval.engine.models import load_model, with_weights
from twotower_eval.engine.models.checkpoint import tensor_files
from twotower_eval.engine.models.counting import CountedContext, CountingModel
from twotower_eval.engine.models.identity import file_digests
from twotower_eval.engine.models.protocol import Model
from twotower_eval.errors import UserError
from twotower_eval.records import canonical_json, sha256_text
from twotower_eval.sources import read_source


@dataclass(frozen=True, kw_only=True)
class DraftParams:
    """``draft`` is the draft model's checkpoint folder or name; it drafts ``num_assistant_tokens`` at a time."""

    draft: str = ""
    num_assistant_tokens: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.draft, str) or not self.draft:
            raise UserError("decoder 'draft' needs a draft model: set draft to a checkpoint, as draft=FOLDER")
        check_positive(self, "num_assistant_tokens")


def draft_digest(params: DraftParams) -> str:
    """A digest of the draft model's files, by which its cell is another one where they are others.

    UserError where there is no such checkpoint.
    """
    folder = _folder(params.draft)
    weights = sorted(set(tensor_files(folder).values()))
    stamps = tuple((file, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in weights)
    beside = sorted([file.name, file.sha256] for file in file_digests(folder))
    return sha256_text(canonical_json([_weights_digest(stamps), beside]))


@cache
def _weights_digest(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """One digest over files that are what they were when stamped."""
    found = hashlib.sha256()
    for file, _, _ in stamps:
        with file.open("rb") as handle:
            found.update(hashlib.file_digest(handle, "sha256").digest())
    return found.hexdigest()


def _folder(draft: str) -> Path:
    return with_weights(read_source(draft)).files.resolve()


@cache
def _loaded(folder: Path, digest: str, dtype: str, device: str) -> Model:
    """The draft model, loaded once for all decoders of a process: timing makes a decoder for each round."""
    return load_model(folder, dtype=dtype, device=device)


def _refuse_other_tokens(model: Model, draft: Model) -> None:
    """UserError unless both read and write the same tokens."""
    if _words(model) != _words(draft):
        raise UserError(
            f"draft model {draft.checkpoint.name} has another tokenizer than {model.checkpoint.name}: "
            "take a draft model of the same family of models"
        )


def _words(model: Model) -> Mapping[str, object]:
    return {name: said for name, said in model.folder_settings.items() if name in WORDS}


WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")


class Draft(Speculative[DraftParams]):
    """Drafts are the greedy tokens of a smaller model. Its forwards are counted apart from the model's own."""

    KIND = "draft"
    Params = DraftParams
    VERSION = 1
    draft_digest = staticmethod(draft_digest)

    def __init__(self, model: Model, params: DraftParams, *, clock: Clock | None = None) -> None:
        super().__init__(model, params, clock=clock)
        own = model.checkpoint
        self._draft = _loaded(_folder(params.draft), draft_digest(params), own.dtype, own.devices[0])
        _refuse_other_tokens(model, self._draft)

    @property
    def _rows_alone(self) -> bool:
        alone = not getattr(self._draft, "rows_together", True) or not self._draft.joins_contexts
        return super()._rows_alone or alone

    def _drafter(self, call: Call) -> Drafter:
        return ModelDrafter(call, self._draft, self.params.num_assistant_tokens, vocab_size=self.model.vocab_size)


class ModelDrafter:
    """Greedy tokens of a draft model. Its contexts after every drafted token are kept until the draft is verified, so
    that each row goes on from the last right one, whatever kind of model it is."""

    def __init__(self, call: Call, model: Model, num_tokens: int, *, vocab_size: int) -> None:
        self._call, self._num_tokens, self._vocab_size = call, num_tokens, min(vocab_size, model.vocab_size)
        self._max_length = model.max_length
        self._counted = CountingModel(model, len(call.prompts))
        self._context: CountedContext | None = None  # of rows that are drafted for
        self._read: dict[int, int] = {}  # row -> tokens of it that its context holds
        self._steps: list[CountedContext] = []  # contexts behind each token of the draft that is being verified

    def start(self, rows: Sequence[int]) -> None:
        """See :class:`~twotower_eval.engine.decoders.speculative.Drafter`."""
        rows = [row for row in rows if self._can_read(row)]
        if rows:
            ids = [self._call.prompts[row].token_ids for row in rows]
            context = self._counted.prefill(rows, *padded_ids(ids))
            self._read.update((row, len(own)) for row, own in zip(rows, ids, strict=True))
            self._context = self._context.join(context) if self._context else context

    def _can_read(self, row: int) -> bool:
        prompt = self._call.prompts[row].token_ids
        longest = len(prompt) + self._call.rules.max_new_tokens + self._num_tokens
        return max(prompt) < self._vocab_size and (self._max_length is None or longest <= self._max_length)

    def drafts(self, rows: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """See :class:`~twotower_eval.engine.decoders.speculative.Drafter`."""
        room = {row: min(num, self._num_tokens) for row, num in zip(rows, most, strict=True)}
        found: dict[int, list[int]] = {row: [] for row in rows}
        self._steps = []
        self._drop([row for row in self._read if self._unread(row)[-1] >= self._vocab_size])
        self._catch_up([row for row in self._read if room[row]])
        context = self._context
        while context is not None:
            going = [at for at, row in enumerate(context.rows) if len(found[row]) < room[row]]
            if not going:
                break
            context = context.select(going)
            tokens_B1 = torch.tensor([(found[row] or self._unread(row))[-1:] for row in context.rows])
            context = self._counted.extend(context, tokens_B1)
            self._steps.append(context)
            likeliest = self._counted.next_logits(context)[:, : self._vocab_size].argmax(-1).tolist()
            for row, token in zip(context.rows, likeliest, strict=True):
                found[row].append(token)
        return [found[row] for row in rows]

    def _unread(self, row: int) -> list[int]:
        """Tokens of a row that its context does not hold."""
        return self._call.rows[row].produced[self._read[row] - len(self._call.prompts[row].token_ids) :]

    def _catch_up(self, rows: Sequence[int]) -> None:
        """Read all tokens of these rows but the last."""
        while self._context and (behind := [row for row in rows if len(self._unread(row)) > 1]):
            ids_B1 = torch.tensor([self._unread(row)[:1] for row in self._context.rows if row in behind])
            extended = self._counted.extend(self._of(self._context, behind), ids_B1)
            others = [row for row in self._context.rows if row not in behind]
            self._context = self._of(self._context, others).join(extended) if others else extended
            for row in behind:
                self._read[row] += 1

    @staticmethod
    def _of(context: CountedContext, rows: Collection[int]) -> CountedContext:
        return context.select([at for at, row in enumerate(context.rows) if row in rows])

    def accepted(self, rows: Sequence[int], nums: Sequence[int]) -> None:
        """See :class:`~twotower_eval.engine.decoders.speculative.Drafter`."""
        going = dict(zip(rows, nums, strict=True))
        self._drop([row for row in self._read if row not in going])
        if self._context is None:
            return
        parts: dict[int, list[int]] = defaultdict(list)  # number of drafted tokens that a context holds -> rows
        for row in self._read:
            num_steps = sum(row in context.rows for context in self._steps)
            held = min(going[row] + 1, num_steps)
            parts[held].append(row)
            self._read[row] += held
        contexts = [self._context, *self._steps]
        first, *others = (self._of(contexts[held], own) for held, own in parts.items())
        for other in others:
            first = first.join(other)
        self._context, self._steps = first, []

    def _drop(self, rows: Sequence[int]) -> None:
        """Draft no more for these."""
        for row in rows:
            del self._read[row]
        if rows and self._context is not None:
            kept = [at for at, row in enumerate(self._context.rows) if row in self._read]
            self._context = self._context.select(kept) if kept else None

    def num_forwards(self, row: int) -> int | None:
        """See :class:`~twotower_eval.engine.decoders.speculative.Drafter`."""
        return self._counted.num_context_forwards[row]
