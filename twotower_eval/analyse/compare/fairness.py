"""Was the comparison fair? Both arms busy, the A/A null near 1, quality and speed of the same setting."""

from __future__ import annotations

import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import OtherScore, QualityPoint, cells_of
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.warned import WideNull
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.records import Arm, Cell, Estimate, Fact, Finding, GateLimits, Scalar, SpeedSample
from twotower_eval.store import Run

if TYPE_CHECKING:
    from twotower_eval.analyse.compare.timing import SpeedPoint

NUM_DRAWS, LEVEL = 2000, 0.95

Seconds = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Busy:
    """Processor use of both arms, baseline first: the share of their time that the calling thread (or as much work on
    other threads) was busy, and the mean number of busy processors.

    ``least`` and ``most`` bound the ratio of the shares, candidate over baseline, over resampled calls.
    """

    share: tuple[float, float]
    processors: tuple[float, float]
    num_threads: int
    least: float
    most: float


def busy_of(runs: Sequence[Run], point: SpeedPoint) -> Busy | str:
    """How busy both arms of a point were, or why it is not known."""
    cells = (point.baseline, point.candidate)
    if any(cell.checkpoint.served is not None for cell in cells):
        return "an arm decodes behind a server, and how busy that is cannot be seen from here"
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
    """Why the arms' processor use makes a speedup invalid; empty where it does not."""
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
    """Bounds of the ratio of busy shares, candidate over baseline; each arm's calls are resampled separately."""
    rng = np.random.default_rng(0)
    drawn = []
    for spent, worked in zip(elapsed, busy, strict=True):
        picks = rng.integers(len(spent), size=(NUM_DRAWS, len(spent)))
        total = spent[picks].sum(axis=1)
        drawn.append(worked[picks].sum(axis=1) / np.where(total > 0, total, np.inf))
    ratio = drawn[1] / np.maximum(drawn[0], 1e-9)
    low, high = np.quantile(ratio, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class NullFault(Fact):
    """Why an A/A null invalidates a speedup: it is missing for a ``reason``, ``off`` by more than ``offset``, or its
    ``half_width`` is above ``widest``.

    For a judged speedup, ``widest`` is the smaller of ``most`` and ``share`` of its logarithm.
    """

    kind: Literal["missing", "off", "wide"]
    reason: str | None = None
    offset: float = 0.0
    half_width: float = 0.0
    widest: float = 0.0
    most: float | None = None
    share: float | None = None


class Nulled(Protocol):
    """A timed point with its A/A null."""

    @property
    def run_ids(self) -> tuple[str, ...]: ...
    @property
    def baseline(self) -> Cell: ...
    @property
    def null(self) -> Measured: ...
    @property
    def null_timed(self) -> stats.TimedCalls | None: ...


LIMITS = GateLimits()


def fault(
    point: Nulled,
    others: Iterable[Nulled],
    judged: Estimate | None,
    limits: GateLimits = LIMITS,
    claimed: float | None = None,
) -> NullFault | None:
    """Why the point's A/A null invalidates a speedup; ``None`` where it does not.

    A missing null does. Whether a baseline differs from itself is tested with Holm's correction over the nulls of all
    workloads and batch sizes among ``others``, each pair once. ``judged`` is the speedup and ``claimed`` its claimed
    value: a null may be no wider than a share of either's distance from 1.
    """
    null = point.null.estimate
    if null is None or point.null_timed is None:
        return NullFault(kind="missing", reason=point.null.reason)
    pairs = {
        _pair(other): other.null_timed
        for other in (*others, point)
        if other.null_timed is not None and other.null.estimate is not None
    }
    intervals = [partial(_speedup_at, timed) for timed in pairs.values()]
    off = dict(zip(pairs, stats.off_nulls(intervals, offset=limits.null_offset), strict=True))
    if off[_pair(point)]:
        return NullFault(kind="off", offset=limits.null_offset)
    half, widest = stats.half_width(null), stats.widest_null(judged, limits, claimed=claimed)
    if half > widest:
        most, share = (None, None) if judged is None else (limits.null_half_width, limits.null_share)
        return NullFault(kind="wide", half_width=half, widest=widest, most=most, share=share)
    return None


def caution(point: SpeedPoint, limits: GateLimits = LIMITS) -> Finding | None:
    """A warning where the null passes but is wide for so small a speedup, else ``None``."""
    null, found = point.null.estimate, point.time.estimate
    if null is None or found is None:
        return None
    half, widest = stats.half_width(null), stats.widest_null(found, limits)
    if half <= widest:
        return None
    wide = WideNull(half_width=half, widest=widest, share=limits.null_share)
    return Finding(kind="wide_null", severity="warning", facts=wide)


def _pair(point: Nulled) -> tuple[str, tuple[str, ...]]:
    return (point.baseline.id, point.run_ids)


def _speedup_at(timed: stats.TimedCalls, level: float) -> Estimate:
    return stats.speedup(timed, level=level, caution="estimated")


@dataclass(frozen=True, kw_only=True)
class Unlike:
    """A setting that differs between two measurements, with both values; ``arm`` is ``None`` if it is of both arms."""

    setting: str
    values: tuple[Scalar, Scalar]
    arm: Arm | None = None


@dataclass(frozen=True, kw_only=True)
class TimedTasks:
    """Timed tasks against the tasks of a quality: ``beyond`` are timed only, ``untimed`` are generated there but not
    timed.

    ``timed`` is empty where the ids of prompts name no task.
    """

    timed: tuple[str, ...]
    beyond: tuple[str, ...]
    untimed: tuple[str, ...]


def unlike_settings(one: QualityPoint | SpeedPoint, other: QualityPoint | SpeedPoint) -> tuple[Unlike, ...]:
    """The settings of either arm that differ between two points."""
    arms = ((one.baseline, other.baseline), (one.candidate, other.candidate))
    return tuple(found for pair in arms for found in _unlike_cells(*pair))


def _unlike_cells(one: Cell, other: Cell) -> Iterator[Unlike]:
    mine, others = _settings(one), _settings(other)
    for setting in {**mine, **others}:
        if mine.get(setting) != others.get(setting):
            yield Unlike(arm=one.arm, setting=setting, values=(mine.get(setting), others.get(setting)))


def _settings(cell: Cell) -> dict[str, Scalar]:
    """Every setting of a cell that affects answers. The device type counts, as other kernels round differently.

    Checkpoints and plug-ins of older runs have no file digests.
    """
    checkpoint, decoder = cell.checkpoint, cell.decoder
    found: dict[str, Scalar] = {"tensors": checkpoint.digest, "tower": checkpoint.tower, "dtype": checkpoint.dtype}
    found |= {file.name: file.sha256 for file in checkpoint.files}
    found |= {"device type": checkpoint.devices[0].split(":")[0], "decoder": decoder.kind, "version": decoder.version}
    found |= {f"code {file.name}": file.sha256 for file in decoder.code or ()}
    return {**found, **decoder.params}


def unlike_budgets(runs: Sequence[Run], quality: QualityPoint, speed: SpeedPoint) -> dict[str, tuple[int, int]]:
    """Timed tasks that were scored with another budget, with both budgets.

    A timed cell records only its largest budget. Where neither plan sets one, each task has its own, and a largest
    budget within their range is taken as equal.
    """
    by_id = {run.manifest.run_id: run for run in runs}
    scored, timed = by_id[quality.run_id], by_id[speed.run_ids[0]]
    largest = speed.candidate.workload.max_new_tokens
    budgets = {
        scored.cells[cell].workload.name: scored.cells[cell].workload.max_new_tokens
        for cell in cells_of(scored, quality)[1]
    }
    here = {task: budgets[task] for task in speed.tasks if task in budgets}
    known = {task: budget for task, budget in here.items() if budget is not None}
    if quality.timed or largest is None or not known:
        return {}
    unset = scored.manifest.plan.get("max_new_tokens") is None and timed.manifest.plan.get("new_tokens") is None
    if unset and min(known.values()) <= largest <= max(known.values()):
        return {}
    return {task: (budget, largest) for task, budget in sorted(known.items()) if budget != largest}


def tasks_against(timed: Collection[str], quality: Sequence[QualityPoint], scope: Collection[str]) -> TimedTasks:
    """Timed tasks against those in scope, which may be groups.

    One timed member of a group is enough. A task without generated answers cannot be timed.
    """
    members = {name: leaves for point in quality for name, leaves in _members(point) if name in scope}
    generated = {name for point in quality for name in _generated(point)}
    inside = {*scope, *(leaf for leaves in members.values() for leaf in leaves)}
    untimed = [name for name in scope if name in generated and not {name, *members.get(name, ())} & set(timed)]
    return TimedTasks(
        timed=tuple(timed),
        beyond=tuple(task for task in timed if task not in inside),
        untimed=tuple(untimed) if timed else (),
    )


def _members(point: QualityPoint) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from ((task.name, tuple(name for name, *_ in task.members)) for task in point.tasks)
    yield from ((one.task, one.members) for one in _other_scores(point))


def _generated(point: QualityPoint) -> Iterator[str]:
    ways = [(task.name, task.scored_by) for task in point.tasks]
    ways += [(one.task, one.scored_by) for one in _other_scores(point)]
    yield from (name for name, scored_by in ways if "generation" in scored_by)


def _other_scores(point: QualityPoint) -> list[OtherScore | WholeScore]:
    return [*point.others, *point.wholes]
