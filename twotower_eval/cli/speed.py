"""``twotower-eval speed``: time, then score what was timed."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from twotower_eval.cli import size
from twotower_eval.cli.options import RESULTS, Given, Out, PlanFile, Resume, option, plan_options
from twotower_eval.cli.runs import resumable
from twotower_eval.plan import SizingPlan, SpeedPlan

RandomWeights = Annotated[
    str | None, option("Alias of `twotower-eval size CONFIG`, whose options it takes.", metavar="CONFIG")
]


@plan_options(SpeedPlan, hidden=SizingPlan)
def speed(
    given: Given,
    random_weights: RandomWeights = None,
    plan: PlanFile = None,
    out: Out = RESULTS,
    resume: Resume = None,
) -> None:
    """Verb ``speed``."""
    given = given | {"config": random_weights}
    if size.is_meant(given, plan, out, resume):
        size.measure(given, plan, out, resume)
        return
    with resumable("speed", out, resume):
        from twotower_eval import api

        made = api.time(plan, out=out, resume=resume, **cast(dict[str, Any], size.of_plan(SpeedPlan, given)))
    typer.echo(made.path)
