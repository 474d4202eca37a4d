"""Verdicts and audits as plain lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import isclose

from twotower_eval.analyse import stats
from twotower_eval.analyse.claims.judge import EXIT_CODES, outcome_text
from twotower_eval.analyse.claims.recomputed import AuditLine
from twotower_eval.analyse.claims.ruling import look_text, unit_of
from twotower_eval.analyse.claims.terms import terms_text
from twotower_eval.analyse.compare.figures import TIMES, high_retention_text, interval
from twotower_eval.analyse.compare.gates import NAMED_WITH_SPEED
from twotower_eval.analyse.words import found_text, kind_text
from twotower_eval.names import plural
from twotower_eval.records import MIN_LAUNCH_ROUNDS, Claim, Estimate, Quantity, Verdict
from twotower_eval.rules import unlike_text


def verdict_lines(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> list[str]:
    """One line for each verdict, then one that counts them."""
    by_name = {claim.name: claim for claim in claims}
    metrics = {verdict.claim: verdict.metric for verdict in verdicts}
    width = max((len(verdict.claim) for verdict in verdicts), default=0)
    widest = max([12, *(len(outcome_text(verdict)) for verdict in verdicts)])
    lines = []
    for verdict in verdicts:
        shown = estimate_text(by_name[verdict.claim], verdict.estimate, verdict.metric)
        words = [f"{outcome_text(verdict):{widest}}", f"{verdict.claim:{width}}", f"{shown} {verdict.reason}".strip()]
        remarks = against_text(verdict) + scope_text(verdict) + retention_text(verdict) + unchecked_text(verdict)
        remarks += chance_text(by_name[verdict.claim], verdict)
        remarks += f"; claimed: {terms_text(by_name[verdict.claim], metrics, claims)}" + looks_text(
            by_name[verdict.claim], verdict
        )
        lines.append("  ".join(words) + remarks)
    return [*lines, count_line(verdicts)]


def estimate_text(claim: Claim, estimate: Estimate | None, metric: str | None = None) -> str:
    """``98.9 % [98.2, 99.6]:`` or ``2.41x [2.30, 2.53]:``; no bounds of what is known; nothing without an estimate.

    With ``metric``, that of a score outside retention, ``word_perplexity 33.2710 [29.1305, 37.9923]:``.
    """
    if estimate is None:
        return ""
    return f"{figure_text(claim.quantity, estimate, metric, estimate.method_kind == 'equal_by_construction')}:"


def figure_text(quantity: Quantity, estimate: Estimate, metric: str | None, is_known: bool) -> str:
    """A claimed quantity's estimate with its bounds, or without them where it ``is_known`` by construction."""
    unit, named = unit_of(quantity, metric), "" if metric is None else f"{metric} "
    return f"{named}{unit.text(estimate.value) if is_known else interval(unit, estimate)}"


def scope_text(verdict: Verdict) -> str:
    """What to run for a verdict that holds beyond the timed launches; empty for other verdicts."""
    if verdict.scope is None:
        return ""
    return f"; holds {verdict.scope} only: `twotower-eval speed --launches {stats.MIN_LAUNCHES}` decides for others"


def against_text(verdict: Verdict) -> str:
    """The baseline of a verdict, where it is one of several or is not decoded one token at a time; else empty."""
    found = verdict.against
    if found is None:
        return ""
    decoded = "" if found.name in found.decoder else f" ({found.decoder})"
    text = f"; against {found.name}{decoded}"
    text += f", one of {found.num_baselines} baselines" if found.num_baselines > 1 else ""
    if found.strongest is not None:
        shown = "" if found.speedup is None else f", over which the speedup is {interval(TIMES, found.speedup)} (95 %)"
        text += f"; the strongest baseline in its runs is {found.strongest}{shown}"
    return text


def retention_text(verdict: Verdict) -> str:
    """Warnings where the arms differ in more than the decoder, and where the candidate scores far better than its
    baseline; else empty."""
    unlike = f"; WARNING: {unlike_text(verdict.unlike_arms)}" if verdict.unlike_arms else ""
    if verdict.high_retention is None:
        return unlike
    return f"{unlike}; WARNING: {high_retention_text(verdict.high_retention)}"


def unchecked_text(verdict: Verdict) -> str:
    """The gates that a SUPPORTED speedup needs and that could not be checked."""
    unchecked = [gate for gate in verdict.gates if gate.outcome == "not_checked" and gate.kind in NAMED_WITH_SPEED]
    if verdict.outcome != "SUPPORTED" or not unchecked:
        return ""
    named = (f"{kind_text(gate.kind)} ({found_text(gate)})" for gate in unchecked)
    return f"; not checked: {'; '.join(dict.fromkeys(named))}"


def chance_text(claim: Claim, verdict: Verdict) -> str:
    """The figure without the tasks whose baseline is not clearly above chance; empty where there are none."""
    if not verdict.near_chance or verdict.above_chance is None:
        return ""
    shown = estimate_text(claim, verdict.above_chance).rstrip(":")
    return f"; without {', '.join(verdict.near_chance)}, whose baseline is not clearly above chance: {shown}"


