"""The candidate compared with its baseline, operating point by operating point: the numbers that a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from twotower_eval import store
from twotower_eval.analyse.claims import ruling
from twotower_eval.analyse.compare import Measured, QualityPoint, Runs, SpeedPoint
from twotower_eval.analyse.compare.figures import PERCENT, TIMES, Unit, interval
from twotower_eval.analyse.compare.points import checkpoint_name
from twotower_eval.analyse.compare.several import baseline_name, least_speedup, strongest
from twotower_eval.analyse.words import gate_text, kind_text
from twotower_eval.records import Cell, Estimate, Gate
from twotower_eval.rules import load_text

if TYPE_CHECKING:
    import pandas as pd

    from twotower_eval.api.summary import Table

NOT_SCORED = "not scored in both arms at this point: tt.evaluate, or `twotower-eval run`"
NOT_TIMED = "not timed in both arms at this point: tt.time, or `twotower-eval speed`"
NOTHING = "nothing was measured in both arms"
QUANTITIES = {  # shown and tabled in this order
    "retention": PERCENT,
    "exercised_retention": PERCENT,
    "speedup": TIMES,
    "throughput_speedup": TIMES,
}


@dataclass(frozen=True, kw_only=True)
class ComparedPoint:
    """One operating point of the candidate, timed in one way, against the baseline on the same documents.

    ``retention`` is the candidate's mean score over the baseline's, each task weighing the same;
    ``exercised_retention`` is the same over the decoder-exercised tasks. ``speedup`` is the baseline's wall-clock time
    over the candidate's, ``throughput_speedup`` the ratio of useful tokens per second. Each is an Estimate with its 95
    % interval, or ``None`` with a reason in ``reasons``. ``invalid``: a gate of the timing failed, so the speedup must
    not be quoted. ``apart`` are the gates that forbid quoting quality and speed together; empty if none does.
    ``quality`` and ``speed`` hold everything that was computed.
    """

    name: str
    candidate: Cell
    baseline: Cell
    retention: Estimate | None
    exercised_retention: Estimate | None
    speedup: Estimate | None
    throughput_speedup: Estimate | None
    reasons: dict[str, str]
    apart: tuple[Gate, ...]
    quality: QualityPoint | None
    speed: SpeedPoint | None

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates of the timing: what must hold before it counts as a speedup."""
        return self.speed.gates if self.speed else ()

    @property
    def invalid(self) -> bool:
        """Whether any gate of the timing failed."""
        return self.speed is not None and self.speed.invalid

    def text(self, quantity: str) -> str:
        """``98.9 % [98.2, 99.6]``, or the reason why there is no number."""
        estimate: Estimate | None = getattr(self, quantity)
        unit: Unit = QUANTITIES[quantity]
        return self.reasons[quantity] if estimate is None else interval(unit, estimate)


