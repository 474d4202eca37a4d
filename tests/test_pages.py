"""The examples of docs/ are written to files from the pages, and the pages' commands run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, run_commands, write_files

from twotower_eval import cli, store

PAGES = {"family.md": ["bigram.py", "make_bigram.py"], "decoder.md": ["varied.py"], "section.md": ["lengths.py"]}


def newest(folder: Path, verb: Any) -> store.Run:
    return store.load(store.find_runs(folder / "results", verb)[0])


def report_of(folder: Path) -> str:
    (path,) = (folder / "reports").glob("*/report.md")
    return path.read_text(encoding="utf-8")


@pytest.fixture
def run_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(page: str) -> Path:
        assert write_files(page, tmp_path) == PAGES[page]
        run_commands(page, tmp_path, monkeypatch)
        return tmp_path

    return run


def test_the_page_on_families(run_page: Any, capsys: Any) -> None:
    folder = run_page("family.md")
    for verb in ("run", "speed"):
        run = newest(folder, verb)
        of = {cell.arm: cell.checkpoint for cell in run.manifest.cells}
        assert run.complete
        assert run.manifest.plan["family"] == of["candidate"].family == "bigram:load"
        assert of["baseline"].family == "nemotron_h"
        assert "bigram.py" in {file.name for file in of["candidate"].files}
    checks = {check.name: check.outcome for check in newest(folder, "verify").checks}
    assert checks["batch_equals_single"] == checks["blockwise_context"] == "passed"
    assert "# bigram against miniature" in report_of(folder)

    text = (folder / "bigram.py").read_text(encoding="utf-8")
    (folder / "bigram.py").write_text(text + "\n", encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["run", "--resume", str(newest(folder, "run").path)]) == 2
    assert "bigram.py of the candidate bigram was changed" in capsys.readouterr().err


def test_the_page_on_decoders(run_page: Any) -> None:
    folder = run_page("decoder.md")
    for verb, penalties in (("run", [0.0, 8.0]), ("speed", [8.0])):
        run = newest(folder, verb)
        assert run.complete
        specs = {c.decoder.label: c.decoder.params for c in run.manifest.cells if c.arm == "candidate"}
        assert [params["penalty"] for params in specs.values()] == penalties
        assert {params["window"] for params in specs.values()} == {3}
    scored = newest(folder, "run")
    answers: dict[tuple[str, object], list[tuple[int, ...]]] = {}
    for row in scored.generations:
        cell = scored.cells[row.cell]
        answers.setdefault((cell.arm, cell.decoder.params.get("penalty")), []).append(row.generation.token_ids)
    assert answers["candidate", 0.0] == answers["baseline", None] != answers["candidate", 8.0]
    assert "penalty 8" in report_of(folder)


def test_the_page_on_sections(run_page: Any) -> None:
    folder = run_page("section.md")
    titles = re.findall("^## (.*)", report_of(folder), re.M)
    assert titles[-3] == "Length of answers"
    assert "Quality" in " ".join(titles)
    (table,) = (folder / "reports").glob("*/lengths.csv")
    lines = table.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "arm,decoder,task,answers,tokens,cut"
    run = newest(folder, "run")
    rows = [row for row in run.generations if run.cells[row.cell].arm == "baseline" and row.task == "miniature_sort"]
    mean = sum(row.generation.num_tokens for row in rows) / len(rows)
    (line,) = [line for line in lines if line.startswith("baseline") and "miniature_sort" in line]
    assert line.split(",")[-3:-1] == ["2", str(mean)]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_its_group_of_entry_points(page: str) -> None:
    from twotower_eval.names import GROUPS

    (group,) = re.findall(r'\[project\.entry-points\."(.*)"\]', (DOCS / page).read_text(encoding="utf-8"))
    assert group in GROUPS.values()
