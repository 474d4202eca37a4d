"""``twotower-eval speed``: time, then score what was timed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from twotower_eval.cli import size
from twotower_eval.cli.options import RESULTS, Out, PlanFile, Resume, option, plan_options
from twotower_eval.cli.runs import resolve_plan, resumable, run_path
from twotower_eval.plan import SizingPlan, SpeedPlan
from twotower_eval.progress import choose_progress

RandomWeights = Annotated[
    str | None, option("Alias of `twotower-eval size CONFIG`, whose options it takes.", metavar="CONFIG")
]


@plan_options(SpeedPlan, hidden=SizingPlan)
def speed(
    given: dict[str, Any],
    random_weights: RandomWeights = None,
    plan: PlanFile = None,
    out: Out = RESULTS,
    resume: Resume = None,
) -> None:
    """Verb ``speed``."""
    given = given | {"config": random_weights}
    if size.is_meant(given, plan, out, resume):
        typer.echo(size.measure(given, plan, out, resume))
        return
    resumed = run_path(resume, out) if resume else None
    with resumable("speed", out, resumed):
        resolved = resolve_plan(SpeedPlan, plan, resumed, given)
        from twotower_eval import api

        path = api.time_and_score(resolved, root=out, resume=resumed, progress=choose_progress())
    typer.echo(path)