class Comparison:
    """All operating points of some runs, compared. Each number is computed when it is first read."""

    def __init__(self, runs: Sequence[store.Run]) -> None:
        self.runs = Runs(runs)

    @cached_property
    def points(self) -> tuple[ComparedPoint, ...]:
        """All points in the order of the plan; a point timed in several ways (batch sizes, workloads) is there once for
        each, and once for each of several baselines."""
        found = []
        for key in self.runs.points:
            quality = self.runs.quality_at(key)
            timed: list[SpeedPoint | None] = [point for point in self.runs.speed if point.key == key]
            for speed in timed or [None]:
                each = self.runs.each_baseline(key, speed)
                found += [_compared(self.runs.against(one.name), one.quality, one.speed) for one in each]
                found += [] if each else [_compared(self.runs, quality, speed)]
        return tuple(found)

    @cached_property
    def strongest(self) -> ComparedPoint | None:
        """The first point against the strongest of several baselines, that with the most useful tokens per second;
        ``None`` where fewer than two were timed."""
        first = self.runs.first
        best = strongest(self.runs.each_baseline(first.key, first.speed)) if first.key else None
        return None if best is None else next(one for one in self.points if one.speed is best.speed)

    @property
    def speedup_over_strongest(self) -> Estimate | None:
        """The speedup over the strongest of several baselines at the first point, whichever that is: the least over all
        of them, with an interval that holds for the choice; ``None`` where fewer than two were timed."""
        first = self.runs.first
        each = self.runs.each_baseline(first.key, first.speed) if first.key else ()
        return None if strongest(each) is None else least_speedup(each).estimate

    @cached_property
    def first(self) -> ComparedPoint | None:
        """The plan's first point with both retention and speedup, else its first point; ``None`` if nothing was
        measured in both arms. The choice does not depend on any result."""
        first = self.runs.first
        if first.key is None:
            return None
        return next(one for one in self.points if one.quality is first.quality and one.speed is first.speed)

    @property
    def retention(self) -> Estimate | None:
        """The value at the first point; ``points`` has the others. ``None`` if there is none: ``reasons`` says why."""
        return self.first.retention if self.first else None

    @property
    def speedup(self) -> Estimate | None:
        """The value at the first point; ``points`` has the others."""
        return self.first.speedup if self.first else None

    @property
    def reasons(self) -> dict[str, str]:
        """Why the first point lacks a figure, by the figure's name; empty if it lacks none."""
        return self.first.reasons if self.first else dict.fromkeys(QUANTITIES, NOTHING)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The same in a few small tables of text, as the command line shows them; models measured alone included."""
        from twotower_eval.api import summary

        return summary.tables(self.runs)

    def to_frame(self) -> pd.DataFrame:
        """A row for each point: the operating point, each estimate with its ends, and the gates that failed."""
        from twotower_eval.api import frames

        names = dict.fromkeys(name for point in self.points for name in point.candidate.decoder.params)
        rows = [(_of_point(point), _of_figures(point)) for point in self.points]
        columns = frames.parameter_columns(names, [name for one in rows[:1] for part in one for name in part])
        return frames.table_of(
            [
                own | {column: point.candidate.decoder.params.get(name) for name, column in columns.items()} | figures
                for point, (own, figures) in zip(self.points, rows, strict=True)
            ]
        )

    def __repr__(self) -> str:
        lines = [f"{_name(point)}: retention {point.text('retention')}; {_speed_text(point)}" for point in self.points]
        return "\n".join(lines or [NOTHING])

    def _repr_html_(self) -> str:
        import pandas as pd

        rows = [
            {
                "operating point": _name(point),
                "retention": point.text("retention"),
                "of which the decoder answers": point.text("exercised_retention"),
                "speedup": _speed_text(point),
                "not of one thing": "; ".join(map(gate_text, point.apart)),
            }
            for point in self.points
        ]
        note = "Brackets hold 95 % intervals. A point picked by its result needs a new run before it is quoted."
        if not rows:
            return "<p>Nothing was measured in both arms.</p>"
        shown = pd.DataFrame(rows)
        shown = shown if shown["not of one thing"].any() else shown.drop(columns="not of one thing")
        return f"{shown.to_html(index=False, border=0)}<p>{note}</p>"


def _compared(runs: Runs, quality: QualityPoint | None, speed: SpeedPoint | None) -> ComparedPoint:
    point = quality or speed
    assert point is not None, "a point is one where something was measured"
    unscored, untimed = Measured(estimate=None, reason=NOT_SCORED), Measured(estimate=None, reason=NOT_TIMED)
    found = {
        "retention": quality.headline if quality else unscored,
        "exercised_retention": quality.exercised if quality else unscored,
        "speedup": speed.time if speed else untimed,
        "throughput_speedup": speed.throughput if speed else untimed,
    }
    return ComparedPoint(
        name=runs.name(point.candidate),
        candidate=point.candidate,
        baseline=point.baseline,
        retention=found["retention"].estimate,
        exercised_retention=found["exercised_retention"].estimate,
        speedup=found["speedup"].estimate,
        throughput_speedup=found["throughput_speedup"].estimate,
        reasons={name: one.reason or "" for name, one in found.items() if one.estimate is None},
        apart=tuple(ruling.apart(runs, quality, speed)) if quality and speed else (),
        quality=quality,
        speed=speed,
    )


def _name(point: ComparedPoint) -> str:
    """A point's name, with that of the baseline where there are several."""
    return point.name if point.baseline.baseline is None else f"{point.name} against {point.baseline.baseline}"


def _speed_text(point: ComparedPoint) -> str:
    if point.speed is None:
        return point.text("speedup")
    timed = f"{point.speed.workload} workload, {load_text(point.speed.candidate.workload)}"
    return f"{point.text('speedup')} ({timed}{', INVALID: a gate failed' if point.invalid else ''})"


def _of_point(point: ComparedPoint) -> dict[str, object]:
    return {
        "point": point.name,
        "model": checkpoint_name(point.candidate.checkpoint),
        "baseline": baseline_name(point.baseline),
        "dtype": point.candidate.checkpoint.dtype,
        "decoder": point.candidate.decoder.kind,
    }


def _of_figures(point: ComparedPoint) -> dict[str, object]:
    quality, speed = point.quality, point.speed
    row: dict[str, object] = {
        "outputs": None if quality is None else "timed" if quality.timed else "whole tasks",
        "num_tasks": None if quality is None else len(quality.tasks),
        "num_documents": None if quality is None else sum(task.num_documents for task in quality.tasks),
        "workload": None if speed is None else speed.workload,
        "batch_size": None if speed is None else speed.batch_size,
        "num_rounds": None if speed is None else speed.num_rounds,
        "num_launches": None if speed is None else speed.num_launches,
    }
    for name in QUANTITIES:
        estimate: Estimate | None = getattr(point, name)
        ends = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        row[f"{name}_reason"] = point.reasons.get(name)
    return row | {
        "invalid": point.invalid,
        "failed_gates": ", ".join(kind_text(gate.kind) for gate in point.gates if gate.outcome == "failed"),
        "apart": "; ".join(map(gate_text, point.apart)),
        "quality_run": None if quality is None else quality.run_id,
        "speed_runs": None if speed is None else " ".join(speed.run_ids),
    }
