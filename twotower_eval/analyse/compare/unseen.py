"""Whether an arm remembers earlier prompts: its time and forwards on new prompts against those on prompts read before.

A decoder may honestly need more forwards for one prompt than for another, above all for made-up text. So the seconds of
two different prompts are never compared. Compared are

- the same prompt, twice: the seconds of a probe when it was new over those in the next round, and the forwards per
  token of every timed prompt on its first reading (in the warm-up as a rule) over those of all later readings;
- similar prompts, by forwards per token: new probes against timed prompts of the same task and about the same length.
  Documents that are not timed are similar. Prompts made up of two documents are not: there, only far more forwards
  than honest decoders need for such text count. Of decoders that draft, only what they need beyond a lookup in prompt
  and answer counts: drafts are right where a text repeats itself, which new prompts may do less;
- similar prompts, forward by forward: the seconds of a new probe over those that its own forwards take alone, against
  the same ratio of timed prompts, and against the same of the other arm on that probe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, log
from statistics import fmean

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.calls import Call, Grid, Usable
from twotower_eval.analyse.compare.costs import seconds_alone
from twotower_eval.analyse.compare.figures import Measured, measured
from twotower_eval.errors import NoEstimate
from twotower_eval.records import (
    Cell,
    SpeedSample,
    document_of,
)
from twotower_eval.rules import fault_of
from twotower_eval.store import Run

LEVEL = stats.NULL_LEVEL
FAR = 3.0  # times the forwards per token that honest decoders may need where a prompt is made up
NUM_LIKE = 8  # timed calls that a new one is held against: those nearest in length
NO_FORWARD = 0.5  # a call without any forward counts as half a forward, so that ratios exist
NONE = "no new prompt was timed"
NOT_COUNTED = "forwards were not counted"
NOTHING = Measured(estimate=None, reason=NONE)
Key = tuple[str, str]  # launch, call


@dataclass(frozen=True, kw_only=True)
class Memory:
    """By how much an arm takes longer on new prompts than on prompts that it has read; 1 where it remembers nothing.

    ``seconds`` and ``forwards``: the same prompt read again. ``documents`` and ``made_up``: forwards per token of new
    prompts against similar timed ones; the same ``beyond`` the passes of a prompt lookup, which repetitions explain, of
    decoders that draft. ``forward_s``: seconds of equal forwards.
    """

    seconds: Measured = NOTHING
    forwards: Measured = NOTHING
    documents: Measured = NOTHING
    made_up: Measured = NOTHING
    documents_beyond: Measured = NOTHING
    made_up_beyond: Measured = NOTHING
    forward_s: Measured = NOTHING

    def exceeds(self, limit: float) -> bool:
        """Whether any of these lies above the limit by its lower bound."""
        bounds = [(one, limit) for one in (self.seconds, self.forwards, self.forward_s)]
        bounds += [(one, most) for one, most in self._new(limit)]
        return any(one.estimate is not None and one.estimate.low > most for one, most in bounds)

    def _new(self, limit: float) -> Iterator[tuple[Measured, float]]:
        """Forwards per token of new prompts, each with its limit; those that repetitions leave over, where they are
        known and fewer."""
        for plain, beyond, most in (
            (self.documents, self.documents_beyond, limit),
            (self.made_up, self.made_up_beyond, FAR),
        ):
            yield (beyond if is_explained(plain, beyond) else plain), most

    def tells(self, limit: float) -> bool:
        """Whether a gain above the limit would have been noticed, in seconds and forwards of prompts read again and on
        new prompts of either kind, where there were any.
        """
        again = all(_is_below(one, limit) for one in (self.seconds, self.forwards))
        new = [_is_below(one, most) for one, most in self._new(limit) if one.estimate]
        return again and (not new or any(new))


def is_explained(plain: Measured, beyond: Measured) -> bool:
    """Whether repetitions are known, and explain some of the forwards that new prompts need more."""
    if plain.estimate is None or beyond.estimate is None:
        return False
    return beyond.estimate.value < plain.estimate.value


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """What either arm remembers. ``num_new`` calls were new to the candidate; ``num_void`` are void."""

    baseline: Memory
    candidate: Memory
    num_new: int
    num_void: int = 0

    def checked(self, limit: float) -> bool:
        """Whether the candidate read enough prompts twice to notice a gain above the limit."""
        return self.candidate.tells(limit)

    def remembered(self, limit: float) -> tuple[str, ...]:
        """The arms that take more than ``limit`` times as long on new prompts, by their lower bounds."""
        arms = (("baseline", self.baseline), ("candidate", self.candidate))
        return tuple(arm for arm, memory in arms if memory.exceeds(limit))


def _is_below(found: Measured, limit: float) -> bool:
    return found.estimate is not None and found.estimate.high <= limit


UNCHECKED = Unseen(baseline=Memory(), candidate=Memory(), num_new=0)


@dataclass(frozen=True, kw_only=True)
class _Probed:
    """A probe call of a cell: when it was new, and the first time after that."""

    new: SpeedSample
    again: SpeedSample | None


def unseen(runs: Sequence[Run], arms: tuple[Cell, Cell], grids: tuple[Grid, Grid], there: Usable) -> Unseen:
    """Probes and first readings of both arms' cells against the timed calls of the rounds."""
    probes = [_probes(runs, cell) for cell in arms]
    own_new = {key: probe for key, probe in probes[1].items() if key in probes[0]}
    cells = {cell.id for cell in arms}
    samples = [sample for run in runs for sample in run.speed_of(cells) if sample.phase == "probe"]
    return Unseen(
        baseline=_memory(runs, arms[0], probes[0], (grids[0], grids[1]), there, None),
        candidate=_memory(runs, arms[1], own_new, (grids[1], grids[0]), there, (arms[0], probes[0])),
        num_new=len(own_new),
        num_void=sum(fault_of(sample) is not None for sample in samples),
    )


