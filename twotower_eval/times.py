"""What no clock can have given: times that make a timed call void. One rule for those who write and those who read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from twotower_eval.records import SpeedSample, TimeFault

LEAST_S = 1e-7  # no call takes less: reading a clock twice does not
SLACK_S = 1e-4  # how far outside its call rounding, or a coarse clock, may put a moment
WORDS: dict[TimeFault, str] = {
    "not finite": "not a finite time",
    "negative": "a negative time",
    "no time": "no time at all",
    "after the end": "a moment after the call's end",
    "graph made": "a CUDA graph made meanwhile",
    "clock stood": "too long a stop of the clock for its texts",
}


def time_fault(wall_s: float, moments_s: Sequence[float]) -> TimeFault | None:
    """What is wrong with a call's duration or with moments in it, in seconds from its start; ``None``: nothing."""
    if not all(map(math.isfinite, (wall_s, *moments_s))):
        return "not finite"
    if wall_s < 0 or min(moments_s, default=0.0) < -SLACK_S:
        return "negative"
    if wall_s < LEAST_S:
        return "no time"
    if max(moments_s, default=0.0) > wall_s + SLACK_S:
        return "after the end"
    return None


def fault_of(sample: SpeedSample) -> TimeFault | None:
    """What was wrong when the call was timed, or is wrong with what stands there now."""
    moments_s = (sample.prefill_s, sample.first_output_s, *(prompt.finish_s for prompt in sample.prompts))
    return sample.fault or time_fault(sample.wall_s, [moment for moment in moments_s if moment is not None])


def finite(seconds: float) -> float:
    """What JSON can hold of a time that is none."""
    return seconds if math.isfinite(seconds) else 0.0


def gone_by(walls_s: Iterable[float]) -> float:
    """Seconds that passed, of times some of which may be none."""
    return sum(wall_s for wall_s in walls_s if math.isfinite(wall_s) and wall_s > 0)


def void_text(num_timed: int, faults: Sequence[TimeFault]) -> str:
    """``3 of 80 timed calls are void (2 with a negative time, 1 with no time at all)``."""
    counted = ", ".join(f"{number} with {WORDS[fault]}" for fault, number in sorted(Counter(faults).items()))
    return f"{len(faults)} of {num_timed} timed calls are void ({counted})"
