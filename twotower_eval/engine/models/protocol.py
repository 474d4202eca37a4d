"""The protocols of models for decoders, scorers and measuring: one for all, and one for each ability of some families.

Only a family's own classes know the content of its contexts; others only pass them back to the model that made them.
Shape letters: B batch, S prompt, K block, M wanted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeGuard, TypeVar, cast

from twotower_eval.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from twotower_eval.records import Checkpoint, Retried


class Context(Protocol):
    """Committed tokens of B rows, in a model's own form. Extending it leaves it usable."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""

    def select(self, rows: Sequence[int]) -> Self:
        """A context of the given rows, in that order."""

    def join(self, other: Self) -> Self:
        """The context of these rows, then of the other's; only where the model ``joins_contexts``."""


ContextT = TypeVar("ContextT", bound=Context)
# What decoders and scorers need of a model: logits of the next token, of masked ones, or a two-tower model.
Ability = Literal["causal", "masked", "two towers"]


class TextCodec(Protocol):
    """A tokenizer, or a replacement of one."""

    bos_token_id: int | None
    eos_token_id: int | None
    special_token_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool = False, /) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: Sequence[int], /) -> str:
        """Text of token ids, special tokens left out."""

    def decode_with_special(self, token_ids: Sequence[int], /) -> str:
        """Text of token ids, special tokens written out."""


class Model(Protocol):
    """A causal language model, for the autoregressive decoder and causal scorers. See models.base for the fields."""

    checkpoint: Checkpoint
    vocab_size: int
    max_length: int | None
    eos_token_ids: tuple[int, ...]
    has_denoiser: bool
    joins_contexts: bool
    context_digest: str
    folder_settings: Mapping[str, object]

    @property
    def tokenizer(self) -> TextCodec | None:
        """None if the checkpoint has no tokenizer files."""

    @property
    def mask_token_id(self) -> int | None:
        """None if the model has no mask token."""

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Context:
        """Read prompts, rows padded on the right."""

    def extend(self, context: Context, ids_BK: Tensor) -> Context:
        """The context after K more tokens in every row."""

    def next_logits(self, context: Context) -> Tensor:
        """Logits of each row's next token, (B, V) float32."""

    def context_logits(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, last: int | None = None
    ) -> Tensor:
        """Logits after every position of whole rows, (B, S, V), or after each row's ``last`` ones."""


