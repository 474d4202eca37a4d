"""``twotower-eval size``: what a size of model costs, without its weights. ``speed --random-weights`` is an alias."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from twotower_eval import store
from twotower_eval.cli.options import (
    RESULTS,
    BlockSizes,
    CudaGraphs,
    Devices,
    MinSeconds,
    Out,
    PlanFile,
    Resume,
    Seed,
    Threads,
    WarmupRounds,
    numbers,
    option,
    texts,
)
from twotower_eval.cli.runs import resolve_plan, resumable, run_path
from twotower_eval.errors import UserError
from twotower_eval.plan import SizingPlan, SpeedPlan, is_older_sizing_plan
from twotower_eval.progress import choose_progress
from twotower_eval.records import verb_of

ALIAS = "speed --random-weights CONFIG is an alias of: twotower-eval size CONFIG"


def size(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A config.json, a folder that holds one, or the name of a shipped one.",
            metavar="CONFIG",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[int | None, option("Build the first N layers, extrapolate [all].", metavar="N")] = None,
    share_towers: Annotated[
        bool | None, option("One set of random weights for both towers: half the memory.", "--share-towers")
    ] = None,
    block_sizes: BlockSizes = None,
    batch_sizes: Annotated[str | None, option("Rows per step, crossed [1].", metavar="N,N")] = None,
    prompt_tokens: Annotated[int | None, option("Tokens of context before each step [512].", metavar="N")] = None,
    tokens_per_nfe: Annotated[
        str | None, option("Tokens per denoiser call that commits follow [1.5,2.5,4].", metavar="X,X")
    ] = None,
    profile: Annotated[str | None, option("Run whose blocks commits follow, too.", metavar="RUN")] = None,
    repeats: Annotated[int | None, option("Repetitions per timed cost [8].", metavar="N")] = None,
    min_rounds: Annotated[int | None, option("Minimum rounds [5].", metavar="R")] = None,
    min_seconds: MinSeconds = None,
    warmup_rounds: WarmupRounds = None,
    threads: Threads = None,
    seed: Seed = None,
    dtype: Annotated[str | None, option("float32, bfloat16 or float16 [bfloat16].", metavar="TYPE")] = None,
    devices: Devices = None,
    cuda_graphs: CudaGraphs = None,
    plan: PlanFile = None,
    out: Out = RESULTS,
    resume: Resume = None,
) -> None:
    """Verb ``size``."""
    given = {
        **{"config": config, "layers": layers, "share_towers": share_towers, "prompt_tokens": prompt_tokens},
        **{"block_sizes": numbers(block_sizes, int, "--block-sizes"), "repeats": repeats},
        **{"batch_sizes": numbers(batch_sizes, int, "--batch-sizes"), "cuda_graphs": cuda_graphs},
        **{"tokens_per_nfe": numbers(tokens_per_nfe, float, "--tokens-per-nfe"), "profile": profile},
        **{"min_rounds": min_rounds, "min_seconds": min_seconds, "warmup_rounds": warmup_rounds, "threads": threads},
        **{"seed": seed, "dtype": dtype, "devices": texts(devices)},
    }
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
