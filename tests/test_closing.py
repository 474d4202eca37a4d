"""Closing files: one entry for each file of a run, each checked; and all runs that are published."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import test_store as plain

from twotower_eval import store
from twotower_eval.records import Check, Witnessed, canonical_json, to_json
from twotower_eval.store.journal import content_of, packed, packed_path

REPOSITORY = Path(__file__).parent.parent
PUBLISHED = sorted(path.parent for path in (REPOSITORY / "results" / "published").glob("*/*/manifest.json"))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def finished(root: Path) -> tuple[Path, dict[str, Any]]:
    path = plain.write_run(root, [plain.make_row(), plain.make_score()], finish=True)
    return path, json.loads((path / "done.json").read_text())


def test_published_runs_are_there() -> None:
    assert len(PUBLISHED) >= 4


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_a_published_run_is_whole_and_every_digest_is_its_files(path: Path) -> None:
    """Each had a second digest of its manifest, of the manifest before its command line was made plain."""
    assert store.load(path).complete
    done = json.loads((path / "done.json").read_text(encoding="utf-8"))
    assert set(done) == {"schema", "finished_at", "files"}
    there = {file.name.removesuffix(".xz") for file in path.iterdir()} - {"done.json"}
    assert there == set(done["files"])
    for name, entry in done["files"].items():
        content = content_of(path / name)
        assert content is not None
        assert entry == {"rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}


def only(held: Any, told: Any) -> Any:
    """What a record says of the keys that a line had."""
    if isinstance(told, dict):
        return {key: only(held[key], value) for key, value in told.items()}
    return [only(*pair) for pair in zip(held, told, strict=True)] if isinstance(told, list) else held


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_what_is_read_of_a_published_run_is_written_as_it_was(path: Path) -> None:
    """Ids and digests are over such texts: no number may turn into another, nor a whole one into one with a point."""
    run = store.load(path)
    told = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert canonical_json(only(to_json(run.manifest), told)) == canonical_json(told)
    for cls, (name, _) in store.JOURNALS.items():
        rows = run.witnessed if cls is Witnessed else getattr(run, name.removesuffix(".jsonl"))
        lines = (content_of(path / name) or b"").splitlines()
        assert len(lines) == len(rows)
        for line, row in list(zip(lines, rows, strict=True))[::23]:
            assert type(row) is cls
            written = only(to_json(row), json.loads(line))
            if cls is Check:  # older ones have limits of 0 without a point
                assert written == json.loads(line)
                continue
            assert json.dumps(written, ensure_ascii=False, separators=(",", ":")).encode() == line


def test_a_finished_run_has_one_entry_for_each_file(tmp_path: Path) -> None:
    path, done = finished(tmp_path)
    assert set(done) == {"schema", "finished_at", "files"}
    assert {name: entry["sha256"] for name, entry in done["files"].items()} == {
        name: sha256(path / name) for name in ("manifest.json", "events.jsonl", "generations.jsonl", "scores.jsonl")
    }


def test_the_training_log_is_one_of_them(tmp_path: Path) -> None:
    with store.create(tmp_path, plain.make_manifest()) as writer:
        (writer.path / "training_log.jsonl").write_text('{"stage": "context"}\n')
        writer.finish()
    assert store.load(writer.path).complete
    (writer.path / "training_log.jsonl").write_text('{"stage": "denoiser"}\n')
    with pytest.raises(ValueError, match=r"training_log\.jsonl: changed after the run was finished"):
        store.load(writer.path)


def older(path: Path, done: dict[str, Any]) -> dict[str, Any]:
    """The same closing file as it was written before."""
    files = {name: entry for name, entry in done["files"].items() if name != "manifest.json"}
    return {**done, "files": files, "manifest_sha256": sha256(path / "manifest.json")}


def test_older_closing_files_are_read_and_checked(tmp_path: Path) -> None:
    path, done = finished(tmp_path)
    (path / "done.json").write_text(json.dumps(older(path, done)))
    (path / "training_log.jsonl").write_text('{"stage": "context"}\n')  # which they left out
    assert store.load(path).complete
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"dirty": false', '"dirty": true'))
    with pytest.raises(ValueError, match=r"manifest\.json: changed after the run was finished"):
        store.load(path)


def test_two_digests_of_one_manifest_must_agree(tmp_path: Path) -> None:
    """The right entry hid a stale one beside it."""
    path, done = finished(tmp_path)
    (path / "done.json").write_text(json.dumps({**done, "manifest_sha256": sha256(path / "manifest.json")}))
    assert store.load(path).complete
    (path / "done.json").write_text(json.dumps({**done, "manifest_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"done\.json: two digests of manifest\.json, .* and they differ"):
        store.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {}}, "not a valid closing file (no digest of manifest.json)"),
        ({"files": []}, "files must be a JSON object"),
        (
            {"files": {"scores.jsonl": {"rows": 1.5, "sha256": "x"}}},
            "files['scores.jsonl'].rows must be a whole number",
        ),
        ({"files": {"scores.jsonl": "x"}}, "files['scores.jsonl'] must be a JSON object"),
        ({"schema": 2}, "schema 2; this version reads schema 1 only"),
        ({"signed": True}, "unknown field(s) signed"),
        ({"finished_at": 3}, "finished_at must be a text"),
    ],
)
def test_what_is_no_closing_file_is_said_so(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path, done = finished(tmp_path)
    (path / "done.json").write_text(json.dumps({**done, **change}))
    with pytest.raises(ValueError, match=r"done\.json: ") as caught:
        store.load(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["../elsewhere.jsonl", "notes.txt", "done.json"])
def test_an_entry_for_what_no_run_has_is_refused(tmp_path: Path, name: str) -> None:
    path, done = finished(tmp_path)
    done["files"][name] = {"rows": 0, "sha256": "0" * 64}
    (path / "done.json").write_text(json.dumps(done))
    with pytest.raises(ValueError, match=r"done\.json: lists .*, which is no file of a run"):
        store.load(path)


def test_files_are_counted_listed_and_there(tmp_path: Path) -> None:
    path, done = finished(tmp_path)
    wrong = json.loads(json.dumps(done))
    wrong["files"]["scores.jsonl"]["rows"] = 2
    (path / "done.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"scores\.jsonl: changed"):
        store.load(path)
    unlisted = {**done, "files": {name: entry for name, entry in done["files"].items() if name != "scores.jsonl"}}
    (path / "done.json").write_text(json.dumps(unlisted))
    with pytest.raises(ValueError, match=r"scores\.jsonl: changed"):
        store.load(path)
    (path / "done.json").write_text(json.dumps(done))
    assert store.load(path).complete
    (path / "scores.jsonl").unlink()
    with pytest.raises(ValueError, match=r"scores\.jsonl: was lost"):
        store.load(path)


def test_a_journal_beside_its_packed_copy_is_refused(tmp_path: Path) -> None:
    """Only the plain one was read, whatever the other held."""
    path, _ = finished(tmp_path)
    file = path / "scores.jsonl"
    packed_path(file).write_bytes(packed(b""))
    with pytest.raises(ValueError, match=r"scores\.jsonl lies beside its packed copy"):
        store.load(path)
    packed_path(file).write_bytes(packed(file.read_bytes())[:-20])
    file.unlink()
    with pytest.raises(ValueError, match=r"scores\.jsonl\.xz: cannot be unpacked"):
        store.load(path)
