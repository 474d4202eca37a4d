"""Does an arm's time fit its own forwards? Measured seconds against what the parts of each round predict.

An arm that is much faster than its parts did not do the work that it counts; a baseline that is much slower was slowed
outside its model. A candidate that is slower than its parts hurts only itself: choosing tokens takes time, too.

Other work on the machine slows whole calls longer than the short moments in which parts are timed, but not every call
for ever. So what the fastest round of every call still takes beyond its parts is the baseline's own time. A slowdown
that comes and goes may be either: it supports no claim, and is not a fault where the candidate lags as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Arm, Estimate, SpeedSample

Round = tuple[str, int]  # launch, number
MIN_ROUNDS = 3  # fewer say too little of what a round differs by
ALONE_LEVEL = 0.99  # how sure it has to be that a baseline alone was held up
LARGEST_BEYOND = 0.1  # share of the passes beyond what was timed, above which a prediction is a guess


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The share of an arm's time that its parts do not explain; below 0 where they take longer than all of it.

    ``floor`` compares with the least seconds of its forwards: fewer than the parts' sum where towers on two devices
    overlap, or where a batch's forwards were not counted by the rows that they served. There ``whole``, against the
    sum, has a reason instead of an estimate. ``seconds`` are measured and predicted ones of each round.
    ``num_idle_calls`` made tokens without any counted forward. ``calm``: the unexplained share of each call's fastest
    round, with parts at their mean over the rounds.
    """

    whole: Measured
    floor: Measured
    seconds: Mapping[Round, tuple[float, float]] = field(default_factory=dict)
    num_idle_calls: int = 0
    calm: float | None = None


@dataclass(frozen=True, kw_only=True)
class ResidualFault:
    """An arm whose time does not fit its forwards. ``idle``: it made tokens in ``num_calls`` without any forward.

    ``calm`` is given where the baseline is slower in the fastest round of every call as well.
    """

    arm: Arm
    kind: Literal["faster", "slower", "idle"]
    residual: Estimate | None = None
    num_calls: int = 0
    calm: float | None = None


def unknown(reason: str) -> Residual:
    """A residual that is not known, with the reason."""
    found = Measured(estimate=None, reason=reason)
    return Residual(whole=found, floor=found)


def residual(
    rounds: Mapping[Round, Sequence[SpeedSample]],
    predicted: Callable[[Round, Sequence[SpeedSample]], stats.Prediction],
    *,
    towers_apart: bool,
    not_counted: str | None,
) -> Residual:
    """The residual with its interval over the rounds whose parts were timed, or why there is none.

    ``not_counted``: why forwards are known only by their longest row. Each of them served at least that row, and rows
    in one batch take no longer than one after the other.
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
    """The residuals outside the limit. A candidate that is slower than its parts is no fault.

    A baseline is at fault where its fastest rounds lie outside the limit; or where all its rounds do, by a lower bound,
    and lie beyond the candidate's by more than the limit as well.
    """
    found = []
    for arm, one in residuals.items():
        floor, whole = one.floor.estimate, one.whole.estimate
        if floor is not None and floor.high < -limit:
            found.append(ResidualFault(arm=arm, kind="faster", residual=floor))
        elif arm == "baseline" and whole is not None and whole.value > limit:
            calm = one.calm if one.calm is not None and one.calm > limit else None
            if calm is not None or (whole.low > limit and _lags_alone(one, residuals["candidate"], limit)):
                found.append(ResidualFault(arm=arm, kind="slower", residual=whole, calm=calm))
        if one.num_idle_calls:
            found.append(ResidualFault(arm=arm, kind="idle", num_calls=one.num_idle_calls))
    return tuple(found)


def is_held_up(residuals: Mapping[Arm, Residual], limit: float) -> bool:
    """Whether the baseline seems slower than the limit allows, while other work on the machine may be the cause."""
    whole = residuals["baseline"].whole.estimate
    return whole is not None and whole.value > limit and not faults(residuals, limit)


def _lags_alone(baseline: Residual, candidate: Residual, limit: float) -> bool:
    """Whether the baseline lags behind its parts more than the candidate does, by more than the limit.

    Both are compared round by round, as other work slows the two arms by chance differently.
    """
    both = [round_ for round_ in baseline.seconds if round_ in candidate.seconds]
    if len(both) < MIN_ROUNDS or candidate.whole.estimate is None:
        return True
    behind, other = ([one.seconds[r][0] / one.seconds[r][1] for r in both] for one in (baseline, candidate))
    return stats.residual_over_rounds(behind, other, ALONE_LEVEL).low > limit


def fastest_of_calls(samples: Sequence[SpeedSample]) -> list[SpeedSample]:
    """The fastest round of every call."""
    found: dict[str, SpeedSample] = {}
    for sample in samples:
        if sample.call_id not in found or sample.wall_s < found[sample.call_id].wall_s:
            found[sample.call_id] = sample
    return [*found.values()]


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
    except NoEstimate as error:
        return str(error)


def _least_s(prediction: stats.Prediction) -> float:
    """Seconds of the slower of two devices, as the other one works at the same time."""
    denoiser_s = prediction.by_part_s.get("denoise", 0.0)
    return max(denoiser_s, prediction.total_s - denoiser_s)
