"""Worlds in which few prompts carry much of the time: runaways, Pareto lengths, gains that fall with length, mixtures;
and families of documents that are right or wrong together.

The truth is the ratio of sums over a whole population. There are as many prompts as ``speed`` takes by default, or
fewer where the answers' budgets, or the lengths of all documents, are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.quality_worlds import QualityWorld, Scores, flipped, world
from twotower_eval.analyse.calibration.speed_worlds import POPULATION, Population, SpeedWorld, timed

Floats = NDArray[np.float64]
Knows = Literal["nothing more", "budgets", "all lengths"]
Quantity = Literal["time", "throughput"]
NUM_PROMPTS = 384  # as a plan that names no number
NUM_ROUNDS = 5
STEP_S = 0.02  # of the baseline, for each token
NOISE = 0.03  # of each timed call


@dataclass(frozen=True, kw_only=True)
class Tailed:
    """A population of answers. ``alpha``: lengths are Pareto, else lognormal; ``fall``: the gain is a falling power of
    length; ``share`` of the answers run away to ``times`` the typical length: the candidate's alone, or of ``both``.
    """

    alpha: float | None = None
    fall: float = 0.0
    share: float = 0.0
    times: float = 1.0
    both: bool = False
    longest: float = np.inf

    @property
    def name(self) -> str:
        """The scenario in words."""
        lengths = "lognormal lengths" if self.alpha is None else f"Pareto({self.alpha:g}) lengths"
        lengths += "" if self.longest == np.inf else f" up to {self.longest:g} times the least"
        gain = f", gain falls as length^-{self.fall:g}" if self.fall else ""
        who = "both arms" if self.both else "the candidate"
        away = f", {100 * self.share:g} % runaways of {who} at {self.times:g} times" if self.share else ""
        return f"{lengths}{gain}{away}"


@cache
def population(kind: Tailed) -> Population:
    """A population of answers. Runaways have no gain: a loop commits one token a forward."""
    rng = np.random.default_rng(20261129)
    if kind.alpha is None:
        length = rng.lognormal(0, 0.4, POPULATION)
    else:
        length = np.minimum(1 + rng.pareto(kind.alpha, POPULATION), kind.longest)
    gain = np.exp(rng.normal(0.8, 0.2, POPULATION)) * length**-kind.fall
    away = rng.random(POPULATION) < kind.share
    own = np.where(away & kind.both, kind.times, length)
    other = np.where(away, kind.times, length)
    tokens, other_tokens = np.ceil(100 * own), np.ceil(100 * other)
    return Population(
        baseline_s=STEP_S * tokens,
        candidate_s=STEP_S * other_tokens / np.where(away, 1.0, gain),
        baseline_tokens=tokens,
        candidate_tokens=other_tokens,
    )


def known(calls: stats.TimedCalls, kind: Tailed, knows: Knows) -> stats.TimedCalls:
    """The calls with what else is known of their population."""
    everyone = population(kind)
    if knows == "budgets":
        budget_s = STEP_S * 100 * max(kind.times, 1.0)
        return replace(calls, limits_s=(budget_s, budget_s))
    if knows == "all lengths":
        documents = stats.Documents(
            baseline_tokens=everyone.baseline_tokens,
            candidate_tokens=everyone.candidate_tokens,
            longest_baseline=float(calls.baseline_tokens.max()),
            longest_candidate=float(calls.candidate_tokens.max()),
        )
        return replace(calls, documents=documents)
    return calls


def tailed(
    kind: Tailed, num_calls: int = NUM_PROMPTS, knows: Knows = "nothing more", quantity: Quantity = "time"
) -> SpeedWorld:
    """Prompts drawn anew for every repetition from the whole population."""
    everyone = population(kind)

    def draw(rng: np.random.Generator) -> stats.TimedCalls:
        chosen = everyone.of(rng.integers(0, POPULATION, num_calls))
        return known(timed(rng, chosen, NUM_ROUNDS, "lognormal", NOISE, fixed=False), kind, knows)

    suffix = "" if knows == "nothing more" else f", {knows} known"
    return SpeedWorld(
        name=f"{quantity}: {kind.name}{suffix}",
        quantity=quantity,
        num_rounds=NUM_ROUNDS,
        num_calls=num_calls,
        truth=everyone.truth(quantity),
        draw=draw,
    )


def family_world(clusters: Sequence[str], family_size: int = 5) -> QualityWorld:
    """Families of documents that are right or wrong together in both arms; ``clusters`` is what the estimate knows of
    them.
    """
    num = len(clusters) // family_size

    def draw(rng: np.random.Generator) -> Scores:
        own_F = (rng.random(num) < 0.7).astype(float)
        return np.repeat(own_F, family_size), np.repeat(flipped(rng, own_F, 0.2, 0.2), family_size)

    name = f"{num} families of {family_size} that are right or wrong together"
    return world(name, (0.7, 0.62), draw, tasks=["t"] * len(clusters), clusters=clusters)


def family_worlds() -> tuple[QualityWorld, ...]:
    """Near-duplicates as ``run`` joins them."""
    return tuple(family_world([str(i // size) for i in range(num * size)], size) for num, size in ((40, 5), (120, 3)))


def tail_worlds() -> tuple[SpeedWorld, ...]:
    """Runaways, and heavy tails with and without a falling gain; fewer prompts, knowing more; tokens per second too."""
    rare, often = Tailed(share=0.01, times=30), Tailed(share=0.05, times=20)
    return (
        tailed(rare),
        tailed(often),
        tailed(Tailed(alpha=1.1)),
        tailed(Tailed(alpha=1.5, fall=0.3)),
        tailed(Tailed(share=0.02, times=20), 64, "budgets"),
        tailed(Tailed(share=0.02, times=20), 64, "all lengths"),
        tailed(Tailed(alpha=1.5, fall=0.3), 64, "all lengths"),
        tailed(Tailed(share=0.02, times=20), 64, "budgets", "throughput"),
        tailed(rare, 164, "budgets", "throughput"),
        tailed(Tailed(share=0.02, times=20, both=True), 64, "budgets", "throughput"),
    )


def fresh_tail_worlds() -> tuple[SpeedWorld, ...]:
    """Worlds that no method was chosen or tuned on."""
    return (
        tailed(Tailed(share=0.03, times=40, both=True)),
        tailed(Tailed(alpha=1.3, fall=0.2, longest=100)),
        tailed(Tailed(alpha=1.7, fall=0.25, share=0.02, times=12)),
        tailed(Tailed(share=0.03, times=12), 96, "budgets"),
        tailed(Tailed(alpha=1.8, fall=0.2, share=0.02, times=15), 96, "all lengths"),
    )
