"""Timed calls of a cell by round and prompts, and their latencies. Warm-ups are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.clean import Flags, OutputKey, outputs
from twotower_eval.analyse.compare.figures import Counts, Measured, count, measured, once
from twotower_eval.analyse.compare.warned import IncompleteRounds, VoidCalls
from twotower_eval.analyse.stats.intervals import Floats
from twotower_eval.errors import UserError
from twotower_eval.records import (
    Arm,
    Cell,
    Finding,
    PromptTiming,
    SpeedSample,
    TimeFault,
    canonical_json,
    run_and_launch,
)
from twotower_eval.rules import fault_of, void_text
from twotower_eval.store import Run

Round = tuple[str, int]  # launch, number
Call = tuple[str, ...]  # prompt ids
LATE: TimeFault = "after the end"
TOKEN_BY_TOKEN = 1.25  # tokens per arrival: up to that many a stream is taken for one of single tokens


class Grid(dict[tuple[Round, Call], SpeedSample]):
    """Every measured call of one copy of a cell."""

    @cached_property
    def faults(self) -> dict[tuple[Round, Call], TimeFault]:
        """The faults of calls with impossible times."""
        return {place: fault for place, sample in self.items() if (fault := fault_of(sample))}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds from a call's start to a prompt's last useful token, over all prompts of the measured rounds."""

    median_s: float
    p95_s: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """How the answers of a server arrived, over ``num_answers`` of them in pieces; medians.

    ``tokens_per_arrival``: tokens as the server counts them, else as here, over groups of pieces that lie apart. Where
    that is about one, ``first_s`` is the time to the first token and ``between_s`` the time between two; of a stream
    that comes in canvases both would be of canvases, and are ``None``.
    """

    num_answers: int
    tokens_per_arrival: float
    first_s: float | None
    between_s: float | None


@dataclass(frozen=True, kw_only=True)
class WithinCalls:
    """What the measured calls of a cell recorded besides their time; ``None`` where none recorded it.

    Medians over calls, in seconds from the start: ``prefill_s`` until all prompts are read, ``first_output_s`` until
    the first token (for block decoders, the first block) is there. ``peak_memory_bytes`` is the largest of any call,
    ``energy_j`` what all calls together drew. ``streamed`` says how answers arrived from a server.
    """

    num_calls: int
    prefill_s: float | None
    first_output_s: float | None
    peak_memory_bytes: int | None
    energy_j: float | None = None
    streamed: Streamed | None = None


def pools(runs: Sequence[Run], arm: Arm) -> list[tuple[list[Run], Cell]]:
    """Timed cells of an arm with their runs; cells that differ only in their launch are pooled.

    A candidate's runs are pooled where they have the same baseline, too.
    """
    found: dict[tuple[str, str], tuple[list[Run], Cell]] = {}
    for run in runs:
        made, timed = run.manifest, {sample.cell for sample in run.speed}
        setting = canonical_json([made.machine, made.packages, made.project_version, made.omp_wait_policy])
        for cell in made.cells:
            if cell.arm == arm and cell.id in timed:
                beside = (
                    [] if arm == "baseline" else sorted(other.id for other in made.cells if _is_beside(other, cell))
                )
                found.setdefault((" ".join([cell.id, *beside]), setting), ([], cell))[0].append(run)
    return list(found.values())


def _is_beside(other: Cell, cell: Cell) -> bool:
    """Whether a cell is a baseline that is timed on a candidate's prompts."""
    own, its = cell.workload, other.workload
    return other.arm == "baseline" and (its.name, its.batch_size) == (own.name, own.batch_size)


def grid_of(runs: list[Run], cell: Cell, replica: int) -> Grid:
    """Every measured call of one copy of a cell; a UserError where one was timed twice."""
    return once(runs, ("grid", cell.id, replica), lambda: _grid(runs, cell, replica))


def _grid(runs: list[Run], cell: Cell, replica: int) -> Grid:
    grid = Grid()
    for run in runs:
        for sample in run.speed_of({cell.id}):
            if sample.replica == replica and sample.phase == "measure":
                key = ((sample.launch_id, sample.round), tuple(prompt.prompt_id for prompt in sample.prompts))
                if key in grid:
                    raise UserError(f"{names_of(runs)}: cell {cell.id} timed the same prompts twice in {key[0]}")
                grid[key] = sample
    return grid


def complete_rounds(*grids: Grid) -> tuple[list[Round], list[Call], int]:
    """Rounds in which every grid has every call, the calls, and how many rounds are not so."""
    calls = sorted({call for grid in grids for _, call in grid})
    rounds = sorted({round_ for grid in grids for round_, _ in grid}, key=_as_timed)
    whole = [r for r in rounds if all((r, call) in grid for grid in grids for call in calls)]
    return whole, calls, len(rounds) - len(whole)


def _as_timed(round_: Round) -> tuple[str, int, str]:
    """Sort key of rounds: by run, then by number, which continues over launches."""
    launch, number = round_
    return (run_and_launch(launch)[0], number, launch)


