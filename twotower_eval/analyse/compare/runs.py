"""What verdicts and reports read: the runs, with quality and speed at every operating point, computed once. Also runs
of one model without a baseline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare import consistency, several
from twotower_eval.analyse.compare.calls import (
    Latency,
    WithinCalls,
    answers_per_s,
    grid_of,
    lane_of,
    names_of,
    nothing_usable,
    null_calls,
    null_of,
    pools,
    timed_calls,
    usable,
)
from twotower_eval.analyse.compare.clean import Flags, outputs
from twotower_eval.analyse.compare.contradiction import Contradiction
from twotower_eval.analyse.compare.costs import ArmCosts, arm_costs
from twotower_eval.analyse.compare.fairness import NullFault, fault
from twotower_eval.analyse.compare.figures import Counts, Measured, count, measured
from twotower_eval.analyse.compare.gates import gated
from twotower_eval.analyse.compare.points import (
    PointKey,
    QualityPoint,
    checkpoint_name,
    code_name,
    long_name,
    short_name,
)
from twotower_eval.analyse.compare.quality import quality_points
from twotower_eval.analyse.compare.requests import Requests, requests_of
from twotower_eval.analyse.compare.several import AgainstOne
from twotower_eval.analyse.compare.sizing import is_sizing_run
from twotower_eval.analyse.compare.timing import SpeedPoint, speed_points
from twotower_eval.analyse.compare.tradeoff import Panel, panels
from twotower_eval.analyse.compare.wholes import current_scores, is_whole, one_group, one_whole
from twotower_eval.errors import UserError
from twotower_eval.records import MEAN, Cell, Claim, Score, TimeFault
from twotower_eval.store import Run


@dataclass(frozen=True, kw_only=True)
class TimedAlone:
    """Speed of a cell without a baseline; ``null`` is the cell against itself, as in SpeedPoint.

    ``rate`` is in useful tokens per second, ``answers`` in answers, ``call_s`` the mean seconds of a call. ``faults``
    are those of ``num_timed`` calls with impossible times.
    """

    run_ids: tuple[str, ...]
    complete: bool
    baseline: Cell
    num_rounds: int
    num_calls: int
    num_launches: int
    num_dropped_rounds: int
    rate: Measured
    answers: Measured
    call_s: float
    null: Measured
    null_timed: stats.TimedCalls | None
    counts: Counts
    latency: Latency
    within: WithinCalls
    costs: ArmCosts
    flagged: FlaggedAlone
    null_fault: NullFault | None = None
    num_timed: int = 0
    faults: tuple[TimeFault, ...] = ()
    requests: Requests | None = None


@dataclass(frozen=True, kw_only=True)
class FlaggedAlone:
    """Number of a cell's outputs, and of degenerate ones; 0 outputs where no text was kept."""

    num_outputs: int
    num_degenerate: int


@dataclass(frozen=True, kw_only=True)
class ScoredAlone:
    """Outputs of a run of one model without a baseline, over all its tasks; ``num_documents`` were scored."""

    run_id: str
    cell: Cell
    tasks: tuple[str, ...]
    num_documents: int
    counts: Counts
    flagged: FlaggedAlone


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """A group's score in one arm, as lm-eval computes it: the mean of its ``members``, weighted by documents or
    equally.

    ``cell`` is that of the first member; ``num_documents`` have a value, ``num_without`` have none.
    """

    cell: Cell
    group: str
    members: tuple[str, ...]
    by_size: bool
    metric: str
    filter: str
    aggregation: str
    scored_by: tuple[str, ...]
    headline: bool
    num_documents: int
    num_without: int
    value: stats.Figure
    interval: Measured


def compares(run: Run) -> bool:
    """Whether the run compares a candidate with a baseline; ``verify`` and ``size`` runs do not."""
    kinds = {cell.workload.kind for cell in run.manifest.cells if cell.arm == "candidate"}
    return bool(kinds - {"checks", "costs"})


def is_alone(run: Run) -> bool:
    """Whether the run measures one model without a baseline."""
    return run.manifest.verb in ("run", "speed") and not is_sizing_run(run) and not compares(run)


def scored_alone(run: Run) -> tuple[ScoredAlone, ...]:
    """By decoder and way of timing, what a run of one model scored; empty before anything was scored."""
    tasks: dict[str, list[str]] = defaultdict(list)
    documents: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for score in run.scores:
        if score.task not in tasks[score.cell]:
            tasks[score.cell].append(score.task)
        documents[score.cell].add((score.task, score.doc_id))
    groups: dict[tuple[str, str, int | None], list[Cell]] = defaultdict(list)
    for cell in run.manifest.cells:
        if cell.id in documents:
            groups[cell.decoder.label, cell.workload.kind, cell.workload.batch_size].append(cell)
    return tuple(
        ScoredAlone(
            run_id=run.manifest.run_id,
            cell=cells[0],
            tasks=tuple(task for cell in cells for task in tasks[cell.id]),
            num_documents=sum(len(documents[cell.id]) for cell in cells),
            counts=count(row.generation for row in run.generations if row.cell in {cell.id for cell in cells}),
            flagged=_flagged(outputs(run.manifest.run_id, run.generations, {cell.id for cell in cells}).values()),
        )
        for cells in groups.values()
    )


