"""Whether a prompt seen before takes as long as a new one: the probes of timed rounds, compared two ways.

The very same prompt, in one arm: how long it took when nothing had read it before, over how long it took in a later
round of the same launch. What both arms share of the difference between two rounds is told by the other arm's calls.

All prompts, between the arms: the speedup on what is timed in every round over the speedup on what is new. This tells
of memories that need to see a prompt often, or that were made before the first round; each call counts by its seconds
per useful token, so that answers of unlike length can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean

from twotower_eval import stats
from twotower_eval.evidence.calls import Grid, Usable
from twotower_eval.evidence.measured import Measured, measured
from twotower_eval.evidence.numbers import TIMES, interval
from twotower_eval.records import Cell, SpeedSample
from twotower_eval.store import Run
from twotower_eval.times import fault_of

LEVEL = stats.NULL_LEVEL
NONE = "no prompt was timed that was new in its round"


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """How many times as fast an arm is on what it has seen, and the speedup on what was seen over that on what was new.

    1 where nothing is remembered. ``num_new`` calls were new to the candidate; ``num_void`` are void.
    """

    baseline: Measured
    candidate: Measured
    speedup: Measured
    num_new: int
    num_void: int = 0

    @property
    def checked(self) -> bool:
        """Whether the candidate was looked at both ways."""
        return self.candidate.estimate is not None and self.speedup.estimate is not None

    def remembered(self, limit: float) -> tuple[str, ...]:
        """Which arms are surely more than ``limit`` times as fast on what they have seen."""
        both = self.speedup.estimate
        found = []
        for arm, own, by_speedup in (
            ("baseline", self.baseline.estimate, both is not None and both.high < 1 / limit),
            ("candidate", self.candidate.estimate, both is not None and both.low > limit),
        ):
            if by_speedup or (own is not None and own.low > limit):
                found.append(arm)
        return tuple(found)


UNCHECKED = Unseen(
    baseline=Measured(estimate=None, reason=NONE),
    candidate=Measured(estimate=None, reason=NONE),
    speedup=Measured(estimate=None, reason=NONE),
    num_new=0,
)


def unseen_text(found: Unseen, limit: float) -> str:
    """What the probes came to, and who remembers."""
    remembers = found.remembered(limit)
    lead = f"the {' and the '.join(remembers)} remembers what it has seen (above {limit:g}x): " if remembers else ""
    if not found.num_new and not remembers:
        return NONE
    parts = [
        f"{words} {_shown(one)}"
        for words, one in (
            ("the candidate is on what it has seen", found.candidate),
            ("the baseline", found.baseline),
        )
    ]
    of_speedup = f"the speedup on the timed prompts is {_shown(found.speedup)} that on {found.num_new} new calls"
    return f"{lead}{', '.join(parts)} as fast as on what is new; {of_speedup}"


def _shown(found: Measured) -> str:
    return f"({found.reason})" if found.estimate is None else interval(TIMES, found.estimate)


@dataclass(frozen=True, kw_only=True)
class _Probed:
    """A probe call by cell: when it was new, and the first time after that."""

    new: SpeedSample
    again: SpeedSample | None


def unseen(runs: Sequence[Run], arms: tuple[Cell, Cell], grids: tuple[Grid, Grid], there: Usable) -> Unseen:
    """The probes of both arms' cells held against the calls of their rounds."""
    probes = [_probes(runs, cell) for cell in arms]
    if not probes[0] and not probes[1]:
        return UNCHECKED
    gains = [_gains(list(own.values()), other, there) for own, other in zip(probes, reversed(grids), strict=True)]
    own_new = {key: probe for key, probe in probes[1].items() if key in probes[0]}
    seen, new = _speedups(own_new, probes[0], grids, there)
    samples = (sample for run in runs for sample in run.speed if sample.phase == "probe")
    cells = {cell.id for cell in arms}
    return Unseen(
        baseline=measured(lambda: stats.geometric_mean(gains[0], level=LEVEL)),
        candidate=measured(lambda: stats.geometric_mean(gains[1], level=LEVEL)),
        speedup=measured(lambda: stats.ratio_of_geometric_means(seen, new, level=LEVEL)),
        num_new=len(new),
        num_void=sum(sample.cell in cells and fault_of(sample) is not None for sample in samples),
    )


def _probes(runs: Sequence[Run], cell: Cell) -> dict[tuple[str, str], _Probed]:
    """By launch and call what the cell was probed with; without those whose first time cannot be."""
    found: dict[tuple[str, str], list[SpeedSample]] = defaultdict(list)
    for sample in (sample for run in runs for sample in run.speed):
        if sample.phase == "probe" and sample.cell == cell.id:
            found[sample.launch_id, sample.call_id].append(sample)
    ordered = {key: sorted(samples, key=lambda sample: sample.round) for key, samples in found.items()}
    return {
        key: _Probed(new=first, again=next((one for one in rest if fault_of(one) is None), None))
        for key, (first, *rest) in ordered.items()
        if fault_of(first) is None
    }


def _gains(probes: Sequence[_Probed], other: Grid, there: Usable) -> list[float]:
    """Seconds of each prompt when it was new over those when it had been seen, but for what its rounds differ in.

    That is told by the other arm, since in its own a memory would hide behind what it did to the rounds.
    """
    of_round = {round_: fmean(log(other[round_, call].wall_s) for call in there.calls) for round_ in there.rounds}
    found = []
    for probe in probes:
        first, again = probe.new, probe.again
        rounds = [] if again is None else [(first.launch_id, first.round), (again.launch_id, again.round)]
        if again is not None and all(round_ in of_round for round_ in rounds):
            drift = of_round[rounds[1]] - of_round[rounds[0]]
            found.append(exp(log(first.wall_s / again.wall_s) + drift))
    return found


def _speedups(
    own: dict[tuple[str, str], _Probed],
    controls: dict[tuple[str, str], _Probed],
    grids: tuple[Grid, Grid],
    there: Usable,
) -> tuple[list[float], list[float]]:
    """Speedup per useful token of every call that is timed in all rounds, and of every new one."""
    seen = []
    for call in there.calls:
        pairs = [(grids[0][round_, call], grids[1][round_, call]) for round_ in there.rounds]
        seen.append(exp(fmean(log(_per_token(slow) / _per_token(fast)) for slow, fast in pairs)))
    # Every round has as many, so that what a round does to an arm is in both means alike.
    counted = [key for key, probe in own.items() if (probe.new.launch_id, probe.new.round) in there.rounds]
    return seen, [_per_token(controls[key].new) / _per_token(own[key].new) for key in counted]


def _per_token(sample: SpeedSample) -> float:
    return sample.wall_s / max(1, sum(prompt.num_tokens for prompt in sample.prompts))
