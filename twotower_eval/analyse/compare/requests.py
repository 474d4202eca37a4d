"""Requests to servers: how long they took, how many failed, and what the server managed while it was loaded.

The steady time of a stream is that in which it is loaded as planned. In a closed loop it lasts from the start until the
last request is sent, after which places stay empty. At a rate it lasts from the first answer, before which none can
come, until the last request is due.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, log
from statistics import fmean

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.calls import Grid, Round, grid_of
from twotower_eval.analyse.compare.figures import Measured, measured, once
from twotower_eval.analyse.compare.warned import CachedPrompts, LateRequests
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Cell, Estimate, Finding, SpeedSample
from twotower_eval.rules import fault_of
from twotower_eval.store import Run

BEYOND = 5  # answers above a percentile that are enough to name it
GROWTH_LEVEL = 0.98  # of a two-sided interval, whose lower end then holds at 99 %
STEADY_GROWTH, MOST_GROWTH = 1.1, 1.5
UNLIKE_CACHES = 0.05  # share of prompt tokens by which two arms' caches may differ
LATE_SHARE, LATE_S = 0.1, 0.01
Stream = list[SpeedSample]


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What became of one arm's requests in the measured rounds; ``num_failed`` of ``num`` got no whole answer.

    Seconds of answered ones, from when they were due: ``p90_s`` and ``p99_s`` only where at least five lie above.
    ``late_s`` is the 99th percentile of how late they were sent, ``None`` outside streams. ``answers`` and ``tokens``
    are useful ones per second of the steady time. ``growth`` is the latency of the last third of a stream's requests
    over that of its first third, over all streams: at a rate that the server keeps up with it does not grow.
    ``cached_share`` are prompt tokens from the server's cache over all, ``None`` where it does not say.
    """

    cell: Cell
    num: int
    num_failed: int
    median_s: float | None
    p90_s: float | None
    p99_s: float | None
    late_s: float | None
    answers: Measured
    tokens: Measured
    growth: Measured
    cached_share: float | None

    @property
    def is_stream(self) -> bool:
        """Whether they were sent as streams, in which rates are those of the steady time."""
        return self.cell.workload.requests is not None

    @property
    def keeps_up(self) -> bool | None:
        """Whether latencies at a rate do not grow without end; ``None`` where that cannot be told."""
        found = self.growth.estimate
        if found is None:
            return None
        return not (found.low > STEADY_GROWTH or found.value > MOST_GROWTH)


def requests_of(runs: list[Run], cell: Cell) -> Requests | None:
    """The requests of a cell whose model is behind a server; ``None`` for others."""
    if cell.checkpoint.served is None:
        return None
    return once(runs, ("requests", cell.id), partial(_requests, runs, cell))


def _requests(runs: list[Run], cell: Cell) -> Requests:
    grid = grid_of(runs, cell, 0)
    prompts = [(sample, prompt) for sample in grid.values() for prompt in sample.prompts]
    failed = [prompt for _, prompt in prompts if prompt.served is not None and prompt.served.failure is not None]
    seconds = sorted(prompt.finish_s for sample, prompt in prompts if fault_of(sample) is None)
    late_s = [sample.late_s for sample in grid.values() if sample.late_s is not None]
    served = [prompt.served for _, prompt in prompts if prompt.served is not None]
    told = [(one.num_cached_tokens, one.num_prompt_tokens or 0) for one in served if one.num_cached_tokens is not None]
    streams = _streams(grid) if cell.workload.requests is not None else {}
    is_open = cell.workload.request_rate is not None
    steady = steady_times(streams, is_open)
    return Requests(
        cell=cell,
        num=len(prompts),
        num_failed=len(failed),
        median_s=_quantile(seconds, 0.5),
        p90_s=_quantile(seconds, 0.9),
        p99_s=_quantile(seconds, 0.99),
        late_s=float(np.quantile(late_s, 0.99)) if late_s and is_open else None,
        answers=_rate(steady, "answers"),
        tokens=_rate(steady, "tokens"),
        growth=_growth(streams) if is_open else Measured(estimate=None, reason="not sent at a rate"),
        cached_share=sum(num for num, _ in told) / total if (total := sum(num for _, num in told)) else None,
    )


