"""From timed calls to a report's speed: arms paired call by call and round by round, and whether the baseline is at its
best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.calls import (
    Call,
    Grid,
    Lane,
    Latency,
    WithinCalls,
    answers_per_s,
    grid_of,
    lane_of,
    left_out,
    names_of,
    nothing_usable,
    null_calls,
    null_of,
    pools,
    timed_calls,
    usable,
)
from twotower_eval.analyse.compare.clean import (
    CleanSpeed,
    Flagged,
    Flags,
    OutputKey,
    clean_speed,
    flagged,
    flagged_documents,
)
from twotower_eval.analyse.compare.contradiction import remarks
from twotower_eval.analyse.compare.costs import Costs, costs
from twotower_eval.analyse.compare.documents import Sample, answer_samples
from twotower_eval.analyse.compare.figures import ArmsDifferError, Counts, Measured, measured, once
from twotower_eval.analyse.compare.lengths import Lengths, with_lengths
from twotower_eval.analyse.compare.points import PointKey, baseline_of, point_key
from twotower_eval.analyse.compare.requests import Requests, request_warnings, requests_of
from twotower_eval.analyse.compare.unseen import UNCHECKED, Unseen, unseen
from twotower_eval.analyse.compare.warned import (
    FarAboveFloor,
    LengthsDiffer,
    SlowerThanGenerate,
    UnlikeLengths,
    unlike_arms,
)
from twotower_eval.records import (
    BaselineBest,
    Cell,
    Estimate,
    Finding,
    Gate,
    GateLimits,
    SerialDependence,
    TimeFault,
    document_of,
    document_prompt_id,
)
from twotower_eval.rules import Handicap, handicaps
from twotower_eval.store import Run
from twotower_eval.strict import JsonObject, from_json

FAR_ABOVE = 10.0  # times its floor: beyond it, a warning
TELLING_S = 5e-3  # floors of steps shorter than this say little: such a step is the host's time
FIELDS = {field.name for field in dataclasses.fields(BaselineBest)}


@dataclass(frozen=True, kw_only=True)
class Best:
    """Whether one baseline cell is at its best, over all launches of its runs.

    ``above_floor``: its time over that of reading a step's bytes, from ``tokens_per_s`` useful tokens.
    ``over_generate``: its time over that of transformers' own ``generate``, ``None`` where that was not timed or gave
    other tokens.
    """

    batch_size: int
    dtype: str
    facts: BaselineBest
    tokens_per_s: float | None
    above_floor: float | None
    over_generate: Estimate | None

    def is_handicapped(self, limit: float) -> bool:
        """Whether transformers' own generate is faster by more than ``limit`` of its time, by the interval."""
        return self.over_generate is not None and self.over_generate.low > 1 + limit


def best_of(runs: Sequence[Run], cell: Cell, tokens_per_s: float | None) -> Best | None:
    """The record over all launches; ``None`` in older runs, which did not check."""
    found = [_read(event) for run in runs for event in run.events if event.get("kind") == "baseline_best"]
    own = [one for one in found if one.cell == cell.id]
    if not own:
        return None
    facts = own[-1]
    bytes_per_s = max((one.bytes_per_s for one in own if one.bytes_per_s is not None), default=None)
    width = cell.workload.batch_size or 1
    above = None
    if facts.step_bytes and bytes_per_s and tokens_per_s:
        above = (width / tokens_per_s) / (facts.step_bytes / bytes_per_s)
    pairs = [pair for one in own if one.same_tokens for pair in zip(one.own_s, one.generate_s, strict=True)]
    ratios = [ours / theirs for ours, theirs in pairs if theirs > 0]
    return Best(
        batch_size=width,
        dtype=cell.checkpoint.dtype,
        facts=dataclasses.replace(facts, bytes_per_s=bytes_per_s),
        tokens_per_s=tokens_per_s,
        above_floor=above,
        over_generate=stats.median(ratios) if ratios else None,
    )


def _read(event: JsonObject) -> BaselineBest:
    return from_json(BaselineBest, {name: value for name, value in event.items() if name in FIELDS})


def best_warning(best: Best | None) -> Finding | None:
    """A warning for a speedup over a slow baseline, else ``None``."""
    if best is None:
        return None
    if best.over_generate is not None and best.over_generate.low > 1:
        slower = SlowerThanGenerate(over_generate=best.over_generate)
        return Finding(kind="slower_than_generate", severity="warning", facts=slower)
    step_bytes, bytes_per_s = best.facts.step_bytes or 0.0, best.facts.bytes_per_s or 1.0
    if (best.above_floor or 0.0) > FAR_ABOVE and step_bytes / bytes_per_s >= TELLING_S:
        far = FarAboveFloor(above_floor=best.above_floor or 0.0, limit=FAR_ABOVE)
        return Finding(kind="far_above_floor", severity="warning", facts=far)
    return None


