"""Figures: an estimate or the reason for none, totals of decoding, numbers in words. Each is computed once, however
many points use it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from twotower_eval.errors import NoEstimate, UserError
from twotower_eval.records import Estimate, Generation, PromptTiming
from twotower_eval.store import Run

T = TypeVar("T")


def once(runs: Sequence[Run], what: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
    """The result of ``compute`` for these runs, kept with the first of them and not computed again.

    ``what`` begins with a unique name and holds everything else that the result depends on. The result must not be
    changed. An error is raised each time.
    """
    kept, key = runs[0].found, (*what, *map(id, runs))
    if key not in kept:
        # The other runs are held as well, so that none that is made later has their ids.
        kept[key] = (compute(), [run for run in runs[1:] if run is not runs[0]])
    found: T = kept[key][0]
    return found


@contextmanager
def forgotten(run: Run) -> Iterator[None]:
    """Results found for a run within this block are dropped at its end, as they are large and not needed again."""
    before = set(run.found)
    try:
        yield
    finally:
        for key in run.found.keys() - before:
            del run.found[key]


class ArmsDifferError(UserError):
    """Baseline and candidate had different inputs, so their results cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An estimate, or the reason why there is none."""

    estimate: Estimate | None
    reason: str | None = None


def measured(compute: Callable[[], Estimate]) -> Measured:
    """The result of ``compute``, or the reason of its NoEstimate; any other error is a bug and is raised."""
    try:
        return Measured(estimate=compute())
    except NoEstimate as error:
        return Measured(estimate=None, reason=str(error))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Totals over ``num_prompts`` prompts; ``num_forced_commits`` is ``None`` where the decoder forces none.

    ``num_prefill_forwards`` are the context forwards that read prompts, one for each prompt with any;
    ``num_draft_forwards`` those of a draft model, ``None`` where there is none. These are in no rate of tokens: a pass
    is one of the model that is measured.
    """

    num_prompts: int
    num_tokens: int
    num_discarded_tokens: int
    num_context_forwards: int
    num_denoiser_forwards: int
    num_forced_commits: int | None
    num_finished: dict[str, int]
    num_prefill_forwards: int = 0
    num_draft_forwards: int | None = None

    @property
    def tokens_per_forward(self) -> float | None:
        """Useful tokens per forward pass of any kind, prefills included."""
        num_forwards = self.num_context_forwards + self.num_denoiser_forwards
        return self.num_tokens / num_forwards if num_forwards else None

    @property
    def tokens_per_nfe(self) -> float | None:
        """Useful tokens per denoiser pass; ``None`` without a denoiser."""
        return self.num_tokens / self.num_denoiser_forwards if self.num_denoiser_forwards else None

    @property
    def tokens_per_nfe_and_commit(self) -> float | None:
        """Useful tokens per denoiser pass or commit, prompts left out; ``None`` without a denoiser."""
        num_forwards = self.num_denoiser_forwards + self.num_context_forwards - self.num_prefill_forwards
        return self.num_tokens / num_forwards if self.num_denoiser_forwards else None

    @property
    def forced_share(self) -> float | None:
        """Share of all committed tokens, useful or discarded, that the step floor forced."""
        num_committed = self.num_tokens + self.num_discarded_tokens
        if self.num_forced_commits is None or num_committed == 0:
            return None
        return self.num_forced_commits / num_committed


def count(prompts: Iterable[Generation | PromptTiming]) -> Counts:
    """Add up generations, or the prompts of timed calls."""
    rows = list(prompts)
    forced = [row.num_forced_commits for row in rows if row.num_forced_commits is not None]
    drafted = [row.num_draft_forwards for row in rows if row.num_draft_forwards is not None]
    finished = [row.finish for row in rows]
    return Counts(
        num_prompts=len(rows),
        num_tokens=sum(row.num_tokens for row in rows),
        num_discarded_tokens=sum(row.num_discarded_tokens for row in rows),
        num_context_forwards=sum(row.num_context_forwards for row in rows),
        num_denoiser_forwards=sum(row.num_denoiser_forwards for row in rows),
        num_forced_commits=sum(forced) if rows and len(forced) == len(rows) else None,
        num_finished={reason: finished.count(reason) for reason in ("eos", "stop", "length")},
        num_prefill_forwards=sum(min(1, row.num_context_forwards) for row in rows),
        num_draft_forwards=sum(drafted) if rows and len(drafted) == len(rows) else None,
    )


MOST_DECIMALS = 9
ROUNDING = 1e-9  # 0.987 - 0.005 is not quite 0.982


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How a number is printed: its factor, its suffix, and its usual decimals.

    ``most`` decimals are kept where the limit that a number is compared with has them itself.
    """

    scale: float
    suffix: str
    decimals: int
    most: int

    def text(self, value: float, decimals: int | None = None) -> str:
        """``98.7 %``, ``2.42x``."""
        return f"{self.scale * value:z.{self.decimals if decimals is None else decimals}f}{self.suffix}"


PERCENT = Unit(scale=100, suffix=" %", decimals=1, most=2)
POINTS = Unit(scale=100, suffix=" points", decimals=1, most=2)
OWN = Unit(scale=1, suffix="", decimals=4, most=6)  # of a metric that is no share
TIMES = Unit(scale=1, suffix="x", decimals=2, most=2)


def compared(unit: Unit, value: float, limit: float) -> tuple[str, str]:
    """A number and its limit, with enough decimals to show which is larger."""
    decimals = _decimals(unit, value, limit)
    return unit.text(value, decimals), unit.text(limit, decimals)


def interval(unit: Unit, estimate: Estimate, *, against: float | None = None) -> str:
    """``98.9 % [98.2, 99.6]``, ``2.41x [2.30, 2.53]``; with ``against``, enough decimals to compare
    either end with it.
    """
    ends = (estimate.low, estimate.high)
    decimals = unit.decimals if against is None else max(_decimals(unit, end, against) for end in ends)
    low, high = (f"{unit.scale * end:z.{decimals}f}" for end in ends)
    return f"{unit.text(estimate.value, decimals)} [{low}, {high}]"


def _decimals(unit: Unit, value: float, limit: float) -> int:
    shown = unit.scale * limit
    own = (places for places in range(unit.decimals, unit.most) if abs(round(shown, places) - shown) < ROUNDING)
    decimals = next(own, unit.most)
    while unit.text(value, decimals) == unit.text(limit, decimals) and decimals < MOST_DECIMALS:
        if abs(value - limit) < ROUNDING:
            break
        decimals += 1
    return decimals


def high_retention_text(kept: float) -> str:
    """What a retention far above 100 % may mean."""
    return (
        f"the candidate scores {100 * kept:.0f} % of the baseline: a baseline with a broken config or tokenizer looks "
        "like this; check the baseline"
    )
