"""A claim's terms from TOML tables: the claim in words, its margin and its own limits. Errors name the place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar, overload

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.consistent_rows import SHARES
from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean
from twotower_eval.records import Claim, GateLimits, Quantity
from twotower_eval.strict import JsonObject, check_value

T = TypeVar("T")
U = TypeVar("U")
_NEEDED = object()


def within(where: str, table: object, known: Iterable[str]) -> JsonObject:
    """The table. UserError if it is not a table or has an unknown key, with a near-miss hint."""
    if not isinstance(table, Mapping):
        raise UserError(f"{where} must be a table")
    names = list(known)
    for key in table:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, names)}")
    return table


@overload
def value_of(where: str, table: JsonObject, key: str, kind: type[T]) -> T: ...
@overload
def value_of(where: str, table: JsonObject, key: str, kind: type[T], default: U) -> T | U: ...
def value_of(where: str, table: JsonObject, key: str, kind: type[T], default: object = _NEEDED) -> object:
    """The value of a key, checked against ``kind``: a whole number counts as a number, a truth value does not."""
    if key not in table:
        if default is _NEEDED:
            raise UserError(f"{where}: {key} is missing")
        return default
    try:
        return check_value(key, kind, table[key])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def tables(where: str, table: JsonObject, key: str) -> list[JsonObject]:
    """The tables of a ``[[key]]``, none without the key."""
    found: list[Any] = value_of(where, table, key, list, [])
    if not all(isinstance(item, Mapping) for item in found):
        raise UserError(f"{where}: {key} must be a list of tables, as [[{key}]] makes them")
    return list(found)


def at_least(where: str, least: int, record: object, *names: str) -> None:
    """UserError for a number of a record below ``least``; ``None`` is allowed."""
    for name in names:
        value = getattr(record, name)
        if value is not None and value < least:
            raise UserError(f"{where}: {name} must be {least} or more, not {value:g}")


def texts(where: str, table: JsonObject, key: str) -> tuple[str, ...]:
    """A list of different texts, empty without the key."""
    found: list[Any] = value_of(where, table, key, list, [])
    if not all(isinstance(item, str) for item in found) or len(set(found)) != len(found):
        raise UserError(f"{where}: {key} must be a list of different texts")
    return tuple(found)


RELATIONS = {"at_least": "at least", "at_most": "at most", "equal": "equal to"}
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
# Of what is expected at least: little would be left of a small number by a margin that is nothing of a large one.
MOST_OF_EXPECTED: Mapping[Quantity, float] = {"retention": 0.1, "decoder_exercised_retention": 0.1, "score": 0.5}
POSSIBLE: Mapping[Quantity, tuple[float, float]] = {
    "retention": (0.0, inf),
    "decoder_exercised_retention": (0.0, inf),
    "score": (0.0, 1.0),
    "score_difference": (-1.0, 1.0),
}  # least and largest value; of scores: of those that are shares
SPEED_QUANTITIES = ("speedup_time", "speedup_throughput", "speedup_time_per_device")
LIKE_SHARES = re.compile(r"acc(uracy|_.*)|.*_acc|pass(@|_at_)(k|\d+)")  # as tasks name theirs, besides ``SHARES``


DIGITS = 9  # of a limit that is a sum
ROUNDING = 10.0**-DIGITS


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """How a number is printed: what it is multiplied by, and what stands behind it."""

    scale: float
    suffix: str

    def __call__(self, value: float) -> str:
        return f"{round(self.scale * value, DIGITS):g}{self.suffix}"


PER_CENT, POINTS = _Shown(scale=100, suffix=" %"), _Shown(scale=100, suffix=" points")
MARGINLESS = ", without a margin"


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
    "witnessed_share": Range(least=0.5, most=1.0),
}


def check_limits(where: str, limits: GateLimits, names: Iterable[str]) -> None:
    """UserError for any of the named limits outside its range."""
    for name in names:
        value, allowed = getattr(limits, name), RANGES[name]
        if not allowed.least <= value <= allowed.most:
            shipped = getattr(GateLimits(), name)
            inside = f"must be between {allowed.least:g} and {allowed.most:g} (shipped: {shipped:g})"
            raise UserError(f"{where}: {name} {inside}, not {value:g}")


def check_margin(where: str, claim: Claim) -> None:
    """UserError for a margin that is too wide, or with which every result would support the claim."""
    most, margin = MOST_MARGIN.get(claim.quantity), claim.margin
    if most is None or margin is None or claim.expected is None:
        return
    is_score = claim.quantity in ("score", "score_difference")
    if is_score and not _is_share(claim):
        return
    if _is_true_of_anything(claim):
        raise UserError(f"{where}: with a margin of {margin:g} every result would support the claim")
    most = min(most, _most_of_expected(claim))
    if margin > most + ROUNDING:
        unit = "points" if claim.quantity in POSSIBLE else "%"
        if is_score:
            unit += ", or name a metric that is not a share"
        raise UserError(
            f"{where}: a margin of {100 * margin:g} leaves too little of the claim: at most {100 * most:g} {unit}"
        )


def _is_share(claim: Claim) -> bool:
    """Whether a claim's score lies between 0 and 1, by its metric's name or, without one, by its expected value."""
    if claim.metric is None:
        return claim.expected is not None and abs(claim.expected) <= 1  # a perplexity lies above
    name = claim.metric.partition(",")[0]
    return name in SHARES or LIKE_SHARES.fullmatch(name) is not None


def _is_true_of_anything(claim: Claim) -> bool:
    """Whether every possible value of the quantity is allowed by the claim."""
    if claim.quantity not in POSSIBLE:
        return False
    (lowest, highest), (least, largest) = POSSIBLE[claim.quantity], allowed_values(claim)
    return (least is None or least <= lowest) and (largest is None or largest >= highest)


def _most_of_expected(claim: Claim) -> float:
    """The largest margin that leaves most of the expected value."""
    if claim.relation != "at_least" or claim.expected is None:
        return inf
    return MOST_OF_EXPECTED.get(claim.quantity, inf) * abs(claim.expected)


def allowed_values(claim: Claim) -> tuple[float | None, float | None]:
    """Smallest and largest true value at which a claim with its margin holds; ``None`` on the open side."""
    if claim.expected is None or claim.margin is None:
        raise UserError(f"claim {claim.name!r} has no expected value with its margin")
    margin = claim.margin * claim.expected if claim.quantity in SPEED_QUANTITIES else claim.margin
    least, largest = stats.limits(claim.relation, claim.expected, margin)
    # 0.987 - 0.005 is not quite 0.982
    return least if least is None else round(least, DIGITS), largest if largest is None else round(largest, DIGITS)


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
    """``retention at least 98.7 % (margin 0.5 points, so at least 98.2 %)``; for a joint claim, the names of its parts.

    A score outside retention has the unit of its ``metric``. Before it is measured, that is known only where it is not
    a share.
    """
    if claim.expected is None or claim.margin is None:
        return " and ".join(claim.parts)
    named, unit, of_margin = QUANTITIES[claim.quantity], PER_CENT, POINTS
    if claim.quantity in ("score", "score_difference") and (metric is not None or abs(claim.expected) > 1):
        shown = metric or claim.metric
        named += f" ({shown})" if shown else ""
        unit = of_margin = _Shown(scale=1, suffix="")
    elif claim.quantity == "score_difference":
        unit = POINTS
    elif claim.quantity in SPEED_QUANTITIES:
        unit, of_margin = _Shown(scale=1, suffix="x"), PER_CENT
    allowed = f" (margin {of_margin(claim.margin)}, so {_allowed_text(claim, unit)})" if claim.margin else MARGINLESS
    return f"{named} {RELATIONS[claim.relation]} {unit(claim.expected)}{allowed}"


def _allowed_text(claim: Claim, unit: _Shown) -> str:
    """``at least 98.2 %``: what the claim allows with its margin."""
    least, largest = allowed_values(claim)
    if least is not None and largest is not None:
        return f"from {unit(least)} to {unit(largest)}"
    return f"at least {unit(least)}" if least is not None else f"at most {unit(largest or 0.0)}"


def terms_text(claim: Claim, metrics: Mapping[str, str | None], claims: Sequence[Claim]) -> str:
    """The terms that a claim is judged by: its parts' or its own. ``metrics``: by claim, the metric that was judged."""
    parts = [one for one in claims if one.name in claim.parts] or [claim]
    return " and ".join(claimed_text(part, metrics.get(part.name)) for part in parts) + limits_text(parts)
