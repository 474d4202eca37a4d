"""Speedups from interleaved timed calls: ratios of sums on the log scale, by the crossed paired bootstrap.

Each replicate draws one set of calls (batches of prompts), shared by all rounds and both arms, and one set of rounds,
shared by both arms. On a ``fixed`` workload the calls are a fixed factor. The crossed bootstrap alone is biased with
few rounds: its variance lacks the factor n / (n - 1) and counts the residual up to three times (Owen 2007, "The
pigeonhole bootstrap"). Its standard error is therefore scaled to the unbiased two-way variance of the linearised
ratio, and the interval uses Student's t with Satterthwaite's degrees of freedom. The degrees of freedom of calls, and
of rounds where calls are fixed, are those that their fourth powers leave.

Both kinds of workload have sums that are skew, and a symmetric interval then supports too often what is false. On a
fixed workload, where a stall now and then skews even sums over many calls, the interval is, end by end, the wider of
the symmetric one and of the bootstrap's percentiles corrected for skewness. Where prompts are sampled, answers of
unlike length are what skews, and few calls show too little of it. So the variance between calls is the jackknife's,
which knows how much a long call bends the ratio; one more call like the most telling one is added to variance and
skewness, less and less the more calls carry them; and the end on the side of the tail is moved out (see
``skewed_t_interval``). What no call shows, such as a rare answer that runs on to its budget, is for ``tails``.

Rounds are not taken to be independent: the variance between them is multiplied by what ``serial_dependence`` says of
their order. So is that between launches, where these are resampled, by what ``carried_over`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, isfinite, log, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np

from twotower_eval.analyse.stats.intervals import (
    LEVEL,
    NUM_RESAMPLES,
    Caution,
    Floats,
    Widening,
    carried_over,
    corrected_percentiles,
    dof_of_mean,
    from_log,
    method_with,
    one_more,
    serial_dependence,
    sittings,
    skewed_t_interval,
    third_cumulant,
)
from twotower_eval.analyse.stats.tails import Documents, PerCall, Tail, shifts, tail_of
from twotower_eval.errors import NoEstimate
from twotower_eval.records import MIN_LAUNCHES, Estimate, Method

NULL_LEVEL = 0.99  # of the A/A null's interval
MIN_MOVE = 0.001  # on the log scale: smaller changes by calls that were not timed are not mentioned
JUDGED = ("time", "throughput")  # the quantities that claims of speed are about
Quantity = Literal["time", "throughput", "length", "baseline_rate", "candidate_rate"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedCalls:
    """Both arms of the same calls in the same rounds: seconds and useful tokens, each (R, P).

    Rounds are in the order in which they were timed, within each launch. ``launches`` names the launch of each round;
    ``fixed`` says that the calls are not a sample of prompts. What is
    known of calls that were not timed is optional: ``limits_s``, the seconds of a call at its budget in either arm,
    and ``documents``, the lengths of all documents.
    """

    baseline_s: Floats
    candidate_s: Floats
    baseline_tokens: Floats
    candidate_tokens: Floats
    launches: Sequence[str]
    fixed: bool
    limits_s: tuple[float, float] | None = None
    documents: Documents | None = None

    def __post_init__(self) -> None:
        arrays = (self.baseline_s, self.candidate_s, self.baseline_tokens, self.candidate_tokens)
        if any(array.shape != self.baseline_s.shape or array.ndim != 2 for array in arrays):
            raise ValueError("timed calls: both arms need the same rounds and the same calls")
        if self.baseline_s.size == 0:
            raise NoEstimate("timed calls: there are none, so there is no speedup")
        if len(self.launches) != len(self.baseline_s):
            raise ValueError("timed calls: every round needs its launch")
        if not all(np.isfinite(array).all() for array in arrays) or min(array.min() for array in arrays) < 0:
            raise ValueError("timed calls: times and token counts must be finite and at least 0")
        if self.limits_s is not None and not all(isfinite(limit) and limit >= 0 for limit in self.limits_s):
            raise ValueError("timed calls: the seconds of a call at its budget must be finite and at least 0")

    @property
    def tail(self) -> Tail:
        """How the time is spread over calls, in the arm in which fewer calls carry it."""
        return tail_of(self.baseline_s, self.candidate_s)


def speedup(
    calls: TimedCalls,
    quantity: Quantity = "time",
    *,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    caution: Caution = "bounded",
) -> Estimate:
    """A ratio of sums with its interval; ``n`` counts pairs of timed calls, ``serial`` says what its rounds are worth.

    ``time``: seconds of the baseline over those of the candidate. ``throughput``: useful tokens per second, candidate
    over baseline. ``length``: useful tokens, candidate over baseline. ``baseline_rate``, ``candidate_rate``: useful
    tokens per second of one arm. NoEstimate where there is one round only, or one call of sampled prompts, or where a
    sum is 0. ``caution`` says how dependence between rounds widens the interval: ``bounded`` for what is judged,
    ``estimated`` for an A/A null, which tells how noisy the machine is.
    """
    crossing = _Crossing(calls, num_resamples, seed)
    log_value, log_Q, influence_UP = 0.0, np.zeros(num_resamples), np.zeros(crossing.shape)
    without_P, logs_R = np.zeros(crossing.shape[1]), np.zeros(len(calls.launches))
    for sign, values_RP in _terms(calls, quantity):
        values_UP = crossing.by_unit(values_RP)
        total, total_Q = values_UP.sum(), crossing.draw(values_UP)
        if total <= 0 or (total_Q <= 0).any():
            raise NoEstimate("no useful tokens, or no time passed: the ratio is undefined")
        log_value += sign * float(np.log(total))
        log_Q += sign * np.log(total_Q)
        influence_UP += sign * values_UP.size * values_UP / total
        if crossing.crossed:
            without_P += sign * np.log(_others(values_UP))
        logs_R += sign * _log_sums(values_RP)
    widening = crossing.widening(logs_R, caution, level)
    found = crossing.estimate(log_value, log_Q, influence_UP, without_P, level, widening)
    return with_unseen(found, calls, throughput=quantity == "throughput") if quantity in JUDGED else found


def least_speedup(calls: Sequence[TimedCalls], quantity: Quantity = "time", *, level: float = LEVEL) -> Estimate:
    """The least of the speedups over several baselines: that over the strongest one, whichever it is.

    The lower end is the least of the lower ends. It needs no correction for the choice: it lies above the true least
    only where the lower end of the strongest baseline's own speedup does. The upper end is the least of upper ends that
    hold for all baselines at once (Bonferroni).

    NoEstimate where one of the speedups has none.
    """
    found = [speedup(one, quantity, level=level) for one in calls]
    least = min(found, key=lambda one: one.value)
    if len(found) == 1:
        return least
    together = 1 - (1 - level) / len(found)
    high = min(speedup(one, quantity, level=together).high for one in calls)
    low = min(one.low for one in found)
    return replace(least, low=low, high=high, method=method_with(least.method, least_of=len(found)))


def with_unseen(estimate: Estimate, calls: TimedCalls, *, throughput: bool) -> Estimate:
    """The estimate with its ends widened for calls that were not timed; see ``tails``."""
    if calls.fixed:
        return estimate
    arrays = (calls.baseline_s, calls.candidate_s, calls.baseline_tokens, calls.candidate_tokens)
    baseline_s, candidate_s, baseline_tokens, candidate_tokens = (array.mean(axis=0) for array in arrays)
    per_call = PerCall(baseline_s, candidate_s, baseline_tokens, candidate_tokens, throughput)
    low, high = shifts(
        per_call,
        log_value=log(estimate.value),
        level=estimate.level,
        limits_s=calls.limits_s,
        documents=calls.documents,
    )
    method = method_with(estimate.method, moved_out=max(-low, high) >= MIN_MOVE)
    return replace(estimate, low=estimate.low * exp(low), high=estimate.high * exp(high), method=method)


def geometric_speedup(
    calls: TimedCalls, *, level: float = LEVEL, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """Geometric mean of the calls' own time ratios, baseline over candidate: every call weighs the same (secondary)."""
    if min(calls.baseline_s.min(), calls.candidate_s.min()) <= 0:
        raise NoEstimate("a timed call took no time: its ratio is undefined")
    crossing = _Crossing(calls, num_resamples, seed)
    sums_UP = crossing.by_unit(np.log(calls.baseline_s / calls.candidate_s))
    counts_UP = crossing.by_unit(np.ones_like(calls.baseline_s))
    log_value = float(sums_UP.sum() / counts_UP.sum())
    influence_UP = sums_UP.size * (sums_UP - log_value * counts_UP) / counts_UP.sum()
    without_P = np.zeros(crossing.shape[1])
    if crossing.crossed:
        without_P = _others(sums_UP) / _others(counts_UP)
    log_Q = crossing.draw(sums_UP) / crossing.draw(counts_UP)
    widening = crossing.widening(np.log(calls.baseline_s / calls.candidate_s).mean(axis=1), "bounded", level)
    return crossing.estimate(log_value, log_Q, influence_UP, without_P, level, widening)