def _quantile(seconds: Sequence[float], share: float) -> float | None:
    """A quantile; ``None`` above the median where too few values lie beyond it."""
    enough = 1 if share <= 0.5 else BEYOND / (1 - share)
    return float(np.quantile(seconds, share)) if len(seconds) >= enough - 1e-9 else None


def _streams(grid: Grid) -> dict[Round, Stream]:
    """The requests of every round, in the order in which they were due."""
    found: dict[Round, Stream] = defaultdict(list)
    for (round_, _), sample in grid.items():
        found[round_].append(sample)
    return {round_: sorted(own, key=lambda one: one.due_s or 0.0) for round_, own in found.items()}


@dataclass(frozen=True, kw_only=True)
class Steady:
    """The steady time of one stream: its seconds, and the answers and useful tokens that came in it."""

    launch: str
    seconds: float
    answers: float
    tokens: float


def steady_times(streams: dict[Round, Stream], is_open: bool) -> list[Steady]:
    """The steady time of every stream that has one."""
    found = []
    for (launch, _), stream in streams.items():
        ended = [((one.due_s or 0.0) + one.wall_s, one) for one in stream if fault_of(one) is None]
        start_s = min((end_s for end_s, _ in ended), default=0.0) if is_open else 0.0
        last_s = max(one.due_s or 0.0 for one in stream)
        within = [one for end_s, one in ended if start_s < end_s <= last_s]
        if within and last_s > start_s:
            tokens = sum(prompt.num_useful for one in within for prompt in one.prompts)
            found.append(Steady(launch=launch, seconds=last_s - start_s, answers=len(within), tokens=tokens))
    return found


def _rate(steady: Sequence[Steady], what: str) -> Measured:
    """Answers or useful tokens per second, over all steady times."""

    def found() -> Estimate:
        if not steady:
            raise NoEstimate("no stream is long enough to have a steady time: take more prompts")
        seconds_RP, values_RP = (
            np.array([[getattr(one, name)] for one in steady], float) for name in ("seconds", what)
        )
        timed = stats.TimedCalls(
            baseline_s=seconds_RP,
            candidate_s=seconds_RP,
            baseline_tokens=values_RP,
            candidate_tokens=values_RP,
            launches=[one.launch for one in steady],
            fixed=True,
        )
        return stats.speedup(timed, "baseline_rate")

    return measured(found)


def _growth(streams: dict[Round, Stream]) -> Measured:
    """Latency in the last third of a stream over that in its first third; prompts are in another order in each."""

    def of(stream: Stream) -> float | None:
        walls_s = [one.wall_s for one in stream if fault_of(one) is None and one.wall_s > 0]
        third = len(walls_s) // 3
        return log(fmean(walls_s[-third:]) / fmean(walls_s[:third])) if third else None

    logs = [one for one in map(of, streams.values()) if one is not None]
    return measured(lambda: stats.geometric_mean([exp(one) for one in logs], level=GROWTH_LEVEL))


def request_warnings(baseline: Requests | None, candidate: Requests | None) -> list[Finding]:
    """Caches that helped one arm more than the other, and requests that left here too late."""
    found = []
    shares = [None if one is None else one.cached_share for one in (baseline, candidate)]
    if abs((shares[0] or 0.0) - (shares[1] or 0.0)) > UNLIKE_CACHES:
        facts = CachedPrompts(baseline=shares[0], candidate=shares[1])
        found.append(Finding(kind="cached_prompts", severity="warning", facts=facts))
    for one in (baseline, candidate):
        if one is not None and one.late_s is not None and one.late_s > max(LATE_S, LATE_SHARE * (one.median_s or 0.0)):
            late = LateRequests(arm=one.cell.arm, late_s=one.late_s, median_s=one.median_s)
            found.append(Finding(kind="late_requests", severity="warning", facts=late))
    return found
