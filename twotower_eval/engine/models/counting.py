"""Counts forwards; the only place that does: per sequence, with the number of sequences that shared each. Also finds
forwards that bypass the count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from threading import get_ident
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from twotower_eval.engine.models.protocol import (
    Context,
    Denoising,
    Keeping,
    Kept,
    Model,
    Segment,
    SelfConditioned,
    Verifying,
)
from twotower_eval.engine.models.witness import Lengths, Witness
from twotower_eval.records import Passes, PassKind

T = TypeVar("T")
MAX_HELD = 2  # gather when more than this many times the needed rows are held


class CountedContext:
    """Batch rows, and the model's contexts that hold them.

    Selecting and joining only record rows; they are gathered when a model is called, in one copy, or when most of the
    held rows are no longer needed.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self.rows = tuple(row for part in parts for row in part.rows)

    @property
    def inner(self) -> Context:
        """The model's context of just these rows."""
        if len(self._parts) > 1 or not self._parts[0].is_whole:
            self._gather()
        return self._parts[0].context

    def select(self, positions: Sequence[int]) -> CountedContext:
        """The context of some of these rows, by ascending position within this context."""
        if len(positions) == len(self.rows):
            return self
        chosen, start = [], 0
        for part in self._parts:
            within = [position - start for position in positions if 0 <= position - start < len(part.rows)]
            start += len(part.rows)
            if within:
                chosen.append(part.select(within))
        return CountedContext(chosen)

    def repeated(self, rows: Sequence[int]) -> CountedContext:
        """The context of this single row, for each of the given rows."""
        return CountedContext([whole(self.inner.select([0] * len(rows)), rows)])

    def cut(self, num_fewer_B: Sequence[int], logits_BV: Tensor) -> CountedContext | None:
        """The context without each row's last tokens, see :class:`protocol.Verifying`; None where it cannot be cut."""
        cut: Callable[..., Context | None] = getattr(self.inner, "cut", lambda *_: None)
        context = cut(num_fewer_B, logits_BV)
        return None if context is None else CountedContext([whole(context, self.rows)])

    def join(self, other: CountedContext) -> CountedContext:
        """The context of these rows, then of the other's."""
        joined = CountedContext(self._parts + other._parts)
        if joined.num_held > MAX_HELD * len(joined.rows):
            joined._gather()
        return joined

    @property
    def num_held(self) -> int:
        """Rows of all contexts that hold these."""
        return sum({id(part.context): part.size for part in self._parts}.values())

    def _gather(self) -> None:
        context = _gathered(self._parts)
        self._parts = (whole(context, self.rows),)


