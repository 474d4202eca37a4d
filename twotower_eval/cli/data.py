"""``twotower-eval data``: benchmark files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval.cli.options import option, texts


def prepare(
    source: Annotated[Path, typer.Argument(help="Folder with gsm8k/, mgsm/, mmlu/, …", metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(help="Folder to write to.", metavar="TARGET")],
    only: Annotated[str | None, option("Some of the benchmarks [all that are there].", metavar="A,B")] = None,
) -> None:
    """Verb ``data prepare``."""
    from twotower_eval.measure.suites import datafiles

    for file in datafiles.prepare(source, target, texts(only)):
        typer.echo(f"{file.path}: {file.num_rows} rows")
