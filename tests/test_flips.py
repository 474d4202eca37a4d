"""Flipped answers are shown with their question, the right answer, and what was scored of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import report_fixture as made

from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.records import DocumentText, Score, sha256_text

QUESTION = "Q" * 500 + "what is 1 | 2?\nthink"


def documents(target: str) -> list[DocumentText]:
    return [
        DocumentText(task=task, doc_id=doc_id, question=QUESTION, target=target)
        for task in ("arithmetic", "sorting")
        for doc_id in range(40)
    ]


def known(root: Path, texts: list[DocumentText], filtered: str | None) -> Path:
    """A run whose targets are ``42``, with these texts."""

    def edit(row: Any) -> Any:
        is_score = isinstance(row, Score)
        return dataclasses.replace(row, target_sha256=sha256_text("42"), filtered=filtered) if is_score else row

    plain = made.quality_run(root / "plain", num_docs=40, tasks=["arithmetic", "sorting"], perplexity=False, edit=edit)
    run = store.load(plain)
    rows = [*run.scores, *run.generations, *run.likelihoods, *texts]
    return made.write(root, run.manifest, rows)


def flips(root: Path, path: Path) -> str:
    folder = report.write([path], root / "reports", sections=["flips"], csv=True)
    return (folder / "report.md").read_text(encoding="utf-8")


def test_question_right_answer_and_filtered_answer_are_shown(tmp_path: Path) -> None:
    path = known(tmp_path, documents("42"), "17 <b>")
    markdown = flips(tmp_path, path)
    assert "| document | question | right answer | baseline says | candidate says |" in markdown
    row = next(line for line in markdown.splitlines() if "**lost**" in line)
    assert r"what is 1 \| 2?<br>think |" in row
    assert f"| … {'Q' * (400 - 20)}what" in row, "of a long question the end, where it asks"
    assert "| 42 |" in row
    assert "*(read as 17 &lt;b&gt;" in row
    [table] = (tmp_path / "reports").glob("*/tables/flips.csv")
    frame = pd.read_csv(table)
    assert set(frame["gold"]) == {42}
    assert set(frame["question"].str.len()) == {520}, "a table for programs is cut nowhere"
    assert set(frame["candidate_filtered"]) == {"17 <b>"}


@pytest.mark.parametrize("texts", [[], documents("another answer than was scored")], ids=["none", "edited"])
def test_runs_without_texts_read_as_before(tmp_path: Path, texts: list[DocumentText]) -> None:
    markdown = flips(tmp_path, known(tmp_path, texts, None))
    assert "| document | baseline says | candidate says |" in markdown
    assert "read as" not in markdown


def test_gold_is_the_choice_that_the_target_names() -> None:
    def gold(target: str, *choices: str) -> str:
        return DocumentText(task="t", doc_id=0, question="q", target=target, choices=choices).gold

    assert gold("1", "red", "blue") == "blue"
    assert gold("7", "red", "blue") == "7"
    assert gold("blue", "red", "blue") == "blue"
    assert gold("72") == "72"
    assert gold("[0, 1]", "red", "blue") == "[0, 1]"
