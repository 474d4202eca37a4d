"""A training recipe: the pair's sizes, its seed, and how each stage trains its tower. See train.py for the meaning."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from twotower_eval.errors import UserError

RECIPE_FILE = Path(__file__).with_name("recipe.toml")


class Settings(TypedDict):
    """Settings of one stage; those without a default are required. ``curriculum``: block sizes and their shares of the
    steps."""

    steps: int
    batches_per_step: int
    columns_per_batch: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    decay_share: float
    evaluate_every: int
    mixed_precision: bool
    trains: NotRequired[str]
    optimizer: NotRequired[str]
    curriculum: NotRequired[Sequence[tuple[int, float]]]
    draws: NotRequired[int]
    full_share: NotRequired[float]
    suffix_share: NotRequired[float]
    suffix_from: NotRequired[float]
    passes: NotRequired[int]
    soft_share: NotRequired[float]
    targets: NotRequired[str]


class Recipe(TypedDict):
    """A recipe. It also has a table of :class:`Settings` for each stage, by the stage's name."""

    seed: int
    model: Mapping[str, object]
    stages: NotRequired[Sequence[str]]
    corpus: NotRequired[str]


def settings_of(recipe: Recipe, stage: str) -> Settings:
    """The settings of a stage."""
    return cast(Settings, cast(Mapping[str, object], recipe)[stage])


def read_recipe(file: Path | None) -> Recipe:
    """The recipe as plain data; the shipped one by default."""
    path = file or RECIPE_FILE
    try:
        return cast(Recipe, tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # of tomllib, of text that is not UTF-8, of numbers with too many digits
        raise UserError(f"{path}: not a readable recipe ({error})") from error
