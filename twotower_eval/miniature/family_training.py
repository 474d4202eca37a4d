"""Train a small model of another family on the miniature's corpus, all of them by one recipe (families.toml).

AdamW with a warmup-stable-decay schedule. State is saved every few minutes; the same command continues from there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypedDict, cast

import torch
from safetensors.torch import save_file
from torch import nn

from twotower_eval.engine.models import check_device
from twotower_eval.errors import UserError
from twotower_eval.miniature.blocks import encoded
from twotower_eval.miniature.corpus import SHORT, training_documents
from twotower_eval.miniature.export import write_tokenizer
from twotower_eval.miniature.networks import (
    BASE_FOLDER,
    TRAINABLE,
    ModelSizes,
    Network,
    Rows,
    Trainable,
    exported,
    rows_of,
)
from twotower_eval.miniature.recipes import Settings
from twotower_eval.miniature.stages import learning_rate, make_optimizers
from twotower_eval.miniature.train import (
    CLIP_NORM,
    LOG_EVERY_STEPS,
    POOL_SIZE,
    SAVE_EVERY_S,
    append_row,
    signals_save_first,
)
from twotower_eval.store.journal import TRAINING_LOG

RECIPE_FILE = Path(__file__).with_name("families.toml")


class FamilyRecipe(TypedDict):
    """A recipe for one model: its seed, its sizes, and how it is trained."""

    seed: int
    model: ModelSizes
    training: Settings


def read_recipe(file: Path | None) -> FamilyRecipe:
    """The recipe as plain data; the shipped one by default."""
    path = file or RECIPE_FILE
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of tomllib, of text that is not UTF-8, of numbers with too many digits
        raise UserError(f"{path}: not a readable recipe ({error})") from error
    if missing := [name for name in ("seed", "model", "training") if name not in recipe]:
        raise UserError(f"{path}: a recipe of one model needs {', '.join(missing)}; a pair's recipe has other tables")
    return cast(FamilyRecipe, recipe)


@dataclass
class Progress:
    """A training under way."""

    network: Network
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def save(self, folder: Path, family: str) -> None:
        """Save everything that resuming needs, atomically."""
        state = {
            "family": family,
            "model": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
        }
        torch.save(state, folder / "state.tmp")
        os.replace(folder / "state.tmp", folder / "state.pt")


def begin_training(folder: Path, family: str, recipe: FamilyRecipe, device: torch.device) -> Progress:
    """The saved training, or one at its first step. UserError where the folder holds another family's."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe["seed"])
        network = TRAINABLE[family].start(recipe["model"]).to(device).train()
    progress = Progress(network, make_optimizers(dict(network.named_parameters()), recipe["training"]))
    file = folder / "state.pt"
    if not file.exists():
        return progress
    state = torch.load(file, weights_only=True, map_location="cpu")
    if state.get("family", "twotower") != family:
        raise UserError(f"{folder} holds a training of {state.get('family', 'twotower')}; give another --out")
    network.load_state_dict(state["model"])
    for optimizer, values in zip(progress.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    progress.step, progress.num_tokens, progress.seconds = state["step"], state["num_tokens"], state["seconds"]
    return progress


def batches(recipe: FamilyRecipe, family: Trainable) -> Iterator[Rows]:
    """An endless stream of rows, the same documents for every family. Each pool of documents is sorted by length, cut
    into batches of at most ``columns_per_batch`` tokens, and these are shuffled."""
    rng, stream = Random(f"rows {recipe['seed']}"), training_documents(recipe["seed"])
    columns, multiple = recipe["training"]["columns_per_batch"], recipe["model"]["block_size"]
    canvas = SHORT.max_new_tokens if family.reads_canvas else None
    while True:
        pool = [encoded(document, rng) for document in islice(stream, POOL_SIZE)]
        pool.sort(key=lambda pair: (len(pair[0]) + len(pair[1]), rng.random()))
        cut = []
        while pool:
            longest = max(len(prompt) + (canvas or len(answer)) for prompt, answer in pool[: columns // 32])
            num = max(1, columns // longest)
            cut.append(rows_of(pool[:num], multiple=multiple, canvas=canvas, aligned=family.aligned))
            pool = pool[num:]
        rng.shuffle(cut)
        yield from cut


def train_step(progress: Progress, family: Trainable, recipe: FamilyRecipe, stream: Iterator[Rows]) -> dict[str, float]:
    """One optimiser step."""
    settings, device = recipe["training"], next(progress.network.parameters()).device
    losses, rights, num = [], [], settings["batches_per_step"]
    for position in range(num):
        rows = next(stream).to(device)
        generator = torch.Generator(device=device)
        generator.manual_seed((recipe["seed"] * 1_000_003 + progress.step) * 64 + position)
        loss, right = family.loss(progress.network, rows, generator, recipe["model"])
        (loss / num).backward()
        losses.append(float(loss.detach()))
        rights.append(right)
        progress.num_tokens += rows.num_answer_tokens
    norm = nn.utils.clip_grad_norm_(progress.network.parameters(), CLIP_NORM)
    rate = learning_rate(settings, progress.step)
    for optimizer in progress.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    progress.step += 1
    mean_right = sum(rights) / num
    return {"loss_nats": sum(losses) / num, "accuracy": mean_right, "gradient_norm": float(norm), "learning_rate": rate}


def train_family(
    folder: Path, family: str, *, recipe_file: Path | None = None, threads: int = 2, device: str | None = None
) -> Path:
    """Train one of :data:`~twotower_eval.miniature.networks.TRAINABLE` in ``folder``, resuming what is there; the
    folder of the exported checkpoint. ``threads`` are torch's."""
    recipe = read_recipe(recipe_file)
    if device is not None:
        check_device(device)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with signals_save_first():
            progress = begin_training(folder, family, recipe, place)
            _run(progress, family, recipe, folder)
    finally:
        torch.set_num_threads(before)
    return export(progress, family, recipe, folder)


def _run(progress: Progress, family: str, recipe: FamilyRecipe, folder: Path) -> None:
    """Train until the last step, logging and saving on the way. Ctrl-C saves, then stops."""
    trained, steps = TRAINABLE[family], recipe["training"]["steps"]
    stream = islice(batches(recipe, trained), progress.step * recipe["training"]["batches_per_step"], None)
    saved_at = started = time.monotonic()
    before_s, totals = progress.seconds, []
    try:
        while progress.step < steps:
            totals.append(train_step(progress, trained, recipe, stream))
            progress.seconds = before_s + time.monotonic() - started
            if progress.step % LOG_EVERY_STEPS == 0 or progress.step == steps:
                mean = {key: float(f"{sum(t[key] for t in totals) / len(totals):.5g}") for key in totals[0]}
                counts = {"step": progress.step, "num_tokens": progress.num_tokens}
                append_row(folder, {"stage": family, **counts, "seconds": round(progress.seconds, 1), **mean})
                totals = []
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                progress.save(folder, family)
                saved_at = time.monotonic()
    finally:
        progress.save(folder, family)


def export(progress: Progress, family: str, recipe: FamilyRecipe, folder: Path) -> Path:
    """Weights in float32, config.json, tokenizer and training log into ``folder/FAMILY``; that folder."""
    target = folder / family
    target.mkdir(parents=True, exist_ok=True)
    save_file(exported(progress.network), target / "model.safetensors", metadata={"format": "pt"})
    trained = TRAINABLE[family]
    _write_config(target, trained.config(recipe["model"]))
    if trained.base is not None:
        _write_config(target / BASE_FOLDER, trained.base(recipe["model"]))
    write_tokenizer(target)
    if (folder / TRAINING_LOG).exists():
        shutil.copyfile(folder / TRAINING_LOG, target / TRAINING_LOG)
    return target


def _write_config(folder: Path, config: dict[str, object]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
