"""``twotower-eval verify``: checks before anything is measured."""

from __future__ import annotations

from typing import Annotated

import typer

from twotower_eval import store
from twotower_eval.cli.options import RESULTS, Devices, Dtype, Out, Seed, option, texts
from twotower_eval.plan import VerifyPlan, merge

EXIT_CHECK_FAILED = 5


def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder [the shipped miniature].", metavar="[CKPT]", show_default=False),
    ] = None,
    golden: Annotated[
        str | None, option("Folder of reference outputs, with the checkpoint they belong to.", metavar="DIR")
    ] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    devices: Devices = None,
    out: Out = RESULTS,
) -> None:
    """Verb ``verify``."""
    from twotower_eval.measure import verify as verify_room

    given = {"model": model, "golden": golden, "seed": seed, "dtype": dtype, "devices": texts(devices)}
    path = verify_room.verify(merge(VerifyPlan(), given), root=out)
    checks = store.load(path).checks
    typer.echo(verify_room.table(checks))
    typer.echo(f"{path}: {verify_room.summary(checks)}")
    if any(check.outcome == "failed" for check in checks):
        raise typer.Exit(EXIT_CHECK_FAILED)
