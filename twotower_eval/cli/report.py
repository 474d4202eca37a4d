"""``twotower-eval report``: tables and plots from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval.cli.options import REPORTS, RESULTS, option
from twotower_eval.cli.runs import newest_of_each_verb, run_path


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Run folders or ids [the newest of each verb].", metavar="[RUNS]...", show_default=False),
    ] = None,
    results: Annotated[Path, option("Folder that run ids are looked up in [results].", metavar="DIR")] = RESULTS,
    out: Annotated[Path, option("Folder that reports are made in [reports].", metavar="DIR")] = REPORTS,
    section: Annotated[
        list[str] | None,
        option("A section, by name or package.module:function; may be given several times [all].", metavar="NAME"),
    ] = None,
) -> None:
    """Verb ``report``."""
    paths = [run_path(name, results) for name in runs] if runs else newest_of_each_verb(results)
    from twotower_eval import report as report_room

    typer.echo(report_room.write(paths, out, sections=section or None) / "report.md")
