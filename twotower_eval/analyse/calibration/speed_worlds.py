"""Worlds in which speedups are known: calls that differ in length and gain, skewed times, drift and stalls; and rounds
that depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twotower_eval.analyse import stats

Floats = NDArray[np.float64]
Noise = Literal["lognormal", "heavy tail", "stalls"]
POPULATION = 20_000
ROUND_NOISE = 0.01  # of an arm within a round, on the log scale


@dataclass(frozen=True, kw_only=True)
class SpeedWorld:
    """A scenario: the true ratio in ``quantity``, and how a repetition's timed calls are drawn.

    ``num_rounds`` are those of all launches together.
    """

    name: str
    quantity: Literal["time", "throughput", "length"]
    num_rounds: int
    num_calls: int
    truth: float
    draw: Callable[[np.random.Generator], stats.TimedCalls]
    num_launches: int = 1

    @property
    def size(self) -> str:
        """Rounds, launches and calls, as tables show them."""
        launches = f"{self.num_launches} launches, " if self.num_launches > 1 else ""
        return f"{launches}{self.num_rounds} rounds x {self.num_calls} calls"


@dataclass(frozen=True, kw_only=True)
class Population:
    """Calls: AR seconds and tokens, seconds and tokens of the candidate."""

    baseline_s: Floats
    candidate_s: Floats
    baseline_tokens: Floats
    candidate_tokens: Floats

    def of(self, index_P: NDArray[np.int64]) -> Population:
        """The population restricted to some calls."""
        columns = (self.baseline_s, self.candidate_s, self.baseline_tokens, self.candidate_tokens)
        a_s, b_s, a, b = (column[index_P] for column in columns)
        return Population(baseline_s=a_s, candidate_s=b_s, baseline_tokens=a, candidate_tokens=b)

    def truth(self, quantity: str) -> float:
        """Ratio of sums over all calls."""
        time = self.baseline_s.sum() / self.candidate_s.sum()
        length = self.candidate_tokens.sum() / self.baseline_tokens.sum()
        return float({"time": time, "length": length, "throughput": time * length}[quantity])


@cache
def population(spread: float) -> Population:
    """Answers of lognormal length; the candidate's own length and gain vary by ``spread`` from call to call."""
    rng = np.random.default_rng(20261125)
    tokens = np.ceil(100 * rng.lognormal(0, 0.6, POPULATION))
    other = np.ceil(tokens * np.exp(rng.normal(0, spread, POPULATION)))
    gain = np.exp(rng.normal(0.8, spread, POPULATION))
    return Population(
        baseline_s=0.02 * tokens, candidate_s=0.02 * other / gain, baseline_tokens=tokens, candidate_tokens=other
    )


def noise(rng: np.random.Generator, kind: Noise, size: float, shape: tuple[int, ...]) -> Floats:
    """Factors of mean 1: lognormal; a Pareto tail on top; or one call in fifty that takes four times as long."""
    factors: Floats = np.exp(rng.normal(-(size**2) / 2, size, shape))
    if kind == "heavy tail":
        factors = factors * (1 + size * rng.pareto(3, shape)) / (1 + size / 2)  # a Pareto(3) excess has mean 1/2
    if kind == "stalls":
        factors = factors * np.where(rng.random(shape) < 0.02, 4.0, 1.0) / 1.06
    return factors


def drift(rng: np.random.Generator, num_rounds: int) -> Floats:
    """A warming machine that also wanders: (R, 1), the same for both arms."""
    wander_R = np.cumsum(rng.normal(0, 0.02, num_rounds))
    drift_R: Floats = np.exp(np.linspace(0, 0.15, num_rounds) + wander_R)
    return drift_R[:, None]


def timed(
    rng: np.random.Generator, calls: Population, num_rounds: int, kind: Noise, size: float, *, fixed: bool
) -> stats.TimedCalls:
    """Time both arms on these calls in every round."""
    shape = (num_rounds, len(calls.baseline_s))
    drift_R1 = drift(rng, num_rounds)
    walls = [
        seconds * drift_R1 * noise(rng, "lognormal", ROUND_NOISE, (num_rounds, 1)) * noise(rng, kind, size, shape)
        for seconds in (calls.baseline_s, calls.candidate_s)
    ]
    tokens = [np.broadcast_to(column, shape) for column in (calls.baseline_tokens, calls.candidate_tokens)]
    return stats.TimedCalls(
        baseline_s=walls[0], candidate_s=walls[1], baseline_tokens=tokens[0], candidate_tokens=tokens[1],
        launches=["one"] * num_rounds, fixed=fixed,
    )  # fmt: skip


