"""``twotower-eval data`` and ``train``: verbs that make what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval.cli.options import TRAINING, option, texts
from twotower_eval.cli.runs import EXIT_INTERRUPTED


def prepare(
    source: Annotated[Path, typer.Argument(help="Folder with gsm8k/, mgsm/, mmlu/, …", metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(help="Folder to write to.", metavar="TARGET")],
    only: Annotated[str | None, option("Some of the benchmarks [all that are there].", metavar="A,B")] = None,
) -> None:
    """Verb ``data prepare``."""
    from twotower_eval.measure.suites import datafiles

    for file in datafiles.prepare(source, target, texts(only)):
        typer.echo(f"{file.path}: {file.num_rows} rows")


def miniature(
    out: Annotated[Path, option("Folder of the training state and the pair.", metavar="DIR")] = TRAINING,
    recipe: Annotated[Path | None, option("TOML recipe [the shipped one].", metavar="FILE")] = None,
    threads: Annotated[int, option("CPU threads [2].", metavar="N")] = 2,
    device: Annotated[str | None, option("Device [a GPU if there is one].", metavar="D")] = None,
) -> None:
    """Verb ``train miniature``."""
    from twotower_eval.miniature import train

    try:
        pair = train.train_pair(out, recipe_file=recipe, threads=threads, device=device)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; to go on: twotower-eval train miniature --out {out}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(pair)
