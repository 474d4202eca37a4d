"""Tables on the terminal: boxes and colours there, plain columns in a pipe or a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from twotower_eval.errors import UserError

if TYPE_CHECKING:
    from twotower_eval.api.summary import Table

GAP = "  "


def show(tables: Callable[[], Sequence[Table]], stream: TextIO | None = None) -> None:
    """Print the tables on standard error, so that standard output holds only the path that scripts read.

    What they would be made of may not fit together: then one line says so, as the run itself is good.
    """
    out = stream or sys.stderr
    try:
        made = tables()
    except UserError as error:
        print(f"no summary: {error}", file=out)
        return
    for table in made:
        if out.isatty():
            _boxed(table, out)
        else:
            print(plain(table), file=out, flush=True)


def _boxed(table: Table, out: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Boxed
    from rich.text import Text

    shown = Boxed(title=Text(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for at, name in enumerate(table.header):
        shown.add_column(Text(name), justify="left" if at < table.num_left else "right")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    Console(file=out).print(shown)


def plain(table: Table) -> str:
    """The table in columns of one width, under its title.

    >>> from twotower_eval.api.summary import Table
    >>> print(plain(Table(title="Quality", header=("task", "n"), rows=(("sorting", "8"), ("all", "1,200")))))
    Quality
    task         n
    sorting      8
    all      1,200
    """
    lines = [table.header, *table.rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(table.header))]

    def aligned(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if at < table.num_left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return GAP.join(cells).rstrip()

    return "\n".join([table.title, *map(aligned, lines)])
