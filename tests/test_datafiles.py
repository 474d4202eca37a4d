"""Published benchmark files into stock columns: every format, and what is said about files that do not fit."""

import bz2
import json
from pathlib import Path
from typing import Any

import pytest

from twotower_eval.measure.suites.datafiles import folders, prepare, read_jsonl


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
        ("gsm8k/test.jsonl", '{"question": "?"}\n', "test.jsonl, line 1: column 'answer' is missing"),
        ("gsm8k/test.jsonl", '{"question": "?", "answer": 3}\n', "column 'answer' is missing or no str"),
        ("gsm8k/test.jsonl", '{"question": "?", "answer": "3"}\nnonsense\n', "line 2: not valid JSON"),
        ("gsm8k/test.jsonl", '{"a": 1}\n{"b": 1}\n', "line 2: not a JSON object with the columns"),
        ("gsm8k/test.jsonl", "\n", "no rows"),
        ("gsm8k/train.jsonl", '{"question": "?", "answer": "3"}\n', "test.jsonl is missing"),
        ("mgsm/mgsm_en.tsv", "How many?\tseven\n", "mgsm_en.tsv, line 1"),
        ("mgsm/mgsm_en.csv", "", "no file mgsm_LANGUAGE.tsv"),
        ("mmlu/test/x_test.csv", "q,1,2,3,4,E\n", "x_test.csv, line 1"),
        ("mmlu/test/x_test.csv", '"q\non two lines",1,2,3,4,A\nq,1,2,3,0\n', "x_test.csv, line 3"),
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


LINE = b'{"question": "How many?", "answer": "3"}\n'


def of(value: bytes) -> bytes:
    """Two rows, the second with a value as it stands in the file."""
    return LINE + b'{"question": "How many?", "answer": ' + value + b"}\n"


MARK = "\ufeff".encode()
ODD_JSONL = {
    "utf-16": (LINE.decode().encode("utf-16"), r"rows\.jsonl: it is UTF-16"),
    "utf-16 of the other order": (b"\xfe\xff" + LINE.decode().encode("utf-16-be"), "it is UTF-16"),
    "latin-1": (LINE + "caf\xe9".encode("latin-1"), "line 2: not UTF-8 (byte 0xe9)"),
    "two marks": (MARK + MARK + LINE, "line 1: begins with a byte order mark"),
    "files joined": (LINE + MARK + LINE, "line 2: begins with a byte order mark"),
    "one above 64 bits": (of(b"9223372036854775808"), "line 2, 'answer': a whole number beyond 64 bits"),
    "one below 64 bits": (of(b"-9223372036854775809"), "line 2, 'answer': a whole number beyond 64 bits"),
    "inside": (of(b'{"k": [1, 18446744073709551616]}'), "line 2, 'answer.k[]': a whole number beyond 64 bits"),
    "thousands of digits": (of(b"9" * 5000), "line 2: a whole number has more digits than Python reads"),
    "beyond a double": (of(b"1e999"), "line 2: the number 1e999 is beyond what a double holds"),
    "below a double": (of(b"-2.5e-999"), "line 2: the number -2.5e-999 is beyond what a double holds"),
    "NaN": (of(b"NaN"), "line 2: NaN is not allowed"),
    "infinity": (of(b"-Infinity"), "line 2: -Infinity is not allowed"),
    "half a pair": (of(b'"\\ud83d x"'), r"line 2, 'answer': half a surrogate pair, \ud83d"),
    "half a pair in a name": (b'{"\\udfff": 1}\n', r"line 1: half a surrogate pair, \udfff"),
    "halves in the wrong order": (of(b'"\\ude00\\ud83d"'), "line 2, 'answer': half a surrogate pair"),
    "deep in Python": (of(b"[" * 900 + b"9" * 20 + b"]" * 900), "a whole number beyond 64 bits"),
    "deep": (of(b"[" * 9000 + b"]" * 9000), "line 2: nested too deeply"),
    "a name twice": (b'{"question": "?", "answer": "1", "answer": "2"}\n', "line 1: key 'answer' is defined twice"),
    "kinds": (of(b"3"), "line 2, 'answer': a number, but a text in line 1"),
    "true is no number": (b'{"a": 1}\n{"a": null}\n\n{"a": true}\n', "line 4, 'a': true or false, but a number"),
    "no columns": (b"{}\n{}\n", "line 1: not a JSON object with the columns"),
    "a comma": (LINE.strip() + b",\n", "line 1: not valid JSON (Extra data, column"),
    "nothing": (b"", "no rows"),
    "a raw NUL": (b'{"a": "x\x00y"}\n', "line 1: not valid JSON"),
}


