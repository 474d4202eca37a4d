"""Terms that a first reader cannot know are explained where they are used: in reports, verdicts and before a run."""

import re
from pathlib import Path

import pytest

from tests.golden_report import NUMBER
from twotower_eval.analyse import stats
from twotower_eval.analyse.words.glossary import TERMS, Term, term_lines, terms_in

ROOT = Path(__file__).parent.parent
GOLDEN = (ROOT / "tests/data/golden_report.md").read_text(encoding="utf-8")
GLOSSARY = " ".join((ROOT / "docs/glossary.md").read_text(encoding="utf-8").split())
REQUIRED = {
    "NFE", "A/A null", "Forced commit", "Decoder-exercised", "Crossed bootstrap", "Operating point", "AUP",
    "Break-even", "Residual", "Look", "Power line",
}  # fmt: skip


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_term_is_explained_in_the_words_of_the_glossary(term: Term) -> None:
    assert f"- **{term.name}**: {term.meaning}" in GLOSSARY


def test_no_term_is_forgotten() -> None:
    assert {term.name for term in TERMS} == REQUIRED


def test_the_golden_report_explains_each_of_its_terms_before_it_uses_it() -> None:
    """Half of them were explained sections later, or nowhere."""
    used = terms_in(GOLDEN)
    assert {"NFE", "A/A null", "Decoder-exercised", "Crossed bootstrap", "Break-even"} <= {term.name for term in used}
    first_section = GOLDEN.split("\n## ")[1]
    for term in used:
        assert NUMBER.sub("#", f"- **{term.name}**: {term.meaning}") in first_section


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("one of 3 operating points", ["Operating point"]),
        ("second look, one was declared", ["Look"]),
        ("tokens per NFE and forced commits", ["NFE", "Forced commit"]),
        ("Crossed paired bootstrap of 5 rounds", ["Crossed bootstrap"]),
        ("the null's residuals", ["Residual"]),
        ("it looks at a LINFEN of residuality", []),
    ],
)
def test_terms_are_found_in_a_text(text: str, names: list[str]) -> None:
    assert [term.name for term in terms_in(text)] == names
    assert [line.partition(":")[0] for line in term_lines(text)] == names


def test_the_power_line_explains_itself() -> None:
    planned = [stats.PlannedTask(name="a", num_clusters=900, accuracy=0.7, discordance=0.1)]
    line = stats.power_text(stats.power_plan(planned, 1.0))
    (term,) = terms_in(line)
    smallest = re.escape(term.meaning.split(" that")[0])
    assert re.match(
        rf"power line: {smallest} that 900 independent documents can show is [\d.]+ points, with 80 %", line
    )
