"""How busy the processor was during timed calls: neither arm may wait, or use more processors than the plan gives.

Other work on the machine slows both arms alike, so the arms are compared with each other, over all calls of all
rounds together. On a GPU the processor waits by design, so nothing is concluded there.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.records import Arm, Cell, GateLimits, SpeedSample
from twotower_eval.store import Run

NUM_DRAWS, LEVEL = 2000, 0.95

Seconds = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Busy:
    """Of both arms, baseline first: the share of their time in which the calling thread, or as much of others, was
    busy; and the processors in use at a time.

    ``least`` and ``most`` bound the ratio of the shares, candidate over baseline, under resampling of the calls.
    """

    share: tuple[float, float]
    processors: tuple[float, float]
    num_threads: int
    least: float
    most: float


def busy_of(runs: Sequence[Run], point: SpeedPoint) -> Busy | str:
    """How busy both arms of a point were, or why it is not known."""
    cells = (point.baseline, point.candidate)
    if any(not device.startswith("cpu") for cell in cells for device in cell.checkpoint.devices):
        return "on a GPU the processor waits for it, whatever an arm does"
    own = [run for run in runs if run.manifest.run_id in point.run_ids]
    threads = {run.manifest.machine.get("num_threads") for run in own}
    calls = [_calls(own, cell) for cell in cells]
    if not all(calls) or any(sample.cpu_s is None for of_arm in calls for sample in of_arm):
        return "how busy the processor was is not recorded in these runs"
    num_threads = threads.pop() if len(threads) == 1 else None
    if not isinstance(num_threads, int) or num_threads < 1:
        return "these runs do not say how many CPU threads they had"
    elapsed = tuple(np.array([s.wall_s + (s.off_clock_s or 0.0) for s in of_arm]) for of_arm in calls)
    if any(float(of_arm.sum()) <= 0 for of_arm in elapsed):
        return "no time went by in these calls"
    taken = tuple(np.array([s.cpu_s or 0.0 for s in of_arm]) for of_arm in calls)
    callers = tuple(np.array([s.caller_cpu_s or 0.0 for s in of_arm]) for of_arm in calls)
    busy = tuple(
        np.minimum(spent, np.maximum(caller, cpu / num_threads))
        for spent, caller, cpu in zip(elapsed, callers, taken, strict=True)
    )
    least, most = _ratio_bounds(elapsed, busy)
    shares = [float(b.sum() / e.sum()) for b, e in zip(busy, elapsed, strict=True)]
    processors = [float(cpu.sum() / e.sum()) for cpu, e in zip(taken, elapsed, strict=True)]
    return Busy(
        share=(shares[0], shares[1]),
        processors=(processors[0], processors[1]),
        num_threads=num_threads,
        least=least,
        most=most,
    )


@dataclass(frozen=True, kw_only=True)
class BusyFault:
    """An arm that waits, or that keeps more processors busy than its threads may."""

    kind: Literal["waits", "many processors"]
    arm: Arm


def busy_faults(found: Busy, limits: GateLimits) -> tuple[BusyFault, ...]:
    """What of it makes a speedup invalid."""
    faults = [
        BusyFault(kind="many processors", arm=arm)
        for arm, processors in zip(typing.get_args(Arm), found.processors, strict=True)
        if processors > limits.processors_per_thread * found.num_threads
    ]
    if found.most < limits.busy_share:
        faults.append(BusyFault(kind="waits", arm="candidate"))
    if found.least > 1 / limits.busy_share:
        faults.append(BusyFault(kind="waits", arm="baseline"))
    return tuple(faults)


def _calls(runs: Sequence[Run], cell: Cell) -> list[SpeedSample]:
    return [s for run in runs for s in run.speed_of({cell.id}) if s.replica == 0 and s.phase == "measure"]


def _ratio_bounds(elapsed: tuple[Seconds, ...], busy: tuple[Seconds, ...]) -> tuple[float, float]:
    """Bounds of the ratio of the arms' shares, candidate over baseline: each arm's calls are drawn by themselves."""
    rng = np.random.default_rng(0)
    drawn = []
    for spent, worked in zip(elapsed, busy, strict=True):
        picks = rng.integers(len(spent), size=(NUM_DRAWS, len(spent)))
        total = spent[picks].sum(axis=1)
        drawn.append(worked[picks].sum(axis=1) / np.where(total > 0, total, np.inf))
    ratio = drawn[1] / np.maximum(drawn[0], 1e-9)
    low, high = np.quantile(ratio, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
