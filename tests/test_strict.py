"""Rows that hold what no row can hold: refused with file, line and field by every verb that reads a run."""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made
import test_store as plain

from twotower_eval import cli, store, strict
from twotower_eval.records import Check, CostSample, Generation, RunManifest, Score, SpeedSample, to_json
from twotower_eval.strict import from_json, parse_json

Change = Callable[[dict[str, Any]], Any]


def at(*path: str | int, value: Any) -> Change:
    """Put a value somewhere inside a row."""

    def change(row: dict[str, Any]) -> None:
        inner: Any = row
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


COST = CostSample(
    cell=plain.CELL.id, launch_id="l", round=0, phase="measure", part="ar_step", replica=0, batch_size=1,
    context_tokens=8, block_size=None, num_repeats=3, wall_s=0.5, started_at="2026-11-23T10:15:00+00:00",
)  # fmt: skip
CHECK = Check(cell=plain.CELL.id, name="c", outcome="passed", detail="")
ROWS: dict[str, store.Row] = {
    "generations": plain.make_row(),
    "likelihoods": plain.make_likelihood(),
    "scores": plain.make_score(),
    "speed": plain.make_sample(),
    "costs": COST,
    "checks": CHECK,
}
ODD: list[tuple[str, Change, str]] = [
    ("generations", at("generation", "finish", value="banana"), "generation.finish must be eos or stop or length, not"),
    ("generations", at("generation", "finish", value=None), "generation.finish must be"),
    ("generations", at("generation", "num_tokens", value=1.5), "generation.num_tokens must be a whole number"),
    ("generations", at("generation", "num_tokens", value=2.0), "generation.num_tokens must be a whole number"),
    ("generations", at("generation", "num_tokens", value=True), "generation.num_tokens must be a whole number"),
    ("generations", at("generation", "num_tokens", value=3), "num_tokens is 3, but there are 2 token_ids"),
    ("generations", at("generation", "token_ids", 1, value=0.5), "generation.token_ids[1] must be a whole number"),
    ("generations", at("generation", "token_ids", 0, value=-1), "generation.token_ids[0] must be at least 0, not -1"),
    ("generations", at("generation", "token_ids", value="56"), "generation.token_ids must be a list"),
    ("generations", at("generation", "num_denoiser_forwards", value=-1), "num_denoiser_forwards must be at least 0"),
    ("generations", at("generation", "text", value=7), "generation.text must be a text, not 7"),
    ("generations", at("generation", "trace", 0, "confidences", 0, value="x"), "trace[0].confidences[0] must be a num"),
    ("generations", at("generation", "trace", 0, "num_forced", value=3), "num_forced is 3 of 2 commits"),
    ("generations", at("generation", "trace", 0, "positions", value=[0]), "1 positions, 2 token_ids"),
    ("generations", at("doc_id", value=2**63), "doc_id must be a whole number of at most 64 bits"),
    ("generations", at("repeat", value=-1), "repeat must be at least 0, not -1"),
    ("generations", at("task", value=None), "task must be a text, not None"),
    ("likelihoods", at("request", value="loglikelyhood"), "request must be loglikelihood or loglikelihood_rolling"),
    ("likelihoods", at("likelihood", "kind", value="exactly"), "likelihood.kind must be exact or"),
    ("likelihoods", at("likelihood", "is_greedy", value=1), "likelihood.is_greedy must be true or false, not 1"),
    ("likelihoods", at("likelihood", "num_draws", value=4), "kind is 'exact', but num_draws is 4"),
    ("likelihoods", at("likelihood", "logprob_nats", value=0.5), "likelihood.logprob_nats must be at most 0, not 0.5"),
    ("likelihoods", at("likelihood", "logprob_nats", value=10**400), "logprob_nats must be a number"),
    ("scores", at("value", value="1"), "value must be a number, not '1'"),
    ("scores", at("value", value=True), "value must be a number, not True"),
    ("scores", at("value", value=None), "value is None without a missing_reason"),
    ("scores", at("missing_reason", value="lost"), "value is 1.0, but missing_reason is 'lost'"),
    ("scores", at("headline", value="yes"), "headline must be true or false, not 'yes'"),
    ("scores", at("higher_is_better", value=None), "higher_is_better must be true or false"),
    ("speed", at("phase", value="mesure"), "phase must be warmup or measure or probe, not 'mesure'"),
    ("speed", at("replica", value=2), "replica must be from 0 to 1, not 2"),
    ("speed", at("wall_s", value="fast"), "wall_s must be a number"),
    ("speed", at("round", value=-1), "round must be at least 0"),
    ("speed", at("batch_size", value=2), "batch_size is 2, but there are 1 prompts"),
    ("speed", at("prompts", 0, "finish", value="ended"), "prompts[0].finish must be eos or stop or length"),
    ("speed", at("prompts", 0, "finish_s", value="late"), "prompts[0].finish_s must be a number"),
    ("speed", at("prompts", 0, value=[]), "prompts[0] must be a JSON object"),
    ("speed", at("prompts", 0, "colour", value=1), "unknown field(s) colour"),
    ("speed", at("peak_memory_reason", value=None), "peak_memory_bytes is None, but peak_memory_reason is None"),
    ("costs", at("part", value="prefil"), "part must be prefill or ar_step"),
    ("costs", at("block_size", value=16), "part is 'ar_step', but block_size is 16"),
    ("costs", at("num_repeats", value=0), "num_repeats must be at least 1, not 0"),
    ("checks", at("outcome", value="ok"), "outcome must be passed or failed or not_checked"),
    ("checks", at("limit", value="1e-4"), "limit must be a number"),
]


