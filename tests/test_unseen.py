"""Nothing carries over between timed calls: fresh decoders, new prompts, and what remembers is found out."""

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.planted_decoders import Forwards
from tests.remembering_decoders import KIND, NUM_WARMED, TRICKS, forget
from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.claims.text import unchecked_text
from twotower_eval.analyse.compare import Runs, SpeedPoint
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.gate_facts import Probes
from twotower_eval.analyse.compare.timing import speed_points
from twotower_eval.analyse.compare.unseen import Memory, Unseen
from twotower_eval.analyse.words import fact_text, found_text
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.speed.probes import NewPrompts, is_made_up, joined, turned
from twotower_eval.measure.speed.workloads import make_calls
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import Claim, Estimate, OperatingPoint, Passes, SpeedSample, Verdict

TASKS = ("miniature_sort", "miniature_recall")
SHARED = "Solve it.\n\nQ: one and two\nA: 3\n\nQ: two and two\nA: 4\n\nQ: six and one\nA: 7\n\n"


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A request with examples before it."""

    task: str
    doc_id: int
    text: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 8
    prompt_sha256: str = ""
    task_parts: Mapping[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def requests() -> list[Any]:
    return suites.build_requests(suites.resolve_tasks(TASKS))


@pytest.fixture(scope="module")
def clock() -> Iterator[Forwards]:
    forwards = Forwards()
    with pytest.MonkeyPatch.context() as patch:
        forwards.watch(patch)
        yield forwards


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


def plan(pair: Path, **changes: Any) -> SpeedPlan:
    setting: dict[str, Any] = {
        "model": str(pair), "tasks": TASKS, "decoder": KIND, "block_sizes": tuple(TRICKS), "num_prompts": NUM_WARMED,
        "new_tokens": 8, "min_rounds": 3, "costs": False, "threads": 1,
    }  # fmt: skip
    return SpeedPlan(**{**setting, **changes})


@pytest.fixture(scope="module")
def remembered(clock: Forwards, pair: Path, requests: Any, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    root = tmp_path_factory.mktemp("remembered")
    forget(root / "memory.jsonl")
    shots = [Shot(task=r.task, doc_id=r.doc_id, text=SHARED + r.text, prompt_sha256=str(r.doc_id)) for r in requests]
    return store.load(speed.run(plan(pair), shots, root=root, now=clock))


@pytest.fixture(scope="module")
def read(remembered: store.Run) -> dict[str, SpeedPoint]:
    return points(remembered)


def points(run: store.Run) -> dict[str, SpeedPoint]:
    return {TRICKS[int(one.candidate.decoder.params["block_size"] or 0)]: one for one in Runs([run]).speed}


def verdict_of(run: store.Run, point: SpeedPoint, expected: float) -> Verdict:
    work, name = point.candidate.workload, point.candidate.checkpoint.name
    at = OperatingPoint(
        name="here", decoder=point.candidate.decoder, batch_size=work.batch_size, num_devices=1, workload="answer"
    )
    claim = Claim(
        name="fast", quantity="speedup_time", subject=name, baseline="context-tower", source="us", point=at,
        expected=expected, margin=0.05,
    )  # fmt: skip
    (found,) = judge([claim], [run])
    return found


# Verdicts


@pytest.mark.parametrize("trick", [trick for trick in TRICKS.values() if trick not in ("honest", "by itself")])
def test_whoever_remembers_is_found_out(remembered: store.Run, read: dict[str, SpeedPoint], trick: str) -> None:
    point = read[trick]
    assert point.time.estimate is not None
    if trick != "beginnings":  # whose pieces cost more than the baseline's reading at one go
        assert point.time.estimate.value > 1.5, "the memory bought a speedup"
    assert point.unseen.remembered(1.25) == ("candidate",)
    assert point.invalid
    verdict = verdict_of(remembered, point, 1.5)
    assert verdict.outcome == "INVALID"
    assert "probes: the candidate remembers earlier prompts (above 1.25x)" in verdict.reason


@pytest.mark.parametrize("trick", ["honest", "by itself"])
def test_a_memory_that_ends_with_its_round_is_none(
    remembered: store.Run, read: dict[str, SpeedPoint], trick: str
) -> None:
    point = read[trick]
    assert point.unseen.checked(1.25)
    assert point.unseen.remembered(1.25) == ()
    for found in (point.unseen.candidate.seconds, point.unseen.baseline.seconds, point.time):
        assert found.estimate is not None
        assert found.estimate.value == pytest.approx(1, abs=0.01)
    for memory in (point.unseen.baseline, point.unseen.candidate):
        assert memory.forwards.estimate is not None
        assert (memory.forwards.estimate.low, memory.forwards.estimate.high) == (1, 1)
    assert "probes" not in verdict_of(remembered, point, 1.0).reason


@pytest.mark.parametrize("trick", ["what it saw in the warm-up", "what it saw twice"])
def test_what_probes_do_not_show_is_told_by_the_forwards_of_the_first_reading(
    remembered: store.Run, trick: str
) -> None:
    found = points(remembered)[trick].unseen.candidate
    assert found.seconds.estimate is not None
    assert found.seconds.estimate.value == pytest.approx(1, abs=0.01)
    assert found.forwards.estimate is not None
    assert found.forwards.estimate.low > 1.5


def with_forwards(run: store.Run, cell: str, num_of: Callable[[SpeedSample], int]) -> store.Run:
    """The run with so many forwards in the calls of a cell, each of which takes a second; nothing else differs."""
    samples = []
    for one in run.speed:
        num = num_of(one)
        passes = (Passes(kind="extend", rows=1, tokens=1, num=num),) if num else ()
        changed = dataclasses.replace(one, passes=passes, wall_s=max(0.1, num), first_output_s=0.1, prefill_s=None)
        prompts = tuple(dataclasses.replace(p, finish_s=0.1, num_tokens=8) for p in one.prompts)
        samples.append(dataclasses.replace(changed, prompts=prompts) if one.cell == cell else one)
    cells = [one for one in run.manifest.cells if one.id == cell or one.arm == "baseline"]
    return dataclasses.replace(run, speed=samples, manifest=dataclasses.replace(run.manifest, cells=tuple(cells)))


@pytest.mark.parametrize(
    ("made_up", "document", "timed", "remembers"),
    [
        (13, 10, 10, ()),
        (25, 10, 10, ()),
        (40, 10, 10, ("candidate",)),
        (10, 13, 10, ("candidate",)),
        (8, 8, 0, ("candidate",)),
    ],
)
def test_only_far_more_forwards_on_made_up_text_are_a_memory(
    remembered: store.Run,
    read: dict[str, SpeedPoint],
    made_up: int,
    document: int,
    timed: int,
    remembers: tuple[str, ...],
) -> None:
    """A decoder that is surer of natural text was called one that remembers, by its seconds per token."""
    cell = read["honest"].candidate.id

    def num_of(sample: SpeedSample) -> int:
        return timed if sample.phase != "probe" else document if sample.held_out else made_up

    ((point,), _) = speed_points([with_forwards(remembered, cell, num_of)])
    found = point.unseen
    assert found.remembered(1.25) == remembers
    assert found.candidate.seconds.estimate is not None
    assert found.candidate.seconds.estimate.value == pytest.approx(1, abs=0.01)


def test_the_line_of_the_probes_says_what_was_compared() -> None:
    def shown(value: float, n: int) -> Measured:
        return Measured(estimate=Estimate(value=value, low=value - 0.1, high=value + 0.1, level=0.99, n=n, method="t"))

    candidate = Memory(
        seconds=shown(1.14, 30), forwards=shown(1, 64), documents=shown(0.98, 12), made_up=shown(1.29, 18),
        forward_s=shown(1.02, 30),
    )  # fmt: skip
    found = Unseen(baseline=Memory(seconds=shown(1.15, 30)), candidate=candidate, num_new=30)
    assert found.checked(1.25)
    assert fact_text(Probes(unseen=found, limit=1.25)) == (
        "repeated prompts: the candidate is 1.14x [1.04, 1.24], the baseline 1.15x [1.05, 1.25] as fast as on the "
        "first reading (limit 1.25x); the candidate makes 1.00x [0.90, 1.10] as many forwards on the first reading of "
        "timed prompts as on later ones (limit 1.25x); 12 calls on untimed documents need 0.98x [0.88, 1.08] as many "
        "forwards per token as similar timed calls (limit 1.25x); 18 calls on made-up prompts need 1.29x [1.19, 1.39] "
        "as many forwards per token as similar timed calls (limit 3x); equal forwards of the candidate take 1.02x "
        "[0.92, 1.12] as long on new prompts as on timed ones (limit 1.25x)"
    )
    remembers = dataclasses.replace(found, candidate=dataclasses.replace(candidate, forward_s=shown(1.5, 30)))
    assert fact_text(Probes(unseen=remembers, limit=1.25)).startswith(
        "the candidate remembers earlier prompts (above 1.25x): repeated "
    )


def test_a_run_of_old_is_not_checked_and_says_so(clock: Forwards, pair: Path, requests: Any, tmp_path: Path) -> None:
    forget(tmp_path / "memory.jsonl")
    without = plan(pair, probes=0, block_sizes=(1,), min_rounds=5)
    run = store.load(harness.score_journal(speed.run(without, requests, root=tmp_path, now=clock)))
    assert {sample.phase for sample in run.speed} == {"warmup", "measure"}
    (point,) = points(run).values()
    assert not point.unseen.checked(1.25)
    assert point.unseen.remembered(1.25) == ()
    verdict = verdict_of(run, point, 1.0)
    (gate,) = [gate for gate in verdict.gates if gate.kind == "probes"]
    assert (gate.outcome, found_text(gate)) == ("not_checked", "no new prompt was timed")
    supported = Verdict(claim="c", outcome="SUPPORTED", estimate=None, reason="", evidence=(), gates=verdict.gates)
    assert "probes (no new prompt was timed)" in unchecked_text(supported)


# What is timed


def test_every_cell_has_new_calls_that_come_back_in_the_next_round(remembered: store.Run) -> None:
    probes, cells = [s for s in remembered.speed if s.phase == "probe"], remembered.cells
    baseline = next(cell.id for cell in cells.values() if cell.arm == "baseline")
    calls = defaultdict(list)
    for sample in probes:
        calls[sample.call_id].append((sample.cell, sample.round))
    owners = Counter()
    for timings in calls.values():
        (owner, first), *rest = timings
        owners[owner, first] += 1
        control = [] if owner == baseline else [(baseline, first)]
        assert rest == control + ([(owner, first + 1)] if first < 2 else []), "the owner reads it before the others"
    assert owners == {(cell, number): 2 for cell in cells for number in range(3)}
    measured = {p.prompt_id for s in remembered.speed if s.phase == "measure" for p in s.prompts}
    assert measured.isdisjoint(p.prompt_id for s in probes for p in s.prompts)
    assert {sample.replica for sample in probes} == {0}
    kinds = Counter((sample.cell, sample.round, sample.held_out) for sample in probes if sample.cell != baseline)
    assert all(kinds[cell, number, False] == kinds[cell, number, True] for cell, number, _ in kinds), "in turn"


def test_probes_leave_no_answers_and_do_not_count_as_rounds(remembered: store.Run, read: dict[str, SpeedPoint]) -> None:
    assert remembered.complete
    per_round = NUM_WARMED * (len(TRICKS) + 2)
    assert Counter(s.phase for s in remembered.speed)["measure"] == 3 * per_round
    assert len(remembered.generations) == 3 * NUM_WARMED * (len(TRICKS) + 1)
    point = read["honest"]
    assert (point.num_rounds, point.num_calls) == (3, NUM_WARMED)


def test_two_launches_have_no_new_prompt_in_common(pair: Path, requests: Any) -> None:
    calls = make_calls(plan(pair), requests)
    made = []
    for seed in (1, 2):
        prompts = NewPrompts(calls, requests, seed)
        found = [prompts.similar_call(calls[1][index % 6], str(index)) for index in range(40)]
        made.append({request.text for call in found if call is not None for request in call.requests})
    assert [len(texts) for texts in made] == [40, 40]
    assert len(made[0] & made[1]) <= 1
    assert made[0].isdisjoint(request.text for request in requests)


def test_new_prompts_are_of_the_kind_and_the_length_of_those_that_are_timed(pair: Path, requests: Any) -> None:
    calls = make_calls(plan(pair, batch_sizes=(2,)), requests)
    prompts = NewPrompts(calls, requests, 0)
    for like in calls[2]:
        call = prompts.similar_call(like, "new")
        assert call is not None
        assert (call.stop, call.max_new_tokens, call.ignore_eos) == (like.stop, like.max_new_tokens, like.ignore_eos)
        for new, old in zip(call.requests, like.requests, strict=True):
            assert (new.task, new.stop, new.max_new_tokens) == (old.task, old.stop, old.max_new_tokens)
            assert abs(len(new.text) - len(old.text)) <= 3
        assert len({request.doc_id for request in call.requests}) == 2


def test_documents_that_are_not_timed_are_new_as_they_are(pair: Path, requests: Any) -> None:
    calls = make_calls(plan(pair), requests)
    timed = {request.text for call in calls[1] for request in call.requests}
    prompts, found = NewPrompts(calls, requests, 0), []
    while (call := prompts.similar_call(calls[1][0], "new", of_documents=True)) is not None and not is_made_up(call):
        found += call.requests
    assert {request.task for request in found} == {calls[1][0].requests[0].task}
    assert len({request.text for request in found}) == len(found) > 20
    assert timed.isdisjoint(request.text for request in found)
    assert {id(request) for request in found} <= {id(request) for request in requests}
    assert call is not None, "when there are none left, prompts are made up"


def test_documents_that_run_out_still_make_new_prompts(pair: Path, requests: Any) -> None:
    few = [request for request in requests if request.task == TASKS[0]][:8]
    prompts = NewPrompts(make_calls(plan(pair, tasks=TASKS[:1]), few), few, 0)
    (like, *_) = make_calls(plan(pair, tasks=TASKS[:1]), few)[1]
    made = [prompts.similar_call(like, str(index)) for index in range(30)]
    texts = {request.text for call in made if call is not None for request in call.requests}
    assert len(texts) == 30
    alone = NewPrompts({1: (like,)}, few[:1], 0)
    assert alone.similar_call(like, "none") is None, "one document cannot be joined with another"


def test_examples_that_prompts_share_come_in_another_order() -> None:
    first, second = SHARED + "Q: nine and one hundred\nA:", SHARED + "Q: four plus two hundred\nA:"
    chance = random.Random(0)
    for _ in range(20):
        text = joined(first, second, chance)
        assert text not in (first, second)
        assert len(text.split()) == len(first.split())
        assert text.endswith("hundred\nA:")
        assert not text.startswith(SHARED[:12]), "the beginning is new as well"
        assert sorted(text.rpartition("\n\n")[0].split("\n\n")) == sorted(SHARED.strip().split("\n\n"))
    assert turned("One line only.\n", chance) == "One line only.\n"
    assert turned("Do this. Then that.\n", chance) == "Then that. Do this.\n"
    assert joined("abcdef", "uvwxyz", chance)[-1] == "z"
