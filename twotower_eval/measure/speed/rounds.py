"""The ``speed`` verb: what a launch needs is made ready, and the launch made (see ``session``)."""

from __future__ import annotations

import dataclasses
import time
import typing
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from twotower_eval import store
from twotower_eval.engine.models.protocol import Model
from twotower_eval.errors import UserError
from twotower_eval.measure.speed.best import looked_at
from twotower_eval.measure.speed.captures import Captures, graphs_for, hint, refuse_uneven
from twotower_eval.measure.speed.clock import CallClock, Devices, torch_threads
from twotower_eval.measure.speed.costs import Parts
from twotower_eval.measure.speed.lanes import Lane, make_lanes, without_decoders
from twotower_eval.measure.speed.loop import Launched, launches_missing, whole_rounds
from twotower_eval.measure.speed.session import Session, calls_per_round
from twotower_eval.measure.speed.unseen import Probes
from twotower_eval.measure.speed.workloads import Calls, Request, count_truncated, make_calls, scored_tasks
from twotower_eval.plan import SpeedPlan, baseline_folder, cross_decoders, model_folder
from twotower_eval.progress import Progress, SilentProgress
from twotower_eval.records import (
    Arm,
    CostSample,
    DecoderSpec,
    Override,
    RunManifest,
    SpeedSample,
    Ways,
    Witnessed,
    to_json,
)
from twotower_eval.shortfalls import asked_and_not_done, truncation_line
from twotower_eval.store.environment import new_manifest
from twotower_eval.ways import slower_lines

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
    seconds. Raises UserError for whatever the user can mend, before weights load where it can be known by then.
    """
    from twotower_eval.engine.models import family_calls
    from twotower_eval.engine.models.arms import prove_arms

    progress = progress or SilentProgress()
    held = dataclasses.replace(plan, temperature=temperature if plan.temperature is None else plan.temperature)
    specs = cross_decoders(held)
    calls = make_calls(plan, requests)
    if plan.cuda_graphs:
        refuse_uneven(plan.batch_sizes, _block_sizes(specs))
    devices = Devices(plan.devices)
    with torch_threads(plan.threads), family_calls(plan.family, plan.baseline_family):
        models = _load(plan)
        if said := hint(plan):
            progress.note(said)
        clock = CallClock(devices, now)
        lanes = make_lanes(held, calls, requests, specs, models, clock)
        ways = prove_arms(models, lambda model: _longest(calls, lanes))
        parts = Parts(calls, lanes, models) if plan.costs else None
        graphs = graphs_for(plan, calls, lanes, models)
        manifest = _manifest(plan, calls, [*chain.from_iterable(lanes.values())], overrides, ways, models, resume)
        if resume is not None and _is_scored(plan, resume, manifest, calls_per_round(calls, lanes)):
            # Whoever scored it checks the scores before the run is called complete again.
            return Launched(path=resume, num_missing=0)
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
            session = Session(plan, writer, launch_id, calls, idle, probes, parts, clock, captures, progress)
            num_missing = session.run()
            if not num_missing:
                writer.finish()
    return Launched(path=writer.path, num_missing=num_missing)


def _block_sizes(specs: Sequence[DecoderSpec]) -> list[int]:
    return [size for spec in specs if isinstance(size := spec.params.get("block_size"), int)]


def _load(plan: SpeedPlan) -> tuple[Model, Model]:
    from twotower_eval.engine.models.arms import load_arms

    return load_arms(
        model_folder(plan),
        baseline_folder(plan),
        dtype=plan.dtype,
        devices=plan.devices,
        cuda_graphs=plan.cuda_graphs,
        family=plan.family,
        baseline_family=plan.baseline_family,
    )


def _truncated(plan: SpeedPlan, writer: store.RunWriter, calls: Calls, models: tuple[Model, Model]) -> list[str]:
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


def _is_scored(plan: SpeedPlan, resume: Path, manifest: RunManifest, calls_per_round: int) -> bool:
    """Whether a run's answers are scored. UserError where more rounds are wanted then: scores would leave them out.

    Besides, what is added after a look at the result is another run (PROTOCOL); reports pool runs of the same cells.
    """
    found = store.load(resume)
    store.check_comparable(found, manifest)  # first: what is whole cannot be counted by another plan
    if found.scores and launches_missing(plan, found.speed, calls_per_round):
        num_whole = len(whole_rounds(found.speed, calls_per_round))
        raise UserError(
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
    models: Sequence[Model],
    resume: Path | None,
) -> RunManifest:
    from twotower_eval.engine.models.identity import unheeded_settings

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
    timed: list[SpeedSample | CostSample | Witnessed] = [*run.speed, *run.costs, *run.witnessed]
    return f"{run.manifest.run_id}/{len({sample.launch_id for sample in timed}) + 1}"
