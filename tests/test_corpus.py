"""The miniature's corpus: answers are right by a second computation, nothing leaks, the tasks are its output."""

import json
import operator
import re
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest
import yaml

from twotower_eval.miniature import corpus
from twotower_eval.miniature.corpus import KINDS, Document, documents, sample, training_documents
from twotower_eval.miniature.task_files import distractors, write_tasks
from twotower_eval.miniature.tokenizer import CHARACTERS, encode

TASKS = Path(__file__).parents[1] / "tasks" / "miniature"
GENERATION_TASKS = [f"miniature_{kind}" for kind in KINDS]


def draw(kind: str, count: int = 1000) -> list[Document]:
    return list(islice(documents(5, [kind]), count))


def rows(task: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


# --- answers, recomputed from the prompts ---


def test_arithmetic_columns_and_result_are_right():
    compute = {"add": operator.add, "sub": operator.sub, "+": operator.add, "-": operator.sub}
    for document in draw("arithmetic"):
        verb, first, second = re.fullmatch(r"(\w+) (\d+) (\d+)=", document.prompt).groups()
        columns, result = document.answer.split(" so ")
        assert int(result) == compute[verb](int(first), int(second))
        values = []
        for column in columns.split():
            left, carried, right = re.fullmatch(r"(\d+[-+]\d)(\+\d)?=(\d+)", column).groups()
            a, sign, b = re.fullmatch(r"(\d+)(.)(\d)", left).groups()
            values.append(compute[sign](int(a), int(b)) + int(carried or 0))
            assert values[-1] == int(right)
        digits = [value % 10 for value in values[:-1]] + [values[-1]]
        assert int("".join(map(str, reversed(digits)))) == int(result), "the columns do not spell the result"


def test_recall_facts_stand_in_the_table():
    for document in draw("recall"):
        table_text, question = document.prompt.removesuffix("=").split("; ")
        table = [row.split() for row in table_text.split(", ")]
        verb, *asked = question.split()
        assert verb == "has"
        found = [next(row for row in table if row[0] == name) for name in asked]
        assert document.answer == ", ".join("{} has {} {}".format(*row) for row in found)


def test_sort_orders_and_names_the_extremes():
    for document in draw("sort"):
        _, direction, *numbers = document.prompt.removesuffix("=").split()
        ordered, low, high = re.fullmatch(r"(.*) low (\d+) high (\d+)", document.answer).groups()
        assert Counter(ordered.split()) == Counter(numbers)
        in_order = operator.lt if direction == "up" else operator.gt
        assert all(in_order(int(a), int(b)) for a, b in pairwise(ordered.split()))
        assert (int(low), int(high)) == (min(map(int, numbers)), max(map(int, numbers)))


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("run h=459 loop 5 h+17=", "h=476 h=493 h=510 h=527 h=544"),
        ("run h=309 loop 6 h-49=", "h=260 h=211 h=162 h=113 h=64 h=15"),
        ("run gkba twice ends=", "gkbagkba then akbagkbg end"),
        ("run abcd rev rot=", "dcba then cbad end"),
        ("run abcd up cut=", "ABCD then BCD end"),
        ("run keep even of 14 71 41 61 63 95 32 56 80 99=", "14 32 56 80 end"),
        ("run keep under 69 of 61 18 50 86 68 24=", "61 18 50 68 24 end"),
    ],
)
def test_interpreter_of_the_tests_knows_the_language(prompt, answer):
    assert interpret(prompt) == answer


def test_programs_print_what_an_interpreter_prints():
    for document in draw("program"):
        assert interpret(document.prompt) == document.answer, document.prompt


def interpret(prompt: str) -> str:
    """A second implementation of the program kind, from the prompt's text alone."""
    words = prompt.removeprefix("run ").removesuffix("=").split()
    if words[0] == "keep":
        middle = words.index("of")
        test = {
            "even": lambda n: n % 2 == 0,
            "odd": lambda n: n % 2 == 1,
            "over": lambda n: n > int(words[2]),
            "under": lambda n: n < int(words[2]),
        }[words[1]]
        kept = [word for word in words[middle + 1 :] if test(int(word))]
        return f"{' '.join(kept)} end"
    if "=" in words[0]:
        (name, start), step = words[0].split("="), int(words[3][1:])
        return " ".join(f"{name}={int(start) + step * i}" for i in range(1, int(words[2]) + 1))
    text, printed = list(words[0]), []
    for word in words[1:]:
        if word == "rev":
            text.reverse()
        elif word == "rot":
            text.append(text.pop(0))
        elif word == "ends":
            text[0], text[-1] = text[-1], text[0]
        elif word == "cut":
            del text[0]
        elif word == "up":
            text = [character.upper() for character in text]
        else:
            assert word == "twice"
            text *= 2
        printed.append("".join(text))
    return f"{' then '.join(printed)} end"


