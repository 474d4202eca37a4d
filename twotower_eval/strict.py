"""Records out of plain JSON, every value held against what its field is annotated with.

Nothing unknown is passed over: a value of another type, a word that no field knows, half a token, a number that is
not finite or beyond 64 bits, and fields that contradict each other are a ValueError that names record and field. The
check of a class is put together once, since journals have tens of thousands of rows. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from twotower_eval.json_text import INT64
from twotower_eval.records import (
    SUMMED_AGGREGATIONS,
    Aggregate,
    CommitStep,
    CostSample,
    Generation,
    Likelihood,
    Score,
    SpeedSample,
    Within,
)

T = TypeVar("T")
Build = Callable[[Any], Any]


class _Misfit(Exception):
    """A value that its field cannot hold; fields on the way to it are put in front while it rises."""

    def __init__(self, wanted: str, value: Any, path: str = "") -> None:
        super().__init__(wanted)
        self.wanted, self.value, self.path = wanted, value, path

    def below(self, name: str) -> _Misfit:
        dot = "" if self.path.startswith("[") or not self.path else "."
        return _Misfit(self.wanted, self.value, f"{name}{dot}{self.path}")


def from_json(cls: type[T], data: Mapping[str, Any]) -> T:
    """Rebuild a record of class ``cls``; whatever does not fit is a ValueError that names record and field."""
    try:
        return typing.cast(T, _record(typing.cast(type, cls))(data))
    except _Misfit as misfit:
        shown = repr(misfit.value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"{cls.__name__}: {misfit.path or 'it'} must be {misfit.wanted}, not {shown}") from misfit


@functools.cache
def _record(cls: type) -> Build:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)
    builds = [(f.name, _build(hints[f.name])) for f in fields]
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    contradiction = _CONTRADICTIONS.get(cls)

    def build(data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise _Misfit("a JSON object", data)
        values = {}
        for name, build_value in builds:
            if name in data:
                try:
                    values[name] = build_value(data[name])
                except _Misfit as misfit:
                    raise misfit.below(name) from None
        if len(values) != len(data):
            raise ValueError(f"{cls.__name__}: unknown field(s) {', '.join(sorted(map(str, set(data) - set(values))))}")
        if not required <= values.keys():
            raise ValueError(f"{cls.__name__}: missing field(s) {', '.join(sorted(required - set(values)))}")
        record = cls(**values)
        said = contradiction(record) if contradiction else None
        if said:
            raise ValueError(f"{cls.__name__}: {said}")
        return record

    return build


@functools.cache
def _build(hint: Any) -> Build:
    """The check of one annotation: a value as the record holds it, or a misfit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _bounded(_build(args[0]), next(bound for bound in args[1:] if isinstance(bound, Within)))
    if origin in (typing.Union, types.UnionType):
        return _either(args)
    if origin is Literal:
        return _word(args)
    if origin is tuple:
        return _sequence(_build(args[0]), args[0])
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(_build(args[1]))
    return {Any: _anything, int: _whole, float: _number, str: _text, bool: _truth}[hint]


def _anything(value: Any) -> Any:
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value not in INT64:
        raise _Misfit("a whole number of at most 64 bits", value)
    return value


