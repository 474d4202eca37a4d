"""Warm-up and rounds of one launch, whatever a round times: as many as the plan asks for, never a number twice.

A plan of several launches gives each its share of the rounds; how many are still to be made is told by the samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Protocol

from twotower_eval.plan import SpeedPlan
from twotower_eval.progress import Advance, Progress, duration_text
from twotower_eval.records import MIN_LAUNCH_ROUNDS, MIN_LAUNCHES, TELLING_ROUNDS, CostSample, SpeedPhase, SpeedSample
from twotower_eval.times import gone_by

ENOUGH_ROUNDS = 12  # of one launch; of fewer, a fifth and more of all runs can decide nothing


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What one launch leaves: the run's folder, and how many launches its plan still asks for."""

    path: Path
    num_missing: int


class HowLong(Protocol):
    """What a plan says of its rounds."""

    @property
    def min_rounds(self) -> int: ...
    @property
    def min_seconds(self) -> float: ...
    @property
    def warmup_rounds(self) -> int: ...


class RoundLoop:
    """Base of the sessions. ``whole_s`` are the seconds on the clock of the rounds that are there already."""

    def __init__(
        self, how_long: HowLong, progress: Progress, *, whole_s: Sequence[float], next_round: int, steps_per_round: int
    ) -> None:
        self._how_long, self._progress = how_long, progress
        self._num_done, self._timed_s = len(whole_s), sum(whole_s)
        self._next_round, self._steps_per_round = next_round, steps_per_round
        self._besides_s = 0.0  # that went by in a round on what measured ones do not have

    def _rounds(self) -> None:
        """Warm up, say how long it will take, and measure until there is enough; nothing where there is."""
        if not is_enough(self._how_long, self._num_done, self._timed_s):
            self._measure(self._warm_up())

    def _warm_up(self) -> float | None:
        """Duration of a round by the last warm-up, everything around the clock included."""
        duration_s = None
        with self._progress.track(self._how_long.warmup_rounds * self._steps_per_round, "warm-up") as advance:
            for number in range(self._how_long.warmup_rounds):
                began_s, self._besides_s = time.monotonic(), 0.0
                self._round("warmup", number, advance)
                duration_s = time.monotonic() - began_s - self._besides_s
        return duration_s

    def _measure(self, round_s: float | None) -> None:
        num_left = max(0, self._how_long.min_rounds - self._num_done)
        if round_s:
            num_left = max(num_left, round((self._how_long.min_seconds - self._timed_s) / round_s))
            self._progress.note(f"estimated duration: about {duration_text(num_left * round_s)} for {num_left} rounds")
        self._forecast(num_left)
        with self._progress.track(num_left * self._steps_per_round, "measure") as advance:
            while not is_enough(self._how_long, self._num_done, self._timed_s):
                self._timed_s += self._round("measure", self._next_round, advance)
                self._next_round += 1
                self._num_done += 1

    def _forecast(self, num_left: int) -> None:
        """Say what so many more rounds cannot tell; nothing where a session judges nothing."""

    def _round(self, phase: SpeedPhase, number: int, advance: Advance) -> float:
        """Time everything once; seconds on the clock."""
        raise AssertionError(f"{type(self).__name__} says nothing about what a round times")


def is_enough(how_long: HowLong, num_rounds: int, timed_s: float) -> bool:
    """Whether both the least number of rounds and the least time on the clock are reached."""
    return num_rounds >= how_long.min_rounds and timed_s >= how_long.min_seconds


def whole_rounds(samples: Sequence[SpeedSample] | Sequence[CostSample], samples_per_round: int) -> list[float]:
    """Seconds on the clock of every measured round that is complete."""
    return [seconds for launch in _by_launch(samples, samples_per_round) for seconds in launch]


def share_of_launch(plan: SpeedPlan) -> SpeedPlan:
    """What each of a plan's launches has to reach by itself: at least as many rounds as can tell something."""
    if plan.launches == 1:
        return plan
    least = TELLING_ROUNDS if plan.launches < MIN_LAUNCHES else MIN_LAUNCH_ROUNDS
    rounds = max(least, ceil(plan.min_rounds / plan.launches))
    return dataclasses.replace(plan, min_rounds=rounds, min_seconds=plan.min_seconds / plan.launches)


def undecided_text(rounds_of_launches: Sequence[int]) -> str:
    """A warning that so many rounds in each launch cannot decide a claim, or often do not; empty where they do."""
    num_launches, num = len(rounds_of_launches), sum(rounds_of_launches)
    resampled = num_launches >= MIN_LAUNCHES
    enough = MIN_LAUNCH_ROUNDS * num_launches if resampled else max(ENOUGH_ROUNDS, TELLING_ROUNDS * num_launches)
    if num >= enough:
        return ""
    there = f"{num} rounds in {num_launches} launch{'es' if num_launches > 1 else ''}"
    needed = f"time {enough} or more (--min-rounds)"
    if not resampled and num < TELLING_ROUNDS * num_launches:
        return f"warning: {there} cannot decide a claim, with fewer than {TELLING_ROUNDS} a launch: {needed}"
    return f"warning: {there} often cannot decide a claim: {needed}"


def rounds_by_launch(samples: Sequence[SpeedSample], samples_per_round: int) -> list[int]:
    """How many complete measured rounds every launch has."""
    return [len(launch) for launch in _by_launch(samples, samples_per_round)]


def launches_missing(plan: SpeedPlan, samples: Sequence[SpeedSample], samples_per_round: int) -> int:
    """How many launches are still to be made. One that was stopped short keeps its rounds and is made again.

    A plan of one launch asks for its rounds whatever launches they come from, so that a resumed run is enough.
    """
    by_launch = _by_launch(samples, samples_per_round)
    if plan.launches == 1:
        whole_s = [seconds for launch in by_launch for seconds in launch]
        return 0 if is_enough(plan, len(whole_s), sum(whole_s)) else 1
    share = share_of_launch(plan)
    return max(0, plan.launches - sum(is_enough(share, len(launch), sum(launch)) for launch in by_launch))


def _by_launch(samples: Sequence[SpeedSample] | Sequence[CostSample], samples_per_round: int) -> list[list[float]]:
    """Seconds of the complete measured rounds of every launch."""
    rounds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.phase == "measure":
            rounds[sample.launch_id][sample.round].append(sample.wall_s)
    return [
        [gone_by(walls_s) for walls_s in launch.values() if len(walls_s) == samples_per_round]
        for launch in rounds.values()
    ]
