"""Does an arm's time fit its own forwards? Measured seconds against what the parts of each round predict.

An arm that is much faster than its parts did not do what it counts; a baseline that is much slower was held up outside
its model. A candidate that is slower than its parts hurts only itself: choosing tokens takes time, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from twotower_eval import stats
from twotower_eval.evidence.measured import Measured
from twotower_eval.records import Arm, Estimate, SpeedSample

Round = tuple[str, int]  # launch, number
MIN_ROUNDS = 3  # fewer say too little of what a round differs by
LARGEST_BEYOND = 0.1  # share of the passes beyond what was timed, above which a prediction is a guess


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The share of an arm's time that its parts lack, below 0 where they take longer than all of it.

    ``floor`` is held against the least seconds that its forwards can take: fewer than the parts' sum where towers on
    two devices work at a time, or where a batch's passes were not counted by the rows that they served. There
    ``whole``, against the sum, has no estimate but a reason. ``seconds`` are those of each round, measured and
    predicted. ``num_idle_calls`` gave tokens although the harness saw no forward.
    """

    whole: Measured
    floor: Measured
    seconds: Mapping[Round, tuple[float, float]] = field(default_factory=dict)
    num_idle_calls: int = 0


@dataclass(frozen=True, kw_only=True)
class ResidualFault:
    """An arm whose time does not fit its forwards. ``idle``: that gave tokens in ``num_calls`` without any forward."""

    arm: Arm
    kind: Literal["faster", "slower", "idle"]
    residual: Estimate | None = None
    num_calls: int = 0


def unknown(reason: str) -> Residual:
    """Nothing to hold an arm against."""
    found = Measured(estimate=None, reason=reason)
    return Residual(whole=found, floor=found)


def residual(
    rounds: Mapping[Round, Sequence[SpeedSample]],
    predicted: Callable[[Round, Sequence[SpeedSample]], stats.Prediction],
    *,
    towers_apart: bool,
    not_counted: str | None,
) -> Residual:
    """The residual with its interval over the rounds whose parts were timed; why there is none, if there is none.

    ``not_counted`` says why passes are known by their longest row alone. Each of them served at least that row, and
    rows beside each other take no longer than one after the other.
    """
    found = {round_: _tried(predicted, round_, samples) for round_, samples in rounds.items()}
    known = {round_: one for round_, one in found.items() if isinstance(one, stats.Prediction)}
    reason = _too_little([*known.values()], [str(one) for one in found.values() if isinstance(one, str)])
    measured_R = [sum(sample.wall_s for sample in rounds[round_]) for round_ in known]
    if reason is not None or min(measured_R) <= 0:
        return unknown(reason or "a round took no time at all")
    width = max(len(sample.prompts) for samples in rounds.values() for sample in samples)
    least_R = [_least_s(one) if towers_apart else one.total_s for one in known.values()]
    floor_R = [seconds / (width if not_counted else 1) for seconds in least_R]
    whole = stats.residual_over_rounds(measured_R, [one.total_s for one in known.values()])
    return Residual(
        whole=Measured(estimate=None, reason=not_counted) if not_counted else Measured(estimate=whole),
        floor=Measured(estimate=stats.residual_over_rounds(measured_R, floor_R)),
        seconds={r: (s, one.total_s) for (r, one), s in zip(known.items(), measured_R, strict=True)},
    )


def _too_little(known: Sequence[stats.Prediction], reasons: Sequence[str]) -> str | None:
    if not known:
        return next(iter(reasons), "no round was timed whole")
    if len(known) < MIN_ROUNDS:
        return f"the parts were timed in {len(known)} whole rounds, fewer than {MIN_ROUNDS}"
    beyond = max(one.share_beyond for one in known)
    return f"{100 * beyond:.0f} % of the passes have sizes that were not timed" if beyond > LARGEST_BEYOND else None


def faults(residuals: Mapping[Arm, Residual], limit: float) -> tuple[ResidualFault, ...]:
    """What lies wholly outside the limit.

    A candidate that is slower than its parts is no fault. Nor is a baseline where the candidate is no less so: on a
    machine with neighbours whole calls are held up longer than the short moments in which parts are timed.
    """
    found = []
    for arm, one in residuals.items():
        floor, whole = one.floor.estimate, one.whole.estimate
        if floor is not None and floor.high < -limit:
            found.append(ResidualFault(arm=arm, kind="faster", residual=floor))
        elif arm == "baseline" and whole is not None and whole.low > limit and _is_alone(one, residuals["candidate"]):
            found.append(ResidualFault(arm=arm, kind="slower", residual=whole))
        if one.num_idle_calls:
            found.append(ResidualFault(arm=arm, kind="idle", num_calls=one.num_idle_calls))
    return tuple(found)


def _is_alone(baseline: Residual, candidate: Residual) -> bool:
    """Whether the baseline is farther behind its parts than the candidate, round by round, as far as that is known."""
    both = [round_ for round_ in baseline.seconds if round_ in candidate.seconds]
    if len(both) < MIN_ROUNDS or candidate.whole.estimate is None:
        return True
    behind, other = ([one.seconds[r][0] / one.seconds[r][1] for r in both] for one in (baseline, candidate))
    return stats.residual_over_rounds(behind, other).low > 0


def fault_text(fault: ResidualFault) -> str:
    """``the candidate is faster than its forwards allow: these, timed alone, need 347 [346, 348] times its time``."""
    found = fault.residual
    if found is None:
        return f"the {fault.arm} gave tokens without any forward of its model, in {fault.num_calls} calls"
    if fault.kind == "faster":
        times = [1 - share for share in (found.value, found.high, found.low)]
        longer = f"{times[0]:,.3g} [{times[1]:,.3g}, {times[2]:,.3g}]"
        return (
            f"the {fault.arm} is faster than its own forwards allow: these, timed alone, need {longer} times its time"
        )
    return f"the {fault.arm} is slower than its parts: {residual_text(found)} of its time is in none of them"


def residual_text(found: Estimate) -> str:
    """``+12.0 % [+10.1 %, +13.9 %]``."""
    return f"{_share(found.value)} [{_share(found.low)}, {_share(found.high)}]"


def _share(value: float) -> str:
    return f"{100 * value:+,.1f} %"


def by_round(samples: Sequence[SpeedSample]) -> dict[Round, list[SpeedSample]]:
    """Timed calls of each round, in order."""
    rounds: dict[Round, list[SpeedSample]] = defaultdict(list)
    for sample in samples:
        rounds[sample.launch_id, sample.round].append(sample)
    return dict(sorted(rounds.items()))


def _tried(
    predicted: Callable[[Round, Sequence[SpeedSample]], stats.Prediction], round_: Round, samples: Sequence[SpeedSample]
) -> stats.Prediction | str:
    try:
        return predicted(round_, samples)
    except ValueError as error:
        return str(error)


def _least_s(prediction: stats.Prediction) -> float:
    """Seconds of the slower of two devices, the other one's work behind it."""
    denoiser_s = prediction.by_part_s.get("denoise", 0.0)
    return max(denoiser_s, prediction.total_s - denoiser_s)
