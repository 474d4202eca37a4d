"""An estimate that may be missing, never without its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twotower_eval.errors import NoEstimate, UserError
from twotower_eval.records import Estimate


class ArmsDifferError(UserError):
    """Baseline and candidate were not given the same: what they did cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An estimate, or the reason why there is none."""

    estimate: Estimate | None
    reason: str | None = None


def measured(compute: Callable[[], Estimate]) -> Measured:
    """What ``compute`` gives, or the reason in its NoEstimate: whatever else it raises is a bug and goes on."""
    try:
        return Measured(estimate=compute())
    except NoEstimate as error:
        return Measured(estimate=None, reason=str(error))
