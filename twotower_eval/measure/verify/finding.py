"""What a check found: the row of ``checks.jsonl`` before it belongs to a cell."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from twotower_eval.records import CheckOutcome


@dataclass(frozen=True, kw_only=True)
class Finding:
    """As in :class:`twotower_eval.records.Check`, without the cell."""

    name: str
    outcome: CheckOutcome
    detail: str
    value: float | None = None
    limit: float | None = None


def judged(name: str, ok: bool, detail: str, *, value: float | None = None, limit: float | None = None) -> Finding:
    """A check that can fail. A value that is not finite has failed, and is said in words: no journal can hold it."""
    if value is not None and not isfinite(value):
        ok, value, detail = False, None, f"{detail}; the value is not finite"
    return Finding(name=name, outcome="passed" if ok else "failed", detail=detail, value=value, limit=limit)


def told(name: str, detail: str, *, value: float | None = None) -> Finding:
    """A figure to be read beside the others; there is no limit that it could miss."""
    return Finding(name=name, outcome="passed", detail=detail, value=value)


def not_checked(name: str, reason: str) -> Finding:
    """A check that does not apply, or cannot be made here."""
    return Finding(name=name, outcome="not_checked", detail=reason)
