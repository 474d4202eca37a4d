"""Shows frames of raw values as Markdown tables and as CSV; no other module writes a table.

The names of a frame's columns hold their units, and nothing in it is rounded. An estimate takes several columns (see
:func:`text.measured_columns`). A :class:`Column` makes the cells that a reader sees out of these raw values, so CSV,
Markdown and HTML cannot differ in a number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.report.text import (
    FINISHES,
    NONE,
    VERBATIM,
    code,
    count,
    escape,
    percent,
    run_list,
    scored_by_words,
    significant,
    times,
)
from twotower_eval.analyse.words import INVALID
from twotower_eval.records import Estimate

Raw = Mapping[str, Any]  # one row of a frame; a missing value is None
Show = Callable[[Raw], str]
Tables = dict[str, pd.DataFrame]  # by the name of their CSV file


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a shown table: its header, and how its cell is made of a row's raw values. ``text``: flush left."""

    header: str
    show: Show
    text: bool = False


def frame_of(rows: Iterable[Raw]) -> pd.DataFrame:
    """A frame with one row for each mapping; a key that only some have is a missing value in the others."""
    return pd.DataFrame.from_records([dict(row) for row in rows])


def markdown(frame: pd.DataFrame, columns: Sequence[Column], *, left: int = 1, verbatim: bool = False) -> str:
    """The frame's rows as a Markdown table with these columns; the first ``left`` are flush left.

    ``verbatim``: see :func:`table`.
    """
    cells = [[column.show(row) for column in columns] for row in raw_rows(frame)]
    texts = [column.header for column in columns if column.text]
    headers = [column.header for column in columns]
    return table(headers, cells, left=left, texts=texts, verbatim=verbatim)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    texts: Collection[str] = (),
    verbatim: bool = False,
) -> str:
    """A Markdown table; the first ``left`` columns and those named in ``texts`` are flush left, the others right.

    ``verbatim``: its last two columns hold what models wrote, which a page shows in letters of one width.
    """
    rule = [":--" if i < left or name in texts else "--:" for i, name in enumerate(header)]
    lines = [header, rule, *rows]
    assert all(len(line) == len(header) for line in lines), "a table row has another number of cells than its header"
    mark = f"{VERBATIM}\n" if verbatim else ""
    return mark + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


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


def optional(name: str, show: Callable[..., str]) -> Show:
    """A value as ``show`` formats it, or a dash where it is missing."""
    return lambda row: NONE if row[name] is None else show(row[name])


def words(name: str) -> Show:
    """A text, none of which is taken for Markdown."""
    return lambda row: escape(row[name])


def whole(name: str) -> Show:
    """A whole number with separators, or a dash."""
    return optional(name, lambda number: count(int(number)))


def fixed(name: str, digits: int, unit: str = "") -> Show:
    """A number with so many digits after the point, or a dash."""
    return optional(name, lambda number: f"{number:.{digits}f}{unit}")


def share(name: str) -> Show:
    """A share as per cent, or a dash."""
    return optional(name, percent)


def score_with_interval(name: str) -> Show:
    """A score as it is, with the ends of its interval if it has one: four significant digits."""

    def show(row: Raw) -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        return significant(row[name], 4) + ("" if low is None else f" [{significant(low, 4)}, {significant(high, 4)}]")

    return lambda row: NONE if row[name] is None else show(row)


def metric(row: Raw) -> str:
    """A metric, with its filter where it has one."""
    return escape(row["metric"]) + (f" ({escape(row['filter'])})" if row["filter"] != "none" else "")


def scored_by(row: Raw) -> str:
    """How a task was scored; a task of several members may have several ways."""
    return scored_by_words(row["scored_by"].split(" + "))


def endings(arm: str = "") -> Show:
    """How many answers (of an arm) ended by EOS, by a stop sequence, at the budget."""
    start = f"{arm}_num" if arm else "num"
    return lambda row: " / ".join(count(int(row[f"{start}_ended_by_{reason}"])) for reason in FINISHES)


def ids(name: str) -> Show:
    """Run ids as code: as they stand."""
    return lambda row: code(row[name])


def id_list(name: str) -> Show:
    """Run ids that blanks part, each as code."""
    return lambda row: run_list(row[name].split())
