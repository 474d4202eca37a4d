"""``twotower-eval speed``: time, then score what was timed."""

from __future__ import annotations

from typing import Annotated

import typer

from twotower_eval.cli import size
from twotower_eval.cli.options import (
    RESULTS,
    Baseline,
    BlockSizes,
    CudaGraphs,
    DataDir,
    Decoder,
    Devices,
    Dtype,
    MinSeconds,
    Model,
    Out,
    PlanFile,
    Resume,
    Seed,
    Steps,
    Tasks,
    Temperature,
    Threads,
    Thresholds,
    WarmupRounds,
    numbers,
    option,
    shared,
    texts,
)
from twotower_eval.cli.runs import resolve_plan, resumable, run_path
from twotower_eval.plan import SpeedPlan
from twotower_eval.progress import choose_progress

Samples = Annotated[
    int | None, option("1: one sample a round, also of tasks that ask for several.", "--samples", metavar="1")
]
Workload = Annotated[
    str | None,
    option("answer: stop where the task stops; fixed: exactly --new-tokens [answer].", metavar="KIND"),
]
NumPrompts = Annotated[int | None, option("Prompts per cell and round [384, or all there are].", metavar="N")]
MinRounds = Annotated[
    int | None,
    option("Minimum rounds, of all launches together [20].", metavar="R"),
]
Launches = Annotated[
    int | None,
    option(
        "Processes, one after the other; rounds are shared out. 5 or more measure how launches differ; "
        "2 to 4 make at least 5 rounds each, more at least 4 [1].",
        "--launches",
        metavar="N",
    ),
]
Costs = Annotated[
    bool | None, option("Time the parts of decoding alone, in the same rounds [costs].", "--costs/--no-costs")
]
RandomWeights = Annotated[
    str | None, option("Alias of `twotower-eval size CONFIG`, whose options it takes.", metavar="CONFIG")
]
Probes = Annotated[
    int | None, option("Prompts per cell and round that nothing has read before, 0 for none [2].", metavar="N")
]


def speed(
    model: Model = None,
    baseline: Baseline = None,
    tasks: Tasks = None,
    decoder: Decoder = None,
    block_sizes: BlockSizes = None,
    steps: Steps = None,
    thresholds: Thresholds = None,
    temperature: Temperature = None,
    samples: Samples = None,
    batch_sizes: Annotated[str | None, option("Prompts per timed call, crossed [1].", metavar="N,N")] = None,
    workload: Workload = None,
    prompt_tokens: Annotated[int | None, option("Exact prompt length (fixed only).", metavar="N")] = None,
    new_tokens: Annotated[int | None, option("Tokens to make [answer: the task's budget].", metavar="N")] = None,
    num_prompts: NumPrompts = None,
    min_rounds: MinRounds = None,
    min_seconds: MinSeconds = None,
    warmup_rounds: WarmupRounds = None,
    launches: Launches = None,
    costs: Costs = None,
    probes: Probes = None,
    threads: Threads = None,
    random_weights: RandomWeights = None,
    layers: Annotated[int | None, option("Of `size`.", metavar="N", hidden=True)] = None,
    share_towers: Annotated[bool | None, option("Of `size`.", "--share-towers", hidden=True)] = None,
    tokens_per_nfe: Annotated[str | None, option("Of `size`.", metavar="X,X", hidden=True)] = None,
    profile: Annotated[str | None, option("Of `size`.", metavar="RUN", hidden=True)] = None,
    repeats: Annotated[int | None, option("Of `size`.", metavar="N", hidden=True)] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    devices: Devices = None,
    cuda_graphs: CudaGraphs = None,
    data_dir: DataDir = None,
    plan: PlanFile = None,
    out: Out = RESULTS,
    resume: Resume = None,
) -> None:
    """Verb ``speed``."""
    given = {
        **shared(model, baseline, tasks, decoder, block_sizes, steps, thresholds, temperature),
        **{"seed": seed, "dtype": dtype, "devices": texts(devices), "data_dir": data_dir},
        **{"batch_sizes": numbers(batch_sizes, int, "--batch-sizes"), "workload": workload, "samples": samples},
        **{"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "num_prompts": num_prompts},
        **{"min_rounds": min_rounds, "min_seconds": min_seconds, "warmup_rounds": warmup_rounds, "threads": threads},
        **{"config": random_weights, "layers": layers, "share_towers": share_towers, "launches": launches},
        **{"tokens_per_nfe": numbers(tokens_per_nfe, float, "--tokens-per-nfe"), "repeats": repeats, "probes": probes},
        **{"costs": costs, "cuda_graphs": cuda_graphs, "profile": profile},
    }
    if size.is_meant(given, plan, out, resume):
        typer.echo(size.measure(given, plan, out, resume))
        return
    resumed = run_path(resume, out) if resume else None
    with resumable("speed", out, resumed):
        resolved = resolve_plan(SpeedPlan, plan, resumed, given)
        from twotower_eval import api

        path = api.time_and_score(resolved, root=out, resume=resumed, progress=choose_progress())
    typer.echo(path)
