"""JSON and records made of it, checked by msgspec: every value must fit its field's annotation."""

from __future__ import annotations

import codecs
import functools
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, TypeAlias, TypeVar

import msgspec

from twotower_eval.errors import FileError, UserError
from twotower_eval.records import (
    LEFT_OUT,
    MOST,
    SUMMED_AGGREGATIONS,
    Aggregate,
    CommitStep,
    CostSample,
    Generation,
    GenerationRow,
    Likelihood,
    LikelihoodRow,
    Score,
    SpeedSample,
)

JsonObject: TypeAlias = Mapping[str, object]  # values of any type, which their users check
BOM = "\ufeff"
INT64 = range(-(2**63), 2**63)  # the whole numbers of numpy, Arrow and pandas
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")


def parse_json(text: str, where: str, *, infinities: bool = False, half_pairs: bool = False) -> object:
    """The value of a JSON text. ``where`` begins every error.

    ``infinities`` allows NaN and Infinity, as Python and transformers write them; ``half_pairs`` allows lone
    surrogates.
    """
    if text.startswith(BOM):
        raise FileError(f"{where}: begins with a byte order mark (U+FEFF): save it without one")
    try:
        value = (_LOOSE if infinities else _STRICT).decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise FileError(f"{where}: not valid JSON ({error.msg}, {place})") from error
    except RecursionError as error:
        raise FileError(f"{where}: nested too deeply to be read") from error
    except UserError as error:  # of the hooks below
        raise FileError(f"{where}: {error}") from error
    except ValueError as error:  # the only ValueError left
        raise FileError(f"{where}: a whole number has more digits than Python reads") from error
    if not half_pairs and ("\\u" in text or not text.isascii()):
        check_text(value, where)
    return value


def parse_object(line: bytes, where: str) -> dict[str, object]:
    """The JSON object on a line of a journal, lone surrogates allowed; ``where`` begins every error."""
    try:
        text = line.decode("utf-8", "surrogatepass")  # as journals are written
    except UnicodeDecodeError as error:
        raise FileError(f"{where}: not valid JSON ({error})") from error
    data = parse_json(text, where, half_pairs=True)
    if not isinstance(data, dict):
        raise FileError(f"{where}: not a JSON object")
    return data


def read_utf8(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    UserError that names the file, and the line that is not UTF-8.
    """
    try:
        return decode_utf8(file.read_bytes(), str(file))
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror or error}") from error


def decode_utf8(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark; UserError with the line that is not UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as UTF-32 in the usual order does too
        raise FileError(f"cannot read {where}: it is UTF-16, not UTF-8: save it as UTF-8")
    try:
        return content.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"cannot read {where}, line {line}: not UTF-8 (byte {content[error.start]:#04x})") from error


def walk(value: object) -> Iterator[tuple[str, object]]:
    """A value and everything inside it, in order, each with its path as in ``choices[].text``; any depth."""
    left: list[tuple[str, object]] = [("", value)]
    while left:
        path, inner = left.pop()
        yield path, inner
        if isinstance(inner, dict):
            left += [(f"{path}.{key}" if path else str(key), inner[key]) for key in reversed(inner)]
        elif isinstance(inner, list):
            left += [(f"{path}[]", item) for item in reversed(inner)]


def check_text(value: object, where: str) -> None:
    """UserError for lone surrogates anywhere in a value: no file and no tokenizer accepts them."""
    for path, inner in walk(value):
        texts = inner if isinstance(inner, dict) else (inner,) if isinstance(inner, str) else ()
        found = next(filter(None, (None if text.isascii() else _HALF_PAIR.search(text) for text in texts)), None)
        if found:
            said = f"half a surrogate pair, \\u{ord(found.group()):04x}, which is no character"
            raise FileError(f"{_at(where, path)}: {said}")


def check_whole_numbers(value: object, where: str) -> None:
    """UserError for whole numbers beyond 64 bits anywhere in a value: tables would round or refuse them."""
    for path, inner in walk(value):
        if type(inner) is int and inner not in INT64:
            raise FileError(f"{_at(where, path)}: a whole number beyond 64 bits")


def _at(where: str, path: str) -> str:
    shown = _HALF_PAIR.sub("?", path)
    return f"{where}, {shown!r}" if shown else where


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is not allowed: JSON has no such number")


def _finite(text: str) -> float:
    value = float(text)
    vanished = value == 0 and any(digit in "123456789" for digit in text.lower().partition("e")[0])
    if vanished or value in (float("inf"), float("-inf")):
        raise UserError(f"the number {text[:40]} is beyond what a double holds")
    return value


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is defined twice")
    return values


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_distinct)
_LOOSE = json.JSONDecoder(parse_float=_finite, object_pairs_hook=_distinct)


T = TypeVar("T")
U = TypeVar("U")
P = ParamSpec("P")
ENCODE = msgspec.json.Encoder().encode
WORDS: dict[object, str] = {int: "a whole number", float: "a number", str: "a text"}
WORDS |= {bool: "true or false", list: "a list", dict: "a table"}

BITS = " of at most 64 bits"


def from_json(cls: type[T], data: object) -> T:
    """Make a record of class ``cls``; whatever does not fit is a UserError that names record and field."""
    try:
        record = msgspec.convert(data, cls, strict=True)
    except (msgspec.ValidationError, OverflowError) as error:
        raise UserError(f"{cls.__name__}: {_misfit(cls, data)}") from error
    _check_surplus(cls, data, msgspec.to_builtins(record))
    contradiction = CONTRADICTIONS.get(cls)
    if contradiction is not None and (said := contradiction(record)):
        raise UserError(f"{cls.__name__}: {said}")
    return record


def plain(value: object) -> object:
    """A value that a caller in Python gives, as JSON and TOML would have it: texts for paths, tuples for what can be
    gone through, Python's own numbers for those of numpy. UserError for a set: it has no order.

    >>> from pathlib import Path
    >>> plain([Path("a"), "b", range(2)])
    ('a', 'b', (0, 1))
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (str, bytes, Mapping)):
        return value
    if isinstance(value, (set, frozenset)):
        raise UserError(f"{value!r} has no order: give a list")
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:  # of numpy, or a tensor
        return item()
    return tuple(map(plain, value)) if isinstance(value, Iterable) else value


