"""Benchmarks out of their authors' own archives, small ones made here: read in memory, and never unpacked."""

import ast
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twotower_eval import cli
from twotower_eval.errors import UserError
from twotower_eval.measure.suites import archives, lm_tasks
from twotower_eval.measure.suites.datafiles import prepare, read_jsonl

STEM = {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}
ARC = {"id": "Mercury_1", "question": STEM, "answerKey": "B"}
WINOGRANDE = {"qID": "3-1", "sentence": "He likes _ more.", "option1": "tea", "option2": "milk", "answer": "2"}
RACE = {
    "article": "Once upon a time.",
    "questions": ["Who?", "The time is  _  ."],
    "answers": ["C", "A"],
    "options": [["w", "x", "y", "z"], ["now", "then", "once", "never"]],
    "id": "high3.txt",
}
Members = dict[str, bytes]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def arc_members() -> Members:
    top = "ARC-V1-Feb2018-2"
    made = {f"{top}/": b"", f"{top}/README": b"?", f"__MACOSX/{top}/ARC-Easy/._ARC-Easy-Test.jsonl": b"\x00"}
    for place in ("ARC-Challenge", "ARC-Easy"):
        for at, split in enumerate(("Train", "Dev", "Test"), start=1):
            made[f"{top}/{place}/{place}-{split}.csv"] = b"?"
            made[f"{top}/{place}/{place}-{split}.jsonl"] = lines(*[{**ARC, "id": f"{place} {split}"}] * at)
    return made


def winogrande_members() -> Members:
    top = "winogrande_1.1"
    return {
        f"{top}/train_xs.jsonl": b"?",
        f"{top}/train_xl.jsonl": lines(WINOGRANDE, WINOGRANDE),
        f"{top}/train_xl-labels.lst": b"2\n2\n",
        f"{top}/dev.jsonl": lines({**WINOGRANDE, "answer": "1"}),
    }


def race_members() -> Members:
    article = json.dumps(RACE).encode()
    made = {f"RACE/test/high/{at}.txt": article.replace(b"upon", str(at).encode()) for at in (10, 9, 100)}
    return {**made, "RACE/test/middle/1.txt": b"?", "RACE/train/high/1.txt": b"?", "RACE/dev/high/2.txt": b"?"}


