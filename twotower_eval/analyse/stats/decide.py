"""The verdict rule: an estimate against an expected value; the gate on the A/A null; the level of further looks. Pure:
gates and missing data belong to claims, limits are parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isclose, isfinite, log
from typing import Literal

from twotower_eval.analyse.stats.speedup import NULL_LEVEL
from twotower_eval.records import Estimate, Fact, GateLimits, Outcome, SerialDependence
from twotower_eval.records import Relation as Relation

ALPHA = 0.05  # one-sided, of all declared looks together
FIRST_EXTRA_ALPHA = 0.005  # of the first look that was not declared
MOST_EXTRA = 4  # a further one decides nothing: its level would be beyond what intervals are good for


def look_alpha(num_looks: int, declared: int = 1) -> float | None:
    """The one-sided error rate of the last of ``num_looks`` looks, ``declared`` of which were declared; ``None`` where
    no error rate is left.
    """
    if num_looks < 1 or declared < 1:
        raise ValueError(f"{num_looks} looks, {declared} declared: there is at least one of each")
    if num_looks <= declared:
        return ALPHA / declared
    extra = num_looks - declared
    return FIRST_EXTRA_ALPHA * 0.5 ** (extra - 1) if extra <= MOST_EXTRA else None


def strictest_alpha() -> float:
    """The error rate of the last look that can decide."""
    return FIRST_EXTRA_ALPHA * 0.5 ** (MOST_EXTRA - 1)


LIMITS = GateLimits()


def off_nulls(
    intervals: Sequence[Callable[[float], Estimate]], *, offset: float = LIMITS.null_offset, level: float = NULL_LEVEL
) -> tuple[bool, ...]:
    """For each pair, whether its interval lies entirely outside ``exp(+-offset)``, with Holm's correction over pairs.

    ``intervals`` are functions from a level to the pair's speedup, e.g. ``lambda level: speedup(calls, level=level)``.
    """
    off = [False] * len(intervals)
    while not all(off):
        at = 1 - (1 - level) / off.count(False)
        newly = [not known and is_off(interval(at), offset) for known, interval in zip(off, intervals, strict=True)]
        if not any(newly):
            break
        off = [known or new for known, new in zip(off, newly, strict=True)]
    return tuple(off)


def is_off(null: Estimate, offset: float = LIMITS.null_offset) -> bool:
    """Whether an interval of a speedup lies entirely outside ``exp(+-offset)``."""
    return log(null.low) > offset or log(null.high) < -offset


def widest_null(judged: Estimate | None, limits: GateLimits = LIMITS, *, claimed: float | None = None) -> float:
    """Largest half-width of an A/A null, on the log scale, with which a speedup can be judged.

    A share of the log of the interval's end that is farther from 1, or of the claimed speedup if that is farther still:
    a speedup of 1.00 needs no null without width, and refutes a claim of 2x.
    """
    if judged is None:
        return limits.null_half_width
    at_stake = [judged.low, judged.high, *([] if claimed is None else [claimed])]
    return min(limits.null_half_width, limits.null_share * max(abs(log(end)) for end in at_stake))


def half_width(null: Estimate) -> float:
    """Half the width of a speedup's interval, on the log scale."""
    return (log(null.high) - log(null.low)) / 2


DECISION_LEVEL = 0.90
MIN_CLUSTERS = 20  # fewer cannot support a claim
MIN_ROUNDS = 5  # fewer rounds, or as many independent ones as dependent rounds are worth, decide nothing
MIN_CALLS = 8  # of sampled prompts: with 4, the calibration found 7 % of false claims supported at the limit


