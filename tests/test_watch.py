"""A timed call is what it says: every way of cheating at one that a plug-in has in this process, and an honest one."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cheating_decoders
from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.compare import Runs
from twotower_eval.analyse.compare.gates import busy_gate
from twotower_eval.analyse.compare.timing import speed_points
from twotower_eval.analyse.report.gates import gates
from twotower_eval.analyse.words import found_text
from twotower_eval.engine.decoders.autoregressive import Autoregressive
from twotower_eval.engine.decoders.reported import CallRequest, ReportError, check_answer, finished
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.counting import UncountedForwards, WatchedModel, watched_in_place
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.speed.clock import CallClock, Devices, UntimedTokenizer
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.records import Claim, GateLimits, Generation, OperatingPoint, Passes, Prompt

TASK = "miniature_sort"
REFUSED = {
    "Understates": r"reports 1 context forwards over its 1 prompts, and the harness counted 6",
    "Overstates": r"reports 3 denoiser forwards over its 1 prompts, and the harness counted 0",
    "ByTheTower": r"ran a model \d+ times past the harness",
    "ByTheClass": r"ran a model \d+ times past the harness",
    "MoreTokens": r"num_tokens is 56, and there are 6 token_ids",
    "OverBudget": r"9 tokens, and the budget is 6",
    "OtherText": r"its text is not that of its 6 token_ids",
    "ShorterPrompt": r"num_prompt_tokens is 1, and the prompt has \d+",
    "OtherPrompt": r"the answer in its place is that of prompt 'another'",
    "CountsTheEnd": r"token_ids hold the end of the text",
    "EndsEarly": r"finish is 'length' after 5 tokens, and the budget is 6",
    "FinishesLate": r"finish_s is 1e\+06, and the call took",
    "FinishesBefore": r"finish_s is -1, and the call took",
    "Lazy": r"token_ids are a LazyTokens, not a tuple",
    "LazyAsATuple": r"token_ids are a LazyTuple, not a tuple",
    "SubclassedText": r"text is a LazyText, not a plain str",
    "SubclassedNumber": r"token_ids hold a LazyNumber, not plain whole numbers",
    "TensorTokens": r"token_ids are a Tensor, not a tuple",
    "YesForOne": r"num_denoiser_forwards is a bool, not a plain whole number",
    "SubclassedAnswer": r"it is a LazyAnswer, not a Generation",
    "Later": r"its answers are a generator, not a list of finished Generations",
    "WorksInText": r"reports 6 context forwards over its 1 prompts, and the harness counted \d+",
    "WorksInTokenizer": r"ran \d+ forwards while the clock stood for a text",
    "SleepsInTokenizer": r"[\d.]+ s of its calls went by off the clock, for texts that take about",
    "OtherClock": r"time.perf_counter has been replaced",
    "LeavesAThread": r"leaves threads running \(postponed\)",
    "StartsAThread": r"leaves threads running \(worker\)",
    "RaisesThreads": r"changes the number of CPU threads",
    "RaisesThreadsMeanwhile": r"ran forwards with 2 CPU threads, and the plan has 1",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def requests() -> list[suites.TimedPrompt]:
    return suites.build_requests(suites.resolve_tasks((TASK,)), 4)


@pytest.fixture
def tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cheat puts in the place of something is put back."""
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)
    torch.set_num_threads(torch.get_num_threads())


def plan_of(pair: Path, name: str, **more: Any) -> SpeedPlan:
    given: dict[str, Any] = {
        "tasks": (TASK,), "decoder": f"{cheating_decoders.MODULE}:{name}", "batch_sizes": (1,), "num_prompts": 1,
        "new_tokens": 6, "min_rounds": 1, "warmup_rounds": 0, "costs": False, "threads": 1,
    }  # fmt: skip
    return SpeedPlan(model=str(pair), **{**given, **more})


# Timed calls


