"""What a reader of a figure has to know, as facts: what was left out, and what makes it less than it seems."""

from __future__ import annotations

from dataclasses import dataclass

from twotower_eval.records import Estimate, Fact, TimeFault


@dataclass(frozen=True, kw_only=True)
class Incomplete(Fact):
    """A run that has not finished."""


@dataclass(frozen=True, kw_only=True)
class IncompleteRounds(Fact):
    """Rounds that lack a call of either arm."""

    num_rounds: int


@dataclass(frozen=True, kw_only=True)
class VoidCalls(Fact):
    """Timed calls whose times no clock can have given."""

    num_timed: int
    faults: tuple[TimeFault, ...]

    @property
    def alike(self) -> tuple[object, ...]:
        """Calls with the same kinds of faults."""
        return tuple(sorted(set(self.faults)))


@dataclass(frozen=True, kw_only=True)
class ResumedWithFewer(Fact):
    """A run that was resumed with a plan of fewer rounds than it was first made for."""

    run_id: str
    num_asked: int
    num_whole: int


@dataclass(frozen=True, kw_only=True)
class LengthsDiffer(Fact):
    """Outputs of the arms whose lengths differ by more than a claim allows by default."""


@dataclass(frozen=True, kw_only=True)
class UnlikeLengths(Fact):
    """Timed answers whose lengths are unlike those of all known documents."""


@dataclass(frozen=True, kw_only=True)
class WideNull(Fact):
    """A null that is good enough in itself, and wide for so small a speedup. ``widest`` is ``share`` of its log."""

    half_width: float
    widest: float
    share: float


@dataclass(frozen=True, kw_only=True)
class SlowerThanGenerate(Fact):
    """A baseline that transformers' own ``generate`` outruns, by ``over_generate``."""

    over_generate: Estimate


@dataclass(frozen=True, kw_only=True)
class FarAboveFloor(Fact):
    """A baseline that takes ``above_floor`` times as long as reading its weights does, more than ``limit`` times."""

    above_floor: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Unpaired(Fact):
    """Scores of one arm whose documents the other has not scored yet."""

    num_scores: int


@dataclass(frozen=True, kw_only=True)
class NoHeadline(Fact):
    """Documents that have no headline score in one arm: they are left out of both."""

    num_documents: int


@dataclass(frozen=True, kw_only=True)
class StandardErrorsDiffer(Fact):
    """Standard errors of the headline that differ by more than ``tolerance``, a share of the linear one."""

    bootstrap: float
    linear: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class LoneClusters(Fact):
    """Clusters that are alone in touching their set of tasks: no interval sees them vary."""

    num_clusters: int
