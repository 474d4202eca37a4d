"""``twotower-eval claims``: verdicts on claim files, and audits of the numbers that they publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval import store
from twotower_eval.cli.options import RESULTS, option
from twotower_eval.cli.runs import newest_of_each_verb, run_path
from twotower_eval.errors import UserError

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
    from twotower_eval.analyse import claims as claims_room

    asked = claims_room.load_claims(file)
    wanted = claims_room.select(asked.claims, claim or ())
    if not wanted:
        raise UserError(f"{file} holds no claims: `twotower-eval claims audit` reads its published numbers")
    names = [run_path(name, results) for name in runs] if runs else newest_of_each_verb(results)
    if not runs:
        typer.echo(f"the newest of each verb: {', '.join(path.name for path in names)}", err=True)
    loaded = [store.load(path) for path in names]
    verdicts = claims_room.judge(asked.claims, loaded, claim or ())
    for line in claims_room.verdict_lines(asked.claims, verdicts):
        typer.echo(line)
    if strict and (said := claims_room.strict_line(verdicts)):
        typer.echo(said)
    raise typer.Exit(claims_room.exit_code(verdicts, strict=strict))


def audit(file: FileName) -> None:
    """Verb ``claims audit``."""
    from twotower_eval.analyse import claims as claims_room

    findings = claims_room.audit(claims_room.load_claims(file).published)
    for line in claims_room.audit_lines(findings):
        typer.echo(line)
    raise typer.Exit(claims_room.audit_code(findings))
