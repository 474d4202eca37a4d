"""Timing models behind a server: concurrent requests in the rounds of a run, and what a report says of them."""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.chat_models import QWEN_3, save_chat
from tests.pages import commands
from tests.scripted_server import Script, serving
from twotower_eval import cli, store
from twotower_eval.analyse import report
from twotower_eval.analyse.compare.calls import streamed
from twotower_eval.analyse.compare.consistency import contradictions
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.engine.endpoints import client as client_module
from twotower_eval.engine.models import load_model
from twotower_eval.measure import speed, suites
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import PromptTiming, Served, TimeFault
from twotower_eval.rules import WORDS

SORT = "miniature_sort"
Pieces = Callable[[str], Sequence[str]]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def requests() -> list[suites.TimedPrompt]:
    return suites.build_requests(suites.resolve_tasks((SORT,)))


@pytest.fixture
def script() -> Script:
    return Script(answer=lambda text: list("12 34;"))


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    with serving(script) as there:
        yield there


def plan_of(url: str, **more: object) -> SpeedPlan:
    given = {
        "model": url, "tokenizer": "miniature", "tasks": (SORT,), "num_prompts": 4,
        "batch_sizes": (1, 2), "min_rounds": 2, "probes": 0, "costs": False, "new_tokens": 8, **more,
    }  # fmt: skip
    return SpeedPlan(**given)  # type: ignore[arg-type]


def timed(plan: SpeedPlan, requests: list[suites.TimedPrompt], folder: Path) -> store.Run:
    return store.load(speed.run(plan, requests, root=folder))