def spoil(path: Path, journal: str, change: Change, line: int = 0) -> None:
    """Change one row of a journal in place."""
    lines = (path / journal).read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[line])
    change(row)
    lines[line] = json.dumps(row)
    (path / journal).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(("kind", "change", "words"), ODD, ids=[f"{kind}: {words[:40]}" for kind, _, words in ODD])
def test_a_row_that_cannot_be_is_refused_when_read_and_when_written(
    tmp_path: Path, kind: str, change: Change, words: str
) -> None:
    row = ROWS[kind]
    path = plain.write_run(tmp_path, [row])
    assert getattr(store.load(path), kind) == [row]
    spoil(path, f"{kind}.jsonl", change)
    with pytest.raises(ValueError, match=rf"{kind}\.jsonl, line 1: ") as caught:
        store.load(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"{kind}\.jsonl, line 1: "):
        store.resume(path, plain.make_manifest())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("1e999", "the number 1e999 is beyond what a double holds"),
        ("NaN", "NaN is not allowed"),
        ("9" * 5000, "more digits than Python reads"),
        ("1.0,\"value\":0.0", "key 'value' is defined twice"),
    ],
)  # fmt: skip
def test_numbers_that_python_would_bend_are_refused(tmp_path: Path, number: str, words: str) -> None:
    path = plain.write_run(tmp_path, [plain.make_score(0), plain.make_score(1)])
    file = path / "scores.jsonl"
    first, second = file.read_text(encoding="utf-8").splitlines()
    file.write_text(f"{first}\n{second.replace('1.0', number)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 2: ") as caught:
        store.load(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"value":1.0', '"value":1.0,"value":0.0', "key 'value' is defined twice"),
        ('"value":1.0', '"value":1e-999', "the number 1e-999 is beyond what a double holds"),
        ('"value":1.0', '"value":1' + "0" * 30, "value must be a whole number of at most 64 bits, not 1000"),
        ('"value":1.0', '"value" : 1.0, "vaule": 1.0', "Score: unknown field(s) vaule"),
        ('"value":1.0', '"value":1.0,"parts":[1,9223372036854775808]', "parts[1] must be a whole number of at most 64"),
    ],
)
@pytest.mark.parametrize("fields", [99, 14], ids=["as today", "without what came later"])
def test_what_msgspec_lets_pass_is_refused(tmp_path: Path, old: str, new: str, words: str, fields: int) -> None:
    """Lines of older versions lack fields, and so come out otherwise than they went in."""
    path = plain.write_run(tmp_path, [plain.make_score()])
    file = path / "scores.jsonl"
    row = json.loads(file.read_text(encoding="utf-8"))
    row = {key: value for key, value in list(row.items())[:fields] if key != "parts"}
    line = json.dumps(row, separators=(",", ":"))
    file.write_text(line + "\n", encoding="utf-8")
    assert store.load(path).scores == [plain.make_score()]
    file.write_text(line.replace(old, new) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 1: ") as caught:
        store.load(path)
    assert words in str(caught.value)


def test_numbers_written_otherwise_are_the_same(tmp_path: Path) -> None:
    """Python writes 1e-05 where msgspec writes 0.00001, and others write blanks."""
    score = dataclasses.replace(plain.make_score(), value=1e-05)
    path = plain.write_run(tmp_path, [score])
    assert "1e-05" in (path / "scores.jsonl").read_text(encoding="utf-8")
    assert store.load(path).scores == [score]
    spoil(path, "scores.jsonl", lambda row: row)
    assert store.load(path).scores == [score]


def test_half_a_surrogate_pair_in_an_answer_is_kept(tmp_path: Path) -> None:
    row = plain.make_row()
    odd = dataclasses.replace(row, generation=dataclasses.replace(row.generation, text="half \ud83d of it"))
    path = plain.write_run(tmp_path, [odd])
    assert store.load(path).generations == [odd]
    file = path / "generations.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"finish":', b'"colour":1,"finish":'))
    with pytest.raises(ValueError, match=r"line 1: GenerationRow: generation: unknown field\(s\) colour"):
        store.load(path)


def whole_numbers(hint: Any, seen: set[Any]) -> list[Any]:
    """Annotations of whole numbers in a record and all records in it."""
    if hint is int or typing.get_origin(hint) is typing.Annotated:
        return [hint]
    if dataclasses.is_dataclass(hint):
        if hint in seen:
            return []
        seen.add(hint)
        hints = typing.get_type_hints(hint, include_extras=True)
        return [one for inner in hints.values() for one in whole_numbers(inner, seen)]
    return [one for inner in typing.get_args(hint) for one in whole_numbers(inner, seen)]


@pytest.mark.parametrize("cls", [*store.JOURNALS, RunManifest], ids=lambda cls: cls.__name__)
def test_no_whole_number_out_of_a_file_may_be_beyond_64_bits(cls: type) -> None:
    assert int not in whole_numbers(cls, set())


def test_sound_numbers_of_another_kind_are_read(tmp_path: Path) -> None:
    path = plain.write_run(tmp_path, [plain.make_score()])
    spoil(path, "scores.jsonl", at("value", value=1))
    [score] = store.load(path).scores
    assert type(score.value) is float
    spoil(path, "scores.jsonl", at("value", value=-0.0))
    assert store.load(path).scores[0].value == 0


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    odd = dataclasses.replace(plain.make_sample(), phase="mesure")
    with store.create(tmp_path, plain.make_manifest()) as writer:
        with pytest.raises(ValueError, match=r"speed\.jsonl: SpeedSample: phase must be warmup or measure"):
            writer.append(odd)
        writer.append(plain.make_sample())
    assert len(store.load(writer.path).speed) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (at("verb", value="runs"), "verb must be run or speed or size or verify, not 'runs'"),
        (at("cells", 0, "arm", value="challenger"), "cells[0].arm must be baseline or candidate"),
        (at("cells", 0, "workload", "kind", value="tasks"), "cells[0].workload.kind must be task or"),
        (at("cells", 0, "workload", "batch_size", value=0), "cells[0].workload.batch_size must be at least 1"),
        (at("cells", 0, "decoder", "params", "threshold", value=[1]), "cells[0].decoder.params['threshold'] must be"),
        (at("seeds", "plan", value=0.5), "seeds['plan'] must be a whole number"),
        (at("dirty", value="no"), "dirty must be true or false"),
        (at("argv", value="run"), "argv must be a list"),
    ],
)
def test_a_manifest_is_held_against_its_fields_too(tmp_path: Path, change: Change, words: str) -> None:
    path = plain.write_run(tmp_path, [])
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"manifest\.json: RunManifest: ") as caught:
        store.load(path)
    assert words in str(caught.value)


