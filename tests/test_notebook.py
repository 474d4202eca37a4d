"""docs/notebook.ipynb runs as it stands, and docs/python.md shows the same code and more that runs."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import twotower_eval as tt

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
BLOCKS = re.findall(r"```python\n(.*?)\n```", (DOCS / "python.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """What a kernel shows of a cell: the value of its last line, if that is one."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_page_shows_the_notebook() -> None:
    assert BLOCKS[0] == "\n\n".join(CODE)


def test_the_notebook_is_committed_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_the_notebook_and_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = [run_cell(source, names) for source in CODE]
    assert all(value is not None for value in shown)
    html = [value._repr_html_() for value in shown]
    run, timed, page = names["run"], names["timed"], names["page"]
    assert run.complete
    assert timed.complete
    assert {run.path.parent, timed.path.parent} == {Path("results")}
    for text, part in zip(html[:3], (run.run_id, timed.run_id, names["comparison"].points[0].name), strict=True):
        assert part in text
    assert page.path.is_file()
    assert html[5].startswith("<iframe")
    assert names["scores"]["prompt"].notna().all()
    assert len(names["verdicts"]) == len(names["verdicts"].claims)
    for source in BLOCKS[1:]:
        assert run_cell(source, names) is None
    assert set(names["seconds"].index.get_level_values("arm")) == {"baseline", "candidate"}
    assert isinstance(names["answer"], tt.Generation)
    assert str(names["answer"].num_tokens) in capsys.readouterr().out