@dataclass(frozen=True)
class Part:
    """Some rows of a model's context of ``size`` rows: their batch numbers, and their positions in it."""

    context: Context
    size: int
    rows: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the context."""
        return len(self.positions) == self.size

    def select(self, which: Sequence[int]) -> Part:
        """Some of these rows."""
        return replace(self, rows=tuple(self.rows[i] for i in which), positions=tuple(self.positions[i] for i in which))


def whole(context: Context, rows: Sequence[int]) -> Part:
    """A context of just these rows."""
    return Part(context, len(rows), tuple(rows), tuple(range(len(rows))))


def joined(contexts: Sequence[CountedContext]) -> CountedContext:
    """The context of all rows of several."""
    return contexts[0] if len(contexts) == 1 else CountedContext([part for one in contexts for part in one._parts])


def _gathered(parts: Sequence[Part]) -> Context:
    """One context of the parts' rows; a single copy if the model's contexts support it."""
    in_one_copy = getattr(parts[0].context, "gathered", None)
    if in_one_copy is not None:
        gathered: Context = in_one_copy([(part.context, part.positions) for part in parts])
        return gathered
    first, *others = (part.context if part.is_whole else part.context.select(part.positions) for part in parts)
    for other in others:
        first = first.join(other)
    return first


def reads_prompts(model: object) -> bool:
    """Whether ``prefill`` and ``extend`` are forwards of this model."""
    return bool(getattr(model, "reads_prompts", True))


class CountingModel:
    """A model as decoders see it; counts ``num_context_forwards`` and ``num_denoiser_forwards`` per batch row."""

    def __init__(self, model: Model, num_rows: int) -> None:
        self.model = model
        self._pair = cast(Denoising, model)  # only decoders that require a denoiser call it
        self.num_context_forwards = [0] * num_rows
        self.num_denoiser_forwards = [0] * num_rows

    def prefill(self, rows: Sequence[int], ids_BS: Tensor, lengths: Sequence[int]) -> CountedContext:
        """Prompts of the given rows."""
        context = self.model.prefill(ids_BS, lengths)
        if reads_prompts(self.model):
            self._count(self.num_context_forwards, [row for row, length in zip(rows, lengths, strict=True) if length])
        return CountedContext([whole(context, rows)])

    def extend(self, context: CountedContext, ids_BK: Tensor) -> CountedContext:
        """K more tokens for each row of the context."""
        extended = self.model.extend(context.inner, ids_BK)
        if reads_prompts(self.model):
            self._count(self.num_context_forwards, context.rows)
        return CountedContext([whole(extended, context.rows)])

    def extend_logits(
        self,
        context: CountedContext,
        ids_BK: Tensor,
        lengths_B: Sequence[int],
        wanted: Sequence[tuple[int, int]],
    ) -> tuple[CountedContext, Tensor]:
        """Each row's new tokens, padded on the right, and logits (M, V) behind the wanted (row, column)."""
        extended, logits_MV = cast(Verifying, self.model).extend_logits(context.inner, ids_BK, lengths_B, wanted)
        self._count(self.num_context_forwards, context.rows)
        return CountedContext([whole(extended, context.rows)]), logits_MV

    def denoise(self, block_BK: Tensor, context: CountedContext, t_B: Sequence[float] | None) -> Tensor:
        """Denoiser logits (B, K, V) for each row of the context."""
        logits = self._pair.denoise(block_BK, context.inner, t_B)
        self._count(self.num_denoiser_forwards, context.rows)
        return logits

    def denoise_kept(self, block_BK: Tensor, context: CountedContext) -> tuple[Tensor, Kept]:
        """As denoise, and what it has read, for :meth:`denoise_part`."""
        logits, kept = cast(Keeping, self.model).denoise_kept(block_BK, context.inner)
        self._count(self.num_denoiser_forwards, context.rows)
        return logits, kept

    def denoise_part(self, part_BM: Tensor, starts: Sequence[int], context: CountedContext, kept: Kept) -> Tensor:
        """Denoiser logits (B, M, V) for a part of each row's block, all else as it was kept."""
        logits = cast(Keeping, self.model).denoise_part(part_BM, starts, context.inner, kept)
        self._count(self.num_denoiser_forwards, context.rows)
        return logits

    def denoise_after(self, canvas_BK: Tensor, context: CountedContext, previous: Sequence[Tensor | None]) -> Tensor:
        """Denoiser logits (B, K, V) of a canvas of which each row's earlier logits are known."""
        logits = cast(SelfConditioned, self.model).denoise_after(canvas_BK, context.inner, previous)
        self._count(self.num_denoiser_forwards, context.rows)
        return logits

    def next_logits(self, context: CountedContext) -> Tensor:
        """Logits (B, V) from the context as it is: no forward, so not counted."""
        return self.model.next_logits(context.inner)

    def _count(self, counts: list[int], rows: Sequence[int]) -> None:
        for row in rows:
            counts[row] += 1


@dataclass
class RowSteps:
    """Rows that each forward of a kind served, in order, and the tokens of each row in it."""

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def share(self, width: int) -> float | None:
        """Share of row-steps that served a sequence, of ``width`` slots; None without forwards."""
        return sum(self.rows) / (width * len(self.rows)) if self.rows else None


