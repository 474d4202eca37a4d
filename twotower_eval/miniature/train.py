"""Train the miniature pair: first the context tower as a causal model, then the denoiser on the frozen tower.

Recipe (recipe.toml): AdamW with a warmup-stable-decay schedule; the denoiser starts as a copy of the context tower
and trains on a curriculum of block sizes with several noise draws of each batch (arXiv 2606.26493). Micro-batches of
a step run in threads beside each other. State is saved every few minutes; the same command continues from there.

What else a recipe may say, beside ``recipe.toml``: ``corpus`` ("long"), ``stages``; of a stage ``trains`` and
``optimizer`` ("muon"), see :mod:`stages`; of a denoiser's ``passes`` (each on the masks that the last one left, so that
it sees the states of decoding), ``targets`` ("greedy": the context tower's own answers) and ``soft_share`` (of its
distributions in the target).
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from twotower_eval.engine.models import check_device
from twotower_eval.engine.models.config import parse_config
from twotower_eval.engine.models.nemotron_h import MixtureOfExperts, initialise
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.engine.ops import moe
from twotower_eval.errors import UserError
from twotower_eval.miniature.blocks import (
    Batch,
    autoregressive_loss,
    chained_loss,
    draw_noise,
    run_clean,
    teacher_probabilities,
    training_batches,
)
from twotower_eval.miniature.corpus import SHORT, Corpus
from twotower_eval.miniature.evaluate import context_point, learning_point, with_greedy_answers
from twotower_eval.miniature.export import config_json, export_pair
from twotower_eval.miniature.long_answers import LONG
from twotower_eval.miniature.recipes import Recipe, Settings, read_recipe
from twotower_eval.miniature.stages import (
    Stage,
    block_size_at,
    learning_rate,
    load_state,
    make_stage,
    save_state,
    stage_names,
)
from twotower_eval.store.journal import TRAINING_LOG
from twotower_eval.strict import JsonObject

SAVE_EVERY_S = 180.0
LOG_EVERY_STEPS = 20
POOL_SIZE = 1024  # documents sorted by shape at a time
BIAS_STEP = 1e-3  # of the router's correction bias, per step, towards equal load (arXiv 2408.15664)
CLIP_NORM = 1.0
TIME_TABLE_STD = 0.02
CORPORA = {"short": SHORT, "long": LONG}


def new_pair(recipe: Recipe) -> TwoTower:
    """A randomly initialised pair of the recipe's sizes, from its seed."""
    with torch.random.fork_rng(devices=()):  # torch's own initial weights, which are replaced, draw from everyone's
        model = TwoTower(parse_config(config_json(recipe)))
    generator = torch.Generator().manual_seed(recipe["seed"])
    initialise(model.context_tower.tower, generator)
    with torch.no_grad():
        model.context_tower.head.weight.normal_(0.0, model.config.initializer_range, generator=generator)
    return model


