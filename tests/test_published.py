"""What is published: reports that the committed runs give, byte for byte, and a README that quotes them."""

import re
from pathlib import Path

import pytest

from twotower_eval.analyse import report

ROOT = Path(__file__).parent.parent
RUNS, REPORTS = ROOT / "results/published", ROOT / "reports/published"
# Numbers with their intervals, such as 76.0 % [73.3, 78.6] or 1.74x [1.61, 1.89].
QUOTED = re.compile(r"\d+\.\d+ ?(?:%|x) \[\d+\.\d+, \d+\.\d+\]")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.md")}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.iterdir()))
def test_a_published_report_is_what_its_runs_give(name: str, tmp_path: Path) -> None:
    page = report.write(sorted((RUNS / name).iterdir()), tmp_path)
    committed = files_of(REPORTS / name)
    assert committed
    assert files_of(page) == committed


def test_the_readme_quotes_its_report() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n> ", " ")
    head = readme[: readme.index("## Two commands")]
    [linked] = set(re.findall(r"\((reports/published/[^)]*/report\.md)\)", head))
    said = (ROOT / linked).read_text(encoding="utf-8").replace("**", "")
    quoted = QUOTED.findall(head.replace("**", ""))
    assert len(quoted) >= 7
    assert [figure for figure in quoted if figure not in said] == []