def test_parameters_keep_whether_they_are_whole() -> None:
    """A cell's id is made of them: 16 must not become 16.0, nor true 1."""
    manifest = plain.make_manifest(cells=(plain.make_cell(threshold=1),))
    again = from_json(RunManifest, json.loads(json.dumps(to_json(manifest))))
    assert json.dumps(to_json(again)) == json.dumps(to_json(manifest))


@pytest.mark.parametrize("line", ['{"kind": "started"}', '{"at": "2026", "kind": 3}', '{"at": null, "kind": "x"}'])
def test_an_event_says_when_and_what(tmp_path: Path, line: str) -> None:
    path = plain.write_run(tmp_path, [])
    with open(path / "events.jsonl", "a", encoding="utf-8") as file:
        file.write('{"at": "2026", "kind": "of a later version", "more": [1]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 3: an event's (at|kind) must be a text"):
        store.load(path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("[1]", "files must be a JSON object"),
        ('{"scores.jsonl": {"rows": 1.5, "sha256": "x"}}', "files['scores.jsonl'].rows must be a whole number"),
        ('{"scores.jsonl": {"rows": 1}}', "missing field(s) sha256"),
    ],
)
def test_an_event_that_tells_no_digests_is_refused_on_resume(tmp_path: Path, files: str, words: str) -> None:
    path = plain.write_run(tmp_path, [])
    with open(path / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"at": "2026", "kind": "cell_done", "files": {files}}}\n')
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2: ") as caught:
        store.check_unedited(store.load(path))
    assert words in str(caught.value)


