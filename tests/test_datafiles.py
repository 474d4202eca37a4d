"""Published benchmark files into stock columns: every format, and what is said about files that do not fit."""

import bz2
import json
from pathlib import Path
from typing import Any

import pytest

from twotower_eval.datafiles import BENCHMARKS, folders, prepare, read_jsonl


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress(text.encode()) if path.suffix == ".bz2" else text.encode())


HELLASWAG = "hellaswag/hellaswag_val_full.txt.bz2"
ITEM = "Roof: A man sits on a roof. he\n3\nis wrapping.\nis ripping.\nis holding.\nis pulling.\n"


def test_all_published_files(data_dir: Path, tmp_path: Path) -> None:
    written = prepare(data_dir, tmp_path)
    rows = {str(file.path.relative_to(tmp_path)): file.num_rows for file in written}
    assert rows["gsm8k/test.jsonl"] == 1319
    assert rows["gsm8k/train.jsonl"] == 7473
    assert rows["math500/test.jsonl"] == 500
    assert rows["hellaswag/validation.jsonl"] == 10042
    assert [num for name, num in rows.items() if name.startswith("mgsm_")] == [250] * 11
    mmlu = {name: num for name, num in rows.items() if name.startswith("mmlu_")}
    assert sum(num for name, num in mmlu.items() if name.endswith("test.jsonl")) == 14042
    assert [num for name, num in mmlu.items() if name.endswith("dev.jsonl")] == [5] * 57
    before = {file.path: file.path.read_bytes() for file in written}
    prepare(data_dir, tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_mgsm_rows(tmp_path: Path) -> None:
    write(tmp_path, "mgsm/mgsm_sw.tsv", "Swali moja?\t2,125\r\nLa pili?\t-3\n")
    (file,) = prepare(tmp_path, tmp_path / "out")
    assert file.path == tmp_path / "out" / "mgsm_sw" / "test.jsonl"
    assert read_jsonl(file.path)[0] == {
        **{"question": "Swali moja?", "answer": None, "answer_number": 2125, "equation_solution": None}
    }
    assert read_jsonl(file.path)[1]["answer_number"] == -3


@pytest.mark.parametrize(
    "text",
    ["question,choice0,choice1,choice2,choice3,answer\n{}1\n", "{}B\n", "{}1\n"],
    ids=["header", "letter", "index"],
)
def test_mmlu_with_and_without_header(tmp_path: Path, text: str) -> None:
    """The line separator U+2028 within a choice once ended the record."""
    line = '"Which, of\nthese?",one,"two \u2028 halves",three,four,'
    for split in ("test", "dev"):
        write(tmp_path, f"mmlu/{split}/own_field_{split}.csv", text.format(line))
    test, dev = prepare(tmp_path, tmp_path / "out")
    assert (test.path.parent.name, test.path.name, dev.path.name) == ("mmlu_own_field", "test.jsonl", "dev.jsonl")
    (row,) = read_jsonl(test.path)
    assert row["question"] == "Which, of\nthese?"
    assert row["choices"] == ["one", "two \u2028 halves", "three", "four"]
    assert (row["answer"], row["subject"]) == (1, "own_field")


@pytest.mark.parametrize(
    ("context", "finished", "unfinished"),
    [
        ("A man sits on a roof. he", "A man sits on a roof.", "he"),
        ('He says "Go!" and waits. the man', 'He says "Go!" and waits.', "the man"),
        ("How to buy a ring. Find one.", "How to buy a ring. Find one.", ""),
        ("the man", "the man", ""),
    ],
)
def test_hellaswag_context_is_cut_before_the_unfinished_sentence(
    tmp_path: Path, context: str, finished: str, unfinished: str
) -> None:
    write(tmp_path, HELLASWAG, ITEM.replace("A man sits on a roof. he", context))
    (row,) = read_jsonl(prepare(tmp_path, tmp_path / "out")[0].path)
    assert (row["activity_label"], row["ctx_a"], row["ctx_b"]) == ("Roof", finished, unfinished)
    assert (row["label"], row["endings"][3]) == ("3", "is pulling.")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gsm8k/test.jsonl", '{"question": "?"}\n', "test.jsonl, row 1: column 'answer' is missing"),
        ("gsm8k/test.jsonl", '{"question": "?", "answer": 3}\n', "column 'answer' is missing or no str"),
        ("gsm8k/test.jsonl", '{"question": "?", "answer": "3"}\nnonsense\n', "line 2: not valid JSON"),
        ("gsm8k/test.jsonl", '{"a": 1}\n{"b": 1}\n', "line 2: not a JSON object with the columns"),
        ("gsm8k/test.jsonl", "\n", "no rows"),
        ("gsm8k/train.jsonl", '{"question": "?", "answer": "3"}\n', "test.jsonl is missing"),
        ("mgsm/mgsm_en.tsv", "How many?\tseven\n", "mgsm_en.tsv, line 1"),
        ("mgsm/mgsm_en.csv", "", "no file mgsm_LANGUAGE.tsv"),
        ("mmlu/test/x_test.csv", "q,1,2,3,4,E\n", "x_test.csv, record 1"),
        ("mmlu/test/x_test.csv", "q,1,2,3,0\n", "x_test.csv, record 1"),
        ("mmlu/dev/x_dev.csv", "q,1,2,3,4,0\n", "no file SUBJECT_test.csv"),
        (HELLASWAG, ITEM + "one more\n", "not a multiple of six"),
        (HELLASWAG, ITEM.replace("3", "4"), "line 1: not 'activity: context'"),
        ("math500/test.jsonl", '{"problem": "?"}\n', "column 'solution' is missing"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read"):
        prepare(tmp_path, tmp_path / "out")


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        prepare(tmp_path, tmp_path, ["gsm8"])
    with pytest.raises(ValueError, match="has no folder gsm8k"):
        prepare(tmp_path, tmp_path, ["gsm8k"])
    with pytest.raises(ValueError, match="has none of the folders"):
        prepare(tmp_path, tmp_path)
    assert set(BENCHMARKS) == {"gsm8k", "mgsm", "mmlu", "math500", "hellaswag"}


@pytest.mark.parametrize(
    ("task", "dataset", "configuration", "expected"),
    [
        ("gsm8k_cot", "openai/gsm8k", "main", ["gsm8k_cot", "gsm8k"]),
        ("mgsm_direct_fr", "juletxara/mgsm", "fr", ["mgsm_direct_fr", "mgsm_fr"]),
        ("mmlu_anatomy", "cais/mmlu", "anatomy", ["mmlu_anatomy"]),
        ("own", None, None, ["own"]),
    ],
)
def test_tasks_on_the_same_data_share_a_folder(
    task: str, dataset: Any, configuration: Any, expected: list[str]
) -> None:
    assert folders(task, dataset, configuration) == expected


def test_rows_keep_their_text(tmp_path: Path) -> None:
    row = {"question": "naïve \u2028 ½?", "answer": "#### 1"}
    for split in ("test", "train"):
        write(tmp_path, f"gsm8k/{split}.jsonl", json.dumps(row) + "\n")
    assert read_jsonl(prepare(tmp_path, tmp_path / "out")[0].path) == [row]
