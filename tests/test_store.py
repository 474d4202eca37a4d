"""Runs on disk: nothing finished is lost, nothing broken is read, nothing unlike is mixed."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower_eval import store
from twotower_eval.records import (
    Cell,
    Checkpoint,
    CommitStep,
    DecoderSpec,
    Generation,
    GenerationRow,
    Likelihood,
    LikelihoodRow,
    PromptTiming,
    RunManifest,
    Score,
    SpeedSample,
    Workload,
    cell_id,
    to_json,
)
from twotower_eval.store import journal


def make_cell(*, threshold: float = 0.8, version: int = 1) -> Cell:
    checkpoint = Checkpoint(name="m", family="twotower", source="m", digest="d" * 64, dtype="float32", devices=("cpu",))
    decoder = DecoderSpec(kind="block_diffusion", params={"threshold": threshold}, version=version)
    workload = Workload(kind="task", name="t", digest="w" * 64, max_new_tokens=32)
    identity = cell_id(checkpoint, decoder, workload)
    return Cell(id=identity, arm="candidate", checkpoint=checkpoint, decoder=decoder, workload=workload)


CELL = make_cell()


def make_manifest(**changes: Any) -> RunManifest:
    manifest = RunManifest(
        schema=1,
        run_id="20261123T101500Z-run-3f9a1c",
        verb="run",
        argv=("run",),
        plan={"tasks": ["t"]},
        plan_sha256="p" * 64,
        cells=(CELL,),
        started_at="2026-11-23T10:15:00+00:00",
        project_version="0.1.0",
        commit="c" * 40,
        dirty=False,
        packages={"torch": "2.13.0", "transformers": "5.23.0", "lm-eval": "0.4.13"},
        machine={"cpu": "x", "num_cores": 2},
        seeds={"plan": 0},
    )
    return dataclasses.replace(manifest, **changes)


def make_row(doc_id: int = 0, text: str | None = "Übung ☃\n", **changes: Any) -> GenerationRow:
    step = CommitStep(block=0, step=0, positions=(0, 1), token_ids=(5, 6), confidences=(0.9, 0.1), num_forced=1)
    generation = Generation(
        prompt_id=str(doc_id), token_ids=(5, 6), text=text, finish="eos", num_prompt_tokens=3, num_tokens=2,
        num_discarded_tokens=1, num_context_forwards=1, num_denoiser_forwards=1, trace=(step,),
    )  # fmt: skip
    row = GenerationRow(
        cell=CELL.id, task="t", doc_id=doc_id, request_index=0, repeat=0, prompt_sha256="a" * 64, generation=generation
    )
    return dataclasses.replace(row, **changes)


def make_score(doc_id: int = 0, value: float | None = 1.0) -> Score:
    return Score(
        cell=CELL.id, task="t", doc_id=doc_id, cluster_id="k", doc_sha256="a", prompt_sha256="b", target_sha256="c",
        metric="exact_match", filter="none", higher_is_better=True, headline=True, scored_by="generation",
        value=value, missing_reason=None if value is not None else "empty",
    )  # fmt: skip


def make_likelihood() -> LikelihoodRow:
    likelihood = Likelihood(logprob_nats=-1.25, is_greedy=True, kind="exact")
    return LikelihoodRow(
        cell=CELL.id, task="t", doc_id=0, request_index=0, repeat=0, request="loglikelihood", prompt_sha256="a",
        num_tokens=3, likelihood=likelihood,
    )  # fmt: skip


def make_sample(call: str = "0", **changes: Any) -> SpeedSample:
    timing = PromptTiming(
        prompt_id="p", num_prompt_tokens=3, num_tokens=2, num_discarded_tokens=0, num_context_forwards=1,
        num_denoiser_forwards=1, num_forced_commits=None, finish="length", finish_s=0.5, tokens_sha256="t",
    )  # fmt: skip
    sample = SpeedSample(
        call_id=call, launch_id="l", cell=CELL.id, replica=0, round=0, phase="measure", batch_size=1, wall_s=0.5,
        prefill_s=None, first_output_s=None, peak_memory_bytes=None, peak_memory_reason="cpu",
        started_at="2026-11-23T10:15:00+00:00", prompts=(timing,),
    )  # fmt: skip
    return dataclasses.replace(sample, **changes)


def write_run(root: Path, rows: list[store.Row], *, finish: bool = False) -> Path:
    with store.create(root, make_manifest()) as writer:
        for row in rows:
            writer.append(row)
        if finish:
            writer.finish()
    return writer.path


def test_every_kind_of_row_comes_back_equal(tmp_path: Path) -> None:
    rows = [make_row(), make_row(1, text=None), make_likelihood(), make_score(), make_score(1, None), make_sample()]
    path = write_run(tmp_path, rows, finish=True)
    run = store.load(path)
    assert [*run.generations, *run.likelihoods, *run.scores, *run.speed] == rows
    assert run.complete
    assert run.manifest == make_manifest()
    assert [event["kind"] for event in run.events] == ["started", "finished"]
    assert run.cells == {CELL.id: CELL}


def test_run_ids_sort_by_time_and_name_the_verb() -> None:
    assert store.new_run_id("speed", datetime(2026, 11, 23, 10, 15, tzinfo=UTC)).startswith("20261123T101500Z-speed-")
    assert store.new_run_id("run") != store.new_run_id("run")


texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(["\u2028\x85\r\n\x00", "\ud800"])


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(first=texts, last=texts)
def test_whatever_a_kill_leaves_of_the_last_line_the_rest_is_whole(
    tmp_path_factory: pytest.TempPathFactory, first: str, last: str
) -> None:
    path = write_run(tmp_path_factory.mktemp("runs"), [make_row(0, first)])
    journal_file = path / "generations.jsonl"
    whole = journal_file.read_bytes()
    line = json.dumps(to_json(make_row(1, last)), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    for cut in range(len(line) + 1):
        journal_file.write_bytes(whole + line[:cut])
        expected = [make_row(0, first)] + ([make_row(1, last)] if cut == len(line) else [])
        assert store.load(path).generations == expected
    assert journal_file.read_bytes() == whole + line, "loading changes nothing"


def test_resume_after_a_cut_at_every_byte_gives_the_uncut_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them would take a minute
    path = write_run(tmp_path, [make_row(0), make_row(1)])
    whole = (path / "generations.jsonl").read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole) + 1):
        (path / "done.json").unlink(missing_ok=True)
        (path / "generations.jsonl").write_bytes(whole[:cut])
        with store.resume(path, make_manifest()) as writer:
            if cut < len(whole):
                assert writer.run.generations == [make_row(0)]
                writer.append(make_row(1))
            writer.finish()
        assert (path / "generations.jsonl").read_bytes() == whole
        assert store.load(path).complete


def test_a_torn_event_line_is_cut_too(tmp_path: Path) -> None:
    path = write_run(tmp_path, [])
    with open(path / "events.jsonl", "ab") as file:
        file.write(b'{"at": "2026')
    assert [e["kind"] for e in store.load(path).events] == ["started"]
    with store.resume(path, make_manifest()):
        pass
    assert [e["kind"] for e in store.load(path).events] == ["started", "resumed"]


def damage(change: Callable[[dict[str, Any]], Any]) -> bytes:
    return json.dumps(change(to_json(make_row(1)))).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\n", "not valid JSON"),
        (b'{"cell": \n', "not valid JSON"),
        (b"\x00\x00\x00\n", "not valid JSON"),
        (b"\xff\xfe\n", "not valid JSON"),
        (b"[1]\n", "not a JSON object"),
        (b'{"cell": NaN}\n', "NaN is not allowed"),
        (damage(lambda row: {**row, "colour": 1}), "unknown field(s) colour"),
        (damage(lambda row: {k: v for k, v in row.items() if k != "task"}), "missing field(s) task"),
        (damage(lambda row: {**row, "generation": 3}), "line 2"),
        (damage(lambda row: {**row, "doc_id": []}), "line 2"),
        (damage(lambda row: {**row, "doc_id": 0}), "repeats the row of line 1"),
        (damage(lambda row: {**row, "cell": "elsewhere"}), "'elsewhere' is not in the run's manifest"),
    ],
)
def test_any_other_bad_line_is_an_error_with_file_and_line(tmp_path: Path, line: bytes, words: str) -> None:
    path = write_run(tmp_path, [make_row(0)])
    with open(path / "generations.jsonl", "ab") as file:
        file.write(line + damage(lambda row: {**row, "doc_id": 7}))
    with pytest.raises(ValueError, match=r"generations\.jsonl, line 2: ") as caught:
        store.load(path)
    assert words in str(caught.value)
    before = (path / "generations.jsonl").read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        store.resume(path, make_manifest())
    assert (path / "generations.jsonl").read_bytes() == before, "a refused resume changes nothing"


def test_the_writer_refuses_repeated_and_foreign_rows_and_nan(tmp_path: Path) -> None:
    with store.create(tmp_path, make_manifest()) as writer:
        writer.append(make_row(0))
        writer.append(make_score(0))
        writer.append(make_likelihood())
        with pytest.raises(ValueError, match="is there already"):
            writer.append(make_row(0, text="another"))
        with pytest.raises(ValueError, match="not in the run's manifest"):
            writer.append(make_row(1, cell="elsewhere"))
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.append(make_score(1, float("nan")))
        writer.append(make_score(1))
    assert len(store.load(writer.path).scores) == 2
    with store.resume(writer.path, make_manifest()) as again, pytest.raises(ValueError, match="is there already"):
        again.append(make_row(0))
    with pytest.raises(ValueError, match="is closed"):
        again.append(make_row(5))


def test_timed_calls_differ_by_launch_cell_replica_phase_round_and_call(tmp_path: Path) -> None:
    rows = [make_sample(), make_sample("1"), make_sample(round=1), make_sample(phase="warmup")]
    rows += [make_sample(replica=1), make_sample(launch_id="m")]
    path = write_run(tmp_path, list(rows))
    assert store.load(path).speed == rows


def test_two_writers_cannot_share_a_run(tmp_path: Path) -> None:
    with store.create(tmp_path, make_manifest()) as writer:
        with pytest.raises(ValueError, match="being written by another process"):
            store.resume(writer.path, make_manifest())
        code = f"from twotower_eval import store; p = {str(writer.path)!r}\n"
        code += "from pathlib import Path; m = store.load(Path(p)).manifest; store.resume(Path(p), m)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "being written by another process" in done.stderr
        writer.append(make_row(0))
    store.resume(writer.path, make_manifest()).close()


def test_a_run_folder_is_never_reused(tmp_path: Path) -> None:
    path = write_run(tmp_path, [make_row()])
    with pytest.raises(ValueError, match="exists already"):
        store.create(tmp_path, make_manifest())
    assert store.load(path).generations == [make_row()]


def test_a_manifest_that_cannot_be_written_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.create(tmp_path, make_manifest(machine={"load": float("nan")}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_other_schemas_are_refused(tmp_path: Path, schema: object) -> None:
    path = write_run(tmp_path, [])
    data = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**data, "schema": schema}))
    with pytest.raises(ValueError, match=r"manifest\.json: schema .* reads schema 1 only"):
        store.load(path)


def test_what_is_no_run_folder_is_said_so_and_left_alone(tmp_path: Path) -> None:
    for call in (store.load, lambda path: store.resume(path, make_manifest())):
        with pytest.raises(ValueError, match="is no run folder"):
            call(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not valid JSON"):
        store.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"project_version": "0.2.0"}, "twotower-eval was 0.1.0, is 0.2.0"),
        ({"packages": {"torch": "2.11.0", "transformers": "5.23.0", "lm-eval": "0.4.13"}}, "torch was 2.13.0, is 2.11"),
        ({"packages": {"torch": "2.13.0", "transformers": "5.23.0"}}, "lm-eval was 0.4.13, is None"),
        ({"cells": (make_cell(threshold=0.9),)}, "the plan no longer has cell"),
        ({"cells": (CELL, make_cell(threshold=0.9))}, "the plan newly has cell"),
        ({"cells": (make_cell(version=2),)}, "block_diffusion(threshold=0.8) version 2"),
        ({"verb": "speed"}, "verb was run, is speed"),
        ({"machine": {"cpu": "x", "num_cores": 2, "kernels": ["mamba"]}}, "active kernels was None, is ['mamba']"),
    ],
)
def test_resume_refuses_and_lists_what_differs(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_run(tmp_path, [make_row()], finish=True)
    with pytest.raises(ValueError, match="cannot resume") as caught:
        store.resume(path, make_manifest(**changes))
    assert words in str(caught.value)
    assert store.load(path).complete, "a refused resume changes nothing"
    store.resume(path, make_manifest()).close()  # and holds no lock


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"tokenizers": "0.22"}, {"tokenizers": "0.23"}, "tokenizers was 0.22, is 0.23"),
        ({"sacrebleu": "2.5"}, {"sacrebleu": "2.6"}, "sacrebleu was 2.5, is 2.6"),
        ({"sacrebleu": "2.5"}, {}, "sacrebleu was 2.5, is None"),
        ({"sacrebleu": "2.5"}, {"sacrebleu": "2.5", "math-verify": "0.8"}, "math-verify was None, is 0.8"),
        ({}, {"sacrebleu": "2.6", "evaluate": "0.4"}, None),
    ],
)
def test_packages_that_make_tokens_or_scores_must_agree_where_a_manifest_tells_of_them(
    tmp_path: Path, before: dict[str, str], after: dict[str, str], words: str | None
) -> None:
    """Metrics of another version scored the rest of a run; manifests of old do not tell which version there was."""
    old, new = (make_manifest(packages={**make_manifest().packages, **more}) for more in (before, after))
    store.create(tmp_path, old).close()
    if words is None:
        store.resume(tmp_path / old.run_id, new).close()
        return
    with pytest.raises(ValueError, match=f"cannot resume.*: {re.escape(words)}"):
        store.resume(tmp_path / old.run_id, new)


def test_all_differences_are_listed_at_once(tmp_path: Path) -> None:
    path = write_run(tmp_path, [])
    with pytest.raises(ValueError, match=r"twotower-eval was.*; torch was"):
        store.resume(path, make_manifest(project_version="9", packages={}))


@pytest.mark.parametrize("verb", ["speed", "size"])
def test_what_is_timed_resumes_on_the_same_machine_only(tmp_path: Path, verb: str) -> None:
    manifest = make_manifest(verb=verb)
    store.create(tmp_path, manifest).close()
    with pytest.raises(ValueError, match="machine num_cores was 2, is 4"):
        store.resume(tmp_path / manifest.run_id, dataclasses.replace(manifest, machine={"cpu": "x", "num_cores": 4}))
    quality = write_run(tmp_path / "quality", [])
    store.resume(quality, make_manifest(machine={"cpu": "y"})).close()


def test_another_commit_is_a_warning_and_an_event(tmp_path: Path) -> None:
    path = write_run(tmp_path, [])
    with store.resume(path, make_manifest(commit="e" * 40, dirty=True)) as writer:
        assert any("begun at commit" in warning for warning in writer.warnings)
        assert any("uncommitted" in warning for warning in writer.warnings)
    event = store.load(path).events[-1]
    assert (event["kind"], event["dirty"], event["warnings"]) == ("resumed", True, list(writer.warnings))
    assert store.load(path).manifest.commit == "c" * 40, "the manifest is never edited"


def test_a_complete_run_may_be_resumed_and_is_complete_only_once_finished_again(tmp_path: Path) -> None:
    path = write_run(tmp_path, [make_row()], finish=True)
    with store.resume(path, make_manifest()) as writer:
        assert not store.load(path).complete
        writer.append(make_score())
        writer.finish()
    run = store.load(path)
    assert run.complete
    assert len(run.scores) == 1


def test_nothing_is_written_after_the_end(tmp_path: Path) -> None:
    """A row after done.json would make the run unreadable."""

    def failing_after_the_end() -> None:
        with store.create(tmp_path, make_manifest()) as writer:
            writer.finish()
            writer.append(make_row())

    with pytest.raises(ValueError, match="is finished: resume it"):
        failing_after_the_end()
    [path] = store.find_runs(tmp_path)
    assert store.load(path).complete


@pytest.mark.parametrize("name", ["generations.jsonl", "scores.jsonl", "events.jsonl", "manifest.json"])
def test_a_file_changed_after_the_end_is_noticed(tmp_path: Path, name: str) -> None:
    path = write_run(tmp_path, [make_row()], finish=True)
    content = (path / name).read_bytes() if (path / name).exists() else b""
    (path / name).write_bytes(content + (b"\n" if name == "manifest.json" else b""))
    if name == "events.jsonl":
        (path / name).unlink()
    if name == "generations.jsonl":
        (path / name).write_bytes(content.replace(b'"eos"', b'"stop"'))
    with pytest.raises(ValueError, match=f"{name}: (changed|was lost) after the run was finished"):
        store.load(path)


def test_an_error_inside_is_noted_and_the_rows_stay(tmp_path: Path) -> None:
    def interrupted() -> None:
        with store.create(tmp_path, make_manifest()) as writer:
            writer.append(make_row())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    [path] = store.find_runs(tmp_path)
    run = store.load(path)
    assert run.generations == [make_row()]
    assert (run.events[-1]["kind"], run.events[-1]["error"]) == ("failed", "KeyboardInterrupt")
    assert not run.complete


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write

    def full_after_ten_bytes(descriptor: int, data: bytes) -> int:
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[: min(len(data) - 10, 100)])

    with store.create(tmp_path, make_manifest()) as writer:
        writer.append(make_row(0))
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full_after_ten_bytes)
            with pytest.raises(OSError, match="No space left"):
                writer.append(make_row(1))
        writer.append(make_row(1))
        writer.append(make_row(2))
    assert store.load(writer.path).generations == [make_row(0), make_row(1), make_row(2)]


def test_rows_survive_kill_minus_nine(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_store import *\n"
    code += "w = store.create(Path(sys.argv[2]), make_manifest())\n"
    code += "for i in range(50): w.append(make_row(i))\n"
    code += "print('written', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    [path] = store.find_runs(tmp_path)
    with store.resume(path, make_manifest()) as writer:
        assert writer.run.generations == [make_row(i) for i in range(50)]


def test_runs_are_found_newest_first_by_what_their_manifests_say(tmp_path: Path) -> None:
    for number, verb in enumerate(["run", "speed", "run"]):
        manifest = make_manifest(verb=verb, run_id=f"id{number}", started_at=f"2026-11-2{number}T00:00:00+00:00")
        store.create(tmp_path, manifest).close()
    (tmp_path / "published").mkdir()
    (tmp_path / "id2").rename(tmp_path / "a-renamed-run")
    assert [path.name for path in store.find_runs(tmp_path)] == ["a-renamed-run", "id1", "id0"]
    assert [path.name for path in store.find_runs(tmp_path, "speed")] == ["id1"]
    assert store.find_runs(tmp_path / "nowhere") == []


def test_disk_is_asked_at_most_every_interval_and_at_every_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.create(tmp_path, make_manifest()) as writer:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", synced.append)
        monkeypatch.setattr(journal, "FSYNC_INTERVAL_S", 3600.0)
        writer.append(make_row(0))
        synced.clear()
        writer.append(make_row(1))
        writer.append(make_row(2))
        assert synced == []
        writer.event("cell_done", cell=CELL.id)
        assert len(synced) == 2, "the rows, then the event"
        monkeypatch.setattr(journal, "FSYNC_INTERVAL_S", 0.0)
        writer.append(make_row(3))
        assert len(synced) == 3


def edit_line(file: Path, number: int, old: bytes, new: bytes) -> None:
    lines = file.read_bytes().split(b"\n")
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new)
    file.write_bytes(b"\n".join(lines))


def drop_lines(file: Path, number: int) -> None:
    """The last ones."""
    file.write_bytes(b"".join(line + b"\n" for line in file.read_bytes().split(b"\n")[: -1 - number]))


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A stopped run of six rows, with an event after every second one."""
    with store.create(tmp_path, make_manifest()) as writer:
        for doc_id in range(6):
            writer.append(make_row(doc_id))
            if doc_id % 2:
                writer.event("cell_done", cell=CELL.id)
    return writer.path


