"""Verbs that write: ``twotower-eval run``, ``speed``, ``size`` and ``verify`` measure, ``data`` and ``train`` make what
is measured. ``speed --random-weights`` is an alias of ``size``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from twotower_eval import store
from twotower_eval.cli.options import RESULTS, TRAINING, Given, Out, PlanFile, Resume, option, plan_options, texts
from twotower_eval.cli.runs import EXIT_INTERRUPTED, resumable
from twotower_eval.cli.tables import show
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_files import is_older_sizing_plan
from twotower_eval.records import verb_of
from twotower_eval.task_options import OTHER_SEED

ALIAS = "speed --random-weights CONFIG is an alias of: twotower-eval size CONFIG"


@plan_options(SizingPlan)
def size(given: Given, plan: PlanFile = None, out: Out = RESULTS, resume: Resume = None) -> None:
    """Verb ``size``."""
    measure(given, plan, out, resume)


def measure(given: Given, plan: Path | None, out: Path, resume: str | None) -> None:
    """Measure what the command line says, and print the run's folder."""
    with resumable("size", out, resume):
        from twotower_eval import api

        made = api.size(plan=plan, out=out, resume=resume, **cast(dict[str, Any], of_plan(SizingPlan, given)))
    typer.echo(made.path)


def of_plan(cls: type, given: Given) -> Given:
    """The options that ``cls`` has fields for: ``speed`` also has those of ``size``, unset."""
    return {field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given}


def is_meant(given: Given, plan_file: Path | None, out: Path, resume: str | None) -> bool:
    """Whether ``speed`` has to do what ``size`` does, by its options, its plan or the resumed run.

    ``given`` has ``config`` if ``--random-weights`` was given. UserError for an option that would be ignored.
    """
    from twotower_eval import api

    if resume:
        meant = verb_of(store.read_manifest(api.run_path(resume, out))) == "size"
    else:
        meant = "config" in given or (plan_file is not None and is_older_sizing_plan(plan_file))
    if meant:
        _refuse_foreign(SizingPlan, given, "has no use for random weights: drop it")
        typer.echo(ALIAS, err=True)
    else:
        _refuse_foreign(SpeedPlan, given, "belongs to --random-weights CONFIG: add that, or drop it")
    return meant


def _refuse_foreign(cls: type, given: Given, words: str) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    foreign = [key for key in given if key not in known]
    if foreign:
        no = "no-" if given[foreign[0]] is False else ""
        name = "random-weights" if foreign[0] == "config" else foreign[0].replace("_", "-")
        raise UserError(f"--{no}{name} {words}")


def say_seed(given: Given) -> None:
    """Say what 0 does that it does not do in lm_eval, where it is the seed of few-shot examples, too."""
    if given.get("seed") == 0:
        typer.echo(f"--seed 0 draws few-shot examples by {OTHER_SEED}; lm_eval's --seed 0 is --seed 0,0,0,0", err=True)


@plan_options(RunPlan)
def run(given: Given, plan: PlanFile = None, out: Out = RESULTS, resume: Resume = None) -> None:
    """Verb ``run``."""
    say_seed(given)
    with resumable("run", out, resume):
        from twotower_eval import api

        made = api.evaluate(plan, out=out, resume=resume, **cast(dict[str, Any], given))
    show(lambda: made.tables)
    typer.echo(made.path)


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
    if random_weights is not None:
        given = given | {"config": random_weights}
    if is_meant(given, plan, out, resume):
        measure(given, plan, out, resume)
        return
    say_seed(given)
    with resumable("speed", out, resume):
        from twotower_eval import api

        made = api.time(plan, out=out, resume=resume, **cast(dict[str, Any], of_plan(SpeedPlan, given)))
    show(lambda: made.tables)
    typer.echo(made.path)


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


def prepare(
    source: Annotated[Path, typer.Argument(help="Folder with gsm8k/, mgsm/, mmlu/, …", metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(help="Folder to write to.", metavar="TARGET")],
    only: Annotated[str | None, option("Only these benchmarks [all found in SOURCE].", metavar="A,B")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Also take files with another number of rows than was published.")
    ] = False,
) -> None:
    """Verb ``data prepare``."""
    from twotower_eval import api

    for file in api.prepare_data(source, target, only=texts(only), partial=partial):
        typer.echo(f"{file.path}: {file.num_rows} rows")


def sources() -> None:
    """Verb ``data sources``."""
    from twotower_eval.api.listing import benchmarks

    for one in benchmarks():
        scored = "" if one.scored else "; its scoring executes model output, which is refused"
        licence = f"{one.licence}{' (not checked here)' if 'licence' in one.unchecked else ''}"
        typer.echo(f"{one.name}: licence {licence}; upstream {one.upstream}{scored}")
        typer.echo(f"  fetch: {one.fetch()}")
        typer.echo(f"  files below SOURCE/{one.name}: {'; or '.join(one.files)}")


def miniature(
    out: Annotated[Path, option("Folder of the training state and the checkpoint.", metavar="DIR")] = TRAINING,
    family: Annotated[str, option("twotower (the pair), ar, sdar, mdlm, bd3lm or e2d2.", metavar="NAME")] = "twotower",
    recipe: Annotated[Path | None, option("TOML recipe [the shipped one].", metavar="FILE")] = None,
    threads: Annotated[int, option("CPU threads [2].", metavar="N")] = 2,
    device: Annotated[str | None, option("Device [a GPU if there is one].", metavar="D")] = None,
) -> None:
    """Verb ``train miniature``."""
    from twotower_eval import api

    try:
        checkpoint = api.train(out, family=family, recipe=recipe, threads=threads, device=device)
    except KeyboardInterrupt:
        named = "" if family == "twotower" else f" --family {family}"
        typer.echo(f"interrupted; to continue: twotower-eval train miniature{named} --out {out}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(checkpoint)
