"""One launch of ``speed``: warm-up, then rounds in which every lane times every call of its batch size."""

from __future__ import annotations

import dataclasses
import gc
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from twotower_eval import store
from twotower_eval.engine.models.chat import with_answer
from twotower_eval.measure.speed.clock import CallClock
from twotower_eval.measure.speed.conditions import Captures
from twotower_eval.measure.speed.costs import CostItem, TimedParts
from twotower_eval.measure.speed.lanes import Lane, Timing, prompt_timing, with_decoders
from twotower_eval.measure.speed.probes import (
    Probe,
    Probes,
    Witnessing,
    is_made_up,
    is_watched,
    watched_calls,
    witnessed,
    witnessed_row,
    witnessings,
)
from twotower_eval.measure.speed.schedule import (
    RoundLoop,
    launches_missing,
    rounds_by_launch,
    share_of_launch,
    undecided_text,
    whole_rounds,
)
from twotower_eval.measure.speed.streams import schedule, time_stream
from twotower_eval.measure.speed.workloads import Call, Calls, Load, Request, is_stream
from twotower_eval.names import plural
from twotower_eval.plan import SpeedPlan
from twotower_eval.progress import Advance, Progress, duration_text
from twotower_eval.records import (
    CostSample,
    Generation,
    GenerationRow,
    SpeedPhase,
    SpeedSample,
    TimeFault,
    derive_seed,
)
from twotower_eval.rules import EXTENDED, clocked_s, finite, time_fault
from twotower_eval.store.journal import now_text
from twotower_eval.task_options import run_seed


@dataclass(frozen=True, kw_only=True)
class Launched:
    """Result of a launch: the run's folder, and how many launches the plan still needs."""

    path: Path
    num_missing: int


PROCESS = secrets.token_hex(8)  # identifies this process: launches inside one process are not independent


def calls_per_round(calls: Calls, lanes: dict[Load, tuple[Lane, ...]]) -> int:
    """Timed calls per round, without probes."""
    return sum(len(calls[size]) * len(lanes[size]) for size in calls)