CORRUPTED: list[tuple[str, str, Change]] = [
    ("generations.jsonl", "finish", at("generation", "finish", value="banana")),
    ("generations.jsonl", "num_tokens", at("generation", "num_tokens", value=3.5)),
    ("scores.jsonl", "value", at("value", value="0.5")),
]


@pytest.mark.parametrize("closed", [False, True], ids=["no done.json", "done.json of the edited file"])
@pytest.mark.parametrize(("journal", "field", "change"), CORRUPTED, ids=[field for _, field, _ in CORRUPTED])
def test_every_verb_that_reads_a_run_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], journal: str, field: str, change: Change, closed: bool
) -> None:
    path = made.quality_run(tmp_path / "results", num_docs=2)
    spoil(path, journal, change, line=1)
    done = json.loads((path / "done.json").read_text())
    (path / "done.json").unlink()
    if closed:
        done["files"][journal]["sha256"] = hashlib.sha256((path / journal).read_bytes()).hexdigest()
        (path / "done.json").write_text(json.dumps(done))
    claims = ["claims", "check", "miniature"]
    verbs = [["report", str(path), "--out", str(tmp_path / "report")], [*claims, str(path)]]
    for argv in verbs:
        assert cli.main(argv) == 2, argv
        said = capsys.readouterr().err
        assert f"{journal}, line 2: " in said, said
        assert field in said


def test_a_timed_call_of_an_unknown_phase_is_not_left_out_of_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was neither a warm-up nor measured, and no table said that it was missing."""
    path = made.speed_run(tmp_path / "results", num_rounds=2, num_calls=2)
    (path / "done.json").unlink()
    spoil(path, "speed.jsonl", at("phase", value="mesure"), line=7)
    assert cli.main(["report", str(path), "--out", str(tmp_path / "report")]) == 2
    assert (
        "speed.jsonl, line 8: SpeedSample: phase must be warmup or measure or probe, not 'mesure'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(("cls", "data"), [(Score, 3), (SpeedSample, []), (Generation, "x")])
def test_what_is_no_object_is_said_so(cls: type, data: Any) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}: it must be a JSON object"):
        from_json(cls, data)


def test_infinities_are_let_be_where_other_programs_write_them() -> None:
    assert parse_json('{"time_step_limit": [0.0, Infinity]}', "f", infinities=True)["time_step_limit"][1] == float(
        "inf"
    )
    with pytest.raises(ValueError, match=r"f: the number 1e999"):
        parse_json("[1e999]", "f", infinities=True)
    with pytest.raises(ValueError, match=r"f: not valid JSON \(Expecting value, line 2, column 1\)"):
        parse_json("[1,\n", "f")


@pytest.mark.parametrize("name", ROWS)
def test_rows_as_they_are_written_are_read_the_fast_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields that are left out where they are None made every row that holds such a record be read twice."""
    row = ROWS[name]
    read = strict.line_reader(type(row))
    with monkeypatch.context() as patch:
        patch.setattr(strict, "_check_surplus", lambda *_: pytest.fail("it was looked at key by key"))
        assert read(json.dumps(to_json(row), separators=(",", ":"), ensure_ascii=False).encode(), "here") == row
    extra = json.dumps({**to_json(row), "more": None}, separators=(",", ":"), ensure_ascii=False).encode()
    with pytest.raises(ValueError, match=r"unknown field\(s\) more"):
        read(extra, "here")