def _memory(
    runs: Sequence[Run],
    cell: Cell,
    probes: Mapping[Key, _Probed],
    grids: tuple[Grid, Grid],
    there: Usable,
    other: tuple[Cell, Mapping[Key, _Probed]] | None,
) -> Memory:
    """One arm's memory; ``grids`` are its own and the other arm's, ``other`` timed the same probes."""
    new = [one.new for one in probes.values() if (one.new.launch_id, one.new.round) in there.rounds]
    counted = any(sample.passes for run in runs for sample in run.speed_of({cell.id}))
    more = [(one.held_out, _beyond_like(one, grids[0], there, _forwards_per_token)) for one in new] if counted else []
    drafts = counted and all(map(_has_lookup, new)) and _drafts([*grids[0].values()])
    beyond = [(one.held_out, _beyond_like(one, grids[0], there, _beyond_lookup)) for one in new] if drafts else []
    return Memory(
        seconds=_mean(_gains(list(probes.values()), grids[1], there)),
        forwards=_mean(_first_readings(runs, cell)) if counted else Measured(estimate=None, reason=NOT_COUNTED),
        documents=_mean([times for held_out, times in more if held_out]),
        made_up=_mean([times for held_out, times in more if not held_out]),
        documents_beyond=_mean([left for held_out, left in beyond if held_out]),
        made_up_beyond=_mean([left for held_out, left in beyond if not held_out]),
        forward_s=_mean(_of_equal_forwards(runs, cell, new, grids, there, other)),
    )


def _mean(logs: Sequence[float]) -> Measured:
    return measured(lambda: stats.geometric_mean([exp(one) for one in logs], level=LEVEL))


def _probes(runs: Sequence[Run], cell: Cell) -> dict[Key, _Probed]:
    """By launch and call, a cell's probes; those with an impossible first time are left out."""
    found: dict[Key, list[SpeedSample]] = defaultdict(list)
    for sample in (sample for run in runs for sample in run.speed_of({cell.id})):
        if sample.phase == "probe":
            found[sample.launch_id, sample.call_id].append(sample)
    ordered = {key: sorted(samples, key=lambda sample: sample.round) for key, samples in found.items()}
    return {
        key: _Probed(new=first, again=next((one for one in rest if fault_of(one) is None), None))
        for key, (first, *rest) in ordered.items()
        if fault_of(first) is None
    }


def _gains(probes: Sequence[_Probed], other: Grid, there: Usable) -> list[float]:
    """Seconds of each prompt when it was new over those when it was read again, corrected for differences between
    rounds.

    The other arm gives the correction: in the arm's own rounds, memory would hide itself.
    """
    of_round = {round_: fmean(log(other[round_, call].wall_s) for call in there.calls) for round_ in there.rounds}
    found = []
    for probe in probes:
        first, again = probe.new, probe.again
        rounds = [] if again is None else [(first.launch_id, first.round), (again.launch_id, again.round)]
        if again is not None and all(round_ in of_round for round_ in rounds):
            drift = of_round[rounds[1]] - of_round[rounds[0]]
            found.append(log(first.wall_s / again.wall_s) + drift)
    return found