@pytest.mark.parametrize("lost", [0, 1, 2, 3, 4])
def test_an_edited_line_is_noticed_by_every_event_that_the_lines_left_still_reach(told: Path, lost: int) -> None:
    """One lost line switched the check off for the whole file."""
    journal_file = told / "generations.jsonl"
    edit_line(journal_file, 1, b'"eos"', b'"length"')
    drop_lines(journal_file, lost)
    with pytest.raises(ValueError, match=r"generations.jsonl: lines 1 to 2 were changed after they were written"):
        store.resume(told, make_manifest())


def test_lines_lost_and_made_again_otherwise_are_no_edit(told: Path) -> None:
    """What events told of them before they were lost holds no longer; what they told of the others does."""
    journal_file = told / "generations.jsonl"
    drop_lines(journal_file, 3)
    with store.resume(told, make_manifest()) as writer:
        for doc_id in (3, 4, 5):
            writer.append(make_row(doc_id, text="made again"))
        writer.event("cell_done", cell=CELL.id)
    store.resume(told, make_manifest()).close()
    edit_line(journal_file, 3, b'"eos"', b'"length"')
    drop_lines(journal_file, 1)
    with pytest.raises(ValueError, match=r"generations.jsonl: lines 1 to 3 were changed"):
        store.resume(told, make_manifest())


def test_rows_of_cells_are_those_of_the_journal_in_its_order(tmp_path: Path) -> None:
    rows = [make_row(doc_id) for doc_id in range(4)]
    run = store.load(write_run(tmp_path, rows))
    names = ["a", "b", "a", "c"]
    run = dataclasses.replace(
        run, generations=[dataclasses.replace(row, cell=name) for row, name in zip(rows, names, strict=True)]
    )
    for cells in ({"a"}, {"a", "c"}, {"c", "b", "d"}, set(), {"d"}):
        assert run.generations_of(cells) == [row for row in run.generations if row.cell in cells]
    assert run.scores_of({"a"}) == run.speed_of({"a"}) == []
