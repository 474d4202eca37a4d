"""The habits of the house, kept by tools: lint, format, types, and the size of things."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 480
MAX_FUNCTION_LINES = 60


def run_tool(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_lint() -> None:
    run_tool("ruff", "check", ".")


def test_format() -> None:
    run_tool("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_types() -> None:
    run_tool("mypy")


def test_files_and_functions_stay_short() -> None:
    """The aim is 300 and 40 lines; these limits are where a split is overdue."""
    too_long = []
    for path in sorted((ROOT / "twotower_eval").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES and path.name != "records.py":
            too_long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES:
                too_long.append(f"{path.name}: {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines")
    assert too_long == []


def test_the_version_is_in_the_changelog() -> None:
    from twotower_eval import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_every_dependency_the_project_names() -> None:
    """Including those of the extras that are installed here; the CUDA ones are built on the user's machine."""
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["real"], *extras["ray"]]
    names = {re.split(r"[<>=!\[ ]", want)[0].lower().replace("_", "-") for want in wanted}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line and line[0] != "#"}
    assert names <= pinned
