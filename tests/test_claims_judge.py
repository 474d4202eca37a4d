"""Verdicts on runs of known truth: what supports a claim, and everything that must keep one from being supported."""

import dataclasses
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import (
    PAIR,
    RUN_ID,
    SPEED_ID,
    Row,
    block_diffusion,
    make_cell,
    manifest,
    quality_run,
    speed_run,
    taking,
    write,
)

from twotower_eval import cli, store
from twotower_eval.analyse import stats
from twotower_eval.analyse.claims import EXIT_CODES, exit_code, judge, verdict_lines
from twotower_eval.analyse.claims.files import claims_from, load_claims
from twotower_eval.analyse.claims.looks import measuring_command
from twotower_eval.analyse.compare import SpeedPoint, fairness, gates
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.timing import speed_points
from twotower_eval.analyse.words import found_text, kind_text
from twotower_eval.analyse.words.facts import EQUAL
from twotower_eval.decoder_settings import cross_decoders
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.records import (
    Check,
    Claim,
    GateLimits,
    GenerationRow,
    Outcome,
    Score,
    SpeedSample,
    Verdict,
    Workload,
    sha256_text,
)
from twotower_eval.store import Run

POINT: dict[str, Any] = {
    "name": "here",
    "decoder": {
        "kind": "block_diffusion",
        "block_size": 16,
        "steps_per_block": "auto",
        "threshold": 0.8,
        "temperature": 0.0,
    },
    "batch_size": 1,
    "num_devices": 1,
    "workload": "answer",
}
COMMON = {"subject": "pair", "baseline": "context-tower", "point": "here", "source": "a test"}
KEPT = {"name": "kept", "quantity": "retention", "scope": ["arithmetic", "sorting"], "expected": 0.9, **COMMON}
FAST = {"name": "fast", "quantity": "speedup_time", "expected": 1.2, **COMMON}
BOTH = {"name": "both", "quantity": "joint", "parts": ["kept", "fast"], **COMMON}


def claims_of(*tables: dict[str, Any], **point: Any) -> tuple[Claim, ...]:
    return claims_from("test", {"title": "t", "point": [{**POINT, **point}], "claim": list(tables)}).claims


def verdict_on(table: dict[str, Any], runs: Sequence[Run], **point: Any) -> Verdict:
    [verdict] = judge(claims_of(table, **point), runs)
    return verdict


@pytest.mark.parametrize(
    "claim", [claim for claim in load_claims("miniature").claims if not claim.parts], ids=lambda claim: claim.name
)
def test_the_command_of_what_is_missing_measures_the_claims_point(claim: Claim, monkeypatch: Any, capsys: Any) -> None:
    """It recommended commands that never looked at the claim's baseline, tasks or settings."""
    plans: list[RunPlan | SpeedPlan] = []
    for verb in ("evaluated", "timed_and_scored"):
        monkeypatch.setattr(f"twotower_eval.api.measuring.{verb}", lambda plan, root, **_: plans.append(plan) or root)
    words = measuring_command(claim)
    assert words is not None
    assert cli.main(words[1:]) == 0
    [plan] = plans
    [decoder] = [spec for spec in cross_decoders(plan) if spec.kind == claim.point.decoder.kind]
    wanted = dict(claim.point.decoder.params)
    assert {name: value for name, value in decoder.params.items() if value or name in wanted} == wanted
    assert (plan.model, plan.baseline, plan.dtype) == (None, "context-tower", claim.point.dtype)
    if isinstance(plan, SpeedPlan):
        assert (plan.batch_sizes, plan.workload) == ((claim.point.batch_size,), claim.point.workload)
        assert len(plan.devices) == claim.point.num_devices
        assert plan.launches == 5, "what it measures is not SUPPORTED in its own launches only"
    else:
        assert plan.tasks == claim.scope


