"""``twotower-eval list``: a table on a terminal, lines of columns with tabs in a pipe, JSON with ``--json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twotower_eval.cli.options import option

if TYPE_CHECKING:
    from twotower_eval.api.listing import Listed

SMALL = ("suites", "decoders", "families", "claims", "sections")  # kinds that are listed at once


def names(
    what: Annotated[
        str | None,
        typer.Argument(
            help="tasks, suites, decoders, families, claims or sections [all but tasks].",
            metavar="[WHAT]",
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Argument(help="Wildcard, or part of a name [all].", metavar="[PATTERN]", show_default=False),
    ] = None,
    include_path: Annotated[
        list[str] | None, option("Folder with tasks of your own; may be given several times.", metavar="DIR")
    ] = None,
    data_dir: Annotated[
        Path | None, option("Folder with TASK/SPLIT.jsonl, as `data prepare` makes it.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verb ``list``."""
    from twotower_eval.api.listing import listed

    def say(text: str) -> None:
        typer.echo(text, err=True)

    found = {
        kind: listed(kind, pattern, include_path=include_path or (), data_dir=data_dir, say=say)
        for kind in ((what,) if what else SMALL)
    }
    if as_json:
        kinds = {kind: [_plain(one) for one in several] for kind, several in found.items()}
        typer.echo(json.dumps(kinds if what is None else kinds[what], ensure_ascii=False, indent=1))
        return
    for kind, several in found.items():
        _print(kind, several, with_kind=what is None)


def _plain(one: Listed) -> dict[str, object]:
    return {"name": one.name, "source": one.source, **one.facts}


def _print(kind: str, several: Sequence[Listed], *, with_kind: bool) -> None:
    header = ("name", "source", *(several[0].facts if several else ()))
    rows = tuple((one.name, one.source, *map(_text, one.facts.values())) for one in several)
    if sys.stdout.isatty():
        from twotower_eval.api.summary import Table  # it costs what reading runs costs
        from twotower_eval.cli import tables

        made = Table(title=kind.capitalize(), header=header, rows=rows, num_left=len(header))
        tables.show(lambda: [made], sys.stdout)
        return
    for row in rows:
        typer.echo("\t".join((kind, *row) if with_kind else row))


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={inner}" for name, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
