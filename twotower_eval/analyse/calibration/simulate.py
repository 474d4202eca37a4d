"""Repeat a world, let the project's own functions judge every repetition, and count how often they are right.

Verdicts are made at the boundary: the claim is that the quantity is at least its true value, with no margin. A claim
that is just false would be SUPPORTED as often as this one, and one that is just true REFUTED as often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.quality_worlds import QualityWorld
from twotower_eval.analyse.calibration.speed_worlds import SpeedWorld
from twotower_eval.analyse.stats.decide import half_width, off_nulls, widest_null
from twotower_eval.errors import NoEstimate
from twotower_eval.progress import Advance
from twotower_eval.records import Estimate, sha256_text

TOLERANCE = 1e-12  # of an interval's ends, that a truth of exactly 1 is not missed by rounding
PAIRS = 4  # A/A pairs that one gate looks at


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The counts of ``num`` repetitions of a world: ``num_found`` had an interval, ``num_exact`` an exact one."""

    name: str
    size: str
    num: int
    num_found: int
    num_covered: int
    num_supported: int
    num_refuted: int
    num_exact: int


@dataclass(frozen=True, kw_only=True)
class NullTally:
    """A/A gates of ``PAIRS`` pairs in a world without a difference: how many called some pair off, or too wide."""

    name: str
    size: str
    num: int
    num_off: int
    num_wide: int


Look = tuple[Estimate, str]  # at 95 %, and the verdict


def calibrate_quality(world: QualityWorld, *, num: int, num_resamples: int, seed: int, advance: Advance) -> Tally:
    """The world's quantity at 95 % and the verdict at the boundary, ``num`` times over."""

    def look(rng: np.random.Generator) -> Look:
        at = _estimator(world, rng, num_resamples)
        bounds = at(stats.DECISION_LEVEL)
        decision = stats.decide(bounds, relation="at_least", expected=world.truth, margin=0.0, num_clusters=bounds.n)
        return at(stats.LEVEL), decision.outcome

    size = f"{len(set(world.clusters)):,} clusters"
    return _tally(f"{world.quantity}: {world.name}", size, world.truth, look, num=num, seed=seed, advance=advance)


def _estimator(world: QualityWorld, rng: np.random.Generator, num_resamples: int) -> Callable[[float], Estimate]:
    """From a level to the estimate, of one repetition's scores, as claims ask for it."""
    if world.quantity == "score":
        _, scores_N = world.draw_scores(rng)
        return lambda level: stats.mean_score(scores_N.tolist(), world.clusters, level=level)
    table = world.draw(rng)
    draws = stats.draw_task_means(table, num_resamples=num_resamples, seed=int(rng.integers(2**32)))
    if world.quantity == "score difference":
        return lambda level: stats.difference(table, draws, level=level, min_discordant=stats.MIN_DISCORDANT)
    ratio = {"retention": stats.retention, "mean of ratios": stats.mean_of_ratios}[world.quantity]
    return lambda level: ratio(table, draws, level=level)


def calibrate_speed(world: SpeedWorld, *, num: int, num_resamples: int, seed: int, advance: Advance) -> Tally:
    """A speedup at 95 % and the verdict at the boundary, ``num`` times over."""

    def look(rng: np.random.Generator) -> Look:
        calls = world.draw(rng)
        at = partial(stats.speedup, calls, world.quantity, num_resamples=num_resamples, seed=int(rng.integers(2**31)))
        decision = stats.decide(
            at(level=stats.DECISION_LEVEL),
            relation="at_least",
            expected=world.truth,
            margin=0.0,
            num_rounds=world.num_launches if stats.resamples_launches(calls.launches) else world.num_rounds,
            num_calls=None if calls.fixed else world.num_calls,
        )
        return at(), decision.outcome

    return _tally(f"speedup in {world.name}", world.size, world.truth, look, num=num, seed=seed, advance=advance)


def calibrate_null(world: SpeedWorld, *, num: int, num_resamples: int, seed: int, advance: Advance) -> NullTally:
    """The A/A gate over several pairs at once, as a sweep over batch sizes has them, ``num`` times over."""
    num_off = num_wide = 0
    for repetition in range(num):
        rng = generator(seed, world.name, world.num_rounds, repetition)
        drawn_seed = int(rng.integers(2**31))

        def interval(calls: stats.TimedCalls, drawn_seed: int = drawn_seed) -> Callable[[float], Estimate]:
            at = partial(stats.speedup, calls, num_resamples=num_resamples, seed=drawn_seed, caution="estimated")
            return lambda level: at(level=level)

        intervals = [interval(world.draw(rng)) for _ in range(PAIRS)]
        num_off += any(off_nulls(intervals))
        num_wide += any(half_width(found(stats.NULL_LEVEL)) > widest_null(None) for found in intervals)
        advance()
    return NullTally(name=world.name, size=world.size, num=num, num_off=num_off, num_wide=num_wide)


def _tally(
    name: str,
    size: str,
    truth: float,
    look: Callable[[np.random.Generator], Look],
    *,
    num: int,
    seed: int,
    advance: Advance,
) -> Tally:
    counts: Counter[str] = Counter()
    for repetition in range(num):
        try:
            found, outcome = look(generator(seed, name, size, repetition))
        except NoEstimate:  # no interval where the ratio is undefined: then there is no verdict either
            advance()
            continue
        counts["found"] += 1
        counts["covered"] += found.low - TOLERANCE <= truth <= found.high + TOLERANCE
        counts["exact"] += stats.is_exact(found)
        counts[outcome] += 1
        advance()
    return Tally(
        name=name, size=size, num=num, num_found=counts["found"], num_covered=counts["covered"],
        num_supported=counts["SUPPORTED"], num_refuted=counts["REFUTED"], num_exact=counts["exact"],
    )  # fmt: skip


def generator(seed: int, *world: object) -> np.random.Generator:
    """Random numbers that depend on nothing but the seed, the world and the repetition."""
    return np.random.default_rng([seed, int(sha256_text(repr(world))[:15], 16)])
