"""``twotower-eval bench``: the package's machinery against what it replaces."""

from __future__ import annotations

from typing import Annotated

import typer

from twotower_eval.cli.options import option


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benches [all].", metavar="[NAMES]...", show_default=False)
    ] = None,
    threads: Annotated[int, option("CPU threads [1].", metavar="N")] = 1,
    rounds: Annotated[int, option("Timed rounds; in each, every arm is timed once [9].", metavar="N")] = 9,
) -> None:
    """Verb ``bench``."""
    from twotower_eval import bench as bench_room

    bench_room.run(names or (), threads=threads, rounds=rounds, say=typer.echo)
