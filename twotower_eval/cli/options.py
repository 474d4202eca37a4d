"""Options that several verbs share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from twotower_eval.errors import UserError

Item = TypeVar("Item")
RESULTS, REPORTS, TRAINING = Path("results"), Path("reports"), Path("training/miniature")


def option(text: str, *names: str, metavar: str | None = None, hidden: bool = False) -> Any:
    """One option with its help; ``[…]`` in it says the default."""
    return typer.Option(*names, help=text, metavar=metavar, show_default=False, hidden=hidden)


Model = Annotated[str | None, option("Checkpoint folder [the shipped miniature].", "--model", metavar="CKPT")]
Baseline = Annotated[
    str | None,
    option("Checkpoint or Hugging Face model folder, or context-tower [context-tower].", "--baseline", metavar="CKPT"),
]
Tasks = Annotated[str | None, option("Tasks and suites; -NAME leaves one out [miniature].", "--tasks", metavar="A,B")]
Decoder = Annotated[
    str | None, option("Decoder, or package.module:Class [block_diffusion].", "--decoder", metavar="KIND")
]
BlockSizes = Annotated[str | None, option("Block sizes, crossed [16].", "--block-sizes", metavar="N,N")]
Steps = Annotated[str | None, option("Steps per block; auto: the block size [auto].", "--steps", metavar="N,auto")]
Thresholds = Annotated[str | None, option("Confidence thresholds, crossed [0.8].", "--thresholds", metavar="X,X")]
Temperature = Annotated[
    float | None, option("Sampling temperature; 0 is greedy [what the tasks ask].", "--temperature", metavar="T")
]
MinSeconds = Annotated[float | None, option("Minimum seconds of rounds [0].", "--min-seconds", metavar="S")]
WarmupRounds = Annotated[
    int | None, option("Warm-up rounds: recorded, not reported [1].", "--warmup-rounds", metavar="R")
]
Threads = Annotated[int | None, option("CPU threads [torch's own choice].", "--threads", metavar="N")]
Seed = Annotated[int | None, option("Seed of everything random [0].", "--seed", metavar="S")]
Dtype = Annotated[str | None, option("float32, bfloat16 or float16 [float32].", "--dtype", metavar="TYPE")]
Devices = Annotated[
    str | None,
    option("Devices, the context tower's first, e.g. cuda:0,cuda:1 [cpu].", "--devices", "--device", metavar="D,D"),
]
CudaGraphs = Annotated[bool | None, option("Launch small steps, of both arms, as CUDA graphs.", "--cuda-graphs")]
DataDir = Annotated[
    str | None, option("Folder with TASK/SPLIT.jsonl, as `data prepare` makes it.", "--data-dir", metavar="DIR")
]
PlanFile = Annotated[Path | None, option("TOML plan; options given here override it.", "--plan", metavar="FILE")]
Out = Annotated[Path, option("Folder that run folders are made in [results].", "--out", metavar="DIR")]
Resume = Annotated[
    str | None, option("Go on with this run: its folder, or its id under --out.", "--resume", metavar="RUN")
]


def shared(
    model: str | None,
    baseline: str | None,
    tasks: str | None,
    decoder: str | None,
    block_sizes: str | None,
    steps: str | None,
    thresholds: str | None,
    temperature: float | None,
) -> dict[str, Any]:
    """The options of ``run`` and ``speed`` alike, as the plan's fields."""
    return {
        "model": model,
        "baseline": baseline,
        "tasks": texts(tasks),
        "decoder": decoder,
        "block_sizes": numbers(block_sizes, int, "--block-sizes"),
        "steps": numbers(steps, lambda text: "auto" if text == "auto" else int(text), "--steps"),
        "thresholds": numbers(thresholds, float, "--thresholds"),
        "temperature": temperature,
    }


def texts(text: str | None) -> tuple[str, ...] | None:
    """Texts separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str | None, parse: Callable[[str], Item], option: str) -> tuple[Item, ...] | None:
    """What ``parse`` makes of texts separated by commas; its ValueError names the option."""
    parts = texts(text)
    try:
        return None if parts is None else tuple(parse(part) for part in parts)
    except ValueError as error:
        kind = "whole numbers" if parse is int else "numbers"
        raise UserError(f"{option} wants {kind} separated by commas, not {text!r}") from error
