"""The ``speed`` verb: warm-up, then interleaved rounds in which every lane times every call of its batch size.

A round takes the calls in shuffled order, and for each call the lanes in shuffled order, so that whatever drifts hits
all alike and paired calls lie close in time. Rounds never repeat a number, not even after an interruption: a launch
that goes on leaves the torn round behind and begins a new one.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import secrets
import time
import typing
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from twotower_eval import store
from twotower_eval.environment import new_manifest
from twotower_eval.journal import now_text
from twotower_eval.plan import CONTEXT_TOWER, SpeedPlan, cross_decoders, model_folder
from twotower_eval.progress import Advance, Progress, SilentProgress, duration_text
from twotower_eval.records import (
    Arm,
    CostSample,
    DecoderSpec,
    Generation,
    GenerationRow,
    Override,
    PromptTiming,
    RunManifest,
    SpeedPhase,
    SpeedSample,
    TimeFault,
    Ways,
    canonical_json,
    derive_seed,
    sha256_text,
    to_json,
)
from twotower_eval.shortfalls import asked_and_not_done, truncation_line
from twotower_eval.speed.best import looked_at
from twotower_eval.speed.captures import Captures, graphs_for, hint, refuse_uneven
from twotower_eval.speed.clock import CallClock, Devices, torch_threads
from twotower_eval.speed.costs import CostItem, Parts
from twotower_eval.speed.lanes import Lane, Timing, make_lanes, with_decoders, without_decoders
from twotower_eval.speed.loop import Launched, RoundLoop, launches_missing, share_of_launch, whole_rounds
from twotower_eval.speed.unseen import Probe, Probes
from twotower_eval.speed.workloads import Call, Calls, Request, count_truncated, make_calls, scored_tasks
from twotower_eval.times import finite, gone_by, time_fault
from twotower_eval.ways import slower_lines

PROCESS = secrets.token_hex(8)  # this process: launches that it makes one after the other are no separate ones
NOTES = (
    "Timed answers of the measured rounds are journalled, the round as the sample's number; warm-ups and the second "
    "copy of the baseline leave their counts and the hash of their tokens only.",
    "Peak memory is that of the process on the cell's devices: weights of both arms that lie there are in it.",
)


def run_launch(
    plan: SpeedPlan,
    requests: Sequence[Request],
    *,
    root: Path,
    resume: Path | None = None,
    progress: Progress | None = None,
    now: Callable[[], float] = time.perf_counter,
    temperature: float = 0.0,
    overrides: Sequence[Override] = (),
) -> Launched:
    """Time both arms of a plan, for one launch, on prompts chosen from ``requests``; the last one closes the run.

    ``temperature`` holds where the plan names none; ``overrides`` say what of the tasks' wishes does not.
    ``resume`` goes on with a run on the same machine: whole rounds count, a torn one is begun anew. ``now`` gives
    seconds. Raises ValueError for whatever the user can mend, before weights load where it can be known by then.
    """
    from twotower_eval.models.arms import prove_arms

    progress = progress or SilentProgress()
    held = dataclasses.replace(plan, temperature=temperature if plan.temperature is None else plan.temperature)
    specs = cross_decoders(held)
    calls = make_calls(plan, requests)
    if plan.cuda_graphs:
        refuse_uneven(plan.batch_sizes, _block_sizes(specs))
    devices = Devices(plan.devices)
    with torch_threads(plan.threads):
        models = _load(plan)
        if said := hint(plan):
            progress.note(said)
        clock = CallClock(devices, now)
        lanes = make_lanes(held, calls, requests, specs, models, clock)
        ways = prove_arms(models, lambda model: _longest(calls, lanes))
        parts = Parts(calls, lanes, models) if plan.costs else None
        graphs = graphs_for(plan, calls, lanes, models)
        manifest = _manifest(plan, calls, [*chain.from_iterable(lanes.values())], overrides, ways, models, resume)
        if resume is not None and _is_scored(plan, resume, manifest, _calls_per_round(calls, lanes)):
            return Launched(
                path=resume, num_missing=0
            )  # whoever scored it checks the scores before the run is called complete again
        with store.create(root, manifest) if resume is None else store.resume(resume, manifest) as writer:
            truncated = _truncated(plan, writer, calls, models)
            warnings = [f"warning: {text}" for text in (*writer.warnings, *asked_and_not_done(manifest), *truncated)]
            for line in (*warnings, *slower_lines(manifest)):
                progress.note(line)
            if plan.costs:
                for best in looked_at(lanes, calls, models[0], clock, cuda_graphs=plan.cuda_graphs):
                    writer.event("baseline_best", **to_json(best))
            launch_id = _launch_id(writer.run)
            probes = Probes(held, calls, requests, models, launch_id)
            idle, captures = without_decoders(lanes), Captures(graphs, writer)
            session = _Session(plan, writer, launch_id, calls, idle, probes, parts, clock, captures, progress)
            num_missing = session.run()
            if not num_missing:
                writer.finish()
    return Launched(path=writer.path, num_missing=num_missing)


def _block_sizes(specs: Sequence[DecoderSpec]) -> list[int]:
    return [size for spec in specs if isinstance(size := spec.params.get("block_size"), int)]


def _load(plan: SpeedPlan) -> tuple[Any, Any]:
    from twotower_eval.models.arms import load_arms

    baseline = None if plan.baseline == CONTEXT_TOWER else Path(plan.baseline)
    return load_arms(model_folder(plan), baseline, dtype=plan.dtype, devices=plan.devices, cuda_graphs=plan.cuda_graphs)


def _truncated(plan: SpeedPlan, writer: store.RunWriter, calls: Calls, models: tuple[Any, Any]) -> list[str]:
    """Write down for every cell how many prompts were cut, which a resumed run has already; the warnings of it."""
    lines = []
    for arm, model in zip(typing.get_args(Arm), models, strict=True):
        for task, (num_prompts, num_truncated) in count_truncated(plan, calls, model).items():
            numbers = {"num_requests": num_prompts, "num_truncated": num_truncated}
            if not any(event["kind"] == "truncated" for event in writer.run.events):
                for cell in (cell for cell in writer.run.manifest.cells if cell.arm == arm):
                    writer.event("truncated", cell=cell.id, task=task, **numbers)
            if num_truncated:
                lines.append(truncation_line(task, arm, num_prompts, num_truncated))
    return lines


def _longest(calls: Calls, lanes: dict[int, tuple[Lane, ...]]) -> int:
    """Tokens of the longest context of any lane, its budget behind it."""
    rows = (ids for of_size in lanes.values() for lane in of_size for own in lane.ids.values() for ids in own)
    return max(map(len, rows)) + max(call.max_new_tokens for of_size in calls.values() for call in of_size)


def _calls_per_round(calls: Calls, lanes: dict[int, tuple[Lane, ...]]) -> int:
    return sum(len(calls[size]) * len(lanes[size]) for size in calls)


def _is_scored(plan: SpeedPlan, resume: Path, manifest: RunManifest, calls_per_round: int) -> bool:
    """Whether a run's answers are scored. ValueError where more rounds are wanted then: scores would leave them out.

    Besides, what is added after a look at the result is another run (PROTOCOL); reports pool runs of the same cells.
    """
    found = store.load(resume)
    store.check_comparable(found, manifest)  # first: what is whole cannot be counted by another plan
    if found.scores and launches_missing(plan, found.speed, calls_per_round):
        num_whole = len(whole_rounds(found.speed, calls_per_round))
        raise ValueError(
            f"{found.path} has {num_whole} rounds whose answers are scored already: time more rounds in a new run, "
            "without --resume; reports take both together"
        )
    return bool(found.scores)


def _manifest(
    plan: SpeedPlan,
    calls: Calls,
    lanes: Sequence[Lane],
    overrides: Sequence[Override],
    ways: Sequence[Ways],
    models: Sequence[Any],
    resume: Path | None,
) -> RunManifest:
    from twotower_eval.models.identity import unheeded_settings

    return new_manifest(
        "speed",
        run_id=store.new_run_id("speed") if resume is None else resume.name,
        plan=plan,
        cells=[lane.cell for lane in lanes if lane.replica == 0],
        devices=plan.devices,
        seeds={"run": plan.seed},
        notes=NOTES,
        tasks=scored_tasks(plan, chain.from_iterable(calls.values())),
        overrides=overrides,
        unheeded=unheeded_settings(models),
        ways=ways,
    )


def _launch_id(run: store.Run) -> str:
    timed: list[SpeedSample | CostSample] = [*run.speed, *run.costs]
    return f"{run.manifest.run_id}/{len({sample.launch_id for sample in timed}) + 1}"


class _Session(RoundLoop):
    """One launch: its warm-up and its rounds."""

    def __init__(
        self,
        plan: SpeedPlan,
        writer: store.RunWriter,
        launch_id: str,
        calls: Calls,
        lanes: dict[int, tuple[Lane, ...]],
        probes: Probes,
        parts: Parts | None,
        clock: CallClock,
        captures: Captures,
        progress: Progress,
    ) -> None:
        self._plan, self._writer, self._calls, self._lanes = plan, writer, calls, lanes
        self._launch_id, self._probes = launch_id, probes
        self._parts, self._clock, self._captures = parts, clock, captures
        earlier = writer.run.speed
        timed: list[SpeedSample | CostSample] = [*earlier, *writer.run.costs]
        self._calls_per_round = _calls_per_round(calls, lanes)
        begun = [s.round for s in timed if s.phase == "measure"] + [row.repeat for row in writer.run.generations]
        # A launch among several has its own rounds to reach; one that goes on where another stopped has what is left.
        whole_s = whole_rounds(earlier, self._calls_per_round)
        self._num_missing = launches_missing(plan, earlier, self._calls_per_round)
        super().__init__(
            share_of_launch(plan),
            progress,
            whole_s=whole_s if plan.launches == 1 else [],
            next_round=1 + max(begun, default=-1),
            steps_per_round=self._calls_per_round + probes.num_timings(lanes),
        )

    def run(self) -> int:
        """Warm up, say how long it will take, and measure until there is enough; how many launches are missing then."""
        self._announce()
        if self._num_missing:
            self._writer.event("launched", launch=self._launch_id, process=PROCESS)
            self._rounds()
        rounds = f"{self._num_done} rounds of {self._calls_per_round} timed calls"
        self._progress.note(f"{rounds}, {duration_text(self._timed_s)} on the clock")
        num_missing = max(0, self._num_missing - 1)
        self._writer.event("measured", num_rounds=self._num_done, timed_s=self._timed_s, num_missing=num_missing)
        return num_missing

    def _announce(self) -> None:
        sizes = ", ".join(map(str, self._lanes))
        num_lanes = sum(map(len, self._lanes.values()))
        num_prompts = sum(len(call.requests) for call in next(iter(self._calls.values())))
        num_cells = sum(lane.replica == 0 for lanes in self._lanes.values() for lane in lanes)
        self._progress.note(
            f"{num_cells} cells and {num_lanes - num_cells} copies of the baseline, {self._plan.workload} workload, "
            f"batch sizes {sizes}; {num_prompts} prompts, {self._calls_per_round} timed calls a round"
        )
        if self._num_done:
            self._progress.note(f"{self._num_done} whole rounds are there already")

    def _round(self, phase: SpeedPhase, number: int, advance: Advance) -> float:
        """Every lane times every call, and every part is timed alone; seconds on the clock, without the parts.

        Parts that a call of this round is the first to need are timed at its end.
        """
        order = random.Random(derive_seed(self._plan.seed, phase, number))
        gc.collect()
        lanes = with_decoders(self._lanes, self._clock)
        positions = [(size, call) for size, calls in self._calls.items() for call in calls]
        probes = self._probes.of_round(lanes) if phase == "measure" else []
        steps: list[tuple[int, Call] | Probe | CostItem] = [
            *positions,
            *probes,
            *(self._parts.items if self._parts else ()),
        ]
        order.shuffle(steps)
        walls_s = []
        for step in steps:
            if isinstance(step, CostItem):
                self._time_part(step, phase, number)
            elif isinstance(step, Probe):
                for lane in step.lanes:
                    self._time_call(lane, step.call, "probe", number)
                    advance()
            else:
                size, call = step
                for lane in order.sample(lanes[size], len(lanes[size])):
                    walls_s.append(self._time_call(lane, call, phase, number))
                    advance()
        for item in self._parts.new() if self._parts else ():
            self._time_part(item, phase, number)
        return gone_by(walls_s)

    def _time_call(self, lane: Lane, call: Call, phase: SpeedPhase, number: int) -> float:
        """Time a call, write it down; seconds on the clock. A probe is sampled the same way whenever it is timed."""
        what, num_made = f"{lane.name}, call {call.id}", self._captures.num_made
        begin = partial(_begun, lane, call, 0 if phase == "probe" else number)
        started_at, timing = self._captures.outside(phase, number, what, begin)
        in_graphs = phase == "probe" and self._captures.num_made > num_made
        self._write(lane, call, phase, number, started_at, timing, "graph made" if in_graphs else _fault(timing))
        return timing.wall_s

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
        # Generations first: a sample on disk then means that all of its call is.
        if phase == "measure" and lane.replica == 0 and self._plan.workload == "answer":
            for request, generation in zip(call.requests, timing.generations, strict=True):
                # When it was finished cannot be told where the clock went wrong.
                kept = generation if fault is None else dataclasses.replace(generation, finish_s=None)
                self._writer.append(_generation_row(lane, request, kept, number))
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
            prompts=tuple(_prompt_timing(generation, timing.wall_s) for generation in timing.generations),
            passes=timing.passes,
            cpu_s=timing.busy.cpu_s,
            caller_cpu_s=timing.busy.caller_cpu_s,
            off_clock_s=timing.busy.off_clock_s,
            fault=fault,
        )
        self._writer.append(sample)
        if self._parts and phase != "probe":  # what is predicted are the measured calls
            self._parts.saw(lane, sample.passes)


def _begun(lane: Lane, call: Call, number: int) -> tuple[str, Timing]:
    """When the call began, and its timing."""
    return now_text(), lane.time(call, number)


def _fault(timing: Timing) -> TimeFault | None:
    finishes_s = (generation.finish_s for generation in timing.generations)
    moments_s = (timing.prefill_s, timing.first_output_s, *finishes_s)
    return time_fault(timing.wall_s, [moment for moment in moments_s if moment is not None])


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


def _prompt_timing(generation: Generation, wall_s: float) -> PromptTiming:
    """A decoder that does not say when a prompt was finished hands it over at the end of the call."""
    return PromptTiming(
        prompt_id=generation.prompt_id,
        num_prompt_tokens=generation.num_prompt_tokens,
        num_tokens=generation.num_tokens,
        num_discarded_tokens=generation.num_discarded_tokens,
        num_context_forwards=generation.num_context_forwards,
        num_denoiser_forwards=generation.num_denoiser_forwards,
        num_forced_commits=generation.num_forced_commits,
        finish=generation.finish,
        finish_s=_finish_s(generation, finite(wall_s)),
        tokens_sha256=sha256_text(canonical_json(list(generation.token_ids))),
    )


def _finish_s(generation: Generation, wall_s: float) -> float:
    """Within the call, as the decoder's clock may have begun a hair before or ended behind the harness's."""
    return wall_s if generation.finish_s is None else max(0.0, min(finite(generation.finish_s), wall_s))
