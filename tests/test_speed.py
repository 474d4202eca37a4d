"""Timing: rounds, interleaving, the A/A null, workloads, the clock, resume, and what is journalled. No test waits."""

import dataclasses
import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_decoder import DECODING_S, FIRST_S, PREFILL_S, REST_S, TIME
from tests.tiny_pair import write_pair
from twotower_eval import cli, store
from twotower_eval.analyse.compare.consistency import contradictions
from twotower_eval.analyse.compare.timing import speed_points
from twotower_eval.engine.decoders import decoder_spec, from_spec
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.arms import load_arms
from twotower_eval.engine.models.tokenizer import Tokenizer
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.speed.clock import CallClock, Devices, TimedModel, torch_threads
from twotower_eval.measure.speed.workloads import encode_calls, make_calls, untimed_tasks_text
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_files import plan_from_json
from twotower_eval.progress import Advance, SilentProgress
from twotower_eval.records import Prompt, SpeedSample, canonical_json, sha256_text

TASKS = ("miniature_sort", "miniature_recall")
SLEEPY = "tests.fake_decoder:Sleepy"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def requests() -> list[suites.TimedPrompt]:
    return suites.build_requests(suites.resolve_tasks(TASKS))


@pytest.fixture
def plan(pair: Path) -> SpeedPlan:
    return SpeedPlan(
        model=str(pair), tasks=TASKS, block_sizes=(4,), thresholds=(0.1, 0.9), batch_sizes=(1, 2), num_prompts=4,
        new_tokens=6, min_rounds=3, probes=0,
    )  # fmt: skip


@pytest.fixture
def sleepy(plan: SpeedPlan, monkeypatch: pytest.MonkeyPatch) -> SpeedPlan:
    """The plan with the fake decoder; turning tokens into text takes the fake clock very long."""
    plain = Tokenizer.decode

    def slow(self: Tokenizer, token_ids: Any) -> str:
        TIME.sleep(DECODING_S)
        return plain(self, token_ids)

    monkeypatch.setattr(Tokenizer, "decode", slow)
    return dataclasses.replace(plan, decoder=SLEEPY, block_sizes=None, thresholds=None, costs=False)


@pytest.fixture(scope="module")
def answered(pair: Path, requests: list[suites.TimedPrompt], tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """A run of the answer workload, two warm-ups."""
    plan = SpeedPlan(
        model=str(pair), tasks=TASKS, block_sizes=(4,), thresholds=(0.1, 0.9), batch_sizes=(1, 2), num_prompts=4,
        new_tokens=6, min_rounds=3, warmup_rounds=2, probes=0,
    )  # fmt: skip
    return store.load(speed.run(plan, requests, root=tmp_path_factory.mktemp("results")))


def by_round(run: store.Run) -> dict[tuple[str, str, int], list[SpeedSample]]:
    rounds: dict[tuple[str, str, int], list[SpeedSample]] = defaultdict(list)
    for sample in run.speed:
        rounds[sample.launch_id, sample.phase, sample.round].append(sample)
    return rounds


def lane(sample: SpeedSample) -> tuple[str, int]:
    return (sample.cell, sample.replica)


class Interrupting(SilentProgress):
    """Ctrl-C after so many timed calls."""

    def __init__(self, num_calls: int) -> None:
        self.left = num_calls
        self.notes: list[str] = []

    @contextmanager
    def track(self, total: int, description: str) -> Iterator[Any]:
        def advance(num: int = 1, /) -> None:
            self.left -= num
            if self.left == 0:
                raise KeyboardInterrupt

        yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)


# Rounds