def write_zip(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: Members, *, links: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    write_zip(root / "arc" / "ARC-V1-Feb2018-2.zip", arc_members())
    write_zip(root / "winogrande" / "winogrande_1.1.zip", winogrande_members())
    write_tar(root / "race" / "RACE.tar.gz", race_members())
    return root


def test_archives_become_the_columns_of_the_stock_tasks(source: Path, tmp_path: Path) -> None:
    made = {f"{one.path.parent.name}/{one.path.stem}": one for one in prepare(source, tmp_path / "out")}
    assert {name: one.num_rows for name, one in made.items()} == {
        **{f"arc_{kind}/{split}": at for kind in ("challenge", "easy")
           for at, split in enumerate(("train", "validation", "test"), start=1)},
        "winogrande_xl/train": 2, "winogrande_xl/validation": 1, "race_high/test": 3,
    }  # fmt: skip
    assert read_jsonl(made["arc_easy/train"].path) == [
        {"id": "ARC-Easy Train", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
         "answerKey": "B"}
    ]  # fmt: skip
    assert read_jsonl(made["winogrande_xl/validation"].path) == [
        {"sentence": "He likes _ more.", "option1": "tea", "option2": "milk", "answer": "1"}
    ]
    articles = read_jsonl(made["race_high/test"].path)
    assert [str(row["article"]).split()[1] for row in articles] == ["9", "10", "100"]
    assert ast.literal_eval(str(articles[0]["problems"]))[1] == {
        "question": "The time is  _  .", "answer": "A", "options": ["now", "then", "once", "never"],
    }  # fmt: skip
    assert sorted(path.name for path in source.rglob("*") if path.is_file()) == [
        "ARC-V1-Feb2018-2.zip", "RACE.tar.gz", "winogrande_1.1.zip",
    ]  # fmt: skip


def test_stock_tasks_read_what_came_from_archives(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    stock = lm_tasks.roots()[1]
    index = TaskManager(
        include_path=[str(stock / one) for one in ("arc", "winogrande", "race")], include_defaults=False
    ).task_index
    monkeypatch.setattr(lm_tasks, "stock_index", lambda: index)
    data = tmp_path / "data"
    prepare(source, data)
    for name in ("arc_challenge", "arc_easy", "winogrande", "race"):
        task: Any = lm_tasks.load_task(name, {}, data)
        (doc, *_) = task.eval_docs
        assert task.doc_to_text(doc) is not None
        assert task.doc_to_target(doc) is not None
    assert task.doc_to_text(doc) == "Article: Once 9 a time.\n\nQuestion: Who?\nAnswer: y\nThe time is  _  ."
    assert task.doc_to_target(doc) == 0


def test_files_of_the_hub_come_before_an_archive(source: Path, tmp_path: Path) -> None:
    (source / "winogrande" / "dev.jsonl").write_bytes(lines(WINOGRANDE))
    with pytest.raises(UserError, match=r"no file winogrande_xl/train-\*\.parquet or train_xl\.jsonl"):
        prepare(source, tmp_path / "out", ["winogrande"])
    (source / "winogrande" / "train_xl.jsonl").write_bytes(lines(*[WINOGRANDE] * 5))
    assert [one.num_rows for one in prepare(source, tmp_path / "out", ["winogrande"])] == [5, 1]


def test_numbers_that_nothing_here_could_check_say_so(source: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["data", "prepare", str(source), str(tmp_path / "out"), "--only", "arc"]) == 2
    said = capsys.readouterr().err
    assert "arc_challenge train has 1 rows, but 1,119 are published (a number that was not checked here): " in said
    assert cli.main(["data", "prepare", str(source), str(tmp_path / "out"), "--partial"]) == 0


def test_what_is_only_known_by_heart_is_marked(capsys: Any) -> None:
    assert cli.main(["data", "sources"]) == 0
    said = capsys.readouterr().out
    assert "race: licence for non-commercial research only (not checked here); upstream" in said
    assert "gsm8k: licence MIT; upstream" in said


def renamed(members: Members, old: str, new: str) -> Members:
    return {name.replace(old, new): content for name, content in members.items()}


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "outside": (
        lambda root: write_zip(root / "arc/ARC-V1-Feb2018-2.zip", {"../../evil.py": b"x", **arc_members()}),
        "its member '../../evil.py' leads out of the archive",
    ),
    "absolute": (
        lambda root: write_tar(root / "race/RACE.tar.gz", {"/etc/evil": b"x", **race_members()}),
        "its member '/etc/evil' leads out of the archive",
    ),
    "outside, in a wanted name": (
        lambda root: write_zip(
            root / "winogrande/winogrande_1.1.zip", renamed(winogrande_members(), "winogrande_1.1", "..")
        ),
        "leads out of the archive",
    ),
    "backslashes": (
        lambda root: write_zip(root / "arc/ARC-V1-Feb2018-2.zip", {"..\\..\\evil.py": b"x", **arc_members()}),
        "leads out of the archive",
    ),
    "a link": (
        lambda root: write_tar(
            root / "race/RACE.tar.gz", race_members(), links={"RACE/test/high/7.txt": "/etc/passwd"}
        ),
        "its member RACE/test/high/7.txt is no plain file",
    ),
    "twice": (
        lambda root: write_tar(
            root / "race/RACE.tar.gz", {**race_members(), **renamed(race_members(), "RACE/", "./RACE/")}
        ),
        "is there twice",
    ),
    "no member": (
        lambda root: write_zip(root / "arc/ARC-V1-Feb2018-2.zip", renamed(arc_members(), "Dev.jsonl", "Dev.txt")),
        "holds no ARC-Challenge/ARC-Challenge-Dev.jsonl",
    ),
    "no article": (lambda root: write_tar(root / "race/RACE.tar.gz", {"RACE/x": b""}), "holds no RACE/test/high/"),
    "no zip": (lambda root: truncated(root / "arc/ARC-V1-Feb2018-2.zip", 0), "cannot read"),
    "cut": (lambda root: truncated(root / "winogrande/winogrande_1.1.zip", 60), "cannot read"),
    "cut tar": (lambda root: truncated(root / "race/RACE.tar.gz", 40), "cannot read"),
    "bad row": (
        lambda root: write_zip(
            root / "arc/ARC-V1-Feb2018-2.zip",
            {name: content.replace(b'"stem"', b'"stam"') for name, content in arc_members().items()},
        ),
        "ARC-Challenge train, line 1: column 'question' is missing or no str",
    ),
    "bad answer": (
        lambda root: write_tar(
            root / "race/RACE.tar.gz", {"RACE/test/high/1.txt": json.dumps({**RACE, "answers": ["E", "A"]}).encode()}
        ),
        "test/high/1.txt: not a question, one of A, B, C, D",
    ),
    "few answers": (
        lambda root: write_tar(
            root / "race/RACE.tar.gz", {"RACE/test/high/1.txt": json.dumps({**RACE, "answers": ["A"]}).encode()}
        ),
        "test/high/1.txt: 2 questions, 1 answers, 2 sets of options",
    ),
    "no JSON": (
        lambda root: write_tar(root / "race/RACE.tar.gz", {"RACE/test/high/1.txt": b"{"}),
        "test/high/1.txt: not valid JSON",
    ),
}


def truncated(path: Path, num_bytes: int) -> Path:
    if path.suffix == ".zip":
        write_zip(path, winogrande_members())
    else:
        write_tar(path, race_members())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - num_bytes] if num_bytes else b"not an archive")
    return path


