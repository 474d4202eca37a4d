"""Worlds of repeated looks at a claim until it is supported: the error rate without a correction, and with it.

The claim lies at the boundary, so every SUPPORTED is wrong. Looking stops at the first SUPPORTED, at the fifth look at
the latest. Rounds of the same prompts are pooled, each look a launch, as runs of the same cells are; looks at other
prompts stay apart and the newest is judged. Without a correction every look is judged at 95 %, with one at the level of
``stats.look_alpha``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.simulate import generator
from twotower_eval.analyse.calibration.speed_worlds import POPULATION, Noise, population, timed
from twotower_eval.progress import Advance

MOST_LOOKS = 5
NUM_ROUNDS = 12  # a look: of 5 the first looks hardly ever decide, so that they could not err either
Draw = Callable[[np.random.Generator], list[stats.TimedCalls]]


@dataclass(frozen=True, kw_only=True)
class LookWorld:
    """A speedup that is ``truth``; ``draw`` gives the data at each look."""

    name: str
    num_calls: int
    truth: float
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class LookTally:
    """Of ``num`` attempts at a false claim, how many were SUPPORTED: at the first look, at any look, and at any
    corrected look.
    """

    name: str
    size: str
    num: int
    num_first: int
    num_free: int
    num_priced: int


def look_worlds() -> tuple[LookWorld, ...]:
    """Fixed prompts timed again, sampled ones timed again, and other prompts each time."""
    return (
        _again("fixed prompts timed again", 8, "lognormal", 0.05, fixed=True),
        _again("fixed prompts timed again", 8, "heavy tail", 0.1, fixed=True),
        _again("sampled prompts timed again", 64, "lognormal", 0.2, fixed=False),
        _others("other prompts each time", 64, "lognormal", 0.05),
    )


def _again(name: str, num_calls: int, kind: Noise, size: float, *, fixed: bool) -> LookWorld:
    """The same prompts at every look, so that all rounds are taken together."""
    spread = 0.2 if fixed else 0.01  # prompts that differ would hide what rounds do
    always = population(spread).of(np.arange(num_calls))

    def draw(rng: np.random.Generator) -> list[stats.TimedCalls]:
        calls = always if fixed else population(spread).of(rng.integers(0, POPULATION, num_calls))
        parts = [timed(rng, calls, NUM_ROUNDS, kind, size, fixed=fixed) for _ in range(MOST_LOOKS)]
        return [pooled(parts[: number + 1]) for number in range(MOST_LOOKS)]

    truth = always.truth("time") if fixed else population(spread).truth("time")
    named = f"{name}, rounds taken together, {kind} of {100 * size:g} %"
    return LookWorld(name=named, num_calls=num_calls, truth=truth, draw=draw)


def _others(name: str, num_calls: int, kind: Noise, size: float) -> LookWorld:
    """New prompts at every look."""

    def draw(rng: np.random.Generator) -> list[stats.TimedCalls]:
        drawn = [population(0.2).of(rng.integers(0, POPULATION, num_calls)) for _ in range(MOST_LOOKS)]
        return [timed(rng, calls, NUM_ROUNDS, kind, size, fixed=False) for calls in drawn]

    named, truth = f"{name}, the newest judged, {kind} of {100 * size:g} %", population(0.2).truth("time")
    return LookWorld(name=named, num_calls=num_calls, truth=truth, draw=draw)


def pooled(parts: Sequence[stats.TimedCalls]) -> stats.TimedCalls:
    """The rounds of several looks at the same prompts, each a launch."""
    return stats.TimedCalls(
        baseline_s=np.concatenate([part.baseline_s for part in parts]),
        candidate_s=np.concatenate([part.candidate_s for part in parts]),
        baseline_tokens=np.concatenate([part.baseline_tokens for part in parts]),
        candidate_tokens=np.concatenate([part.candidate_tokens for part in parts]),
        launches=[f"look {number}" for number, part in enumerate(parts) for _ in part.launches],
        fixed=parts[0].fixed,
    )


def calibrate_looks(world: LookWorld, *, num: int, num_resamples: int, seed: int, advance: Advance) -> LookTally:
    """Look up to ``MOST_LOOKS`` times at the claim that the speedup is at least its true value, ``num`` times over."""
    num_first = num_free = num_priced = 0
    for repetition in range(num):
        rng = generator(seed, "looks", world.name, repetition)
        seen, drawn_seed = world.draw(rng), int(rng.integers(2**31))
        free, priced = (
            [
                _supports(world, calls, alpha_of(number), num_resamples, drawn_seed)
                for number, calls in enumerate(seen, start=1)
            ]
            for alpha_of in (lambda _: stats.ALPHA, stats.look_alpha)
        )
        num_first, num_free, num_priced = num_first + free[0], num_free + any(free), num_priced + any(priced)
        advance()
    size = f"{NUM_ROUNDS} rounds x {world.num_calls} calls a look"
    return LookTally(
        name=world.name, size=size, num=num, num_first=num_first, num_free=num_free, num_priced=num_priced
    )  # fmt: skip


def _supports(
    world: LookWorld, calls: stats.TimedCalls, alpha: float | None, num_resamples: int, drawn_seed: int
) -> bool:
    """Whether the claim is SUPPORTED at a one-sided error rate; never where none is left."""
    if alpha is None:
        return False
    level = 1 - 2 * alpha
    at = partial(stats.speedup, calls, "time", num_resamples=num_resamples, seed=drawn_seed)
    launches = len(set(calls.launches))
    decision = stats.decide(
        at(level=level),
        relation="at_least",
        expected=world.truth,
        margin=0.0,
        num_rounds=launches if stats.resamples_launches(calls.launches) else len(calls.launches),
        num_calls=None if calls.fixed else world.num_calls,
        level=level,
    )
    return decision.outcome == "SUPPORTED"