def test_what_no_option_says_is_said_by_set(good: list[Run]) -> None:
    reason = verdict_on(FAST, good[:1], decoder={**POINT["decoder"], "batch_mean_t": True}).reason
    assert "--set batch_mean_t=true` measures it" in reason
    eager = verdict_on(FAST, good[:1], decoder={**POINT["decoder"], "threshold": 0.0}).reason
    assert "--thresholds 0.0`" in eager, "off is not the default"
    other = {**KEPT, "baseline": "another"}
    assert " --baseline BASELINE --tasks arithmetic,sorting " in verdict_on(other, good).reason
    assert "` on H100 measures it" in verdict_on(FAST, good, hardware="H100").reason


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A quality run and a scored speed run in which all is in order."""
    root = tmp_path_factory.mktemp("good")
    return [store.load(quality_run(root)), store.load(speed_run(root, scored=True))]


def arms(good: list[Run]) -> dict[str, str]:
    return {cell.id: cell.arm for run in good for cell in run.manifest.cells}


def test_what_holds_is_supported_with_its_gates_and_its_bounds(good: list[Run]) -> None:
    kept, fast, both = judge(claims_of(KEPT, FAST, BOTH), good)
    assert [one.outcome for one in (kept, fast, both)] == ["SUPPORTED"] * 3
    assert kept.estimate is not None
    assert kept.estimate.level == 0.9
    assert {kind_text(gate.kind) for gate in fast.gates} == {
        "files agree", "complete run", "same inputs", "whole prompts", "A/A null", "degenerate outputs",
        "quality floor", "verify", "same rounds", "same answers", "residual", "busy arms", "probes",
        "witnessed answers",
    }  # fmt: skip
    assert kept.evidence == (RUN_ID,)
    assert set(fast.evidence) == {RUN_ID, SPEED_ID}
    assert exit_code([kept, fast, both]) == 0


def test_what_does_not_hold_is_refuted_and_takes_the_joint_claim_with_it(good: list[Run]) -> None:
    kept, fast, both = judge(claims_of(KEPT, {**FAST, "expected": 3.0}, BOTH), good)
    assert [one.outcome for one in (kept, fast, both)] == ["SUPPORTED", "REFUTED", "REFUTED"]
    assert both.reason == "kept SUPPORTED; fast REFUTED in this launch"


def test_at_the_boundary_it_is_inconclusive_and_says_how_much_would_decide(good: list[Run]) -> None:
    fine = verdict_on(KEPT, good)
    assert fine.estimate is not None
    verdict = verdict_on({**KEPT, "expected": round(fine.estimate.value, 3)}, good)
    assert verdict.outcome == "INCONCLUSIVE"
    assert "clusters would decide" in verdict.reason


@pytest.mark.parametrize(
    ("quantity", "changes", "value"),
    [
        ("decoder_exercised_retention", {"scope": ["sorting", "choice"]}, "sorting"),
        ("score", {"scope": ["choice"], "margin": 0.01, "expected": 0.3}, "choice"),
        ("score_difference", {"scope": ["sorting"], "margin": 0.01, "expected": -0.2}, "difference"),
        ("retention", {"scope": ["sorting"], "averaging": "mean_of_ratios"}, "sorting"),
    ],
)
def test_every_quality_quantity_is_over_its_own_scope(
    good: list[Run], quantity: str, changes: dict[str, Any], value: str
) -> None:
    verdict = verdict_on({**KEPT, "quantity": quantity, "expected": 0.5, **changes}, good)
    rows = [row for row in good[0].scores if row.headline and row.task == changes["scope"][0]]
    by_arm = [[row.value or 0.0 for row in rows if arms(good)[row.cell] == arm] for arm in ("baseline", "candidate")]
    means = [sum(values) / len(values) for values in by_arm]
    expected = {"sorting": means[1] / means[0], "choice": means[1], "difference": means[1] - means[0]}[value]
    assert verdict.estimate is not None
    assert verdict.estimate.value == pytest.approx(expected)
    assert verdict.outcome == "SUPPORTED"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 4}, "answer workload, batch 1"),
        ({"workload": "fixed"}, "answer workload"),
        ({"num_devices": 2}, "1 device"),
        ({"dtype": "bfloat16"}, "float32"),
        ({"hardware": "H100"}, "measured instead"),
        ({"decoder": {**POINT["decoder"], "threshold": 0.9}}, "threshold 0.8"),
        ({"decoder": {**POINT["decoder"], "batch_mean_t": True}}, "threshold 0.8"),
        ({"decoder": {"kind": "block_diffusion", "block_size": 16, "steps_per_block": 16}}, "threshold 0.8"),
    ],
)
def test_near_an_operating_point_is_not_at_it(good: list[Run], change: dict[str, Any], words: str) -> None:
    verdict = verdict_on(FAST, good, **change)
    assert verdict.outcome == "NOT_MEASURED"
    assert words in verdict.reason
    assert verdict.estimate is None


def test_other_models_and_other_tasks_are_not_the_claims(good: list[Run]) -> None:
    other = verdict_on({**KEPT, "subject": "another"}, good)
    assert (other.outcome, other.reason) == (
        "NOT_MEASURED",
        "only pair was measured; `twotower-eval run --model CKPT --tasks arithmetic,sorting "
        "--block-sizes 16 --steps 16 --thresholds 0.8` measures it; tasks that execute model-written code to score it "
        "are refused",
    )
    assert verdict_on({**KEPT, "baseline": "another"}, good).outcome == "NOT_MEASURED"
    assert verdict_on({**KEPT, "scope": ["arithmetic", "poetry"]}, good).outcome == "NOT_MEASURED"
    assert verdict_on({**KEPT, "subject": PAIR.digest[:12]}, good).outcome == "SUPPORTED"
    missing = verdict_on(FAST, good[:1]).reason
    assert missing.startswith(
        "nothing was measured at this point; `twotower-eval speed --model CKPT --tasks TASKS --launches 5 --b"
    )
    other_place = verdict_on(FAST, good[:1], workload="fixed", batch_size=4, num_devices=2, dtype="bfloat16")
    assert "--dtype bfloat16 --batch-sizes 4 --workload fixed --devices D,D` measures it" in other_place.reason


def edited_speed(root: Path, good: list[Run], change: Any, **options: Any) -> list[Run]:
    """The good quality run with a speed run changed row by row: ``change(row, arm)``."""
    by_cell = arms(good)
    edit = None if change is None else lambda row: change(row, by_cell[row.cell])
    return [good[0], store.load(speed_run(root, **{"scored": True, "edit": edit, **options}))]


def null_off(row: Row, arm: str) -> Row:
    return dataclasses.replace(row, wall_s=row.wall_s * 1.1) if getattr(row, "replica", 0) else row


def null_gone(row: Row, arm: str) -> Row | None:
    return None if getattr(row, "replica", 0) else row


WILD_R = np.exp(np.random.default_rng(2).normal(0, 0.3, 12))


def null_wild(row: Row, arm: str) -> Row:
    return taking(row, float(WILD_R[row.round])) if isinstance(row, SpeedSample) and row.replica else row


@pytest.mark.parametrize(
    ("change", "words"),
    [(null_off, "off by more than 2 %"), (null_gone, "without an A/A null"), (null_wild, "the machine is too noisy")],
)
def test_without_a_good_null_no_speed_is_judged(tmp_path: Path, good: list[Run], change: Any, words: str) -> None:
    verdict = verdict_on(FAST, edited_speed(tmp_path, good, change))
    assert verdict.outcome == "INVALID"
    assert words in verdict.reason


def test_the_limits_of_the_gates_are_the_claims(tmp_path: Path, good: list[Run]) -> None:
    loose = {**FAST, "limits": {"null_offset": 0.2, "null_half_width": 0.5, "null_share": 5.0}}
    assert verdict_on(loose, edited_speed(tmp_path, good, null_off)).outcome == "SUPPORTED"
    strict = {**FAST, "limits": {"min_retention": 0.99}}
    assert verdict_on(strict, good).outcome in ("INVALID", "INCONCLUSIVE")


def looping(row: Row, arm: str) -> Row:
    if isinstance(row, GenerationRow) and arm == "candidate":
        loop = dataclasses.replace(row.generation, text="so it is, and " * 30, token_ids=(5, 6, 7) * 20, num_tokens=60)
        return dataclasses.replace(row, generation=loop)
    return row


def empty(row: Row, arm: str) -> Row:
    if isinstance(row, GenerationRow) and arm == "candidate":
        nothing = dataclasses.replace(row.generation, text="", token_ids=(), num_tokens=0)
        return dataclasses.replace(row, generation=nothing)
    return row


def wrong(row: Row, arm: str) -> Row:
    return dataclasses.replace(row, value=0.0) if isinstance(row, Score) and arm == "candidate" else row


@pytest.mark.parametrize("change", [looping, empty, wrong])
def test_outputs_that_are_no_answers_are_fast_and_broken(tmp_path: Path, good: list[Run], change: Any) -> None:
    verdict = verdict_on(FAST, edited_speed(tmp_path, good, change))
    assert verdict.outcome == "INVALID"
    assert "fast and broken" in verdict.reason


def test_without_answers_a_speedup_is_at_most_inconclusive(tmp_path: Path, good: list[Run]) -> None:
    unscored = edited_speed(tmp_path, good, None, scored=False)
    alone = verdict_on(FAST, unscored[1:])
    assert alone.outcome == "INCONCLUSIVE"
    assert "no quality was measured at this point" in alone.reason
    assert verdict_on({**FAST, "expected": 3.0}, unscored[1:]).outcome == "REFUTED"
    assert verdict_on(FAST, unscored).outcome == "SUPPORTED", "the same point's own run says that they are answers"


def stops_early(row: Row, arm: str) -> Row:
    if isinstance(row, SpeedSample) and arm == "candidate":
        cut = [
            dataclasses.replace(prompt, num_tokens=prompt.num_tokens // 4, finish_s=prompt.finish_s / 2)
            for prompt in row.prompts
        ]
        return dataclasses.replace(row, wall_s=row.wall_s / 2, first_output_s=None, prefill_s=None, prompts=tuple(cut))
    return row


@pytest.mark.parametrize("quantity", ["speedup_time", "speedup_throughput"])
def test_stopping_early_is_no_speedup(tmp_path: Path, good: list[Run], quantity: str) -> None:
    verdict = verdict_on({**FAST, "quantity": quantity}, edited_speed(tmp_path, good, stops_early))
    assert verdict.outcome == ("INCONCLUSIVE" if quantity == "speedup_time" else "REFUTED")
    if quantity == "speedup_time":
        assert "the speedup in useful tokens per second has to clear too" in verdict.reason


def pads(row: Row, arm: str) -> Row:
    if isinstance(row, SpeedSample) and arm == "candidate":
        more = [dataclasses.replace(prompt, num_tokens=64) for prompt in row.prompts]  # the budget
        return dataclasses.replace(row, wall_s=row.wall_s * 2, prompts=tuple(more))
    return row


def test_padding_is_no_speedup_either(tmp_path: Path, good: list[Run]) -> None:
    claim = {**FAST, "quantity": "speedup_throughput", "expected": 0.9}
    verdict = verdict_on(claim, edited_speed(tmp_path, good, pads))
    assert verdict.outcome == "INCONCLUSIVE"
    assert "the wall-clock speedup has to clear too" in verdict.reason


def test_one_round_or_few_documents_support_nothing(tmp_path: Path, good: list[Run]) -> None:
    once = verdict_on(FAST, edited_speed(tmp_path, good, None, num_rounds=1))
    assert once.outcome in ("INVALID", "INCONCLUSIVE")
    few = [store.load(quality_run(tmp_path, num_docs=9, tasks=("sorting",), perplexity=False))]
    verdict = verdict_on({**KEPT, "scope": ["sorting"], "expected": 0.1}, few)
    assert verdict.outcome == "INCONCLUSIVE"
    assert "fewer than 20" in verdict.reason


def shifted(point: SpeedPoint, factor: float) -> SpeedPoint:
    """The point with a null in which the second copy is slower."""
    assert point.null_timed is not None
    timed = dataclasses.replace(point.null_timed, candidate_s=point.null_timed.candidate_s * factor)
    null = stats.speedup(timed, level=stats.NULL_LEVEL, caution="estimated")
    return dataclasses.replace(point, null_timed=timed, null=Measured(estimate=null))


def test_nulls_are_corrected_over_all_pairs_for_report_and_verdict_alike(tmp_path: Path) -> None:
    """The report judged each null alone, where verdicts and PROTOCOL take Holm's correction over pairs."""
    run = store.load(speed_run(tmp_path, batch_sizes=(1, 2, 4, 8), num_rounds=3))
    points = speed_points([run])[0]
    first, *rest = points
    factors = [1.02 + 0.0005 * step for step in range(400)]
    alone = next(bent for factor in factors if fairness.fault(bent := shifted(first, factor), [], None) is not None)
    assert fairness.fault(alone, [], None) == fairness.NullFault(kind="off", offset=0.02)
    wide = GateLimits(null_half_width=1.0)
    assert fairness.fault(alone, [alone, *rest], None, wide) is None
    limits = GateLimits(null_half_width=1.0)
    judged = dataclasses.replace(stats.speedup(alone.timed), value=100.0)
    assert gates.null_gate(alone, rest, judged, None, limits).outcome == "passed"
    far = next(bent for factor in reversed(factors) if (bent := shifted(first, factor)))
    assert fairness.fault(far, [far, *rest], None, wide) == fairness.NullFault(kind="off", offset=0.02)
    assert gates.null_gate(far, rest, judged, None, limits).outcome == "failed"


