"""Prompts that a model has no room for: counted for every request, warned of, a gate, a column, and no verdict."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import report_fixture as made

from tests.test_asked import Told
from tests.tiny_pair import write_pair
from twotower_eval import cli, store
from twotower_eval.analyse import report
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.claims.files import claims_from
from twotower_eval.analyse.compare.documents import truncated
from twotower_eval.measure import harness, speed, suites
from twotower_eval.plan import RunPlan, SpeedPlan

TASKS = ("miniature_sort", "miniature_choice", "miniature_perplexity")
ROOM = 110  # tokens, which is characters here
BUDGET = 74


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair that reads few tokens."""
    return write_pair(tmp_path_factory.mktemp("short"), max_position_embeddings=ROOM)


def plan_of(short: Path, **changes: Any) -> RunPlan:
    plan = RunPlan(model=str(short), tasks=TASKS, limit=6, max_new_tokens=BUDGET, block_sizes=(4,), batch_size=4)
    return dataclasses.replace(plan, **changes)


def expected(limit: int = 6) -> dict[str, tuple[int, int]]:
    """By task, its requests and how many do not fit, from their characters alone."""
    sort, choice, prose = suites.resolve_tasks(TASKS, limit=limit)
    texts = [doc.instances[0].args[0] for doc in sort.docs]
    options = [instance.args for doc in choice.docs for instance in doc.instances]
    return {
        sort.name: (len(texts), sum(len(text) > ROOM - BUDGET for text in texts)),
        choice.name: (len(options), sum(len(context) + len(option) > ROOM + 1 for context, option in options)),
        prose.name: (len(prose.docs), 0),
    }


def counted(run: store.Run) -> dict[tuple[str, str], tuple[int | None, int]]:
    return {(one.task, one.arm): (one.num_requests, one.num_truncated) for one in truncated(run)}


@pytest.mark.parametrize("batch_size", [4, 50])
def test_every_request_is_counted_however_it_was_answered(short: Path, tmp_path: Path, batch_size: int) -> None:
    """What the estimate had answered was not: with one batch for all, nothing was."""
    told = Told()
    found = store.load(harness.run(plan_of(short, batch_size=batch_size), root=tmp_path, progress=told))
    by_task = expected()
    assert 0 < by_task["miniature_sort"][1] < 6
    assert by_task["miniature_choice"][1] > 0
    assert counted(found) == {(task, arm): by_task[task] for task in TASKS for arm in ("baseline", "candidate")}
    cut = by_task["miniature_sort"][1]
    line = f"warning: miniature_sort, baseline: {cut} of 6 prompts were longer than the model has room for"
    assert sum(note.startswith(line) for note in told.notes) == 1
    assert not any("perplexity, baseline: " in note and "warning" in note for note in told.notes)


