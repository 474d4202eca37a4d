"""A decoder's parameters as a plan and the command line set them: read, checked against its ``Params``, and crossed.

``--set name=value[,value…]``, or a plan's table ``[set]``, reaches any parameter of any decoder; the shorthands are
options of their own. Nothing here imports torch until a decoder's parameters are needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Protocol, cast

from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean
from twotower_eval.records import AUTO, Cell, DecoderSpec
from twotower_eval.strict import check_value, plain

SHORTHANDS = {
    "block_sizes": "block_size",
    "steps": "steps_per_block",
    "thresholds": "threshold",
    "temperature": "temperature",
}  # shorthand fields of plans -> the parameters that they set
# AUTO of steps is the block size; as a decoder it is what fits the model, and the usual one before a model is known.
BASELINE_DECODER, ENDPOINT_DECODER = "autoregressive", "endpoint"
USUAL = "block_diffusion"
SHORT_NAMES = {"ar": "autoregressive"}
BEFORE: Mapping[str, tuple[Any, ...]] = {"block_sizes": (16,), "steps": (AUTO,), "thresholds": (0.8,)}
HAVE_BEFORE = ("block_diffusion", "reference")  # decoders whose own defaults these are
Value = str | int | float | bool | None
Settings = Mapping[str, tuple[Value, ...]]  # by parameter; crossed in this order


_VALUE = re.compile(r'\s*(?:"((?:[^"]|"")*)"|((?:[^",\s][^,]*?)?))\s*(,|\Z)')


class Bare(str):
    """A text that was typed without quotes: a number, none, true or false where its parameter may be that."""


class Decoding(Protocol):
    """The decoder fields of a plan."""

    @property
    def decoder(self) -> str: ...
    @property
    def block_sizes(self) -> tuple[int, ...] | None: ...
    @property
    def steps(self) -> tuple[int | typing.Literal["auto"], ...] | None: ...
    @property
    def thresholds(self) -> tuple[float, ...] | None: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def set(self) -> Settings | None: ...


class DecodesBaseline(Protocol):
    """The fields of a plan that say how its baseline is decoded."""

    @property
    def serves_baseline(self) -> bool: ...
    @property
    def baseline_decoder(self) -> str | None: ...
    @property
    def baseline_set(self) -> Settings | None: ...
    @property
    def temperature(self) -> float | None: ...


def cross_decoders(plan: Decoding) -> tuple[DecoderSpec, ...]:
    """All decoder settings of the plan, crossed, duplicates once.

    The order is block sizes, steps, thresholds, then the parameters of ``set`` in their order; the last changes
    fastest. What is not given is what the decoder's own ``Params`` say, except for the temperature: without one, specs
    are greedy, as both arms decode at the same. UserError for whatever is given and the decoder does not have.
    """
    kind = _meant(plan.decoder)
    names = _names(kind)
    given = _shorthands(plan, names) | (_checked(kind, plan.set) if plan.set else {})
    axes = {param: given[param] for param in (*SHORTHANDS.values(), *given) if param in given}
    specs: dict[tuple[tuple[str, bool, Any], ...], DecoderSpec] = {}
    for values in product(*axes.values()):
        spec = _spec(kind, dict(zip(axes, values, strict=True)))
        key = tuple((name, isinstance(value, bool), value) for name, value in spec.params.items())  # 1 is not True
        specs.setdefault(key, spec)
    return tuple(specs.values())


def baseline_spec(plan: DecodesBaseline) -> DecoderSpec:
    """The decoder of a plan's baseline, at the temperature of both arms.

    UserError for whatever is given and that decoder does not have.
    """
    kind = plan.baseline_decoder or (ENDPOINT_DECODER if plan.serves_baseline else BASELINE_DECODER)
    given = {name: values[0] for name, values in _checked(kind, plan.baseline_set or {}, "baseline_set").items()}
    temperature = float(plan.temperature or 0)
    if "temperature" in _names(kind):
        given["temperature"] = temperature
    elif temperature:
        raise UserError(f"decoder {kind!r} has no temperature: drop it, or change --baseline-decoder")
    return _spec(kind, given)


def _shorthands(plan: Decoding, names: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    """The parameters that a plan's own fields give, each with its values."""
    given: dict[str, tuple[Value, ...]] = {}
    kind = _meant(plan.decoder)
    for field, param in SHORTHANDS.items():
        value = getattr(plan, field)
        if param == "temperature":
            value = (float(value or 0),) if value or param in names else None
        if value is None:
            continue
        option = field.replace("_", "-")
        if param not in names:
            raise UserError(f"decoder {kind!r} has no {param}: drop {option} or change decoder")
        if AUTO in value and "block_size" not in names:
            raise UserError(f"steps {AUTO} are the block size, and decoder {kind!r} has none: give a number")
        given[param] = value
    return given


