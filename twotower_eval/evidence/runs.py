"""What verdicts and reports read: the runs, and what they say of quality and speed, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import overload

from twotower_eval.evidence.naming import checkpoint_name, is_claimed, long_name, short_name
from twotower_eval.evidence.pareto import Panel, panels
from twotower_eval.evidence.points import PointKey, QualityPoint
from twotower_eval.evidence.quality import quality_points
from twotower_eval.evidence.timing import SpeedPoint, speed_points
from twotower_eval.records import Cell
from twotower_eval.store import Run


class Runs(Sequence[Run]):
    """Loaded runs in the order of their ids, with what follows from them."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = sorted(runs, key=lambda run: run.manifest.run_id)
        ids = [run.manifest.run_id for run in self._runs]
        twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
        if twice:
            raise ValueError(f"run {twice[0]} is named twice")
        if not ids:
            raise ValueError("no run to report on")

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
        return speed_points(self._runs)

    @property
    def speed(self) -> tuple[SpeedPoint, ...]:
        """Speed of every timed candidate cell."""
        return self._speed[0]

    @property
    def speed_gaps(self) -> tuple[str, ...]:
        """Timed cells that have no complete round yet, in words."""
        return self._speed[1]

    @cached_property
    def points(self) -> dict[PointKey, Cell]:
        """Every measured operating point, with one of its candidate cells."""
        found = [(point.key, point.candidate) for point in self.quality]
        return dict(found + [(point.key, point.candidate) for point in self.speed])

    @cached_property
    def chosen(self) -> PointKey | None:
        """The point that the headline is about, chosen without a look at any result.

        The only one; else the one that the published claim names; else the first in the plan of those with both
        quality and speed; else the first.
        """
        keys = list(self.points)
        both = [key for key in keys if self.quality_at(key) and self.speed_at(key)]
        claimed = [key for key in both or keys if is_claimed(self.points[key].decoder)]
        return next(iter(claimed or both or keys), None)

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
        """An operating point's name; with the checkpoint's where the report has several."""
        checkpoints = {key[:2] for key in self.points}
        text = short_name(cell.decoder) if short else long_name(cell.decoder)
        return text if len(checkpoints) == 1 else f"{checkpoint_name(cell.checkpoint)}: {text}"
