"""The verdict rule: what one estimate says of one expected value. Pure; gates and missing data are for claims.

A claim ``at_least`` is true where the quantity is at least ``expected - margin``, ``at_most`` where it is at most
``expected + margin``, ``equal`` where it is both (two one-sided tests). Each limit is tested one-sided at 5 %, so the
estimate must carry the interval at ``DECISION_LEVEL`` = 0.90, of which either end is a one-sided 95 % bound:
``retention(table, draws, level=DECISION_LEVEL)``, ``speedup(calls, level=DECISION_LEVEL)``. Looks that spend another
error rate have another ``level`` (``looks``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, isfinite
from typing import Literal

from twotower_eval.records import Estimate, Fact, Outcome, SerialDependence
from twotower_eval.records import Relation as Relation

DECISION_LEVEL = 0.90
MIN_CLUSTERS = 20  # fewer cannot support a claim
MIN_ROUNDS = 5  # fewer rounds, or as many independent ones as dependent rounds are worth, decide nothing
MIN_CALLS = 8  # of sampled prompts: with 4, the calibration found 7 % of false claims supported at the limit


Stands = Literal["above", "below", "open"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One bound of the interval against one limit of the claim; ``open``: it does not clear it."""

    bound: Literal["lower", "upper"]
    value: float
    stands: Stands
    limit: float


@dataclass(frozen=True, kw_only=True)
class TooFew(Fact):
    """``num`` clusters, rounds or calls of sampled prompts, too few to support a claim, or of rounds to decide any.

    ``serial`` is given where there are rounds enough, and they are worth too few for how alike neighbours are.
    """

    of: Literal["clusters", "rounds", "calls"]
    num: int
    serial: SerialDependence | None = None

    @property
    def alike(self) -> tuple[object, ...]:
        """What there is too little of, and whether it would be enough if neighbours were not alike."""
        return (self.of, self.serial is None, self.serial is not None and self.serial.lag1 is None)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """SUPPORTED, REFUTED or INCONCLUSIVE, and the comparisons that say why; ``few``: why so little decides nothing."""

    outcome: Outcome
    comparisons: tuple[Comparison, ...]
    few: TooFew | None = None


def limits(relation: Relation, expected: float, margin: float) -> tuple[float | None, float | None]:
    """Least and largest true value at which the claim holds; ``None`` on the side that it leaves open."""
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
    where these are resampled) says how much evidence there is; too little of it never supports a claim. For speed on
    sampled prompts give ``num_calls``, the timed calls of a round, too; fixed prompts need none. Too few rounds, or
    rounds so dependent that the estimate's ``serial`` calls them worth too few, do not refute a claim either.
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
    """What of this much evidence cannot support any claim; ``None`` where it can."""
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
    """Why these rounds decide nothing; ``None`` where they do."""
    serial = estimate.serial
    if num_rounds < MIN_ROUNDS:
        return too_few(num_rounds=num_rounds)
    if serial is None or serial.effective_rounds >= MIN_ROUNDS:
        return None
    return TooFew(of="rounds", num=num_rounds, serial=serial)


def _compared(
    estimate: Estimate, least: float | None, largest: float | None
) -> tuple[tuple[Comparison, ...], tuple[Comparison, ...], tuple[Comparison, ...]]:
    """What clears a limit, what leaves one open, and what lies wholly beyond one."""
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
