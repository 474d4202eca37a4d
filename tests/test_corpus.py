"""The miniature's corpora: answers are right by a second computation, nothing leaks, the tasks are an output of one."""

import hashlib
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
from twotower_eval.miniature.corpus import KINDS, SHORT, Document, documents, sample, training_documents
from twotower_eval.miniature.evaluate import distractors, write_tasks
from twotower_eval.miniature.export import CHARACTERS, encode
from twotower_eval.miniature.long_answers import LONG

TASKS = Path(__file__).parents[1] / "tasks" / "miniature"
GENERATION_TASKS = [f"miniature_{kind}" for kind in KINDS]


def draw(kind: str, count: int = 1000, corpus: corpus.Corpus = SHORT) -> list[Document]:
    return list(islice(documents(5, [kind], corpus), count))


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


# --- long answers ---


def test_long_arithmetic_carries_right_and_spells_the_result():
    seen = Counter()
    for document in draw("arithmetic", corpus=LONG):
        verb, *numbers = document.prompt.removesuffix("=").split()
        compute = {"add": lambda n: sum(n), "sub": lambda n: n[0] - n[1], "mul": lambda n: n[0] * n[1]}[verb]
        *columns, result = document.answer.split(", ")
        assert result == f"so {compute([int(n) for n in numbers])}"
        going, digits = 0, ""
        for column in columns:
            term, told = column.split("=")
            assert int(re.split(r"[-+*]", term)[-1]) == going, "what the last column passes on"
            if verb == "sub":
                value, going = map(int, re.fullmatch(r"(\d) borrow (\d)", told).groups())
                assert eval(term) == value - 10 * going
                digits = f"{value}{digits}"
            else:
                value, kept, going = map(int, re.fullmatch(r"(\d\d) keep (\d) carry (\d)", told).groups())
                assert sum(eval(t) for t in re.sub(r"\b0+(\d)", r"\1", term).split("+")) == value
                assert (kept, going) == (value % 10, value // 10)
                digits = f"{kept}{digits}"
        assert int(f"{going}{digits}") == compute([int(n) for n in numbers])
        seen[verb] += 1
    assert min(seen[verb] for verb in ("add", "sub", "mul")) > 250


def test_long_recall_facts_stand_in_the_table():
    for document in draw("recall", corpus=LONG):
        table_text, question = document.prompt.removesuffix("=").split("; ")
        table = dict(row.split(" ", 1) for row in table_text.split(", "))
        assert document.answer == ", ".join(f"{name} has {table[name]}" for name in question.split()[1:])


def test_long_sort_orders_people_by_age():
    for document in draw("sort", corpus=LONG):
        _, direction, people = document.prompt.removesuffix("=").split(" ", 2)
        ordered, ends = document.answer.split("; ")
        ages = [int(person.split()[1]) for person in ordered.split(", ")]
        assert sorted(ordered.split(", ")) == sorted(people.split(", "))
        assert ages == sorted(ages, reverse=direction == "down")
        assert ends == f"first {ordered.split(', ')[0]}, last {ordered.split(', ')[-1]}"


def test_long_programs_print_what_an_interpreter_prints():
    for document in draw("program", corpus=LONG):
        words = document.prompt.removeprefix("run ").removesuffix("=").split()
        if words[0] == "keep":
            numbers, kept = words[words.index("of") + 1 :], interpret(document.prompt).removesuffix(" end").split()
            dropped = [n for n in numbers if n not in kept]
            told = f"keep {' '.join(kept)}, drop {' '.join(dropped)}, {len(kept)} of {len(numbers)}"
        elif "=" in words[0]:
            lines = interpret(document.prompt).split()
            told = ", ".join(f"{i} {line}" for i, line in enumerate(lines, 1)) + f", end {lines[-1]}"
        else:
            made = interpret(document.prompt).removesuffix(" end").split(" then ")
            pairs = zip(("start", *words[1:]), (words[0], *made), strict=True)
            told = ", ".join(f"{name} {text}" for name, text in pairs) + ", end"
        assert document.answer == told


def test_long_english_tells_every_fact_of_its_prompt():
    for document in draw("english", corpus=LONG):
        facts, sentences = document.prompt.removesuffix("=").split("; "), re.findall(r"[^.]+\.", document.answer)
        assert len(facts) == len(sentences) in (2, 3)
        for fact, sentence in zip(facts, sentences, strict=True):
            assert set(re.findall(r"[A-Z]\w+", fact)) == set(re.findall(r"[A-Z]\w+", sentence))


def test_long_corpus_asks_evaluation_for_the_trained_lengths():
    assert LONG.kinds == LONG.evaluation_kinds
    for kind in LONG.kinds:
        trained, held_out = ([len(d.answer) for d in some] for some in (
            draw(kind, 1000, LONG), corpus.evaluation_documents(kind, LONG)
        ))  # fmt: skip
        assert abs(sum(trained) / len(trained) - sum(held_out) / len(held_out)) < 2
        assert max(held_out) <= max(trained) + 5


def test_no_held_out_prompt_of_the_long_corpus_is_trained_on(monkeypatch):
    held_out = corpus.evaluation_prompts(LONG)
    assert len(held_out) == LONG.held_out_per_kind * len(LONG.kinds)
    assert not held_out & corpus.evaluation_prompts(SHORT)
    planted = corpus.evaluation_documents("sort", LONG)[3]
    monkeypatch.setitem(LONG.kinds, "sort", lambda rng: planted if rng.random() < 0.5 else corpus.sort(rng))
    assert planted not in islice(training_documents(0, ["sort"], LONG), 200)


def test_short_corpus_is_the_one_that_the_shipped_pair_was_trained_on():
    text = "\n".join(document.prompt + document.answer for document in islice(training_documents(0), 500))
    assert hashlib.sha256(text.encode()).hexdigest().startswith("62bb0ea66d44a349")


# --- form ---


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("made", "prompt", "answer"), [(SHORT, (1, 110), (10, 80)), (LONG, (1, 175), (60, 150))])
def test_documents_fit_the_model_and_its_alphabet(kind, made, prompt, answer):
    for document in draw(kind, 2000, made):
        assert document.kind == kind
        assert document.prompt.endswith("=")
        assert prompt[0] <= len(document.prompt) <= prompt[1]
        assert answer[0] <= len(document.answer) <= answer[1]
        assert len(document.answer) < made.max_new_tokens, "with its EOS"
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
