"""Verdicts and audits as plain lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from twotower_eval import stats
from twotower_eval.claims.audit import Finding
from twotower_eval.claims.gates import SAID_WITH_SPEED
from twotower_eval.claims.judge import EXIT_CODES, said
from twotower_eval.claims.reasons import unit_of
from twotower_eval.claims.terms import terms_text
from twotower_eval.evidence.numbers import high_retention_text, interval
from twotower_eval.records import Claim, Estimate, Verdict

BOUNDS = "brackets hold one-sided 95 % bounds"


def verdict_lines(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> list[str]:
    """One line for each verdict, then one that counts them."""
    by_name = {claim.name: claim for claim in claims}
    metrics = {verdict.claim: verdict.metric for verdict in verdicts}
    width = max((len(verdict.claim) for verdict in verdicts), default=0)
    widest = max([12, *(len(said(verdict)) for verdict in verdicts)])
    lines = []
    for verdict in verdicts:
        shown = estimate_text(by_name[verdict.claim], verdict.estimate, verdict.metric)
        words = [f"{said(verdict):{widest}}", f"{verdict.claim:{width}}", f"{shown} {verdict.reason}".strip()]
        remarks = retention_text(verdict) + unchecked_text(verdict) + chance_text(by_name[verdict.claim], verdict)
        remarks += f"; claimed: {terms_text(by_name[verdict.claim], metrics, claims)}" + looks_text(verdict)
        lines.append("  ".join(words) + remarks)
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


def retention_text(verdict: Verdict) -> str:
    """A warning where the candidate scores far better than its baseline; nothing elsewhere."""
    if verdict.high_retention is None:
        return ""
    return f"; WARNING: {high_retention_text(verdict.high_retention)}"


def unchecked_text(verdict: Verdict) -> str:
    """What a SUPPORTED speedup takes on trust: the gates that matter for it and could not be checked."""
    unchecked = [gate for gate in verdict.gates if gate.outcome == "not_checked" and gate.name in SAID_WITH_SPEED]
    if verdict.outcome != "SUPPORTED" or not unchecked:
        return ""
    return f"; not checked: {'; '.join(dict.fromkeys(f'{gate.name} ({gate.detail})' for gate in unchecked))}"


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
    """``3 claims: 1 REFUTED, 2 SUPPORTED in this launch``, in the order that decides the exit code."""
    ordered = sorted(verdicts, key=lambda verdict: list(EXIT_CODES).index(verdict.outcome))
    counts = [f"{number} {outcome}" for outcome, number in Counter(map(said, ordered)).items()]
    noun = "claim" if len(verdicts) == 1 else "claims"
    bounds = f"; {BOUNDS}" if any(verdict.estimate for verdict in verdicts) else ""
    return f"{len(verdicts)} {noun}: {', '.join(counts) or 'none judged'}{bounds}"


def strict_line(verdicts: Sequence[Verdict]) -> str:
    """What a strict check counts otherwise than it is printed; empty where there is nothing of the kind."""
    num = sum(verdict.outcome == "SUPPORTED" and verdict.scope is not None for verdict in verdicts)
    if not num:
        return ""
    return (
        f"strict: {num} SUPPORTED in fewer than {stats.MIN_LAUNCHES} launches {'is' if num == 1 else 'are'} counted as "
        f"inconclusive; `twotower-eval speed --launches {stats.MIN_LAUNCHES}` measures how launches differ"
    )


def audit_lines(findings: Sequence[Finding]) -> list[str]:
    """One line for each finding, then one that counts those that contradict."""
    lines = [f"{finding.kind:11}  {finding.text}" for finding in findings]
    wrong = sum(finding.kind == "CONTRADICTS" for finding in findings)
    return [*lines, f"{len(findings)} findings, {wrong} of them contradict what is published"]
