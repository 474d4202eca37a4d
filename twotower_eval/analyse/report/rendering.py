"""A table is a frame of raw values first; this is the one place that shows a frame: as Markdown, and as CSV.

The names of a frame's columns hold their units, and nothing in it is rounded. An estimate is several columns (see
:func:`columns.measured_columns`). What a reader sees of a row, a :class:`Column` makes of its raw values, so that CSV,
Markdown and HTML cannot differ in a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.report.text import NONE, code, count, escape, percent, table, times
from twotower_eval.analyse.words import INVALID
from twotower_eval.records import Estimate

Raw = Mapping[str, Any]  # one row of a frame; a value that is not there is None
Show = Callable[[Raw], str]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a shown table: its header, and its cell out of a row's raw values. ``text`` is flush left."""

    header: str
    show: Show
    text: bool = False


def frame_of(rows: Iterable[Raw]) -> pd.DataFrame:
    """One row for each; a key that only some have is a missing value in the others."""
    return pd.DataFrame.from_records([dict(row) for row in rows])


def markdown(frame: pd.DataFrame, columns: Sequence[Column], *, left: int = 1) -> str:
    """The frame's rows as a Markdown table of these columns, of which the first ``left`` are flush left as well."""
    cells = [[column.show(row) for column in columns] for row in raw_rows(frame)]
    return table([column.header for column in columns], cells, left=left, texts=[c.header for c in columns if c.text])


def csv(frame: pd.DataFrame) -> bytes:
    """All columns with all their digits, one line a row; a missing value is an empty field."""
    return str(frame.to_csv(index=False, lineterminator="\n")).encode()


def raw_rows(frame: pd.DataFrame) -> list[Raw]:
    """The rows, with ``None`` for what pandas calls missing."""
    records = frame.to_dict("records")
    return [{str(name): None if pd.isna(value) else value for name, value in row.items()} for row in records]


def measured_at(row: Raw, name: str) -> Measured:
    """The estimate in a row's columns of this name, with its value and interval alone; or why there is none."""
    if row[name] is None:
        return Measured(estimate=None, reason=row.get(f"{name}_missing_reason"))
    numbers = {end: row[f"{name}{behind}"] for end, behind in (("value", ""), ("low", "_low"), ("high", "_high"))}
    return Measured(estimate=Estimate(**numbers, level=row[f"{name}_level"], n=0, method=""))


def interval(name: str, show: Callable[[Measured], str]) -> Show:
    """An estimate, shown as ``show`` does."""
    return lambda row: show(measured_at(row, name))


def speedup_or_invalid(name: str) -> Show:
    """A figure of a timing, marked where that is INVALID."""

    def show(row: Raw) -> str:
        found = measured_at(row, name)
        return times(found) + (f" **{INVALID}**" if row["invalid"] and found.estimate is not None else "")

    return show


def words(name: str) -> Show:
    """A text, none of which is taken for Markdown."""
    return lambda row: escape(row[name])


def whole(name: str) -> Show:
    """A whole number with separators."""
    return lambda row: count(int(row[name]))


def share(name: str) -> Show:
    """A share as per cent, or that there is none."""
    return lambda row: NONE if row[name] is None else percent(row[name])


def ids(name: str) -> Show:
    """Run ids as code."""
    return lambda row: code(row[name])