@pytest.mark.parametrize("what", REFUSED)
def test_archives_that_are_not_as_published_are_one_line(what: str, tmp_path: Path) -> None:
    write, words = REFUSED[what]
    path = write(tmp_path / "in" / "source")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as raised:
        prepare(path.parent.parent, tmp_path / "in" / "out")
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [one for one in sorted(tmp_path.rglob("*")) if "out" not in one.parts] == before


def test_members_and_archives_that_are_too_large_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 50)
    for name in ("arc", "winogrande", "race"):
        with pytest.raises(UserError, match="has more than 50 bytes"):
            prepare(source, tmp_path / "out", [name])
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    for name in ("arc", "winogrande", "race"):
        with pytest.raises(UserError, match="has more than 3 members"):
            prepare(source, tmp_path / "out", [name])
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    write_tar(source / "race" / "RACE.tar.gz", {"RACE/big": bytes(1 << 22), **race_members()})
    with pytest.raises(UserError, match="has more than 1,048,576 bytes once it is unpacked"):
        prepare(source, tmp_path / "out", ["race"])


def test_a_zip_that_understates_a_member_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory says 3 bytes of 3 MB: no more are read than can be told to be too many."""
    path = source / "winogrande" / "winogrande_1.1.zip"
    write_zip(path, {"winogrande_1.1/train_xl.jsonl": b" " * 3_000_000, "winogrande_1.1/dev.jsonl": b"{}"})
    path.write_bytes(path.read_bytes().replace((3_000_000).to_bytes(4, "little"), (3).to_bytes(4, "little")))
    with pytest.raises(UserError, match="cannot read"):
        prepare(source, tmp_path / "out", ["winogrande"])


def test_a_locked_zip_is_one_line(source: Path, tmp_path: Path) -> None:
    path = source / "winogrande" / "winogrande_1.1.zip"
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(mark, at + 1)
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"cannot read .*password required"):
        prepare(source, tmp_path / "out", ["winogrande"])