def check_value(name: str, hint: object, value: object) -> object:
    """``value`` converted for a field ``name`` with the annotation ``hint``; UserError if it does not fit."""
    if isinstance(value, float):
        value = float(value)  # numpy's float64 is a float, too
    if not _fits(hint, value):
        raise UserError(_misfit(hint, value, name))
    check_number(name, value)
    for item in value if isinstance(value, (list, tuple)) else ():
        check_number(name, item)
    return msgspec.convert(value, hint, strict=True)


def check_number(name: str, value: object) -> None:
    """UserError for a number that no run folder can hold: one that is not finite, or a whole one beyond 64 bits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value!r}")
    if type(value) is int and value not in INT64:
        raise UserError(f"{name} must be {WORDS[int]}{BITS}, not one of {value.bit_length()}")


def line_reader(cls: type[T]) -> Callable[[bytes, str], T]:
    """A function from a journal's line and its place to a record; UserError, with the place, if it is none."""
    decode, contradiction = msgspec.json.Decoder(cls, strict=True).decode, CONTRADICTIONS.get(cls)
    unsaid = _unsaid(cls)

    def read(line: bytes, where: str) -> T:
        try:
            record = decode(line)
        except (msgspec.DecodeError, RecursionError):
            return _placed(where, from_json, cls, parse_object(line, where))
        written = ENCODE(record)
        if not (_begins(written, line) or _begins(unsaid(b"", written), line)):
            _placed(where, _check_surplus, cls, _object_of(line, where), msgspec.to_builtins(record))
        if contradiction is not None and (said := contradiction(record)):
            raise FileError(f"{where}: {cls.__name__}: {said}")
        return record

    return read


def _begins(written: bytes, line: bytes) -> bool:
    """Whether a line equals its record written again, except for fields at the end that have their defaults.

    Rows of older versions lack these. A line that begins as msgspec wrote it has no key twice, and none that the record
    lacks.
    """
    if written == line:
        return True
    said = line.rstrip(b"}")
    return written.startswith(said) and written[len(said) : len(said) + 1] == b","


def _unsaid(cls: type) -> Callable[[bytes, bytes], bytes]:
    """A substitution for what msgspec writes of fields that journals leave out where they are None, in this record and
    in those that it holds. A quote inside a text is escaped, so that no text is taken for such a field."""
    names, seen, rest = set[str](), set[type](), [cls]
    while rest:
        found = rest.pop()
        seen.add(found)
        for field in fields(found):
            names |= {field.name} if field.metadata == LEFT_OUT else set()
        rest += [
            part for hint in typing.get_type_hints(found).values() for part in _dataclasses_in(hint) if part not in seen
        ]
    return re.compile(rb',"(?:%s)":null' % b"|".join(name.encode() for name in sorted(names or {""}))).sub


def _dataclasses_in(hint: object) -> list[type]:
    """The records that an annotation names."""
    own = [hint] if isinstance(hint, type) and is_dataclass(hint) else []
    return own + [part for argument in typing.get_args(hint) for part in _dataclasses_in(argument)]


def _object_of(line: bytes, where: str) -> dict[str, object]:
    """The object on a line; if writing it again gives the same line, it has every key once."""
    data: dict[str, object] = msgspec.json.decode(line)
    return data if ENCODE(data) == line else parse_object(line, where)


def _placed(where: str, check: Callable[P, U], *arguments: P.args, **named: P.kwargs) -> U:
    try:
        return check(*arguments, **named)
    except UserError as error:
        raise FileError(f"{where}: {error}") from error