def test_english_draws_the_right_conclusions():
    checked = Counter()
    for document in draw("english"):
        verb, *_ = document.prompt.split()
        given, told = ([int(n) for n in re.findall(r"\d+", text)] for text in (document.prompt, document.answer))
        if verb in ("older", "younger"):
            names = re.findall(r"[A-Z]\w+", document.prompt)
            ages = dict(zip(names, given, strict=True))
            first = (max if verb == "older" else min)(names, key=ages.__getitem__)
            assert document.answer.startswith(f"{first} the ")
            assert f" is {verb} than " in document.answer
        elif verb == "order":
            assert told == sorted(given)
            pairs = dict(re.findall(r"(\w+) (\d+)", document.prompt.removeprefix("order ")))
            assert dict(re.findall(r"(\w+) is (\d+)", document.answer)) == pairs
        elif verb == "gift":
            assert told == [given[1], given[0] - given[1]]
            assert min(told) > 0
        else:
            assert told == [sum(given)]
        checked[verb] += 1
    assert set(checked) == {"older", "younger", "order", "gift", "total", "tell"}


# --- form ---


@pytest.mark.parametrize("kind", list(KINDS))
def test_documents_fit_the_model_and_its_alphabet(kind):
    for document in draw(kind, 3000):
        assert document.kind == kind
        assert document.prompt.endswith("=")
        assert len(document.prompt) <= 110
        assert 10 <= len(document.answer) <= 80
        assert document.answer == document.answer.strip()
        assert set(document.prompt + document.answer) <= set(CHARACTERS)


def test_same_seed_same_documents_and_kinds_are_mixed():
    first, again, other = (list(islice(documents(seed), 2000)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    counts = Counter(document.kind for document in first)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 300


def test_unknown_kind_is_one_clear_error():
    with pytest.raises(ValueError, match=r"unknown kind 'poetry'.*arithmetic, recall"):
        sample("poetry", Random(0))


# --- leaks ---


def test_no_evaluation_prompt_among_200_thousand_training_documents():
    task_prompts = {row["prompt"] for task in (*GENERATION_TASKS, "miniature_choice") for row in rows(task)}
    perplexity_texts = {row["text"] for row in rows("miniature_perplexity")}
    raw = islice(documents(corpus.TRAIN_SEED_BASE), 200_000)
    assert any(document.prompt in task_prompts for document in raw), "nothing to drop: the exclusion is not exercised"
    for document in islice(training_documents(0), 200_000):
        assert document.prompt not in task_prompts
        assert document.prompt + document.answer not in perplexity_texts


def test_planted_evaluation_prompt_is_dropped(monkeypatch):
    planted = corpus.evaluation_documents("sort")[7]
    monkeypatch.setitem(corpus.KINDS, "sort", lambda rng: planted if rng.random() < 0.5 else corpus.sort(rng))
    assert planted in islice(documents(corpus.TRAIN_SEED_BASE, ["sort"]), 50)
    assert planted not in islice(training_documents(0, ["sort"]), 1000)


def test_evaluation_prompts_are_all_different():
    prompts = [document.prompt for kind in KINDS for document in corpus.evaluation_documents(kind)]
    assert len(set(prompts)) == len(prompts)


# --- tasks ---


def test_task_files_are_what_write_tasks_writes(tmp_path):
    written = write_tasks(tmp_path)
    assert sorted(path.name for path in written) == sorted(path.name for path in TASKS.iterdir())
    for path in written:
        assert path.read_bytes() == (TASKS / path.name).read_bytes(), f"{path.name} is out of date: run write_tasks"


def test_tasks_have_the_promised_documents():
    counts = {task: len(rows(task)) for task in (*GENERATION_TASKS, "miniature_choice", "miniature_perplexity")}
    assert counts == {**dict.fromkeys(GENERATION_TASKS, 300), "miniature_choice": 300, "miniature_perplexity": 100}
    ids = [row["doc_id"] for task in counts for row in rows(task)]
    assert len(set(ids)) == len(ids)
    texts = [row.get("prompt") or row["text"] for task in counts for row in rows(task)]
    assert len(set(texts)) == len(texts), "a prompt serves in two tasks"


def test_task_settings_name_a_file_beside_them():
    for path in sorted(TASKS.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert settings["task"] == path.stem
        assert settings["dataset_kwargs"]["data_files"] == {"test": f"{path.stem}.jsonl"}
        if settings["output_type"] == "generate_until":
            longest = max(len(encode(row["answer"] + "</s>")) for row in rows(path.stem))
            assert longest <= settings["generation_kwargs"]["max_gen_toks"]


def test_choices_are_four_different_texts_with_the_answer_at_gold():
    answers = {d.prompt: d.answer for kind in ("recall", "english") for d in corpus.evaluation_documents(kind)}
    golds = Counter()
    for row in rows("miniature_choice"):
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["gold"]] == answers[row["prompt"]]
        golds[row["gold"]] += 1
    assert min(golds.values()) > 50, "the right answer's place gives it away"


@pytest.mark.parametrize("kind", ["recall", "english"])
def test_distractors_differ_from_the_answer_in_one_word(kind):
    for document in draw(kind, 300):
        right = re.findall(r"\w+", document.answer)
        for option in distractors(document, Random(1)):
            differing = [a != b for a, b in zip(right, re.findall(r"\w+", option), strict=True)]
            assert sum(differing) == 1
