"""``twotower-eval claims``: verdicts on claim files, and audits of the numbers that they publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval.cli.options import RESULTS, option
from twotower_eval.cli.runs import chosen

FileName = Annotated[str, typer.Argument(help="Claim file, or the name of a shipped one.", metavar="FILE")]


def check(
    file: FileName,
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Run folders or ids [the newest of each verb].", metavar="[RUNS]...", show_default=False),
    ] = None,
    claim: Annotated[
        list[str] | None, option("This claim only; may be given several times [all].", "--claim", metavar="NAME")
    ] = None,
    strict: Annotated[
        bool,
        option("Count as inconclusive what fewer than 5 launches support, or not all runs that lie there.", "--strict"),
    ] = False,
    results: Annotated[Path, option("Folder that run ids are looked up in [results].", metavar="DIR")] = RESULTS,
) -> None:
    """Verb ``claims check``."""
    from twotower_eval import api

    asked = api.claims_of(file, claim or ())  # a slip in them is said before any run is looked for
    verdicts = api.judge(asked, *chosen(runs, results), names=claim or (), results=results)
    for line in verdicts.lines:
        typer.echo(line)
    if strict and (said := verdicts.strict_line):
        typer.echo(said)
    raise typer.Exit(verdicts.exit_code(strict=strict))


def audit(file: FileName) -> None:
    """Verb ``claims audit``."""
    from twotower_eval import api

    findings = api.audit(file)
    for line in findings.lines:
        typer.echo(line)
    raise typer.Exit(findings.exit_code)
