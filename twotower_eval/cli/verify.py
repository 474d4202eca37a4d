"""``twotower-eval verify``: checks before anything is measured."""

from __future__ import annotations

from typing import Any, cast

import typer

from twotower_eval.cli.options import RESULTS, Given, Out, plan_options
from twotower_eval.plan import VerifyPlan

EXIT_CHECK_FAILED = 5


@plan_options(VerifyPlan)
def verify(given: Given, out: Out = RESULTS) -> None:
    """Verb ``verify``."""
    from twotower_eval import api

    made = api.verify(out=out, **cast(dict[str, Any], given))
    for line in made.check_lines:
        typer.echo(line)
    if any(check.outcome == "failed" for check in made.record.checks):
        raise typer.Exit(EXIT_CHECK_FAILED)
