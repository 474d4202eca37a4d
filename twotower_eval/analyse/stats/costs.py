"""From measured phases and counts to predicted times: does the sum of the parts explain the whole?

A timed call is a prefill and then, for AR, one step per further token; for block diffusion, denoiser passes and one
context pass after every block but the last. Costs are seconds per pass, measured at some numbers of rows and some
context lengths: between two of them they are interpolated linearly, beyond them the nearest holds, and the share of
passes beyond is kept. What the parts do not explain stays unexplained.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.special import bdtr, stdtrit

from twotower_eval.analyse.stats.chance import t_interval_of_mean
from twotower_eval.analyse.stats.intervals import LEVEL, Figure, Floats
from twotower_eval.errors import NoEstimate
from twotower_eval.records import CostPart, Estimate, Method

EXPLAINED = 0.10  # largest residual, as a share of the measured time, that counts as explained


def median(values: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """Median of independent values with its order-statistic interval, free of assumptions on their distribution.

    With few values the widest such interval, their range, covers less than ``level``: the estimate then carries the
    level that it reaches, e.g. 93.75 % for 5 values. NoEstimate for no value.
    """
    sorted_N = np.sort(np.asarray(values, dtype=float))
    n = len(sorted_N)
    if n == 0:
        raise NoEstimate("no values, so there is no median")
    # The interval from the r-th smallest to the r-th largest misses with probability 2 P(Binomial(n, 1/2) < r).
    missed = [2 * float(bdtr(r - 1, n, 0.5)) for r in range(1, n // 2 + 1)]
    rank = max(sum(miss <= 1 - level for miss in missed), 1)
    reached = level if missed and missed[rank - 1] <= 1 - level else 1 - (missed[0] if missed else 1.0)
    return Estimate(
        value=float(np.median(sorted_N)),
        low=float(sorted_N[rank - 1]),
        high=float(sorted_N[n - rank]),
        level=reached,
        n=n,
        method=Method(kind="median"),
    )


def mean_time(values_s: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """Mean of times above 0, with an interval that stays above 0 as well.

    Student's t, corrected for skewness; its lower half-width is taken as a share of the mean and laid out on the log
    scale, which moves a low end up by little where it is near the mean and keeps it above 0 where it is not. One or two
    values have their range instead, at the level that it reaches. NoEstimate for no value, ValueError
    for times that are not above 0.
    """
    if min(values_s, default=1.0) <= 0:
        raise ValueError("a time is above 0 seconds")
    if len(values_s) < 3:
        return median(values_s, level=level)
    times_I = np.asarray(values_s, dtype=float)
    mean = float(times_I.mean())
    low, high = t_interval_of_mean(mean, times_I, level)
    return Estimate(
        value=mean,
        low=mean * float(np.exp(low / mean - 1)),
        high=high,
        level=level,
        n=len(times_I),
        method=Method(kind="t_of_times"),
    )


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """Seconds of one forward of a part of decoding over ``num_rows`` rows, behind ``context_tokens`` per row.

    ``prefill`` reads ``context_tokens`` per row. ``block_size`` is ``None`` for ``prefill`` and ``ar_step``.
    """

    part: CostPart
    block_size: int | None
    context_tokens: int
    seconds: Estimate
    num_rows: int = 1


@dataclass(frozen=True, kw_only=True)
class PartPasses:
    """Passes of one part over ``num_rows`` rows each (``None``: the whole batch), so many ``repeats`` at each context
    length."""

    part: CostPart
    block_size: int | None
    contexts: tuple[float, ...]
    repeats: float = 1.0
    num_rows: int | None = None

    @cached_property
    def contexts_N(self) -> Floats:
        """The same as an array."""
        return np.array(self.contexts, dtype=float)


@dataclass(frozen=True, kw_only=True)
class CallCounts:
    """The sequential forwards of one timed call, each over the whole batch, not sums over its rows.

    ``prompt_tokens`` per row (the longest). AR: ``num_steps`` AR steps and no block. Block diffusion: ``num_steps``
    denoiser forwards over blocks of ``block_size``, and ``num_context_passes``.
    """

    prompt_tokens: int
    num_steps: int
    block_size: int | None = None
    num_context_passes: int = 0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted seconds of a set of calls, in all and by part, and the share of passes beyond measured contexts."""

    total_s: float
    by_part_s: dict[CostPart, float]
    share_beyond: float