def test_a_verify_that_was_stopped_takes_back_no_failure(tmp_path: Path, good: list[Run]) -> None:
    """The newest verify was judged, so that one interrupted after a failed one put the weights back in order."""
    cell = make_cell("candidate", block_diffusion(), Workload(kind="checks", name="checks", digest=sha256_text("c")))
    failed = Check(cell=cell.id, name="batch_equals_single", outcome="failed", detail="2 of 8 rows differ")
    passed = dataclasses.replace(failed, name="finite_logits", outcome="passed", detail="finite")
    made = [
        write(tmp_path, manifest(f"2026110{day}T120000Z-verify-cccccc", "verify", [cell]), [check], complete=complete)
        for day, check, complete in ((3, failed, True), (4, passed, False))
    ]
    assert verdict_on(KEPT, [*good, *map(store.load, made)]).outcome == "INVALID"
    mended = write(tmp_path, manifest("20261105T120000Z-verify-cccccc", "verify", [cell]), [passed])
    assert verdict_on(KEPT, [*good, *map(store.load, [*made, mended])]).outcome == "SUPPORTED"


@pytest.mark.parametrize(("workload", "few"), [("answer", "INCONCLUSIVE"), ("fixed", "SUPPORTED")])
def test_few_calls_of_sampled_prompts_support_nothing(
    tmp_path: Path, good: list[Run], workload: str, few: Outcome
) -> None:
    """The judge did not pass on how many calls there were, so that four sampled prompts could support a speedup."""
    table = {**FAST, "expected": 0.5, "limits": {"null_half_width": 0.5, "null_share": 5.0}}
    for num_calls, outcome in ((7, few), (8, "SUPPORTED")):
        path = speed_run(tmp_path / str(num_calls), workload=workload, num_calls=num_calls)
        verdict = verdict_on(table, [good[0], store.load(path)], workload=workload)
        assert verdict.outcome == outcome
        if outcome == "INCONCLUSIVE":
            few_calls = "7 calls of sampled prompts: fewer than 8 cannot support a claim, time more prompts"
            assert verdict.reason == few_calls


