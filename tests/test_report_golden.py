"""From the shipped miniature to its report through the command line, held against a committed report.

To write it anew after a change that is meant: TWOTOWER_EVAL_REWRITE=1 pytest tests/test_report_golden.py
"""

import os
from pathlib import Path

import pytest
from golden_report import masked

from twotower_eval.cli import main

GOLDEN = Path(__file__).parent / "data" / "golden_report.md"
POINT = ["--thresholds", "0.99"]


def command(capsys, *arguments: str) -> str:
    assert main([*arguments]) in (0, 5), arguments  # 5: a check of verify failed, which the report then shows
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_report_of_the_miniature_is_the_golden_one(tmp_path, capsys) -> None:
    out = str(tmp_path / "results")
    tasks = ["--tasks", "miniature_sort,miniature_recall,miniature_choice"]
    command(capsys, "run", *tasks, *POINT, "--limit", "3", "--out", out)
    speed = ["--tasks", "miniature_sort,miniature_recall", "--num-prompts", "2", "--min-rounds", "2"]
    command(capsys, "speed", *speed, *POINT, "--threads", "1", "--out", out)
    command(capsys, "verify", "--out", out)
    report = command(capsys, "report", "--results", out, "--out", str(tmp_path / "reports"), "--html")
    made = masked(Path(report).with_suffix(".md").read_text(encoding="utf-8"))
    if os.environ.get("TWOTOWER_EVAL_REWRITE"):
        GOLDEN.write_text(made, encoding="utf-8")
    assert made == GOLDEN.read_text(encoding="utf-8")
    assert "<script" not in Path(report).read_text(encoding="utf-8")