def sampled(
    quantity: Literal["time", "throughput", "length"],
    num_rounds: int,
    num_calls: int,
    kind: Noise,
    size: float,
    spread: float,
) -> SpeedWorld:
    """Prompts drawn anew for every repetition, as with ``answer``."""

    def draw(rng: np.random.Generator) -> stats.TimedCalls:
        calls = population(spread).of(rng.integers(0, POPULATION, num_calls))
        return timed(rng, calls, num_rounds, kind, size, fixed=False)

    name = f"{quantity}: sampled prompts differing by {100 * spread:g} %, {kind} of {100 * size:g} %"
    return SpeedWorld(
        name=name,
        quantity=quantity,
        num_rounds=num_rounds,
        num_calls=num_calls,
        truth=population(spread).truth(quantity),
        draw=draw,
    )


def fixed(num_rounds: int, num_calls: int, kind: Noise, size: float) -> SpeedWorld:
    """The same prompts and lengths always."""
    calls = population(0.2).of(np.arange(num_calls))

    def draw(rng: np.random.Generator) -> stats.TimedCalls:
        return timed(rng, calls, num_rounds, kind, size, fixed=True)

    name, truth = f"time: fixed prompts, {kind} of {100 * size:g} %", calls.truth("time")
    return SpeedWorld(name=name, quantity="time", num_rounds=num_rounds, num_calls=num_calls, truth=truth, draw=draw)


def null(num_rounds: int, num_calls: int, kind: Noise, size: float) -> SpeedWorld:
    """The baseline against itself: no difference, and the same prompts."""

    def draw(rng: np.random.Generator) -> stats.TimedCalls:
        calls = population(0.0).of(rng.integers(0, POPULATION, num_calls))
        same = Population(
            baseline_s=calls.baseline_s, candidate_s=calls.baseline_s,
            baseline_tokens=calls.baseline_tokens, candidate_tokens=calls.baseline_tokens,
        )  # fmt: skip
        return timed(rng, same, num_rounds, kind, size, fixed=False)

    name = f"{kind} of {100 * size:g} %"
    return SpeedWorld(name=name, quantity="time", num_rounds=num_rounds, num_calls=num_calls, truth=1.0, draw=draw)


def speed_worlds() -> tuple[SpeedWorld, ...]:
    """Few and many rounds and calls, both kinds of workload, all noises, all readings."""
    return (
        *(fixed(rounds, 8, "lognormal", 0.05) for rounds in (2, 3, 5, 12, 40)),
        *(fixed(rounds, 8, "heavy tail", 0.1) for rounds in (3, 5, 12, 40)),
        *(fixed(rounds, 16, "stalls", 0.03) for rounds in (5, 12, 40)),
        *(
            sampled("time", rounds, calls, "lognormal", 0.05, 0.2)
            for rounds, calls in ((3, 8), (5, 8), (5, 16), (12, 64))
        ),
        *(
            sampled("time", rounds, calls, "heavy tail", 0.1, 0.2)
            for rounds, calls in ((3, 16), (5, 16), (15, 16), (12, 64))
        ),
        *(sampled("time", rounds, calls, "stalls", 0.03, 0.1) for rounds, calls in ((5, 16), (15, 16), (12, 64))),
        *(sampled("time", 5, calls, "lognormal", 0.05, spread) for calls, spread in ((8, 0.3), (16, 0.5), (64, 0.5))),
        sampled("time", 5, 16, "lognormal", 0.2, 0.01),
        sampled("time", 15, 4, "lognormal", 0.05, 0.2),
        *(sampled("throughput", rounds, calls, "lognormal", 0.05, 0.2) for rounds, calls in ((5, 16), (12, 64))),
        *(sampled("length", rounds, calls, "lognormal", 0.05, 0.2) for rounds, calls in ((5, 16), (12, 64))),
    )


def fresh_speed_worlds() -> tuple[SpeedWorld, ...]:
    """Worlds that no method was chosen or tuned on: other rounds, calls, noises and spreads."""
    return (
        fixed(7, 12, "heavy tail", 0.2),
        fixed(9, 20, "lognormal", 0.1),
        fixed(24, 10, "stalls", 0.05),
        sampled("time", 8, 12, "lognormal", 0.1, 0.3),
        sampled("time", 7, 20, "heavy tail", 0.08, 0.4),
        sampled("time", 20, 32, "stalls", 0.02, 0.15),
        sampled("throughput", 6, 24, "heavy tail", 0.05, 0.25),
        sampled("length", 9, 40, "lognormal", 0.03, 0.15),
    )


def null_worlds() -> tuple[SpeedWorld, ...]:
    """A baseline against itself on machines of every kind."""
    kinds: tuple[tuple[Noise, float], ...] = (
        *(("lognormal", 0.02), ("lognormal", 0.1)),
        *(("heavy tail", 0.05), ("stalls", 0.02)),
    )
    return tuple(null(num_rounds, 16, kind, size) for kind, size in kinds for num_rounds in (5, 15))


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
    """Either arm, drawn anew for each spell, is slower for some rounds; ``share`` of quiet rounds begin one."""

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

    ``of_these``: about the mean of the drawn launches, so that the truth is theirs.
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
    """The dependence that rounds showed in measurements, at usual numbers of rounds and launches."""
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