def per_device(estimate: Estimate, *, baseline_devices: int, candidate_devices: int) -> Estimate:
    """Speedup for each device used: two devices that are 2.42x as fast as one are 1.21x per device."""
    if min(baseline_devices, candidate_devices) < 1:
        raise ValueError("every arm runs on at least one device")
    scale = baseline_devices / candidate_devices
    return replace(
        estimate,
        value=scale * estimate.value,
        low=scale * estimate.low,
        high=scale * estimate.high,
        method=method_with(estimate.method, devices=(baseline_devices, candidate_devices)),
    )


def resamples_launches(launches: Sequence[str]) -> bool:
    """Whether there are enough launches, with enough rounds, to resample launches; else their variation is not
    measured.
    """
    return len(set(sittings(launches))) >= MIN_LAUNCHES


MAX_DRAWN = 500
_DRAWN: dict[Any, Floats] = {}


class _Crossing:
    """One set of drawn rounds (or launches) and one of drawn calls, applied alike to every sum."""

    def __init__(self, calls: TimedCalls, num_resamples: int, seed: int) -> None:
        names = sittings(calls.launches) if resamples_launches(calls.launches) else range(len(calls.launches))
        _, self._unit_R = np.unique(np.asarray(names), return_inverse=True)
        self.shape = (int(self._unit_R.max()) + 1, calls.baseline_s.shape[1])
        num_units, num_calls = self.shape
        if num_units < 2:
            raise NoEstimate("one measured round only: its variation is unknown, so there is no interval")
        self.crossed = not calls.fixed
        if self.crossed and num_calls < 2:
            why = "how prompts differ is unknown, so there is no interval: time more of them"
            raise NoEstimate(f"one call of sampled prompts only: {why}")
        self._draws_QU = _multiplicities(num_units, num_resamples, seed)
        self._draws_QP = (
            _multiplicities(num_calls, num_resamples, seed + 1) if self.crossed else np.ones((num_resamples, num_calls))
        )
        self._drawing = (num_resamples, seed, self.crossed)
        self._method = Method(
            kind="crossed_bootstrap",
            num_resamples=num_resamples,
            drawn="launches" if resamples_launches(calls.launches) else "rounds",
            num_drawn=num_units,
            num_calls=num_calls if self.crossed else None,
        )
        self._seed = seed
        self._n = calls.baseline_s.size
        self._launches = calls.launches

    def by_unit(self, values_RP: Floats) -> Floats:
        summed_UP = np.zeros(self.shape)
        np.add.at(summed_UP, self._unit_R, values_RP)
        return summed_UP

    def draw(self, values_UP: Floats) -> Floats:
        # Figures of a report share their sums: seconds of an arm are in its speedups, its rate and every gate.
        key = (self._drawing, values_UP.shape, values_UP.tobytes())
        if key not in _DRAWN:
            if len(_DRAWN) >= MAX_DRAWN:
                _DRAWN.clear()
            _DRAWN[key] = ((self._draws_QU @ values_UP) * self._draws_QP).sum(axis=1)
            _DRAWN[key].flags.writeable = False
        return _DRAWN[key]

    def widening(self, logs_R: Floats, caution: Caution, level: float) -> Widening:
        """The widening of the variance between rounds for their dependence, from each round's own log ratio."""
        found = serial_dependence(logs_R, self._launches, caution)
        if not resamples_launches(self._launches):
            return found
        num = self.shape[0]
        factor = carried_over(logs_R, self._launches, level) if caution == "bounded" else 1.0
        facts = replace(found.facts, effective_rounds=float(num), block=1, widening=sqrt(factor), launches=True)
        return Widening(factor=factor, dof=num - 1.0, facts=facts)

    def estimate(
        self,
        log_value: float,
        log_Q: Floats,
        influence_UP: Floats,
        without_P: Floats,
        level: float,
        widening: Widening,
    ) -> Estimate:
        """The value with its interval; ``without_P``: the value without each call in turn, where calls are drawn."""
        of_both = self.crossed
        spread = (
            _of_both(influence_UP, without_P, widening) if of_both else _of_units(influence_UP.mean(axis=1), widening)
        )
        stderr = spread.scale * float(np.std(log_Q))
        skew = spread.skew if self.crossed else 0.0
        low, high = skewed_t_interval(log_value, stderr, level=level, dof=spread.dof, skew=skew)
        if not self.crossed:
            corrections = {"dof": spread.dof, "inflation": spread.scale, "skew": spread.skew}
            skewed_low, skewed_high = corrected_percentiles(log_Q, log_Q, log_value, level=level, **corrections)
            low, high = min(low, skewed_low), max(high, skewed_high)
        return Estimate(
            value=from_log(log_value),
            low=from_log(low),
            high=from_log(high),
            level=level,
            n=self._n,
            method=self._method,
            seed=self._seed,
            serial=widening.facts,
        )