def test_an_honest_plug_in_is_timed_and_what_it_took_is_written_down(pair: Path, requests: Any, tmp_path: Path) -> None:
    run = store.load(speed.run(plan_of(pair, "Honest", num_prompts=2, batch_sizes=(2,)), requests, root=tmp_path))
    for sample in run.speed:
        of_baseline = run.cells[sample.cell].arm == "baseline"
        num_context = sum(p.num_context_forwards for p in sample.prompts)
        assert sum(passes.rows * passes.num for passes in sample.passes) == num_context
        assert {passes.kind for passes in sample.passes} == {"prefill", "extend"}
        assert {(p.tokens, p.rows) for p in sample.passes if p.kind == "extend"} == {(1, 2 if of_baseline else 1)}
        assert sample.cpu_s is not None
        assert sample.caller_cpu_s is not None
        assert 0 < sample.caller_cpu_s <= sample.cpu_s + 0.01
        assert sample.off_clock_s is not None
        assert sample.off_clock_s > 0
        assert all(0 <= p.finish_s <= sample.wall_s for p in sample.prompts)


def test_passes_of_blocks_are_those_of_the_decoder(pair: Path, requests: Any, tmp_path: Path) -> None:
    plan = plan_of(pair, "Honest", decoder="block_diffusion", block_sizes=(4,))
    run = store.load(speed.run(plan, requests, root=tmp_path))
    [sample] = [s for s in run.speed if run.cells[s.cell].arm == "candidate" and s.phase == "measure"]
    [timing] = sample.prompts
    denoise = [passes for passes in sample.passes if passes.kind == "denoise"]
    assert denoise == [Passes(kind="denoise", rows=1, tokens=4, num=timing.num_denoiser_forwards)]


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("name", REFUSED)
def test_a_cheat_is_named_and_ends_the_run(pair: Path, requests: Any, tmp_path: Path, name: str) -> None:
    """Each of them was timed without a word."""
    threads = torch.get_num_threads()
    try:
        with pytest.raises(
            ReportError, match=rf"{name}[^:]*: (prompt [^:]*: |answer 1 is not [^:]*: )?{REFUSED[name]}"
        ):
            speed.run(plan_of(pair, name), requests, root=tmp_path)
    finally:
        torch.set_num_threads(threads)
    for path in store.find_runs(tmp_path):
        run = store.load(path)
        assert not run.complete
        assert all(run.cells[sample.cell].arm == "baseline" for sample in run.speed)


def test_processes_that_a_decoder_starts_are_busy_for_it(pair: Path, requests: Any, tmp_path: Path) -> None:
    run = store.load(speed.run(plan_of(pair, "HasItDoneElsewhere"), requests, root=tmp_path))
    [sample] = [s for s in run.speed if run.cells[s.cell].arm == "candidate" and s.phase == "measure"]
    assert sample.cpu_s is not None
    assert sample.caller_cpu_s is not None
    assert sample.cpu_s > 2 * sample.caller_cpu_s


def test_one_stall_of_the_tokenizer_voids_its_call_and_no_more(pair: Path, requests: Any, tmp_path: Path) -> None:
    """It ended the run: something else ran while the clock stood."""
    plan = plan_of(pair, "StallsOnce", num_prompts=2, min_rounds=2, probes=0)
    run = store.load(speed.run(plan, requests, root=tmp_path))
    assert run.complete
    assert [(s.fault, s.off_clock_s is not None and s.off_clock_s > 0.1) for s in run.speed if s.fault] == [
        ("clock stood", True)
    ]
    [point] = Runs([run]).speed
    assert point.faults == ("clock stood",)


def test_idle_threads_that_outlive_a_call_are_nobodys_fault(pair: Path, requests: Any, tmp_path: Path) -> None:
    """A pool that waits for work, as torch.compile and progress bars leave one, ended the run."""
    plan = plan_of(pair, "HasIdleThreads", num_prompts=2, min_rounds=2)
    assert store.load(speed.run(plan, requests, root=tmp_path)).complete


def test_a_thread_that_goes_to_work_between_later_calls_is_found(pair: Path, requests: Any, tmp_path: Path) -> None:
    plan = plan_of(pair, "WorksLater", num_prompts=4, min_rounds=10)
    with pytest.raises(ReportError, match=r"WorksLater.*: leaves threads running \(later\)"):
        speed.run(plan, requests, root=tmp_path)