def processes_of(runs: Sequence[Run]) -> dict[str, str]:
    """The process of every launch that recorded it. A process that resumes a run is not a further launch."""
    events = (event for run in runs for event in run.events if event["kind"] == "launched")
    return {str(event.get("launch")): str(event.get("process")) for event in events}


@dataclass(frozen=True, kw_only=True)
class Usable:
    """Rounds and calls that every lane has, with possible times.

    ``num_incomplete`` rounds lack calls. ``num_timed`` calls in the others count each call of all lanes once;
    ``faults`` are those of void calls. A void call takes its round or its prompts along, whichever has fewer timings,
    so that every remaining round has every remaining call.
    """

    rounds: list[Round]
    calls: list[Call]
    num_incomplete: int
    num_timed: int
    faults: tuple[TimeFault, ...]


def usable(*grids: Grid) -> Usable:
    """The rounds and calls of these grids that can be compared."""
    rounds, calls, num_incomplete = complete_rounds(*grids)
    num_timed = len(rounds) * len(calls)
    void = [grid.faults for grid in grids if grid.faults]
    faults = {
        (r, call): found
        for r in (rounds if void else ())
        for call in calls
        if (found := next((one[r, call] for one in void if (r, call) in one), None))
    }
    kept_rounds, kept_calls = _without(set(faults), rounds, calls)
    if not kept_rounds:  # then what at least took some time shows what there is; it is far too much to be trusted
        kept_rounds, kept_calls = _without({at for at, fault in faults.items() if fault != LATE}, rounds, calls)
    return Usable(
        rounds=kept_rounds,
        calls=kept_calls,
        num_incomplete=num_incomplete,
        num_timed=num_timed,
        faults=tuple(faults.values()),
    )


def _without(void: set[tuple[Round, Call]], rounds: list[Round], calls: list[Call]) -> tuple[list[Round], list[Call]]:
    """Rounds and calls that remain when void ones are removed at the cost of the fewest timings."""
    while void:
        of_round, of_call = Counter(r for r, _ in void), Counter(call for _, call in void)
        (worst_round, num_round), (worst_call, num_call) = of_round.most_common(1)[0], of_call.most_common(1)[0]
        if num_round * len(rounds) > num_call * len(calls):
            rounds = [r for r in rounds if r != worst_round]
        else:
            calls = [call for call in calls if call != worst_call]
        void = {(r, call) for r, call in void if r in rounds and call in calls}
    return (rounds, calls) if rounds and calls else ([], [])


def nothing_usable(there: Usable) -> str:
    """Why there is nothing to compare."""
    return f"no call left: {void_text(there.num_timed, there.faults)}" if there.faults else "no complete measured round"


def left_out(there: Usable) -> list[Finding]:
    """What is left out of the figures."""
    found = []
    if there.num_incomplete:
        rounds = IncompleteRounds(num_rounds=there.num_incomplete)
        found.append(Finding(kind="incomplete_rounds", severity="note", facts=rounds))
    if there.faults:
        calls = VoidCalls(num_timed=there.num_timed, faults=there.faults)
        found.append(Finding(kind="void_calls", severity="note", facts=calls))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Lane:
    """One copy of a cell in the rounds and calls that count, with its own totals.

    There is one object for each: all candidates of a run share the same baseline.
    """

    runs: Sequence[Run]
    cell: Cell
    rounds: Sequence[Round]
    samples_RC: list[list[SpeedSample]]

    @cached_property
    def samples(self) -> list[SpeedSample]:
        """The calls, round after round."""
        return [sample for row in self.samples_RC for sample in row]

    @cached_property
    def seconds_RC(self) -> Floats:
        """Seconds of each call, rounds by calls."""
        return np.array([[sample.wall_s for sample in row] for row in self.samples_RC], dtype=float)

    @cached_property
    def tokens_RC(self) -> Floats:
        """Useful tokens of each call, rounds by calls."""
        rows = [[sum(prompt.num_useful for prompt in sample.prompts) for sample in row] for row in self.samples_RC]
        return np.array(rows, dtype=float)

    @cached_property
    def answers_RC(self) -> Floats:
        """Answers of each call: one a prompt."""
        return np.array([[len(sample.prompts) for sample in row] for row in self.samples_RC], dtype=float)

    @cached_property
    def counts(self) -> Counts:
        """Totals over all prompts."""
        return count(prompt for sample in self.samples for prompt in sample.prompts)

    @cached_property
    def latency(self) -> Latency:
        """Latency over all prompts."""
        finish_s = np.array([prompt.finish_s for sample in self.samples for prompt in sample.prompts])
        median_s, p95_s = (float(np.quantile(finish_s, q)) for q in (0.5, 0.95))
        return Latency(median_s=median_s, p95_s=p95_s, n=len(finish_s))

    @cached_property
    def within(self) -> WithinCalls:
        """Prefill, first output and peak memory of its calls."""
        peaks = [sample.peak_memory_bytes for sample in self.samples if sample.peak_memory_bytes is not None]
        energies_j = [sample.energy_j for sample in self.samples if sample.energy_j is not None]
        return WithinCalls(
            streamed=streamed(prompt for sample in self.samples for prompt in sample.prompts),
            num_calls=len(self.samples),
            prefill_s=_median(sample.prefill_s for sample in self.samples),
            first_output_s=_median(sample.first_output_s for sample in self.samples),
            peak_memory_bytes=max(peaks, default=None),
            energy_j=sum(energies_j) if len(energies_j) == len(self.samples) else None,
        )

    @cached_property
    def flags(self) -> dict[OutputKey, Flags]:
        """Flags of the outputs in its rounds; empty where outputs are not kept."""
        numbers = {number for _, number in self.rounds}
        found: dict[OutputKey, Flags] = {}
        for run in self.runs:
            rows = (row for row in run.generations_of({self.cell.id}) if row.repeat in numbers)
            found |= outputs(run.manifest.run_id, rows, {self.cell.id})
        return found