class CostTable:
    """Measured costs, to be looked up at any number of rows and context length; several of one point are an error.

    Between two block sizes that were measured costs are interpolated as well; beyond them nothing is known.
    """

    def __init__(self, costs: Sequence[PhaseCost]) -> None:
        self._points: dict[CostPart, dict[int | None, dict[int, list[tuple[int, float]]]]] = {}
        for cost in sorted(costs, key=lambda cost: cost.context_tokens):
            by_rows = self._points.setdefault(cost.part, {}).setdefault(cost.block_size, {})
            points = by_rows.setdefault(cost.num_rows, [])
            if points and points[-1][0] == cost.context_tokens:
                raise ValueError(f"{_name(cost.part, cost.block_size)} at {cost.context_tokens} tokens: several costs")
            points.append((cost.context_tokens, cost.seconds.value))

    def seconds_N(
        self, part: CostPart, block_size: int | None, contexts_N: Floats, num_rows: int | None = None
    ) -> tuple[Floats, int]:
        """Seconds of a pass at each context length, and how many of these lie beyond what was measured.

        ``None`` rows are as many as were measured at most.
        """
        total_N, beyond_N = np.zeros(len(contexts_N)), np.zeros(len(contexts_N), dtype=bool)
        for size, size_share in self._sizes(part, block_size):
            by_rows = self._points[part][size]
            wanted = max(by_rows) if num_rows is None else num_rows
            beyond_N |= not min(by_rows) <= wanted <= max(by_rows)
            for rows, rows_share in _around(sorted(by_rows), wanted):
                lengths, seconds = zip(*by_rows[rows], strict=True)
                beyond_N |= (contexts_N < lengths[0]) | (contexts_N > lengths[-1])
                total_N += size_share * rows_share * np.interp(contexts_N, lengths, seconds)
        return total_N, int(beyond_N.sum())

    def seconds(self, part: CostPart, block_size: int | None, context_tokens: float) -> float:
        """Seconds of a pass of the whole batch at one context length."""
        return float(self.seconds_N(part, block_size, np.array([float(context_tokens)]))[0][0])

    def _sizes(self, part: CostPart, block_size: int | None) -> list[tuple[int | None, float]]:
        """The block size, or those measured on either side of it, each with its share."""
        by_size = self._points.get(part, {})
        if block_size in by_size:
            return [(block_size, 1.0)]
        known = sorted(size for size in by_size if size is not None)
        if block_size is None or not known or not known[0] < block_size < known[-1]:
            raise NoEstimate(f"{_name(part, block_size)} was not measured, so no time can be predicted")
        return [(size, share) for size, share in _around(known, block_size)]


