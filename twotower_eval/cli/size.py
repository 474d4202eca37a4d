"""``twotower-eval size``: what a size of model costs, without its weights. ``speed --random-weights`` is an alias."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import typer

from twotower_eval import store
from twotower_eval.cli.options import RESULTS, Out, PlanFile, Resume, plan_options
from twotower_eval.cli.runs import resolve_plan, resumable, run_path
from twotower_eval.errors import UserError
from twotower_eval.plan import SizingPlan, SpeedPlan, is_older_sizing_plan
from twotower_eval.progress import choose_progress
from twotower_eval.records import verb_of

ALIAS = "speed --random-weights CONFIG is an alias of: twotower-eval size CONFIG"


@plan_options(SizingPlan)
def size(given: dict[str, Any], plan: PlanFile = None, out: Out = RESULTS, resume: Resume = None) -> None:
    """Verb ``size``."""
    typer.echo(measure(given, plan, out, resume))


def measure(given: dict[str, Any], plan_file: Path | None, out: Path, resume: str | None) -> Path:
    """Measure what the command line says; the run's folder."""
    resumed = run_path(resume, out) if resume else None
    with resumable("size", out, resumed):
        if given["profile"]:
            given = given | {"profile": str(run_path(given["profile"], out))}
        plan = resolve_plan(SizingPlan, plan_file, resumed, given)
        from twotower_eval.measure import sizing

        return sizing.run(plan, root=out, resume=resumed, progress=choose_progress())


def is_meant(given: dict[str, Any], plan_file: Path | None, out: Path, resume: str | None) -> bool:
    """Whether ``speed`` is to do what ``size`` does, as its options, its plan or the resumed run say.

    ``given`` has ``config`` where ``--random-weights`` was given. ValueError for an option that the one or the other
    would ignore.
    """
    if resume:
        meant = verb_of(store.load(run_path(resume, out)).manifest) == "size"
    else:
        meant = given["config"] is not None or (plan_file is not None and is_older_sizing_plan(plan_file))
    if meant:
        _refuse_foreign(SizingPlan, given, "has no use for random weights: drop it")
        typer.echo(ALIAS, err=True)
    else:
        _refuse_foreign(SpeedPlan, given, "belongs to --random-weights CONFIG: add that, or drop it")
    return meant


def _refuse_foreign(cls: type[Any], given: dict[str, Any], words: str) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    foreign = [key for key, value in given.items() if value is not None and key not in known]
    if foreign:
        no = "no-" if given[foreign[0]] is False else ""
        name = "random-weights" if foreign[0] == "config" else foreign[0].replace("_", "-")
        raise UserError(f"--{no}{name} {words}")
