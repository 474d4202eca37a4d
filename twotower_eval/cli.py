"""The command line: parse, build, call, print. Heavy imports stay inside the verbs, so that help is instant."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from twotower_eval import __version__, store
from twotower_eval.plan import RunPlan, ScalePlan, SpeedPlan, is_scale_plan, load_plan, merge, plan_from_json
from twotower_eval.progress import choose_progress

P = TypeVar("P", RunPlan, SpeedPlan, ScalePlan)
Item = TypeVar("Item")
RESULTS, REPORTS, TRAINING = Path("results"), Path("reports"), Path("training/miniature")
TRACEBACK_VARIABLE = "TWOTOWER_EVAL_TRACEBACK"
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130

app = typer.Typer(
    help="Does a parallel decoder keep its quality, and is it faster? Evaluate, time and report two-tower models.",
    epilog=f"Errors are one line; set {TRACEBACK_VARIABLE}=1 for the whole traceback.",
    add_completion=False,
    rich_markup_mode=None,  # rich would cost a third of the help's time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
train_app = typer.Typer(help="Train the models that the project ships.", rich_markup_mode=None)
data_app = typer.Typer(help="Make benchmark files ready for use.", rich_markup_mode=None)
app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")


def _option(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


Model = Annotated[str | None, _option("Checkpoint folder [the shipped miniature].", "--model", metavar="CKPT")]
Baseline = Annotated[
    str | None,
    _option("Checkpoint or Hugging Face model folder, or context-tower [context-tower].", "--baseline", metavar="CKPT"),
]
Tasks = Annotated[str | None, _option("Tasks and suites; -NAME leaves one out [miniature].", "--tasks", metavar="A,B")]
Decoder = Annotated[
    str | None, _option("Decoder, or package.module:Class [block_diffusion].", "--decoder", metavar="KIND")
]
BlockSizes = Annotated[str | None, _option("Block sizes, crossed [16].", "--block-sizes", metavar="N,N")]
Steps = Annotated[str | None, _option("Steps per block; auto: the block size [auto].", "--steps", metavar="N,auto")]
Thresholds = Annotated[str | None, _option("Confidence thresholds, crossed [0.8].", "--thresholds", metavar="X,X")]
Temperature = Annotated[float | None, _option("Sampling temperature; 0 is greedy [0].", "--temperature", metavar="T")]
Seed = Annotated[int | None, _option("Seed of everything random [0].", "--seed", metavar="S")]
Dtype = Annotated[str | None, _option("float32, bfloat16 or float16 [float32].", "--dtype", metavar="TYPE")]
Devices = Annotated[
    str | None,
    _option("Devices, the context tower's first, e.g. cuda:0,cuda:1 [cpu].", "--devices", "--device", metavar="D,D"),
]
DataDir = Annotated[
    str | None, _option("Folder with TASK/SPLIT.jsonl, as `data prepare` makes it.", "--data-dir", metavar="DIR")
]
PlanFile = Annotated[Path | None, _option("TOML plan; options given here override it.", "--plan", metavar="FILE")]
Out = Annotated[Path, _option("Folder that run folders are made in [results].", "--out", metavar="DIR")]
Resume = Annotated[
    str | None, _option("Go on with this run: its folder, or its id under --out.", "--resume", metavar="RUN")
]


@app.command(help="Score baseline and candidate on the same documents; goes on where it was stopped with --resume.")
def run(
    model: Model = None,
    baseline: Baseline = None,
    tasks: Tasks = None,
    decoder: Decoder = None,
    block_sizes: BlockSizes = None,
    steps: Steps = None,
    thresholds: Thresholds = None,
    temperature: Temperature = None,
    samples: Annotated[int | None, _option("Samples per problem [what the suite says].", metavar="N")] = None,
    batch_size: Annotated[
        int | None, _option("Prompts per batch; scores do not depend on it [8].", metavar="N")
    ] = None,
    limit: Annotated[int | None, _option("First N documents of each task only.", metavar="N")] = None,
    max_new_tokens: Annotated[int | None, _option("Budget of every task [the task's own].", metavar="N")] = None,
    likelihood: Annotated[
        str | None,
        _option("context_tower, exact, denoiser_left_to_right or bound [context_tower].", metavar="KIND"),
    ] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    devices: Devices = None,
    data_dir: DataDir = None,
    plan: PlanFile = None,
    out: Out = RESULTS,
    resume: Resume = None,
) -> None:
    """Verb ``run``."""
    given = {
        **_shared(model, baseline, tasks, decoder, block_sizes, steps, thresholds, temperature),
        **{"seed": seed, "dtype": dtype, "devices": _texts(devices), "data_dir": data_dir},
        **{"samples": samples, "batch_size": batch_size, "limit": limit, "max_new_tokens": max_new_tokens},
        "likelihood": likelihood,
    }
    resumed = _run_path(resume, out) if resume else None
    with _resumable("run", out, resumed):
        resolved = _resolve_plan(RunPlan, plan, resumed, given)
        from twotower_eval import harness

        path = harness.run(resolved, root=out, resume=resumed, progress=choose_progress())
    typer.echo(path)


@app.command(help="Time baseline and candidate in interleaved rounds; timed answers are scored afterwards.")
def speed(
    model: Model = None,
    baseline: Baseline = None,
    tasks: Tasks = None,
    decoder: Decoder = None,
    block_sizes: BlockSizes = None,
    steps: Steps = None,
    thresholds: Thresholds = None,
    temperature: Temperature = None,
    batch_sizes: Annotated[str | None, _option("Prompts per timed call, crossed [1].", metavar="N,N")] = None,
    workload: Annotated[
        str | None,
        _option("answer: stop where the task stops; fixed: exactly --new-tokens [answer].", metavar="KIND"),
    ] = None,
    prompt_tokens: Annotated[int | None, _option("Exact prompt length (fixed only).", metavar="N")] = None,
    new_tokens: Annotated[int | None, _option("Tokens to make [answer: the task's budget].", metavar="N")] = None,
    num_prompts: Annotated[int | None, _option("Prompts per cell and round [16].", metavar="N")] = None,
    min_rounds: Annotated[int | None, _option("Rounds at the least [5].", metavar="R")] = None,
    min_seconds: Annotated[float | None, _option("Seconds of rounds at the least [0].", metavar="S")] = None,
    warmup_rounds: Annotated[int | None, _option("Rounds before, kept and flagged [1].", metavar="R")] = None,
    threads: Annotated[int | None, _option("CPU threads [torch's own choice].", metavar="N")] = None,
    random_weights: Annotated[
        str | None,
        _option("Measure what this size of model costs, without its weights: a config.json.", metavar="CONFIG"),
    ] = None,
    layers: Annotated[int | None, _option("Build the first N layers, extrapolate [all].", metavar="N")] = None,
    share_towers: Annotated[
        bool | None, _option("One set of random weights for both towers: half the memory.", "--share-towers")
    ] = None,
    cuda_graphs: Annotated[
        bool | None, _option("Launch small steps of random weights as CUDA graphs.", "--cuda-graphs")
    ] = None,
    tokens_per_nfe: Annotated[
        str | None, _option("Rates that random weights' commits follow [1.5,2.5,4].", metavar="X,X")
    ] = None,
    profile: Annotated[
        str | None, _option("Run whose blocks random weights' commits follow, too.", metavar="RUN")
    ] = None,
    repeats: Annotated[int | None, _option("Repetitions per timed cost [8].", metavar="N")] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    devices: Devices = None,
    data_dir: DataDir = None,
    plan: PlanFile = None,
    out: Out = RESULTS,
    resume: Resume = None,
) -> None:
    """Verb ``speed``."""
    given = {
        **_shared(model, baseline, tasks, decoder, block_sizes, steps, thresholds, temperature),
        **{"seed": seed, "dtype": dtype, "devices": _texts(devices), "data_dir": data_dir},
        **{"batch_sizes": _numbers(batch_sizes, int, "--batch-sizes"), "workload": workload},
        **{"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "num_prompts": num_prompts},
        **{"min_rounds": min_rounds, "min_seconds": min_seconds, "warmup_rounds": warmup_rounds, "threads": threads},
        **{"random_weights": random_weights, "layers": layers, "share_towers": share_towers},
        "cuda_graphs": cuda_graphs,
        **{"tokens_per_nfe": _numbers(tokens_per_nfe, float, "--tokens-per-nfe"), "repeats": repeats},
        "profile": None if profile is None else str(_run_path(profile, out)),
    }
    resumed = _run_path(resume, out) if resume else None
    with _resumable("speed", out, resumed):
        if _is_scale(given, plan, resumed):
            _refuse_foreign(ScalePlan, given, "has no use for random weights: drop it")
            path = _measure_scale(_resolve_plan(ScalePlan, plan, resumed, given), out, resumed)
        else:
            _refuse_foreign(SpeedPlan, given, "belongs to --random-weights CONFIG: add that, or drop it")
            path = _time_and_score(_resolve_plan(SpeedPlan, plan, resumed, given), out, resumed)
    typer.echo(path)


def _is_scale(given: dict[str, Any], plan_file: Path | None, resumed: Path | None) -> bool:
    """Whether random weights are to be measured, as the command line, the plan or the resumed run says."""
    if resumed is not None:
        return "random_weights" in store.load(resumed).manifest.plan
    return given["random_weights"] is not None or (plan_file is not None and is_scale_plan(plan_file))


def _refuse_foreign(cls: type[Any], given: dict[str, Any], words: str) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    foreign = [key for key, value in given.items() if value is not None and key not in known]
    if foreign:
        raise ValueError(f"--{foreign[0].replace('_', '-')} {words}")


def _measure_scale(plan: ScalePlan, out: Path, resumed: Path | None) -> Path:
    from twotower_eval.speed import scale

    return scale.run(plan, root=out, resume=resumed, progress=choose_progress())


def _time_and_score(plan: SpeedPlan, out: Path, resumed: Path | None) -> Path:
    from twotower_eval import harness, suites
    from twotower_eval import speed as speed_room

    tasks = suites.resolve_tasks(plan.tasks, data_dir=plan.data_dir, seed=plan.seed)
    requests = suites.build_requests(tasks)  # the plan's number is chosen from all of them
    path = speed_room.run(plan, requests, root=out, resume=resumed, progress=choose_progress())
    return harness.score_journal(path) if plan.workload == "answer" else path


@app.command(help="Write a report with tables and plots from run folders; needs neither torch nor a GPU.")
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Run folders or ids [the newest of each verb].", metavar="[RUNS]...", show_default=False),
    ] = None,
    results: Annotated[Path, _option("Folder that run ids are looked up in [results].", metavar="DIR")] = RESULTS,
    out: Annotated[Path, _option("Folder that reports are made in [reports].", metavar="DIR")] = REPORTS,
    section: Annotated[
        list[str] | None,
        _option("A section, by name or package.module:function; may be given several times [all].", metavar="NAME"),
    ] = None,
) -> None:
    """Verb ``report``."""
    paths = [_run_path(name, results) for name in runs] if runs else _newest_of_each_verb(results)
    from twotower_eval import report as report_room

    typer.echo(report_room.write(paths, out, sections=section or None) / "report.md")


@train_app.command(help="Train the miniature pair from nothing; the same command goes on where it was stopped.")
def miniature(
    out: Annotated[Path, _option("Folder of the training state and the pair.", metavar="DIR")] = TRAINING,
    recipe: Annotated[Path | None, _option("TOML recipe [the shipped one].", metavar="FILE")] = None,
    threads: Annotated[int, _option("CPU threads [2].", metavar="N")] = 2,
    device: Annotated[str | None, _option("Device [a GPU if there is one].", metavar="D")] = None,
) -> None:
    """Verb ``train miniature``."""
    from twotower_eval.miniature import train

    try:
        pair = train.train_pair(out, recipe_file=recipe, threads=threads, device=device)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; to go on: twotower-eval train miniature --out {out}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(pair)


@app.command(help="Time the package's own machinery against what it replaces, side by side in one run.")
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benches [all].", metavar="[NAMES]...", show_default=False)
    ] = None,
    threads: Annotated[int, _option("CPU threads [1].", metavar="N")] = 1,
    rounds: Annotated[int, _option("Timed rounds; in each, every arm is timed once [9].", metavar="N")] = 9,
) -> None:
    """Verb ``bench``."""
    from twotower_eval import bench as bench_room

    bench_room.run(names or (), threads=threads, rounds=rounds, say=typer.echo)


@data_app.command(help="Make DIR/TASK/SPLIT.jsonl for --data-dir from the files that benchmarks publish.")
def prepare(
    source: Annotated[Path, typer.Argument(help="Folder with gsm8k/, mgsm/, mmlu/, …", metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(help="Folder to write to.", metavar="TARGET")],
    only: Annotated[str | None, _option("Some of the benchmarks [all that are there].", metavar="A,B")] = None,
) -> None:
    """Verb ``data prepare``."""
    from twotower_eval import datafiles

    for file in datafiles.prepare(source, target, _texts(only)):
        typer.echo(f"{file.path}: {file.num_rows} rows")


@app.callback(invoke_without_command=True)
def _global(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    # Spinning OpenMP threads make small models many times slower where cores are shared; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(arguments or ["--help"], prog_name="twotower-eval", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(error.format_message())
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(str(error) or type(error).__name__)
    except typer.Abort:
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return EXIT_USER_ERROR


@contextmanager
def _resumable(verb: str, out: Path, resumed: Path | None) -> Iterator[None]:
    """On Ctrl-C say how to go on with the run that was being written, if one was begun."""
    before = _run_folders(out)
    try:
        yield
    except KeyboardInterrupt:
        begun = resumed or next(iter(sorted(_run_folders(out) - before, reverse=True)), None)
        if begun is None:
            typer.echo("interrupted before anything was begun", err=True)
        else:
            hint = f"twotower-eval {verb} --resume {begun}"
            typer.echo(f"interrupted; what is finished is kept. To go on: {hint}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _run_folders(out: Path) -> set[Path]:
    return {manifest.parent for manifest in out.glob(f"*/{store.MANIFEST}")}


def _run_path(name: str, out: Path) -> Path:
    """A run named by its folder or by its id under ``out``."""
    for path in (Path(name), out / name):
        if (path / store.MANIFEST).is_file():
            return path
    raise ValueError(f"{name!r} is no run: there is no {store.MANIFEST} in it or in {out / name}")


def _newest_of_each_verb(results: Path) -> list[Path]:
    found = [store.find_runs(results, verb) for verb in ("run", "speed")]
    newest = [paths[0] for paths in found if paths]
    if not newest:
        raise ValueError(f"no runs in {results}: make one with `twotower-eval run`, or name run folders")
    return newest


def _resolve_plan(cls: type[P], plan_file: Path | None, resumed: Path | None, given: dict[str, Any]) -> P:
    if resumed is not None:
        if plan_file is not None:
            raise ValueError("--resume takes the plan from the run: drop --plan")
        manifest = store.load(resumed).manifest
        verb = "run" if cls is RunPlan else "speed"
        if manifest.verb != verb:
            raise ValueError(
                f"{resumed} is a {manifest.verb!r}, not a {verb!r}: twotower-eval {manifest.verb} --resume …"
            )
        return merge(plan_from_json(cls, manifest.plan), given)
    if plan_file is not None:
        return merge(load_plan(plan_file, cls), given)
    return plan_from_json(cls, {key: value for key, value in given.items() if value is not None})


def _shared(
    model: str | None,
    baseline: str | None,
    tasks: str | None,
    decoder: str | None,
    block_sizes: str | None,
    steps: str | None,
    thresholds: str | None,
    temperature: float | None,
) -> dict[str, Any]:
    return {
        "model": model,
        "baseline": baseline,
        "tasks": _texts(tasks),
        "decoder": decoder,
        "block_sizes": _numbers(block_sizes, int, "--block-sizes"),
        "steps": _numbers(steps, lambda text: "auto" if text == "auto" else int(text), "--steps"),
        "thresholds": _numbers(thresholds, float, "--thresholds"),
        "temperature": temperature,
    }


def _texts(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str | None, parse: Callable[[str], Item], option: str) -> tuple[Item, ...] | None:
    parts = _texts(text)
    try:
        return None if parts is None else tuple(parse(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"{option} wants numbers separated by commas, not {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
