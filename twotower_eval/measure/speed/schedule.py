"""The rounds of a launch: warm-up, what is left to do, and how long it will take; which rounds are whole."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from math import ceil
from typing import Protocol

from twotower_eval.names import plural
from twotower_eval.plan import SpeedPlan
from twotower_eval.progress import Advance, Progress, duration_text
from twotower_eval.records import (
    MIN_LAUNCH_ROUNDS,
    MIN_LAUNCHES,
    TELLING_ROUNDS,
    CostSample,
    SpeedPhase,
    SpeedSample,
)
from twotower_eval.rules import clocked_s

ENOUGH_ROUNDS = 12  # in a single launch; with fewer, a fifth or more of all runs can decide nothing


class RoundSettings(Protocol):
    """The round settings of a plan."""

    @property
    def min_rounds(self) -> int: ...
    @property
    def min_seconds(self) -> float: ...
    @property
    def warmup_rounds(self) -> int: ...


class RoundLoop:
    """Base of the sessions. ``whole_s`` are the seconds on the clock of the rounds that exist already."""

    def __init__(
        self,
        settings: RoundSettings,
        progress: Progress,
        *,
        whole_s: Sequence[float],
        next_round: int,
        steps_per_round: int,
    ) -> None:
        self._settings, self._progress = settings, progress
        self._num_done, self._timed_s = len(whole_s), sum(whole_s)
        self._next_round, self._steps_per_round = next_round, steps_per_round
        self._besides_s = 0.0  # seconds of a round spent on what measured rounds do not have

    def _rounds(self) -> None:
        """Warm up, report the estimated duration, and measure until both minimums are reached; nothing if they are."""
        if not is_enough(self._settings, self._num_done, self._timed_s):
            self._measure(self._warm_up())

    def _num_steps(self, phase: SpeedPhase, num_rounds: int) -> int:
        """How often so many rounds from now on advance the progress."""
        return num_rounds * self._steps_per_round

    def _warm_up(self) -> float | None:
        """Duration of a round from the last warm-up, including everything around the clock."""
        duration_s = None
        with self._progress.track(self._num_steps("warmup", self._settings.warmup_rounds), "warm-up") as advance:
            for number in range(self._settings.warmup_rounds):
                began_s, self._besides_s = time.monotonic(), 0.0
                self._round("warmup", number, advance)
                duration_s = time.monotonic() - began_s - self._besides_s
        return duration_s

    def _measure(self, round_s: float | None) -> None:
        num_left = self._num_left(round_s)
        if round_s is not None:
            self._progress.note(self._estimate(num_left, round_s))
        self._forecast(num_left)
        with self._progress.track(self._num_steps("measure", num_left), "measure") as advance:
            while not is_enough(self._settings, self._num_done, self._timed_s):
                began_s = time.monotonic()
                self._timed_s += self._round("measure", self._next_round, advance)
                self._next_round += 1
                self._num_done += 1
                if round_s is None:  # without a warm-up the first round tells
                    round_s = time.monotonic() - began_s
                    self._progress.note(self._estimate(self._num_left(round_s), round_s))

    def _num_left(self, round_s: float | None) -> int:
        """How many rounds are left, where one takes so long."""
        num_left = max(0, self._settings.min_rounds - self._num_done)
        if round_s:
            num_left = max(num_left, round((self._settings.min_seconds - self._timed_s) / round_s))
        return num_left

    def _estimate(self, num_left: int, round_s: float) -> str:
        """The line on how long so many further rounds take, of which the last took ``round_s``."""
        return f"estimated duration: about {duration_text(num_left * round_s)} for {plural(num_left, 'round')}"

    def _forecast(self, num_left: int) -> None:
        """Report what that many more rounds cannot decide; nothing in sessions without verdicts."""

    def _round(self, phase: SpeedPhase, number: int, advance: Advance) -> float:
        """Time everything once; the seconds on the clock."""
        raise AssertionError(f"{type(self).__name__} says nothing about what a round times")


def is_enough(settings: RoundSettings, num_rounds: int, timed_s: float) -> bool:
    """Whether both the minimum rounds and the minimum seconds are reached."""
    return num_rounds >= settings.min_rounds and timed_s >= settings.min_seconds


def whole_rounds(samples: Sequence[SpeedSample] | Sequence[CostSample], samples_per_round: int) -> list[float]:
    """Seconds on the clock of every measured round that is complete."""
    return [seconds for launch in _by_launch(samples, samples_per_round) for seconds in launch]


def share_of_launch(plan: SpeedPlan) -> SpeedPlan:
    """The share of a plan that each launch has to reach, with at least as many rounds as can decide something."""
    if plan.launches == 1:
        return plan
    least = TELLING_ROUNDS if plan.launches < MIN_LAUNCHES else MIN_LAUNCH_ROUNDS
    rounds = max(least, ceil(plan.min_rounds / plan.launches))
    return dataclasses.replace(plan, min_rounds=rounds, min_seconds=plan.min_seconds / plan.launches)


def undecided_text(rounds_of_launches: Sequence[int]) -> str:
    """A warning that this many rounds per launch cannot, or often do not, decide a claim; empty if they do."""
    num_launches, num = len(rounds_of_launches), sum(rounds_of_launches)
    resampled = num_launches >= MIN_LAUNCHES
    enough = MIN_LAUNCH_ROUNDS * num_launches if resampled else max(ENOUGH_ROUNDS, TELLING_ROUNDS * num_launches)
    if num >= enough:
        return ""
    there = f"{plural(num, 'round')} in {plural(num_launches, 'launch', 'launches')}"
    needed = f"time {enough} or more (--min-rounds)"
    if not resampled and num < TELLING_ROUNDS * num_launches:
        return f"warning: {there} cannot decide a claim, with fewer than {TELLING_ROUNDS} per launch: {needed}"
    return f"warning: {there} often cannot decide a claim: {needed}"


def rounds_by_launch(samples: Sequence[SpeedSample], samples_per_round: int) -> list[int]:
    """Number of complete measured rounds per launch."""
    return [len(launch) for launch in _by_launch(samples, samples_per_round)]


def launches_missing(plan: SpeedPlan, samples: Sequence[SpeedSample], samples_per_round: int) -> int:
    """How many launches are still missing. An interrupted one keeps its rounds and is made again.

    A plan of one launch counts its rounds whatever launches they come from, so that a resumed run is enough.
    """
    by_launch = _by_launch(samples, samples_per_round)
    if plan.launches == 1:
        whole_s = [seconds for launch in by_launch for seconds in launch]
        return 0 if is_enough(plan, len(whole_s), sum(whole_s)) else 1
    share = share_of_launch(plan)
    return max(0, plan.launches - sum(is_enough(share, len(launch), sum(launch)) for launch in by_launch))


def _by_launch(samples: Sequence[SpeedSample] | Sequence[CostSample], samples_per_round: int) -> list[list[float]]:
    """Seconds of the complete measured rounds per launch."""
    rounds: dict[str, dict[int, list[SpeedSample | CostSample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.phase == "measure":
            rounds[sample.launch_id][sample.round].append(sample)
    return [[clocked_s(own) for own in launch.values() if len(own) == samples_per_round] for launch in rounds.values()]