class WatchedModel:
    """A model that records how many rows each of its forwards serves. Decoders treat it like the model itself.

    Decoders never pass a finished row to a forward, so every row here belongs to a generation. Passes over whole rows
    (``context_logits``, ``tree_logits``) count as prefill. Calls of ``context_tower`` count alike. A witness, while
    there is one, receives all inputs and outputs.
    """

    def __init__(self, model: object, of: WatchedModel | None = None) -> None:
        self._model: Any = model  # everything else is passed on, and recorded if it is a forward
        self.prefills, self.extensions, self.denoisings = RowSteps(), RowSteps(), RowSteps()
        self.running: list[int] = []  # threads inside a recorded forward
        self._witnesses: list[Witness] = []  # none, or one
        if of is not None:
            self._witnesses = of._witnesses
            self.prefills, self.extensions, self.denoisings = of.prefills, of.extensions, of.denoisings
            self.running, self._before = of.running, of._before  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def context_tower(self) -> WatchedModel:
        """The model's context tower, recorded as well."""
        return WatchedModel(self._model.context_tower, of=self)

    @property
    def passes(self) -> tuple[Passes, ...]:
        """All recorded passes, by kind and size."""
        kinds: tuple[tuple[PassKind, RowSteps], ...] = (
            ("prefill", self.prefills),
            ("extend", self.extensions),
            ("denoise", self.denoisings),
        )
        return tuple(
            Passes(kind=kind, rows=rows, tokens=tokens, num=num)
            for kind, steps in kinds
            for (rows, tokens), num in sorted(Counter(zip(steps.rows, steps.tokens, strict=True)).items())
        )

    def forget(self) -> None:
        """Note anew."""
        for steps in (self.prefills, self.extensions, self.denoisings):
            steps.rows.clear()
            steps.tokens.clear()

    @contextmanager
    def witnessed(self, prompt: Sequence[int]) -> Iterator[Witness]:
        """Context in which a witness for this prompt records the next call; it reads every row of logits, which takes
        time."""
        witness = Witness(prompt, getattr(self, "mask_token_id", None))
        self._witnesses.append(witness)
        try:
            yield witness
        finally:
            self._witnesses.remove(witness)

    def prefill(self, ids_BS: Tensor, *more: object, **options: object) -> Context:
        """The model's own, recorded; rows without a token to be read are no part of the forward."""
        lengths = _lengths(more, options)
        num_read = sum(int(length) > 0 for length in (ids_BS.shape[1:] * len(ids_BS) if lengths is None else lengths))
        steps, size = self.prefills if num_read and reads_prompts(self._model) else None, (num_read, ids_BS.shape[1])
        made: Context = self._run(steps, size, self._model.prefill, ids_BS, *more, **options)
        for witness in self._listening():
            witness.prefilled(ids_BS, _lengths(more, options))
        return made

    def context_logits(self, ids_BS: Tensor, *more: object, **options: object) -> Tensor:
        """The model's own, recorded."""
        logits: Tensor = self._run(self.prefills, ids_BS.shape, self._model.context_logits, ids_BS, *more, **options)
        for witness in self._listening():
            witness.read(ids_BS, _lengths(more, options), logits)
        return logits

    def tree_logits(self, context: Context | None, segments: Sequence[Segment]) -> Tensor:
        """The model's own, recorded as one row of all its tokens."""
        size = (1, sum(len(segment.tokens) for segment in segments))
        logits: Tensor = self._run(self.prefills, size, self._model.tree_logits, context, segments)
        for witness in self._listening():
            witness.read_tree(segments, logits)
        return logits

    def extend(self, context: Context, ids_BK: Tensor, *more: object, **options: object) -> Context:
        """The model's own, recorded."""
        steps = self.extensions if reads_prompts(self._model) else None
        made: Context = self._run(steps, ids_BK.shape, self._model.extend, context, ids_BK, *more, **options)
        for witness in self._listening():
            witness.extended(ids_BK, _lengths(more, options))
        return made

    def extend_logits(
        self, context: Context, ids_BK: Tensor, *more: object, **options: object
    ) -> tuple[Context, Tensor]:
        """The model's own, recorded."""
        call = self._model.extend_logits
        made: tuple[Context, Tensor] = self._run(self.extensions, ids_BK.shape, call, context, ids_BK, *more, **options)
        for witness in self._listening():
            wanted = cast("Sequence[tuple[int, int]]", options["wanted"] if "wanted" in options else more[1])
            witness.extended(ids_BK, _lengths(more, options), wanted, made[1])
        return made

    def denoise(self, block_BK: Tensor, *more: object, **options: object) -> Tensor:
        """The model's own, recorded."""
        logits: Tensor = self._run(self.denoisings, block_BK.shape, self._model.denoise, block_BK, *more, **options)
        for witness in self._listening():
            witness.denoised(block_BK, logits, _held(more[0] if more else options.get("context")))
        return logits

    def denoise_kept(self, block_BK: Tensor, context: Context) -> tuple[Tensor, Kept]:
        """The model's own, recorded."""
        call = self._model.denoise_kept
        made: tuple[Tensor, Kept] = self._run(self.denoisings, block_BK.shape, call, block_BK, context)
        for witness in self._listening():
            witness.denoised(block_BK, made[0], _held(context))
        return made

    def denoise_part(self, part_BM: Tensor, starts: Sequence[int], context: Context, kept: Kept) -> Tensor:
        """The model's own, recorded with the tokens that it reads."""
        call = self._model.denoise_part
        logits: Tensor = self._run(self.denoisings, part_BM.shape, call, part_BM, starts, context, kept)
        for witness in self._listening():
            held = [length + start for length, start in zip(context.lengths, starts, strict=True)]
            witness.denoised(part_BM, logits, held)
        return logits

    def denoise_after(self, canvas_BK: Tensor, context: Context, previous: Sequence[Tensor | None]) -> Tensor:
        """The model's own, recorded."""
        call = self._model.denoise_after
        logits: Tensor = self._run(self.denoisings, canvas_BK.shape, call, canvas_BK, context, previous)
        for witness in self._listening():
            witness.denoised(canvas_BK, logits, _held(context))
        return logits

    def next_logits(self, context: Context) -> Tensor:
        """The model's own: no forward, so only a witness receives it."""
        logits: Tensor = self._model.next_logits(context)
        for witness in self._listening():
            witness.asked(logits)
        return logits

    def _listening(self) -> Sequence[Witness]:
        """The witness, unless this call is part of a forward that it receives anyway."""
        return () if not self._witnesses or get_ident() in self.running else self._witnesses

    def _run(
        self, steps: RowSteps | None, size: Sequence[int], call: Callable[..., T], *given: object, **options: object
    ) -> T:
        """``steps`` None: no forward, of a model that keeps the tokens alone."""
        thread = get_ident()
        if steps is None or thread in self.running:  # the latter is part of a recorded forward
            return call(*given, **options)
        self._before()
        rows, tokens = size
        steps.rows.append(rows)
        steps.tokens.append(tokens)
        self.running.append(thread)
        try:
            return call(*given, **options)
        finally:
            self.running.remove(thread)

    def _before(self) -> None:
        """Called before a forward runs."""


