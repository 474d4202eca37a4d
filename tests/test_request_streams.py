"""Streams of requests to servers: closed loops of several waves, and given rates, with what reports make of them."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import isclose
from pathlib import Path

import pytest

from tests.scripted_server import Script, serving
from twotower_eval import store
from twotower_eval.analyse import claims, report
from twotower_eval.analyse.compare.consistency import contradictions
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.gates import gates as gates_section
from twotower_eval.analyse.report.requests import requests_table
from twotower_eval.engine.endpoints import client as client_module
from twotower_eval.errors import UserError
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.speed.streams import schedule
from twotower_eval.measure.speed.workloads import PerSecond, make_calls
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import Arm, SpeedSample

SORT = "miniature_sort"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def requests() -> list[suites.TimedPrompt]:
    return suites.build_requests(suites.resolve_tasks((SORT,)))


@pytest.fixture
def slow() -> Script:
    return Script(answer=lambda text: list("12 34;"), gap_s=0.008)


@pytest.fixture
def quick() -> Script:
    return Script(answer=lambda text: list("12 34;"), gap_s=0.001)


@pytest.fixture
def urls(slow: Script, quick: Script) -> Iterator[tuple[str, str]]:
    """Baseline and candidate."""
    with serving(slow) as baseline, serving(quick) as candidate:
        yield baseline, candidate


def plan_of(urls: tuple[str, str], **more: object) -> SpeedPlan:
    given = {
        "baseline": urls[0], "model": urls[1], "tokenizer": "miniature", "tasks": (SORT,), "num_prompts": 12,
        "min_rounds": 5, "warmup_rounds": 0, "probes": 0, "costs": False, "new_tokens": 8, **more,
    }  # fmt: skip
    return SpeedPlan(**given)  # type: ignore[arg-type]


def timed(plan: SpeedPlan, requests: list[suites.TimedPrompt], folder: Path) -> store.Run:
    return store.load(speed.run(plan, requests, root=folder))


def page_of(run: store.Run, folder: Path) -> str:
    found = report.write([run.path], folder)
    return found.read_text() if found.is_file() else (found / "report.md").read_text()


def streams_of(run: store.Run, phase: str = "measure") -> list[list[SpeedSample]]:
    found: dict[tuple[object, ...], list[SpeedSample]] = {}
    for one in run.speed:
        if one.phase == phase:
            found.setdefault((one.cell, one.replica, one.round), []).append(one)
    return list(found.values())


def paced(run: store.Run, times: Callable[[Arm, int], tuple[float, float]]) -> store.Run:
    """The same run as if the n-th request of each stream of an arm had been due at, and had taken, these seconds."""
    arms = {cell.id: cell.arm for cell in run.manifest.cells}
    speed = []
    for stream in streams_of(run):
        for n, one in enumerate(sorted(stream, key=lambda one: one.due_s or 0.0)):
            due_s, wall_s = times(arms[one.cell], n)
            prompts = tuple(dataclasses.replace(prompt, finish_s=wall_s) for prompt in one.prompts)
            given = {"due_s": due_s, "wall_s": wall_s, "first_output_s": wall_s, "late_s": 0.0, "prompts": prompts}
            speed.append(dataclasses.replace(one, **given))
    return dataclasses.replace(run, speed=speed)


def test_a_closed_loop_keeps_so_many_requests_in_flight(
    slow: Script, urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    run = timed(plan_of(urls, batch_sizes=(3,)), requests, tmp_path)
    assert slow.most_at_once == 3
    assert {(cell.workload.requests, cell.workload.batch_size) for cell in run.manifest.cells} == {("closed", 3)}
    for stream in streams_of(run):
        assert len(stream) == 12
        ended = sorted((one.due_s or 0.0) + one.wall_s for one in stream)
        due = sorted(one.due_s or 0.0 for one in stream)
        assert all(due[at + 3] >= ended[at] - 1e-9 for at in range(9))  # a place is free when an answer has ended
    assert not contradictions(run)
    page = page_of(run, tmp_path / "reports")
    assert "3 in flight" in page
    assert "answers/s, steady" in page


def test_rates_of_a_closed_loop_follow_littles_law(
    urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    """Three in flight that take 60 ms each are 50 a second, however long the last wave takes."""
    seconds = {"baseline": 0.06, "candidate": 0.03}
    run = timed(plan_of(urls, batch_sizes=(3,)), requests, tmp_path)
    run = paced(run, lambda arm, n: (n // 3 * seconds[arm], seconds[arm] * (5 if n == 11 else 1)))
    [point] = Runs([run]).speed
    assert point.time.estimate is not None
    assert point.time.estimate.value == pytest.approx(2.0)
    for found, sent, seconds_each in (
        (point.baseline_answers, point.baseline_requests, 0.06), (point.candidate_answers, point.requests, 0.03),
    ):  # fmt: skip
        assert found.estimate is not None
        assert found.estimate.value == pytest.approx(3 / seconds_each)
        assert sent is not None
        assert (sent.num, sent.median_s) == (60, pytest.approx(seconds_each))
        assert sent.p90_s is not None
        assert sent.p99_s is None  # fewer than five of 60 lie above
        assert sent.keeps_up is None  # no rate was given


def test_requests_at_a_rate_are_sent_whatever_the_server_does(
    slow: Script, urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    plan = plan_of(urls, request_rates=(60.0, 80.0), arrivals="constant", num_prompts=8)
    run = timed(plan, requests, tmp_path)
    assert slow.most_at_once > 1
    assert {cell.workload.request_rate for cell in run.manifest.cells} == {60.0, 80.0}
    assert len({cell.id for cell in run.manifest.cells}) == 4
    rates = {cell.id: cell.workload.request_rate or 0.0 for cell in run.manifest.cells}
    for stream in streams_of(run):
        due = [one.due_s or 0.0 for one in stream]
        assert all(isclose(at, n / rates[stream[0].cell]) for n, at in enumerate(due))
        assert all(one.late_s is not None for one in stream)
    orders = {tuple(one.call_id for one in stream) for stream in streams_of(run) if stream[0].cell == run.speed[0].cell}
    assert len(orders) == 5  # another one in every round, the same for all lanes
    assert not contradictions(run)
    assert {point.candidate.workload.request_rate for point in Runs([run]).speed} == {60.0, 80.0}
    for point in Runs([run]).speed:
        assert point.throughput.reason is not None
        assert point.time.estimate is not None
    assert "60 a second (constant)" in page_of(run, tmp_path / "reports")


def test_latency_is_from_the_moment_when_a_request_was_due(requests: list[suites.TimedPrompt], tmp_path: Path) -> None:
    """One request stalls a server with a single place: those behind it are charged for the time that they wait."""
    script = Script(answer=lambda text: list("1;"), places=1, slow_s=0.3)
    with serving(script) as url:
        plan = plan_of((url, url), baseline="context-tower", request_rates=(100.0,), min_rounds=1, num_prompts=6)
        made = make_calls(plan, requests)
        [load] = made
        first = schedule(load, made[load], 0, "stream", "measure", 0)[0][0]
        script.faults = {first.requests[0].text: ["slow"] * 4}
        run = timed(plan, requests, tmp_path)
    for stream in streams_of(run):
        assert min(one.wall_s for one in stream) > 0.2
        assert stream[-1].due_s == pytest.approx(0.0, abs=0.2)


def test_a_saturated_server_is_marked_and_gives_no_verdict(
    urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    """The baseline answers one after the other, 50 ms each: 20 a second of the 50 that it is asked."""
    run = timed(plan_of(urls, request_rates=(50.0,)), requests, tmp_path)
    run = paced(run, lambda arm, n: (0.02 * n, 0.05 + (0.03 * n if arm == "baseline" else 0.0)))
    runs = Runs([run])
    [point] = runs.speed
    assert point.requests is not None
    assert point.requests.keeps_up is True
    assert point.baseline_requests is not None
    assert point.baseline_requests.keeps_up is False
    gates = {gate.kind: gate.outcome for gate in point.gates}
    assert gates["kept_up"] == "failed"
    assert point.invalid
    managed = point.baseline_answers.estimate
    assert managed is not None
    assert managed.value == pytest.approx(3 / (0.22 - 0.05))  # three between the first answer and the last request
    growth = point.baseline_requests.growth.estimate
    assert growth is not None
    assert growth.value == pytest.approx((0.05 + 0.03 * 9.5) / (0.05 + 0.03 * 1.5))
    assert "**NO**: latencies grow by 3.53x" in requests_table(runs)
    assert "kept up, answer, 50 requests/s (poisson)" in str(gates_section(runs))
    file = tmp_path / "claim.toml"
    file.write_text(CLAIM.format(rate=50, requests=""))
    [verdict] = claims.judge(claims.load_claims(file).claims, runs)
    assert verdict.outcome == "INVALID"


CLAIM = """
title = "Faster at a rate"
[[point]]
name = "at a rate"
decoder = {{ kind = "endpoint", temperature = 0.0 }}
request_rate = {rate}
workload = "answer"
{requests}

