"""Numbers as they were printed: each is an interval of half a unit in its last place either way, ends included.

So whatever way of rounding to the nearest was used, the exact value lies inside. Figures that were cut off instead of
rounded are not counted as honest: an audit only says where that would explain a contradiction. Exact, in fractions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor

from twotower_eval.analyse.claims.reading import value_of
from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject

DECIMALS = range(10)  # of a number that somebody prints
HUNDRED = Fraction(100)
_PRINTED = re.compile(r"[+-]?\d+(\.\d+)?")


@dataclass(frozen=True)
class Span:
    """What a number can be: ``value`` from the figures as printed, ``low`` to ``high`` from all that round to them."""

    value: Fraction
    low: Fraction
    high: Fraction

    def meets(self, other: Span) -> bool:
        """Whether some value lies in both."""
        return self.low <= other.high and other.low <= self.high

    def roundings(self, decimals: int) -> list[Fraction]:
        """All numbers of so many decimals that it may round to, whichever way ties go."""
        units, half = 10**decimals, Fraction(1, 2)
        first, last = -floor(half - self.low * units), floor(self.high * units + half)
        return [Fraction(number, units) for number in range(first, last + 1)]

    def figures(self, decimals: int) -> tuple[Fraction, Fraction]:
        """The least and the largest of them, but for those that only an end itself rounds to."""
        if self.low == self.high:
            found = self.roundings(decimals)
            return found[0], found[-1]
        units, half = 10**decimals, Fraction(1, 2)
        return Fraction(floor(self.low * units - half) + 1, units), Fraction(ceil(self.high * units + half) - 1, units)

    def times(self, factor: Fraction | int) -> Span:
        """A multiple, by a factor that is not negative."""
        return Span(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Stated:
    """A number as printed, with its decimals."""

    value: Fraction
    decimals: int

    def span(self, *, cut: bool = False) -> Span:
        """What it can stand for; with ``cut``, had the digits behind the last one been dropped."""
        unit = Fraction(1, 10**self.decimals)
        below, above = (Fraction(0), unit) if cut else (unit / 2, unit / 2)
        return Span(self.value, self.value - below, self.value + above)

    def percent_span(self, *, cut: bool = False) -> Span:
        """The same of a percentage, which is never below 0 or above 100."""
        span = self.span(cut=cut)
        return Span(span.value, max(span.low, Fraction(0)), min(span.high, HUNDRED))

    @property
    def text(self) -> str:
        """The digits, trailing zeros included."""
        return f"{float(self.value):.{self.decimals}f}"

    def __float__(self) -> float:
        return float(self.value)


def total(spans: Iterable[Span]) -> Span:
    """The sum: every term may lie anywhere in its interval, whatever the others do."""
    found = list(spans)
    return Span(*(sum((getattr(one, end) for one in found), Fraction(0)) for end in ("value", "low", "high")))


def ratio(above: Span, below: Span) -> Span:
    """The quotient of numbers that are not negative; ``below`` is above 0 all over."""
    return Span(above.value / below.value, above.low / below.high, above.high / below.low)


def difference(first: Span, second: Span) -> Span:
    """The first less the second."""
    return Span(first.value - second.value, first.low - second.high, first.high - second.low)


def stated_of(where: str, table: JsonObject, key: str, decimals: int | None = None) -> Stated:
    """The number of a key. As a text it says its own decimals, as in ``"98.70"``.

    A number of TOML has lost its trailing zeros, so ``decimals`` say how many it was printed with; where they are
    ``None``, as many as it shows. UserError where it has more, or is no number.
    """
    value = table.get(key)
    if isinstance(value, str) and _PRINTED.fullmatch(value.strip()):
        number, own = Decimal(value.strip()), len(value.strip().partition(".")[2])
    elif isinstance(value, str):
        raise UserError(f"{where}: {key} must be a number, as printed, not {value!r}")
    else:
        read = value_of(where, table, key, float)
        number = Decimal(value if isinstance(value, int) else repr(read))
        shown = max(0, -int(number.as_tuple().exponent))
        if decimals is not None and abs(round(read, decimals) - read) > 1e-9:
            raise UserError(f"{where}: {key} must be a number with {decimals} decimals, as printed, not {value!r}")
        own = shown if decimals is None else decimals
    check_decimals(where, own)
    return Stated(value=Fraction(round(number, own)), decimals=own)


def check_decimals(where: str, decimals: int) -> None:
    """UserError where nobody prints so many."""
    if decimals not in DECIMALS:
        raise UserError(f"{where}: decimals must be from 0 to {DECIMALS[-1]}, not {decimals}")


def percent_of(where: str, table: JsonObject, key: str, decimals: int | None = None) -> Stated:
    """The same of a percentage from 0 to 100; another unit is refused, with what it may be."""
    value = table.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and decimals is not None:
        odd = abs(round(value, decimals) - value) > 1e-9 or not 0 <= value <= 100
        outside = ": scores in other units than percent are left out" if not 0 <= value <= 100 else ""
        if odd:
            what = f"{key} must be a percentage with {decimals} decimals, as printed, not {value!r}"
            raise UserError(f"{where}: {what}{outside}")
    stated = stated_of(where, table, key, decimals)
    if not 0 <= stated.value <= 100:
        what = f"{key} must be a percentage from 0 to 100, not {stated.text}"
        raise UserError(f"{where}: {what}: scores in other units than percent are left out")
    return stated
