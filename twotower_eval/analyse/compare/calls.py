"""Timed calls of a cell by round and prompts, and what can be said of them; warm-ups are never among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.clean import OutputKey, outputs
from twotower_eval.analyse.compare.degenerate import Flags
from twotower_eval.analyse.compare.measured import Measured, measured
from twotower_eval.errors import UserError
from twotower_eval.records import Arm, Cell, SpeedSample, TimeFault, canonical_json
from twotower_eval.store import Run
from twotower_eval.times import fault_of, void_text

Round = tuple[str, int]  # launch, number
Call = tuple[str, ...]  # prompt ids
Grid = dict[tuple[Round, Call], SpeedSample]
LATE: TimeFault = "after the end"


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds from a call's start to a prompt's last useful token, over all prompts of the measured rounds."""

    median_s: float
    p95_s: float
    n: int


@dataclass(frozen=True, kw_only=True)
class WithinCalls:
    """What the measured calls of a cell say of themselves besides how long they took; ``None`` where none of them does.

    Medians over calls, in seconds from the start: ``prefill_s`` until all prompts are read, ``first_output_s`` until
    the first token (of a block decoder: the first block) is there. ``peak_memory_bytes`` is the largest of any call.
    """

    num_calls: int
    prefill_s: float | None
    first_output_s: float | None
    peak_memory_bytes: int | None


def pools(runs: Sequence[Run], arm: Arm) -> list[tuple[list[Run], Cell]]:
    """Timed cells of an arm with their runs: those that differ in nothing but their launch are taken together."""
    found: dict[tuple[str, str], tuple[list[Run], Cell]] = {}
    for run in runs:
        setting = canonical_json([run.manifest.machine, run.manifest.packages, run.manifest.project_version])
        timed = {sample.cell for sample in run.speed}
        for cell in run.manifest.cells:
            if cell.arm == arm and cell.id in timed:
                found.setdefault((cell.id, setting), ([], cell))[0].append(run)
    return list(found.values())


def grid_of(runs: list[Run], cell: Cell, replica: int) -> Grid:
    """Every measured call of one copy of a cell; a ValueError where one was timed twice."""
    grid: Grid = {}
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
    """Run after run, and within a run by number, which goes on from launch to launch: its tenth is not its second."""
    launch, number = round_
    run_id, named, _ = launch.rpartition("/")
    return (run_id if named else launch, number, launch)


def processes_of(runs: Sequence[Run]) -> dict[str, str]:
    """The process of every launch that says so. One process that resumes a run is no further launch."""
    events = (event for run in runs for event in run.events if event["kind"] == "launched")
    return {str(event.get("launch")): str(event.get("process")) for event in events}


@dataclass(frozen=True, kw_only=True)
class Usable:
    """Rounds and calls that every lane has, with times that can be.

    ``num_incomplete`` rounds lack calls. Of ``num_timed`` calls in the others each is one of all lanes; those of
    ``faults`` are void, because one lane's times cannot be. With them go the rounds or the calls that they are in,
    whichever are the fewer timings, so that every round still has every call.
    """

    rounds: list[Round]
    calls: list[Call]
    num_incomplete: int
    num_timed: int
    faults: tuple[TimeFault, ...]


def usable(*grids: Grid) -> Usable:
    """What of these grids can be compared."""
    rounds, calls, num_incomplete = complete_rounds(*grids)
    num_timed = len(rounds) * len(calls)
    faults = {
        (r, call): found
        for r in rounds
        for call in calls
        if (found := next((one for grid in grids if (one := fault_of(grid[r, call]))), None))
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
    """Rounds and calls that are left when those go that have most of what is void, for the fewest timings."""
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


def left_out(there: Usable) -> list[str]:
    """What is left out of the figures, in words."""
    found = []
    if there.num_incomplete:
        found.append(f"{there.num_incomplete} rounds are not complete in both arms and are left out")
    if there.faults:
        where = "with their prompts in every round, or with their rounds"
        found.append(f"{void_text(there.num_timed, there.faults)}; they are left out {where}")
    return found


def timed_calls(
    baseline: Grid,
    candidate: Grid,
    *,
    rounds: list[Round],
    calls: list[Call],
    fixed: bool,
    processes: Mapping[str, str],
) -> stats.TimedCalls:
    """Two grids as the arms of one comparison; ``fixed`` where their prompts are no sample."""

    def seconds(grid: Grid) -> list[list[float]]:
        return [[grid[r, c].wall_s for c in calls] for r in rounds]

    def tokens(grid: Grid) -> list[list[int]]:
        return [[sum(prompt.num_tokens for prompt in grid[r, c].prompts) for c in calls] for r in rounds]

    return stats.TimedCalls(
        baseline_s=np.array(seconds(baseline), dtype=float),
        candidate_s=np.array(seconds(candidate), dtype=float),
        baseline_tokens=np.array(tokens(baseline), dtype=float),
        candidate_tokens=np.array(tokens(candidate), dtype=float),
        launches=[processes.get(launch, launch) for launch, _ in rounds],
        fixed=fixed,
    )


def null_calls(runs: list[Run], baseline: Cell) -> stats.TimedCalls | None:
    """The baseline's two copies as the two arms; ``None`` where no round holds both."""
    grids = (grid_of(runs, baseline, 0), grid_of(runs, baseline, 1))
    there = usable(*grids)
    if not grids[1] or not there.rounds:
        return None
    fixed = baseline.workload.kind == "fixed"
    return timed_calls(*grids, rounds=there.rounds, calls=there.calls, fixed=fixed, processes=processes_of(runs))


def null_of(timed: stats.TimedCalls | None) -> Measured:
    """The baseline's speedup over itself, at the level that nulls are held to."""
    if timed is None:
        return Measured(estimate=None, reason="the baseline was not timed against itself in any whole round")
    return measured(lambda: stats.speedup(timed, level=stats.NULL_LEVEL, caution="estimated"))


def flags_of(runs: list[Run], cell: Cell, rounds: list[Round]) -> dict[OutputKey, Flags]:
    """Flags of the cell's outputs in the rounds that are complete; none where a workload's outputs are not kept."""
    numbers = {number for _, number in rounds}
    found: dict[OutputKey, Flags] = {}
    for run in runs:
        found |= outputs(
            run.manifest.run_id, (row for row in run.generations_of({cell.id}) if row.repeat in numbers), {cell.id}
        )
    return found


def latency_of(samples: list[SpeedSample]) -> Latency:
    """Of all prompts of these calls."""
    finish_s = np.array([prompt.finish_s for sample in samples for prompt in sample.prompts])
    median_s, p95_s = (float(np.quantile(finish_s, q)) for q in (0.5, 0.95))
    return Latency(median_s=median_s, p95_s=p95_s, n=len(finish_s))


def names_of(runs: Sequence[Run]) -> str:
    """Runs, as errors name them."""
    return "run " + ", ".join(run.manifest.run_id for run in runs)


def within_calls(samples: Sequence[SpeedSample]) -> WithinCalls:
    """Of these calls."""
    return WithinCalls(
        num_calls=len(samples),
        prefill_s=_median(sample.prefill_s for sample in samples),
        first_output_s=_median(sample.first_output_s for sample in samples),
        peak_memory_bytes=max(
            (sample.peak_memory_bytes for sample in samples if sample.peak_memory_bytes is not None), default=None
        ),
    )


def _median(values_s: Iterable[float | None]) -> float | None:
    known_s = [value_s for value_s in values_s if value_s is not None]
    return float(np.median(known_s)) if known_s else None
