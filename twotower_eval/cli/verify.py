"""``twotower-eval verify``: checks before anything is measured."""

from __future__ import annotations

from typing import Any

import typer

from twotower_eval import store
from twotower_eval.cli.options import RESULTS, Out, plan_options
from twotower_eval.plan import VerifyPlan, merge

EXIT_CHECK_FAILED = 5


@plan_options(VerifyPlan)
def verify(given: dict[str, Any], out: Out = RESULTS) -> None:
    """Verb ``verify``."""
    from twotower_eval.measure import verify as verify_room

    path = verify_room.verify(merge(VerifyPlan(), given), root=out)
    checks = store.load(path).checks
    typer.echo(verify_room.table(checks))
    typer.echo(f"{path}: {verify_room.summary(checks)}")
    if any(check.outcome == "failed" for check in checks):
        raise typer.Exit(EXIT_CHECK_FAILED)
