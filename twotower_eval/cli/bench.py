"""``twotower-eval bench``: the package's machinery against what it replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval.cli.options import option


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="engine, batching, scoring [all that have what they need].", metavar="[NAMES]...", show_default=False
        ),
    ] = None,
    threads: Annotated[int, option("CPU threads [1].", metavar="N")] = 1,
    rounds: Annotated[int, option("Timed rounds; in each, every arm is timed once [9].", metavar="N")] = 9,
    model: Annotated[Path | None, option("scoring: a Hugging Face causal model's folder.", metavar="DIR")] = None,
    data_dir: Annotated[Path | None, option("scoring: files made by data prepare.", metavar="DIR")] = None,
    limit: Annotated[int | None, option("scoring: questions per task [200].", metavar="N")] = None,
) -> None:
    """Verb ``bench``."""
    from twotower_eval import bench as bench_room

    options = {"model": model, "data_dir": data_dir, "limit": limit}
    bench_room.run(names or (), threads=threads, rounds=rounds, say=typer.echo, **options)
