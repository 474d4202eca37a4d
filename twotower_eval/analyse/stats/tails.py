"""What calls that were not timed could do to a speedup: the tail over prompts, of which few calls see little.

The bootstrap knows the calls that it was given. A few answers that run on to their budget, lengths with a heavy tail,
a gain that falls with length: each can make the ratio of sums over all prompts another one than that of any sample.
So the ends of an interval move out by what longer calls than those seen may change, by the surest knowledge there is:

- ``Documents``: the lengths of more documents than were timed are known. Times are predicted by tokens (a regression
  estimator: each arm's seconds move by its slope times the difference of mean tokens), and documents longer than any
  that was timed take their share at half the baseline's speed, or at the gain that the trend over length foretells if
  it is worse. Not for batches: each lasts as long as its longest answer, and only the sums of its tokens are known.
  Where they are not all that there are, the rest is open, as below, by as many documents as are known.
- Limits: what a call takes at its budget is known. As many calls as the rule of three leaves unseen may be of that
  kind in one arm and ordinary in the other. Tokens per second change by those that have no gain.
- Neither: where the longest calls show a heavy tail (Hill 1975, "A simple general approach to inference about the tail
  of a distribution"), it is drawn out beyond them by the same rule of three, at the gain that the trend foretells.
  Runaways of which a sample shows none leave no trace in it: only enough calls exclude them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, inf, log, log1p, sqrt
from typing import NamedTuple

import numpy as np

from twotower_eval.analyse.stats.intervals import Floats, binomial_upper_bound, t_quantile

TAIL_SHARE = 0.1  # of the calls, the longest, that tell how heavy the tail is
LEAST_TAIL = 4  # minimum number of calls in it
LEAST_CALLS = 20  # of fewer, the longest four are no tail
HEAVY, LIGHT = 2.0, 2.5  # tail indices: up to the first the tail counts in full, from the second on not at all
DEAREST_PASS = 2.0  # steps of the baseline that a pass which commits one token may take
FARTHEST = 10.0  # mean of the unseen calls, in units of the longest one seen: at the most


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Useful tokens of documents whose prompts could have been timed, each (D,), as a run on them has them.

    ``longest_baseline`` and ``longest_candidate`` are the tokens of the longest answer among those that were timed;
    ``batch_size`` documents make a call. ``weights``: how much each counts, alike where ``None``. ``whole``: these are
    all the documents there are. ``budgets``: tokens of either arm at which an answer is cut.
    """

    baseline_tokens: Floats
    candidate_tokens: Floats
    longest_baseline: float
    longest_candidate: float
    batch_size: int = 1
    weights: Floats | None = None
    whole: bool = True
    budgets: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        arrays = [self.baseline_tokens, self.candidate_tokens]
        arrays += [] if self.weights is None else [self.weights]
        if any(array.shape != self.baseline_tokens.shape or array.ndim != 1 for array in arrays) or not arrays[0].size:
            raise ValueError("lengths of all documents: both arms need the same documents, at least one")
        if not all(np.isfinite(array).all() for array in arrays) or min(array.min() for array in arrays) < 0:
            raise ValueError("lengths of all documents: tokens must be finite and at least 0")

    @property
    def weight_D(self) -> Floats:
        """Shares that add up to 1."""
        weight_D = np.ones(len(self.baseline_tokens)) if self.weights is None else self.weights
        shares: Floats = weight_D / weight_D.sum()
        return shares

    def unseen_at_budget(self, alpha: float) -> tuple[float, float]:
        """Upper bound of the share of documents in either arm that run on to the budget, beyond the seen share.

        By Clopper-Pearson's upper bound; without any such document it is the rule of three.
        """
        num = int(1 / float(self.weight_D @ self.weight_D) + 1e-9)
        budgets = self.budgets or (inf, inf)
        shares = []
        for tokens_D, budget in zip((self.baseline_tokens, self.candidate_tokens), budgets, strict=True):
            seen = float(self.weight_D @ (tokens_D >= budget))
            unseen = max(0.0, binomial_upper_bound(ceil(seen * num - 1e-9), num, alpha) - seen)
            shares.append(unseen)
        return shares[0], shares[1]


@dataclass(frozen=True, kw_only=True)
class Tail:
    """How the time is spread over calls, in the arm in which fewer of them carry it.

    ``effective_calls``: so many calls of equal length would give the same precision (Kish). ``largest_share``: the
    longest call's share of the time. ``index``: Hill's, of the longest calls; below 2 the variance is infinite.
    ``None`` where the longest are equal, or too few.
    """

    num_calls: int
    effective_calls: float
    largest_share: float
    index: float | None


