"""What a run of a size can show: power before it, how much more would decide after it, and which percentages so many
trials can give at all (GRIM: Brown and Heathers 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, gcd, log, sqrt

import numpy as np
from scipy.special import gammaln, ndtri, xlog1py, xlogy

from twotower_eval.analyse.stats.decide import ALPHA, MIN_CLUSTERS, limits
from twotower_eval.analyse.stats.intervals import FEW, Figure
from twotower_eval.records import Estimate, Method, Relation

ASSUMED_DISCORDANCE = 0.10  # of right-or-wrong clusters; published flips of quantised or distilled models are 5 to 15 %
ASSUMED_ACCURACY = 0.80  # of the baseline; published tables of this kind average 82 %
POWER = 0.80
TOO_MANY = 1_000  # times the evidence there is: no advice any more


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """A planned task: independent clusters, the baseline's accuracy, and the share of answers that differ.

    ``discordance`` 0 is for tasks that one computation scores for both arms.
    """

    name: str
    num_clusters: int
    accuracy: float
    discordance: float = ASSUMED_DISCORDANCE

    def __post_init__(self) -> None:
        if self.num_clusters < 1 or not 0 < self.accuracy <= 1 or not 0 <= self.discordance <= 1:
            raise ValueError(
                f"task {self.name!r}: a plan needs at least one cluster, an accuracy above 0 and at most 1, and a "
                "discordance between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class PowerPlan:
    """What planned tasks can show of retention, with 80 % power at a one-sided 5 %.

    ``stderr``: expected standard error of retention if nothing is lost. ``smallest_drop``: smallest true drop below 1
    that can be shown. ``refuted_at``: largest true retention at which a claim of ``least`` is refuted;
    ``supported_at``: smallest at which it is supported (above 1: not even a lossless decoder is).
    """

    num_clusters: int
    expected_discordant: float
    stderr: float
    smallest_drop: Figure
    refuted_at: Figure
    supported_at: Figure


def power_plan(tasks: Sequence[PlannedTask], least: float, *, power: float = POWER, alpha: float = ALPHA) -> PowerPlan:
    """Plan retention over equally weighted tasks against a claim that it is at least ``least`` (its margin taken off).

    The drop is taken to be the same share of every task that can differ at all.
    """
    if not tasks:
        raise ValueError("no task to plan for")
    if not 0 < least <= 1.5 or not 0.5 <= power < 1 or not 0 < alpha < 0.5:
        raise ValueError("a plan needs a retention above 0, a power of 0.5 to 1 and an alpha below 0.5")
    reach = float(ndtri(1 - alpha) + ndtri(power))
    num_clusters = sum(task.num_clusters for task in tasks)
    expected = sum(task.num_clusters * task.discordance for task in tasks)
    reason = None
    if expected < FEW:
        reason = f"{expected:.1f} discordant clusters expected, fewer than {FEW}: only an exact bound would apply"
    few = reason
    if num_clusters < MIN_CLUSTERS:
        few = f"{num_clusters} clusters: fewer than {MIN_CLUSTERS} cannot support a claim"
    smallest = _crossing(lambda r: 1 - r - reach * planned_stderr(tasks, r), 0.0, 1.0)
    refuted = _crossing(lambda r: least - r - reach * planned_stderr(tasks, r), 0.0, least)
    supported = _crossing(lambda r: least - r + reach * planned_stderr(tasks, r), least, least + 1.0)
    unreachable = "not even the loss of every answer would be seen"
    return PowerPlan(
        num_clusters=num_clusters,
        expected_discordant=expected,
        stderr=planned_stderr(tasks, 1.0),
        smallest_drop=_figure(None if smallest is None else 1 - smallest, reason, unreachable),
        refuted_at=_figure(refuted, reason, unreachable),
        supported_at=_figure(supported, few, "not even a doubled score would be enough"),
    )


def power_text(plan: PowerPlan) -> str:
    """The power line, printed before a run: the smallest drop that its documents can show, and what that assumes."""
    assumed = (
        f"assuming that {100 * ASSUMED_DISCORDANCE:g} % of the answers differ and that the baseline is right in "
        f"{100 * ASSUMED_ACCURACY:g} %"
    )
    size = f"{plan.num_clusters:,} independent documents"
    drop = plan.smallest_drop
    if drop.value is None:
        return (
            f"warning: {plan.num_clusters:,} documents are too few to see a drop of retention; {_enough_text(plan)} "
            f"(power line: {assumed}; {drop.reason})"
        )
    smallest = f"the smallest drop of retention that {size} can show is {100 * drop.value:.2g} points"
    return f"power line: {smallest}, with {100 * POWER:g} % power, one-sided {100 * ALPHA:g} %, {assumed}"


def _enough_text(plan: PowerPlan) -> str:
    """How many documents in all would be enough, at the share of them that is expected to differ."""
    if not 0 < plan.expected_discordant < FEW:
        return "take more documents or tasks (--limit, --tasks)"
    enough = ceil(FEW * plan.num_clusters / plan.expected_discordant - 1e-9)
    return f"{enough:,} or more in all are enough (--limit, --tasks)"


def planned_stderr(tasks: Sequence[PlannedTask], retention: float) -> float:
    """Standard error of retention by linearisation, for right-or-wrong clusters and a true ``retention``.

    Per cluster ``z = b - R a`` is -R where an answer is lost, 1 where one is gained, 1 - R where both are right. The
    losses and gains of a task are what its discordance and its drop leave room for.
    """
    variance = 0.0
    for task in tasks:
        own = retention if task.discordance > 0 else 1.0
        drop = min(1.0, max(-1.0, (1 - own) * task.accuracy))
        discordance = max(task.discordance, abs(drop))
        lost, gained = (discordance + drop) / 2, (discordance - drop) / 2
        both = max(0.0, task.accuracy - lost)
        mean = both * (1 - retention) - lost * retention + gained
        square = both * (1 - retention) ** 2 + lost * retention**2 + gained
        variance += max(0.0, square - mean**2) / task.num_clusters
    return sqrt(variance) / sum(task.accuracy for task in tasks)


@dataclass(frozen=True, kw_only=True)
class Needed:
    """How much evidence would decide if the estimate stayed the same: in total, and beyond what there is.

    ``None`` with a reason where no amount would, or where the interval has ``decided`` already.
    """

    total: int | None
    more: int | None
    reason: str | None = None
    decided: bool = False


def still_needed(
    estimate: Estimate,
    *,
    relation: Relation,
    expected: float,
    margin: float,
    n: int | None = None,
    log_scale: bool = False,
    least_n: int = MIN_CLUSTERS,
) -> Needed:
    """Clusters (or, with ``n`` rounds and ``log_scale``, rounds) at which an inconclusive verdict would be decided.

    The estimate's distance to its bounds scales by 1 / sqrt(n); for an exact bound on no difference, by 1 / n as long
    as none is seen. For speed on sampled prompts, prompts grow with the rounds. ``least_n`` is the smallest number that
    can support a claim at all.
    """
    n = estimate.n if n is None else n
    points = (estimate.value, estimate.low, estimate.high, *limits(relation, expected, margin))
    if log_scale and min(point for point in points if point is not None) <= 0:
        raise ValueError("a log scale needs bounds and limits above 0")
    convert = log if log_scale else float
    value, low, high = convert(estimate.value), convert(estimate.low), convert(estimate.high)
    least, largest = (None if limit is None else convert(limit) for limit in points[3:])
    below, above = value - low, high - value
    # Per limit: how far inside the claim the value is; the half-width that must fit to support it, or to refute it.
    sides = [] if least is None else [(value - least, below, above)]
    sides += [] if largest is None else [(largest - value, above, below)]
    if any(inside == 0 for inside, _, _ in sides):
        return Needed(total=None, more=None, reason="the estimate sits on the limit: no number would decide")
    holds = all(inside > 0 for inside, _, _ in sides)
    if holds:
        factor = max(support / inside for inside, support, _ in sides)
    else:
        factor = min(refute / -inside for inside, _, refute in sides if inside < 0)
    # An exact bound on clusters of which none differs shrinks as fast as their number grows, others by its root.
    none_differs = estimate.method == Method(kind="exact_bound", num_differing=0)
    total_n = n * (factor if none_differs else factor**2)
    if total_n > TOO_MANY * n:
        return Needed(
            total=None,
            more=None,
            reason=f"the estimate sits so near the limit that over {TOO_MANY:,} times the evidence would be needed",
        )
    total = max(ceil(total_n), least_n if holds else 0)
    if total <= n:
        return Needed(total=None, more=None, reason="decided already", decided=True)
    return Needed(total=total, more=total - n)


def _crossing(function: Callable[[float], float], low: float, high: float) -> float | None:
    """Where a function changes sign between two arguments; ``None`` where it does not."""
    at_low, at_high = function(low), function(high)
    if (at_low > 0) == (at_high > 0):
        return None
    from scipy.optimize import brentq  # takes long to import, and few plan a size

    return float(brentq(function, low, high, xtol=1e-9))


def _figure(value: float | None, reason: str | None, unreachable: str) -> Figure:
    if reason is not None:
        return Figure(value=None, reason=reason)
    return Figure(value=value) if value is not None else Figure(value=None, reason=unreachable)


MAX_SAMPLES = 100


def possible_counts(percent: float, decimals: int, n: int) -> tuple[int, ...]:
    """Every k for which 100 k / n rounds to ``percent`` at ``decimals`` decimals; may be empty.

    ValueError for a percentage outside 0 to 100 or with more than ``decimals`` decimals.
    """
    if n < 1 or decimals < 0:
        raise ValueError(f"{n} trials at {decimals} decimals: there must be at least one trial and no fewer than 0")
    published = Fraction(f"{percent:.{decimals}f}")
    if abs(float(published) - percent) > 1e-9 or not 0 <= published <= 100:
        raise ValueError(f"{percent} is no percentage with {decimals} decimals")
    half = Fraction(1, 2 * 10**decimals)
    low, high = ceil((published - half) * n / 100), floor((published + half) * n / 100)
    return tuple(range(max(low, 0), min(high, n) + 1))


def can_misfit(decimals: int, n: int) -> bool:
    """Whether some percentage with so many decimals is no k / n; if none is, a fit means nothing.

    There are N = 10^(decimals + 2) steps from 0 to 100 %. From n = N on each is within half a unit of some k / n.
    Below, n + 1 counts cover as many steps, and one more for each count that lies halfway between two.
    """
    steps = int(10 ** (decimals + 2))
    shared = gcd(n, steps)
    halfway = shared if n // shared % 2 == 0 else 0
    return n + halfway < steps


def share_possible(decimals: int, n: int) -> float:
    """Share of all percentages with so many decimals that are some k / n: how often one fits by chance."""
    steps = int(10 ** (decimals + 2))
    shared = gcd(n, steps)
    covered = n + 1 + (shared if n // shared % 2 == 0 else 0)
    return min(covered, steps + 1) / (steps + 1)


def chance_of_equal(percent: float, decimals: int, n: int) -> float:
    """How often two models print the same percentage that are right with this probability, independently, n times.

    Models that agree on many documents do so more often.
    """
    counts = np.arange(n + 1)
    printed = np.round(100 * counts / n, decimals)
    _, place = np.unique(printed, return_inverse=True)
    ways = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    chances = np.exp(ways + xlogy(counts, percent / 100) + xlog1py(n - counts, -percent / 100))
    return float((np.bincount(place, weights=chances) ** 2).sum())


def smallest_samples(percents: Sequence[float], decimals: int, n: int, limit: int = MAX_SAMPLES) -> int | None:
    """Smallest number of samples per problem, up to ``limit``, with which all ``percents`` of ``n`` problems fit.

    ``None`` where no number up to the limit fits. Where :func:`can_misfit` says no for the answer, every percentage
    fits and it says nothing.
    """
    if not percents:
        raise ValueError("no published percentage to check")
    fitting = (s for s in range(1, limit + 1) if all(possible_counts(percent, decimals, n * s) for percent in percents))
    return next(fitting, None)
