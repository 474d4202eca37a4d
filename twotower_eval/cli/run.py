"""``twotower-eval run``: score."""

from __future__ import annotations

from typing import Any

import typer

from twotower_eval.cli.options import RESULTS, Out, PlanFile, Resume, plan_options
from twotower_eval.cli.runs import resolve_plan, resumable, run_path
from twotower_eval.plan import RunPlan
from twotower_eval.progress import choose_progress


@plan_options(RunPlan)
def run(given: dict[str, Any], plan: PlanFile = None, out: Out = RESULTS, resume: Resume = None) -> None:
    """Verb ``run``."""
    resumed = run_path(resume, out) if resume else None
    with resumable("run", out, resumed):
        resolved = resolve_plan(RunPlan, plan, resumed, given)
        from twotower_eval import api

        path = api.evaluate(resolved, root=out, resume=resumed, progress=choose_progress())
    typer.echo(path)
