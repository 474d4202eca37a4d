"""Gates on timed answers: the same in every round, and the same as scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from twotower_eval.analyse.compare.answers import (
    Agreement,
    OtherLength,
    from_round_to_round,
    timed_as_scored,
    unlike_prompts,
)
from twotower_eval.analyse.compare.fairness import unlike_budgets, unlike_settings
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.gate_facts import EffectOnScores, OtherTokens, SameAnswers
from twotower_eval.analyse.compare.points import QualityPoint
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.records import Arm, CheckOutcome, Gate, GateKind, GateLimits
from twotower_eval.store import Run

SHOWN = 3


def answer_gates(
    runs: Sequence[Run], quality: Sequence[QualityPoint], speed: SpeedPoint, limits: GateLimits
) -> list[Gate]:
    """A speedup's own answers are the same in every round, and equal those of the newest run that scored them.

    ``quality``: what was measured at the same point, oldest first.
    """
    scored = next((point for point in reversed(quality) if not point.timed), None)
    found = [same_rounds_gate(runs, speed, limits), *same_answers_gates(runs, scored, speed, limits)]
    return [*found, *same_prompts_gates(runs, speed)]


def same_rounds_gate(runs: Sequence[Run], point: SpeedPoint, limits: GateLimits) -> Gate:
    """Every round gives the same tokens in the same forwards."""
    found = from_round_to_round(runs, point)
    differing = tuple(one.arm for one in found if one.share > _allowed(one, limits))
    facts = SameAnswers(when="again", arms=found, differing=differing)
    return Gate(kind="same_rounds", outcome=_outcome(facts), facts=facts, evidence=point.run_ids)


def _outcome(found: SameAnswers) -> CheckOutcome:
    unknown = not found.arms or any(one.reason for one in found.arms)
    return "failed" if found.differing or found.idle else "not_checked" if unknown else "passed"


def same_answers_gates(
    runs: Sequence[Run], quality: QualityPoint | None, speed: SpeedPoint, limits: GateLimits
) -> list[Gate]:
    """Timed answers equal the scored ones of the same documents, token for token, in as many forwards.

    In half precision rounding changes some; then their effect on the scores is checked as well.
    """
    if quality is None:
        nothing = SameAnswers(when="scored")
        return [Gate(kind="same_answers", outcome="not_checked", facts=nothing, evidence=speed.run_ids)]
    found, run_ids = _compared(runs, quality, speed), (quality.run_id, *speed.run_ids)
    facts = SameAnswers(
        when="scored",
        arms=tuple(found),
        differing=tuple(one.arm for one in found if one.share > _allowed(one, limits)),
        idle=tuple(one.arm for one in found if one.work is not None and one.work < limits.least_work),
    )
    gates = [Gate(kind="same_answers", outcome=_outcome(facts), facts=facts, evidence=run_ids)]
    lengths: list[tuple[Arm | None, OtherLength]] = [(one.arm, other) for one in found for other in one.other_lengths]
    if lengths:
        others = OtherTokens(num_prompts=len(lengths), first=tuple(lengths[:SHOWN]), timed=True)
        gates.append(Gate(kind="same_prompts", outcome="failed", facts=others, evidence=run_ids))
    return [*gates, *_effect_gates(found, limits, run_ids)]


def _compared(runs: Sequence[Run], quality: QualityPoint, speed: SpeedPoint) -> list[Agreement]:
    """Both arms' timed against scored answers, where their settings are the same."""
    unlike = {one.arm for one in unlike_settings(quality, speed)}
    budgets = unlike_budgets(runs, quality, speed)
    found = []
    for one in timed_as_scored(runs, quality, speed, budgets):
        if one.arm in unlike:
            reason = "was scored under other settings than timed"
            one = Agreement(arm=one.arm, dtype=one.dtype, num_compared=0, reason=reason)
        found.append(one)
    return found


def _allowed(found: Agreement, limits: GateLimits) -> float:
    return limits.differing_answers if found.is_exact else limits.differing_answers_half


def _effect_gates(found: Iterable[Agreement], limits: GateLimits, run_ids: tuple[str, ...]) -> list[Gate]:
    """Whether different answers score as well as the scored ones; empty where none differ."""
    return [_effect_gate(one, one.effect, limits, run_ids) for one in found if one.effect is not None]


def _effect_gate(one: Agreement, effect: Measured, limits: GateLimits, run_ids: tuple[str, ...]) -> Gate:
    # Where tokens are drawn scores move by chance alone, so that only what is beyond it tells.
    kind: GateKind = "drawn_answers" if one.reason else "effect_on_scores"
    found = effect.estimate
    if found is None:
        unknown = EffectOnScores(arm=one.arm, effect=effect, limit=limits.score_effect)
        return Gate(kind=kind, outcome="not_checked", facts=unknown, evidence=run_ids)
    far = abs(found.value) > limits.score_effect
    stands: Literal["within", "beyond", "open"] = (
        "within" if not far else "open" if found.low <= 0 <= found.high else "beyond"
    )
    outcome: CheckOutcome = "passed" if not far else "not_checked" if stands == "open" else "failed"
    facts = EffectOnScores(arm=one.arm, effect=effect, limit=limits.score_effect, stands=stands)
    return Gate(kind=kind, outcome=outcome, facts=facts, evidence=run_ids)


def same_prompts_gates(runs: Sequence[Run], point: QualityPoint | SpeedPoint) -> list[Gate]:
    """Failed where arms with the same tokenizer read prompts as other tokens; else empty."""
    found = unlike_prompts(runs, point)
    if not found:
        return []
    facts = OtherTokens(num_prompts=len(found), first=tuple((None, one) for one in found[:SHOWN]), timed=False)
    return [Gate(kind="same_prompts", outcome="failed", facts=facts, evidence=run_ids_of(point))]


def run_ids_of(point: QualityPoint | SpeedPoint) -> tuple[str, ...]:
    """The runs that a point was measured in."""
    return (point.run_id,) if isinstance(point, QualityPoint) else point.run_ids
