"""What guessing scores: from a task's documents, through score rows, to retention above chance and to verdicts."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from twotower_eval import suites
from twotower_eval.suites import lm_tasks

HEAD = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: q
doc_to_choice: choices
doc_to_target: gold
metric_list:
"""
TEXT = """
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tasks folder of its own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lm_tasks.local_index.cache_clear()
    monkeypatch.setattr(lm_tasks, "data_path", lambda *parts: folder)
    yield folder
    lm_tasks.local_index.cache_clear()


def metrics(*names: str) -> str:
    return "".join(f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n" for name in names)


def write_task(folder: Path, yaml: str, docs: Sequence[dict[str, Any]]) -> None:
    (folder / "own.yaml").write_text(HEAD + yaml)
    (folder / "own.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))


def chances(folder: Path, yaml: str, docs: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    write_task(folder, yaml, docs)
    return [dict(doc.chance) for doc in suites.resolve_tasks(["own"])[0].docs]


def question(num: int, gold: Any, **more: Any) -> dict[str, Any]:
    return {"q": f"which of {num}?", "choices": [f"no. {i}" * (i + 1) for i in range(num)], "gold": gold, **more}


# --- documents -----------------------------------------------------------------------------------------------------


def test_options_are_counted_document_by_document(own_task: Path) -> None:
    docs = [question(num, num - 1) for num in (2, 3, 4, 5)]
    found = chances(own_task, CHOICE + metrics("acc", "acc_norm", "acc_bytes"), docs)
    assert [one["acc"] for one in found] == [1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert all(one == dict.fromkeys(("acc", "acc_norm", "acc_bytes"), one["acc"]) for one in found)


def test_several_right_options_count_and_one_that_is_not_there_does_not(own_task: Path) -> None:
    docs = [question(4, [0, 2]), question(5, [1]), question(4, [0, 1, 2, 3]), question(4, [3, 9])]
    found = chances(own_task, CHOICE + metrics("acc", "acc_norm"), docs)
    assert [one["acc"] for one in found] == [1 / 2, 1 / 5, 1.0, 1 / 4]


def test_a_gold_by_its_words_and_metrics_that_are_no_share(own_task: Path) -> None:
    """F1 over the set and log-likelihoods have no chance; asking each option twice does not halve it."""
    yaml = CHOICE + metrics("acc", "acc_mutual_info", "f1") + metrics("likelihood", "brier_score")
    assert chances(own_task, yaml, [question(4, "no. 0"), question(2, "no. 1no. 1")]) == [
        {"acc": 0.25, "acc_mutual_info": 0.25},
        {"acc": 0.5, "acc_mutual_info": 0.5},
    ]


def test_options_in_the_context(own_task: Path) -> None:
    """As in WinoGrande: the options stand in the contexts, and the text is the number of the right one."""
    yaml = """
output_type: multiple_choice
doc_to_text: "{{ gold }}"
doc_to_choice: choices
doc_to_target: rest
metric_list:
"""
    docs = [{"choices": ["Ann was", "Bob was", "Cy was"][:num], "gold": 1, "rest": "late"} for num in (2, 3)]
    assert chances(own_task, yaml + metrics("acc"), docs) == [{"acc": 1 / 2}, {"acc": 1 / 3}]


def test_a_scoring_function_of_its_own(own_task: Path) -> None:
    """As in TruthfulQA's second form: the score is the probability of all true options together."""
    (own_task / "own_code.py").write_text(
        "import math\n"
        "def score(doc, results):\n"
        "    shares = [math.exp(nats) for nats, _ in results]\n"
        "    true = sum(share for share, label in zip(shares, doc['labels']) if label)\n"
        "    return {'acc': true / sum(shares), 'nats': max(nats for nats, _ in results)}\n"
    )
    yaml = CHOICE.replace("metric_list:", "process_results: !function own_code.score\nmetric_list:")
    docs = [question(4, 0, labels=[1, 1, 1, 0]), question(5, 0, labels=[1, 0, 0, 0, 0])]
    assert chances(own_task, yaml + metrics("acc", "nats"), docs) == [{"acc": 0.75}, {"acc": 0.2}]


def test_a_scoring_function_that_takes_no_made_up_answers_has_no_chance(own_task: Path) -> None:
    (own_task / "own_code.py").write_text(
        "def score(doc, results):\n    assert max(nats for nats, _ in results) < -0.1\n    return {'acc': 1}\n"
    )
    yaml = CHOICE.replace("metric_list:", "process_results: !function own_code.score\nmetric_list:")
    assert chances(own_task, yaml + metrics("acc"), [question(4, 0)]) == [{}]


def test_a_last_word_and_a_text_have_no_options(own_task: Path) -> None:
    docs = [{"q": "once upon a", "a": "time"}]
    base = "doc_to_text: q\ndoc_to_target: a\nmetric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]\n"
    assert chances(own_task, "output_type: loglikelihood\n" + base % "acc", docs) == [{}]
    assert chances(own_task, "output_type: loglikelihood_rolling\n" + base % "bits_per_byte", docs) == [{}]
    assert chances(own_task, TEXT + "doc_to_text: q\ndoc_to_target: a\n", docs) == [{}]


@pytest.mark.parametrize(
    ("text", "docs", "expected"),
    [
        # As in MMLU-Pro: a column of options, the answer's letter.
        (
            "{{q}}",
            [{"q": "?", "options": list("wxyz"), "a": "C"}, {"q": "?", "options": list("uv"), "a": "(b)"}],
            [4, 2],
        ),
        # As in ARC: the column holds texts and labels.
        ("{{q}}", [{"q": "?", "choices": {"text": ["u", "v", "w"], "label": ["A", "B", "C"]}, "a": "v"}], [3]),
        # As in BIG-Bench Hard: options within the question.
        ("Q: {{q}}\nA: think.", [{"q": "Which?\nOptions:\n(A) red\n(B) blue\n(C) no colour", "a": "(B)"}], [3]),
        ("{{q}}", [{"q": "Which? A. red B. blue", "a": "B"}], [2]),
        # A letter that is an answer of its own, a list that lacks the answer, a list of accepted answers.
        ("{{q}}", [{"q": "Which letter follows A?", "a": "B"}], [None]),
        ("{{q}}", [{"q": "?", "choices": ["u", "v"], "a": "w"}], [None]),
        ("{{q}}", [{"q": "?", "aliases": ["u", "v"], "a": "u"}], [None]),
    ],
)
def test_answers_in_text_have_the_options_that_the_document_lists(
    own_task: Path, text: str, docs: list[dict[str, Any]], expected: list[int | None]
) -> None:
    yaml = f"{TEXT}doc_to_text: {json.dumps(text)}\ndoc_to_target: a\n"
    wanted = [{} if num is None else {"exact_match": pytest.approx(1 / num)} for num in expected]
    assert chances(own_task, yaml, docs) == wanted
