"""What gates found, as facts: one record for each kind of check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.answers import Agreement, OtherLength
from twotower_eval.analyse.compare.contradiction import Contradiction
from twotower_eval.analyse.compare.documents import Truncated
from twotower_eval.analyse.compare.fairness import Busy, BusyFault, NullFault, TimedTasks, Unlike
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.residual import ResidualFault
from twotower_eval.analyse.compare.timing import Best
from twotower_eval.analyse.compare.unseen import Unseen
from twotower_eval.records import Arm, Estimate, Fact, TimeFault
from twotower_eval.rules import Handicap


@dataclass(frozen=True, kw_only=True)
class FilesAgree(Fact):
    """By run, its contradictions; ``without_digests``: runs whose events would not show later changes of journals."""

    contradictions: tuple[tuple[str, tuple[Contradiction, ...]], ...] = ()
    without_digests: tuple[str, ...] = ()

    @property
    def alike(self) -> tuple[object, ...]:
        """Runs with contradictions of the same kinds."""
        kinds = {one.kind for _, found in self.contradictions for one in found}
        return (tuple(sorted(kinds)), bool(self.without_digests))


@dataclass(frozen=True, kw_only=True)
class RunComplete(Fact):
    """Whether a run is complete."""

    complete: bool


@dataclass(frozen=True, kw_only=True)
class AllScored(Fact):
    """Number of documents of the scope without a score in one arm."""

    num_documents: int


@dataclass(frozen=True, kw_only=True)
class AboveChance(Fact):
    """Whether the baseline is above chance on each task."""

    standings: tuple[stats.Standing, ...]

    @property
    def unclear(self) -> tuple[stats.Standing, ...]:
        """The tasks on which it is not clearly above."""
        return tuple(one for one in self.standings if not one.is_clear)


@dataclass(frozen=True, kw_only=True)
class WholePrompts(Fact):
    """Prompts that were cut, and whether the run counted such prompts."""

    cut: tuple[Truncated, ...]
    counted: bool

    @property
    def alike(self) -> tuple[object, ...]:
        """Prompts of the same tasks and arms."""
        return (self.counted, *((one.task, one.arm) for one in self.cut))


@dataclass(frozen=True, kw_only=True)
class SameInputs(Fact):
    """Why the arms of a run had different inputs, run by run; empty where they had the same."""

    differing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verified(Fact):
    """What a ``verify`` run found, if there was one: its checks by name, with the detail of those that failed."""

    found: bool
    complete: bool = False
    num_passed: int = 0
    unchecked: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def alike(self) -> tuple[object, ...]:
        """Runs in which the same checks failed."""
        return (self.found, self.complete, self.unchecked, tuple(name for name, _ in self.failed))


@dataclass(frozen=True, kw_only=True)
class Handicaps(Fact):
    """Arms that were timed in a slower way than their models offer."""

    handicaps: tuple[Handicap, ...]

    @property
    def alike(self) -> tuple[object, ...]:
        """The same arms in the same ways."""
        return self.handicaps


@dataclass(frozen=True, kw_only=True)
class BusyArms(Fact):
    """How busy the processor was in both arms, and the faults; ``reason``: why that is not known."""

    busy: Busy | None = None
    faults: tuple[BusyFault, ...] = ()
    reason: str | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """The same faults, or the same reason."""
        return (*((one.kind, one.arm) for one in self.faults), self.reason)


@dataclass(frozen=True, kw_only=True)
class PossibleTimes(Fact):
    """Calls with impossible times; ``share`` of the timings is left out with them. ``limit`` is set where that is too
    many.
    """

    num_timed: int
    faults: tuple[TimeFault, ...]
    share: float
    limit: float | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """Calls with the same kinds of faults."""
        return (*sorted(set(self.faults)), self.limit is None)


@dataclass(frozen=True, kw_only=True)
class Probes(Fact):
    """Times and forwards of both arms on new prompts, relative to prompts that they have read before."""

    unseen: Unseen
    limit: float

    @property
    def alike(self) -> tuple[object, ...]:
        """Whether there were probes, what is known of them, and which arm remembers."""
        own = self.unseen.candidate
        known = (own.seconds, own.forwards, own.documents, own.made_up, own.forward_s, self.unseen.baseline.seconds)
        checked = self.unseen.checked(self.limit)
        return (self.unseen.num_new > 0, checked, self.unseen.remembered(self.limit), *(one.reason for one in known))


@dataclass(frozen=True, kw_only=True)
class Null(Fact):
    """The baseline against itself, and why that invalidates a speedup, if it does."""

    null: Estimate | None
    fault: NullFault | None

    @property
    def alike(self) -> tuple[object, ...]:
        """The same fault."""
        return () if self.fault is None else (self.fault.kind, self.fault.reason)


@dataclass(frozen=True, kw_only=True)
class Unexplained(Fact):
    """By arm, the share of its time that its parts do not explain; the faults, and ``reasons`` why it is not known."""

    faults: tuple[ResidualFault, ...] = ()
    reasons: tuple[str, ...] = ()
    shares: tuple[tuple[Arm, Estimate], ...] = ()

    @property
    def alike(self) -> tuple[object, ...]:
        """The same faults, or the same reasons."""
        return (*((one.arm, one.kind) for one in self.faults), self.reasons)


@dataclass(frozen=True, kw_only=True)
class BaselineLag(Fact):
    """A baseline that seems slower than its parts, by this share of its time."""

    whole: Estimate | None


@dataclass(frozen=True, kw_only=True)
class OwnGenerate(Fact):
    """The baseline beside transformers' own ``generate``."""

    best: Best