def test_every_round_has_every_lane_on_every_call(answered: store.Run) -> None:
    assert answered.complete
    assert [cell.arm for cell in answered.manifest.cells] == ["baseline", "candidate", "candidate"] * 2
    rounds = by_round(answered)
    assert Counter(phase for _, phase, _ in rounds) == {"warmup": 2, "measure": 3}
    expected = {
        (cell.id, replica, f"b{cell.workload.batch_size}-{call}")
        for cell in answered.manifest.cells
        for replica in ((0, 1) if cell.arm == "baseline" else (0,))
        for call in range(4 // (cell.workload.batch_size or 1))
    }
    assert len(expected) == 4 * 4 + 4 * 2
    for samples in rounds.values():
        assert len(samples) == len(expected)
        assert {(*lane(s), s.call_id) for s in samples} == expected


def test_the_baseline_is_timed_against_itself_once_per_batch_size(answered: store.Run) -> None:
    cells = answered.cells
    copies = {lane(s) for s in answered.speed if s.replica == 1}
    assert sorted((cells[cell].arm, cells[cell].workload.batch_size) for cell, _ in copies) == [
        ("baseline", 1),
        ("baseline", 2),
    ]
    assert {cells[cell].decoder.kind for cell, _ in copies} == {"autoregressive"}


def test_a_call_is_the_same_prompts_for_every_lane_and_round(answered: store.Run) -> None:
    prompts = defaultdict(set)
    for sample in answered.speed:
        prompts[sample.call_id].add(tuple(prompt.prompt_id for prompt in sample.prompts))
    assert all(len(found) == 1 for found in prompts.values())
    by_size = [
        sorted(p for call, [ids] in prompts.items() if call.startswith(size) for p in ids) for size in ("b1", "b2")
    ]
    assert by_size[0] == by_size[1], "all batch sizes time the same prompts"
    assert len(by_size[0]) == len(set(by_size[0])) == 4


def test_lanes_take_turns_on_a_call_in_an_order_that_differs_between_rounds(answered: store.Run) -> None:
    orders = []
    for samples in by_round(answered).values():
        calls = [sample.call_id for sample in samples]
        runs = [call for at, call in enumerate(calls) if at == 0 or calls[at - 1] != call]
        assert len(runs) == len(set(calls)), "all lanes of a call stand together"
        orders.append(tuple((*lane(sample), sample.call_id) for sample in samples))
    assert len(set(orders)) == len(orders)
    firsts = {sample.cell for samples in by_round(answered).values() for sample in samples[:1]}
    assert len(firsts) > 1


def test_the_order_is_that_of_the_seed(sleepy: SpeedPlan, requests: Any, tmp_path: Path) -> None:
    def order(seed: int) -> list[Any]:
        plan = dataclasses.replace(sleepy, seed=seed)
        run = store.load(speed.run(plan, requests, root=tmp_path, now=TIME))
        return [(*lane(sample), sample.call_id) for sample in run.speed]

    assert order(1) == order(1) != order(2)


def test_rounds_go_on_until_both_minima_hold(sleepy: SpeedPlan, requests: Any, tmp_path: Path) -> None:
    round_s = (4 + 2) * (PREFILL_S + FIRST_S + REST_S)
    notes = Interrupting(-1)
    for min_rounds, min_seconds, expected in ((4, 0.0, 4), (1, 2.5 * round_s, 3), (2, 1.0, 2)):
        plan = dataclasses.replace(sleepy, min_rounds=min_rounds, min_seconds=min_seconds)
        run = store.load(speed.run(plan, requests, root=tmp_path, now=TIME, progress=notes))
        assert Counter(phase for _, phase, _ in by_round(run)) == {"warmup": 1, "measure": expected}
        measured = [event for event in run.events if event["kind"] == "measured"]
        assert [event["num_rounds"] for event in measured] == [expected]
        assert measured[0]["timed_s"] == pytest.approx(expected * round_s)
    first = next(note for note in notes.notes if not note.startswith("auto: "))
    assert first.startswith("4 cells and 2 copies of the baseline, answer workload, batch sizes 1, 2; 4 prompts")
    assert any(note.startswith("estimated duration: about ") for note in notes.notes)


@pytest.mark.parametrize("probes", [0, 2])
def test_the_progress_ends_at_what_was_announced(probes: int, sleepy: SpeedPlan, requests: Any, tmp_path: Path) -> None:
    class Counting(SilentProgress):
        def __init__(self) -> None:
            self.totals: dict[str, int] = {}
            self.counts: Counter[str] = Counter()
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

        @contextmanager
        def track(self, total: int, description: str) -> Iterator[Advance]:
            self.totals[description] = total

            def advance(num: int = 1, /) -> None:
                self.counts[description] += num

            yield advance

    progress = Counting()
    plan = dataclasses.replace(sleepy, min_rounds=3, warmup_rounds=1, probes=probes)
    run = store.load(speed.run(plan, requests, root=tmp_path, now=TIME, progress=progress))
    assert progress.totals == progress.counts
    timed = Counter(sample.phase for sample in run.speed)
    measured = timed["measure"] + timed["probe"]
    assert progress.totals == {"warm-up": timed["warmup"], "measure": measured}
    fresh = f" and {timed['probe']} calls on new prompts (--probes)" if probes else ""
    assert (
        f"warm-up: {timed['warmup']} calls in 1 round; measure: {timed['measure']} timed calls{fresh} in 3 rounds, "
        f"{measured:,} in all; fewer: --num-prompts, --min-rounds"
    ) in progress.notes


def test_tasks_without_a_timed_prompt_are_told_first(sleepy: SpeedPlan, requests: Any) -> None:
    others = [dataclasses.replace(request, task=f"task {n}") for n, request in enumerate(requests[:4])]
    plan = dataclasses.replace(sleepy, num_prompts=2, batch_sizes=(1,))
    assert untimed_tasks_text(plan, others) == (
        "warning: 2 prompts of 4 tasks: not timed: task 2, task 3; to time every task, take --num-prompts 4 or more"
    )
    assert untimed_tasks_text(dataclasses.replace(plan, num_prompts=4), others) == ""
    assert untimed_tasks_text(dataclasses.replace(plan, num_prompts=None), others) == ""


# The clock


def test_known_times_are_measured_right_and_text_costs_nothing(
    sleepy: SpeedPlan, requests: Any, tmp_path: Path
) -> None:
    run = store.load(speed.run(sleepy, requests, root=tmp_path, now=TIME))
    candidates = [sample for sample in run.speed if run.cells[sample.cell].arm == "candidate"]
    assert len(candidates) == 6 * 4
    for sample in candidates:
        assert sample.wall_s == pytest.approx(PREFILL_S + FIRST_S + REST_S)
        assert sample.prefill_s == pytest.approx(PREFILL_S)
        assert sample.first_output_s == pytest.approx(PREFILL_S + FIRST_S)
        assert sample.prompts[0].finish_s == pytest.approx(PREFILL_S + FIRST_S)
        assert [p.finish_s for p in sample.prompts[1:]] == pytest.approx([sample.wall_s] * (sample.batch_size - 1))
    # The baseline moves the fake clock only by turning tokens into text.
    assert {sample.wall_s for sample in run.speed if run.cells[sample.cell].arm == "baseline"} == {0.0}


def test_a_decoder_that_does_not_say_when_finished_at_the_end_of_the_call(
    sleepy: SpeedPlan, requests: Any, tmp_path: Path
) -> None:
    plan = dataclasses.replace(sleepy, decoder="tests.fake_decoder:Silent")
    run = store.load(speed.run(plan, requests, root=tmp_path, now=TIME))
    candidates = [sample for sample in run.speed if run.cells[sample.cell].arm == "candidate"]
    assert {p.finish_s - sample.wall_s for sample in candidates for p in sample.prompts} == {0.0}


def test_reading_the_clock_waits_for_every_device_on_both_sides(monkeypatch: pytest.MonkeyPatch, pair: Path) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(str(device)))

    def now() -> float:
        log.append("now")
        return 0.0

    clock = CallClock(Devices(("cuda:0", "cpu", "cuda:1")), now)
    clock()
    with clock.stopped():
        log.append("text")
    assert log == ["cuda:0", "cuda:1", "now", "cuda:0", "cuda:1", "now", "text", "now"]
    log.clear()
    model = TimedModel(load_model(pair), clock)
    context = model.prefill(torch.tensor([[5, 6]]))
    model.extend(context, torch.tensor([[7]]))
    model.extend(context, torch.tensor([[7]]))
    assert log == ["cuda:0", "cuda:1", "now"] * 2, "once after the prefill, once before the first extension"


