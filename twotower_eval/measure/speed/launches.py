"""The ``speed`` verb: the launches of a run, fresh processes one after the other that write into one run folder."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from twotower_eval import store
from twotower_eval.decoder_settings import baseline_spec, cross_decoders
from twotower_eval.engine.models.chat import ArmChat, arm_chats, attach_formats, chat_uses
from twotower_eval.engine.models.protocol import Model, remote
from twotower_eval.errors import UserError
from twotower_eval.measure.chosen import without_auto
from twotower_eval.measure.speed.clock import CallClock, Devices, torch_threads
from twotower_eval.measure.speed.conditions import (
    Captures,
    compiling,
    graphs_for,
    hint,
    measured_conditions,
    refuse_uneven,
)
from twotower_eval.measure.speed.costs import TimedParts
from twotower_eval.measure.speed.lanes import Lane, make_lanes, without_decoders
from twotower_eval.measure.speed.probes import Probes
from twotower_eval.measure.speed.schedule import launches_missing, whole_rounds
from twotower_eval.measure.speed.session import Launched, Session, calls_per_round
from twotower_eval.measure.speed.workloads import (
    Calls,
    Load,
    Request,
    count_truncated,
    make_calls,
    scored_tasks,
    untimed_tasks_text,
)
from twotower_eval.plan import SpeedPlan, devices_of, each_baseline
from twotower_eval.plan_chat import chat_options
from twotower_eval.plan_sources import arm_sources, baseline_source, chat_sources, model_source
from twotower_eval.plugin_calls import TRACEBACK_VARIABLE, is_own
from twotower_eval.progress import Progress, SilentProgress, choose_progress
from twotower_eval.records import (
    Arm,
    ChatUse,
    CostSample,
    DecoderSpec,
    Override,
    Retried,
    RunManifest,
    SpeedSample,
    Ways,
    Witnessed,
    launch_id_of,
    to_json,
)
from twotower_eval.rules import (
    asked_and_not_done,
    chat_facts,
    chat_lines,
    chosen_lines,
    retried_line,
    slower_lines,
    truncation_line,
)
from twotower_eval.store.environment import new_manifest
from twotower_eval.task_options import recorded_seeds

if TYPE_CHECKING:
    from twotower_eval.engine.models.arms import Loaded

NOTES = (
    "Timed answers of the measured rounds are journalled, the round as the sample's number; warm-ups and the second "
    "copy of the baseline leave their counts and the hash of their tokens only.",
    "Peak memory is that of the process on the cell's devices: weights of both arms that lie there are in it.",
)
SERVED_NOTE = (
    "A batch is so many requests sent together to a server; the call ends with the last answer. Prompts repeat from "
    "round to round: a server that caches prefixes reads them faster than new ones, and the probes show by how much."
)
STREAM_NOTE = (
    "All prompts of a round are sent to a server as one stream of requests, each asked once and timed from when it was "
    "due. Prompts repeat from round to round: a server that caches prefixes reads them faster than new ones, and the "
    "probes show by how much."
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
    """Time both arms of a plan, in one launch, on prompts chosen from ``requests``; the last launch closes the run.

    ``temperature`` applies if the plan names none; ``overrides`` are the task settings that it overrides. ``resume``
    continues a run on the same machine: whole rounds count, a torn one is repeated. ``now`` gives seconds. UserError
    for whatever the user can mend, before weights are loaded where possible.
    """
    from twotower_eval.engine.models import family_calls
    from twotower_eval.engine.models.arms import prove_arms

    began_s, progress = time.monotonic(), progress or SilentProgress()
    plan, chosen = without_auto(plan)
    held = dataclasses.replace(plan, temperature=temperature if plan.temperature is None else plan.temperature)
    specs = cross_decoders(held)
    for single in each_baseline(held):
        baseline_spec(single)  # a slip in it is found before weights are loaded
    calls = make_calls(plan, requests)
    if plan.cuda_graphs:
        refuse_uneven(plan.batch_sizes, _block_sizes(specs))
    devices = Devices(devices_of(plan))
    chats, uses = _chats(plan, requests)
    with torch_threads(plan.threads), family_calls(*arm_sources(plan)):
        models = _load(plan)
        attach_formats(models, chats, [request.text for request in requests])
        if text := hint(plan):
            progress.note(text)
        clock = CallClock(devices, now)
        lanes = make_lanes(held, calls, requests, specs, models, clock)
        ways = prove_arms(models, lambda model: _longest(calls, lanes))
        parts = TimedParts(calls, lanes) if plan.costs else None
        graphs = graphs_for(plan, calls, lanes, models)
        manifest = _manifest(plan, calls, [*chain.from_iterable(lanes.values())], overrides, ways, models, resume)
        manifest = dataclasses.replace(manifest, chosen=chosen, chats=uses)
        if resume is not None and _is_scored(plan, resume, manifest, calls_per_round(calls, lanes)):
            # Its scores are checked before the run is complete again.
            return Launched(path=resume, num_missing=0)
        with store.create(root, manifest) if resume is None else store.resume(resume, manifest) as writer:
            for line in _said(writer, manifest, _truncated(plan, writer, calls, lanes)):
                progress.note(line)
            if plan.costs:
                for best in measured_conditions(lanes, calls, clock, cuda_graphs=plan.cuda_graphs):
                    writer.event("baseline_best", **to_json(best))
            _hear_retries(lanes, writer, progress)
            probes = Probes(held, calls, requests, launch_id := _launch_id(writer.run))
            idle, captures = without_decoders(lanes), Captures(graphs, writer, compiling(models))
            session = Session(plan, writer, launch_id, calls, idle, probes, parts, clock, captures, progress, began_s)
            num_missing = session.run()
            if not num_missing:
                writer.finish()
    return Launched(path=writer.path, num_missing=num_missing)


def _chats(plan: SpeedPlan, requests: Sequence[Request]) -> tuple[tuple[ArmChat, ...], tuple[ChatUse, ...] | None]:
    """In what format each model reads prompts. UserError if a chat template fails on one of them."""
    chats = arm_chats(chat_sources(plan), chat_options(plan))
    texts = [request.text for request in requests]
    return chats, chat_uses(chats, texts, generates=plan.workload == "answer")


def _said(writer: store.RunWriter, manifest: RunManifest, truncated: Sequence[str]) -> list[str]:
    """What is said before the first call: warnings, and how each model is run and asked."""
    found = (*writer.warnings, *asked_and_not_done(manifest), *chat_lines(manifest), *truncated)
    warnings = [f"warning: {text}" for text in found]
    return [*chosen_lines(manifest), *warnings, *slower_lines(manifest), *chat_facts(manifest)]


def _hear_retries(lanes: Mapping[Load, Sequence[Lane]], writer: store.RunWriter, progress: Progress) -> None:
    """Journal every request to a server that failed and is asked again; say so once for each model."""
    told: set[str] = set()

    def heard(who: str, retried: Retried) -> None:
        writer.event("retried", who=who, **to_json(retried))
        if who not in told:
            told.add(who)
            progress.note(f"warning: {retried_line(who, retried)}")

    for lane in chain.from_iterable(lanes.values()):
        if (served := remote(lane.untimed)) is not None:
            served.on_retry = partial(heard, lane.cell.who)


def _block_sizes(specs: Sequence[DecoderSpec]) -> list[int]:
    return [size for spec in specs if isinstance(size := spec.params.get("block_size"), int)]


def _load(plan: SpeedPlan) -> tuple[Model, ...]:
    """The model of every baseline, then the candidate's; a checkpoint that several have is loaded once."""
    loaded: Loaded = {}
    pairs = [_load_pair(single, loaded) for single in each_baseline(plan)]
    return (*(baseline for baseline, _ in pairs), pairs[0][1])