@lru_cache(maxsize=16)
def _multiplicities(num: int, num_resamples: int, seed: int) -> Floats:
    """How often each of ``num`` items is drawn, per resample: (Q, num). The same for every figure of a report."""
    rng = np.random.default_rng(seed)
    times_QI: Floats = rng.multinomial(num, [1 / num] * num, size=num_resamples).astype(float)
    times_QI.flags.writeable = False
    return times_QI


class _Spread(NamedTuple):
    """Factor from the bootstrap's standard error to the one used, its degrees of freedom, skewness of the estimate."""

    scale: float
    dof: float
    skew: float


def _of_units(of_unit_U: Floats, widening: Widening) -> _Spread:
    """The spread where only rounds, or launches, vary."""
    num = len(of_unit_U)
    variance = float(of_unit_U.var(ddof=1)) / num
    skew = third_cumulant(of_unit_U) / variance**1.5 if variance > 0 else 0.0
    dof = min(dof_of_mean(of_unit_U), widening.dof)
    return _Spread(scale=sqrt(widening.factor * num / (num - 1)), dof=dof, skew=skew)


def _of_both(influence_UP: Floats, without_P: Floats, widening: Widening) -> _Spread:
    """The spread where calls are drawn as well; ``without_P``: the estimate without each call in turn."""
    num_units, num_calls = influence_UP.shape
    rows_UP, columns_UP = influence_UP.mean(axis=1, keepdims=True), influence_UP.mean(axis=0, keepdims=True)
    residual_UP = influence_UP - rows_UP - columns_UP + influence_UP.mean()
    num_free = (num_units - 1) * (num_calls - 1)
    of_units, of_calls = float(rows_UP.var(ddof=1)) / num_units, float(columns_UP.var(ddof=1)) / num_calls
    of_residual = float((residual_UP**2).sum()) / num_free / influence_UP.size
    pseudo_P = (num_calls - 1) * (without_P.mean() - without_P)
    bent = max(0.0, float(pseudo_P.var(ddof=1)) / num_calls - of_calls)
    call_dof, (square, cube) = dof_of_mean(pseudo_P), one_more(pseudo_P)
    by_bootstrap = of_units * (num_units - 1) / num_units + of_calls * (num_calls - 1) / num_calls
    by_bootstrap += of_residual * num_free / influence_UP.size
    of_units *= widening.factor
    # Both margins hold the residual, so it is counted twice in their sum.
    unbiased = max(of_residual, of_units + of_calls - of_residual)
    squares = of_units**2 / widening.dof + of_calls**2 / call_dof + of_residual**2 / num_free
    if unbiased <= 0 or squares <= 0 or by_bootstrap <= 0:
        return _Spread(scale=1.0, dof=1e9, skew=0.0)
    dof = max(unbiased**2 / squares, min(widening.dof, call_dof))
    own = _own(of_calls, of_residual)
    unseen = own * (bent + square)
    of_rows = _own(of_units, of_residual) * widening.factor**1.5 * third_cumulant(rows_UP)
    cubes = of_rows + own * third_cumulant(columns_UP)
    skew = (cubes + own * cube) / (unbiased + unseen) ** 1.5
    return _Spread(scale=sqrt((unbiased + unseen) / by_bootstrap), dof=dof, skew=skew)


