"""``twotower-eval train``: the models that the project ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval.cli.options import TRAINING, option
from twotower_eval.cli.runs import EXIT_INTERRUPTED


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