def _around(known: Sequence[int], wanted: int) -> list[tuple[int, float]]:
    """The values on either side of the wanted one with their shares in between; beyond all of them the nearest."""
    at = bisect_left(known, wanted)
    if at == len(known) or known[at] == wanted or at == 0:
        return [(known[min(at, len(known) - 1)], 1.0)]
    low, high = known[at - 1], known[at]
    share = (wanted - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def predict(table: CostTable, calls: Sequence[CallCounts | Sequence[PartPasses]]) -> Prediction:
    """Sum the measured parts over calls; NoEstimate where a part that they need was not measured."""
    alike: dict[tuple[CostPart, int | None, int | None], list[PartPasses]] = {}
    for call in calls:
        for one in passes_of(call) if isinstance(call, CallCounts) else call:
            if one.contexts:
                alike.setdefault((one.part, one.block_size, one.num_rows), []).append(one)
    if not alike:
        raise NoEstimate("no call to predict the time of")
    by_part: dict[CostPart, float] = {}
    num_passes = num_beyond = 0
    for (part, block_size, num_rows), passes in alike.items():
        contexts_N = np.concatenate([one.contexts_N for one in passes])
        repeats_N = np.repeat([one.repeats for one in passes], [len(one.contexts) for one in passes])
        seconds_N, beyond = table.seconds_N(part, block_size, contexts_N, num_rows)
        by_part[part] = by_part.get(part, 0.0) + float(seconds_N @ repeats_N)
        num_passes += len(contexts_N)
        num_beyond += beyond
    return Prediction(total_s=sum(by_part.values()), by_part_s=by_part, share_beyond=num_beyond / num_passes)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Measured against predicted seconds; ``residual`` is the share of the measured time that the
    parts do not explain.
    """

    measured_s: float
    predicted_s: float
    residual: float
    explained: bool


def explain(measured_s: float, predicted_s: float, *, limit: float = EXPLAINED) -> Explanation:
    """Compare measured with predicted seconds; a residual beyond ``limit`` on either side is unexplained."""
    if measured_s <= 0:
        raise NoEstimate("no time was measured, so there is nothing to explain")
    residual = (measured_s - predicted_s) / measured_s
    return Explanation(
        measured_s=measured_s, predicted_s=predicted_s, residual=residual, explained=abs(residual) <= limit
    )


def residual_over_rounds(measured_R: Sequence[float], predicted_R: Sequence[float], level: float = LEVEL) -> Estimate:
    """The residual of :class:`Explanation` with its interval over rounds, each against its own parts.

    Student's t on the logarithm of measured over predicted seconds, so that a round in which other work slowed a part
    weighs little. One or two rounds have their range, at the level that it reaches. NoEstimate for no round and for
    seconds that are not above 0.
    """
    if min([*measured_R, *predicted_R], default=0.0) <= 0:
        raise NoEstimate("no round has measured and predicted seconds above 0")
    logs_R = np.log(np.asarray(measured_R, dtype=float) / np.asarray(predicted_R, dtype=float))
    n = len(logs_R)
    if n < 3:
        found = median(logs_R.tolist())
        centre, low, high, level = found.value, found.low, found.high, found.level
    else:
        centre = float(logs_R.mean())
        half = float(stdtrit(n - 1, (1 + level) / 2)) * float(logs_R.std(ddof=1)) / n**0.5
        low, high = centre - half, centre + half
    value, low, high = (1 - float(np.exp(-log)) for log in (centre, low, high))
    method = Method(kind="t_of_log_ratios" if n > 2 else "range_of_ratios")
    return Estimate(value=value, low=low, high=high, level=level, n=n, method=method)


def break_even(*, ar_step_s: float, denoise_s: float, context_pass_s: float, blocks_per_nfe: float) -> float:
    """Tokens per NFE at which block diffusion is as fast as AR: ``(c_den + c_ctx * blocks / NFE) / c_AR``."""
    _check_costs(ar_step_s, denoise_s, context_pass_s)
    return (denoise_s + context_pass_s * blocks_per_nfe) / ar_step_s


def predicted_speedup(
    tokens_per_nfe: float, *, ar_step_s: float, denoise_s: float, context_pass_s: float, block_size: int
) -> float:
    """Speedup of decoding (no prefill) at this many useful tokens per denoiser pass, whole blocks being useful.

    Every block of K tokens costs one context pass, so blocks / NFE = tokens per NFE / K.
    """
    _check_costs(ar_step_s, denoise_s, context_pass_s)
    if not 0 < tokens_per_nfe <= block_size:
        raise ValueError(f"{tokens_per_nfe:g} tokens per NFE: a block gives above 0 and at most its size, {block_size}")
    return tokens_per_nfe * ar_step_s / (denoise_s + context_pass_s * tokens_per_nfe / block_size)


def needed_tokens_per_nfe(
    speedup: float, *, ar_step_s: float, denoise_s: float, context_pass_s: float, block_size: int
) -> Figure:
    """Tokens per NFE that a speedup of decoding needs; no value where no number of tokens in a block reaches it."""
    _check_costs(ar_step_s, denoise_s, context_pass_s)
    if speedup <= 0:
        raise ValueError(f"a speedup of {speedup:g} is none: give one above 0")
    most = predicted_speedup(
        block_size, ar_step_s=ar_step_s, denoise_s=denoise_s, context_pass_s=context_pass_s, block_size=block_size
    )
    if most < speedup:
        return Figure(value=None, reason=f"a block of {block_size} committed in one pass gives only {most:.3g}x")
    return Figure(value=speedup * denoise_s / (ar_step_s - speedup * context_pass_s / block_size))


@lru_cache(maxsize=100_000)  # a call makes the same passes in every round
def passes_of(call: CallCounts) -> tuple[PartPasses, ...]:
    """All passes of a call, each over the whole batch, in order of context lengths."""
    start, steps = float(call.prompt_tokens), call.num_steps
    prefill = PartPasses(part="prefill", block_size=None, contexts=(start,))
    if call.block_size is None:
        contexts = tuple(start + step for step in range(steps))
        return prefill, PartPasses(part="ar_step", block_size=None, contexts=contexts)
    num_blocks = call.num_context_passes + 1 if steps else 0
    contexts = tuple(start + call.block_size * block for block in range(num_blocks))
    absorbed = contexts[: call.num_context_passes]
    # Which block took how many passes is not counted: they are spread evenly.
    each = steps / num_blocks if num_blocks else 0.0
    return (
        prefill,
        PartPasses(part="denoise", block_size=call.block_size, contexts=contexts, repeats=each),
        PartPasses(part="context_pass", block_size=call.block_size, contexts=absorbed),
    )


def _check_costs(ar_step_s: float, denoise_s: float, context_pass_s: float) -> None:
    if min(ar_step_s, denoise_s) <= 0 or context_pass_s < 0:
        raise ValueError("the costs of a step and of a pass must be above 0 seconds")


def _name(part: CostPart, block_size: int | None) -> str:
    return part if block_size is None else f"{part} of blocks of {block_size}"