@pytest.mark.parametrize("name", ODD_JSONL)
def test_odd_lines_are_refused_with_their_number(tmp_path: Path, name: str) -> None:
    content, words = ODD_JSONL[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl") as caught:
        read_jsonl(path)
    assert words.replace("\\.", ".") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (MARK + b'{"a": "x"}\n', ["x"]),
        (b'{"a": "x"}\r{"a": "y"}\r', ["x", "y"]),
        (b'\n{"a": "x"}\r\n   \r\n{"a": "y"}', ["x", "y"]),
        (b'{"a": 9223372036854775807}\n{"a": -9223372036854775808}', [2**63 - 1, -(2**63)]),
        (b'{"a": 1}\n{"a": 1.5}\n{"a": null}\n{"a": 0.0e-999}', [1, 1.5, None, 0.0]),
        (b'{"a": "\\ud83d\\ude00"}', ["\U0001f600"]),
        (b'{"a": "x\\u0000y\\ufeff"}', ["x\x00y\ufeff"]),
        ('{"a": "x\u2028y\x85z"}'.encode(), ["x\u2028y\x85z"]),
    ],
)
def test_odd_lines_that_are_sound_are_read(tmp_path: Path, content: bytes, values: list[Any]) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert [row["a"] for row in read_jsonl(tmp_path / "rows.jsonl")] == values


PUBLISHED = {
    "gsm8k": ("gsm8k/test.jsonl", '{"question": "How many?", "answer": "#### 3"}\n'),
    "math500": (
        "math500/test.jsonl",
        '{"problem": "How many?", "solution": "3", "answer": "3", "subject": "x", "level": 1}\n',
    ),
    "mgsm": ("mgsm/mgsm_en.tsv", "How many?\t3\n"),
    "mmlu": ("mmlu/test/x_test.csv", '"How many?",1,2,3,4,C\n'),
    "header": ("mmlu/test/x_test.csv", "question,a,b,c,d,answer\nHow many?,1,2,3,4,2\n"),
    "hellaswag": (HELLASWAG, ITEM),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_byte_order_mark_is_no_part_of_the_first_text(tmp_path: Path, name: str) -> None:
    """The first question of a TSV or CSV file that an editor had marked began with U+FEFF."""
    file, text = PUBLISHED[name]
    rows = []
    for root, mark in ((tmp_path / "plain", ""), (tmp_path / "marked", "\ufeff")):
        for split in ("test", "train", "dev"):
            write(root, file.replace("test", split), mark + text)
        rows.append([read_jsonl(one.path) for one in prepare(root, root / "out")])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_mark_further_on_names_file_and_place(tmp_path: Path, name: str) -> None:
    file, text = PUBLISHED[name]
    twice = text + "\ufeff" + text.removeprefix("question,a,b,c,d,answer\n")
    for split in ("test", "train", "dev"):
        write(tmp_path, file.replace("test", split), twice)
    with pytest.raises(ValueError, match=r"test|mgsm_en|hellaswag_val_full") as caught:
        prepare(tmp_path, tmp_path / "out")
    assert "line" in str(caught.value) or "record" in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("mgsm/mgsm_en.tsv", b"How many?\t9223372036854775808\n", "mgsm_en.tsv, line 1: a whole number beyond 64"),
        ("mgsm/mgsm_en.tsv", b"How many?\t" + b"9" * 5000 + b"\n", "mgsm_en.tsv, line 1: not a question"),
        ("mmlu/test/x_test.csv", b"a,1,2,3,4,0\n" + b"q" * 140_000 + b",1,2,3,4,0\n", "line 2: not CSV (field larger"),
        ("mmlu/test/x_test.csv", b'a,1,2,3,4,0\n"open,1,2,3,4,0\n', "not CSV (unexpected end of data)"),
        ("mmlu/test/x_test.csv", b'"Who said "it"?",1,2,3,4,0\n', "line 1: not CSV"),
        (HELLASWAG, bz2.compress(ITEM.encode())[:-9], "hellaswag_val_full.txt.bz2"),
        (HELLASWAG, b"no bzip", "hellaswag_val_full.txt.bz2"),
        ("math500/test.jsonl", PUBLISHED["math500"][1].replace("1}", "true}").encode(), "line 1: column 'level'"),
    ],
)
def test_published_files_that_are_broken_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r".") as caught:
        prepare(tmp_path, tmp_path / "out")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k" / "test.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot read .*test\.jsonl"):
        prepare(tmp_path, tmp_path / "out")


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        prepare(tmp_path, tmp_path, ["gsm8"])
    with pytest.raises(ValueError, match="has no folder gsm8k"):
        prepare(tmp_path, tmp_path, ["gsm8k"])
    with pytest.raises(ValueError, match="has none of the folders"):
        prepare(tmp_path, tmp_path)


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