def test_one_call_of_sampled_prompts_says_nothing_of_other_prompts(tmp_path: Path, good: list[Run]) -> None:
    """Its interval was that over rounds alone: it covered the truth in 12 %, and refuted what was true in 40 %."""
    for workload, outcome in (("answer", "INCONCLUSIVE"), ("fixed", "REFUTED")):
        path = speed_run(tmp_path / workload, workload=workload, num_calls=1)
        table = {**FAST, "expected": 9.0, "limits": {"null_half_width": 0.5, "null_share": 5.0}}
        verdict = verdict_on(table, [good[0], store.load(path)], workload=workload)
        assert verdict.outcome == outcome
        assert (verdict.estimate is None) == (workload == "answer")


def test_reasons_are_in_the_unit_of_the_claim(good: list[Run]) -> None:
    """They were raw decimals: "the upper bound 0.900901 is below 0.982"."""
    kept = verdict_on({**KEPT, "expected": 1.487}, good).reason
    assert re.fullmatch(r"the upper bound \d\d\.\d % is below 148\.2 %", kept)
    fast = verdict_on({**FAST, "expected": 3.0}, good).reason
    assert re.fullmatch(r"the upper bound 1\.\d\dx is below 2\.85x", fast)
    apart = {**KEPT, "quantity": "score_difference", "scope": ["sorting"], "expected": -0.5, "margin": 0.0}
    assert re.fullmatch(r"the lower bound -?\d\.\d points is above -50\.0 points", verdict_on(apart, good).reason)