def _load_pair(plan: SpeedPlan, loaded: Loaded) -> tuple[Model, Model]:
    from twotower_eval.engine.models.arms import load_arms

    return load_arms(
        model_source(plan),
        baseline_source(plan),
        dtype=plan.dtype,
        devices=plan.devices,
        baseline_dtype=plan.baseline_dtype,
        baseline_device=plan.baseline_device,
        cuda_graphs=plan.cuda_graphs,
        family=plan.family,
        baseline_family=plan.baseline_family,
        loaded=loaded,
        tokenizer=plan.tokenizer,
        request_timeout=plan.request_timeout,
        chat=bool(plan.apply_chat_template),
    )


def _truncated(
    plan: SpeedPlan, writer: store.RunWriter, calls: Calls, lanes: Mapping[Load, Sequence[Lane]]
) -> list[str]:
    """Journal for every cell how many prompts were truncated, unless a resumed run has it already; the warnings of
    it."""
    whose: dict[str, tuple[Arm, Model]] = {}
    for lane in chain.from_iterable(lanes.values()):
        whose.setdefault(lane.cell.who, (lane.cell.arm, lane.untimed))
    known = any(event["kind"] == "truncated" for event in writer.run.events)
    lines = []
    for who, (arm, model) in whose.items():
        for task, (num_prompts, num_truncated) in count_truncated(plan, calls, model).items():
            numbers = {"num_requests": num_prompts, "num_truncated": num_truncated}
            for cell in writer.run.manifest.cells if not known else ():
                if cell.who == who:
                    writer.event("truncated", cell=cell.id, task=task, **numbers)
            if num_truncated:
                lines.append(truncation_line(task, arm, num_prompts, num_truncated))
    return list(dict.fromkeys(lines))