def _spec(kind: str, params: Mapping[str, Value]) -> DecoderSpec:
    """A decoder's specification; steps that are ``auto``, or None, are its block size."""
    from twotower_eval.engine.decoders import decoder_spec

    said = {name: value for name, value in params.items() if (name, value) != ("steps_per_block", AUTO)}
    spec = decoder_spec(kind, **said)
    open_steps = len(said) < len(params) or spec.params.get("steps_per_block", AUTO) is None
    if open_steps and spec.params.get("block_size") is not None:
        spec = decoder_spec(kind, **{**said, "steps_per_block": spec.params["block_size"]})
    _check_plain(spec)
    threshold = spec.params.get("threshold")
    # Above 1 it is the fixed schedule of reference outputs. In a plan it is a slip: nothing is ever that sure.
    if not spec.is_plug_in and isinstance(threshold, (int, float)) and threshold > 1:
        raise UserError(f"a threshold is a probability, {threshold:g} is above 1: take 1 for the strictest")
    return spec


def block_sizes(plan: Decoding) -> tuple[int, ...]:
    """The block sizes that a plan decodes with; the usual one where the decoder has no such parameter, as it may still
    use blocks."""
    sizes = dict.fromkeys(spec.params.get("block_size") for spec in cross_decoders(plan))
    return tuple(size for size in sizes if isinstance(size, int)) or BEFORE["block_sizes"]


def given_settings(plan: Mapping[str, object], cells: Sequence[Cell]) -> dict[str, object]:
    """A run's stored plan without the block sizes, steps and thresholds that stand in it though nobody gave them.

    Until these could be left open, manifests held ``BEFORE`` for every decoder: where it has no such parameter, where
    ``set`` gives it, and where it is the decoder's own default.
    """
    there = {name for cell in cells if cell.arm == "candidate" for name in cell.decoder.params}
    also = plan.get("set") or {}
    kept = dict(plan)
    for field, before in BEFORE.items():
        param, value = SHORTHANDS[field], plan.get(field)
        ours = plan.get("decoder", "block_diffusion") in HAVE_BEFORE
        unasked = ours or param in cast(Mapping[str, object], also) or bool(cells and param not in there)
        if unasked and isinstance(value, list | tuple) and tuple(value) == before:
            del kept[field]
    return kept


def as_tuple(value: object) -> tuple[object, ...]:
    """What can be gone through as a tuple of plain values; one value as a tuple of one."""
    held = plain(value)
    return held if isinstance(held, tuple) else (held,)


def settings_from(given: object, field: str = "set") -> dict[str, tuple[Value, ...]]:
    """``set`` as a plan holds it: each parameter with a tuple of its values; a single value may stand alone."""
    if not isinstance(given, Mapping):
        raise UserError(f"{field} must be a table of a decoder's parameters, not {given!r}")
    found: dict[str, tuple[Value, ...]] = {}
    for name, value in given.items():
        values = check_value(f"{field}.{name}", tuple[Value, ...], as_tuple(value))
        found[str(name)] = cast(tuple[Value, ...], values)
    for name, values in found.items():
        if not values:
            raise UserError(f"{field}.{name} is empty: name at least one value")
        written = [_text(value) for value in values]  # 1.0 is 1 there
        if twice := sorted({one for one in written if written.count(one) > 1}):
            raise UserError(f"{field}.{name} names {', '.join(twice)} twice")
    return found


def one_value_each(given: object) -> dict[str, tuple[Value, ...]]:
    """``baseline_set`` as a plan holds it: a baseline is one operating point, so each parameter has one value."""
    found = settings_from(given, "baseline_set")
    for name, values in found.items():
        if len(values) > 1:
            named = ", ".join(map(_text, values))
            raise UserError(f"baseline_set.{name} names {named}: a baseline has one value of each parameter")
        if name == "temperature":
            raise UserError("temperature is the same for both arms: give --temperature, not baseline_set")
        if name == "trace":
            raise UserError("trace changes no answer, so it makes no operating point: drop it from baseline_set")
    return found


def check_given_once(settings: Mapping[str, object], given: Mapping[str, object]) -> None:
    """UserError for a parameter given both in ``set`` and as a field, and for a temperature or a trace in
    ``set``."""
    if "trace" in settings:
        raise UserError("trace changes no answer, so it makes no operating point: give --trace of `run`, not set")
    for field, param in SHORTHANDS.items():
        option = f"--{field.replace('_', '-')}"
        if param in settings and field == "temperature":
            raise UserError(f"temperature is the same for both arms and all operating points: give {option}, not set")
        if param in settings and field in given:
            raise UserError(f"{param} is given twice, by {option} (or {field} in a plan) and by set: drop one")