Asked = tuple[tuple[str, int, int], str]  # task, document and request; the hash of its prompt


AT_A_RATE = Measured(
    estimate=None, reason="at a given rate of requests both arms are given equally much to do: compare latencies"
)


@dataclass(frozen=True, kw_only=True)
class SpeedPoint:
    """Speed of one candidate cell against its baseline cell; ``null`` is the baseline against itself. Rates are useful
    tokens per second, ``…_answers`` answers per second.

    ``gates`` are those of a claim with default limits, empty before :class:`Runs` has computed them; a failed one makes
    the point INVALID. ``handicaps``: arms that were timed in a slower way than their models offer. ``best``: whether
    the baseline is at its best, ``None`` if not recorded. ``timed`` and ``null_timed`` are the calls behind the
    figures, for other levels. ``tasks`` are those of the timed prompts, empty where their ids name none. ``lengths``
    are of baseline and candidate, empty for fixed prompts. ``faults`` are those of ``num_paired`` calls in complete
    rounds with impossible times in either arm. ``unseen``: what new prompts show of memory. ``requests`` are those to
    arms behind servers.
    """

    run_ids: tuple[str, ...]
    complete: bool
    baseline: Cell
    candidate: Cell
    num_rounds: int
    num_calls: int
    num_launches: int
    time: Measured
    throughput: Measured
    length: Measured
    geometric: Measured
    null: Measured
    baseline_rate: Measured
    candidate_rate: Measured
    baseline_answers: Measured
    candidate_answers: Measured
    counts: Counts
    baseline_counts: Counts
    latency: Latency
    baseline_latency: Latency
    within: WithinCalls
    baseline_within: WithinCalls
    flagged: Flagged
    clean: CleanSpeed
    costs: Costs
    samples: tuple[Sample, ...]
    warnings: tuple[Finding, ...]
    timed: stats.TimedCalls
    null_timed: stats.TimedCalls | None
    gates: tuple[Gate, ...] = ()
    handicaps: tuple[Handicap, ...] = ()
    best: Best | None = None
    tasks: tuple[str, ...] = ()
    lengths: tuple[Lengths, ...] = ()
    num_paired: int = 0
    faults: tuple[TimeFault, ...] = ()
    unseen: Unseen = UNCHECKED
    requests: Requests | None = None
    baseline_requests: Requests | None = None

    @cached_property
    def key(self) -> PointKey:
        """Joins quality and speed of the same weights, dtype and decoder."""
        return point_key(self.candidate)

    @property
    def batch_size(self) -> int:
        """Prompts per timed call."""
        return self.candidate.workload.batch_size or 1

    @property
    def workload(self) -> str:
        """``fixed`` or ``answer``."""
        return self.candidate.workload.kind

    @property
    def serial(self) -> SerialDependence | None:
        """How much its rounds depend on their neighbours; ``None`` without a speedup."""
        return None if self.time.estimate is None else self.time.estimate.serial

    @property
    def invalid(self) -> bool:
        """Whether any gate failed, so that this must not be read as a speedup."""
        return any(gate.outcome == "failed" for gate in self.gates)

    def too_many_faults(self, limits: GateLimits) -> bool:
        """Whether void calls remove more timings than a claim allows; a single void call is never too many."""
        return len(self.faults) > 1 and self.void_share > limits.void_share

    @property
    def void_share(self) -> float:
        """Share of the timings in complete rounds that are left out; a void call takes its prompts or round along."""
        return 1 - self.num_rounds * self.num_calls / self.num_paired if self.faults else 0.0

    @property
    def lengths_differ(self) -> bool:
        """Whether the arms' outputs differ so much in length that the throughput speedup has to be read as well."""
        return lengths_differ(self.length)

    @property
    def time_per_device(self) -> Measured:
        """Speedup in time for each device that an arm uses."""
        baseline, candidate = self.baseline.workload.num_devices, self.candidate.workload.num_devices
        if not baseline or not candidate:
            return Measured(estimate=None, reason="the run does not say how many devices each arm used")
        if self.time.estimate is None:
            return self.time
        found = stats.per_device(self.time.estimate, baseline_devices=baseline, candidate_devices=candidate)
        return Measured(estimate=found)

    @property
    def equal_devices(self) -> bool:
        """Whether both arms use equally many devices, as far as is recorded."""
        baseline, candidate = self.baseline.workload.num_devices, self.candidate.workload.num_devices
        return not baseline or not candidate or baseline == candidate