# Scored generations


def run_plan(pair: Path, name: str) -> RunPlan:
    kind = f"{cheating_decoders.MODULE}:{name}"
    return RunPlan(model=str(pair), tasks=(TASK,), decoder=kind, limit=2, max_new_tokens=6, batch_size=2)


@pytest.mark.parametrize("name", ["Understates", "ByTheClass", "MoreTokens", "OtherText", "OtherPrompt", "Lazy"])
def test_scored_answers_are_held_against_the_same_counts(pair: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ReportError, match=name):
        harness.run(run_plan(pair, name), root=tmp_path)
    [path] = store.find_runs(tmp_path)
    assert not store.load(path).scores or name == "Understates"
    with pytest.raises(ValueError, match=r"cannot resume .*whose reports were wrong .*start a new run"):
        harness.run(run_plan(pair, name), root=tmp_path, resume=path)


def test_an_honest_plug_in_is_scored(pair: Path, tmp_path: Path) -> None:
    assert store.load(harness.run(run_plan(pair, "Honest"), root=tmp_path)).complete


# The parts


def test_what_a_tokenizer_is_given_off_the_clock_is_finished() -> None:
    """A value that computes when it is looked at is looked at on the clock."""
    now_s = [0.0]

    class Tokenizer:
        def decode(self, token_ids: Any) -> str:
            now_s[0] += 1.0
            return "".join(map(str, token_ids))

        encode = decode_with_special = decode

    clock = CallClock(Devices(("cpu",)), lambda: now_s[0])
    tokenizer = UntimedTokenizer(Tokenizer(), clock)
    read = clock.reader()
    for given, on_clock_s in (
        ([1, 2], 0.0), ((1, 2), 0.0), ((), 0.0), ("12", 0.0), (range(1, 3), 1.0), ([True], 1.0),
        (cheating_decoders.LazyTuple((1, 2)), 1.0), (cheating_decoders.LazyTokens((1, 2)), 1.0),
        (cheating_decoders.LazyText("12"), 1.0), ([cheating_decoders.LazyNumber(1)], 1.0), (iter([1, 2]), 1.0),
    ):  # fmt: skip
        before_s = read()
        tokenizer.decode(given)
        assert read() - before_s == on_clock_s, given
    assert clock.off_s == 4.0
    assert not hasattr(read, "stopped")
    assert read() == clock()


def test_nested_and_inner_forwards_count_once(pair: Path) -> None:
    model = load_model(pair)
    uncounted = UncountedForwards([model])
    with watched_in_place(model) as watched, uncounted.noted(watched), torch.inference_mode():
        context = model.prefill(torch.tensor([[5, 6], [7, 8]]))
        model.context_tower.extend(context, torch.tensor([[5], [6]]))
        model.context_logits(torch.tensor([[5]]))
    assert (watched.prefills.rows, watched.prefills.tokens, uncounted.num) == ([2, 1], [2, 1], 0)
    assert (watched.extensions.rows, watched.extensions.tokens) == ([2], [1])
    assert "prefill" not in {**vars(model), **vars(model.context_tower)}
    with uncounted.noted(WatchedModel(model)), torch.inference_mode():
        model.context_tower.prefill(torch.tensor([[5, 6]]))
    assert uncounted.num > 0
    tower = WatchedModel(model)
    with uncounted.noted(tower), torch.inference_mode():
        tower.context_tower.prefill(torch.tensor([[5, 6]]))
    assert (tower.prefills.rows, uncounted.num) == ([1], 0)


def answer(**changes: Any) -> Generation:
    made = Generation(
        prompt_id="p", token_ids=(5, 6), text="ab", finish="length", num_prompt_tokens=1, num_tokens=2,
        num_discarded_tokens=0, num_context_forwards=2, num_denoiser_forwards=0,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


class Letters:
    """Token 5 is a, and so on; 0 is half a character."""

    def decode(self, ids: Any) -> str:
        return "".join("\ufffd" if i == 0 else chr(92 + i) for i in ids)

    decode_with_special = decode

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 92 for letter in text]