def parse_set(items: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse ``name=value[,value…]`` of each ``--set``; values are still texts, one with a comma is in double quotes.

    >>> parse_set(["width=4,8", 'order="a,b"'])
    {'width': ('4', '8'), 'order': ('a,b',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for item in items:
        name, equals, text = (part.strip() for part in item.partition("="))
        if not (name and equals):
            raise UserError(f"--set takes name=value[,value…], not {item!r}")
        name = name.replace("-", "_")
        if name in found:
            raise UserError(f"--set names {name} twice: put its values behind one, as {name}=value,value")
        found[name] = _values(item, text)
    return found


def _values(item: str, text: str) -> tuple[str, ...]:
    """The values of one ``--set``: in quotes, where a quote is written twice, or bare."""
    values: list[str] = []
    place, more = 0, True
    while more:
        found = _VALUE.match(text, place)
        if found is None:
            raise UserError(f"--set {item!r}: a value in quotes ends with a quote, behind which a comma may follow")
        quoted, bare, comma = found.groups()
        values.append(Bare(bare) if quoted is None else quoted.replace('""', '"'))
        place, more = found.end(), bool(comma)
    return tuple(values)


def typed_settings(
    kind: str, given: Mapping[str, Sequence[str]], option: str = "--set"
) -> dict[str, tuple[Value, ...]]:
    """The result of :func:`parse_set` with each text converted to the type of its parameter; UserError if it does not
    fit.

    ``none`` is None if the parameter may be that; ``true`` and ``false`` are truth values. What stood in quotes, or
    is a text in Python, stays one if the parameter may be a text.
    """
    kind = _meant(kind)
    hints = _hints(kind)
    _check_known(kind, given, hints)
    return {
        name: tuple(_typed(f"{option} {name}", hints[name], text) for text in texts) for name, texts in given.items()
    }


def set_text(name: str, values: Sequence[object]) -> str:
    """``name=value,value`` as ``--set`` takes it.

    >>> set_text("width", [4, 0.5, None, True])
    'width=4,0.5,none,true'
    """
    return f"{name}={','.join(map(_written, values))}"


def _written(value: object) -> str:
    """A value as ``--set`` takes it; a text in quotes where it would be read as something else without."""
    text = _text(value)
    odd = text != text.strip() or any(sign in text for sign in ',"')
    if isinstance(value, str) and (odd or any(_read(kind, text) for kind in (int, float, bool, types.NoneType))):
        return '"' + text.replace('"', '""') + '"'
    return text


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _meant(kind: str) -> str:
    """The decoder that a name stands for before any model is known."""
    return USUAL if kind == AUTO else SHORT_NAMES.get(kind, kind)


def _names(kind: str) -> list[str]:
    from twotower_eval.engine.decoders import decoder_class

    return [field.name for field in dataclasses.fields(decoder_class(kind).Params)]


def _hints(kind: str) -> dict[str, object]:
    """The parameters of a decoder, by name, with their types."""
    from twotower_eval.engine.decoders import decoder_class

    params = decoder_class(kind).Params
    try:
        hints = typing.get_type_hints(params, include_extras=True)
    except (NameError, TypeError) as error:
        raise UserError(f"decoder {kind!r}: the types of its Params cannot be read: {error}") from error
    return {name: hints[name] for name in _names(kind)}


def _check_known(kind: str, names: Mapping[str, object], hints: Mapping[str, object]) -> None:
    for name in names:
        if name not in hints:
            raise UserError(f"decoder {kind!r} has no parameter {name!r} to set{did_you_mean(name, hints)}")


def _checked(kind: str, settings: Settings, field: str = "set") -> dict[str, tuple[Value, ...]]:
    hints = _hints(kind)
    _check_known(kind, settings, hints)
    found = {}
    for name, values in settings.items():
        found[name] = tuple(_held(f"{field}.{name}", hints[name], value) for value in values)
    return found


def _held(name: str, hint: object, value: Value) -> Value:
    try:
        held = cast(Value, check_value(name, hint, value))
    except TypeError as error:  # msgspec knows no such type
        raise UserError(f"{name}: its type, {hint}, is none that a plan can express: {error}") from error
    return held


def _typed(name: str, hint: object, text: str) -> Value:
    """A text converted to a parameter's type; UserError says what was expected, and of which ``name``."""
    if not isinstance(text, Bare):
        with contextlib.suppress(UserError):  # it may be meant as something else
            return _held(name, hint, text)
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    either = typing.get_origin(bare) in (typing.Union, types.UnionType)
    for one in typing.get_args(bare) if either else (bare,):
        found = _read(one, text)
        if found:
            return _held(name, hint, found[0])
    return _held(name, hint, str(text))


def _read(kind: object, text: str) -> tuple[Value, ...]:
    """The value of a text as one of these types; nothing if it is none."""
    if typing.get_origin(kind) is typing.Annotated:
        return _read(typing.get_args(kind)[0], text)
    if typing.get_origin(kind) is typing.Literal:
        return tuple(value for value in typing.get_args(kind) if _text(value) == text)[:1]
    if kind in (bool, types.NoneType):
        known: dict[str, Value] = {"none": None} if kind is types.NoneType else {"true": True, "false": False}
        return (known[text.lower()],) if text.lower() in known else ()
    if kind not in (int, float):
        return ()
    try:
        return (int(text) if kind is int else float(text),)
    except ValueError:
        return ()


def _check_plain(spec: DecoderSpec) -> None:
    """UserError for a parameter that no cell can hold, as records hold plain values."""
    for name, value in spec.params.items():
        if value is not None and not isinstance(value, (str, int, float)):
            plain = "a text, a number, true or false, or None"
            raise UserError(f"decoder {spec.kind!r}: its parameter {name} is a {type(value).__name__}; take {plain}")