[[claim]]
name = "faster"
quantity = "speedup_time"
subject = "scripted"
baseline = ""
point = "at a rate"
source = "here"
expected = 1.2
margin = 0.1
"""


def test_a_claim_names_its_rate(urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path) -> None:
    run = timed(plan_of(urls, request_rates=(100.0,)), requests, tmp_path)
    outcomes = {}
    for rate, kind in ((100, ""), (50, ""), (100, 'requests = "constant"')):
        file = tmp_path / "claim.toml"
        file.write_text(CLAIM.format(rate=rate, requests=kind))
        [verdict] = claims.judge(claims.load_claims(file).claims, Runs([run]))
        outcomes[rate, kind] = verdict.outcome
    assert outcomes[50, ""] == outcomes[100, 'requests = "constant"'] == "NOT_MEASURED"
    assert outcomes[100, ""] != "NOT_MEASURED"
    for wrong, said in (
        (CLAIM.replace("speedup_time", "speedup_throughput"), "claim speedup_time"),
        (CLAIM.replace('workload = "answer"', 'workload = "answer"\nbatch_size = 4'), "drop one"),
        (CLAIM.replace('workload = "answer"', 'workload = "answer"\nnum_devices = 4'), "drop num_devices"),
    ):
        file.write_text(wrong.format(rate=100, requests=""))
        with pytest.raises(UserError, match=said):
            claims.load_claims(file)
    file.write_text(CLAIM.format(rate=100, requests='requests = "closed"'))
    with pytest.raises(UserError, match="poisson or constant"):
        claims.load_claims(file)


@pytest.mark.parametrize("fault", ["429", "drop", "cut", "500", "malformed"])
def test_a_request_that_fails_is_a_failed_answer_and_asked_once(
    fault: str, slow: Script, urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    plan = plan_of(urls, request_rates=(200.0,), min_rounds=2)
    text = next(iter(make_calls(plan, requests).values()))[3].requests[0].text
    slow.faults = {text: [fault]}
    run = timed(plan, requests, tmp_path)
    [failed] = [one for one in run.speed if one.fault is not None]
    assert failed.fault == "failed"
    assert failed.prompts[0].served is not None
    assert failed.prompts[0].served.failure is not None
    asked = [body for body in slow.bodies if body["prompt"] == text]
    assert len(asked) == 4  # two copies in two rounds, none of them again
    assert not any(event["kind"] == "retried" for event in run.events)
    assert not contradictions(run)
    scored = store.load(harness.score_journal(run.path))
    assert scored.complete
    found = Runs([scored])
    [point] = found.speed
    arm = point.baseline_requests
    assert arm is not None
    assert arm.num_failed == (1 if failed.replica == 0 else 0)


def test_many_failures_give_no_verdict_and_their_share_is_said(
    slow: Script, urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    slow.refuses = lambda number: "429" if number % 5 == 4 else None
    run = timed(plan_of(urls, request_rates=(200.0,), min_rounds=3), requests, tmp_path)
    [point] = Runs([run]).speed
    assert point.invalid
    assert point.baseline_requests is not None
    share = point.baseline_requests.num_failed / point.baseline_requests.num
    assert 0.1 < share < 0.3
    page = page_of(run, tmp_path / "reports")
    assert f"{100 * share:.1f} %" in page
    assert "a request that got no whole answer" in page


def test_a_server_that_answers_nothing_ends_the_launch(
    slow: Script, urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    plan = plan_of(urls, request_rates=(200.0,))
    slow.refuses = lambda number: "503" if number > 8 else None  # after what is asked before anything is timed
    with pytest.raises(client_module.EndpointError, match="none of 12 requests was answered: status 503"):
        timed(plan, requests, tmp_path)


def test_caches_that_help_one_arm_are_a_warning(
    quick: Script, urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    quick.cached = lambda num: num // 2
    run = timed(plan_of(urls, batch_sizes=(2,)), requests, tmp_path)
    [point] = Runs([run]).speed
    assert point.requests is not None
    assert point.requests.cached_share == pytest.approx(0.5, abs=0.2)
    assert "cached_prompts" in {warning.kind for warning in point.warnings}
    page = page_of(run, tmp_path / "reports")
    assert "prompt tokens from its cache" in page
    assert "the speedup may be that of a cache" in page


def test_arrivals_follow_the_seed_and_the_rate(requests: list[suites.TimedPrompt]) -> None:
    plan = SpeedPlan(model="openai:http://localhost:1/v1#x", tasks=(SORT,), num_prompts=200, request_rates=(4.0,))
    [(load, calls)] = make_calls(plan, requests).items()
    assert load == PerSecond(4.0, "poisson")
    one, same, other = (schedule(load, calls, seed, "stream", "measure", 0) for seed in (0, 0, 1))
    assert one == same != other
    gaps = [late[1] - early[1] for early, late in pairwise(one)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.4)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.4)  # exponential: as wide as its mean


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"baseline": "miniature"}, "request_rates are for servers"),
        ({"batch_sizes": (2,)}, "two ways to load a server"),
        ({"request_rates": (0.0,)}, "above 0"),
        ({"request_rates": (float("inf"),)}, "finite number"),
        ({"request_rates": None, "arrivals": "constant"}, "arrivals has no effect"),
    ],
)
def test_what_no_rate_can_be_is_refused(more: dict[str, object], said: str) -> None:
    url = "openai:http://localhost:1/v1#x"
    with pytest.raises(UserError, match=said):
        plan_of((url, url + "y"), **{"request_rates": (4.0,), **more})


def test_too_few_prompts_for_a_closed_loop_are_refused(requests: list[suites.TimedPrompt]) -> None:
    url = "openai:http://localhost:1/v1#x"
    plan = plan_of((url, url + "y"), batch_sizes=(1, 8))
    with pytest.raises(UserError, match="at least 16 prompts"):
        make_calls(plan, requests)


def test_a_stopped_run_goes_on_by_whole_rounds(
    slow: Script, urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    plan = plan_of(urls, request_rates=(200.0,), min_rounds=3)
    slow.refuses = lambda number: "503" if number > 40 else None
    with pytest.raises(client_module.EndpointError):
        timed(plan, requests, tmp_path)
    slow.refuses = lambda number: None
    [path] = tmp_path.iterdir()
    run = store.load(speed.run(plan, requests, root=tmp_path, resume=path))
    assert run.complete
    assert not contradictions(run)


def test_the_estimate_covers_probes_and_launches(
    urls: tuple[str, str], requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    notes: list[str] = []

    class Noted(speed.launches.SilentProgress):  # type: ignore[name-defined,misc]
        def note(self, text: str) -> None:
            notes.append(text)

    plan = plan_of(urls, batch_sizes=(2,), warmup_rounds=1, probes=2, min_rounds=2, num_prompts=4)
    speed.run(plan, requests, root=tmp_path, progress=Noted())
    [line] = [note for note in notes if note.startswith("estimated duration")]
    assert "2 rounds" in line
    assert "calls on new prompts" in line
    assert line.endswith("then 16 timed answers are scored")  # two cells, four prompts, two rounds
    notes.clear()
    speed.run(dataclasses.replace(plan, warmup_rounds=0), requests, root=tmp_path, progress=Noted())
    assert sum(note.startswith("estimated duration") for note in notes) == 1
