"""``twotower-eval calibrate``: how often intervals and verdicts are right where the truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval.cli.options import REPORTS, option
from twotower_eval.cli.runs import EXIT_INTERRUPTED


def calibrate(
    repetitions: Annotated[int, option("Simulated measurements per world [1000].", metavar="N")] = 1_000,
    seed: Annotated[int, option("Seed of everything random [0].", metavar="S")] = 0,
    out: Annotated[
        Path, option("Folder for calibration.md and calibration.csv [reports/calibration].", metavar="DIR")
    ] = REPORTS / "calibration",
) -> None:
    """Verb ``calibrate``."""
    from twotower_eval import api

    try:
        path = api.calibrate(out, repetitions=repetitions, seed=seed)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written. The same command starts over", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(path)
