"""Timed answers are the same in every round, and those that were scored (PROTOCOL "Claims and verdicts")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twotower_eval.analyse.compare.answers import (
    Agreement,
    Differing,
    OtherLength,
    from_round_to_round,
    timed_as_scored,
    unlike_prompts,
)
from twotower_eval.analyse.compare.numbers import POINTS, interval
from twotower_eval.analyse.compare.points import Measured, QualityPoint
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.unlike import unlike_budgets, unlike_settings
from twotower_eval.records import CheckOutcome, Gate, GateKind, GateLimits
from twotower_eval.store import Run

SHOWN = 3


def answer_gates(
    runs: Sequence[Run], quality: Sequence[QualityPoint], speed: SpeedPoint, limits: GateLimits
) -> list[Gate]:
    """What a speedup's own answers have to be: the same in every round, and those of the newest run that scored them.

    ``quality`` is what was measured at the same point, oldest first.
    """
    scored = next((point for point in reversed(quality) if not point.timed), None)
    found = [same_rounds_gate(runs, speed, limits), *same_answers_gates(runs, scored, speed, limits)]
    return [*found, *same_prompts_gates(runs, speed)]


def same_rounds_gate(runs: Sequence[Run], point: SpeedPoint, limits: GateLimits) -> Gate:
    """Every round gives the same tokens in the same passes: what is timed last is what was timed first."""
    found = from_round_to_round(runs, point)
    wrong = [_differ_text(one) for one in found if one.share > _allowed(one, limits)]
    reasons = list(dict.fromkeys(f"{one.arm}: {one.reason}" for one in found if one.reason))
    detail = "; ".join(wrong or reasons) or "; ".join(_agree_text(one, "timed prompts") for one in found)
    outcome: CheckOutcome = "failed" if wrong else "not_checked" if reasons else "passed"
    return Gate(kind="same_rounds", outcome=outcome, detail=detail, evidence=point.run_ids)


def same_answers_gates(
    runs: Sequence[Run], quality: QualityPoint | None, speed: SpeedPoint, limits: GateLimits
) -> list[Gate]:
    """Timed answers are the scored ones of the same documents, token for token, and took the same passes.

    In half precision rounding parts some of them: then also, what that does to the scores.
    """
    if quality is None:
        detail = "no run scored this point's answers apart from the clock"
        return [Gate(kind="same_answers", outcome="not_checked", detail=detail, evidence=speed.run_ids)]
    found, run_ids = _compared(runs, quality, speed), (quality.run_id, *speed.run_ids)
    wrong = [_differ_text(one) for one in found if one.share > _allowed(one, limits)]
    wrong += [_work_text(one) for one in found if one.work is not None and one.work < limits.least_work]
    reasons = list(dict.fromkeys(f"{one.arm}: {one.reason}" for one in found if one.reason))
    detail = "; ".join(wrong or reasons) or "; ".join(_agree_text(one, "documents timed and scored") for one in found)
    outcome: CheckOutcome = "failed" if wrong else "not_checked" if reasons else "passed"
    gates = [Gate(kind="same_answers", outcome=outcome, detail=detail, evidence=run_ids)]
    lengths = [(one.arm, other) for one in found for other in one.other_lengths]
    if lengths:
        detail = "; ".join(dict.fromkeys(f"{arm}: {_length_text(other)}" for arm, other in lengths[:SHOWN]))
        detail = f"{len(lengths)} prompts were timed in other tokens than they were scored in: {detail}"
        gates.append(Gate(kind="same_prompts", outcome="failed", detail=detail, evidence=run_ids))
    return [*gates, *_effect_gates(found, limits, run_ids)]


def _compared(runs: Sequence[Run], quality: QualityPoint, speed: SpeedPoint) -> list[Agreement]:
    """Both arms' answers, as far as nothing else differs that would make them differ."""
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
    """Whether answers that may differ are worth as much as the scored ones; nothing where none differs."""
    return [_effect_gate(one, one.effect, limits, run_ids) for one in found if one.effect is not None]


def _effect_gate(one: Agreement, effect: Measured, limits: GateLimits, run_ids: tuple[str, ...]) -> Gate:
    # Where tokens are drawn scores move by chance alone, so that only what is beyond it tells.
    kind: GateKind = "drawn_answers" if one.reason else "effect_on_scores"
    found = effect.estimate
    if found is None:
        return Gate(kind=kind, outcome="not_checked", detail=f"{one.arm}: {effect.reason}", evidence=run_ids)
    far = abs(found.value) > limits.score_effect
    outcome: CheckOutcome = "passed" if not far else "not_checked" if found.low <= 0 <= found.high else "failed"
    how = {"passed": "within", "failed": "beyond", "not_checked": "not known to be within"}[outcome]
    moved = f"{one.arm}: timed answers score {interval(POINTS, found)} beside the scored ones"
    detail = f"{moved}, {how} {100 * limits.score_effect:g} points"
    return Gate(kind=kind, outcome=outcome, detail=detail, evidence=run_ids)


def same_prompts_gates(runs: Sequence[Run], point: QualityPoint | SpeedPoint) -> list[Gate]:
    """Arms of one tokenizer that read some prompts as other tokens; nothing where they do not."""
    found = unlike_prompts(runs, point)
    if not found:
        return []
    shown = "; ".join(_length_text(one, ("in the baseline", "in the candidate")) for one in found[:SHOWN])
    detail = f"{len(found)} prompts are not the same tokens in both arms: {shown}"
    return [Gate(kind="same_prompts", outcome="failed", detail=detail, evidence=run_ids_of(point))]


def run_ids_of(point: QualityPoint | SpeedPoint) -> tuple[str, ...]:
    """The runs that a point was measured in."""
    return (point.run_id,) if isinstance(point, QualityPoint) else point.run_ids


# Words


def _agree_text(one: Agreement, what: str) -> str:
    if not one.differing:
        return f"{one.arm}: {one.num_compared:,} {what}, all alike"
    return _differ_text(one)


def _differ_text(one: Agreement) -> str:
    shown = "; ".join(_place_text(differing) for differing in one.differing[:SHOWN])
    more = f" and {len(one.differing) - SHOWN} more" if len(one.differing) > SHOWN else ""
    percent = 100 * one.share
    share = f"{percent:.1f}" if percent < 10 else f"{percent:.0f}"
    count = f"{len(one.differing)} of {one.num_compared:,} answers ({share} %)"
    return f"{one.arm}: {count} differ in {one.dtype} at temperature 0: {shown}{more}"


def _place_text(one: Differing) -> str:
    if one.same_tokens:
        return f"{prompt_text(one.prompt_id)} in its passes"
    return prompt_text(one.prompt_id) + ("" if one.position is None else f" from token {one.position + 1} on")


def _work_text(one: Agreement) -> str:
    share = f"{100 * (one.work or 0):.3g} %"
    return f"{one.arm}: timed answers took {share} of the passes that the same answers took when they were scored"


def _length_text(one: OtherLength, whose: tuple[str, str] = ("scored", "timed")) -> str:
    return f"{prompt_text(one.prompt_id)} ({one.num_tokens[0]} tokens {whose[0]}, {one.num_tokens[1]} {whose[1]})"


def prompt_text(prompt_id: str) -> str:
    task, _, number = prompt_id.rpartition("/")
    return f"task {task}, document {number}" if task and number.isdigit() else f"prompt {prompt_id}"
