"""Worlds whose rounds depend on each other: wander, slow spells of one arm, launches that differ.

Calls, drift and the noise of single calls are as in ``speed_worlds``. On top, every round and arm has a factor that
its neighbours share. Its mean is the same for both arms, so the true ratio stays that of the calls: an arm's wander is
a first-order autoregression (AR(1)) on the log scale, a slow spell hits either arm as often, launches differ by a
factor of mean 1. A machine whose spells hit one arm only, and seldom, cannot be told from a quiet one by a run without
a spell, by no method; that is why it is not among these worlds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.speed_worlds import (
    POPULATION,
    ROUND_NOISE,
    Floats,
    Population,
    SpeedWorld,
    drift,
    noise,
    population,
)

NUM_CALLS = 16
CALL_NOISE = 0.05
SPREAD = 0.1  # of the gain between calls
LONG_AGO = 60  # rounds before the first that is timed, so that a spell may be on when a run begins

Factors = Callable[[np.random.Generator, int], tuple[Floats, Floats]]  # of each arm, (R,)


def wander(correlation: float, size: float) -> Factors:
    """Each arm's own AR(1), ``size`` on the log scale."""

    def one(rng: np.random.Generator, num_rounds: int) -> Floats:
        steps_R = rng.normal(0, size, num_rounds)
        logs_R = steps_R.copy()
        for r in range(1, num_rounds):
            logs_R[r] = correlation * logs_R[r - 1] + np.sqrt(1 - correlation**2) * steps_R[r]
        factors_R: Floats = np.exp(logs_R - size**2 / 2)
        return factors_R

    return lambda rng, num_rounds: (one(rng, num_rounds), one(rng, num_rounds))


def spells(factor: float, length: int, share: float) -> Factors:
    """Either arm, anew for each spell, is slower for some rounds; ``share`` of quiet rounds begin one."""

    def draw(rng: np.random.Generator, num_rounds: int) -> tuple[Floats, Floats]:
        arms_2R = np.ones((2, LONG_AGO + num_rounds))
        r = 0
        while r < LONG_AGO + num_rounds:
            if rng.random() < share:
                arms_2R[rng.integers(2), r : r + length] = factor
                r += length
            else:
                r += 1
        return arms_2R[0, LONG_AGO:], arms_2R[1, LONG_AGO:]

    return draw


def one_spell(factor: float, length: int) -> Factors:
    """Exactly one slow spell in every run, of either arm."""

    def draw(rng: np.random.Generator, num_rounds: int) -> tuple[Floats, Floats]:
        arms_2R = np.ones((2, num_rounds))
        start = rng.integers(0, num_rounds - length + 1)
        arms_2R[rng.integers(2), start : start + length] = factor
        return arms_2R[0], arms_2R[1]

    return draw


