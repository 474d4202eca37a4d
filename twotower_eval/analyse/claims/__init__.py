"""Claims: read from files written before measuring, judged by what runs hold, audited by what was published.

``files`` reads them, ``match`` finds the evidence at a claim's own operating point, ``gates`` says what must be in
order, ``judge`` makes verdicts, ``audit`` checks published numbers alone. Needs neither torch nor lm-eval.
"""

from twotower_eval.analyse.claims.audit import audit, audit_code
from twotower_eval.analyse.claims.files import ClaimFile, load_claims, select
from twotower_eval.analyse.claims.judge import EXIT_CODES, exit_code, judge
from twotower_eval.analyse.claims.recomputed import AuditLine
from twotower_eval.analyse.claims.text import audit_lines, strict_line, verdict_lines

__all__ = [
    "EXIT_CODES",
    "AuditLine",
    "ClaimFile",
    "audit",
    "audit_code",
    "audit_lines",
    "exit_code",
    "judge",
    "load_claims",
    "select",
    "strict_line",
    "verdict_lines",
]