def lengths_differ(length: Measured) -> bool:
    """Whether a length ratio lies outside what a claim allows by default."""
    limits, found = GateLimits(), length.estimate
    return found is not None and not limits.min_length_ratio <= found.value <= limits.max_length_ratio


def speed_points(runs: Sequence[Run]) -> tuple[tuple[SpeedPoint, ...], tuple[str, ...]]:
    """Every timed candidate cell, pooled over runs that differ only in their launch; and what is missing.

    A cell of an incomplete run without a complete round gives a line of the second kind.
    """
    found = [_point(pool, cell, runs) for pool, cell in pools(runs, "candidate")]
    points = [point for point in found if isinstance(point, SpeedPoint)]
    return tuple(points), tuple(gap for gap in found if isinstance(gap, str))


def _point(runs: list[Run], candidate: Cell, everyone: Sequence[Run]) -> SpeedPoint | str:
    baseline = baseline_of(runs[0], candidate)
    grids = (grid_of(runs, baseline, 0), grid_of(runs, candidate, 0))
    _check_prompts(runs, *grids)
    there = usable(*grids)
    rounds, calls = there.rounds, there.calls
    if not rounds:
        return f"{names_of(runs)}: cell {candidate.id} ({candidate.decoder.label}) has {nothing_usable(there)}"
    arms = (lane_of(runs, baseline, 0, there), lane_of(runs, candidate, 0, there))
    timed, lengths = with_lengths(timed_calls(*arms), everyone, arms)
    length = measured(lambda: stats.speedup(timed, "length"))
    time = measured(lambda: stats.speedup(timed))
    rates = _rates(timed, arms)
    return SpeedPoint(
        run_ids=tuple(run.manifest.run_id for run in runs),
        complete=all(run.complete for run in runs),
        baseline=baseline,
        candidate=candidate,
        num_rounds=len(rounds),
        num_calls=len(calls),
        num_launches=len(set(timed.launches)),
        time=time,
        throughput=_throughput(timed, candidate),
        length=length,
        geometric=measured(lambda: stats.geometric_speedup(timed)),
        null=null_of(runs, baseline),
        **rates,
        counts=arms[1].counts,
        baseline_counts=arms[0].counts,
        latency=arms[1].latency,
        baseline_latency=arms[0].latency,
        within=arms[1].within,
        baseline_within=arms[0].within,
        flagged=flagged(arms[0].flags, arms[1].flags),
        clean=clean_speed(timed, _dropped_calls([arm.flags for arm in arms], calls)),
        costs=costs(*arms),
        samples=answer_samples(*arms),
        warnings=(
            *unlike_arms(baseline, candidate),
            *left_out(there),
            *remarks(runs),
            *_warnings(length, lengths),
            *_few_rounds(time, timed),
            *request_warnings(rates["baseline_requests"], rates["requests"]),
        ),
        timed=timed,
        null_timed=null_calls(runs, baseline),
        handicaps=_handicaps(*arms),
        best=best_of(runs, baseline, _value(rates["baseline_rate"])),
        tasks=tasks_of(chain.from_iterable(calls)),
        lengths=lengths,
        num_paired=there.num_timed,
        faults=there.faults,
        unseen=unseen(runs, (baseline, candidate), grids, there),
    )


def _throughput(timed: stats.TimedCalls, candidate: Cell) -> Measured:
    """The speedup in useful tokens per second; none at a rate of requests."""
    if candidate.workload.request_rate is not None:
        return AT_A_RATE
    return measured(lambda: stats.speedup(timed, "throughput"))


def _rates(timed: stats.TimedCalls, arms: tuple[Lane, Lane]) -> dict[str, Any]:
    """Fields of a point: useful tokens and answers per second of both arms, of streams of requests those of their
    steady time; and the requests."""
    baseline, candidate = (requests_of(list(arm.runs), arm.cell) for arm in arms)
    found: dict[str, Any] = {"baseline_requests": baseline, "requests": candidate}
    if baseline is not None and candidate is not None and candidate.is_stream:
        found |= {"baseline_rate": baseline.tokens, "candidate_rate": candidate.tokens}
        return found | {"baseline_answers": baseline.answers, "candidate_answers": candidate.answers}
    found["baseline_rate"] = measured(lambda: stats.speedup(timed, "baseline_rate"))
    found["candidate_rate"] = measured(lambda: stats.speedup(timed, "candidate_rate"))
    return found | dict(zip(("baseline_answers", "candidate_answers"), answers_per_s(timed, *arms), strict=True))


