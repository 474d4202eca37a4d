"""Numbers as verdicts print them: sensible digits, and never so few that two that differ look equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower_eval.analyse.compare.figures import PERCENT, POINTS, TIMES, Unit, compared, interval
from twotower_eval.records import Estimate


@pytest.mark.parametrize(
    ("unit", "value", "limit", "shown"),
    [
        (PERCENT, 0.900901, 0.987 - 0.005, ("90.1 %", "98.2 %")),
        (PERCENT, 0.900901, 0.9825, ("90.09 %", "98.25 %")),
        (PERCENT, 0.98196, 0.982, ("98.196 %", "98.200 %")),
        (PERCENT, 0.982, 0.987 - 0.005, ("98.2 %", "98.2 %")),
        (PERCENT, 0.5, 1 / 3, ("50.00 %", "33.33 %")),
        (TIMES, 1.2512, 2.42 - 0.05 * 2.42, ("1.25x", "2.30x")),
        (TIMES, 2.2991, 2.299, ("2.2991x", "2.2990x")),
        (POINTS, -0.2031, -0.25, ("-20.3 points", "-25.0 points")),
    ],
)
def test_two_that_are_compared(unit: Unit, value: float, limit: float, shown: tuple[str, str]) -> None:
    assert compared(unit, value, limit) == shown


@given(st.floats(0.1, 3), st.floats(0.1, 3))
def test_what_differs_looks_different_and_in_order(value: float, limit: float) -> None:
    for unit in (PERCENT, POINTS, TIMES):
        shown = [float(text.removesuffix(unit.suffix)) for text in compared(unit, value, limit)]
        if abs(value - limit) > 1e-8:
            assert (shown[0] < shown[1]) == (value < limit)
            assert shown[0] != shown[1]


def test_an_interval_held_against_a_limit_keeps_clear_of_it() -> None:
    estimate = Estimate(value=0.71, low=0.50004, high=0.92, level=0.9, n=9, method="given")
    assert interval(PERCENT, estimate) == "71.0 % [50.0, 92.0]"
    assert interval(PERCENT, estimate, against=0.5) == "71.000 % [50.004, 92.000]"
    assert interval(TIMES, estimate) == "0.71x [0.50, 0.92]"