def looks_text(claim: Claim, verdict: Verdict) -> str:
    """How many operating points and looks there were, and the level that follows; empty for one point and one look."""
    looks = [f"one of {verdict.num_points} operating points"] if verdict.num_points > 1 and verdict.num_looks else []
    looks += look_remarks(claim, verdict)
    return f" ({'; '.join(looks)})" if looks else ""


def look_remarks(claim: Claim, verdict: Verdict) -> list[str]:
    """The level that the looks leave, runs that were not given, and the level of a further look where it is open."""
    return [
        *([price_text(claim, verdict)] if has_price(verdict) else []),
        *([not_given_text(verdict)] if verdict.not_given else []),
        *([next_text(claim, verdict)] if verdict.outcome == "INCONCLUSIVE" and verdict.estimate else []),
    ]


def next_text(claim: Claim, verdict: Verdict) -> str:
    """The level at which a further look would be judged."""
    alpha = stats.look_alpha(verdict.num_looks + 1, claim.looks)
    return "more runs can decide nothing" if alpha is None else f"more runs would be judged at {_level(1 - alpha)}"


def _level(level: float) -> str:
    return f"{100 * level:.4g} %"


def has_price(verdict: Verdict) -> bool:
    """Whether a verdict is judged at another level than that of a single look."""
    return not isclose(verdict.level, 1 - stats.ALPHA)


def price_text(claim: Claim, verdict: Verdict) -> str:
    """``second look, one was declared: bounds are one-sided 99.5 %``; for a joint claim, the strictest of its parts."""
    looked = look_text(verdict.num_looks, None if claim.parts else claim.looks)
    return f"{looked}: bounds are one-sided {_level(verdict.level)}"


def not_given_text(verdict: Verdict) -> str:
    """Runs of the point in the results folder that the verdict does not use."""
    num = len(verdict.not_given)
    lie = "lies" if num == 1 else "lie"
    runs = plural(num, "further run")
    return f"{runs} of this point {lie} in the results folder, unused: {', '.join(verdict.not_given)}"


def count_line(verdicts: Sequence[Verdict]) -> str:
    """``3 claims: 1 REFUTED, 2 SUPPORTED in this launch``, in the order that decides the exit code."""
    ordered = sorted(verdicts, key=lambda verdict: list(EXIT_CODES).index(verdict.outcome))
    counts = [f"{number} {outcome}" for outcome, number in Counter(map(outcome_text, ordered)).items()]
    levels = {verdict.level for verdict in verdicts if verdict.estimate}
    bounds = f"; {bounds_text(levels)}" if levels else ""
    return f"{plural(len(verdicts), 'claim')}: {', '.join(counts) or 'none judged'}{bounds}"


def bounds_text(levels: Iterable[float]) -> str:
    """What the numbers in brackets are, at the level or levels of these verdicts."""
    shown = [_level(level) for level in sorted(set(levels))]
    return (
        f"brackets hold one-sided {shown[0]} bounds"
        if len(shown) == 1
        else (f"brackets hold one-sided bounds, at {shown[0]} where no other level is named")
    )


def strict_line(verdicts: Sequence[Verdict]) -> str:
    """The SUPPORTED verdicts that a strict check counts as inconclusive, and why; empty where there are none."""
    supported = [verdict for verdict in verdicts if verdict.outcome == "SUPPORTED"]
    in_few = [verdict for verdict in supported if verdict.scope is not None]
    few, torn = len(in_few), any((verdict.num_launches or 0) >= stats.MIN_LAUNCHES for verdict in in_few)
    of_rounds = f" of {MIN_LAUNCH_ROUNDS} rounds or more" if torn else ""
    without = sum(bool(verdict.not_given) for verdict in supported)
    lines = [
        f"{few} SUPPORTED in fewer than {stats.MIN_LAUNCHES} launches{of_rounds} "
        f"{'counts' if few == 1 else 'count'} as inconclusive; `twotower-eval speed --launches {stats.MIN_LAUNCHES}` "
        "measures how launches differ"
    ] * (few > 0)
    leaves, counts = ("verdict leaves", "counts") if without == 1 else ("verdicts leave", "count")
    lines += [
        f"{without} SUPPORTED {leaves} out runs of the same point in this results folder and {counts} as inconclusive; "
        "give all runs of the point"
    ] * (without > 0)
    return f"strict: {'; '.join(lines)}" if lines else ""


def audit_lines(lines: Sequence[AuditLine]) -> list[str]:
    """One line of text for each, then one that counts those that contradict."""
    shown = [f"{line.kind:11}  {line.text}" for line in lines]
    wrong = sum(line.kind == "CONTRADICTS" for line in lines)
    contradict = "contradicts" if wrong == 1 else "contradict"
    return [*shown, f"{plural(len(lines), 'finding')}, {wrong} of them {contradict} what is published"]