def score_of(scores: Sequence[Score], run: Run) -> tuple[stats.Figure, Measured]:
    """One arm's score from its rows of one task, metric and filter: their mean, or lm-eval's own aggregate."""
    if is_whole(scores[0]):
        return one_whole(scores, run)
    known = [(score.value, score.cluster_id) for score in scores if score.value is not None]
    found = measured(lambda: stats.mean_score([value for value, _ in known], [cluster for _, cluster in known]))
    mean = sum(value for value, _ in known) / len(known) if known else None
    return stats.Figure(value=mean, reason=None if known else "no document has a value"), found


def group_scores(run: Run) -> tuple[GroupScore, ...]:
    """Every group's score in every arm; empty for an incomplete run, where rows of a member may be missing."""
    found: dict[tuple[object, ...], dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for score in current_scores(run) if run.complete else ():
        if score.group is not None:
            cell = run.cells[score.cell]
            where = (cell.arm, cell.checkpoint, cell.decoder.label, cell.workload.kind, cell.workload.batch_size)
            found[*where, score.group, score.metric, score.filter][score.task].append(score)
    return tuple(_group_score(run, members) for members in found.values())


def _group_score(run: Run, members: dict[str, list[Score]]) -> GroupScore:
    rows = [score for scores in members.values() for score in scores]
    first = rows[0]
    wholes = [str(score.aggregation) for score in rows if is_whole(score)]
    num_without = sum(score.value is None and not is_whole(score) for score in rows)
    value, interval = one_group(list(members.values()), run) if wholes else _group_mean(members)
    return GroupScore(
        cell=run.cells[first.cell],
        group=str(first.group),
        members=tuple(members),
        by_size=first.by_size,
        metric=first.metric,
        filter=first.filter,
        aggregation=wholes[0] if wholes else MEAN,
        scored_by=tuple(sorted({score.scored_by for score in rows})),
        headline=first.headline,
        num_documents=len(rows) - num_without,
        num_without=num_without,
        value=value,
        interval=interval,
    )


def _group_mean(members: dict[str, list[Score]]) -> tuple[stats.Figure, Measured]:
    """Group mean of per-document scores; documents without a value are left out, as in the task's own mean."""
    known = [score for scores in members.values() for score in scores if score.value is not None]
    sums = {task: [s.value for s in scores if s.value is not None] for task, scores in members.items()}
    without = [task for task, own in sums.items() if not own]
    if without:
        reason = f"no document of {without[0]} has a value"
        return stats.Figure(value=None, reason=reason), Measured(estimate=None, reason=reason)
    by_size = known[0].by_size
    weights = [len(own) if by_size else 1 for own in sums.values()]
    mean = sum(w * sum(own) / len(own) for w, own in zip(weights, sums.values(), strict=True)) / sum(weights)
    values = [value for own in sums.values() for value in own]
    tasks = [task for task, own in sums.items() for _ in own]
    clusters = [score.cluster_id for score in known]
    return stats.Figure(value=mean), measured(lambda: stats.mean_of_members(values, tasks, clusters, by_size=by_size))


def timed_alone(runs: Sequence[Run]) -> tuple[tuple[TimedAlone, ...], tuple[str, ...]]:
    """Every timed cell of runs without a baseline; and, in words, the cells without a complete round."""
    found = [_timed(pool, cell) for pool, cell in pools([run for run in runs if is_alone(run)], "baseline")]
    timed = [one for one in found if isinstance(one, TimedAlone)]
    gated = [one if one.null.estimate is None else replace(one, null_fault=fault(one, timed, None)) for one in timed]
    return tuple(gated), tuple(one for one in found if isinstance(one, str))


def _timed(runs: list[Run], cell: Cell) -> TimedAlone | str:
    grid = grid_of(runs, cell, 0)
    there = usable(grid)
    rounds, calls = there.rounds, there.calls
    if not rounds:
        return f"{names_of(runs)}: cell {cell.id} ({cell.decoder.label}) has {nothing_usable(there)}"
    lane = lane_of(runs, cell, 0, there)
    timed = timed_calls(lane, lane)
    sent = requests_of(runs, cell)
    is_stream = sent is not None and sent.is_stream
    return TimedAlone(
        run_ids=tuple(run.manifest.run_id for run in runs),
        complete=all(run.complete for run in runs),
        baseline=cell,
        num_rounds=len(rounds),
        num_calls=len(calls),
        num_launches=len(set(timed.launches)),
        num_dropped_rounds=there.num_incomplete,
        num_timed=there.num_timed,
        faults=there.faults,
        rate=sent.tokens if sent and is_stream else measured(lambda: stats.speedup(timed, "baseline_rate")),
        answers=sent.answers if sent and is_stream else answers_per_s(timed, lane)[0],
        requests=sent,
        call_s=sum(sample.wall_s for sample in lane.samples) / len(lane.samples),
        null=null_of(runs, cell),
        null_timed=null_calls(runs, cell),
        counts=lane.counts,
        latency=lane.latency,
        within=lane.within,
        costs=arm_costs(lane),
        flagged=_flagged(lane.flags.values()),
    )


def _flagged(found: Iterable[Flags]) -> FlaggedAlone:
    raised = [flags.degenerate for flags in found]
    return FlaggedAlone(num_outputs=len(raised), num_degenerate=sum(raised))


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What a report quotes first: one operating point, chosen without looking at any result.

    The point is that of ``claim``; if it was not measured, no other is quoted. ``scope`` names the tasks of the claim's
    quality. Without a claim, the first point of the plan with both quality and speed, else the first.
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
    """Loaded runs in the order of their ids, with what is computed from them.

    Those with several baselines are here against one of them, by default the first that decodes one token at a time;
    :meth:`against` gives the others. ``whole`` are the runs with all their baselines.
    """

    def __init__(self, runs: Sequence[Run], *, views: Sequence[Run] | None = None) -> None:
        self.whole = tuple(sorted(map(several.whole, runs), key=lambda run: run.manifest.run_id))
        ids = [run.manifest.run_id for run in self.whole]
        twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
        if twice:
            raise UserError(f"run {twice[0]} is named twice")
        if not ids:
            raise UserError("no run to report on")
        self._look_at(several.views(self.whole, None) if views is None else views)

    def _look_at(self, views: Sequence[Run]) -> None:
        """Read the runs as these views of them are, each against one baseline."""
        self._runs = sorted(views, key=lambda run: run.manifest.run_id)
        named = (several.baselines_of(view) for view in self._runs)
        self.baseline = next((names[0] for names in named if names), None)

    @cached_property
    def baselines(self) -> tuple[str, ...]:
        """The names of all baselines, where any run has several; that of :attr:`baseline` first."""
        named = [name for run in self.whole for name in several.baselines_of(run)]
        return tuple(dict.fromkeys([*filter(None, [self.baseline]), *named])) if len(set(named)) > 1 else ()

    def against(self, name: str) -> Runs:
        """The runs as they are against one of :attr:`baselines`."""
        return self if name == self.baseline else self.seen_as(several.views(self.whole, name))

    def seen_as(self, views: Sequence[Run]) -> Runs:
        """The runs with each as this view of it is, made once."""
        key = tuple(map(id, views))
        if key not in self._seen:
            other = Runs(self.whole, views=views)
            other.__dict__["contradictions"] = self.contradictions  # they are of whole runs
            self._seen[key] = other
        return self._seen[key]

    @cached_property
    def _seen(self) -> dict[tuple[int, ...], Runs]:
        return {}

    def each_baseline(self, key: PointKey, speed: SpeedPoint | None = None) -> tuple[AgainstOne, ...]:
        """An operating point against each of :attr:`baselines`, timed as ``speed`` is; empty where there is only
        one."""
        found = []
        for name in self.baselines:
            runs = self.against(name)
            timed = [one for one in runs.speed if speed is not None and one.candidate.id == speed.candidate.id]
            one = AgainstOne(name=name, quality=runs.quality_at(key), speed=next(iter(timed), None))
            if one.quality or one.speed:
                found.append(one)
        return tuple(found)

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
        """Speed of every timed candidate cell, with its gates by the default limits of claims."""
        return self._speed[0]

    @property
    def speed_gaps(self) -> tuple[str, ...]:
        """In words, the timed cells without a complete round."""
        return self._speed[1]

    @cached_property
    def contradictions(self) -> dict[str, tuple[Contradiction, ...]]:
        """By run id, the contradictions between a run's files; runs without any are left out."""
        return consistency.by_run(self.whole)

    @property
    def compare(self) -> bool:
        """Whether any of these runs compares a candidate with a baseline."""
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
        """The header of a column of operating points."""
        named = all("block_size" in cell.decoder.params for cell in self.points.values())
        return "block, steps, threshold" if named else "operating point"

    @cached_property
    def headline(self) -> Headline:
        """What the report quotes first, for runs that are not judged by a claim."""
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
        """The point that tables and pictures begin with: the headline's, or the first where that was not measured."""
        return self.headline if self.headline.key else self.first

    @property
    def chosen(self) -> PointKey | None:
        """The operating point that tables and pictures begin with."""
        return self.shown.key

    def quality_at(self, key: PointKey) -> QualityPoint | None:
        """Quality of an operating point: on whole tasks where they were run, else of the timed outputs."""
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