def test_what_would_decide_names_its_unit(tmp_path: Path, good: list[Run]) -> None:
    """Launches were called rounds, and that sampled prompts have to grow along was left out."""
    fast = verdict_on(FAST, good)
    assert fast.estimate is not None
    near = {**FAST, "expected": 0.97 * fast.estimate.value / 0.95}
    assert "times the 12 rounds, each on " in verdict_on(near, good).reason
    launches = edited_speed(tmp_path, good, lambda row, _: of_launch(row), num_rounds=20)
    assert "times the 5 launches, each on " in verdict_on(near, launches).reason


def of_launch(row: Row) -> Row:
    return dataclasses.replace(row, launch_id=f"launch {row.round // 4}") if isinstance(row, SpeedSample) else row


def test_arms_that_were_asked_differently_are_invalid_there_and_only_there(tmp_path: Path, good: list[Run]) -> None:
    """A prompt hash that differs is the one ValueError of the evidence that makes a verdict."""
    by_cell = arms(good)

    def other_prompt(row: Row) -> Row:
        differs = isinstance(row, Score) and by_cell[row.cell] == "candidate" and row.doc_id == 3
        return dataclasses.replace(row, prompt_sha256="0" * 64) if differs else row

    runs = [store.load(quality_run(tmp_path, edit=other_prompt)), good[1]]
    kept, fast, both = judge(claims_of(KEPT, FAST, BOTH), runs)
    assert kept.outcome == "INVALID"
    assert "prompt_sha256 differs" in kept.reason
    assert fast.outcome == "SUPPORTED"
    assert both.outcome == "INVALID"


