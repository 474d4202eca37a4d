"""Why a claim was decided as it was, in words, and in the unit of its quantity."""

from __future__ import annotations

from collections.abc import Mapping

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.numbers import OWN, PERCENT, POINTS, TIMES, Unit, compared
from twotower_eval.analyse.words import fact_text
from twotower_eval.records import Quantity

UNITS: Mapping[Quantity, Unit] = {
    "retention": PERCENT,
    "decoder_exercised_retention": PERCENT,
    "score": PERCENT,
    "score_difference": POINTS,
    "speedup_time": TIMES,
    "speedup_throughput": TIMES,
    "speedup_time_per_device": TIMES,
}


def unit_of(quantity: Quantity, metric: str | None = None) -> Unit:
    """The unit of a quantity; of a score outside retention that of its ``metric``, whatever that is."""
    return UNITS[quantity] if metric is None else OWN


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def look_text(num: int, declared: int | None = None) -> str:
    """``second look, one was declared``; how many were declared is left out where it is not known."""
    shown = f"{ORDINALS[num - 1]} look" if 1 <= num <= len(ORDINALS) else f"look {num}"
    if declared is None:
        return shown
    return f"{shown}, {'one was' if declared == 1 else f'{declared} were'} declared"


def decision_text(unit: Unit, decision: stats.Decision) -> str:
    """``the upper bound 90.1 % is below 98.2 %``; with too little evidence, what there is too little of."""
    if decision.few is not None:
        return fact_text(decision.few)
    return " and ".join(_comparison(unit, one) for one in decision.comparisons)


def _comparison(unit: Unit, found: stats.Comparison) -> str:
    bound, limit = compared(unit, found.value, found.limit)
    falls_short = "does not clear" if found.bound == "lower" else "does not stay below"
    how = falls_short if found.stands == "open" else f"is {found.stands}"
    return f"the {found.bound} bound {bound} {how} {limit}"
