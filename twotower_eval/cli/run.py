"""``twotower-eval run``: score."""

from __future__ import annotations

from typing import Any, cast

import typer

from twotower_eval.cli.options import RESULTS, Given, Out, PlanFile, Resume, plan_options
from twotower_eval.cli.runs import resumable
from twotower_eval.plan import RunPlan


@plan_options(RunPlan)
def run(given: Given, plan: PlanFile = None, out: Out = RESULTS, resume: Resume = None) -> None:
    """Verb ``run``."""
    with resumable("run", out, resume):
        from twotower_eval import api

        made = api.evaluate(plan, out=out, resume=resume, **cast(dict[str, Any], given))
    typer.echo(made.path)