def _check_surplus(cls: type, data: Any, held: Any, path: str = "") -> None:
    """UserError for keys of ``data`` that ``held``, the record made of it, does not have."""
    if type(data) is dict or isinstance(data, Mapping):
        if unknown := data.keys() - held.keys():
            said = f"{path}: " if path else ""
            raise UserError(f"{cls.__name__}: {said}unknown field(s) {', '.join(sorted(map(str, unknown)))}")
        parts: Iterable[tuple[Any, Any]] = data.items()
    elif isinstance(data, (list, tuple)):
        parts = enumerate(data)
    else:
        return
    for name, value in parts:
        kind = type(value)
        if kind is int or kind is float:
            if not -MOST <= value <= MOST:  # rare: NaN, infinities, and valid numbers that large
                _check_number(cls, value, path, name)
        elif kind is not str and kind is not bool and value is not None:
            _check_surplus(cls, value, held[name], _below(path, name if type(name) is str else f"[{name}]"))


def _check_number(cls: type, value: float, path: str, name: str | int) -> None:
    wanted = None
    if type(value) is int and value not in INT64:
        wanted = f"{WORDS[int]}{BITS}"
    elif not math.isfinite(value):
        wanted = "a finite number, as others are not JSON compliant"
    if wanted:
        place = _below(path, name if isinstance(name, str) else f"[{name}]")
        raise UserError(f"{cls.__name__}: {place} must be {wanted}, not {_shown(value)}")


def _fits(hint: object, value: object) -> bool:
    try:
        msgspec.convert(value, hint, strict=True)
    except (msgspec.ValidationError, OverflowError):
        return False
    return True


def _misfit(hint: object, value: object, path: str = "") -> str:
    """The innermost part of a value that does not fit its annotation: where, what was expected, what was found."""
    for name, inner_hint, inner in _parts(hint, value):
        if not _fits(inner_hint, inner):
            return _misfit(inner_hint, inner, _below(path, name))
    if is_dataclass(hint) and isinstance(value, Mapping):
        needed = [f.name for f in fields(hint) if f.default is MISSING and f.default_factory is MISSING]
        if missing := sorted({*needed} - value.keys()):
            return f"{path}: missing field(s) {', '.join(missing)}".removeprefix(": ")
    return f"{path or 'it'} must be {_wanted(hint, value)}, not {_shown(value)}"


def _parts(hint: object, value: object) -> Iterator[tuple[str, object, object]]:
    """The parts of a value: names, annotations and values."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        held = [arg for arg in args if arg is not types.NoneType]
        if len(held) == 1:
            yield from _parts(held[0], value)
    elif is_dataclass(hint) and isinstance(value, Mapping):
        hints = _hints(typing.cast(type, hint))
        yield from ((name, hints[name], value[name]) for name in hints if name in value)
    elif origin is tuple and isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", args[0], item) for index, item in enumerate(value))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        yield from ((f"[{key!r}]", args[1], item) for key, item in value.items())


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls, include_extras=True)


def _wanted(hint: object, value: object) -> str:
    """What an annotation expects, in words; the bounds, for a value that only violates these."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        meta = next(one for one in args[1:] if isinstance(one, msgspec.Meta))
        out_of_bounds = _fits(args[0], value) and (type(value) is not int or value in INT64)
        return _bounds(meta) if out_of_bounds else _wanted(args[0], value)
    if origin in (typing.Union, types.UnionType):
        words = [_wanted(arg, value) for arg in args if arg is not types.NoneType]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return "a list"
    beyond = BITS if hint is int and type(value) is int else ""
    return WORDS.get(hint, "a JSON object") + beyond


def _bounds(meta: msgspec.Meta) -> str:
    least, most = meta.ge, None if meta.le == INT64[-1] else meta.le
    return f"at least {least}" if most is None else f"at most {most}" if least is None else f"from {least} to {most}"


def _below(path: str, name: str) -> str:
    return f"{path}{name}" if not path or name.startswith("[") else f"{path}.{name}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _generation(row: Generation) -> str | None:
    num = len(row.token_ids)
    if row.num_tokens != num:
        return f"num_tokens is {row.num_tokens}, but there are {num} token_ids"
    return next(filter(None, map(_step, row.trace)), None) if row.trace else None


def _step(step: CommitStep) -> str | None:
    sizes = len(step.positions), len(step.token_ids), len(step.confidences)
    if len(set(sizes)) > 1:
        return f"{sizes[0]} positions, {sizes[1]} token_ids and {sizes[2]} confidences of one step"
    return f"num_forced is {step.num_forced} of {sizes[0]} commits" if step.num_forced > sizes[0] else None


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


# Checks that annotations cannot express: fields of one record that must agree. They run when records are read and
# written, not when they are made: for a plug-in's contradictory answer the harness names the decoder instead.
CONTRADICTIONS: dict[type, Callable[[Any], str | None]] = {
    CommitStep: _step,
    Generation: _generation,
    GenerationRow: lambda row: _generation(row.generation),
    Likelihood: _likelihood,
    LikelihoodRow: lambda row: _likelihood(row.likelihood),
    Score: _score,
    Aggregate: _aggregate,
    SpeedSample: _speed,
    CostSample: _cost,
}