class PerCall(NamedTuple):
    """Both arms' seconds and tokens, each (P,), mean over rounds; ``throughput``: the gain is in tokens per second."""

    baseline_s: Floats
    candidate_s: Floats
    baseline_tokens: Floats
    candidate_tokens: Floats
    throughput: bool

    @property
    def size_P(self) -> Floats:
        """How long a call is, in units of the mean: in the arm in which it stands out more."""
        sizes: Floats = np.maximum(self.baseline_s / self.baseline_s.mean(), self.candidate_s / self.candidate_s.mean())
        return sizes

    @property
    def log_gain_P(self) -> Floats:
        """Each call's own log speedup; an answer without tokens counts as one of a hundredth of the mean."""
        gain_P: Floats = np.log(self.baseline_s / self.candidate_s)
        if self.throughput:
            least = 0.01 * (self.baseline_tokens.mean() + self.candidate_tokens.mean())
            gain_P = gain_P + np.log((self.candidate_tokens + least) / (self.baseline_tokens + least))
        return gain_P


Shifts = tuple[float, float]  # of an interval's lower and upper end, on the log scale: at most 0, at least 0


def tail_of(baseline_s: Floats, candidate_s: Floats) -> Tail:
    """How either arm's seconds, (R, P), are spread over calls."""
    found = []
    for seconds_P in (baseline_s.mean(axis=0), candidate_s.mean(axis=0)):
        total = float(seconds_P.sum())
        shares_P = seconds_P / total if total > 0 else np.full(len(seconds_P), 1 / len(seconds_P))
        index = _tail_index(seconds_P)
        found.append(
            Tail(
                num_calls=len(seconds_P),
                effective_calls=1 / float((shares_P**2).sum()),
                largest_share=float(shares_P.max()),
                index=None if index == inf else index,
            )
        )
    return min(found, key=lambda tail: tail.effective_calls)


def shifts(
    calls: PerCall,
    *,
    log_value: float,
    level: float,
    limits_s: tuple[float, float] | None,
    documents: Documents | None,
) -> Shifts:
    """How far the ends of a speedup's interval are widened for calls that were not timed; see the module's text.

    ``limits_s``: seconds of a call at its budget, in either arm.
    """
    if min(calls.baseline_s.min(), calls.candidate_s.min()) <= 0:
        return 0.0, 0.0  # a call that took no time has no gain
    if documents is not None and documents.batch_size > 1:
        documents = None  # a batch lasts as long as its longest answer, of which the sum of its tokens does not tell
    seen = (0.0, 0.0) if documents is None else _by_documents(calls, documents, log_value, level)
    if documents is not None and documents.whole:
        return seen
    share = log(2 / (1 - level)) / len(calls.baseline_s)
    low, high = _by_extrapolation(calls, share, log_value, level, limits_s)
    if limits_s is None:
        return min(low, seen[0]), max(high, seen[1])
    unseen = 1 - exp(-share)
    shares = (unseen, unseen) if documents is None else documents.unseen_at_budget((1 - level) / 2)
    bounded = _by_limits(calls, shares, limits_s, log_value, level)
    return min(low, seen[0] + bounded[0]), max(high, seen[1] + bounded[1])


def _by_limits(
    calls: PerCall, shares: tuple[float, float], limits_s: tuple[float, float], log_value: float, level: float
) -> Shifts:
    """The widening for calls at the budget in one arm that are of ordinary length in the other.

    Their tokens count in a throughput: the candidate's at no gain, or at the largest that the trend predicts. The
    baseline makes its own at its own rate.
    """
    means = float(calls.baseline_s.mean()), float(calls.candidate_s.mean())
    of_baseline, of_candidate = (max(1.0, limit / mean) for limit, mean in zip(limits_s, means, strict=True))
    if not calls.throughput:
        return -log1p(shares[1] * (of_candidate - 1)), log1p(shares[0] * (of_baseline - 1))
    if of_candidate <= 1:
        return 0.0, 0.0  # ordinary calls are at the budget themselves
    gain = 0.0, _gain_at(calls, of_candidate, level)[1]
    return _diluted(shares[1] * of_candidate, gain, log_value, rest=1 - shares[1])


def _by_extrapolation(
    calls: PerCall, share: float, log_value: float, level: float, limits_s: tuple[float, float] | None
) -> Shifts:
    """The heavy tail extended beyond the longest call, where up to ``share`` of all calls may lie."""
    size_P = calls.size_P
    index = _tail_index(size_P)
    heaviness = min(1.0, max(0.0, (LIGHT - index) / (LIGHT - HEAVY)))
    if not heaviness:
        return 0.0, 0.0
    longest = float(size_P.max())
    size = longest * (min(FARTHEST, index / (index - 1)) if index > 1 else FARTHEST)
    if limits_s is not None:
        at_limit = max(limits_s[0] / calls.baseline_s.mean(), limits_s[1] / calls.candidate_s.mean())
        size = min(size, max(longest, float(at_limit)))
    low, high = _diluted(heaviness * share * size, _gain_at(calls, size, level), log_value)
    # The sample may as well hold one call of its tail too many.
    one_less = -min(heaviness * longest / len(size_P), 0.5)
    less_high, less_low = _diluted(one_less, _gain_at(calls, longest, level), log_value)
    return low + min(less_low, 0.0), high + max(less_high, 0.0)


