"""The price of looking again: at what level each look at a claim is judged, so that all of them together err rarely.

Whoever measures until a claim is supported will have it supported in the end, be it true or not. So the error rate is
spent: 5 % over the looks that a claim declares beforehand, and for each further one a part of 1 %, half of the last.
By the union bound all looks together support a false claim in less than 6 %, whatever is pooled or chosen among them.
"""

from __future__ import annotations

ALPHA = 0.05  # one-sided, of all declared looks together
FIRST_EXTRA_ALPHA = 0.005  # of the first look that was not declared
MOST_EXTRA = 4  # a further one decides nothing: its level would be beyond what intervals are good for


def look_alpha(num_looks: int, declared: int = 1) -> float | None:
    """The one-sided error rate that this many looks, of which so many were declared, leave to the last one.

    ``None`` where nothing is left.
    """
    if num_looks < 1 or declared < 1:
        raise ValueError(f"{num_looks} looks, {declared} declared: there is at least one of each")
    if num_looks <= declared:
        return ALPHA / declared
    extra = num_looks - declared
    return FIRST_EXTRA_ALPHA * 0.5 ** (extra - 1) if extra <= MOST_EXTRA else None


def strictest_alpha() -> float:
    """That of the last look that can decide anything."""
    return FIRST_EXTRA_ALPHA * 0.5 ** (MOST_EXTRA - 1)
