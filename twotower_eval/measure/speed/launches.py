"""A run's launches: fresh processes, one after the other, into one run folder.

What a process happens to get (addresses, clocks, a neighbour on the machine) stays with it, so that rounds of one
launch are more alike than those of several. Every launch loads the models itself, warms up and measures its share of
the rounds, arms interleaved; no two run at once, so only one pair is in memory. A plan of one launch is timed in this
process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.measure.speed.loop import Launched
from twotower_eval.measure.speed.rounds import run_launch
from twotower_eval.measure.speed.workloads import Request
from twotower_eval.plan import SpeedPlan
from twotower_eval.plugin_calls import TRACEBACK_VARIABLE, is_own
from twotower_eval.progress import Progress, SilentProgress, choose_progress
from twotower_eval.records import Override

INTERRUPTED = 130
FAILED = 1  # Python's exit code of a process that an exception ended, behind its traceback
GRACE_S = 5.0  # for a launch to end by the Ctrl-C that it got itself, before it is sent one
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What a launch's process says before it ends: what it left, or the line that stopped it and its kind."""

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
    """Time both arms of a plan on prompts chosen from ``requests``, in all its launches; the run's folder.

    ``temperature`` holds where the plan names none; ``overrides`` say what of the tasks' wishes does not.
    ``resume`` goes on with a run on the same machine: whole rounds count, a torn one is begun anew, and so is a launch
    among several that was stopped. ``now`` gives seconds. Raises UserError for whatever the user can mend, in the
    words of the launch that met it, ChildProcessError where a launch was ended from outside, and RuntimeError where a
    bug ended it, whose traceback it has printed.
    """
    asked = tuple(requests)
    launch = partial(run_launch, plan, asked, root=root, now=now, temperature=temperature, overrides=tuple(overrides))
    if plan.launches == 1:
        return launch(resume=resume, progress=progress).path
    progress = progress or SilentProgress()
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
        told = _heard(ours)
        child.join()
    except KeyboardInterrupt:
        _interrupt(child)
        raise
    finally:
        ours.close()
    if child.exitcode == INTERRUPTED:
        raise KeyboardInterrupt
    if told is None and child.exitcode == FAILED:
        raise RuntimeError("a launch failed: its traceback is above")
    if told is None:
        raise ChildProcessError(
            f"a launch ended {_ending(child.exitcode)}: run the same command with --resume to make what is missing"
        )
    if told.launched is None:
        raise told.kind(told.error)
    return told.launched


def _heard(ours: Connection) -> _Told | None:
    """What the launch says; ``None`` where it ends without a word."""
    try:
        told: _Told = ours.recv()
    except EOFError:
        return None
    return told


def _ending(code: int | None) -> str:
    return f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"


def _interrupt(child: BaseProcess) -> None:
    """Let it close its journals: a terminal's Ctrl-C reaches every process of the command, a signal only its own."""
    child.join(GRACE_S)
    if child.is_alive() and child.pid is not None:
        os.kill(child.pid, signal.SIGINT)
    child.join()


def _launch(theirs: Connection, launch: Callable[..., Launched], is_silent: bool, parent: int) -> None:
    """What the fresh process does."""
    _end_with(parent)
    progress = SilentProgress() if is_silent else choose_progress()
    try:
        told = _Told(launched=launch(progress=progress))
    except (UserError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):  # which is lost with this process
            traceback.print_exc()
        told = _Told(error=str(error) or type(error).__name__, kind=_kind(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    theirs.send(told)
    theirs.close()


def _kind(error: UserError | OSError) -> type[UserError] | type[OSError]:
    """What it is raised as in the other process: a plug-in's own kind need not be known there, nor take one text."""
    if isinstance(error, OSError):
        return OSError
    return type(error) if is_own(type(error).__module__) else UserError


def _end_with(parent: int) -> None:
    """Where the system can: no launch goes on writing into a run whose command was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