def test_what_is_not_finished_or_not_scored_is_invalid(tmp_path: Path, good: list[Run]) -> None:
    by_cell = arms(good)

    def unscored(row: Row) -> Row:
        gone = isinstance(row, Score) and by_cell[row.cell] == "candidate" and row.task == "sorting" and row.doc_id < 9
        return dataclasses.replace(row, value=None, missing_reason="no sandbox") if gone else row

    stopped = store.load(quality_run(tmp_path / "stopped", complete=False))
    assert "the run is not complete" in verdict_on(KEPT, [stopped]).reason
    holes = store.load(quality_run(tmp_path / "holes", edit=unscored))
    verdict = verdict_on(KEPT, [holes])
    assert (verdict.outcome, verdict.reason) == ("INVALID", "all scored: 9 documents have no score in one arm")
    assert verdict_on({**KEPT, "scope": ["arithmetic"], "expected": 0.5}, [holes]).outcome == "SUPPORTED"


@pytest.mark.parametrize(("outcome", "expected"), [("failed", "INVALID"), ("not_checked", "SUPPORTED")])
def test_verify_runs_of_the_same_weights_are_a_gate(
    tmp_path: Path, good: list[Run], outcome: Any, expected: Outcome
) -> None:
    cell = make_cell("candidate", block_diffusion(), Workload(kind="checks", name="checks", digest=sha256_text("c")))
    check = Check(cell=cell.id, name="batch_equals_single", outcome=outcome, detail="2 of 8 rows differ")
    path = write(tmp_path, manifest("20261103T120000Z-verify-cccccc", "verify", [cell]), [check])
    for table in (KEPT, FAST):
        verdict = verdict_on(table, [*good, store.load(path)])
        assert verdict.outcome == expected
        [gate] = [gate for gate in verdict.gates if gate.kind == "verify"]
        assert "batch_equals_single" in found_text(gate)


def test_timed_answers_to_other_prompts_are_invalid(tmp_path: Path, good: list[Run]) -> None:
    def other_prompts(row: Row, arm: str) -> Row:
        if isinstance(row, SpeedSample) and arm == "candidate":
            renamed = [dataclasses.replace(prompt, prompt_id=f"x{prompt.prompt_id}") for prompt in row.prompts]
            return dataclasses.replace(row, prompts=tuple(renamed))
        return row

    kept, fast = judge(claims_of(KEPT, FAST), edited_speed(tmp_path, good, other_prompts))
    assert (kept.outcome, fast.outcome) == ("SUPPORTED", "INVALID")
    assert "timed on different prompts" in fast.reason