def in_launches(num_launches: int, size: float, *, of_these: bool = False) -> Factors:
    """Launches of equally many rounds, in which the baseline is slower or faster by ``size`` on the log scale.

    ``of_these``: about the mean of the launches that are there, so that the truth is that of these launches.
    """

    def draw(rng: np.random.Generator, num_rounds: int) -> tuple[Floats, Floats]:
        factors_L = np.exp(rng.normal(0, size, num_launches) - size**2 / 2)
        factors_L = factors_L / factors_L.mean() if of_these else factors_L
        return np.repeat(factors_L, num_rounds // num_launches), np.ones(num_rounds)

    return draw


def world(
    what: str, factors: Factors, num_rounds: int, *, fixed: bool = True, num_launches: int = 1, like: bool = False
) -> SpeedWorld:
    """Rounds with these factors on fixed or on sampled prompts; ``like``: both arms have the baseline's factors."""
    every = population(SPREAD)

    def draw(rng: np.random.Generator) -> stats.TimedCalls:
        calls = every.of(np.arange(NUM_CALLS) if fixed else rng.integers(0, POPULATION, NUM_CALLS))
        of_baseline_R, of_candidate_R = factors(rng, num_rounds)
        both = of_baseline_R, of_baseline_R if like else of_candidate_R
        return _timed(rng, calls, both, num_launches, fixed=fixed)

    return SpeedWorld(
        name=f"time: {'fixed' if fixed else 'sampled'} prompts, {what}",
        quantity="time",
        num_rounds=num_rounds,
        num_calls=NUM_CALLS,
        truth=(every.of(np.arange(NUM_CALLS)) if fixed else every).truth("time"),
        draw=draw,
        num_launches=num_launches,
    )


def _timed(
    rng: np.random.Generator, calls: Population, factors: tuple[Floats, Floats], num_launches: int, *, fixed: bool
) -> stats.TimedCalls:
    num_rounds = len(factors[0])
    shape = (num_rounds, NUM_CALLS)
    drift_R1 = drift(rng, num_rounds)
    baseline_s, candidate_s = (
        seconds
        * drift_R1
        * of_arm_R[:, None]
        * noise(rng, "lognormal", ROUND_NOISE, (num_rounds, 1))
        * noise(rng, "lognormal", CALL_NOISE, shape)
        for seconds, of_arm_R in zip((calls.baseline_s, calls.candidate_s), factors, strict=True)
    )
    tokens = [np.broadcast_to(column, shape) for column in (calls.baseline_tokens, calls.candidate_tokens)]
    return stats.TimedCalls(
        baseline_s=baseline_s, candidate_s=candidate_s, baseline_tokens=tokens[0], candidate_tokens=tokens[1],
        launches=[f"{r * num_launches // num_rounds}" for r in range(num_rounds)], fixed=fixed,
    )  # fmt: skip


def serial_worlds() -> tuple[SpeedWorld, ...]:
    """The dependence that rounds were found to have, at the numbers of rounds and launches that people use."""
    ar, short, long = wander(0.8, 0.05), spells(1.2, 3, 0.1), spells(1.6, 3, 0.1)
    return (
        *(world("AR(1) 0.8 of 5 % between rounds", ar, num) for num in (5, 6, 8, 12, 20, 40)),
        *(world("AR(1) 0.8 of 5 % between rounds", ar, num, fixed=False) for num in (5, 12, 40)),
        *(world("AR(1) 0.8 of 2 % between rounds", wander(0.8, 0.02), num) for num in (10, 20, 40)),
        *(world("spells of 1.2x for 3 rounds", short, num) for num in (5, 8, 12, 40)),
        world("spells of 1.2x for 3 rounds", short, 12, fixed=False),
        *(world("spells of 1.6x for 3 rounds", long, num) for num in (6, 10, 20, 40)),
        *(world("one spell of 1.6x for 3 rounds", one_spell(1.6, 3), num) for num in (5, 12)),
        *(
            world("launches differ by 3 %", in_launches(5, 0.03), 5 * num, num_launches=5, fixed=fixed)
            for num, fixed in ((4, True), (4, False), (8, True))
        ),
        *(world("AR(1) 0.8 of 5 % over 5 launches", ar, 5 * num, num_launches=5) for num in (4, 5, 10, 20)),
        *(world("AR(1) 0.8 of 5 % over 5 launches", ar, num, num_launches=5) for num in (5, 10)),
        world("AR(1) 0.8 of 5 % over 5 launches", ar, 50, num_launches=5, fixed=False),
        world(
            "launches differ by 3 %, truth of these", in_launches(3, 0.03, of_these=True), 24, num_launches=3
        ),
    )  # fmt: skip


def fresh_serial_worlds() -> tuple[SpeedWorld, ...]:
    """Other correlations, spells and launches, on which nothing was tuned."""
    return (
        *(world("AR(1) 0.5 of 4 % between rounds", wander(0.5, 0.04), num) for num in (7, 15)),
        *(world("AR(1) 0.9 of 4 % between rounds", wander(0.9, 0.04), num) for num in (10, 30)),
        *(world("spells of 1.3x for 4 rounds", spells(1.3, 4, 0.08), num) for num in (9, 24)),
        world("spells of 1.3x for 4 rounds", spells(1.3, 4, 0.08), 15, fixed=False),
        world("launches differ by 2 %", in_launches(6, 0.02), 24, num_launches=6),
        world("launches differ by 2 %", in_launches(5, 0.02), 25, num_launches=5, fixed=False),
        world("AR(1) 0.7 of 4 % over 6 launches", wander(0.7, 0.04), 48, num_launches=6),
        world("both arms alike drift by AR(1) 0.9 of 10 %", wander(0.9, 0.1), 12, like=True),
    )
