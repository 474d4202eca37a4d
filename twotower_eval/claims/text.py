"""Verdicts and audits as plain lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from twotower_eval import stats
from twotower_eval.claims.audit import Finding
from twotower_eval.claims.judge import EXIT_CODES, said
from twotower_eval.claims.reasons import unit_of
from twotower_eval.evidence.numbers import interval
from twotower_eval.records import Claim, Estimate, Verdict

BOUNDS = "brackets hold one-sided 95 % bounds"


def verdict_lines(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> list[str]:
    """One line for each verdict, then one that counts them."""
    by_name = {claim.name: claim for claim in claims}
    width = max((len(verdict.claim) for verdict in verdicts), default=0)
    lines = []
    for verdict in verdicts:
        shown = estimate_text(by_name[verdict.claim], verdict.estimate, verdict.metric)
        words = [f"{said(verdict.outcome):12}", f"{verdict.claim:{width}}", f"{shown} {verdict.reason}".strip()]
        lines.append("  ".join(words) + chance_text(by_name[verdict.claim], verdict) + looks_text(verdict))
    return [*lines, count_line(verdicts)]


def estimate_text(claim: Claim, estimate: Estimate | None, metric: str | None = None) -> str:
    """``98.9 % [98.2, 99.6]:`` or ``2.41x [2.30, 2.53]:``; no bounds of what is known; nothing without an estimate.

    With ``metric``, that of a score outside retention, ``word_perplexity 33.2710 [29.1305, 37.9923]:``.
    """
    if estimate is None:
        return ""
    unit, named = unit_of(claim.quantity, metric), "" if metric is None else f"{metric} "
    known = estimate.method == stats.EQUAL
    return f"{named}{unit.text(estimate.value) if known else interval(unit, estimate)}:"


def chance_text(claim: Claim, verdict: Verdict) -> str:
    """What is measured without the tasks whose baseline is not clearly above chance; nothing where all are."""
    if not verdict.near_chance or verdict.above_chance is None:
        return ""
    shown = estimate_text(claim, verdict.above_chance).rstrip(":")
    return f"; without {', '.join(verdict.near_chance)}, whose baseline is not clearly above chance: {shown}"


def looks_text(verdict: Verdict) -> str:
    """How many points and runs there were to choose from; nothing where there was no choice."""
    looks = [f"one of {verdict.num_points} operating points"] if verdict.num_points > 1 and verdict.num_looks else []
    looks += [f"measured in {verdict.num_looks} runs"] if verdict.num_looks > 1 else []
    return f" ({'; '.join(looks)})" if looks else ""


def count_line(verdicts: Sequence[Verdict]) -> str:
    """``3 claims: 1 REFUTED, 2 SUPPORTED``, in the order that decides the exit code."""
    outcomes = [verdict.outcome for verdict in verdicts]
    counts = [f"{outcomes.count(outcome)} {said(outcome)}" for outcome in EXIT_CODES if outcome in outcomes]
    noun = "claim" if len(verdicts) == 1 else "claims"
    bounds = f"; {BOUNDS}" if any(verdict.estimate for verdict in verdicts) else ""
    return f"{len(verdicts)} {noun}: {', '.join(counts) or 'none judged'}{bounds}"


def audit_lines(findings: Sequence[Finding]) -> list[str]:
    """One line for each finding, then one that counts those that contradict."""
    lines = [f"{finding.kind:11}  {finding.text}" for finding in findings]
    wrong = sum(finding.kind == "CONTRADICTS" for finding in findings)
    return [*lines, f"{len(findings)} findings, {wrong} of them contradict what is published"]