ASKED = CallRequest(
    name="d", max_new_tokens=2, eos_token_ids=(9,), stop=("x",), tokenizer=Letters(), vocab_size=40
)  # fmt: skip
PROMPT = Prompt(id="p", token_ids=(5,))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"text": None}, {"text": " a b\n"}, {"finish": "eos"}, {"finish": "stop", "text": "abc"},
        {"finish": "stop", "token_ids": (5, 0), "text": "a\u00e9"},
        {"finish": "eos", "token_ids": (), "num_tokens": 0, "text": ""},
    ],
)  # fmt: skip
def test_answers_that_are_right(changes: dict[str, Any]) -> None:
    check_answer(answer(**changes), PROMPT, ASKED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_discarded_tokens": -1}, "num_discarded_tokens is -1"),
        ({"num_forced_commits": -1}, "num_forced_commits is -1"),
        ({"token_ids": (5, 40), "text": None}, "token ids from 5 to 40, and the model knows 0 to 39"),
        ({"finish": "eos", "token_ids": (5, 9), "text": None}, r"hold the end of the text \(9\)"),
        ({"finish": "tired"}, "finish is 'tired'"),
        ({"finish": "stop", "text": "abcdefghi"}, "its text is not that"),
        ({"finish": "eos", "text": "abc"}, "its text is not that"),
    ],
)
def test_answers_that_contradict_themselves(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ReportError, match=f"d: prompt 'p': .*{said}"):
        check_answer(answer(**changes), PROMPT, ASKED)
    with pytest.raises(ReportError, match="finish is 'stop', and no stop string was given"):
        check_answer(answer(finish="stop"), PROMPT, dataclasses.replace(ASKED, stop=()))
    with pytest.raises(ReportError, match="finish is 'eos', and no token was to end it"):
        check_answer(answer(finish="eos"), PROMPT, dataclasses.replace(ASKED, eos_token_ids=()))


def test_a_list_of_tokens_is_as_good_as_a_tuple() -> None:
    ids: Any = [5, 6]
    assert finished([answer(token_ids=ids)], "d") == (answer(),)


# Whether an arm waits, or has help


