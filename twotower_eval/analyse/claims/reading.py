"""Values out of TOML tables, with errors that say where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean
from twotower_eval.strict import check_value

_NEEDED: Any = object()


def within(where: str, table: Any, known: Iterable[str]) -> None:
    """UserError for what is no table, and for a key that is not known, with a near-miss hint."""
    if not isinstance(table, Mapping):
        raise UserError(f"{where} must be a table")
    names = list(known)
    for key in table:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, names)}")


def value_of(where: str, table: Mapping[str, Any], key: str, kind: type[Any], default: Any = _NEEDED) -> Any:
    """The value of a key, of the type asked for; a whole number is a number, a truth value is neither."""
    if key not in table:
        if default is _NEEDED:
            raise UserError(f"{where}: {key} is missing")
        return default
    try:
        return check_value(key, kind, table[key])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def tables(where: str, table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The tables of a ``[[key]]``, none without the key."""
    found = value_of(where, table, key, list, [])
    if not all(isinstance(item, Mapping) for item in found):
        raise UserError(f"{where}: {key} must be a list of tables, as [[{key}]] makes them")
    return list(found)


def at_least(where: str, least: int, record: Any, *names: str) -> None:
    """UserError for a number of a record below ``least``; ``None`` is none."""
    for name in names:
        value = getattr(record, name)
        if value is not None and value < least:
            raise UserError(f"{where}: {name} must be {least} or more, not {value:g}")


def texts(where: str, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of different texts, empty without the key."""
    found = value_of(where, table, key, list, [])
    if not all(isinstance(item, str) for item in found) or len(set(found)) != len(found):
        raise UserError(f"{where}: {key} must be a list of different texts")
    return tuple(found)
