"""What is usual for each family of models: its decoder, its baseline, and the kinds of log-likelihoods that it offers.

The one table of these: measuring takes defaults from it, errors name what would work, and reports say what a baseline
is to the candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from twotower_eval.records import LikelihoodKind

OWN_TOWER: LikelihoodKind = "context_tower"
MASKED: tuple[LikelihoodKind, ...] = ("bound", "denoiser_left_to_right")
Relation = Literal["own backbone", "usual", "other"]  # of a baseline to the candidate


@dataclass(frozen=True, kw_only=True)
class Usual:
    """``decoder`` is the family's own sampler. ``kinds`` are its log-likelihoods, the default first. ``is_causal``: it
    decodes one token at a time as it is, or has a part that does.

    ``baseline`` names models of one token at a time, as a hub calls them, one of which is usually compared; without its
    size where that is the candidate's. ``is_backbone``: the family's weights began as those. None where none is known.
    """

    decoder: str
    kinds: tuple[LikelihoodKind, ...] = MASKED
    baseline: str | None = None
    is_backbone: bool = True
    is_causal: bool = False


TWO_TOWERS = Usual(decoder="block_diffusion", kinds=(OWN_TOWER, "denoiser_left_to_right", "bound"), is_causal=True)
USUAL: Mapping[str, Usual] = {
    "nemotron_h": TWO_TOWERS,
    "transformers": Usual(decoder="autoregressive", kinds=("exact",), is_causal=True),
    "openai": Usual(decoder="endpoint", kinds=("exact",), is_causal=True),
    "a2d_bd3lm": Usual(decoder="sdar", baseline="Qwen/Qwen3"),
    "a2d_mdlm": Usual(decoder="low_confidence", baseline="Qwen/Qwen3"),
    "bd3lm": Usual(decoder="bd3lm"),
    "diffusion_gemma": Usual(decoder="entropy_bound", kinds=()),
    "dream": Usual(decoder="dream", baseline="Qwen/Qwen2.5-7B"),
    "e2d2": Usual(decoder="e2d2"),
    "fast_dllm_v2": Usual(decoder="fast_dllm_v2", baseline="Qwen/Qwen2.5"),
    "llada": Usual(decoder="low_confidence", baseline="meta-llama/Meta-Llama-3-8B", is_backbone=False),
    "llada2_moe": Usual(decoder="llada2", baseline="inclusionAI/Ling"),
    "mdlm": Usual(decoder="ancestral"),
    "radd": Usual(decoder="radd"),
    "sdar": Usual(decoder="sdar", baseline="Qwen/Qwen3"),
}


def usual_of(family: str) -> Usual:
    """That of a family; of one that is not this project's, what a two-tower model has."""
    return USUAL.get(family, TWO_TOWERS)


def has_own_form(family: str) -> bool:
    """Whether a model of the family decodes one token at a time as it is, or has a part that does."""
    return usual_of(family).is_causal


def needs_baseline(name: str, family: str) -> str:
    """Why a candidate cannot be compared with itself, and which baseline is usual."""
    usual = usual_of(family)
    said = f"{name} is of family {family}, which has no autoregressive form of its own to be compared with: "
    if usual.baseline is None:
        return said + "name a causal language model by --baseline"
    sized = usual.baseline if usual.baseline[-1] == "B" else f"the {usual.baseline} of its size"
    why = "from which it was made" if usual.is_backbone else "of its size, with which it is compared"
    return said + f"name a baseline by --baseline; usual is {sized}, {why}"


def relation(family: str, baseline: str) -> Relation:
    """What a baseline of this name is to a candidate of this family: the backbone that the family was made from, the
    model that it is usually compared with, or another one. Names are all that tells it.

    >>> relation("sdar", "Qwen/Qwen3-8B")
    'own backbone'
    """
    usual = usual_of(family)
    if usual.baseline is None:
        return "other"
    wanted, given = (name.rsplit("/", 1)[-1].lower() for name in (usual.baseline, baseline.split("@")[0]))
    if not given.startswith(wanted):
        return "other"
    return "own backbone" if usual.is_backbone else "usual"
