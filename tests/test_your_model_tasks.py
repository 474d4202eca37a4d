"""The section on tasks of docs/your-model.md: its files as they stand, and its commands, run in order."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS

from twotower_eval import cli, store
from twotower_eval.measure.suites import lm_tasks


def section(title: str) -> str:
    """A section of the page, without the heading of the next."""
    text = (DOCS / "your-model.md").read_text(encoding="utf-8")
    return re.split(r"^## ", text.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.M)[0]


@pytest.mark.slow
def test_the_commands_on_tasks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = section("Tasks")
    for name, content in re.findall(r"into `([\w./]+)`.*?```(?:yaml|json|toml)\n(.*?)```\n", text, re.S):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm_tasks, "stock_index", dict)  # it takes seconds
    found: list[store.Run] = []
    for block in re.findall(r"```sh\n(.*?)```\n", text, re.S):
        for program, *arguments in map(shlex.split, block.splitlines()):
            assert program == "twotower-eval"
            assert cli.main(arguments) == 0, arguments
            if arguments[0] == "run":
                found.append(store.load(Path(capsys.readouterr().out.split()[-1])))
    tasks = [{row.task for row in run.generations} for run in found]
    assert tasks == [{"capitals"}, {"capitals", "miniature_sort"}, {"capitals"}, {"capitals_short"}]
    assert found[3].manifest.seeds == {"run": 8, "python": 0, "numpy": 1234, "fewshot": 52}


def test_mathematics_names_its_extra_before_any_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As lm-eval's own mathematics tasks do, without math-verify."""
    (tmp_path / "grading.py").write_text("import math_verify\n")
    task = "task: sums\ndataset_path: json\ndoc_to_text: !function grading.text\ntest_split: test\n"
    (tmp_path / "sums.yaml").write_text(task)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr("twotower_eval.engine.models.arms.load_arms", lambda *_, **__: pytest.fail("a model is loaded"))
    assert cli.main(["run", "--tasks", str(tmp_path / "sums.yaml"), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip().endswith("to install it: pip install 'twotower-eval[math]'")
