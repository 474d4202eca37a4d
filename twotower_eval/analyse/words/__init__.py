"""Words for facts: how an interval was made, what a gate or a warning found. No code parses them."""

from __future__ import annotations

from twotower_eval.analyse.words import answers as answers
from twotower_eval.analyse.words import gates as gates
from twotower_eval.analyse.words.facts import fact_text as fact_text
from twotower_eval.analyse.words.facts import kind_text as kind_text
from twotower_eval.records import Finding, Gate

INVALID = "INVALID"  # beside a timing that must not be read as a speedup


def found_text(gate: Gate) -> str:
    """What a gate found."""
    return fact_text(gate.facts)


def gate_text(gate: Gate) -> str:
    """``A/A null: the baseline timed against itself is neither off nor too wide``."""
    return f"{kind_text(gate.kind)}: {fact_text(gate.facts)}"


def finding_text(finding: Finding) -> str:
    """A warning; of a failed gate also its name, behind INVALID."""
    text = fact_text(finding.facts)
    return f"{INVALID}: {kind_text(finding.kind)}: {text}" if finding.severity == "invalid" else text
