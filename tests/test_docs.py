"""What the README and the pages under docs/ promise: links that lead somewhere, and words that are explained."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")
# Words of reports, help and messages that a first reader cannot know.
WORDS = (
    *(
        "A/A null",
        "Above chance",
        "Arm",
        "AUP",
        "Break-even",
        "Cell",
        "Chance",
        "Cluster",
        "Commit",
    ),
    *(
        "Decoder-exercised",
        "Degenerate output",
        "Equal by construction",
        "Flip",
        "Forward",
        "Forced commit",
        "Gate",
        "Headline",
    ),
    *(
        "Launch",
        "Likelihood kinds",
        "Look",
        "Margin",
        "Memory floor",
        "NFE",
        "one-sided 95 % bounds",
        "Operating point",
    ),
    *("Pareto front", "Power line", "Prefill", "Probe", "Residual", "Retention", "Round", "Threshold", "Trace"),
    *("Tokens per NFE", "Tokens per forward", "Useful tokens", "Wall-clock speedup", "Warm-up rounds", "Witness"),
    *("Workload", "SUPPORTED", "REFUTED", "INVALID", "INCONCLUSIVE", "NOT MEASURED", "Bootstrap", "Crossed bootstrap"),
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link, _ in LINK.findall(prose) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link for link, _ in LINK.findall(PAGES[0].read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


def test_the_glossary_explains_each_word_once() -> None:
    entries = re.findall(r"\*\*([^*]+)\*\*", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"))
    assert sorted(entries) == sorted(set(entries))
    named = {entry.split(" (")[0] for entry in entries}
    assert set(WORDS) <= named, f"not explained: {sorted(set(WORDS) - named)}"


def test_the_readme_takes_a_minute() -> None:
    """The rest is in docs/."""
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 160


def test_the_code_cites_only_what_is_in_the_repository() -> None:
    """Some docstrings cited a specification that no reader has, by its name in capitals."""
    for file in sorted((ROOT / "twotower_eval").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert not re.findall(r"\b(?:PROTOCOL|DESIGN|ECOSYSTEM)\b", text), file
        for page in re.findall(r"docs/[\w/]+\.md", text):
            assert (ROOT / page).is_file(), f"{file} cites {page}"
