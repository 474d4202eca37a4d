"""What verdicts and reports read: the runs, and what they say of quality and speed, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from twotower_eval.analyse.compare import consistency
from twotower_eval.analyse.compare.alone import ScoredAlone, TimedAlone, compares, is_alone, scored_alone, timed_alone
from twotower_eval.analyse.compare.contradiction import Contradiction
from twotower_eval.analyse.compare.naming import checkpoint_name, code_name, long_name, short_name
from twotower_eval.analyse.compare.pareto import Panel, panels
from twotower_eval.analyse.compare.points import PointKey, QualityPoint
from twotower_eval.analyse.compare.quality import quality_points
from twotower_eval.analyse.compare.speed_gates import gated
from twotower_eval.analyse.compare.timing import SpeedPoint, speed_points
from twotower_eval.errors import UserError
from twotower_eval.records import Cell, Claim
from twotower_eval.store import Run


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What a report quotes first: what was measured at one operating point, chosen without a look at any result.

    The point is that of ``claim``, and nothing is quoted in its place where it was not measured; ``scope`` names the
    tasks that the claim's quality is over. Without a claim it is the first point of the plan with both quality and
    speed, else the first.
    """

    quality: QualityPoint | None
    speed: SpeedPoint | None
    claim: Claim | None = None
    scope: tuple[str, ...] = ()

    @property
    def key(self) -> PointKey | None:
        """The point's; ``None`` where nothing was measured at it."""
        found = self.quality or self.speed
        return None if found is None else found.key


class Runs(Sequence[Run]):
    """Loaded runs in the order of their ids, with what follows from them."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = sorted(runs, key=lambda run: run.manifest.run_id)
        ids = [run.manifest.run_id for run in self._runs]
        twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
        if twice:
            raise UserError(f"run {twice[0]} is named twice")
        if not ids:
            raise UserError("no run to report on")

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | Sequence[Run]:
        return self._runs[index]

    def __len__(self) -> int:
        return len(self._runs)

    @cached_property
    def quality(self) -> tuple[QualityPoint, ...]:
        """Quality at every operating point of every run; a run's points in the order of its plan."""
        return tuple(point for run in self._runs for point in quality_points(run))

    @cached_property
    def _speed(self) -> tuple[tuple[SpeedPoint, ...], tuple[str, ...]]:
        points, gaps = speed_points(self._runs)
        return gated(points, self._runs, self.quality, self.contradictions), (*gaps, *self._timed_alone[1])

    @cached_property
    def _timed_alone(self) -> tuple[tuple[TimedAlone, ...], tuple[str, ...]]:
        return timed_alone(self._runs)

    @property
    def speed(self) -> tuple[SpeedPoint, ...]:
        """Speed of every timed candidate cell, with its gates by the limits that claims have by default."""
        return self._speed[0]

    @property
    def speed_gaps(self) -> tuple[str, ...]:
        """Timed cells that have no complete round yet, in words."""
        return self._speed[1]

    @cached_property
    def contradictions(self) -> dict[str, tuple[Contradiction, ...]]:
        """By run id, what files of a run contradict each other in; runs whose files agree are left out."""
        return consistency.by_run(self._runs)

    @property
    def compare(self) -> bool:
        """Whether any of these runs holds a candidate against a baseline."""
        return any(compares(run) for run in self._runs)

    @cached_property
    def scored_alone(self) -> tuple[ScoredAlone, ...]:
        """What the runs of one model alone scored."""
        return tuple(one for run in self._runs if is_alone(run) for one in scored_alone(run))

    @property
    def timed_alone(self) -> tuple[TimedAlone, ...]:
        """Every timed cell of the runs of one model alone."""
        return self._timed_alone[0]

    @cached_property
    def points(self) -> dict[PointKey, Cell]:
        """Every measured operating point, with one of its candidate cells."""
        found = [(point.key, point.candidate) for point in self.quality]
        return dict(found + [(point.key, point.candidate) for point in self.speed])

    @cached_property
    def point_header(self) -> str:
        """What stands above a column of operating points."""
        named = all("block_size" in cell.decoder.params for cell in self.points.values())
        return "block, steps, threshold" if named else "operating point"

    @cached_property
    def headline(self) -> Headline:
        """What the report quotes first; these runs are held against no claim."""
        return self.first

    @cached_property
    def first(self) -> Headline:
        """The first operating point of the plan with both quality and speed, else the first."""
        keys = list(self.points)
        both = [key for key in keys if self.quality_at(key) and self.speed_at(key)]
        key = next(iter(both or keys), None)
        if key is None:
            return Headline(quality=None, speed=None)
        return Headline(quality=self.quality_at(key), speed=self.speed_at(key))

    @property
    def shown(self) -> Headline:
        """What tables and pictures begin with: the headline, where its point was measured."""
        return self.headline if self.headline.key else self.first

    @property
    def chosen(self) -> PointKey | None:
        """The operating point that tables and pictures begin with."""
        return self.shown.key

    def quality_at(self, key: PointKey) -> QualityPoint | None:
        """Quality of an operating point: of whole tasks where they were run, else of the timed outputs."""
        found = [point for point in self.quality if point.key == key]
        return min(found, key=lambda point: (point.timed, -len(point.tasks)), default=None)

    def speed_at(self, key: PointKey) -> SpeedPoint | None:
        """Speed of an operating point: on the answer workload where there is one, at the smallest batch."""
        found = [point for point in self.speed if point.key == key]
        return min(found, key=lambda point: (point.workload != "answer", point.batch_size), default=None)

    @cached_property
    def trade_offs(self) -> tuple[Panel, ...]:
        """Retention and speedup of every point that has both, by how it was timed."""
        return panels(self.speed, self.quality)

    def name(self, cell: Cell, *, short: bool = False) -> str:
        """An operating point's name; with checkpoint, dtype and a plug-in's code where the report has several."""
        checkpoints = {(key.checkpoint, key.tower) for key in self.points}
        dtypes = {key.dtype for key in self.points}
        codes = {other.decoder.code for other in self.points.values() if other.decoder.kind == cell.decoder.kind}
        whose = [checkpoint_name(cell.checkpoint)] if len(checkpoints) > 1 else []
        whose += [cell.checkpoint.dtype] if len(dtypes) > 1 else []
        text = short_name(cell.decoder) if short else long_name(cell.decoder)
        text += f", {code_name(cell.decoder)}" if len(codes) > 1 else ""
        return f"{', '.join(whose)}: {text}" if whose else text
