"""A report of real runs with everything masked that a machine, a clock or a version may change."""

import re

RUN_ID = re.compile(r"\d{8}T\d{6}Z-(run|speed|verify)-[0-9a-f]{6}")
DIGEST = re.compile(r"\b[0-9a-f]{64}\b|`[0-9a-f]{16}`|sha256 [0-9a-f]{16}")
OUTCOME = re.compile(r"SUPPORTED|REFUTED|INCONCLUSIVE|INVALID|NOT MEASURED")
NUMBER = re.compile(r"(over )?[+-]?\d[\d.,]*(e[+-]?\d+)?(,? (ms|s)\b)?")
# Sections in which times, or what follows from them, stand: they keep their words and lose their numbers.
TIMED = ("Verdict", "Claimed", "Speed", "Quality against", "Collapse", "Gates", "Latency")


def masked(markdown: str) -> str:
    """The Markdown with its changing parts masked."""
    markdown = DIGEST.sub("<digest>", RUN_ID.sub(r"<\1 id>", markdown))
    markdown = markdown.replace("] **INVALID**", "]")  # beside a speedup, where the machine was not quiet
    return "".join(_section(section) for section in re.split(r"(?m)^(?=## )", markdown))


def _section(section: str) -> str:
    title = section.removeprefix("## ").partition("\n")[0]
    if title.startswith(("Environment", "How to reproduce")):
        return f"## {title}\n\n<masked>\n\n"
    if not title.startswith(TIMED):
        return section
    lines = [_timed(line) for line in section.split("\n") if not _comes_and_goes(line)]
    return "\n".join(lines)


def _comes_and_goes(line: str) -> bool:
    """Remarks on how quiet the machine was; reasons of verdicts, which quote times."""
    return line.startswith("- ") and bool(OUTCOME.search(line))


def _timed(line: str) -> str:
    for gate in ("A/A null", "probes"):  # whether they tell anything hangs on how even the machine's times are
        if line.startswith(f"| {gate}"):
            return f"| {gate} | <masked> |"
    if line.startswith("**") and OUTCOME.match(line[2:]):
        return "<verdict>"
    if "claims: " in line and "one-sided" in line:
        return "<count of verdicts>"
    line = line.replace(" (INVALID, see below)", "").replace(" **unexplained**", "")
    return NUMBER.sub("#", OUTCOME.sub("<outcome>", line))
