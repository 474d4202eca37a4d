"""Facts for warnings: what was left out of a figure, and what weakens it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from twotower_eval.records import Arm, Cell, Estimate, Fact, Finding, Score, TimeFault, UnlikeSetting
from twotower_eval.rules import unlike_kinds, unlike_settings


@dataclass(frozen=True, kw_only=True)
class Incomplete(Fact):
    """A run that is not complete."""


@dataclass(frozen=True, kw_only=True)
class IncompleteRounds(Fact):
    """Rounds that lack a call of either arm."""

    num_rounds: int


@dataclass(frozen=True, kw_only=True)
class VoidCalls(Fact):
    """Timed calls with impossible times."""

    num_timed: int
    faults: tuple[TimeFault, ...]

    @property
    def alike(self) -> tuple[object, ...]:
        """Calls with the same kinds of faults."""
        return tuple(sorted(set(self.faults)))


@dataclass(frozen=True, kw_only=True)
class ResumedWithFewer(Fact):
    """A run that was resumed with fewer rounds than first planned."""

    run_id: str
    num_asked: int
    num_whole: int


@dataclass(frozen=True, kw_only=True)
class LengthsDiffer(Fact):
    """Outputs of the arms whose lengths differ by more than a claim allows by default."""


@dataclass(frozen=True, kw_only=True)
class UnlikeLengths(Fact):
    """Timed answers whose lengths clearly differ from those of all known documents."""


@dataclass(frozen=True, kw_only=True)
class WideNull(Fact):
    """An A/A null that passes but is wide for so small a speedup. ``widest`` is ``share`` of its logarithm."""

    half_width: float
    widest: float
    share: float


@dataclass(frozen=True, kw_only=True)
class SlowerThanGenerate(Fact):
    """A baseline that transformers' own ``generate`` outruns, by ``over_generate``."""

    over_generate: Estimate


@dataclass(frozen=True, kw_only=True)
class FarAboveFloor(Fact):
    """A baseline at ``above_floor`` times the time of reading its weights, above ``limit``."""

    above_floor: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Unpaired(Fact):
    """Scores of one arm whose documents the other has not scored yet."""

    num_scores: int


@dataclass(frozen=True, kw_only=True)
class NoHeadline(Fact):
    """Documents without a headline score in one arm; they are left out of both."""

    num_documents: int


@dataclass(frozen=True, kw_only=True)
class StandardErrorsDiffer(Fact):
    """Standard errors of the headline that differ by more than ``tolerance``, a share of the linear one."""

    bootstrap: float
    linear: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class UnlikeArms(Fact):
    """Arms that differ in dtype, device or storage, besides model and decoder."""

    settings: tuple[UnlikeSetting, ...]


def unlike_arms(baseline: Cell, candidate: Cell) -> tuple[Finding, ...]:
    """The warning of unlike arms, where there is one."""
    found = unlike_settings(baseline.checkpoint, candidate.checkpoint)
    return (Finding(kind="unlike_arms", severity="warning", facts=UnlikeArms(settings=found)),) if found else ()


@dataclass(frozen=True, kw_only=True)
class UnlikeScoring(Fact):
    """Tasks whose arms are scored by kinds of log-likelihoods that mean different things."""

    tasks: tuple[str, ...]
    baseline: str
    candidate: str


def unlike_scoring(pairs: Iterable[tuple[Score, Score]]) -> Iterator[Finding]:
    """A warning for each two kinds of scoring that stand against each other."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for one, other in pairs:
        if unlike_kinds(one.scored_by, other.scored_by):
            found.setdefault((one.scored_by, other.scored_by), {})[one.task] = None
    for (baseline, candidate), tasks in found.items():
        facts = UnlikeScoring(tasks=tuple(tasks), baseline=baseline, candidate=candidate)
        yield Finding(kind="unlike_scoring", severity="warning", facts=facts)


@dataclass(frozen=True, kw_only=True)
class CachedPrompts(Fact):
    """Shares of prompt tokens that each arm's server had in its cache; ``None`` where it does not say."""

    baseline: float | None
    candidate: float | None


@dataclass(frozen=True, kw_only=True)
class LateRequests(Fact):
    """Requests that left this machine late: the 99th percentile, beside the median latency."""

    arm: Arm
    late_s: float
    median_s: float | None

    @property
    def alike(self) -> tuple[object, ...]:
        """Of the same arm."""
        return (self.arm,)


@dataclass(frozen=True, kw_only=True)
class LoneClusters(Fact):
    """Clusters with a set of tasks that no other cluster has: intervals do not include how they vary."""

    num_clusters: int
