"""Arms timed in turns, so that drift of the machine hits all alike; medians with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from twotower_eval.measure.speed.clock import no_garbage_collection

NUM_WARMUPS = 2  # rounds whose times are thrown away: lazy initialisation, cold caches


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each arm's calls, one call per arm and round; every other round in reverse order."""
    wall_s: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-NUM_WARMUPS, rounds):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            with no_garbage_collection():
                began_s = time.perf_counter()
                arms[name]()
                took_s = time.perf_counter() - began_s
            if number >= 0:
                wall_s[name].append(took_s)
    return wall_s


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; of few values, the extremes stand for the quartiles."""
    low, high = min(values), max(values)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high}


def ratios(slower_s: Sequence[float], faster_s: Sequence[float]) -> dict[str, float]:
    """Spread of the round-by-round ratios: how many times as long the first arm took as the second."""
    return spread([slow / fast for slow, fast in zip(slower_s, faster_s, strict=True)])
