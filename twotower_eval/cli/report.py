"""``twotower-eval report``: tables and plots from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval.cli.options import REPORTS, RESULTS, option
from twotower_eval.cli.runs import chosen
from twotower_eval.errors import UserError


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Run folders or ids [the newest of each verb].", metavar="[RUNS]...", show_default=False),
    ] = None,
    results: Annotated[Path, option("Folder that run ids are looked up in [results].", metavar="DIR")] = RESULTS,
    out: Annotated[Path, option("Folder that reports are made in [reports].", metavar="DIR")] = REPORTS,
    section: Annotated[
        list[str] | None,
        option(
            "Shipped section, to show only those named, or package.module:render, to add one of your own; may be given "
            "several times [all shipped ones that concern the runs].",
            metavar="NAME",
        ),
    ] = None,
    claims: Annotated[
        str | None,
        option("Claim file, or the name of a shipped one [a shipped one about this model].", metavar="FILE"),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Also one self-contained HTML file.")] = False,
    format: Annotated[str | None, option("csv: also the tables, with all their digits.", metavar="csv")] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Copy the runs and the report to published/ in their folders.")
    ] = False,
) -> None:
    """Verb ``report``."""
    if format not in (None, "csv"):
        raise UserError(f"--format can be csv, not {format!r}: Markdown is always written, --html adds HTML")
    from twotower_eval import api

    named = chosen(runs, results, count_others=True)
    page = api.report(*named, out=out, sections=section, claims=claims, html=html, csv=format == "csv", results=results)
    typer.echo(page.path)
    if publish:
        for target in api.publish(page, *named, results=results, reports=out, say=typer.echo):
            typer.echo(target)
