"""JSON as it may be carried: one reader for every file, which refuses what Python would take and nobody could mean.

Python's reader takes NaN, rounds 1e999 to infinity, keeps the last of two equal keys and lets half a surrogate pair
through, which no UTF-8 file can hold. Here each is a UserError of one line that says where. Standard library only.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn, TypeAlias

from twotower_eval.errors import UserError

JsonObject: TypeAlias = Mapping[str, object]  # values of any kind: whoever takes one looks at its kind first
BOM = "\ufeff"
INT64 = range(-(2**63), 2**63)  # what numpy, Arrow and pandas carry as a whole number
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")


def parse_json(text: str, where: str, *, infinities: bool = False, half_pairs: bool = False) -> object:
    """The value of a JSON text. ``where`` begins every error.

    ``infinities`` lets NaN and Infinity be, as Python and transformers write them; ``half_pairs`` lone surrogates.
    """
    if text.startswith(BOM):
        raise UserError(f"{where}: begins with a byte order mark (U+FEFF): save it without one")
    try:
        value = (_LOOSE if infinities else _STRICT).decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg}, {place})") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply to be read") from error
    except UserError as error:  # of the hooks below
        raise UserError(f"{where}: {error}") from error
    except ValueError as error:  # nothing else is left that the decoder does not call a fault of JSON
        raise UserError(f"{where}: a whole number has more digits than Python reads") from error
    if not half_pairs and ("\\u" in text or not text.isascii()):
        check_text(value, where)
    return value


def parse_object(line: bytes, where: str) -> dict[str, object]:
    """The JSON object on a line of a journal, half surrogate pairs and all; ``where`` begins every error."""
    try:
        text = line.decode("utf-8", "surrogatepass")  # as journals write what they are given
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    data = parse_json(text, where, half_pairs=True)
    if not isinstance(data, dict):
        raise UserError(f"{where}: not a JSON object")
    return data


def read_utf8(file: Path) -> str:
    """The text of a file that somebody brings, without the mark that some editors put in front of it.

    UserError that names the file, and the line where it is not UTF-8.
    """
    try:
        return decode_utf8(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def decode_utf8(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes, one byte order mark in front left out; UserError with the line that is not UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as UTF-32 in the usual order does too
        raise UserError(f"cannot read {where}: it is UTF-16, not UTF-8: save it as UTF-8")
    try:
        return content.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"cannot read {where}, line {line}: not UTF-8 (byte {content[error.start]:#04x})") from error


def walk(value: object) -> Iterator[tuple[str, object]]:
    """A value and all inside it, in order, each with its path as in ``choices[].text``; no depth is too deep."""
    left: list[tuple[str, object]] = [("", value)]
    while left:
        path, inner = left.pop()
        yield path, inner
        if isinstance(inner, dict):
            left += [(f"{path}.{key}" if path else str(key), inner[key]) for key in reversed(inner)]
        elif isinstance(inner, list):
            left += [(f"{path}[]", item) for item in reversed(inner)]


def check_text(value: object, where: str) -> None:
    """UserError for lone surrogates anywhere in a value: no file and no tokenizer takes them."""
    for path, inner in walk(value):
        texts = inner if isinstance(inner, dict) else (inner,) if isinstance(inner, str) else ()
        found = next(filter(None, (None if text.isascii() else _HALF_PAIR.search(text) for text in texts)), None)
        if found:
            said = f"half a surrogate pair, \\u{ord(found.group()):04x}, which is no character"
            raise UserError(f"{_at(where, path)}: {said}")


def check_whole_numbers(value: object, where: str) -> None:
    """UserError for whole numbers beyond 64 bits anywhere in a value: tables round or refuse them."""
    for path, inner in walk(value):
        if type(inner) is int and inner not in INT64:
            raise UserError(f"{_at(where, path)}: a whole number beyond 64 bits")


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
        raise UserError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return values


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_distinct)
_LOOSE = json.JSONDecoder(parse_float=_finite, object_pairs_hook=_distinct)