class Session(RoundLoop):
    """One launch: its warm-up and its rounds."""

    def __init__(
        self,
        plan: SpeedPlan,
        writer: store.RunWriter,
        launch_id: str,
        calls: Calls,
        lanes: dict[Load, tuple[Lane, ...]],
        probes: Probes,
        parts: TimedParts | None,
        clock: CallClock,
        captures: Captures,
        progress: Progress,
        began_s: float,
    ) -> None:
        """``began_s`` is when the launch began, before anything was loaded, by the monotonic clock."""
        self._plan, self._writer, self._calls, self._lanes = plan, writer, calls, lanes
        self._began_s, self._call_s = began_s, list[float]()  # seconds of timed calls, to estimate others
        self._launch_id, self._probes = launch_id, probes
        self._watched: frozenset[str] = frozenset()  # calls of this round that are witnessed
        self._parts, self._clock, self._captures = parts, clock, captures
        earlier = writer.run.speed
        timed: list[SpeedSample | CostSample] = [*earlier, *writer.run.costs]
        self._calls_per_round = calls_per_round(calls, lanes)
        begun = [s.round for s in timed if s.phase == "measure"] + [row.repeat for row in writer.run.generations]
        # A launch among several has its own target; a single one that continues a run has what is left.
        whole_s = whole_rounds(earlier, self._calls_per_round)
        self._num_missing = launches_missing(plan, earlier, self._calls_per_round)
        self._earlier_rounds = [num for num in rounds_by_launch(earlier, self._calls_per_round) if num]
        super().__init__(
            share_of_launch(plan),
            progress,
            whole_s=whole_s if plan.launches == 1 else [],
            next_round=1 + max(begun, default=-1),
            steps_per_round=self._calls_per_round,
        )
        self._num_probed = 0  # rounds of this launch, which the first has fewer probes in

    def _num_steps(self, phase: SpeedPhase, num_rounds: int) -> int:
        return num_rounds * self._calls_per_round + (self._num_probes(num_rounds) if phase == "measure" else 0)

    def _num_probes(self, num_rounds: int) -> int:
        """Timings of probes in so many measured rounds from now on."""
        until = self._probes.num_timings(self._lanes, self._num_probed + num_rounds)
        return until - self._probes.num_timings(self._lanes, self._num_probed)

    def run(self) -> int:
        """Warm up, report the estimated duration, and measure until both minimums are reached; the number of missing
        launches."""
        self._announce()
        if self._num_missing:
            if self._writer.run.complete:
                self._progress.note(EXTENDED)
            self._writer.event("launched", launch=self._launch_id, process=PROCESS)
            self._rounds()
        rounds = f"{plural(self._num_done, 'round')} of {plural(self._calls_per_round, 'timed call')}"
        self._progress.note(f"{rounds}, {duration_text(self._timed_s)} on the clock")
        num_missing = max(0, self._num_missing - 1)
        self._writer.event("measured", num_rounds=self._num_done, timed_s=self._timed_s, num_missing=num_missing)
        return num_missing

    def _announce(self) -> None:
        sizes = ", ".join(map(str, self._lanes))
        what = "batch sizes" if self._plan.request_rates is None else "rates"
        num_lanes = sum(map(len, self._lanes.values()))
        num_prompts = sum(len(call.requests) for call in next(iter(self._calls.values())))
        num_cells = sum(lane.replica == 0 for lanes in self._lanes.values() for lane in lanes)
        several = any(lane.cell.baseline for lanes in self._lanes.values() for lane in lanes)
        self._progress.note(
            f"{plural(num_cells, 'cell')} and {plural(num_lanes - num_cells, 'copy', 'copies')} of the baseline"
            f"{'s' * several}, "
            f"{self._plan.workload} workload, {what} {sizes}; {plural(num_prompts, 'prompt')}, "
            f"{plural(self._calls_per_round, 'timed call')} per round"
        )
        self._progress.note(self._planned_text())
        if self._num_done:
            self._progress.note(f"{plural(self._num_done, 'complete round')} so far")

    def _planned_text(self) -> str:
        """The calls of the warm-up and of the measured rounds, as their progress counts them."""
        num_rounds, warmup = max(0, self._settings.min_rounds - self._num_done), self._settings.warmup_rounds
        timed, probes = num_rounds * self._calls_per_round, self._num_probes(num_rounds)
        fresh = f" and {plural(probes, 'call')} on new prompts (--probes)" if probes else ""
        return (
            f"warm-up: {plural(self._num_steps('warmup', warmup), 'call')} in {plural(warmup, 'round')}; measure: "
            f"{plural(timed, 'timed call')}{fresh} in {plural(num_rounds, 'round')}, {timed + probes:,} in all; "
            "fewer: --num-prompts, --min-rounds"
        )

    def _estimate(self, num_left: int, round_s: float) -> str:
        """Of all that is left: these rounds with their probes, the launches behind this one, and the scoring."""
        num_probes = self._num_probes(num_left)
        call_s = sum(self._call_s) / max(1, len(self._call_s))
        rounds_s = num_left * round_s + num_probes * call_s
        # Another launch also opens, warms up and witnesses; this one has done so in the time since it began.
        others_s = (self._num_missing - 1) * (rounds_s + time.monotonic() - self._began_s)
        parts = [plural(num_left, "round")]
        parts += [f"{plural(num_probes, 'call')} on new prompts"] if num_probes else []
        parts += [f"{plural(self._num_missing - 1, 'further launch', 'further launches')}"] if others_s > 0 else []
        scored = ""
        if self._plan.workload == "answer":
            num_cells = sum(lane.replica == 0 for lanes in self._lanes.values() for lane in lanes)
            num_prompts = sum(len(call.requests) for call in next(iter(self._calls.values())))
            num_rounds = (self._num_done + num_left) * max(1, self._num_missing)
            scored = f"; then {num_cells * num_prompts * num_rounds:,} timed answers are scored"
        return f"estimated duration: about {duration_text(rounds_s + others_s)} for {', '.join(parts)}{scored}"

    def _forecast(self, num_left: int) -> None:
        """Warn of too few rounds before they are measured; with several launches once, before the first."""
        if self._plan.launches == 1:
            planned = [*self._earlier_rounds, num_left]
        else:
            planned = [] if self._earlier_rounds else [num_left] * self._plan.launches
        if planned and (warning := undecided_text(planned)):
            self._progress.note(warning)

    def _round(self, phase: SpeedPhase, number: int, advance: Advance) -> float:
        """Every lane times every call, and every part is timed alone; the seconds on the clock without the parts.

        The first warm-up round also decodes the witnessed calls. Parts that a call of this round is the first to need
        are timed at its end.
        """
        order = random.Random(derive_seed(run_seed(self._plan.seed), phase, number))
        gc.collect()
        lanes = with_decoders(self._lanes, self._clock)
        positions = [
            (load, part)
            for load, calls in self._calls.items()
            for part in ([calls] if is_stream(self._plan, load) else [(call,) for call in calls])
        ]
        probes = self._probes.of_round(lanes) if phase == "measure" else []
        is_first = phase == "warmup" and number == 0
        # A different choice in every launch.
        chance = random.Random(derive_seed(run_seed(self._plan.seed), "witness", self._launch_id))
        self._watched = watched_calls(self._calls, chance) if is_first else frozenset()
        besides = list(witnessings(lanes, self._calls, self._probes, chance)) if is_first else []
        steps: list[tuple[Load, tuple[Call, ...]] | Probe | Witnessing | CostItem] = [
            *positions,
            *probes,
            *(one for one in besides if one.kind != "timed"),
            *(self._parts.items if self._parts else ()),
        ]
        order.shuffle(steps)
        steps += [one for one in besides if one.kind == "timed"]  # what calls read first, they read for the first time
        clock_s = 0.0
        for step in steps:
            if isinstance(step, CostItem):
                self._time_part(step, phase, number)
            elif isinstance(step, Witnessing):
                self._witness(step)
            elif isinstance(step, Probe):
                for lane in step.lanes:
                    self._time_call(lane, step.call, "probe", number)
                    advance()
            else:
                load, part = step
                for lane in order.sample(lanes[load], len(lanes[load])):
                    clock_s += self._time_calls(lane, load, part, phase, number)
                    advance(len(part))
        if phase == "measure":
            advance(self._num_probes(1) - sum(len(probe.lanes) for probe in probes))  # where no new prompt was left
            self._num_probed += 1
        for item in self._parts.take_new() if self._parts else ():
            self._time_part(item, phase, number)
        return clock_s

    def _time_calls(self, lane: Lane, load: Load, calls: Sequence[Call], phase: SpeedPhase, number: int) -> float:
        """Time one call, or all of them as one stream, and journal them; the seconds on the clock."""
        if not is_stream(self._plan, load):
            wall_s = self._time_call(lane, calls[0], phase, number)
            return max(0.0, finite(wall_s))
        scheduled = schedule(load, calls, run_seed(self._plan.seed), "stream", phase, number)
        in_flight = load if isinstance(load, int) else None
        launch = self._launch_id
        sent = [*time_stream(lane, scheduled, in_flight=in_flight, launch_id=launch, phase=phase, number=number)]
        if phase == "measure" and lane.replica == 0:
            for one in sent:
                if one.generation is not None:
                    self._keep(lane, one.call.requests[0], one.generation, number, one.sample.fault)
        for one in sent:
            self._writer.append(one.sample)
            self._call_s.append(one.sample.wall_s)
        return clocked_s(one.sample for one in sent)

    def _time_call(self, lane: Lane, call: Call, phase: SpeedPhase, number: int) -> float:
        """Time a call and journal it; the seconds on the clock. A probe is sampled the same way each time."""
        what, num_made = f"{lane.name}, call {call.id}", self._captures.num_made
        begin = partial(_begun, lane, call, 0 if phase == "probe" else number)
        if call.id in self._watched and is_watched(lane):
            begin = partial(self._begun_watched, lane, call)
        started_at, timing = self._captures.outside(phase, number, what, begin)
        in_graphs = phase == "probe" and self._captures.num_made > num_made
        self._write(lane, call, phase, number, started_at, timing, "graph made" if in_graphs else _fault(timing))
        return timing.wall_s

    def _begun_watched(self, lane: Lane, call: Call) -> tuple[str, Timing]:
        started_at = now_text()
        timing, tally = witnessed(lane, call)
        self._writer.append(witnessed_row(lane, call, "timed", self._launch_id, timing, tally))
        return started_at, timing

    def _witness(self, step: Witnessing) -> None:
        began_s = time.monotonic()
        for lane in step.lanes:
            timing, tally = witnessed(lane, step.call)
            self._writer.append(witnessed_row(lane, step.call, step.kind, self._launch_id, timing, tally))
        self._besides_s += time.monotonic() - began_s

    def _time_part(self, item: CostItem, phase: SpeedPhase, number: int) -> None:
        what = f"{item.part}, {item.batch_size} rows, {item.context_tokens} tokens"
        started_at, wall_s = self._captures.outside(phase, number, what, lambda: (now_text(), item.time(self._clock)))
        sample = CostSample(
            cell=item.cell,
            launch_id=self._launch_id,
            round=number,
            phase=phase,
            part=item.part,
            replica=0,
            batch_size=item.batch_size,
            context_tokens=item.context_tokens,
            block_size=item.block_size,
            num_repeats=item.num_repeats,
            wall_s=finite(wall_s),
            started_at=started_at,
        )
        self._writer.append(sample)

    def _keep(self, lane: Lane, request: Request, generation: Generation, number: int, fault: TimeFault | None) -> None:
        """Journal an answer; its time to finish is unknown if the clock went wrong."""
        kept = generation if fault is None else dataclasses.replace(generation, finish_s=None)
        self._writer.append(with_answer(_generation_row(lane, request, kept, number), lane.model))

    def _write(
        self,
        lane: Lane,
        call: Call,
        phase: SpeedPhase,
        number: int,
        started_at: str,
        timing: Timing,
        fault: TimeFault | None,
    ) -> None:
        # Generations first, so that a sample on disk implies its whole call.
        if phase == "measure" and lane.replica == 0 and self._plan.workload == "answer":
            for request, generation in zip(call.requests, timing.generations, strict=True):
                self._keep(lane, request, generation, number, fault)
        sample = SpeedSample(
            call_id=call.id,
            launch_id=self._launch_id,
            cell=lane.cell.id,
            replica=lane.replica,
            round=number,
            phase=phase,
            batch_size=len(call.requests),
            wall_s=finite(timing.wall_s),
            prefill_s=None if timing.prefill_s is None else finite(timing.prefill_s),
            first_output_s=finite(timing.first_output_s),
            peak_memory_bytes=timing.peak_memory_bytes,
            peak_memory_reason=timing.peak_memory_reason,
            started_at=started_at,
            prompts=tuple(
                prompt_timing(lane, generation, timing.wall_s, prompt_ids)
                for generation, prompt_ids in zip(timing.generations, lane.ids[call.id], strict=True)
            ),
            passes=timing.passes,
            cpu_s=timing.busy.cpu_s,
            caller_cpu_s=timing.busy.caller_cpu_s,
            off_clock_s=timing.busy.off_clock_s,
            fault=fault,
            held_out=phase == "probe" and not is_made_up(call),
            energy_j=timing.energy_j,
        )
        self._writer.append(sample)
        self._call_s.append(sample.wall_s)
        if self._parts and phase != "probe":  # predictions are of measured calls
            self._parts.note_call(lane, sample.passes)


def _begun(lane: Lane, call: Call, number: int) -> tuple[str, Timing]:
    """When the call started, and its timing."""
    return now_text(), lane.time(call, number)


def _fault(timing: Timing) -> TimeFault | None:
    finishes_s = (generation.finish_s for generation in timing.generations)
    moments_s = (timing.prefill_s, timing.first_output_s, *finishes_s)
    fault = time_fault(timing.wall_s, [moment for moment in moments_s if moment is not None])
    if fault is None and any(one.served and one.served.num_retries for one in timing.generations):
        return "retried"
    return fault or ("clock stood" if timing.is_stalled else None)


def _generation_row(lane: Lane, request: Request, generation: Generation, number: int) -> GenerationRow:
    return GenerationRow(
        cell=lane.cell.id,
        task=request.task,
        doc_id=request.doc_id,
        request_index=0,
        repeat=number,
        prompt_sha256=request.prompt_sha256,
        generation=generation,
    )
