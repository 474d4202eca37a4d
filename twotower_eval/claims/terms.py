"""A claim's terms: what it claims in words, with its margin and its own limits, and how far these may go.

A margin may hide no more than what a reader would shrug at, and a limit may be loosened, not done away with: what lies
outside is refused where the file is read. What lies inside and is not the shipped value stands in every verdict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from twotower_eval.records import Claim, GateLimits, Quantity

RELATIONS = {"at_least": "at least", "at_most": "at most", "equal": "equal to"}
ALLOWING = {"at_least": "less", "at_most": "plus", "equal": "within"}
QUANTITIES: Mapping[Quantity, str] = {
    "retention": "retention",
    "decoder_exercised_retention": "decoder-exercised retention",
    "score": "score",
    "score_difference": "score difference",
    "speedup_time": "wall-clock speedup",
    "speedup_throughput": "speedup in useful tokens per second",
    "speedup_time_per_device": "wall-clock speedup per device",
    "joint": "joint claim",
}
MOST_MARGIN: Mapping[Quantity, float] = {
    "retention": 0.05,
    "decoder_exercised_retention": 0.05,
    "speedup_time": 0.2,
    "speedup_throughput": 0.2,
    "speedup_time_per_device": 0.2,
    "score": 0.2,
    "score_difference": 0.2,
}  # of scores: of those that are shares


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values that a limit may have."""

    least: float
    most: float


RANGES: Mapping[str, Range] = {
    "null_offset": Range(least=0.0, most=0.2),
    "null_half_width": Range(least=0.0, most=0.5),
    "null_share": Range(least=0.0, most=5.0),
    "degenerate_share": Range(least=0.0, most=0.25),
    "min_retention": Range(least=0.3, most=1.0),
    "min_length_ratio": Range(least=0.5, most=1.0),
    "max_length_ratio": Range(least=1.0, most=2.0),
    "above_chance_level": Range(least=0.75, most=0.9999),
    "differing_answers": Range(least=0.0, most=0.02),
    "differing_answers_half": Range(least=0.0, most=0.5),
    "score_effect": Range(least=0.0, most=0.1),
    "least_work": Range(least=0.1, most=1.0),
    "warn_retention": Range(least=1.0, most=2.0),
    "residual": Range(least=0.05, most=0.5),
    "own_generate": Range(least=0.0, most=1.0),
    "busy_share": Range(least=0.5, most=1.0),
    "processors_per_thread": Range(least=1.0, most=2.0),
    "void_share": Range(least=0.0, most=0.2),
    "seen_gain": Range(least=1.05, most=2.0),
}


def check_limits(where: str, limits: GateLimits, names: Iterable[str]) -> None:
    """ValueError for a limit, of those named, outside its range."""
    for name in names:
        value, allowed = getattr(limits, name), RANGES[name]
        if not allowed.least <= value <= allowed.most:
            shipped = getattr(GateLimits(), name)
            inside = f"lies between {allowed.least:g} and {allowed.most:g} ({shipped:g})"
            raise ValueError(f"{where}: {name} {inside}, not {value:g}")


def check_margin(where: str, claim: Claim) -> None:
    """ValueError for a margin that a claim could hide behind, or that leaves nothing to be false."""
    most, margin = MOST_MARGIN.get(claim.quantity), claim.margin
    if most is None or margin is None or claim.expected is None:
        return
    is_score = claim.quantity in ("score", "score_difference")
    own_unit = is_score and (claim.metric is not None or abs(claim.expected) > 1)  # a perplexity, say
    if margin > most and not own_unit:
        unit = "points" if is_score or "retention" in claim.quantity else "%"
        if is_score:
            unit += ", or name the metric that is no share"
        raise ValueError(
            f"{where}: a margin of {100 * margin:g} leaves too little of the claim: at most {100 * most:g} {unit}"
        )
    if "retention" in claim.quantity and claim.relation != "at_most" and margin >= claim.expected:
        raise ValueError(f"{where}: expected {claim.expected:g} less a margin of {margin:g} is true of anything")


def own_limits(claim: Claim) -> dict[str, tuple[float, float]]:
    """Limits that are not the shipped ones: by name, the claim's and the shipped value."""
    shipped = GateLimits()
    pairs = {
        field.name: (getattr(claim.limits, field.name), getattr(shipped, field.name))
        for field in dataclasses.fields(GateLimits)
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def limits_text(claims: Sequence[Claim]) -> str:
    """``; limits that are not the shipped ones: min_retention 0.3 (shipped 0.5)``; nothing where there is none."""
    found = dict.fromkeys(
        f"{name} {own:g} (shipped {shipped:g})"
        for claim in claims
        for name, (own, shipped) in own_limits(claim).items()
    )
    return f"; limits that are not the shipped ones: {', '.join(found)}" if found else ""


def claimed_text(claim: Claim, metric: str | None = None) -> str:
    """``retention at least 98.7 % less 0.5 points``; a joint claim has its parts.

    A score outside retention is in the unit of its ``metric``. Of one that was not measured that much is known only
    where it is no share.
    """
    if claim.expected is None or claim.margin is None:
        return " and ".join(claim.parts)
    named = QUANTITIES[claim.quantity]
    expected, margin = f"{100 * claim.expected:g} %", f"{100 * claim.margin:g} points"
    if claim.quantity in ("score", "score_difference") and (metric is not None or abs(claim.expected) > 1):
        shown = metric or claim.metric
        named += f" ({shown})" if shown else ""
        expected, margin = f"{claim.expected:g}", f"{claim.margin:g}"
    elif claim.quantity == "score_difference":
        expected = f"{100 * claim.expected:g} points"
    elif claim.quantity.startswith("speedup"):
        expected, margin = f"{claim.expected:g}x", f"{100 * claim.margin:g} %"
    allowed = f" {ALLOWING[claim.relation]} {margin}" if claim.margin else ", without a margin"
    return f"{named} {RELATIONS[claim.relation]} {expected}{allowed}"


def terms_text(claim: Claim, metrics: Mapping[str, str | None], claims: Sequence[Claim]) -> str:
    """What a claim is judged by: the terms of its parts, or its own. ``metrics``: by claim what was judged of it."""
    parts = [one for one in claims if one.name in claim.parts] or [claim]
    return " and ".join(claimed_text(part, metrics.get(part.name)) for part in parts) + limits_text(parts)
