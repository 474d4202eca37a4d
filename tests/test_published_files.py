"""Benchmark files as the hub and their authors publish them, small: prepared, and read by lm-eval's stock tasks."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from twotower_eval import cli
from twotower_eval.errors import UserError
from twotower_eval.measure import suites
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.measure.suites.datafiles import BENCHMARKS, prepare, read_jsonl
from twotower_eval.measure.suites.groups import load_suite
from twotower_eval.measure.suites.published import PUBLISHED

ARC = {"id": "1", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
WINOGRANDE = {"sentence": "He likes _ more.", "option1": "tea", "option2": "milk", "answer": "2"}
PROBLEMS = [{"question": "What?", "answer": "B", "options": ["w", "x", "y", "z"]}] * 2
RACE = {"article": "Once.", "problems": str(PROBLEMS)}
PRO: dict[str, Any] = {"question_id": 1, "question": "Which?", "options": ["p", "q"], "answer": "A", "answer_index": 0}
PRO |= {"cot_content": "A: Let's think step by step. The answer is (A).", "category": "math", "src": "x"}
LITE = {"sample_id": "anatomy/1", "subject": "anatomy", "subject_category": "Business", "question": "Q", "answer": "C"}
LITE |= {f"option_{letter}": letter for letter in "abcd"}
MMLU = {"question": "Q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2}
GSM = {"question": "1 + 1?", "answer": "#### 2"}
HUMAN = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), "def f(): ...")
MBPP: dict[str, Any] = {"text": "t", "code": "c", "test_list": ["a"], "test_setup_code": "", "challenge_test_list": []}
SANITIZED: dict[str, Any] = {"prompt": "p", "code": "c", "test_list": ["a"], "test_imports": []}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Every benchmark that the hub has as parquet, as its client lays it down; a few rows each."""
    root = tmp_path / "source"
    for place, splits, row in (
        ("arc/ARC-Challenge", ("train", "validation", "test"), ARC),
        ("winogrande/winogrande_xl", ("train", "validation"), WINOGRANDE),
        ("race/high", ("test",), RACE),
        ("mmlu/anatomy", ("test", "dev"), MMLU),
        ("mmlu_pro/data", ("test", "validation"), PRO),
        ("global_mmlu_lite/ar", ("test", "dev"), LITE),
        ("gsm8k/main", ("test", "train"), GSM),
        ("humaneval/openai_humaneval", ("test",), HUMAN),
        ("mbpp/full", ("prompt", "test", "validation", "train"), {"task_id": 1, **MBPP}),
    ):
        for split in splits:
            write_parquet(root / place / f"{split}-00000-of-00001.parquet", [row] * 3)
    return root


def test_every_benchmark_of_the_paper_is_covered() -> None:
    """Its eleven tasks read data sets that are all prepared."""
    of_tasks = {"arc_challenge": "arc", "mbpp_sanitized": "mbpp"}
    assert {of_tasks.get(task.name, task.name) for task in load_suite("paper-11").tasks} <= set(BENCHMARKS)
    assert set(BENCHMARKS) == set(PUBLISHED)


def test_stock_tasks_read_what_was_prepared(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    stock = lm_tasks.roots()[1]
    folders = ("arc", "winogrande", "race", "mmlu/default", "mmlu_pro", "global_mmlu/default/ar", "gsm8k")
    index = TaskManager(include_path=[str(stock / one) for one in folders], include_defaults=False).task_index
    monkeypatch.setattr(lm_tasks, "stock_index", lambda: index)
    data = tmp_path / "data"
    prepare(source, data)
    names = ["arc_challenge", "winogrande", "race", "mmlu_anatomy", "mmlu_pro_math", "gsm8k_cot"]
    names.append("global_mmlu_ar_business")
    for name in names:
        task = lm_tasks.load_task(name, {}, data)
        assert len(task.eval_docs) > 0  # type: ignore[attr-defined]
    (arc,) = suites.resolve_tasks(["arc_challenge"], data_dir=data, num_fewshot=1)
    assert arc.num_docs_in_all == 3
    assert arc.docs[0].instances[0].args == ("Question: Why?\nAnswer: b\n\nQuestion: Why?\nAnswer:", " a")


def test_upstreams_own_files_of_programs_are_split_by_number(tmp_path: Path) -> None:
    folder = tmp_path / "mbpp"
    folder.mkdir()
    rows = [{"task_id": number, **MBPP} for number in range(1, 975)]
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sanitized-mbpp.json").write_text(json.dumps([{"task_id": number, **SANITIZED} for number in (2, 11)]))
    (tmp_path / "humaneval").mkdir()
    with gzip.open(tmp_path / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMAN) + "\n")
    made = {(one.path.parent.name, one.path.stem): one for one in prepare(tmp_path, tmp_path / "out")}
    full = {split: made["mbpp_full", split].num_rows for split in ("train", "test", "validation", "prompt")}
    assert full == {"train": 374, "test": 500, "validation": 90, "prompt": 10}
    assert made["mbpp_sanitized", "test"].num_rows == made["mbpp_sanitized", "prompt"].num_rows == 1
    assert read_jsonl(made["humaneval", "test"].path) == [HUMAN]


def test_a_file_with_too_few_rows_is_refused_unless_asked_for(source: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["data", "prepare", str(source), str(tmp_path / "out"), "--only", "gsm8k"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "gsm8k test has 3 rows, but 1,319 are published: the file is cut or of another version" in said
    assert cli.main([*command, "--partial"]) == 0


def test_broken_and_missing_files_are_one_line_each(source: Path, tmp_path: Path) -> None:
    path = source / "race/high/test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"test-00000-of-00001\.parquet: not a whole parquet file"):
        prepare(source, tmp_path / "out", ["race"])
    write_parquet(path, [{"article": "a", "problem": "p"}])
    with pytest.raises(UserError, match=r"parquet, row 1: column 'problems' is missing or no str"):
        prepare(source, tmp_path / "out", ["race"])
    path.unlink()
    with pytest.raises(UserError, match=r"no file high/test-\*\.parquet; to fetch it: hf download EleutherAI/race "):
        prepare(source, tmp_path / "out", ["race"])
    (source / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-4])
    (source / "humaneval/openai_humaneval/test-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"cannot read .*HumanEval\.jsonl\.gz"):
        prepare(source, tmp_path / "out", ["humaneval"])


def test_the_command_line_says_where_each_is_from(capsys: Any) -> None:
    assert cli.main(["data", "sources"]) == 0
    said = capsys.readouterr().out
    for one in PUBLISHED.values():
        assert one.fetch() in said
        assert f"{one.name}: licence {one.licence}" in said