def _longest(calls: Calls, lanes: dict[Load, tuple[Lane, ...]]) -> int:
    """Tokens of the longest context of any lane, with its budget."""
    rows = (ids for of_size in lanes.values() for lane in of_size for own in lane.ids.values() for ids in own)
    return max(map(len, rows)) + max(call.max_new_tokens for of_size in calls.values() for call in of_size)


def _is_scored(plan: SpeedPlan, resume: Path, manifest: RunManifest, calls_per_round: int) -> bool:
    """Whether a run's answers are scored. UserError if more rounds are wanted then, as scores would leave them out.

    Rounds added after a look at the result belong to another run; reports pool runs of the same cells.
    """
    found = store.load(resume)
    store.check_comparable(found, manifest)  # first: another plan counts whole rounds differently
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
        devices=devices_of(plan),
        seeds={"run": plan.seed} if isinstance(plan.seed, int) else recorded_seeds(plan.seed),
        notes=(*NOTES, *_served_notes(lanes)),
        tasks=scored_tasks(plan, chain.from_iterable(calls.values())),
        overrides=overrides,
        unheeded=unheeded_settings(models),
        ways=ways,
    )


def _served_notes(lanes: Sequence[Lane]) -> list[str]:
    """How models behind servers are timed, for each way in which they are."""
    streams = {lane.cell.workload.requests is not None for lane in lanes if lane.cell.checkpoint.served}
    return [STREAM_NOTE if is_stream else SERVED_NOTE for is_stream in sorted(streams)]


def _launch_id(run: store.Run) -> str:
    timed: list[SpeedSample | CostSample | Witnessed] = [*run.speed, *run.costs, *run.witnessed]
    return launch_id_of(run.manifest.run_id, len({sample.launch_id for sample in timed}) + 1)


INTERRUPTED = 130
FAILED = 1  # Python's exit code after an uncaught exception
GRACE_S = 5.0  # wait this long for a launch to end by its own Ctrl-C before sending one
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, kw_only=True)
class _LaunchResult:
    """How a launch ended: its result, or the error line and its class."""

    launched: Launched | None = None
    error: str = ""
    kind: type[UserError] | type[OSError] = UserError


