"""Values out of TOML tables, with errors that say where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, overload

from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject
from twotower_eval.names import did_you_mean
from twotower_eval.strict import check_value

T = TypeVar("T")
U = TypeVar("U")
_NEEDED = object()


def within(where: str, table: object, known: Iterable[str]) -> JsonObject:
    """The table. UserError for what is no table, and for a key that is not known, with a near-miss hint."""
    if not isinstance(table, Mapping):
        raise UserError(f"{where} must be a table")
    names = list(known)
    for key in table:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, names)}")
    return table


@overload
def value_of(where: str, table: JsonObject, key: str, kind: type[T]) -> T: ...
@overload
def value_of(where: str, table: JsonObject, key: str, kind: type[T], default: U) -> T | U: ...
def value_of(where: str, table: JsonObject, key: str, kind: type[T], default: object = _NEEDED) -> object:
    """The value of a key, of the type asked for; a whole number is a number, a truth value is neither."""
    if key not in table:
        if default is _NEEDED:
            raise UserError(f"{where}: {key} is missing")
        return default
    try:
        return check_value(key, kind, table[key])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def tables(where: str, table: JsonObject, key: str) -> list[JsonObject]:
    """The tables of a ``[[key]]``, none without the key."""
    found: list[Any] = value_of(where, table, key, list, [])
    if not all(isinstance(item, Mapping) for item in found):
        raise UserError(f"{where}: {key} must be a list of tables, as [[{key}]] makes them")
    return list(found)


def at_least(where: str, least: int, record: object, *names: str) -> None:
    """UserError for a number of a record below ``least``; ``None`` is none."""
    for name in names:
        value = getattr(record, name)
        if value is not None and value < least:
            raise UserError(f"{where}: {name} must be {least} or more, not {value:g}")


def texts(where: str, table: JsonObject, key: str) -> tuple[str, ...]:
    """A list of different texts, empty without the key."""
    found: list[Any] = value_of(where, table, key, list, [])
    if not all(isinstance(item, str) for item in found) or len(set(found)) != len(found):
        raise UserError(f"{where}: {key} must be a list of different texts")
    return tuple(found)