def streamed(prompts: Iterable[PromptTiming]) -> Streamed | None:
    """How the answers to these prompts arrived; ``None`` if none came in pieces."""
    found = [(prompt.num_tokens, one) for prompt in prompts if (one := prompt.served) is not None and one.num_arrivals]
    if not found:
        return None
    rates = [(num if one.num_tokens is None else one.num_tokens) / (one.num_arrivals or 1) for num, one in found]
    rate = float(np.median(rates))
    if rate > TOKEN_BY_TOKEN:
        return Streamed(num_answers=len(found), tokens_per_arrival=rate, first_s=None, between_s=None)
    gaps_s = [
        (one.last_s - one.first_s) / (one.num_arrivals - 1)
        for _, one in found
        if one.first_s is not None and one.last_s is not None and one.num_arrivals and one.num_arrivals > 1
    ]
    return Streamed(
        num_answers=len(found),
        tokens_per_arrival=rate,
        first_s=_median(one.first_s for _, one in found),
        between_s=_median(gaps_s),
    )


def lane_of(runs: list[Run], cell: Cell, replica: int, there: Usable) -> Lane:
    """The calls of one copy of a cell that count."""
    rounds, calls = there.rounds, there.calls

    def made() -> Lane:
        grid = grid_of(runs, cell, replica)
        return Lane(runs=runs, cell=cell, rounds=rounds, samples_RC=[[grid[r, c] for c in calls] for r in rounds])

    return once(runs, ("lane", cell.id, replica, tuple(rounds), tuple(calls)), made)


def timed_calls(baseline: Lane, candidate: Lane) -> stats.TimedCalls:
    """Two lanes as the arms of one comparison."""
    processes = processes_of(candidate.runs)
    return stats.TimedCalls(
        baseline_s=baseline.seconds_RC,
        candidate_s=candidate.seconds_RC,
        baseline_tokens=baseline.tokens_RC,
        candidate_tokens=candidate.tokens_RC,
        launches=[processes.get(launch, launch) for launch, _ in candidate.rounds],
        fixed=candidate.cell.workload.kind == "fixed",  # then its prompts are no sample
    )


def answers_per_s(timed: stats.TimedCalls, *arms: Lane) -> tuple[Measured, ...]:
    """Answers per second of baseline and candidate, or of the one lane that was timed."""
    baseline_RC, candidate_RC = arms[0].answers_RC, arms[-1].answers_RC
    of_answers = replace(timed, baseline_tokens=baseline_RC, candidate_tokens=candidate_RC)
    rates: tuple[Literal["baseline_rate", "candidate_rate"], ...] = ("baseline_rate", "candidate_rate")
    return tuple(measured(partial(stats.speedup, of_answers, rate)) for rate in rates[: len(arms)])


def null_calls(runs: list[Run], baseline: Cell) -> stats.TimedCalls | None:
    """The baseline's two copies as the two arms; ``None`` where no round holds both."""
    return once(runs, ("null", baseline.id), lambda: _null_calls(runs, baseline))


def _null_calls(runs: list[Run], baseline: Cell) -> stats.TimedCalls | None:
    grids = (grid_of(runs, baseline, 0), grid_of(runs, baseline, 1))
    there = usable(*grids)
    if not grids[1] or not there.rounds:
        return None
    return timed_calls(*(lane_of(runs, baseline, replica, there) for replica in (0, 1)))


def null_of(runs: list[Run], baseline: Cell) -> Measured:
    """The baseline's speedup over itself, at the level of A/A nulls."""
    return once(runs, ("null's speedup", baseline.id), lambda: _null(null_calls(runs, baseline)))


def _null(timed: stats.TimedCalls | None) -> Measured:
    if timed is None:
        return Measured(estimate=None, reason="the baseline was not timed against itself in any whole round")
    return measured(lambda: stats.speedup(timed, level=stats.NULL_LEVEL, caution="estimated"))


def names_of(runs: Sequence[Run]) -> str:
    """The runs' ids as errors name them."""
    return "run " + ", ".join(run.manifest.run_id for run in runs)


def _median(values_s: Iterable[float | None]) -> float | None:
    known_s = [value_s for value_s in values_s if value_s is not None]
    return float(np.median(known_s)) if known_s else None
