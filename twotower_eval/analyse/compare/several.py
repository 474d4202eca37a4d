"""Several baselines of one run: the run as it is against each of them, and which of them is the strongest.

Everything else here compares a candidate with one baseline. A run with several is given to it once for each, with the
cells and rows of the candidates and of that baseline alone; so every figure and every gate is of that pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.figures import Measured, measured, once
from twotower_eval.analyse.compare.points import PointKey, QualityPoint, checkpoint_name, point_key
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.records import Cell
from twotower_eval.store import Run

WHOLE = "the whole run"  # key of a view's run
PLAIN = "autoregressive"  # the decoder of a baseline that is taken where none is named


def baselines_of(run: Run) -> tuple[str, ...]:
    """The names of a run's baselines in the order of its plan; none where it has one without a name."""
    return tuple(dict.fromkeys(cell.baseline for cell in run.manifest.cells if cell.baseline is not None))


def default_baseline(run: Run) -> str | None:
    """The baseline that is taken where none is named: the first that decodes plainly, one token at a time, else the
    first. ``None`` for a run whose one baseline has no name.

    The choice depends on no result.
    """
    names = baselines_of(run)
    plain = [cell.baseline for cell in run.manifest.cells if cell.baseline in names and cell.decoder.kind == PLAIN]
    return next(iter([*plain, *names]), None)


def against(run: Run, name: str | None) -> Run:
    """The run with the candidates and that baseline alone; the run itself where it has no baselines with names."""
    if name is None or len(baselines_of(run)) < 2:
        return run
    return once([run], ("against", name), lambda: _against(run, name))


def whole(run: Run) -> Run:
    """The run that a view of :func:`against` is of; any other run itself."""
    found: Run = run.found.get(WHOLE, run)
    return found


def _against(run: Run, name: str) -> Run:
    cells = tuple(cell for cell in run.manifest.cells if cell.arm == "candidate" or cell.baseline == name)
    others = {cell.id for cell in run.manifest.cells} - {cell.id for cell in cells}
    made = dataclasses.replace(
        run,
        manifest=dataclasses.replace(run.manifest, cells=cells),
        generations=[row for row in run.generations if row.cell not in others],
        scores=[row for row in run.scores if row.cell not in others],
        speed=[row for row in run.speed if row.cell not in others],
        costs=[row for row in run.costs if row.cell not in others],
        checks=[row for row in run.checks if row.cell not in others],
        aggregates=[row for row in run.aggregates if row.cell not in others],
        witnessed=[row for row in run.witnessed if row.cell not in others],
        events=[event for event in run.events if event.get("cell") not in others],
    )  # log-likelihoods stay: those of another baseline may score these cells
    made.found[WHOLE] = run
    return made


def keys_of(run: Run, name: str | None = None) -> frozenset[PointKey]:
    """What a run's baselines are, or one of them: weights, dtype and decoder."""
    cells = (cell for cell in run.manifest.cells if cell.arm == "baseline" and name in (None, cell.baseline))
    return frozenset(map(point_key, cells))


def views(runs: Sequence[Run], name: str | None) -> tuple[Run, ...]:
    """Runs as they are against one baseline.

    Of runs with several it is the one of that name, and of those without it none. Of the other runs it is the same
    baseline, or there is none at all. With ``None``, every run against its own :func:`default_baseline`.
    """
    if name is None:
        return tuple(against(run, default_baseline(run)) for run in runs)
    keys = frozenset[PointKey]().union(*(keys_of(run, name) for run in runs if name in baselines_of(run)))
    return tuple(
        against(run, name) for run in runs if (name in baselines_of(run) if baselines_of(run) else keys_of(run) <= keys)
    )


def baseline_name(cell: Cell) -> str:
    """A baseline's name among several, else that of its checkpoint."""
    return cell.baseline or checkpoint_name(cell.checkpoint)


@dataclass(frozen=True, kw_only=True)
class AgainstOne:
    """One operating point, timed in one way, against one of several baselines; ``None`` for what was not measured."""

    name: str
    quality: QualityPoint | None
    speed: SpeedPoint | None

    @property
    def cell(self) -> Cell:
        """The baseline's."""
        return self._point.baseline

    @property
    def candidate(self) -> Cell:
        """The candidate's."""
        return self._point.candidate

    @property
    def _point(self) -> QualityPoint | SpeedPoint:
        point = self.quality or self.speed
        assert point is not None, "what was measured in no way is no row"
        return point

    @property
    def at_a_rate(self) -> bool:
        """Whether it was timed at a given rate of requests, at which every baseline gives equally many tokens."""
        return self.speed is not None and self.speed.candidate.workload.request_rate is not None

    @property
    def tokens_per_s(self) -> float | None:
        """Useful tokens per second of the baseline."""
        rate = None if self.speed is None else self.speed.baseline_rate.estimate
        return None if rate is None else rate.value


def strongest(found: Iterable[AgainstOne]) -> AgainstOne | None:
    """The baseline with the most useful tokens per second, as measured, and at a given rate of requests the one with
    the least speedup over it; ``None`` where fewer than two were timed.
    """
    timed = [one for one in found if one.tokens_per_s is not None]
    times = [(one.speed.time.estimate.value, one) for one in timed if one.speed and one.speed.time.estimate]
    if len(times) > 1 and all(one.at_a_rate for _, one in times):
        return min(times, key=lambda pair: pair[0])[1]
    return max(timed, key=lambda one: one.tokens_per_s or 0.0) if len(timed) > 1 else None


def least_speedup(found: Iterable[AgainstOne]) -> Measured:
    """The least of the speedups in time over all baselines that were timed, which is that against the strongest.

    Its lower end is the least of the lower ends, which needs no correction: it lies above the true least no more often
    than the lower end of the strongest baseline's own speedup does. Its upper end is the least of upper ends at levels
    that hold for all baselines at once (Bonferroni).
    """
    timed = [one.speed.timed for one in found if one.speed is not None and one.speed.time.estimate is not None]
    if not timed:
        return Measured(estimate=None, reason="no baseline was timed")
    return measured(lambda: stats.least_speedup(timed))