def _own(of_margin: float, of_residual: float) -> float:
    """Share of a margin's variance that is not noise of single timings, whose skewness averages out."""
    return max(0.0, of_margin - of_residual) / of_margin if of_margin > 0 else 0.0


def _others(values_UP: Floats) -> Floats:
    """For each call, the sum over all others; added up, as a subtraction may lose small sums."""
    of_call_P: Floats = values_UP.sum(axis=0)
    others_P: Floats = of_call_P @ (1 - np.eye(len(of_call_P)))
    return others_P


def _log_sums(values_RP: Floats) -> Floats:
    """Logarithm of each round's sum; a round with a sum of 0 is set to the mean of the others."""
    sums_R = values_RP.sum(axis=1)
    logs_R: Floats = np.log(np.where(sums_R > 0, sums_R, sums_R.mean()))
    return logs_R


def _terms(calls: TimedCalls, quantity: Quantity) -> tuple[tuple[int, Floats], ...]:
    """Signed logarithms of the sums that make up a quantity."""
    of_baseline, of_candidate = (1, calls.baseline_tokens), (1, calls.candidate_tokens)
    terms: dict[Quantity, tuple[tuple[int, Floats], ...]] = {
        "time": ((1, calls.baseline_s), (-1, calls.candidate_s)),
        "throughput": (of_candidate, (-1, calls.candidate_s), (-1, calls.baseline_tokens), (1, calls.baseline_s)),
        "length": (of_candidate, (-1, calls.baseline_tokens)),
        "baseline_rate": (of_baseline, (-1, calls.baseline_s)),
        "candidate_rate": (of_candidate, (-1, calls.candidate_s)),
    }
    return terms[quantity]
