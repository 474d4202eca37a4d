"""Pages of docs/: their examples as files, and their commands, run as they stand."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from twotower_eval import cli

DOCS = Path(__file__).parent.parent / "docs"


def write_files(page: str, folder: Path) -> list[str]:
    """Write every block of code that a page has one put into a file; their names."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"into `([\w.]+)`:\n\n```python\n(.*?)```\n", text, re.S)
    for name, code in found:
        (folder / name).write_text(code, encoding="utf-8")
        sys.modules.pop(name.removesuffix(".py"), None)  # of another test's folder
    return [name for name, _ in found]


def commands(page: str, section: str | None = None) -> list[list[str]]:
    """The lines of a page's console blocks, or of one section's, as a shell takes them apart."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if section is not None:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```console\n(.*?)```\n", text, re.S)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def run_commands(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, section: str | None = None) -> None:
    """Run a page's commands in a folder, or one section's, one after the other; each has to end well."""
    monkeypatch.chdir(folder)
    for program, *arguments in commands(page, section):
        if program == "export":
            assert arguments == ["PYTHONPATH=."]
            monkeypatch.syspath_prepend(str(folder))
        elif program == "python":
            runpy.run_path(str(folder / arguments[0]), run_name="__main__")
        else:
            assert program == "twotower-eval"
            assert cli.main(arguments) == 0, arguments
