"""The verdict rule: what one estimate says of one expected value. Pure; gates and missing data are for claims.

A claim ``at_least`` is true where the quantity is at least ``expected - margin``, ``at_most`` where it is at most
``expected + margin``, ``equal`` where it is both (two one-sided tests). Each limit is tested one-sided at 5 %, so the
estimate must carry the interval at ``DECISION_LEVEL`` = 0.90, of which either end is a one-sided 95 % bound:
``retention(table, draws, level=DECISION_LEVEL)``, ``speedup(calls, level=DECISION_LEVEL)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, isfinite

from twotower_eval.records import Estimate, Outcome
from twotower_eval.records import Relation as Relation

DECISION_LEVEL = 0.90
MIN_CLUSTERS = 20  # fewer cannot support a claim
MIN_ROUNDS = 2  # a lone round cannot either: its variation is unknown


@dataclass(frozen=True, kw_only=True)
class Decision:
    """SUPPORTED, REFUTED or INCONCLUSIVE, and why, in words without units."""

    outcome: Outcome
    reason: str


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
) -> Decision:
    """Judge a claim by an estimate at ``DECISION_LEVEL``; ``expected`` and ``margin`` are in the estimate's unit.

    Exactly one of ``num_clusters`` (quality: ``estimate.n``) and ``num_rounds`` (speed: measured rounds, or launches
    where these are resampled) says how much evidence there is; too little of it never supports a claim.
    """
    if not isclose(estimate.level, DECISION_LEVEL):
        raise ValueError(
            f"the estimate's interval is at level {estimate.level:g}: a verdict needs one-sided 95 % bounds, "
            f"so compute it with level={DECISION_LEVEL:g}"
        )
    few = too_few(num_clusters=num_clusters, num_rounds=num_rounds)
    least, largest = limits(relation, expected, margin)
    refuted = _refuted(estimate, least, largest)
    if refuted:
        return Decision(outcome="REFUTED", reason=refuted)
    unclear = _unclear(estimate, least, largest)
    if unclear:
        return Decision(outcome="INCONCLUSIVE", reason=unclear)
    if few:
        return Decision(outcome="INCONCLUSIVE", reason=few)
    return Decision(outcome="SUPPORTED", reason=_supported(estimate, least, largest))


def too_few(*, num_clusters: int | None = None, num_rounds: int | None = None) -> str | None:
    """Why this much evidence cannot support any claim; ``None`` where it can."""
    if (num_clusters is None) == (num_rounds is None):
        raise ValueError("say either how many clusters or how many rounds the estimate rests on")
    if num_clusters is not None and num_clusters < MIN_CLUSTERS:
        return f"{num_clusters} clusters: fewer than {MIN_CLUSTERS} cannot support a claim"
    if num_rounds is not None and num_rounds < MIN_ROUNDS:
        return f"{num_rounds} measured round(s): fewer than {MIN_ROUNDS} cannot support a claim"
    return None


def _refuted(estimate: Estimate, least: float | None, largest: float | None) -> str | None:
    if least is not None and estimate.high < least:
        return f"the upper bound {estimate.high:.6g} is below {least:.6g}"
    if largest is not None and estimate.low > largest:
        return f"the lower bound {estimate.low:.6g} is above {largest:.6g}"
    return None


def _unclear(estimate: Estimate, least: float | None, largest: float | None) -> str | None:
    open_ends = []
    if least is not None and not estimate.low > least:
        open_ends.append(f"the lower bound {estimate.low:.6g} does not clear {least:.6g}")
    if largest is not None and not estimate.high < largest:
        open_ends.append(f"the upper bound {estimate.high:.6g} does not stay below {largest:.6g}")
    return " and ".join(open_ends) or None


def _supported(estimate: Estimate, least: float | None, largest: float | None) -> str:
    cleared = [] if least is None else [f"the lower bound {estimate.low:.6g} is above {least:.6g}"]
    cleared += [] if largest is None else [f"the upper bound {estimate.high:.6g} is below {largest:.6g}"]
    return " and ".join(cleared)