@torch.no_grad()
def start_denoiser(model: TwoTower, seed: int) -> None:
    """The denoiser starts as a copy of the context tower; time tables start so that a layer keeps its gate open."""
    model.denoiser.tower.load_state_dict(model.context_tower.tower.state_dict())
    model.denoiser.head.load_state_dict(model.context_tower.head.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for table in model.denoiser.scale_shift_tables:
        table.zero_()
        table[2] = 1.0
    for module in (model.denoiser.t_embedder, model.denoiser.t_block):
        for name, parameter in module.named_parameters():
            parameter.zero_() if name.endswith("bias") else parameter.normal_(0.0, TIME_TABLE_STD, generator=generator)


Loss = Callable[[Batch, int, torch.Generator], tuple[Tensor, int, float | None]]


def stage_loss(stage: Stage, model: TwoTower, corpus: Corpus) -> Loss:
    """The loss function of a stage: batch, step, generator -> loss (nats), tokens it covers, share predicted right
    (denoiser only)."""
    settings = stage.settings
    mixed_precision = settings["mixed_precision"]

    def context(batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, int, float | None]:
        loss = autoregressive_loss(model.context_tower, batch, mixed_precision=mixed_precision)
        return loss, batch.num_tokens, None

    def denoiser(batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, int, float | None]:
        block_size, draws, num_passes = block_size_at(settings, step), settings["draws"], settings.get("passes", 1)
        soft_share = settings.get("soft_share", 0.0)
        if _targets(settings) == "greedy":
            batch = with_greedy_answers(model, batch, _widest(settings), corpus.max_new_tokens)
        with torch.no_grad():
            hidden_NSH, states = run_clean(model.context_tower, batch, block_size)
            teacher = teacher_probabilities(model.context_tower, batch, hidden_NSH) if soft_share else None
        mask_id, from_left = model.config.mask_token_id, step >= settings["suffix_from"] * settings["steps"]
        shares = {"full_share": settings["full_share"], "suffix_share": settings["suffix_share"] if from_left else 0.0}
        noise = draw_noise(batch, block_size, draws, mask_id, generator, **shares)
        loss, right = chained_loss(
            model,
            batch,
            states,
            noise,
            generator,
            num_passes=num_passes,
            mixed_precision=mixed_precision,
            teacher_NAV=teacher,
            soft_share=soft_share,
        )
        return loss, num_passes * draws * int(batch.answer_lengths_N.sum()), float(right.detach())

    return context if stage.tower == "context" else denoiser


def _targets(settings: Settings) -> str:
    """The answers that the denoiser learns: the corpus's, or the context tower's greedy ones."""
    targets = settings.get("targets", "corpus")
    if targets not in ("corpus", "greedy"):
        raise UserError(f"the recipe's targets are {targets!r}; choose from corpus, greedy")
    return str(targets)


def _widest(settings: Settings) -> int:
    """The largest block of the curriculum: batches are padded to it."""
    return max(int(size) for size, _ in settings.get("curriculum", [[16, 1.0]]))


class LoadCounter:
    """Counts the tokens of each expert of the trained tower, through hooks, to balance the routers."""

    def __init__(self, tower: nn.Module) -> None:
        self.mixers = [m for m in tower.modules() if isinstance(m, MixtureOfExperts)]
        self.loads = [torch.zeros(m.gate.weight.shape[0]) for m in self.mixers]
        for mixer, load in zip(self.mixers, self.loads, strict=True):
            mixer.register_forward_pre_hook(_counting_hook(load))

    @torch.no_grad()
    def balance(self) -> None:
        """Move each correction bias one step towards equal load and start counting anew."""
        for mixer, load in zip(self.mixers, self.loads, strict=True):
            direction = torch.sign(load.mean() - load).to(mixer.gate.weight.device)
            mixer.gate.e_score_correction_bias.add_(BIAS_STEP * direction)
            load.zero_()


def _counting_hook(load: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    @torch.no_grad()
    def hook(mixer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(mixer, MixtureOfExperts)
        x_RH = inputs[0].flatten(0, -2)
        chosen, _ = moe.route(x_RH, mixer.gate.weight, mixer.gate.e_score_correction_bias, mixer.routing)
        load.add_(torch.bincount(chosen.flatten(), minlength=load.shape[0]).cpu())

    return hook


def train_step(
    stage: Stage, loss_of: Loss, batches: Sequence[Batch], seed: int, workers: ThreadPoolExecutor
) -> dict[str, float | None]:
    """One optimiser step over the micro-batches, computed in threads beside each other."""

    def gradients(position: int) -> tuple[tuple[Tensor | None, ...], float, int, float | None]:
        generator = torch.Generator(device=batches[position].ids_NS.device)
        generator.manual_seed((seed * 1_000_003 + stage.step) * 64 + position)
        loss, tokens, right = loss_of(batches[position], stage.step, generator)
        grads = torch.autograd.grad(loss, stage.parameters, allow_unused=True)
        return grads, float(loss.detach()), tokens, right

    results = list(workers.map(gradients, range(len(batches))))
    for parameter, *grads in zip(stage.parameters, *(result[0] for result in results), strict=True):
        present = [g for g in grads if g is not None]
        parameter.grad = torch.stack(present).sum(0).div_(len(batches)) if present else None
    norm = nn.utils.clip_grad_norm_(stage.parameters, CLIP_NORM)
    rate = learning_rate(stage.settings, stage.step)
    for optimizer in stage.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    stage.step += 1
    stage.num_tokens += sum(result[2] for result in results)
    rights = [result[3] for result in results if result[3] is not None]
    return {
        "loss_nats": sum(result[1] for result in results) / len(results),
        "masked_accuracy": sum(rights) / len(rights) if rights else None,
        "gradient_norm": float(norm),
        "learning_rate": rate,
    }


def run_stage(stage: Stage, model: TwoTower, recipe: Recipe, folder: Path, device: torch.device, threads: int) -> None:
    """Train until the stage's last step, logging and saving on the way. Ctrl-C saves, then stops."""
    per_step, seed, corpus = stage.settings["batches_per_step"], recipe["seed"], corpus_of(recipe)
    trained = model.context_tower.tower if stage.tower == "context" else model.denoiser.tower
    stream = _stream_from(stage, recipe)
    counter, loss_of = LoadCounter(trained), stage_loss(stage, model, corpus)
    saved_at = started = time.monotonic()
    before_s, totals = stage.seconds, []
    with ThreadPoolExecutor(threads) as workers:
        try:
            while stage.step < stage.settings["steps"]:
                batches = [batch.to(device) for batch in islice(stream, per_step)]
                totals.append(train_step(stage, loss_of, batches, seed, workers))
                counter.balance()
                stage.seconds = before_s + time.monotonic() - started
                if stage.step % stage.settings["evaluate_every"] == 0 or stage.step == stage.settings["steps"]:
                    _evaluate(stage, model, corpus, folder)
                if stage.step % LOG_EVERY_STEPS == 0 or stage.step == stage.settings["steps"]:
                    _log(stage, totals, folder)
                    totals = []
                if time.monotonic() - saved_at > SAVE_EVERY_S:
                    save_state(folder, model, stage)
                    saved_at = time.monotonic()
        finally:
            save_state(folder, model, stage)


def corpus_of(recipe: Recipe) -> Corpus:
    """The corpus that the recipe names, the short answers by default."""
    name = recipe.get("corpus", "short")
    if name not in CORPORA:
        raise UserError(f"the recipe's corpus is {name!r}; choose from {', '.join(CORPORA)}")
    return CORPORA[name]


def _stream_from(stage: Stage, recipe: Recipe) -> Iterator[Batch]:
    """The stage's batches, continuing after those already used. Stages draw from different seeds."""
    names = stage_names(recipe)
    stream = training_batches(
        len(names) * recipe["seed"] + names.index(stage.name),
        columns_per_batch=stage.settings["columns_per_batch"],
        multiple=_widest(stage.settings),
        pool_size=POOL_SIZE,
        corpus=corpus_of(recipe),
    )
    return islice(stream, stage.step * stage.settings["batches_per_step"], None)


def _evaluate(stage: Stage, model: TwoTower, corpus: Corpus, folder: Path) -> None:
    """Add a point of the learning curve to the log. The frozen tower's accuracy is measured once per launch."""
    point: JsonObject
    if stage.tower == "context":
        point = context_point(model, corpus)
    else:
        stage.ar_accuracy = stage.ar_accuracy or context_point(model, corpus)["ar_accuracy"]
        point = learning_point(model, stage.ar_accuracy, corpus)
    append_row(folder, {"stage": stage.tower, "step": stage.step, "num_tokens": stage.num_tokens, **point})


def append_row(folder: Path, row: JsonObject) -> None:
    """Add a row to the training's log, and print it."""
    with (folder / TRAINING_LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def _log(stage: Stage, totals: Sequence[Mapping[str, float | None]], folder: Path) -> None:
    known = [key for key, value in totals[0].items() if value is not None]
    mean = {key: sum(cast(float, total[key]) for total in totals) / len(totals) for key in known}
    row = {
        "stage": stage.tower,
        "step": stage.step,
        "num_tokens": stage.num_tokens,
        "seconds": round(stage.seconds, 1),
        **{key: float(f"{value:.5g}") for key, value in mean.items()},
    }
    append_row(folder, row)


def train_pair(folder: Path, *, recipe_file: Path | None = None, threads: int = 2, device: str | None = None) -> Path:
    """Train all stages in ``folder``, resuming what is there; the folder of the exported pair.

    ``threads`` micro-batches run beside each other on a CPU, each on one core; on a GPU (used if there is one) one.
    """
    recipe = read_recipe(recipe_file)
    if device is not None:
        check_device(device)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with signals_save_first(), one_thread():
        return _train(folder, recipe, place, threads)


@contextmanager
def signals_save_first() -> Iterator[None]:
    """Make SIGTERM, and SIGINT where a shell's background jobs ignore it, interrupt as Ctrl-C does, so that training is
    saved. Only the main thread can set or receive signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.signal(name, signal.default_int_handler) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as micro-batches run in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(folder: Path, recipe: Recipe, place: torch.device, threads: int) -> Path:
    """Run all stages in order, from the folder's state. Each denoiser stage exports a pair, the next one a better."""
    folder.mkdir(parents=True, exist_ok=True)
    names = stage_names(recipe)
    model = new_pair(recipe).to(place)
    stage = load_state(folder, model, recipe) or make_stage(names[0], model, recipe)
    pair = None
    for name, following in zip(names, (*names[1:], None), strict=True):
        if names.index(name) < names.index(stage.name):
            continue
        run_stage(stage, model, recipe, folder, place, threads if place.type == "cpu" else 1)
        if stage.tower == "denoiser":
            pair = export_pair(model, recipe, folder)
        if following is not None:
            stage = _next_stage(following, stage, model, recipe)
            save_state(folder, model, stage)
    if pair is None:
        raise UserError("the recipe's last stage must train the denoiser")
    return pair


def _next_stage(name: str, done: Stage, model: TwoTower, recipe: Recipe) -> Stage:
    """The next stage: one of the same tower keeps the counts; a denoiser's first stage starts from the context
    tower."""
    stage = make_stage(name, model, recipe)
    if stage.tower == done.tower:
        stage.num_tokens, stage.seconds = done.num_tokens, done.seconds
    elif stage.tower == "denoiser":
        start_denoiser(model, recipe["seed"])
    return stage
