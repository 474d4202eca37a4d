"""A stage of the training: what trains, by which optimiser, on what schedule, and how it is saved.

A recipe names its stages in order (``stages``, by default the context tower, then the denoiser). Each has a table of
settings; a stage that continues training a tower names it (``trains``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.errors import UserError
from twotower_eval.miniature.recipes import Recipe, Settings, settings_of

DEFAULT_STAGES = ("context", "denoiser")
MATRIX_DECAY = 0.05


@dataclass
class Stage:
    """One stage under way: what trains, its progress, and its optimisers. Tokens and seconds count over all stages of a
    tower."""

    name: str
    tower: str
    settings: Settings
    parameters: list[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    ar_accuracy: dict[str, float] = field(default_factory=dict)


def stage_names(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's stages in order. UserError for a stage without a table or of an unknown tower."""
    names = tuple(recipe.get("stages", DEFAULT_STAGES))
    for name in names:
        if name not in recipe:
            raise UserError(f"the recipe names a stage {name!r}, but has no table [{name}]")
        if tower_of(name, recipe) not in DEFAULT_STAGES:
            raise UserError(f"the recipe's stage {name!r} trains {tower_of(name, recipe)!r}, not context or denoiser")
    return names


def tower_of(name: str, recipe: Recipe) -> str:
    """Which tower a stage trains, ``context`` or ``denoiser``."""
    return str(settings_of(recipe, name).get("trains", name))


def learning_rate(settings: Settings, step: int) -> float:
    """Warmup-stable-decay: linear up, flat, linear down over the last ``decay_share`` of the steps."""
    peak, final, steps = settings["learning_rate"], settings["final_learning_rate"], settings["steps"]
    decay_steps = max(1, round(settings["decay_share"] * steps))
    if step < settings["warmup_steps"]:
        return float(peak * (step + 1) / settings["warmup_steps"])
    remaining = (steps - step) / decay_steps
    return float(final + (peak - final) * min(1.0, remaining))


def block_size_at(settings: Settings, step: int) -> int:
    """The curriculum's block size: shares of the steps, in order."""
    end = 0.0
    for block_size, share in settings["curriculum"]:
        end += share * settings["steps"]
        if step < end:
            return int(block_size)
    return int(settings["curriculum"][-1][0])


def make_stage(name: str, model: TwoTower, recipe: Recipe) -> Stage:
    """The stage at its first step."""
    settings, tower = settings_of(recipe, name), tower_of(name, recipe)
    trained: nn.Module = model.context_tower if tower == "context" else model.denoiser
    named = {n: p for n, p in trained.named_parameters() if not n.endswith("e_score_correction_bias")}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in named.values():
        parameter.requires_grad_(True)
    return Stage(name, tower, settings, list(named.values()), make_optimizers(named, settings))


def make_optimizers(named: Mapping[str, nn.Parameter], settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW for all, or with ``optimizer = "muon"`` Muon for the layers' matrices and AdamW for the rest.

    Muon's updates are scaled to AdamW's size, so that one learning rate serves both (arXiv 2502.16982).
    """
    kind = settings.get("optimizer", "adamw")
    if kind not in ("adamw", "muon"):
        raise UserError(f"the recipe's optimizer is {kind!r}; choose from adamw, muon")
    hidden = [n for n, p in named.items() if kind == "muon" and _is_hidden_matrix(n, p)]
    rest = [p for n, p in named.items() if n not in hidden]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": MATRIX_DECAY},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))]
    if hidden:
        matrices = [named[n] for n in hidden]
        muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=MATRIX_DECAY, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and ".layers." in f".{name}" and not name.endswith("gate.weight")


def save_state(folder: Path, model: TwoTower, stage: Stage) -> None:
    """Save everything that resuming needs, atomically."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in stage.optimizers],
        "stage": stage.name,
        "step": stage.step,
        "num_tokens": stage.num_tokens,
        "seconds": stage.seconds,
    }
    torch.save(state, folder / "state.tmp")
    os.replace(folder / "state.tmp", folder / "state.pt")


def load_state(folder: Path, model: TwoTower, recipe: Recipe) -> Stage | None:
    """The saved stage to continue, or None if nothing was saved. Our own file: loaded with weights_only."""
    file = folder / "state.pt"
    if not file.exists():
        return None
    state = torch.load(file, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    if state["stage"] not in stage_names(recipe):
        raise UserError(f"{file} is at the stage {state['stage']!r}, which the recipe does not name")
    stage = make_stage(state["stage"], model, recipe)
    saved = state["optimizers"] if "optimizers" in state else [state["optimizer"]]  # one, in older files
    for optimizer, values in zip(stage.optimizers, saved, strict=True):
        optimizer.load_state_dict(values)
    stage.step, stage.num_tokens, stage.seconds = state["step"], state["num_tokens"], state["seconds"]
    return stage