@dataclass(frozen=True, kw_only=True)
class DegenerateOutputs(Fact):
    """Shares of degenerate outputs of baseline and candidate, ``None`` where none was kept; ``broken``: far more."""

    shares: tuple[float, float] | None = None
    broken: bool = False


Stand = Literal["above", "open", "below"]


@dataclass(frozen=True, kw_only=True)
class QualityFloor(Fact):
    """A retention against the floor below which outputs are no answers; ``above_chance``: retention above chance.

    Without a usable estimate, ``reason`` says why, or ``num_clusters`` are too few.
    """

    floor: float
    stands: Stand | None = None
    retention: Estimate | None = None
    above_chance: bool = False
    reason: str | None = None
    num_clusters: int | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """How it stands, or why that is not known."""
        return (self.stands, self.above_chance, self.reason, self.num_clusters is None)


@dataclass(frozen=True, kw_only=True)
class SameAnswers(Fact):
    """Both arms' answers, ``again`` in each round or ``scored`` off the clock; empty ``arms`` where nothing scored
    them.

    ``differing``: arms with too many different answers. ``idle``: arms whose timed answers took too few forwards.
    """

    when: Literal["again", "scored"]
    arms: tuple[Agreement, ...] = ()
    differing: tuple[Arm, ...] = ()
    idle: tuple[Arm, ...] = ()

    @property
    def alike(self) -> tuple[object, ...]:
        """The same arms at fault, or the same reasons."""
        return (self.differing, self.idle, tuple(one.reason for one in self.arms))


@dataclass(frozen=True, kw_only=True)
class OtherTokens(Fact):
    """Prompts with other tokens: when ``timed`` than when scored (by arm), or in one arm than in the other. ``first``
    are the first of ``num_prompts``.
    """

    num_prompts: int
    first: tuple[tuple[Arm | None, OtherLength], ...]
    timed: bool

    @property
    def alike(self) -> tuple[object, ...]:
        """Of the same arms."""
        return (self.timed, *sorted({str(arm) for arm, _ in self.first}))


@dataclass(frozen=True, kw_only=True)
class EffectOnScores(Fact):
    """Scores of an arm's timed answers minus those of its scored ones, against ``limit``."""

    arm: Arm
    effect: Measured
    limit: float
    stands: Literal["within", "beyond", "open"] | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """The same arm, and how it stands."""
        return (self.arm, self.stands, self.effect.reason)


@dataclass(frozen=True, kw_only=True)
class OneThing(Fact):
    """Settings, or budgets and prompts, in which two ``parts`` of a claim differ; ``parts`` is ``None`` where they
    agree.
    """

    of: Literal["settings", "question"]
    parts: tuple[str, str] | None
    unlike: tuple[Unlike, ...] = ()
    budgets: tuple[tuple[str, tuple[int, int]], ...] = ()
    other_prompts: tuple[Agreement, ...] = ()


@dataclass(frozen=True, kw_only=True)
class KeptUp(Fact):
    """Servers at ``rate`` requests a second. ``grown``: arms whose latencies grow from the first third of a stream to
    its last, by how much, and the answers a second that they gave. ``unknown``: those of which it cannot be told.
    """

    rate: float
    grown: tuple[tuple[Arm, float | None, float | None], ...] = ()
    unknown: tuple[Arm, ...] = ()

    @property
    def alike(self) -> tuple[object, ...]:
        """The same arms at the same rate."""
        return (self.rate, tuple(arm for arm, *_ in self.grown), self.unknown)


@dataclass(frozen=True, kw_only=True)
class SameTasks(Fact):
    """Timed tasks against those of the quality; ``None``: the claim's point names the timed tasks."""

    tasks: TimedTasks | None


@dataclass(frozen=True, kw_only=True)
class AnswersTimed(Fact):
    """Whether the timed outputs are answers, or outputs of the fixed workload."""

    answers: bool