def _number(value: Any) -> float:
    if type(value) is int and value in INT64:
        return float(value)
    if not isinstance(value, float):
        raise _Misfit("a number", value)
    if not math.isfinite(value):
        raise _Misfit("a finite number, as others are not JSON compliant", value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Misfit("a text", value)
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Misfit("true or false", value)
    return value


def _word(known: tuple[str, ...]) -> Build:
    def build(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise _Misfit(" or ".join(known), value)
        return value

    return build


def _bounded(inner: Build, bound: Within) -> Build:
    least, most = bound.least, bound.most
    wanted = f"at least {least}" if most is None else f"at most {most}" if least is None else f"from {least} to {most}"

    def build(value: Any) -> Any:
        built = inner(value)
        if (least is not None and built < least) or (most is not None and built > most):
            raise _Misfit(wanted, value)
        return built

    return build


def _either(hints: tuple[Any, ...]) -> Build:
    inner = [_build(hint) for hint in hints if hint is not types.NoneType]
    absent = len(inner) < len(hints)

    def build(value: Any) -> Any:
        if value is None and absent:
            return None
        misfits = []
        for one in inner:
            try:
                return one(value)
            except _Misfit as misfit:
                misfits.append(misfit)
        if len(misfits) == 1:
            raise misfits[0]
        raise _Misfit(" or ".join(misfit.wanted for misfit in misfits), value)

    return build


def _sequence(inner: Build, hint: Any) -> Build:
    plain = hint is int or (typing.get_origin(hint) is typing.Annotated and typing.get_args(hint)[0] is int)
    kinds = {int}

    def build(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise _Misfit("a list", value)
        # Token ids by the hundred: one look at all of them, one by one only where something is odd.
        if plain and (not value or ({*map(type, value)} == kinds and min(value) >= 0 and max(value) in INT64)):
            return tuple(value)
        built = []
        for index, item in enumerate(value):
            try:
                built.append(inner(item))
            except _Misfit as misfit:
                raise misfit.below(f"[{index}]") from None
        return tuple(built)

    return build


def _mapping(inner: Build) -> Build:
    def build(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _Misfit("a JSON object", value)
        built = {}
        for key, item in value.items():
            try:
                built[key] = inner(item)
            except _Misfit as misfit:
                raise misfit.below(f"[{key!r}]") from None
        return built

    return build


def _step(step: CommitStep) -> str | None:
    sizes = len(step.positions), len(step.token_ids), len(step.confidences)
    if len(set(sizes)) > 1:
        return f"{sizes[0]} positions, {sizes[1]} token_ids and {sizes[2]} confidences of one step"
    return f"num_forced is {step.num_forced} of {sizes[0]} commits" if step.num_forced > sizes[0] else None


def _generation(row: Generation) -> str | None:
    num = len(row.token_ids)
    return f"num_tokens is {row.num_tokens}, but there are {num} token_ids" if row.num_tokens != num else None


def _likelihood(row: Likelihood) -> str | None:
    # Draws belong to a bound and to nothing else.
    if (row.kind == "bound") != (row.num_draws is not None):
        return f"kind is {row.kind!r}, but num_draws is {row.num_draws}"
    return None


def _score(row: Score) -> str | None:
    # Without a mean over documents a document may have no value of its own.
    if row.value is not None and row.missing_reason is not None:
        return f"value is {row.value}, but missing_reason is {row.missing_reason!r}"
    if row.value is None and row.missing_reason is None and row.aggregation in (None, "mean"):
        return "value is None without a missing_reason"
    return None


def _aggregate(row: Aggregate) -> str | None:
    # Of functions of sums the documents' parts are kept instead of replicates.
    resampled = row.replicates is not None or row.aggregation in SUMMED_AGGREGATIONS
    if row.value is not None and not resampled and row.missing_reason is None:
        return f"value is {row.value}, but replicates and missing_reason are None"
    lacking = row.value is None or not resampled
    if lacking != (row.missing_reason is not None):
        return f"value is {row.value}, but missing_reason is {row.missing_reason!r}"
    return None


def _speed(row: SpeedSample) -> str | None:
    if row.batch_size != len(row.prompts):
        return f"batch_size is {row.batch_size}, but there are {len(row.prompts)} prompts"
    if (row.peak_memory_bytes is None) != (row.peak_memory_reason is not None):
        return f"peak_memory_bytes is {row.peak_memory_bytes}, but peak_memory_reason is {row.peak_memory_reason!r}"
    return None


def _cost(row: CostSample) -> str | None:
    if (row.part in ("prefill", "ar_step", "bookkeeping")) != (row.block_size is None):
        return f"part is {row.part!r}, but block_size is {row.block_size}"
    return None


# What no annotation says: fields of one record that have to agree.
_CONTRADICTIONS: dict[type, Callable[[Any], str | None]] = {
    CommitStep: _step,
    Generation: _generation,
    Likelihood: _likelihood,
    Score: _score,
    Aggregate: _aggregate,
    SpeedSample: _speed,
    CostSample: _cost,
}
