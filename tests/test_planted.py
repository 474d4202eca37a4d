"""Planted faults, end to end: decoders that pad, end at once, stop early or loop, timed and scored like any other.

All of them are many times as fast as the baseline. Beside them one that gives the baseline's own answers without
computing them, which is what a speedup should look like. The clock counts forwards, so that no machine's mood matters.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.planted_decoders import KIND, TRICKS, Forwards, remember
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.compare import QualityPoint, Runs, SpeedPoint
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.speed.workloads import make_calls
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import Claim, OperatingPoint, Prompt, Quantity, Verdict
from twotower_eval.resources import data_path

TASKS = ("miniature_sort", "miniature_recall")
NUM_PROMPTS, BATCH, BUDGET = 32, 4, 96  # 8 calls: fewer of sampled prompts support nothing
SETTING = {
    "tasks": TASKS, "num_prompts": NUM_PROMPTS, "batch_sizes": (BATCH,), "min_rounds": 12, "warmup_rounds": 0,
    "new_tokens": BUDGET, "costs": False, "threads": 1, "probes": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def clock() -> Iterator[Forwards]:
    forwards = Forwards()
    with pytest.MonkeyPatch.context() as patch:
        forwards.watch(patch)
        yield forwards


def measure(plan: SpeedPlan, clock: Forwards, root: Path) -> store.Run:
    requests = suites.build_requests(suites.resolve_tasks(TASKS))
    path = speed.run(plan, requests, root=root, now=clock)
    return store.load(harness.score_journal(path) if plan.workload == "answer" else path)


def remember_prompts_of(plan: SpeedPlan) -> None:
    """Tell the decoders what the baseline answers to the prompts that a plan takes."""
    model = load_model(data_path("miniature", "pair"))
    [calls] = make_calls(plan, suites.build_requests(suites.resolve_tasks(TASKS))).values()
    texts = [request.text for call in calls for request in call.requests]
    prompts = [Prompt(id=text, token_ids=model.tokenizer.encode(text)) for text in texts]
    with torch.inference_mode():
        answers = make_decoder(model, "autoregressive").generate(
            prompts, max_new_tokens=BUDGET, eos_token_ids=model.eos_token_ids
        )
    remember({prompt.token_ids: answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)})


@pytest.fixture(scope="module")
def planted(clock: Forwards, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """All tricks in one run of the answer workload on the shipped pair."""
    plan = SpeedPlan(decoder=KIND, block_sizes=tuple(TRICKS), **SETTING)  # type: ignore[arg-type]
    remember_prompts_of(plan)
    return measure(plan, clock, tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def broken(clock: Forwards, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """Blocks of 64 in 4 steps on a pair trained with blocks of 16."""
    plan = SpeedPlan(block_sizes=(64,), steps=(4,), **{**SETTING, "min_rounds": 3})  # type: ignore[arg-type]
    return measure(plan, clock, tmp_path_factory.mktemp("broken"))


def points(run: store.Run) -> dict[str, tuple[SpeedPoint, QualityPoint]]:
    runs = Runs([run])
    found = {}
    for point in runs.speed:
        quality = next(q for q in runs.quality if q.candidate == point.candidate)
        found[TRICKS.get(int(point.candidate.decoder.params["block_size"] or 0), "block")] = (point, quality)
    return found


# What claims make of it


def verdicts(run: store.Run, quantity: Quantity, expected: float = 1.5) -> dict[str, Verdict]:
    """A claim of that speedup for every point of a run, judged on the run alone."""
    found = {}
    for cell in run.manifest.cells:
        if cell.arm == "candidate":
            decoder, work = cell.decoder, cell.workload
            claim = Claim(
                name="fast", quantity=quantity, subject=cell.checkpoint.name, baseline="context-tower", source="us",
                point=OperatingPoint(
                    name="here", decoder=decoder, batch_size=work.batch_size, num_devices=1, workload=work.kind,
                ),
                expected=expected, margin=0.05,
            )  # fmt: skip
            (found[TRICKS.get(int(decoder.params["block_size"] or 0), "block")],) = judge([claim], [run])
    return found


@pytest.mark.parametrize("quantity", ["speedup_time", "speedup_throughput"])
def test_no_trick_ever_gains_a_supported_speedup_and_honesty_does(planted: store.Run, quantity: Quantity) -> None:
    found = verdicts(planted, quantity)
    assert found.pop("honest").outcome == "SUPPORTED"
    assert {trick: verdict.outcome for trick, verdict in found.items() if verdict.outcome == "SUPPORTED"} == {}
    for trick in ("pads", "writes padding as spaces", "emits EOS", "loops", "answers, then loops"):
        assert found[trick].outcome == "INVALID"
        assert "fast and broken" in found[trick].reason
    for trick in ("stops early", "stops early after padding"):
        assert found[trick].outcome == "INVALID"
        assert "floor" in found[trick].reason


def test_a_block_of_64_is_judged_invalid_as_fast_and_broken(broken: store.Run) -> None:
    verdict = verdicts(broken, "speedup_time")["block"]
    assert verdict.outcome == "INVALID"
    assert "fast and broken" in verdict.reason
    assert verdict.estimate is not None
    assert verdict.estimate.low > 1.5  # fast it is


def test_a_fixed_number_of_tokens_supports_no_speedup_by_itself(
    planted: store.Run, clock: Forwards, tmp_path: Path
) -> None:
    """With EOS ignored every output is padding after its end; without answers of the same point nothing is known."""
    assert planted.complete
    fixed = {**SETTING, "num_prompts": 8, "min_rounds": 2, "new_tokens": 24}
    plan = SpeedPlan(decoder=KIND, block_sizes=tuple(TRICKS), workload="fixed", **fixed)  # type: ignore[arg-type]
    remember_prompts_of(plan)
    found = verdicts(measure(plan, clock, tmp_path), "speedup_time")
    assert {verdict.outcome for verdict in found.values()} <= {"INCONCLUSIVE", "INVALID"}


# What the evidence says


def test_every_trick_is_fast_and_only_the_honest_one_is_right(planted: store.Run) -> None:
    found = points(planted)
    assert set(found) == set(TRICKS.values())
    for trick, (point, quality) in found.items():
        assert point.time.estimate is not None
        # Of 32 prompts one in ten of the rest may run to the budget: the interval leaves room for that.
        assert point.time.estimate.value > 2, trick
        assert point.time.estimate.low > 1, trick
        retention = quality.headline.estimate
        assert retention is not None
        if trick == "honest":
            assert (retention.value, point.flagged.candidate) == (1.0, point.flagged.baseline)
            assert point.length.estimate is not None
            assert point.length.estimate.value == 1.0
        else:
            assert retention.high < 0.5, trick


@pytest.mark.parametrize(
    ("trick", "flag"),
    [
        ("pads", "periodic_tail"), ("writes padding as spaces", "periodic_tail"), ("emits EOS", "empty"),
        ("loops", "periodic_tail"), ("answers, then loops", "junk_after_answer"),
    ],
)  # fmt: skip
def test_loops_and_padding_are_flagged_and_leave_no_clean_speedup(planted: store.Run, trick: str, flag: str) -> None:
    point, _ = points(planted)[trick]
    assert point.flagged.candidate is not None
    assert point.flagged.candidate > 0.9
    assert point.flagged.by_flag[flag][1] > 0.9 * point.flagged.num_outputs
    assert point.flagged.difference.estimate is not None
    assert point.flagged.difference.estimate.low > 0.5
    assert point.clean.time.estimate is None or point.clean.num_calls <= 1
    assert point.clean.dropped_candidate is not None
    assert point.clean.dropped_candidate > 0.8


def test_ends_that_come_too_early_show_in_length_and_throughput(planted: store.Run) -> None:
    """No flag needed: there is nothing wrong with the text but that most of it is missing."""
    point, quality = points(planted)["stops early"]
    assert point.length.estimate is not None
    assert point.length.estimate.high < 0.9
    assert "lengths_differ" in {one.kind for one in point.warnings}
    assert quality.clean.headline.estimate is not None
    assert quality.clean.headline.estimate.value == 0.0


def test_a_block_of_64_on_a_pair_trained_with_16_is_fast_and_broken(broken: store.Run) -> None:
    point, quality = points(broken)["block"]
    assert point.time.estimate is not None
    assert point.time.estimate.low > 2
    assert quality.headline.estimate is not None
    assert quality.headline.estimate.high < 0.5
    assert {sample.candidate.score for sample in point.samples} == {0.0}
    assert point.counts.forced_share is not None
    assert point.counts.forced_share > 0.2