Stands = Literal["above", "below", "open"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One bound of the interval against one limit of the claim; ``open``: the bound does not clear it."""

    bound: Literal["lower", "upper"]
    value: float
    stands: Stands
    limit: float


@dataclass(frozen=True, kw_only=True)
class TooFew(Fact):
    """``num`` clusters, rounds or calls of sampled prompts: too few to support a claim; rounds also too few to refute
    one.

    ``serial`` is given where there are enough rounds, but they resemble each other too much.
    """

    of: Literal["clusters", "rounds", "calls"]
    num: int
    serial: SerialDependence | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """What there is too little of, and whether it is only for dependence between rounds."""
        return (self.of, self.serial is None, self.serial is not None and self.serial.lag1 is None)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """SUPPORTED, REFUTED or INCONCLUSIVE, with the comparisons behind it; ``few``: too little evidence to decide."""

    outcome: Outcome
    comparisons: tuple[Comparison, ...]
    few: TooFew | None = None


def limits(relation: Relation, expected: float, margin: float) -> tuple[float | None, float | None]:
    """Smallest and largest true value at which the claim holds; ``None`` on the open side."""
    if relation not in ("at_least", "at_most", "equal"):
        raise ValueError(f"relation {relation!r} is none of at_least, at_most, equal")
    if not isfinite(expected) or not isfinite(margin) or margin < 0:
        raise ValueError(f"expected {expected} with margin {margin}: both must be finite, the margin at least 0")
    least = None if relation == "at_most" else expected - margin
    largest = None if relation == "at_least" else expected + margin
    return least, largest


def decide(
    estimate: Estimate,
    *,
    relation: Relation,
    expected: float,
    margin: float,
    num_clusters: int | None = None,
    num_rounds: int | None = None,
    num_calls: int | None = None,
    level: float = DECISION_LEVEL,
) -> Decision:
    """Judge a claim by an estimate at ``level``; ``expected`` and ``margin`` are in the estimate's unit.

    Exactly one of ``num_clusters`` (quality: ``estimate.n``) and ``num_rounds`` (speed: measured rounds, or launches
    where these are resampled) gives the amount of evidence; too little never supports a claim. For speed on sampled
    prompts give ``num_calls``, the timed calls of a round, too; fixed prompts need none. Too few rounds, or rounds that
    depend on each other too much by the estimate's ``serial``, do not refute a claim either.
    """
    if not isclose(estimate.level, level):
        raise ValueError(
            f"the estimate's interval is at level {estimate.level:g}: a verdict needs one-sided "
            f"{50 * (1 + level):g} % bounds, so compute it with level={level:g}"
        )
    least, largest = limits(relation, expected, margin)
    cleared, opened, refuted = _compared(estimate, least, largest)
    blind = None if num_rounds is None else too_few_rounds(estimate, num_rounds)
    if blind:
        return Decision(outcome="INCONCLUSIVE", comparisons=cleared + opened, few=blind)
    few = too_few(num_clusters=num_clusters, num_rounds=num_rounds, num_calls=num_calls)
    if refuted:
        return Decision(outcome="REFUTED", comparisons=refuted)
    if opened:
        return Decision(outcome="INCONCLUSIVE", comparisons=opened)
    if few:
        return Decision(outcome="INCONCLUSIVE", comparisons=cleared, few=few)
    return Decision(outcome="SUPPORTED", comparisons=cleared)


def too_few(
    *, num_clusters: int | None = None, num_rounds: int | None = None, num_calls: int | None = None
) -> TooFew | None:
    """What there is too little of to support any claim; ``None`` where there is enough."""
    if (num_clusters is None) == (num_rounds is None):
        raise ValueError("say either how many clusters or how many rounds the estimate rests on")
    if num_clusters is not None and num_clusters < MIN_CLUSTERS:
        return TooFew(of="clusters", num=num_clusters)
    if num_rounds is not None and num_rounds < MIN_ROUNDS:
        return TooFew(of="rounds", num=num_rounds)
    if num_calls is not None and num_calls < MIN_CALLS:
        return TooFew(of="calls", num=num_calls)
    return None


def too_few_rounds(estimate: Estimate, num_rounds: int) -> TooFew | None:
    """Why these rounds cannot decide; ``None`` where they can."""
    serial = estimate.serial
    if num_rounds < MIN_ROUNDS:
        return too_few(num_rounds=num_rounds)
    if serial is None or serial.effective_rounds >= MIN_ROUNDS:
        return None
    return TooFew(of="rounds", num=num_rounds, serial=serial)


def _compared(
    estimate: Estimate, least: float | None, largest: float | None
) -> tuple[tuple[Comparison, ...], tuple[Comparison, ...], tuple[Comparison, ...]]:
    """The comparisons that clear a limit, that leave one open, and that lie entirely beyond one."""
    cleared: list[Comparison] = []
    opened: list[Comparison] = []
    refuted: list[Comparison] = []
    if least is not None:
        stands: Stands = "above" if estimate.low > least else "open"
        inside = Comparison(bound="lower", value=estimate.low, stands=stands, limit=least)
        (cleared if stands == "above" else opened).append(inside)
        if estimate.high < least:
            refuted.append(Comparison(bound="upper", value=estimate.high, stands="below", limit=least))
    if largest is not None:
        stands = "below" if estimate.high < largest else "open"
        inside = Comparison(bound="upper", value=estimate.high, stands=stands, limit=largest)
        (cleared if stands == "below" else opened).append(inside)
        if estimate.low > largest:
            refuted.append(Comparison(bound="lower", value=estimate.low, stands="above", limit=largest))
    return tuple(cleared), tuple(opened), tuple(refuted)