class Masked(Model, Protocol):
    """A model that predicts masked tokens behind a context."""

    @property
    def mask_token_id(self) -> int:
        """The token at positions of a block that are not committed yet."""

    def extend(self, context: Context, ids_BK: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Context:
        """As in every model; rows may be extended by different numbers of tokens."""

    def denoise(self, block_BK: Tensor, context: Context, t_B: Tensor | Sequence[float] | float | None) -> Tensor:
        """Logits (B, K, V) for one noisy block per row, masked to the fraction ``t_B``; None: no time conditioning."""


class Kept(Protocol):
    """What a pass over a block has read for B rows, in a model's own form."""

    @property
    def num_rows(self) -> int:
        """B."""

    def select(self, rows: Sequence[int]) -> Self:
        """Some rows, in that order."""

    def join(self, other: Self) -> Self:
        """These rows, then the other's."""


class Keeping(Masked, Protocol):
    """A model that can read a part of a block again while all else stays as an earlier pass has read it, which is an
    approximation wherever tokens see each other."""

    def denoise_kept(self, block_BK: Tensor, context: Context) -> tuple[Tensor, Kept]:
        """As ``denoise``, and what the pass has read."""

    def denoise_part(self, part_BM: Tensor, starts: Sequence[int], context: Context, kept: Kept) -> Tensor:
        """Logits (B, M, V) of M tokens of each row's block from place ``starts`` on."""


class SelfConditioned(Model, Protocol):
    """A model that denoises a canvas of any tokens, none of which is a mask, and is told what it thought of that canvas
    before; see :func:`self_conditioned`. ``block_size`` is the canvas's length."""

    block_size: int

    def denoise_after(self, canvas_BK: Tensor, context: Context, previous: Sequence[Tensor | None]) -> Tensor:
        """Logits (B, K, V) float32 of the token at each place of a canvas behind the context; ``previous`` are each
        row's logits (K, V) of the step before, as they were sampled from, None at a canvas's first step."""


class Denoising(Masked, Protocol):
    """A two-tower model: a causal model with a denoiser that reads its context. See :func:`two_tower`."""

    @property
    def context_tower(self) -> Model:
        """The causal tower alone."""


@dataclass(frozen=True)
class Segment:
    """Tokens after those of ``parent``, an earlier segment of the tree (-1: the context).

    ``wanted`` are ascending positions in ``tokens`` whose next-token logits are needed.
    """

    parent: int
    tokens: tuple[int, ...]
    wanted: tuple[int, ...] = ()


class Branching(Model, Protocol):
    """A model that reads what several sequences share once, see models.context; ``branch_tokens`` is above 0."""

    branch_tokens: int

    def tree_logits(self, context: Context | None, segments: Sequence[Segment]) -> Tensor:
        """Logits (M, V) behind the wanted positions of a token tree on a context of one row."""


class Verifying(Model, Protocol):
    """A model that gives logits behind each of several tokens that it reads in one pass; see :func:`verifying`.

    ``uneven_rows``: rows of a batch may read different numbers of tokens. ``verified_up_to``: the longest context
    behind which it may read several tokens at once, None for any. Its contexts may have ``cut(num_fewer_B,
    logits_BV)``: the context without each row's last tokens, given the logits behind those that are left; None where it
    cannot be cut back, as states cannot.
    """

    uneven_rows: bool
    verified_up_to: int | None

    def extend_logits(
        self, context: Context, ids_BK: Tensor, lengths_B: Sequence[int], wanted: Sequence[tuple[int, int]]
    ) -> tuple[Context, Tensor]:
        """The context after each row's new tokens, and logits (M, V) float32 behind the wanted (row, column)."""


class Remote(Model, Protocol):
    """A model behind a server: it computes nothing here. ``on_retry`` hears of every request that is asked again.
    ``asks_chats``: it is sent messages, after ``check_chats`` found that its server answers what these say."""

    is_remote: bool
    asks_chats: bool
    on_retry: Callable[[Retried], None]

    def check_chats(self, prompts: Iterable[str]) -> None: ...


class Stepping(Model, Protocol):
    """A model that can keep keys and values in buffers of fixed size: its ``prefill`` takes ``static``, the size; see
    :func:`stepping`. ``verified_up_to``: the longest context for which that is known, None for any."""

    verified_up_to: int | None


class ReadsOn(Model, Protocol):
    """A model whose ``extend`` reads several tokens of each row in one pass, as it reads whole rows; see
    :func:`reads_on`. ``verified_up_to``: the longest row for which that is known, None for any."""

    verified_up_to: int | None


class Family(Protocol[ContextT]):
    """A family's own class, whose contexts are of one kind."""

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> ContextT: ...
    def extend(self, context: ContextT, ids_BK: Tensor) -> ContextT: ...
    def next_logits(self, context: ContextT) -> Tensor: ...
    def context_logits(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, last: int | None = None
    ) -> Tensor: ...


class PairFamily(Family[ContextT], Protocol[ContextT]):
    """The class of a family of two-tower models."""

    def denoise(self, block_BK: Tensor, context: ContextT, t_B: Tensor | Sequence[float] | float | None) -> Tensor: ...


def as_model(family: Family[ContextT]) -> Model:
    """The model, its contexts opaque."""
    return cast(Model, family)


def as_masked(family: PairFamily[ContextT]) -> Masked:
    """The same for a model that predicts masked tokens."""
    return cast(Masked, family)


def as_pair(family: PairFamily[ContextT]) -> Denoising:
    """The same for a two-tower model."""
    return cast(Denoising, family)


def has_denoiser(model: Model) -> TypeGuard[Denoising]:
    """Whether a model is a two-tower model: one network predicts masks, and a causal one reads the context."""
    return model.has_denoiser and not getattr(model, "one_network", False)


def two_tower(model: Model, needed_by: str) -> Denoising:
    """The model as a two-tower model. UserError with the message ``needed_by`` if it is none."""
    if not has_denoiser(model):
        raise UserError(needed_by)
    return model


def self_conditioned(model: Model, needed_by: str) -> SelfConditioned:
    """The model as one that is told its earlier logits. UserError with the message ``needed_by`` if it is not."""
    if not hasattr(model, "denoise_after"):
        raise UserError(needed_by)
    return cast(SelfConditioned, model)


def masked(model: Model) -> Masked:
    """The model as one that predicts masked tokens; whether it does is told by :func:`lacks`."""
    return cast(Masked, model)


def lacks(model: Model, ability: Ability) -> bool:
    """Whether a model cannot do what is needed."""
    if ability == "causal":
        return model.has_denoiser and not has_denoiser(model)
    return not (has_denoiser(model) if ability == "two towers" else model.has_denoiser)


def branching(model: Model) -> Branching | None:
    """The model if it reads token trees, else None."""
    return cast(Branching, model) if getattr(model, "branch_tokens", 0) else None


def verifying(model: Model, needed_by: str) -> Verifying:
    """The model as one that can verify drafted tokens. UserError with the message ``needed_by`` if it cannot."""
    if not getattr(model, "verifies", False):
        raise UserError(needed_by)
    return cast(Verifying, model)


def stepping(model: Model, needed_by: str) -> Stepping:
    """The model as one that steps over a static cache. UserError with the message ``needed_by`` if it cannot."""
    if not getattr(model, "steps_statically", False):
        raise UserError(needed_by)
    return cast(Stepping, model)


def remote(model: Model) -> Remote | None:
    """The model if it is behind a server, else None."""
    return cast(Remote, model) if getattr(model, "is_remote", False) else None


def reads_on(model: Model) -> ReadsOn | None:
    """The model if it goes on from a beginning that several rows share, rows beside each other, else None."""
    return cast(ReadsOn, model) if getattr(model, "shares_beginnings", False) else None


def text_codec(model: Model) -> TextCodec:
    """The model's tokenizer. UserError if it has none."""
    if model.tokenizer is None:
        raise UserError(f"checkpoint {model.checkpoint.name} has no tokenizer files: tasks are text, it needs one")
    return model.tokenizer