def run(
    plan: SpeedPlan,
    requests: Sequence[Request],
    *,
    root: Path,
    resume: Path | None = None,
    progress: Progress | None = None,
    now: Callable[[], float] = time.perf_counter,
    temperature: float = 0.0,
    overrides: Sequence[Override] = (),
) -> Path:
    """Time both arms of a plan on prompts chosen from ``requests``, in all launches; the run's folder.

    ``temperature`` applies if the plan names none; ``overrides`` are the task settings that it overrides. ``resume``
    continues a run on the same machine: whole rounds count, a torn one is repeated, and so is an interrupted launch of
    several. ``now`` gives seconds. UserError for whatever the user can mend, with the launch's own message;
    ChildProcessError if a launch was ended from outside; RuntimeError if a bug ended it, after its traceback.
    """
    asked = tuple(requests)
    progress = progress or SilentProgress()
    if text := untimed_tasks_text(plan, asked):
        progress.note(text)
    launch = partial(run_launch, plan, asked, root=root, now=now, temperature=temperature, overrides=tuple(overrides))
    if plan.launches == 1:
        return launch(resume=resume, progress=progress).path
    is_silent = isinstance(progress, SilentProgress)
    num_missing = plan.launches
    while True:
        if resume is None or num_missing < plan.launches:
            progress.note(f"launch {plan.launches - num_missing + 1} of {plan.launches}")
        done = _in_process(partial(launch, resume=resume), is_silent)
        if not done.num_missing:
            return done.path
        resume, num_missing = done.path, done.num_missing


def _in_process(launch: Callable[..., Launched], is_silent: bool) -> Launched:
    """One launch in a fresh process that shares nothing with this one."""
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe(duplex=False)
    child = fresh.Process(target=_launch, args=(theirs, launch, is_silent, os.getpid()))
    child.start()
    theirs.close()
    try:
        result = _receive(ours)
        child.join()
    except KeyboardInterrupt:
        _interrupt(child)
        raise
    finally:
        ours.close()
    if child.exitcode == INTERRUPTED:
        raise KeyboardInterrupt
    if result is None and child.exitcode == FAILED:
        raise RuntimeError("a launch failed: its traceback is above")
    if result is None:
        raise ChildProcessError(
            f"a launch ended {_ending(child.exitcode)}: run the same command with --resume to make what is missing"
        )
    if result.launched is None:
        raise result.kind(result.error)
    return result.launched


def _receive(ours: Connection) -> _LaunchResult | None:
    """The launch's result; ``None`` if it ends without one."""
    try:
        result: _LaunchResult = ours.recv()
    except EOFError:
        return None
    return result


def _ending(code: int | None) -> str:
    return f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"


def _interrupt(child: BaseProcess) -> None:
    """Interrupt a launch so that it closes its journals: Ctrl-C reaches every process of the command, a signal only its
    own."""
    child.join(GRACE_S)
    if child.is_alive() and child.pid is not None:
        os.kill(child.pid, signal.SIGINT)
    child.join()


def _launch(theirs: Connection, launch: Callable[..., Launched], is_silent: bool, parent: int) -> None:
    """The fresh process's entry point."""
    _end_with(parent)
    progress = SilentProgress() if is_silent else choose_progress()
    try:
        result = _LaunchResult(launched=launch(progress=progress))
    except (UserError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):  # the exception itself is lost with this process
            traceback.print_exc()
        result = _LaunchResult(error=str(error) or type(error).__name__, kind=_kind(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    theirs.send(result)
    theirs.close()


def _kind(error: UserError | OSError) -> type[UserError] | type[OSError]:
    """The class to raise in the other process: a plug-in's own class may be unknown there, or not take one text."""
    if isinstance(error, OSError):
        return OSError
    return type(error) if is_own(type(error).__module__) else UserError


def _end_with(parent: int) -> None:
    """End this process with its parent where the system supports it: no launch outlives its command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