def _value(figure: Measured) -> float | None:
    return None if figure.estimate is None else figure.estimate.value


def tasks_of(prompt_ids: Iterable[str]) -> tuple[str, ...]:
    """The tasks of prompts, by their ids; none where any prompt is of no document."""
    documents = [document_of(prompt_id) for prompt_id in sorted(set(prompt_ids))]
    known = [document for document in documents if document is not None]
    return tuple(dict.fromkeys(task for task, _ in known)) if len(known) == len(documents) else ()


def _warnings(length: Measured, lengths: Sequence[Lengths]) -> Iterator[Finding]:
    """Warnings about the lengths of the timed answers."""
    if lengths_differ(length):
        yield Finding(kind="lengths_differ", severity="warning", facts=LengthsDiffer())
    if any(of_arm.misses_the_tail for of_arm in lengths):
        yield Finding(kind="unlike_lengths", severity="warning", facts=UnlikeLengths())


def _few_rounds(time: Measured, timed: stats.TimedCalls) -> list[Finding]:
    """A warning where rounds are too few or too much alike for a verdict; resampled launches count as units instead."""
    if time.estimate is None or stats.resamples_launches(timed.launches):
        return []
    found = stats.too_few_rounds(time.estimate, len(timed.launches))
    return [] if found is None else [Finding(kind="few_rounds", severity="warning", facts=found)]


def _handicaps(*arms: Lane) -> tuple[Handicap, ...]:
    """What slows either arm by how its model is run."""
    found: list[Handicap] = []
    for arm in arms:
        cell = arm.cell
        prompts = [prompt for sample in arm.samples for prompt in sample.prompts]
        longest = max(prompt.num_prompt_tokens + prompt.num_tokens for prompt in prompts)
        unlike = any(len({prompt.num_prompt_tokens for prompt in sample.prompts}) > 1 for sample in arm.samples)
        width = cell.workload.batch_size or 1
        every = (ways for run in arm.runs for ways in run.manifest.ways)
        for ways in (ways for ways in every if ways.checkpoint == cell.checkpoint.identity):
            found += handicaps(cell.arm, ways, batch_size=width, longest=longest, unlike_lengths=unlike)
    return tuple(dict.fromkeys(found))


def _check_prompts(runs: list[Run], baseline: Grid, candidate: Grid) -> None:
    """ArmsDifferError unless both arms had the same prompts in the same batches."""
    calls = [{call for _, call in grid} for grid in (baseline, candidate)]
    # A killed run may have stopped before one arm saw a batch; that is no mismatch.
    if calls[0] != calls[1] and all(run.complete for run in runs):
        what = "baseline and candidate were timed on different prompts: they are no pair"
        raise ArmsDifferError(f"{names_of(runs)}: {what}")
    cells = {sample.cell for grid in (baseline, candidate) for sample in grid.values()}
    asked = frozenset[Asked]().union(*(once(runs, ("asked", cell), partial(_asked, runs, cell)) for cell in cells))
    if len(asked) == len({document for document, _ in asked}):
        return
    hashes: dict[tuple[str, int, int], str] = {}
    for row in (row for run in runs for row in run.generations_of(cells)):
        known = hashes.setdefault((row.task, row.doc_id, row.request_index), row.prompt_sha256)
        if known != row.prompt_sha256:
            where = f"task {row.task!r}, document {row.doc_id}"
            raise ArmsDifferError(f"{names_of(runs)}: {where}: prompt_sha256 differs between timed generations")


def _asked(runs: list[Run], cell: str) -> frozenset[Asked]:
    rows = (row for run in runs for row in run.generations_of({cell}))
    return frozenset(((row.task, row.doc_id, row.request_index), row.prompt_sha256) for row in rows)


def _dropped_calls(by_arm: list[dict[OutputKey, Flags]], calls: list[Call]) -> tuple[list[bool], list[bool]] | None:
    """Per arm and call, whether any of its prompts was answered degenerately; ``None`` without the outputs."""
    prompts = {prompt for call in calls for prompt in call}
    kept = [{document_prompt_id(task, doc_id) for _, task, doc_id, _ in arm} for arm in by_arm]
    if not all(prompts <= arm for arm in kept):
        return None
    bad = [{document_prompt_id(*document) for document in flagged_documents(arm)} for arm in by_arm]
    baseline, candidate = ([not arm.isdisjoint(call) for call in calls] for arm in bad)
    return baseline, candidate
