"""Numbers of verdicts, gates and audits as people read them; two that are compared never look equal unless they are."""

from __future__ import annotations

from dataclasses import dataclass

from twotower_eval.records import Estimate

MOST_DECIMALS = 9
ROUNDING = 1e-9  # 0.987 - 0.005 is not quite 0.982


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a number is multiplied by, what stands behind it, and its usual decimals.

    ``most`` decimals are kept where the limit that a number is held against has them itself.
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
    """A number and what it is held against, with as many decimals as it takes to tell them apart."""
    decimals = _decimals(unit, value, limit)
    return unit.text(value, decimals), unit.text(limit, decimals)


def interval(unit: Unit, estimate: Estimate, *, against: float | None = None) -> str:
    """``98.9 % [98.2, 99.6]``, ``2.41x [2.30, 2.53]``; ``against`` is what either end is held against, if anything."""
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
    """What a retention far above 100 % may mean, for verdicts and reports alike."""
    return (
        f"the candidate scores {100 * kept:.0f} % of the baseline: a baseline with a broken config or tokenizer looks "
        "like this; check the baseline"
    )