def test_a_batch_is_so_many_requests_at_once(
    script: Script, url: str, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    """Beside a model that is here, which takes the prompts of a batch together."""
    script.gap_s = 0.005
    run = timed(plan_of(url, baseline="miniature", tokenizer=None), requests, tmp_path)
    assert script.most_at_once == 2
    served = {cell.id for cell in run.manifest.cells if cell.checkpoint.served}
    measured = [sample for sample in run.speed if sample.phase == "measure" and sample.cell in served]
    assert {sample.batch_size for sample in measured} == {1, 2}
    assert {sample.due_s for sample in run.speed} == {None}
    for sample in measured:
        assert sample.wall_s > 5 * script.gap_s
        assert sample.first_output_s is not None
        assert 0 < sample.first_output_s < sample.wall_s
        assert sample.passes == ()
        assert sample.peak_memory_reason == "not measured behind a server"
        assert all(prompt.finish_s <= sample.wall_s for prompt in sample.prompts)
        assert all(prompt.served.num_pieces == 6 for prompt in sample.prompts if prompt.served)
    assert {cell.workload.num_devices for cell in run.manifest.cells} == {None, 1}
    assert any("caches prefixes" in note for note in run.manifest.notes)
    assert not contradictions(run)


def test_a_retried_call_is_no_clean_timing(
    script: Script, url: str, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    plan = plan_of(url, batch_sizes=(1,), warmup_rounds=0)
    script.faults = {requests[0].text: ["drop"]}
    run = timed(plan, requests, tmp_path)
    faults = [sample.fault for sample in run.speed]
    assert faults.count("retried") == 1
    assert set(faults) == {"retried", None}
    [event] = [event for event in run.events if event["kind"] == "retried"]
    assert (event["fault"], event["attempt"]) == ("dropped", 1)


def test_a_server_that_fails_too_often_ends_the_launch_and_the_run_goes_on_later(
    script: Script, url: str, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    plan = plan_of(url, batch_sizes=(1,), min_rounds=3, warmup_rounds=0)
    made = speed.run(dataclasses.replace(plan, min_rounds=1), requests, root=tmp_path)
    assert len({sample.round for sample in store.load(made).speed}) == 1
    script.faults = {requests[0].text: ["500"] * 5}
    with pytest.raises(client_module.EndpointError, match="failed 5 times"):
        speed.run(plan, requests, root=tmp_path / "stopped")
    [path] = (tmp_path / "stopped").iterdir()
    assert not store.load(path).complete
    run = store.load(speed.run(plan, requests, root=tmp_path, resume=path))
    assert run.complete


def test_tokens_of_both_arms_are_counted_by_one_tokenizer(
    script: Script, url: str, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    plan = plan_of(url, baseline="miniature", tokenizer=None, batch_sizes=(1,), num_prompts=2)
    run = timed(plan, requests, tmp_path)
    codec = load_model("miniature").tokenizer
    assert codec is not None
    texts = {(row.cell, row.repeat, row.generation.prompt_id): row.generation.text for row in run.generations}
    for sample in run.speed:
        for prompt in sample.prompts:
            text = texts[sample.cell, sample.round, prompt.prompt_id] or ""
            assert prompt.num_recounted == prompt.num_useful == len(codec.encode(text) if text else [])
    arms = {cell.id: cell.arm for cell in run.manifest.cells}
    assert {arms[row.cell] for row in run.witnessed} == {"baseline"}
    assert not contradictions(run)


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (lambda text: list("12 34 56 78;"), "answers arrive token by token: the first after"),
        (lambda text: ["12 34 ", "56 78;"], "answers arrive in groups of about 6 tokens"),
    ],
    ids=["tokens", "canvases"],
)
def test_a_report_gives_token_times_only_of_single_tokens(
    pieces: Pieces, said: str, script: Script, url: str, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    script.answer, script.gap_s, script.takes_stream_options = pieces, 0.004, False
    run = timed(plan_of(url, batch_sizes=(1,), num_prompts=2, new_tokens=16, baseline="miniature"), requests, tmp_path)
    folder = report.write([run.path], tmp_path / "reports")
    page = folder.read_text() if folder.is_file() else (folder / "report.md").read_text()
    assert said in page
    assert "is behind a server, and its weights are unknown" in page
    assert "two runs are of the same model by name only" in page
    assert "candidate: decodes behind a server, which shows no logits" in page
    assert "without any forward" not in page
    [point] = Runs([run]).speed
    outcomes = {gate.kind: gate.outcome for gate in point.gates}
    unchecked = ("busy_arms", "witnessed_answers", "residual")
    assert {outcomes[kind] for kind in unchecked} == {"not_checked"}  # type: ignore[index]


def test_the_page_runs(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands as they stand, but for the addresses of the servers."""
    monkeypatch.chdir(tmp_path)
    save_chat(tmp_path / "instruct", QWEN_3)
    script.chat = lambda messages: "\n".join(one["content"] for one in messages)
    quick = {"run": [], "speed": ["--probes", "0", "--warmup-rounds", "0", "--no-costs", "--new-tokens", "8"]}
    found = commands("your-model.md", "Endpoints")
    with serving(script) as url, serving(Script(answer=script.answer)) as other:
        for _, verb, *words in found:
            there = [(other if ":8001" in word else url) if word.startswith("openai:") else word for word in words]
            assert cli.main([verb, *there, *quick[verb]]) == 0
    verbs = [store.load(path).manifest.verb for path in store.find_runs(Path("results"))]
    assert sorted(verbs) == sorted(verb for _, verb, *_ in found) == ["run", "run", "speed", "speed", "speed"]
    manifests = [store.load(path).manifest for path in store.find_runs(Path("results"))]
    plans = [one.plan for one in manifests if one.chats is None or not any(use.served for use in one.chats)]
    assert [plan["batch_size"] for plan in plans if "batch_size" in plan] == [4]
    assert sorted(tuple(plan["batch_sizes"]) for plan in plans if "batch_sizes" in plan) == [(1,), (1, 2), (4,)]
    assert [tuple(plan["request_rates"]) for plan in plans if "request_rates" in plan] == [(20.0, 40.0)]


def timing(**served: object) -> PromptTiming:
    return PromptTiming(
        prompt_id="p/0", num_prompt_tokens=1, num_tokens=12, num_discarded_tokens=0, num_context_forwards=0,
        num_denoiser_forwards=0, num_forced_commits=None, finish="stop", finish_s=1.0, tokens_sha256="0" * 64,
        served=Served(num_prompt_tokens=1, **{"num_tokens": 12, **served}),  # type: ignore[arg-type]
    )  # fmt: skip


def test_streams_are_told_apart_by_tokens_per_arrival() -> None:
    times = {"first_s": 0.25, "last_s": 1.35}
    single = streamed([timing(num_pieces=12, num_arrivals=12, **times)])
    assert single is not None
    assert (single.first_s, single.between_s) == (0.25, pytest.approx(0.1))
    # One event for each token, all of a canvas at once.
    bursts = streamed([timing(num_pieces=12, num_arrivals=2, **times)])
    assert bursts is not None
    assert (bursts.tokens_per_arrival, bursts.first_s, bursts.between_s) == (6.0, None, None)
    assert streamed([timing(), dataclasses.replace(timing(), served=None)]) is None


def test_a_model_alone_is_one_cell_with_its_copy(url: str, requests: list[suites.TimedPrompt], tmp_path: Path) -> None:
    """Without a baseline's name nothing is refused as being the same: it is timed against itself."""
    run = timed(plan_of(url, batch_sizes=(1,), num_prompts=2, min_rounds=1, warmup_rounds=0), requests, tmp_path)
    assert [cell.arm for cell in run.manifest.cells] == ["baseline"]
    assert {sample.replica for sample in run.speed} == {0, 1}


def test_every_fault_of_a_timing_has_words() -> None:
    assert set(WORDS) == set(typing.get_args(TimeFault))