def test_a_stopped_run_counts_the_same(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store.load(harness.run(plan_of(short), root=tmp_path / "whole"))
    written = store.RunWriter.append
    left = iter(range(12))

    def stops(self: store.RunWriter, row: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        written(self, row)

    monkeypatch.setattr(store.RunWriter, "append", stops)
    with pytest.raises(KeyboardInterrupt):
        harness.run(plan_of(short), root=tmp_path / "stopped")
    monkeypatch.setattr(store.RunWriter, "append", written)
    [path] = store.find_runs(tmp_path / "stopped")
    again = store.load(harness.run(plan_of(short), root=tmp_path, resume=path))
    assert counted(again) == counted(whole)
    told = Told()
    num_events = len(again.events)
    third = store.load(harness.run(plan_of(short), root=tmp_path, resume=path, progress=told))
    assert len([e for e in third.events[num_events:] if e["kind"] == "truncated"]) == 0, (
        "what is known is not told again"
    )
    assert any("lost the beginning" in note for note in told.notes), "but warned of"


def test_more_documents_are_counted_anew(short: Path, tmp_path: Path) -> None:
    path = harness.run(plan_of(short, limit=3), root=tmp_path)
    found = store.load(harness.run(plan_of(short), root=tmp_path, resume=path))
    assert counted(found)["miniature_sort", "candidate"] == expected()["miniature_sort"]


def test_a_model_with_room_cuts_nothing(tmp_path: Path) -> None:
    found = store.load(harness.run(plan_of(write_pair(tmp_path / "pair"), limit=2), root=tmp_path / "runs"))
    assert {cut for _, cut in counted(found).values()} == {0}
    assert len(counted(found)) == 2 * 3
    text = (report.write([found.path], tmp_path / "reports") / "report.md").read_text()
    assert "| whole prompts | passed | no prompt was cut |" in text
    assert "cut prompts" not in text


def test_timed_prompts_are_counted(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--tasks miniature_sort,miniature_recall --block-sizes 4 --num-prompts 4 --batch-sizes 2 --min-rounds 1"
    more = f"--warmup-rounds 0 --no-costs --new-tokens {BUDGET} --out {tmp_path} --model {short}"
    assert cli.main(["speed", *words.split(), *more.split()]) == 0
    said = capsys.readouterr()
    found = store.load(Path(said.out.strip()))
    tasks = {task.name: task for task in suites.resolve_tasks(["miniature_sort", "miniature_recall"])}
    prompts = {(row.task, row.doc_id) for row in found.generations}
    for name, task in tasks.items():
        texts = [doc.instances[0].args[0] for doc in task.docs if (name, doc.doc_id) in prompts]
        cut = sum(len(text) > ROOM - BUDGET for text in texts)
        events = [one for one in truncated(found) if one.task == name]
        assert {(one.num_requests, one.num_truncated) for one in events} == {(len(texts), cut)}
        assert len(events) == len(found.manifest.cells) == 2
        assert (f"warning: {name}, candidate: {cut} of {len(texts)} prompt" in said.err) == (cut > 0)
    assert any(one.num_truncated for one in truncated(found))
    markdown = (report.write([found.path], tmp_path / "reports") / "report.md").read_text()
    assert "| whole prompts | **FAILED** |" in markdown


def test_a_fixed_workload_cuts_its_prompts_itself(tmp_path: Path) -> None:
    plan = SpeedPlan(
        model=str(write_pair(tmp_path / "pair")), tasks=("miniature_sort",), workload="fixed", new_tokens=3,
        prompt_tokens=5, num_prompts=2, min_rounds=1, warmup_rounds=0, block_sizes=(4,), costs=False,
    )  # fmt: skip
    requests = suites.build_requests(suites.resolve_tasks(plan.tasks))
    found = store.load(speed.run(plan, requests, root=tmp_path))
    assert {(one.num_requests, one.num_truncated) for one in truncated(found)} == {(2, 0)}
    assert "whole prompts" not in (report.write([found.path], tmp_path / "reports") / "report.md").read_text()


# Reports and verdicts

CUT = {("baseline", "sorting"): 3, ("candidate", "sorting"): 3, ("candidate", "words_de"): 1}


def test_a_gate_and_a_column_say_which_prompts_were_cut(tmp_path: Path) -> None:
    path = made.quality_run(tmp_path, num_docs=40, cut=CUT)
    folder = report.write([path], tmp_path / "reports", csv=True)
    text = (folder / "report.md").read_text()
    [gate] = [line for line in text.splitlines() if line.startswith("| whole prompts")]
    assert "**FAILED**" in gate
    assert "sorting, baseline: 3 of 10 prompts were longer than the model has room for and lost the beginning" in gate
    assert "words_de, candidate: 1 of 10 prompt was longer" in gate
    header = next(line for line in text.splitlines() if "cut prompts: baseline / candidate" in line)
    rows = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    last = {row.split(" | ")[0].removeprefix("| "): row.rstrip(" |").rsplit(" | ", 1)[1] for row in rows}
    assert last["sorting"] == "3 / 3"
    assert last["arithmetic"] == "0 / 0"
    assert last["words (mean of 2)"] == "0 / 1"
    table = pd.read_csv(folder / "tables" / "retention.csv").set_index("task")
    assert list(table.loc["sorting", ["baseline_num_truncated", "candidate_num_truncated"]]) == [3, 3]
    assert list(table.loc["words", ["baseline_num_truncated", "candidate_num_truncated"]]) == [0, 1]


def test_runs_that_did_not_count_are_not_passed(tmp_path: Path) -> None:
    path = made.quality_run(tmp_path, num_docs=20, tasks=("arithmetic",))
    folder = report.write([path], tmp_path / "reports", csv=True)
    text = (folder / "report.md").read_text()
    assert "| whole prompts | not checked | prompts that were cut were not counted in this run |" in text
    assert pd.read_csv(folder / "tables" / "retention.csv")["baseline_num_truncated"].isna().all()


def test_events_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = made.quality_run(tmp_path, num_docs=20, tasks=("arithmetic",), complete=False)
    run = store.load(path)
    with store.resume(path, run.manifest) as writer:
        writer.event("truncated", cell=run.manifest.cells[1].id, num_requests=7)
        writer.finish()
    [one] = truncated(store.load(path))
    assert (one.arm, one.task, one.num_requests, one.num_truncated) == ("candidate", "arithmetic", None, 7)
    text = (report.write([path], tmp_path / "reports") / "report.md").read_text()
    assert "arithmetic, candidate: 7 prompts were longer" in text
    assert "0 / 7" in text


def test_one_arm_alone_has_the_column_too(tmp_path: Path) -> None:
    path = made.quality_run(
        tmp_path, num_docs=20, tasks=("arithmetic", "sorting"), decoders=(), perplexity=False, cut=CUT
    )
    text = (report.write([path], tmp_path / "reports") / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| arithmetic |", "| sorting |"))]
    assert "cut prompts |" in text
    assert [row.rstrip(" |").rsplit(" | ", 1)[1] for row in rows] == ["0", "3"]


def claims_of(*scope: str) -> Any:
    spec: dict[str, Any] = made.block_diffusion().params
    point: dict[str, Any] = {
        "name": "here",
        "decoder": {"kind": "block_diffusion", **spec},
        "batch_size": 1,
        "num_devices": 1,
    }
    point["workload"] = "answer"
    common = {"subject": "pair", "baseline": "context-tower", "point": "here", "source": "a test"}
    kept = {"name": "kept", "quantity": "retention", "scope": list(scope), "expected": 0.5, **common}
    fast = {"name": "fast", "quantity": "speedup_time", "expected": 1.0, **common}
    return claims_from("test", {"title": "t", "point": [point], "claim": [kept, fast]}).claims


def test_a_claim_on_cut_prompts_is_invalid(tmp_path: Path) -> None:
    """A score on prompts without their beginning is not the task's."""
    runs = [store.load(made.quality_run(tmp_path / "q", cut=CUT, perplexity=False))]
    whole, cut, member = (judge(claims_of(task), runs)[0] for task in ("arithmetic", "sorting", "words"))
    assert whole.outcome == "SUPPORTED"
    assert {gate.outcome for gate in whole.gates if gate.kind == "whole_prompts"} == {"passed"}
    assert (cut.outcome, member.outcome) == ("INVALID", "INVALID")
    assert cut.reason.startswith("whole prompts: sorting, baseline: 3 of 10 prompts")


def test_a_speedup_on_cut_prompts_is_invalid(tmp_path: Path) -> None:
    cut = {("candidate", "answer: four tasks"): 2}
    made_runs = [made.speed_run(tmp_path / name, cut=given) for name, given in (("whole", {}), ("cut", cut))]
    whole, bad = (judge(claims_of("sorting"), [store.load(path)])[1] for path in made_runs)
    assert "failed" not in {gate.outcome for gate in whole.gates if gate.kind == "whole_prompts"}
    assert bad.outcome == "INVALID"
    assert "candidate: 2 of 10 prompts" in bad.reason