def test_points_are_counted(tmp_path: Path) -> None:
    swept = [block_diffusion(), block_diffusion(8), block_diffusion(32)]
    sweep = store.load(quality_run(tmp_path / "sweep", decoders=swept))
    assert verdict_on(KEPT, [sweep]).num_points == 3
    timed = store.load(speed_run(tmp_path / "timed", scored=True, batch_sizes=(1, 4)))
    claim = {**KEPT, "scope": ["sorting"]}
    assert verdict_on(claim, [timed]).num_looks == 1, "answers timed at two batch sizes are of one run"


def plain(outcome: Outcome) -> Verdict:
    return Verdict(claim="c", outcome=outcome, estimate=None, reason="r", evidence=())


@given(st.lists(st.sampled_from(list(EXIT_CODES)), max_size=6))
def test_the_exit_code_is_that_of_the_first_outcome_present(outcomes: list[Outcome]) -> None:
    code = exit_code([plain(outcome) for outcome in outcomes])
    order = [("REFUTED", 3), ("INVALID", 5), ("INCONCLUSIVE", 4), ("NOT_MEASURED", 6)]
    expected = next((number for outcome, number in order if outcome in outcomes), None)
    assert code == (expected if expected is not None else 0 if outcomes else 6)


def test_a_joint_claim_is_supported_only_if_all_of_it_is(tmp_path: Path, good: list[Run]) -> None:
    """Every pair of outcomes that runs can give; the joint code is that of both together."""
    quality = {"SUPPORTED": KEPT, "REFUTED": {**KEPT, "expected": 1.2}, "NOT_MEASURED": {**KEPT, "scope": ["poetry"]}}
    speed = {"SUPPORTED": FAST, "REFUTED": {**FAST, "expected": 3.0}}
    for (one, kept), (other, fast) in product(quality.items(), speed.items()):
        *parts, joint = judge(claims_of(kept, fast, BOTH), good)
        assert [part.outcome for part in parts] == [one, other]
        assert exit_code([joint]) == exit_code(parts)
        assert (joint.outcome == "SUPPORTED") == (one == other == "SUPPORTED")


def test_check_prints_a_line_a_claim_and_ends_with_the_code(
    tmp_path: Path, good: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        """title = "mine"
[[point]]
name = "here"
decoder = { kind = "block_diffusion", block_size = 16, steps_per_block = 16, threshold = 0.8, temperature = 0.0 }
batch_size = 1
num_devices = 1
workload = "answer"
[[claim]]
name = "kept"
quantity = "retention"
subject = "pair"
baseline = "context-tower"
point = "here"
scope = ["arithmetic", "sorting"]
expected = 0.9
source = "a test"
[[claim]]
name = "fast"
quantity = "speedup_time"
subject = "pair"
baseline = "context-tower"
point = "here"
expected = 3.0
source = "a test"
"""
    )
    runs = [str(run.path) for run in good]
    assert cli.main(["claims", "check", str(file), *runs]) == 3
    first, second, counts = capsys.readouterr().out.splitlines()
    assert first.startswith("SUPPORTED               kept  9")
    assert second.startswith("REFUTED in this launch  fast  1.4")
    assert counts == "2 claims: 1 REFUTED in this launch, 1 SUPPORTED; brackets hold one-sided 95 % bounds"
    assert cli.main(["claims", "check", str(file), *runs, "--claim", "kept"]) == 0
    assert cli.main(["claims", "check", str(file), runs[0], "--claim", "fast"]) == 6


def test_what_one_computation_scores_is_decided_without_a_sample(good: list[Run]) -> None:
    """A claim whose whole scope the shared tower scores was INCONCLUSIVE on its binomial bound, 100 % [88.3, 100]."""
    shared = {**KEPT, "scope": ["choice"], "relation": "equal", "expected": 1.0, "margin": 0.0}
    verdict = verdict_on(shared, good)
    assert (verdict.outcome, verdict.reason) == ("SUPPORTED", EQUAL)
    assert verdict.estimate is not None
    assert (verdict.estimate.low, verdict.estimate.high) == (1.0, 1.0)
    assert verdict_lines(claims_of(shared), [verdict])[0].startswith(
        "SUPPORTED     kept  100.0 %: equal by construction"
    )
    assert verdict_on({**shared, "relation": "at_least", "expected": 1.001}, good).outcome == "REFUTED"
    mixed = verdict_on({**shared, "scope": ["choice", "sorting"]}, good)
    assert mixed.estimate is not None
    assert mixed.estimate.low < mixed.estimate.high, "only the whole scope makes it known"
