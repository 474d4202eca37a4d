"""Degenerate outputs: real answers are never flagged, planted loops, padding and junk are."""

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower_eval.analyse.compare import clean
from twotower_eval.analyse.compare.clean import flags, periodic_tail
from twotower_eval.records import FinishReason, Generation
from twotower_eval.resources import data_path

# Answers of the shipped model's kinds and of benchmarks: prose, working, lists, code, a table.
REAL = (
    "31 50 55 64 65 86 88 95 low 31 high 95",
    "99 99 99 99 98 98 98 low 98 high 99",
    "0+2=2 8+8=16 6+0+1=7 5+0=5 7+0=7 so 75762",
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18",
    "    for i in range(len(xs)):\n        for j in range(i + 1, len(xs)):\n            if xs[i] == xs[j]:\n"
    "                return True\n    return False\n",
    "| x | y |\n|---|---|\n| 1 | 1 |\n| 2 | 4 |\n| 3 | 9 |\n| 4 | 16 |\n",
    "The answer is 1000000000000000000.",
    "\\begin{pmatrix} 0 & 0 & 0 \\\\ 0 & 0 & 0 \\\\ 0 & 0 & 0 \\end{pmatrix}",
)


def output(text: str | None, token_ids: tuple[int, ...] | None = None, finish: FinishReason = "length") -> Generation:
    token_ids = tuple((text or "").encode()) if token_ids is None else token_ids
    return Generation(
        prompt_id="p", token_ids=token_ids, text=text, finish=finish, num_prompt_tokens=3, num_tokens=len(token_ids),
        num_discarded_tokens=0, num_context_forwards=1, num_denoiser_forwards=0,
    )  # fmt: skip


def benchmark_answers(folder: Path) -> dict[str, list[str]]:
    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        functions = [json.loads(line) for line in lines]
    return {
        "gsm8k": [row["answer"] for name in ("test", "train") for row in rows(f"gsm8k/{name}.jsonl")],
        "math500": [row[key] for row in rows("math500/test.jsonl") for key in ("solution", "answer")],
        "humaneval": [row[key] for row in functions for key in ("canonical_solution", "prompt")],
        "mbpp": [row["code"] for row in rows("mbpp/mbpp.jsonl")],
    }


def miniature_answers() -> list[str]:
    found = []
    for file in sorted(data_path("tasks", "miniature").glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines()]
    return [row[key] for row in found for key in ("answer", "text") if key in row]


@pytest.mark.parametrize("text", REAL)
def test_real_answers_are_clean(text: str) -> None:
    assert flags(output(text)).names == ()


def test_no_reference_of_the_miniature_is_flagged() -> None:
    answers = miniature_answers()
    assert len(answers) >= 1500
    assert [text for text in answers if flags(output(text)).degenerate] == []


def test_no_canonical_answer_of_a_benchmark_is_flagged(data_dir: Path) -> None:
    """11,000 answers in prose, mathematics and code, none flagged: the limits were drawn outside all of them."""
    for name, answers in benchmark_answers(data_dir).items():
        assert [text for text in answers if flags(output(text)).degenerate] == [], name


PLANTS = {
    "a loop of a few letters": lambda text, budget: text[:20] + text[-3:] * budget,
    "the answer over and over": lambda text, budget: (text + "\n") * budget,
    "a loop of a line behind an answer": lambda text, budget: text + f"\n{text[:17]}" * budget,
    "spaces": lambda text, budget: text[:10] + " " * budget,
    "new lines": lambda text, budget: text + "\n" * budget,
    "one letter": lambda text, budget: "x" * budget,
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("budget", [96, 256, 1024])
def test_planted_loops_and_padding_are_caught(plant: str, budget: int) -> None:
    """Cut off at the budget as a decoder cuts; answers too long to be followed by three repeats are left out."""
    answers = [text for text in (*REAL, *miniature_answers()) if len(text) <= budget // 4]
    assert len(answers) >= 100
    missed = [text for text in answers if not flags(output(PLANTS[plant](text, budget)[:budget])).degenerate]
    assert missed == []


def test_a_loop_behind_an_answer_is_also_junk_and_a_loop_alone_is_not() -> None:
    behind, alone = flags(output("so 87684" + " 8" * 40)), flags(output("8 " * 40))
    assert {"periodic_tail", "junk_after_answer"} <= set(behind.names)
    assert "periodic_tail" in alone.names
    assert not alone.junk_after_answer


def test_a_new_question_behind_an_answer_is_junk_only_where_nothing_ended_the_output() -> None:
    text = "She makes 18 dollars.\n#### 18\n\nQuestion: How many eggs does Tom eat?\nAnswer: 3"
    assert flags(output(text)).names == ("junk_after_answer",)
    assert flags(output(text, finish="stop")).names == ()
    assert flags(output("\nQuestion: How many?")).names == ()  # nothing in front of it that could be an answer


def test_padding_that_is_written_as_nothing_is_caught_by_its_ids() -> None:
    found = flags(output("so 87684", token_ids=(*range(10, 18), *[0] * 40)))
    assert found.names == ("periodic_tail", "junk_after_answer")
    assert (found.period, found.num_repeats) == (1, 40.0)


def test_nothing_and_white_space_are_empty() -> None:
    assert flags(output("")).names == ("empty",)
    assert "empty" in flags(output(" \n\t")).names
    assert flags(output(None, token_ids=())).names == ("empty",)
    assert flags(output(None, token_ids=(5, 6))).names == ()


def test_shuffled_copies_of_few_lines_are_caught_although_no_tail_is_periodic() -> None:
    lines = ["the cat sat on the mat and", "a dog ran to the park with", "then it all began once more"]
    order = random.Random(3).choices(range(3), k=60)
    assert flags(output("\n".join(lines[i] for i in order))).names == ("compressible", "repeated_ngrams")


@given(
    st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(8, 20)
)
def test_the_tail_of_a_loop_is_found_with_a_period_that_explains_it(
    head: list[int], unit: list[int], times: int
) -> None:
    loop = periodic_tail(head + unit * times, min_span=8)
    assert loop is not None
    assert len(unit) % loop.period == 0 or loop.num_repeats * loop.period >= len(unit) * times
    tail = (head + unit * times)[loop.start :]
    assert len(tail) == round(loop.num_repeats * loop.period)
    assert all(new == old for new, old in zip(tail[loop.period :], tail, strict=False))


@given(st.permutations(range(60)))
def test_a_sequence_without_repeats_has_no_loop(symbols: list[int]) -> None:
    assert periodic_tail(symbols, min_span=1) is None


@given(
    st.text(max_size=400), st.lists(st.integers(0, 200_000), max_size=60), st.sampled_from(["eos", "stop", "length"])
)
def test_any_output_has_flags(text: str, token_ids: list[int], finish: FinishReason) -> None:
    for shown in (text, None):
        found = flags(output(shown, tuple(token_ids), finish))
        assert found.degenerate == bool(found.names)
        assert set(found.names) <= set(clean.FLAG_NAMES)
        assert found.periodic_tail == (found.period is not None) == (found.num_repeats is not None)