def _by_documents(calls: PerCall, documents: Documents, log_value: float, level: float) -> Shifts:
    """What the lengths of all documents change, by regression of seconds on tokens, with those beyond the longest."""
    moved, beyond = 0.0, []
    arms = (
        (1, calls.baseline_s, calls.baseline_tokens, documents.baseline_tokens, documents.longest_baseline),
        (-1, calls.candidate_s, calls.candidate_tokens, documents.candidate_tokens, documents.longest_candidate),
    )
    for sign, seconds_P, tokens_P, all_D, longest in arms:
        mean_of_all, timed = float(documents.weight_D @ all_D), float(tokens_P.mean())
        wanted = mean_of_all
        if timed <= 0 or wanted <= 0:
            return 0.0, 0.0  # no length to go by, and no throughput either
        moved += sign * log(1 + seconds_per_token(seconds_P, tokens_P) * (wanted - timed) / float(seconds_P.mean()))
        if calls.throughput:
            moved -= sign * log(wanted / timed)
        share_D = documents.weight_D * (all_D > longest)
        there = float(share_D.sum())
        of_them = float(share_D @ all_D)
        beyond.append((of_them / mean_of_all, of_them / there if there > 0 else longest))
    (of_baseline, long), (of_candidate, other) = beyond
    mean = float(calls.baseline_tokens.mean()), float(calls.candidate_tokens.mean())
    size = max(long / mean[0], other / mean[1])
    least, most = _gain_at(calls, max(size, float(calls.size_P.max())), level)
    # At the worst a loop commits one token a pass, and a pass takes longer than a step of the baseline.
    step = log(float(calls.baseline_s.mean()) / mean[0]) - log(float(calls.candidate_s.mean()) / mean[1])
    step += log(DEAREST_PASS)
    low = -log1p(of_candidate * (exp(max(0.0, step, log_value - least)) - 1))
    high = log1p(of_baseline * (exp(max(0.0, most - log_value)) - 1))
    return low + min(moved, 0.0), high + max(moved, 0.0)


def _diluted(mass: float, gain: tuple[float, float], log_value: float, rest: float = 1.0) -> Shifts:
    """A speedup over calls of total size ``rest`` and others of size ``mass`` with least or greatest log ``gain``."""
    low, high = min(0.0, gain[0] - log_value), max(0.0, gain[1] - log_value)
    both = rest + mass
    return log((rest + mass * exp(low)) / both), -log((rest + mass * exp(-high)) / both)


def _gain_at(calls: PerCall, size: float, level: float) -> tuple[float, float]:
    """Least and greatest log gain of a call of this length, by the trend of gain over length; long calls weigh most."""
    size_P, gain_P = np.log(calls.size_P), calls.log_gain_P
    weight_P = calls.size_P / calls.size_P.sum()
    at, mean = float(weight_P @ size_P), float(weight_P @ gain_P)
    square = float(weight_P @ (size_P - at) ** 2)
    slope = float(weight_P @ ((size_P - at) * (gain_P - mean))) / square if square > 0 else 0.0
    spread = sqrt(float(weight_P @ (gain_P - mean - slope * (size_P - at)) ** 2))
    away, effective = log(size) - at, 1 / float(weight_P @ weight_P)
    uncertain = 1 + 1 / effective + (away**2 / square / effective if square > 0 else 0.0)
    foretold, reach = mean + slope * away, t_quantile(level, inf) * spread * sqrt(uncertain)
    return foretold - reach, foretold + reach


def seconds_per_token(seconds_P: Floats, tokens_P: Floats) -> float:
    """Seconds per further token, by regression over calls: at least 0, and at most all of the time over all tokens.

    The maximum where all calls have the same number of tokens, and 0 where none has any.
    """
    centred_P = tokens_P - tokens_P.mean()
    square, mean = float(centred_P @ centred_P), float(tokens_P.mean())
    if mean <= 0:
        return 0.0
    most = float(seconds_P.mean()) / mean
    return min(max(float(centred_P @ seconds_P) / square, 0.0), most) if square > 0 else most


def _tail_index(values_P: Floats) -> float:
    """Hill's index of the longest calls less half its standard error; infinite where they are equal or too few."""
    num = len(values_P)
    in_tail = max(LEAST_TAIL, ceil(TAIL_SHARE * num))
    if num < LEAST_CALLS:
        return inf
    longest = np.sort(values_P)[::-1][: in_tail + 1]
    if longest[-1] <= 0:
        return inf
    spread = float(np.log(longest[:-1] / longest[-1]).mean())
    return (1 - 0.5 / sqrt(in_tail)) / spread if spread > 0 else inf