def _held(context: object) -> Sequence[int] | None:
    """Number of tokens of each row of a context, for contexts that report it."""
    lengths = getattr(context, "lengths", None)
    return lengths if isinstance(lengths, tuple) else None


def _lengths(more: Sequence[object], options: Mapping[str, object]) -> Lengths:
    """The rows' lengths, the first argument after the ids; None if all rows are full."""
    return cast(Lengths, options["lengths_B"] if "lengths_B" in options else more[0] if more else None)


OF_BLOCKS = ("prefill", "extend", "denoise", "denoise_after", "denoise_kept", "denoise_part")
NOTED = (*OF_BLOCKS, "context_logits", "extend_logits", "tree_logits", "next_logits")


@contextmanager
def watched_in_place(model: Model) -> Iterator[WatchedModel]:
    """Record the forwards of a model that others hold already: its own methods, and its context tower's, are wrapped
    for the duration of the context."""
    parts: list[object] = [model, *(part for part in (getattr(model, "context_tower", None),) if part is not None)]
    own = [{name: getattr(part, name) for name in NOTED if hasattr(part, name)} for part in parts]
    facts = {"mask_token_id": getattr(model, "mask_token_id", None), "reads_prompts": reads_prompts(model)}
    watched = WatchedModel(SimpleNamespace(**own[0], **facts))
    with ExitStack() as stack:
        for part, methods in zip(parts, own, strict=True):
            noted = watched if part is model else WatchedModel(SimpleNamespace(**methods), of=watched)
            for name in methods:
                stack.callback(_put_back, part, name, vars(part).get(name))
                setattr(part, name, getattr(noted, name))
        yield watched


def _put_back(part: object, name: str, before: object) -> None:
    """Restore an object's own attribute, or remove it if there was none."""
    if before is None:
        delattr(part, name)
    else:
        setattr(part, name, before)


class UncountedForwards:
    """Counts what enters the networks of some models outside of recorded forwards, inside :meth:`noted`."""

    def __init__(self, models: Iterable[Model]) -> None:
        models = list(models)
        self._entrances = _entrances(models)
        self._with_graphs = [part for model in models for part in _networks(model) if "graphs" in vars(part)]
        self._running: Sequence[int] = ()
        self.num = 0

    @contextmanager
    def noted(self, watched: WatchedModel) -> Iterator[None]:
        """Context that counts, from 0, what is outside a forward of ``watched``; the result is ``num``."""
        self._running, self.num = watched.running, 0
        with ExitStack() as stack:
            for module in self._entrances:
                stack.callback(module.register_forward_pre_hook(self._entered).remove)
            for graphs in {id(part.graphs): part.graphs for part in self._with_graphs if part.graphs}.values():
                for name in ("extend", "denoise"):
                    setattr(graphs, name, self._graph_step_entered(getattr(graphs, name)))
                    stack.callback(delattr, graphs, name)
            yield

    def _entered(self, module: nn.Module, given: object) -> None:
        if get_ident() not in self._running:
            self.num += 1

    def _graph_step_entered(self, step: Callable[..., T]) -> Callable[..., T]:
        """A step run as a graph, which calls no module."""

        def heard(*given: object) -> T:
            if get_ident() not in self._running:
                self.num += 1
            return step(*given)

        return heard


def _networks(model: Model) -> list[nn.Module]:
    """The modules of a model: itself, or those that it holds."""
    if isinstance(model, nn.Module):
        return list(model.modules())
    held = vars(model).values() if hasattr(model, "__dict__") else ()
    return [module for part in held if isinstance(part, nn.Module) for module in part.modules()]


def _entrances(models: Iterable[Model]) -> list[nn.Module]:
    """The modules where tokens enter: embeddings, the first of every list of layers, and whole models."""
    found: dict[int, nn.Module] = {}
    for model in models:
        networks = _networks(model)
        firsts = [part[0] for part in networks if isinstance(part, nn.ModuleList) and len(part)]
        wholes = [whole for whole in (getattr(model, "inner", None),) if isinstance(whole, nn.Module)]
        for module in (*wholes, *firsts, *(part for part in networks if isinstance(part, nn.Embedding))):
            found[id(module)] = module
    return list(found.values())
