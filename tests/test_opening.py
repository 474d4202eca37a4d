"""Large runs: opened line by line, and the bench that measures them runs."""

from __future__ import annotations

import gc
import lzma
from pathlib import Path

import bench
import pytest
from bench import opening

from twotower_eval import store


def test_the_bench_runs() -> None:
    said: list[str] = []
    found = opening.run(rounds=1, full=False, say=said.append, num_rows=400)
    assert found.summary["num_rows"] == 400
    assert [row[0] for row in found.rows] == ["open", "report"]
    assert all(found.summary[what]["cpu_s"] > 0 for what in ("open", "report"))
    assert "opening" in bench.BENCHES


def test_a_run_is_read_the_same_packed_or_not_and_collection_goes_on(tmp_path: Path) -> None:
    path = opening.write_run(tmp_path, 200)
    run = store.load(path)
    assert run.complete
    assert len(run.generations) == len(run.scores) == 100
    for name in ("generations", "scores"):
        file = path / f"{name}.jsonl"
        file.with_name(f"{name}.jsonl.xz").write_bytes(lzma.compress(file.read_bytes()))
        file.unlink()
    assert store.load(path) == run
    assert gc.isenabled()


def test_collection_goes_on_after_a_bad_line_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    path = opening.write_run(tmp_path, 200)
    (path / "done.json").unlink()
    file = path / "scores.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    assert len(store.load(path).scores) == 99
    file.write_bytes(content.replace(b'"value":1.0', b'"value":"1"', 1))
    with pytest.raises(ValueError, match=r"scores\.jsonl, line \d+: Score: value must be a number, not '1'"):
        store.load(path)
    assert gc.isenabled()


def test_a_packed_journal_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was unpacked again for its digest, which took as long as reading its rows."""
    path = opening.write_run(tmp_path, 200)
    file = path / "scores.jsonl"
    file.with_name("scores.jsonl.xz").write_bytes(lzma.compress(file.read_bytes()))
    file.unlink()
    unpacked: list[int] = []
    own = lzma.decompress
    monkeypatch.setattr(lzma, "decompress", lambda content: unpacked.append(1) or own(content))
    assert store.load(path).complete
    assert unpacked == [1]
    file.with_name("scores.jsonl.xz").write_bytes(
        lzma.compress(own(file.with_name("scores.jsonl.xz").read_bytes())[1:])
    )
    with pytest.raises(ValueError, match=r"scores\.jsonl"):
        store.load(path)