def _first_readings(runs: Sequence[Run], cell: Cell) -> list[float]:
    """Of every timed call, forwards per token on the first reading over those of all later readings."""
    readings: dict[Call, list[SpeedSample]] = defaultdict(list)
    for sample in (sample for run in runs for sample in run.speed_of({cell.id})):
        if sample.replica == 0 and sample.phase != "probe":
            readings[tuple(prompt.prompt_id for prompt in sample.prompts)].append(sample)
    found = []
    for samples in readings.values():
        first, *later = map(_forwards_per_token, sorted(samples, key=lambda sample: sample.started_at))
        if later:
            found.append(first - fmean(later))
    return found


def _beyond_like(new: SpeedSample, grid: Grid, there: Usable, of: Callable[[SpeedSample], float]) -> float:
    """A figure of a new call over the mean of the most similar timed calls of the same round, on the log scale."""
    tasks, length = _tasks(prompt.prompt_id for prompt in new.prompts), _length(new)
    timed = [grid[(new.launch_id, new.round), call] for call in there.calls]
    alike = [one for one in timed if _tasks(prompt.prompt_id for prompt in one.prompts) == tasks] or timed
    nearest = sorted(alike, key=lambda one: abs(_length(one) - length))[:NUM_LIKE]
    return of(new) - fmean(map(of, nearest))


def _of_equal_forwards(
    runs: Sequence[Run],
    cell: Cell,
    new: Sequence[SpeedSample],
    grids: tuple[Grid, Grid],
    there: Usable,
    other: tuple[Cell, Mapping[Key, _Probed]] | None,
) -> list[float]:
    """By how much equal forwards take longer on new prompts than on similar timed ones, relative to the other arm.

    Empty where parts were not timed alone, or not at these sizes.
    """
    found = []
    with_alone = partial(_beyond_alone, seconds_alone(runs, cell, list(grids[0].values())))
    beside = None if other is None else partial(_beyond_alone, seconds_alone(runs, other[0], list(grids[1].values())))
    for one in new:
        try:
            slower = _beyond_like(one, grids[0], there, with_alone)
            if other is not None and beside is not None:
                slower -= _beyond_like(other[1][one.launch_id, one.call_id].new, grids[1], there, beside)
        except NoEstimate:  # it says what was not timed, and reports show that with the parts
            continue
        found.append(slower)
    return found


def _beyond_alone(alone: Callable[[SpeedSample], float], sample: SpeedSample) -> float:
    seconds = alone(sample)
    if seconds <= 0:
        raise NoEstimate("a call without any forward")
    return log(sample.wall_s / seconds)


def _forwards_per_token(sample: SpeedSample) -> float:
    """Logarithm of the forwards per token of a call."""
    num_tokens = sum(prompt.num_tokens for prompt in sample.prompts)
    return log(max(NO_FORWARD, sum(one.num for one in sample.passes)) / max(1, num_tokens))


def _has_lookup(sample: SpeedSample) -> bool:
    return all(prompt.num_lookup_passes is not None for prompt in sample.prompts)


def _drafts(timed: Sequence[SpeedSample]) -> bool:
    """Whether answers take fewer forwards than they have tokens, and it is known in how many a lookup finds them."""
    num_forwards = sum(one.num for sample in timed for one in sample.passes)
    num_tokens = sum(max((prompt.num_tokens for prompt in sample.prompts), default=0) for sample in timed)
    return num_forwards < num_tokens and all(map(_has_lookup, timed))


def _beyond_lookup(sample: SpeedSample) -> float:
    """Logarithm of the forwards of a call over those in which a prompt lookup finds its answers."""
    by_lookup = max((prompt.num_lookup_passes or 0 for prompt in sample.prompts), default=0)
    return log(max(NO_FORWARD, sum(one.num for one in sample.passes)) / max(1, by_lookup))


def _tasks(prompt_ids: Iterable[str]) -> list[str]:
    documents = (document_of(prompt_id) for prompt_id in prompt_ids)
    return sorted("" if document is None else document[0] for document in documents)


def _length(sample: SpeedSample) -> int:
    return sum(prompt.num_prompt_tokens for prompt in sample.prompts)
