"""What ``speed`` does with random weights: its options, and when they are meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from twotower_eval import store
from twotower_eval.cli.options import option
from twotower_eval.plan import ScalePlan, SpeedPlan, is_scale_plan
from twotower_eval.progress import choose_progress

RandomWeights = Annotated[
    str | None,
    option(
        "Measure what this size of model costs, without its weights: a config.json, or a shipped one's name.",
        metavar="CONFIG",
    ),
]
Layers = Annotated[int | None, option("Build the first N layers, extrapolate [all].", metavar="N")]
ShareTowers = Annotated[
    bool | None, option("One set of random weights for both towers: half the memory.", "--share-towers")
]
TokensPerNfe = Annotated[str | None, option("Rates that random weights' commits follow [1.5,2.5,4].", metavar="X,X")]
Profile = Annotated[str | None, option("Run whose blocks random weights' commits follow, too.", metavar="RUN")]
Repeats = Annotated[int | None, option("Repetitions per timed cost [8].", metavar="N")]


def is_scale(given: dict[str, Any], plan_file: Path | None, resumed: Path | None) -> bool:
    """Whether random weights are to be measured, as the command line, the plan or the resumed run says.

    ValueError for an option that the one or the other would ignore.
    """
    if resumed is not None:
        meant = "random_weights" in store.load(resumed).manifest.plan
    else:
        meant = given["random_weights"] is not None or (plan_file is not None and is_scale_plan(plan_file))
    if meant:
        _refuse_foreign(ScalePlan, given, "has no use for random weights: drop it")
    else:
        _refuse_foreign(SpeedPlan, given, "belongs to --random-weights CONFIG: add that, or drop it")
    return meant


def _refuse_foreign(cls: type[Any], given: dict[str, Any], words: str) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    foreign = [key for key, value in given.items() if value is not None and key not in known]
    if foreign:
        no = "no-" if given[foreign[0]] is False else ""
        raise ValueError(f"--{no}{foreign[0].replace('_', '-')} {words}")


def measure(plan: ScalePlan, out: Path, resumed: Path | None) -> Path:
    """Measure and give the run's folder."""
    from twotower_eval.speed import scale

    return scale.run(plan, root=out, resume=resumed, progress=choose_progress())