def test_peak_memory_is_asked_of_the_driver_or_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Devices(("cpu",)).peak_memory() == (None, "not measured on a CPU")
    reset: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: reset.append(str(device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10 + device.index)
    devices = Devices(("cuda:0", "cuda:1"))
    devices.forget_peak()
    assert reset == ["cuda:0", "cuda:1"]
    assert devices.peak_memory() == (21, None)


def test_a_device_that_nobody_can_wait_for_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot wait for a device of type 'xpu'"):
        Devices(("cpu", "xpu"))


def test_the_collector_and_the_threads_are_put_back(sleepy: SpeedPlan, requests: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        run = store.load(speed.run(dataclasses.replace(sleepy, threads=1), requests, root=tmp_path, now=TIME))
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert run.manifest.machine["num_threads"] == 1
    assert gc.isenabled()  # the fake decoder has seen it off


# Workloads


def test_fixed_makes_exactly_so_many_tokens_whatever_the_model_says(requests: Any, tmp_path: Path) -> None:
    # All tokens but one end the text, so that only a decoder which ignores EOS gets anywhere.
    pair = write_pair(tmp_path / "pair", eos_token_id=list(range(1, 112)))
    plan = SpeedPlan(
        model=str(pair), tasks=TASKS, workload="fixed", new_tokens=7, prompt_tokens=50, block_sizes=(4,),
        batch_sizes=(2,), num_prompts=4, min_rounds=2, warmup_rounds=0, probes=0,
    )  # fmt: skip
    run = store.load(speed.run(plan, requests, root=tmp_path))
    assert len(run.speed) == 2 * 2 * 3
    prompts = [prompt for sample in run.speed for prompt in sample.prompts]
    assert {(p.num_tokens, p.num_prompt_tokens, p.finish) for p in prompts} == {(7, 50, "length")}
    by_arm = {p.num_discarded_tokens for s in run.speed if run.cells[s.cell].arm == "candidate" for p in s.prompts}
    assert by_arm == {1}, "two blocks of four for seven tokens"
    assert run.generations == []
    answer = dataclasses.replace(plan, workload="answer", prompt_tokens=None)
    stopped = store.load(speed.run(answer, requests, root=tmp_path))
    assert {p.finish for sample in stopped.speed for p in sample.prompts} == {"eos"}
    with pytest.raises(ValueError, match="timed the 'fixed' workload"):
        harness.score_journal(run.path)


@pytest.mark.parametrize("num_tokens", [1, 30, 5000])
def test_fixed_prompts_are_natural_text_of_exact_length(pair: Path, requests: Any, num_tokens: int) -> None:
    plan = SpeedPlan(workload="fixed", new_tokens=8, prompt_tokens=num_tokens, num_prompts=6, batch_sizes=(3,))
    model = load_model(pair)
    model.max_length = None
    some = requests[:8]
    calls = make_calls(plan, some)
    ids = [row for rows in encode_calls(plan, calls, some, model).values() for row in rows]
    assert {len(row) for row in ids} == {num_tokens}
    if num_tokens > 1:
        assert len(set(ids)) == 6, "different prompts"
    text = model.tokenizer.decode(ids[0])
    joined = "\n".join(request.text for request in some) * (num_tokens // 100 + 1)
    assert joined.startswith(text[: len(some[0].text) + 5])


def test_prompts_and_sampled_answers_are_those_of_an_evaluation(pair: Path, tmp_path: Path, requests: Any) -> None:
    shared: dict[str, Any] = {"model": str(pair), "tasks": TASKS, "temperature": 1.0, "seed": 5, "block_sizes": (4,)}
    evaluated = store.load(harness.run(RunPlan(**shared, samples=2, limit=2, max_new_tokens=6), root=tmp_path))
    timed = store.load(
        speed.run(
            SpeedPlan(**shared, num_prompts=4, batch_sizes=(2,), new_tokens=6, min_rounds=2),
            requests[:4],
            root=tmp_path,
        )
    )

    def answers(run: store.Run) -> dict[Any, Any]:
        return {
            (run.cells[r.cell].arm, r.task, r.doc_id, r.repeat): (
                r.prompt_sha256,
                r.generation.token_ids,
                r.generation.num_prompt_tokens,
            )
            for r in run.generations
        }

    assert len(answers(timed)) == 2 * 4 * 2
    assert answers(timed) == answers(evaluated)


def test_calls_of_an_answer_share_task_stops_and_budget(requests: Any) -> None:
    calls = make_calls(SpeedPlan(tasks=TASKS, batch_sizes=(2, 3), num_prompts=12), requests)
    assert [len(call.requests) for call in calls[3]] == [3] * 4
    assert [len(call.requests) for call in calls[2]] == [2] * 6
    for call in (call for of_size in calls.values() for call in of_size):
        assert len({(r.task, r.stop, r.max_new_tokens) for r in call.requests}) == 1
        assert call.max_new_tokens == call.requests[0].max_new_tokens
        assert not call.ignore_eos
    assert {r.task for call in calls[3] for r in call.requests} == set(TASKS), "tasks take turns"
    flat = [[r.prompt_sha256 for call in of_size for r in call.requests] for of_size in calls.values()]
    assert flat[0] == flat[1]


def test_prompts_that_do_not_fit_whole_batches_are_refused(requests: Any) -> None:
    with pytest.raises(ValueError, match="16 prompts cannot be cut into whole batches of 4, 12: take --num-prompts 24"):
        make_calls(SpeedPlan(batch_sizes=(4, 12), num_prompts=16), requests)
    with pytest.raises(ValueError, match="9 prompts wanted in batches of 3 from one task, the tasks give 6"):
        make_calls(SpeedPlan(batch_sizes=(3,), num_prompts=9), requests[:10])
    with pytest.raises(ValueError, match="16 prompts wanted, the tasks give 10: name more tasks"):
        make_calls(SpeedPlan(workload="fixed", new_tokens=4, num_prompts=16), requests[:10])


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt of which nothing counts but its task and its length."""

    task: str
    doc_id: int
    text: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 8


def test_timed_prompts_are_spread_over_the_lengths_of_all_of_a_task() -> None:
    """The first of a task were taken, which here are its shortest."""
    asked: Any = [Asked(task, i, "x" * (i + 1)) for i in range(96) for task in "ab"]
    for size in (2, 4):
        calls = make_calls(SpeedPlan(batch_sizes=(1, size), num_prompts=16), asked)
        chosen = [request for call in calls[size] for request in call.requests]
        assert [r.task for r in chosen[::size]] == ["a", "b"] * (8 // size), "tasks take turns"
        assert [r.doc_id for r in chosen if r.task == "b"] == list(range(0, 96, 12)), "of each stratum the first"
    shuffled: Any = [Asked("a", i, "x" * (1 + i * 37 % 96)) for i in range(96)]
    lengths = sorted(len(c.requests[0].text) for c in make_calls(SpeedPlan(num_prompts=8), shuffled)[1])
    assert [(length - 1) // 12 for length in lengths] == list(range(8))


def test_the_default_number_takes_what_there_is_in_whole_batches(requests: Any) -> None:
    for num, size, expected in ((10, 1, 10), (11, 4, 8), (1_000, 5, 385)):
        asked: Any = [Asked("a", i, "x" * (1 + i % 7)) for i in range(num)]
        calls = make_calls(SpeedPlan(batch_sizes=(size,)), asked)[size]
        assert len({r.doc_id for call in calls for r in call.requests}) == expected
        fixed = SpeedPlan(batch_sizes=(size,), workload="fixed", new_tokens=4)
        assert sum(len(call.requests) for call in make_calls(fixed, asked)[size]) == expected
    with pytest.raises(ValueError, match="384 prompts wanted, the tasks give 164: name more tasks"):  # it was 164
        make_calls(SpeedPlan(num_prompts=384), [Asked("a", i, "x") for i in range(164)])  # type: ignore[misc]
    with pytest.raises(ValueError, match="384 prompts cannot be cut into whole batches of 5: take --num-prompts 385"):
        make_calls(SpeedPlan(num_prompts=384, batch_sizes=(5,)), [])
    with pytest.raises(ValueError, match="384 prompts wanted in batches of 4 from one task, the tasks give 0"):
        make_calls(SpeedPlan(batch_sizes=(4,)), [Asked("a", 0, "x")])  # type: ignore[list-item]


def test_what_does_not_fit_the_model_is_refused(pair: Path, requests: Any, tmp_path: Path) -> None:
    model = load_model(pair)
    long = SpeedPlan(workload="fixed", new_tokens=97, prompt_tokens=4000, num_prompts=1)
    with pytest.raises(ValueError, match="4097 tokens of prompt and output do not fit into 4096 tokens of pair"):
        encode_calls(long, make_calls(long, requests), requests, model)
    greedy = SpeedPlan(new_tokens=4096, num_prompts=1)
    with pytest.raises(ValueError, match="4096 new tokens leaves no room for the prompt in the model's 4096"):
        encode_calls(greedy, make_calls(greedy, requests), requests, model)
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer files"):
        encode_calls(greedy, make_calls(greedy, requests), requests, model)
    assert not store.find_runs(tmp_path)


def test_a_decoder_that_makes_another_number_of_tokens_is_no_fixed_workload(
    sleepy: SpeedPlan, requests: Any, tmp_path: Path
) -> None:
    plan = dataclasses.replace(sleepy, workload="fixed", decoder="tests.fake_decoder:Short")
    with pytest.raises(ValueError, match="made 5 tokens where exactly 6 were asked for"):
        speed.run(plan, requests, root=tmp_path, now=TIME)


def test_out_of_memory_names_the_cell(sleepy: SpeedPlan, requests: Any, tmp_path: Path) -> None:
    plan = dataclasses.replace(sleepy, decoder="tests.fake_decoder:Hungry")
    with pytest.raises(ValueError, match=r"candidate .*Hungry, batch size [12]: out of memory"):
        speed.run(plan, requests, root=tmp_path, now=TIME)
    [path] = store.find_runs(tmp_path)
    run = store.load(path)
    assert not run.complete
    assert run.events[-1]["kind"] == "failed"
    assert gc.isenabled()


# What is written


def test_counts_are_those_of_the_journalled_answers(answered: store.Run) -> None:
    measured = [s for s in answered.speed if s.phase == "measure" and s.replica == 0]
    timed = {(sample.cell, prompt.prompt_id, sample.round): prompt for sample in measured for prompt in sample.prompts}
    rows = {(r.cell, f"{r.task}/{r.doc_id}", r.repeat): r.generation for r in answered.generations}
    assert rows.keys() == timed.keys()
    assert len(rows) == 6 * 4 * 3
    for key, generation in rows.items():
        prompt = timed[key]
        assert prompt.tokens_sha256 == sha256_text(canonical_json(list(generation.token_ids)))
        for name in (f.name for f in dataclasses.fields(prompt)):
            if name not in ("tokens_sha256", "num_recounted", "served", "num_lookup_passes"):  # computed beside it
                assert getattr(prompt, name) == getattr(generation, name), name
    for sample in measured:
        assert sample.batch_size == len(sample.prompts) == answered.cells[sample.cell].workload.batch_size
        finishes_s = [prompt.finish_s for prompt in sample.prompts]
        assert sample.prefill_s is not None
        assert sample.first_output_s is not None
        assert 0 < sample.prefill_s < sample.first_output_s <= sample.wall_s
        # Counted from the decoder's own start, a moment later.
        assert 0 < min(finishes_s) <= max(finishes_s) <= sample.wall_s
        assert (sample.peak_memory_bytes, sample.peak_memory_reason) == (None, "not measured on a CPU")


def test_timed_tokens_do_not_depend_on_batch_round_or_copy(answered: store.Run) -> None:
    hashes = defaultdict(set)
    for sample in answered.speed:
        for prompt in sample.prompts:
            hashes[answered.cells[sample.cell].decoder.label, prompt.prompt_id].add(prompt.tokens_sha256)
    assert len(hashes) == 3 * 4
    assert all(len(found) == 1 for found in hashes.values())


def test_the_arms_share_the_tensors_and_say_so(answered: store.Run, pair: Path) -> None:
    baseline, candidate = load_arms(pair, None, dtype="float32", devices=("cpu",))
    assert baseline is candidate.context_tower
    cells = answered.manifest.cells
    assert {cell.checkpoint.tower for cell in cells if cell.arm == "baseline"} == {"context"}
    assert {cell.checkpoint.digest for cell in cells if cell.arm == "candidate"} == {candidate.checkpoint.digest}
    assert plan_from_json(SpeedPlan, answered.manifest.plan).warmup_rounds == 2


def test_a_baseline_of_its_own(plan: SpeedPlan, requests: Any, tmp_path: Path) -> None:
    other = write_pair(tmp_path / "other", seed=3)
    plan = dataclasses.replace(plan, baseline=str(other), min_rounds=1, warmup_rounds=0)
    run = store.load(speed.run(plan, requests, root=tmp_path))
    assert {cell.checkpoint.source for cell in run.manifest.cells if cell.arm == "baseline"} == {str(other)}
    itself = dataclasses.replace(
        plan, baseline=str(plan.model), decoder="autoregressive", block_sizes=None, thresholds=None
    )
    alone = store.load(speed.run(itself, requests, root=tmp_path))
    assert [cell.arm for cell in alone.manifest.cells] == ["baseline"] * 2, "an AR model against itself is one cell"
    assert {sample.replica for sample in alone.speed} == {0, 1}


def test_timed_answers_are_scored_afterwards(answered: store.Run) -> None:
    assert answered.scores == []
    scored = store.load(harness.score_journal(answered.path))
    assert scored.complete
    asked = {(r.cell, r.task, r.doc_id) for r in answered.generations}
    assert {(s.cell, s.task, s.doc_id) for s in scored.scores} == asked
    assert all(s.value is not None and s.scored_by == "generation" for s in scored.scores)


def test_the_verb_times_scores_and_prints_the_folder(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--batch-sizes 1,2 --block-sizes 4 --num-prompts 2 --min-rounds 2 --new-tokens 4 --threads 1 --probes 0"
    argv = ["speed", "--model", str(pair), "--tasks", "miniature_sort", *options.split(), "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    run = store.load(Path(capsys.readouterr().out.strip()))
    assert run.complete
    assert len(run.speed) == (1 + 2) * (3 * 2 + 3 * 1)
    assert {score.cell for score in run.scores} == set(run.cells)
    points, gaps = speed_points([run])
    assert gaps == ()
    assert [(point.batch_size, point.num_rounds, point.num_calls) for point in points] == [(1, 2, 2), (2, 2, 1)]
    # One call a round says nothing of other prompts.
    assert [point.null.estimate is not None for point in points] == [True, False]


# Interruptions


@pytest.mark.parametrize("num_calls", [1, 6 + 8, 6 + 12 + 5])
def test_an_interrupted_run_goes_on_with_a_new_round(
    sleepy: SpeedPlan, requests: Any, tmp_path: Path, num_calls: int
) -> None:
    plan = dataclasses.replace(sleepy, batch_sizes=(2,))
    per_round = 3 * 2
    with pytest.raises(KeyboardInterrupt):
        speed.run(plan, requests, root=tmp_path, now=TIME, progress=Interrupting(num_calls))
    [path] = store.find_runs(tmp_path)
    before = store.load(path)
    assert not before.complete
    assert len(before.speed) == num_calls
    assert speed.run(plan, requests, root=tmp_path, resume=path, now=TIME) == path
    run = store.load(path)
    assert run.complete
    assert {one.kind for one in contradictions(run)} <= {"calls overlap"}, "its clock is made up"
    assert run.speed[:num_calls] == before.speed
    assert len({sample.launch_id for sample in run.speed}) == 2
    rounds = {key: samples for key, samples in by_round(run).items() if key[1] == "measure"}
    whole = [number for (_, _, number), samples in rounds.items() if len(samples) == per_round]
    assert len(whole) == len(set(whole)) == 3
    numbers = [number for _, _, number in rounds]
    assert len(numbers) == len(set(numbers)), "no number twice, so that no answer is journalled twice"
    second = run.manifest.run_id + "/2"
    assert sum(s.phase == "warmup" and s.launch_id == second for s in run.speed) == per_round, "warmed up again"
    assert speed.run(plan, requests, root=tmp_path, resume=path, now=TIME) == path
    assert len(store.load(path).speed) == len(run.speed), "there is nothing left to do"


def test_a_scored_run_takes_no_more_rounds(plan: SpeedPlan, requests: Any, tmp_path: Path) -> None:
    """Scores are means over a run's rounds and cannot be changed: rounds added later were timed but never scored."""
    plan = dataclasses.replace(plan, min_rounds=1, warmup_rounds=0, costs=False)
    path = speed.run(plan, requests, root=tmp_path)
    more = dataclasses.replace(plan, min_rounds=2)
    assert speed.run(more, requests, root=tmp_path, resume=path) == path  # not scored yet
    harness.score_journal(path)
    before = store.load(path)
    with pytest.raises(ValueError, match="2 rounds whose answers are scored already"):
        speed.run(dataclasses.replace(plan, min_rounds=3), requests, root=tmp_path, resume=path)
    assert plan.num_prompts is not None
    assert plan.num_prompts > 2
    with pytest.raises(ValueError, match=rf"num_prompts was {plan.num_prompts}, is 2"):  # it said 0 rounds were there
        speed.run(dataclasses.replace(more, num_prompts=2), requests, root=tmp_path, resume=path)
    after = store.load(path)
    assert after.complete
    assert (after.speed, after.scores, after.events) == (before.speed, before.scores, before.events)
    assert speed.run(more, requests, root=tmp_path, resume=path) == path  # nothing to add
    assert harness.score_journal(path) == path
    assert store.load(path).scores == before.scores


def test_a_resumed_run_must_be_the_same(plan: SpeedPlan, requests: Any, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, min_rounds=1, warmup_rounds=0)
    path = speed.run(plan, requests, root=tmp_path)
    other = dataclasses.replace(plan, thresholds=(0.5,))
    with pytest.raises(ValueError, match="no longer has cell"):
        speed.run(other, requests, root=tmp_path, resume=path)
    with (
        torch_threads(torch.get_num_threads() + 1),
        pytest.raises(ValueError, match="machine num_threads was"),
    ):
        speed.run(plan, requests, root=tmp_path, resume=path)


def test_decoders_of_all_kinds_can_be_timed(pair: Path, requests: Any, tmp_path: Path) -> None:
    for kind in ("mock_ar", "reference"):
        given: dict[str, Any] = {"decoder": kind}
        plan = SpeedPlan(
            model=str(pair), tasks=TASKS, num_prompts=1, new_tokens=3, min_rounds=1, warmup_rounds=0, **given
        )
        run = store.load(speed.run(plan, requests, root=tmp_path))
        assert {cell.decoder.kind for cell in run.manifest.cells} == {"autoregressive", kind}


def test_a_timed_model_gives_what_the_model_gives(pair: Path, requests: Any) -> None:
    model = load_model(pair)
    spec = decoder_spec("block_diffusion", block_size=4)
    plan = SpeedPlan(tasks=TASKS, num_prompts=2, batch_sizes=(2,))
    calls = make_calls(plan, requests)
    ids = encode_calls(plan, calls, requests, model)["b2-0"]
    prompts = [Prompt(id=str(row), token_ids=row) for row in ids]
    clock = CallClock(Devices(("cpu",)), TIME)
    plain, timed = (
        from_spec(m, spec).generate(prompts, max_new_tokens=9, stop=("b",)) for m in (model, TimedModel(model, clock))
    )
    assert plain == timed