@pytest.fixture(scope="module")
def busy_run(pair: Path, requests: Any, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    plan = plan_of(pair, "Honest", num_prompts=4, min_rounds=3)
    return store.load(speed.run(plan, requests, root=tmp_path_factory.mktemp("busy")))


def with_cpu(run: store.Run, arm: str, **seconds_per_wall: float | None) -> store.Run:
    """The run, as if its calls had each taken a tenth of a second, and an arm's so much of the processor."""
    changed = []
    for sample in run.speed:
        mine = run.cells[sample.cell].arm == arm
        taken = {"cpu_s": 1.0, "caller_cpu_s": 1.0, **(seconds_per_wall if mine else {})}
        busy = {name: None if share is None else 0.1 * share for name, share in taken.items()}
        changed.append(dataclasses.replace(sample, wall_s=0.1, off_clock_s=0.0, **busy))  # type: ignore[arg-type]
    return dataclasses.replace(run, speed=changed)


def gate_of(run: store.Run, **limits: float) -> tuple[str, str]:
    [point] = speed_points([run])[0]
    gate = busy_gate([run], point, dataclasses.replace(GateLimits(), **limits))
    assert gate.kind == "busy_arms"
    return gate.outcome, found_text(gate)


@pytest.mark.parametrize(
    ("arm", "taken", "outcome", "said"),
    [
        ("baseline", {}, "passed", "the baseline is busy for 100 % of its time, the candidate for 100 %"),
        ("baseline", {"cpu_s": 0.8, "caller_cpu_s": 0.8}, "passed", "busy for 80 %"),
        ("baseline", {"cpu_s": 0.5, "caller_cpu_s": 0.5}, "failed", "the baseline waits: .* 50 % .* 100 %"),
        ("candidate", {"cpu_s": 0.5, "caller_cpu_s": 0.5}, "failed", "the candidate waits: .* 100 % .* 50 %"),
        ("candidate", {"cpu_s": 1.0, "caller_cpu_s": 0.1}, "passed", ""),  # a thread of its own works for the caller
        ("candidate", {"cpu_s": 2.0}, "failed", "the candidate keeps 2.00 processors busy, and the plan gives it 1"),
        ("baseline", {"cpu_s": None, "caller_cpu_s": None}, "not_checked", "not recorded in these runs"),
    ],
)  # fmt: skip
def test_arms_that_wait_or_have_help(busy_run: store.Run, arm: str, taken: Any, outcome: str, said: str) -> None:
    found = gate_of(with_cpu(busy_run, arm, **taken))
    assert found[0] == outcome
    assert re.search(said, found[1])


def test_limits_of_busy_arms_are_the_claims(busy_run: store.Run) -> None:
    halved = with_cpu(busy_run, "baseline", cpu_s=0.7, caller_cpu_s=0.7)
    assert gate_of(halved)[0] == "failed"
    assert gate_of(halved, busy_share=0.6)[0] == "passed"
    doubled = with_cpu(busy_run, "baseline", cpu_s=1.8)
    assert gate_of(doubled)[0] == "failed"
    assert gate_of(doubled, processors_per_thread=2.0)[0] == "passed"


def test_a_neighbour_that_takes_a_call_now_and_then_is_no_waiting(busy_run: store.Run) -> None:
    """One call of twelve that took five times as long moves the sum, and its bounds hold 1 nevertheless."""
    run = with_cpu(busy_run, "baseline")
    stolen = next(i for i, s in enumerate(run.speed) if run.cells[s.cell].arm == "baseline" and s.replica == 0)
    run.speed[stolen] = dataclasses.replace(run.speed[stolen], wall_s=0.8)
    assert gate_of(run)[0] == "passed"


def test_a_gpu_lets_the_processor_wait(busy_run: store.Run) -> None:
    cells = tuple(
        dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, devices=("cuda:0",)))
        for cell in busy_run.manifest.cells
    )
    run = dataclasses.replace(busy_run, manifest=dataclasses.replace(busy_run.manifest, cells=cells))
    assert gate_of(run)[0] == "not_checked"


def test_a_baseline_with_a_sleep_in_it_is_invalid(
    pair: Path, requests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was SUPPORTED at whatever the sleep was long enough for."""
    plain = Autoregressive._decode

    def sleepy(self: Autoregressive, call: Any) -> None:
        time.sleep(0.1)
        plain(self, call)

    monkeypatch.setattr(Autoregressive, "_decode", sleepy)
    plan = plan_of(pair, "Honest", num_prompts=2, min_rounds=3)
    run = store.load(speed.run(plan, requests, root=tmp_path))
    outcome, said = gate_of(run)
    assert (outcome, said.partition(":")[0]) == ("failed", "the baseline waits")
    cell = next(cell for cell in run.manifest.cells if cell.arm == "candidate")
    claim = Claim(
        name="fast", quantity="speedup_time", subject=cell.checkpoint.name, baseline="context-tower", source="us",
        point=OperatingPoint(name="here", decoder=cell.decoder, batch_size=1, num_devices=1, workload="answer"),
        expected=2.0, margin=0.05,
    )  # fmt: skip
    [verdict] = judge([claim], [run])
    assert verdict.outcome == "INVALID"
    assert "busy arms: the baseline waits" in verdict.reason


def test_a_report_says_which_arm_waits(busy_run: store.Run) -> None:
    held = [
        line
        for run in (with_cpu(busy_run, "baseline"), with_cpu(busy_run, "baseline", cpu_s=0.5, caller_cpu_s=0.5))
        for line in gates(Runs([run])).markdown.splitlines()
        if line.startswith("| busy arms")
    ]
    assert ["passed" in line for line in held] == [True, False]
    assert "the baseline waits" in held[1]
    unknown = with_cpu(busy_run, "baseline", cpu_s=None, caller_cpu_s=None)
    assert "| busy arms | not checked |" in gates(Runs([unknown])).markdown
