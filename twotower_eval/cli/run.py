"""``twotower-eval run``: score."""

from __future__ import annotations

from typing import Annotated

import typer

from twotower_eval.cli.options import (
    RESULTS,
    Baseline,
    BlockSizes,
    CudaGraphs,
    DataDir,
    Decoder,
    Devices,
    Dtype,
    Model,
    Out,
    PlanFile,
    Resume,
    Seed,
    Steps,
    Tasks,
    Temperature,
    Thresholds,
    option,
    shared,
    texts,
)
from twotower_eval.cli.runs import resolve_plan, resumable, run_path
from twotower_eval.plan import RunPlan
from twotower_eval.progress import choose_progress


def run(
    model: Model = None,
    baseline: Baseline = None,
    tasks: Tasks = None,
    decoder: Decoder = None,
    block_sizes: BlockSizes = None,
    steps: Steps = None,
    thresholds: Thresholds = None,
    temperature: Temperature = None,
    samples: Annotated[int | None, option("Samples per problem [what the tasks ask].", metavar="N")] = None,
    batch_size: Annotated[int | None, option("Prompts per batch; scores do not depend on it [8].", metavar="N")] = None,
    limit: Annotated[int | None, option("First N documents of each task only.", metavar="N")] = None,
    max_new_tokens: Annotated[int | None, option("Budget of every task [the task's own].", metavar="N")] = None,
    trace: Annotated[
        int | None, option("Documents of each task whose denoising is traced for the report [2].", metavar="N")
    ] = None,
    likelihood: Annotated[
        str | None,
        option("context_tower, exact, denoiser_left_to_right or bound [context_tower].", metavar="KIND"),
    ] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    devices: Devices = None,
    cuda_graphs: CudaGraphs = None,
    data_dir: DataDir = None,
    plan: PlanFile = None,
    out: Out = RESULTS,
    resume: Resume = None,
) -> None:
    """Verb ``run``."""
    given = {
        **shared(model, baseline, tasks, decoder, block_sizes, steps, thresholds, temperature),
        **{"seed": seed, "dtype": dtype, "devices": texts(devices), "data_dir": data_dir},
        **{"samples": samples, "batch_size": batch_size, "limit": limit, "max_new_tokens": max_new_tokens},
        **{"likelihood": likelihood, "trace": trace, "cuda_graphs": cuda_graphs},
    }
    resumed = run_path(resume, out) if resume else None
    with resumable("run", out, resumed):
        resolved = resolve_plan(RunPlan, plan, resumed, given)
        from twotower_eval import api

        path = api.evaluate(resolved, root=out, resume=resumed, progress=choose_progress())
    typer.echo(path)
