"""Ids of prompts, runs and launches: each is made and taken apart in one place."""

import hashlib
import re
from pathlib import Path

import pytest

import twotower_eval
from twotower_eval.analyse.claims import recomputed
from twotower_eval.analyse.report import report_id
from twotower_eval.names import plural
from twotower_eval.records import (
    document_of,
    document_prompt_id,
    launch_id_of,
    run_and_launch,
    run_id_of,
    scored_document_of,
    scored_prompt_id,
    sha256_text,
    time_and_verb,
)
from twotower_eval.store import new_run_id

PACKAGE = Path(twotower_eval.__file__).parent


@pytest.mark.parametrize("task", ["sorting", "group/sorting", "mgsm_de", "a-b"])
def test_a_prompts_id_is_read_back(task: str) -> None:
    assert document_of(document_prompt_id(task, 12)) == (task, 12)
    assert scored_document_of(scored_prompt_id(task, 12, 0, 3)) == (task, 12)
    assert scored_document_of(document_prompt_id("sorting", 12)) is None


@pytest.mark.parametrize("prompt_id", ["mine", "text-9f86d081884c", "/3", "sorting/", "sorting/x", "sorting/²"])
def test_other_prompts_are_of_no_document(prompt_id: str) -> None:
    assert document_of(prompt_id) is None
    assert scored_document_of(prompt_id) is None


def test_a_runs_id_is_read_back() -> None:
    made = new_run_id("speed")
    time, verb = time_and_verb(made)
    assert (run_id_of(time, verb, made[-6:]), verb) == (made, "speed")
    assert run_and_launch(launch_id_of(made, 2)) == (made, "2")
    assert run_and_launch("old") == ("old", "")
    assert time_and_verb("old") == ("old", "")


def test_a_report_of_runs_without_a_verb_in_their_ids_has_an_id() -> None:
    both = ["20261123T101500Z-run-3f9a1c", "20261124T101500Z-speed-3f9a1d"]
    assert re.fullmatch(r"20261124T101500Z-run-speed-[0-9a-f]{6}", report_id(both))
    assert re.fullmatch(r"b-[0-9a-f]{6}", report_id(["a", "b"]))


def test_ids_are_taken_apart_in_records_alone() -> None:
    """The same three lines stood in six files."""
    apart = re.compile(r"(prompt_id|launch_id|launch|run_id)\.r?(split|partition)\(|\{task\}/\{doc_id\}")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "records.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if apart.search(line)
    ]
    assert found == []


def test_an_audits_line_is_no_finding_of_a_run() -> None:
    """Two records had one name."""
    assert not hasattr(recomputed, "Finding")


def test_one_thing_is_one() -> None:
    assert [plural(1, "cell"), plural(2, "cell"), plural(1800, "cell")] == ["1 cell", "2 cells", "1,800 cells"]
    assert plural(2, "launch", "launches") == "2 launches"


def test_half_a_surrogate_pair_has_a_hash() -> None:
    """Web text may hold one; lm-eval's logs hash it so, and other texts as ever."""
    assert sha256_text("a\ud83d") == hashlib.sha256(b"a\xed\xa0\xbd").hexdigest()
    assert sha256_text("ä") == hashlib.sha256("ä".encode()).hexdigest()
