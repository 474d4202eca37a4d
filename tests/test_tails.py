"""Few prompts that hold much of the time: an interval moves out for what no timed call shows."""

import dataclasses
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from report_fixture import AUTOREGRESSIVE, RUN_ID, SPEED_ID, block_diffusion, make_cell, manifest, write

from twotower_eval import store
from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.simulate import calibrate_speed
from twotower_eval.analyse.calibration.tail_worlds import NUM_PROMPTS, Tailed, population, tailed
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint, speed_points
from twotower_eval.analyse.report.speed_tables import speed as speed_section
from twotower_eval.measure.speed.workloads import ENOUGH_PROMPTS
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import (
    Estimate,
    Generation,
    GenerationRow,
    PromptTiming,
    SpeedSample,
    Workload,
    canonical_json,
    sha256_text,
)

NUM = 40


def calls(baseline_s: Any, candidate_s: Any, **known: Any) -> stats.TimedCalls:
    """Twelve rounds of these calls, tokens in step with the seconds."""
    arms = [np.tile(np.asarray(seconds, dtype=float), (12, 1)) for seconds in (baseline_s, candidate_s)]
    return stats.TimedCalls(
        baseline_s=arms[0], candidate_s=arms[1], baseline_tokens=100 * arms[0], candidate_tokens=100 * arms[0],
        launches=["one"] * 12, fixed=False, **known,
    )  # fmt: skip


def bounds(timed: stats.TimedCalls, quantity: Any = "time") -> Estimate:
    return stats.speedup(timed, quantity, level=stats.DECISION_LEVEL, num_resamples=500)


@pytest.mark.parametrize(
    ("kind", "least_undecided"),
    [
        (Tailed(share=0.01, times=30), 0.8),
        (Tailed(share=0.02, times=20, both=True), 0.8),
        (Tailed(alpha=1.1, fall=0.3), 0.7),
        (Tailed(alpha=1.5, fall=0.3), 0.8),
        (Tailed(alpha=2.0, fall=0.3), 0.8),
    ],
)
def test_at_the_default_number_of_prompts_a_tail_leaves_open_what_it_does_not_show(
    kind: Tailed, least_undecided: float
) -> None:
    """Today's main supports at the limit in 14 to 45 % where the gain falls with a Pareto length."""
    world = tailed(kind)
    found = calibrate_speed(world, num=NUM, num_resamples=200, seed=5, advance=lambda num=1, /: None)
    assert found.num_supported <= 5
    assert found.num_covered >= 36
    assert NUM - found.num_supported - found.num_refuted >= least_undecided * NUM


def test_an_honest_decoder_is_supported_and_its_interval_stays_narrow() -> None:
    rng = np.random.default_rng(1)
    length = rng.lognormal(0, 0.5, NUM_PROMPTS)
    timed = calls(length, length / np.exp(rng.normal(0.8, 0.2, NUM_PROMPTS)))
    found = bounds(timed)
    claim = {"relation": "at_least", "expected": found.value, "margin": 0.05 * found.value}
    assert stats.decide(found, **claim, num_rounds=12, num_calls=NUM_PROMPTS).outcome == "SUPPORTED"  # type: ignore[arg-type]
    assert not found.method.moved_out


def test_the_default_number_of_prompts_sees_a_runaway_in_a_hundred() -> None:
    assert SpeedPlan().num_prompts is None
    assert ENOUGH_PROMPTS == NUM_PROMPTS
    assert 0.99**NUM_PROMPTS < 0.05


@pytest.mark.parametrize(
    ("kind", "num_calls"),
    [
        (Tailed(share=0.02, times=20), 64),
        (Tailed(share=0.01, times=30), 164),
        (Tailed(share=0.02, times=20, both=True), 64),
    ],
)
def test_budgets_bound_tokens_per_second_as_well(kind: Tailed, num_calls: int) -> None:
    """They bounded times alone: 10 to 28 % were supported at the limit."""
    world = tailed(kind, num_calls, "budgets", "throughput")
    found = calibrate_speed(world, num=NUM, num_resamples=200, seed=5, advance=lambda num=1, /: None)
    assert found.num_supported <= 2
    assert found.num_covered >= 36


def test_runaways_within_the_budget_have_their_tokens_but_no_gain() -> None:
    """Every call alike, at 100 tokens in 1 s and in 0.5 s: so many of the candidate's are at 100 tokens a second."""
    found = bounds(calls([1.0] * 64, [0.5] * 64, limits_s=(10.0, 10.0)), "throughput")
    unseen = 1 - 0.05 ** (1 / 64)
    tokens, seconds = 100 * (1 - unseen) + 1_000 * unseen, 0.5 * (1 - unseen) + 10 * unseen
    assert found.value == pytest.approx(2.0)
    assert found.low == pytest.approx(tokens / seconds / 100)
    assert found.high == pytest.approx(2.0), "no call has another gain here"
    at_budget = bounds(calls([1.0] * 64, [0.5] * 64, limits_s=(1.0, 0.5)), "throughput")
    assert at_budget.low == pytest.approx(2.0)


def test_a_sample_of_documents_leaves_open_what_it_cannot_exclude() -> None:
    """The lengths of exactly the timed documents are no new knowledge; those of ten times as many are some."""

    def known(num: int, at_budget: int = 0, whole: bool = False) -> Estimate:
        tokens = np.array([100.0] * (num - at_budget) + [1_000.0] * at_budget)
        documents = stats.Documents(
            baseline_tokens=tokens, candidate_tokens=tokens, longest_baseline=100.0, longest_candidate=100.0,
            whole=whole, budgets=(1_000.0, 1_000.0),
        )  # fmt: skip
        return bounds(calls([1.0] * 64, [0.5] * 64, limits_s=(10.0, 10.0), documents=documents))

    alone = bounds(calls([1.0] * 64, [0.5] * 64, limits_s=(10.0, 10.0)))
    assert (known(64).low, known(64).high) == pytest.approx((alone.low, alone.high))
    unseen = 1 - 0.05 ** (1 / 640)
    assert known(640).low == pytest.approx(2 / (1 + unseen * 19))
    assert known(64, whole=True).low == pytest.approx(2.0)
    seen = known(640, at_budget=6, whole=True)
    upper = scipy.stats.beta.ppf(0.95, 7, 634)  # Clopper-Pearson of 6 in 640
    assert known(640, at_budget=6).low == pytest.approx(seen.low / (1 + (upper - 6 / 640) * 19))


def test_what_the_budget_allows_moves_the_bounds_by_the_rule_of_three() -> None:
    """Every call alike: the bootstrap knows no spread at all, the budgets do."""
    plain, bounded = bounds(calls([1.0] * 64, [0.5] * 64)), bounds(calls([1.0] * 64, [0.5] * 64, limits_s=(4.0, 10.0)))
    assert plain.low == pytest.approx(2.0)
    assert plain.high == pytest.approx(2.0)
    unseen = 1 - 0.05 ** (1 / 64)
    assert bounded.low == pytest.approx(2 / (1 + unseen * 19))
    assert bounded.high == pytest.approx(2 * (1 + unseen * 3))
    assert bounded.value == plain.value
    assert bounded.method.moved_out
    assert bounds(calls([1.0] * 64, [0.5] * 64, limits_s=(0.5, 0.25))) == plain, "no call can be longer than those seen"


def test_the_lengths_of_all_documents_say_what_the_timed_ones_lack() -> None:
    seconds = np.linspace(1, 2, 40)
    timed = calls(seconds, seconds / 2)

    def lengths(baseline: Any, candidate: Any) -> stats.Documents:
        return stats.Documents(
            baseline_tokens=np.asarray(baseline, dtype=float), candidate_tokens=np.asarray(candidate, dtype=float),
            longest_baseline=200.0, longest_candidate=200.0,
        )  # fmt: skip

    same = dataclasses.replace(timed, documents=lengths(100 * seconds, 100 * seconds), limits_s=(90.0, 90.0))
    assert bounds(same).low == pytest.approx(bounds(timed).low), "known lengths leave nothing for budgets to do"
    longer = dataclasses.replace(timed, documents=lengths(100 * seconds, 120 * seconds))
    found, plain = bounds(longer), bounds(timed)
    assert found.low < plain.low / 1.19
    assert found.high == pytest.approx(plain.high)
    with pytest.raises(ValueError, match="both arms need the same documents"):
        lengths([1.0], [1.0, 2.0])


def test_a_batch_is_not_told_by_the_lengths_of_documents() -> None:
    """It lasts as long as its longest answer: one runaway holds up all, and budgets bound it as if no length were
    known."""
    timed = calls([1.0] * 48, [0.5] * 48, limits_s=(10.0, 10.0))
    tokens = np.array([100.0] * 990 + [1_000.0] * 10)
    documents = stats.Documents(
        baseline_tokens=tokens, candidate_tokens=tokens, longest_baseline=100.0, longest_candidate=100.0, batch_size=8
    )
    found, alone = bounds(dataclasses.replace(timed, documents=documents)), bounds(timed)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_answers_longer_than_any_timed_one_may_be_slower_than_the_baseline() -> None:
    """One token a pass, and a pass that costs two steps: 9.2 % of the tokens at half the baseline's speed."""
    tokens = np.array([100.0] * 990 + [1_000.0] * 10)
    documents = stats.Documents(
        baseline_tokens=np.full(1_000, 109.0), candidate_tokens=tokens, longest_baseline=109.0, longest_candidate=100.0
    )
    timed = dataclasses.replace(calls([1.09] * 48, [0.5] * 48), documents=documents)
    share = 10_000 / 109_000
    ratio = 1.09 / (0.5 * 1.09)
    assert bounds(timed).low <= ratio / (1 + share * (2 * 2 - 1)) * 1.1


def test_fixed_prompts_are_no_sample_and_nothing_is_unseen() -> None:
    timed = dataclasses.replace(calls([1.0, 1.5] * 32, [0.5, 0.6] * 32, limits_s=(50.0, 50.0)), fixed=True)
    assert not bounds(timed).method.moved_out


def test_one_call_that_holds_half_the_time_is_told() -> None:
    tail = calls([1.0] * 99 + [99.0], [1.0] * 100).tail
    assert tail.largest_share == pytest.approx(0.5)
    assert tail.effective_calls == pytest.approx(1 / (0.25 + 99 / 198**2))
    assert tail.num_calls == 100
    assert calls([1.0] * 30, [1.0] * 30).tail.index is None


def test_hills_index_of_a_pareto_tail() -> None:
    length = 1 + np.random.default_rng(0).pareto(1.5, 4_000)
    assert calls(length, length).tail.index == pytest.approx(1.5, abs=0.25)


def test_a_runaway_has_no_gain_in_the_worlds() -> None:
    everyone = population(Tailed(share=0.05, times=20))
    away = everyone.candidate_tokens == 2_000
    assert 0.04 < away.mean() < 0.06
    assert np.allclose(everyone.candidate_s[away], 40.0)


def test_a_limit_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds of a call at its budget must be finite"):
        calls([1.0, 2.0], [1.0, 2.0], limits_s=(float("nan"), 1.0))


TASK = "miniature_sort"


def speed_folder(root: Path, *, name: str = TASK, budget: int = 400) -> Path:
    """Forty answers of 20 to 59 tokens, timed at 10 ms a token and at 5 ms."""
    work = Workload(
        kind="answer", name=f"answer: {name}", digest="d", max_new_tokens=budget, batch_size=1, num_devices=1
    )
    cells = [make_cell("baseline", AUTOREGRESSIVE, work), make_cell("candidate", block_diffusion(), work)]
    rows: list[Any] = []
    for cell, replica in ((cells[0], 0), (cells[0], 1), (cells[1], 0)):
        for round_, doc_id in product(range(3), range(40)):
            num_tokens = 20 + doc_id
            prompt = PromptTiming(
                prompt_id=f"{name}/{doc_id}" if name else f"q{doc_id}", num_prompt_tokens=30, num_tokens=num_tokens,
                num_discarded_tokens=0, num_context_forwards=1, num_denoiser_forwards=1, finish="eos", finish_s=0.1,
                num_forced_commits=None, tokens_sha256="0" * 64,
            )  # fmt: skip
            rows.append(
                SpeedSample(
                    call_id=f"b1-{doc_id}", launch_id=f"{SPEED_ID}/1", cell=cell.id, replica=replica, round=round_,
                    phase="measure", batch_size=1, wall_s=(0.01 if cell.arm == "baseline" else 0.005) * num_tokens,
                    prefill_s=None, first_output_s=None, peak_memory_bytes=None, peak_memory_reason="none",
                    started_at="2026-11-02T12:00:00.000+00:00", prompts=(prompt,),
                )
            )  # fmt: skip
    return write(root, manifest(SPEED_ID, "speed", cells), rows)


def scored_folder(
    root: Path,
    lengths: Sequence[tuple[int, int]],
    *,
    budget: int = 400,
    first: int = 0,
    complete: bool = True,
    **plan: Any,
) -> Path:
    """A run with the lengths of both arms' answers, of documents from ``first`` on."""
    work = Workload(kind="task", name=TASK, digest="d", max_new_tokens=budget)
    cells = [make_cell("baseline", AUTOREGRESSIVE, work), make_cell("candidate", block_diffusion(), work)]
    rows = []
    for arm, cell in enumerate(cells):
        for doc_id, of_arms in enumerate(lengths, first):
            generation = Generation(
                prompt_id=str(doc_id), token_ids=(1,) * of_arms[arm], text="x", finish="eos", num_prompt_tokens=30,
                num_tokens=of_arms[arm], num_discarded_tokens=0, num_context_forwards=1, num_denoiser_forwards=1,
            )  # fmt: skip
            rows.append(
                GenerationRow(
                    cell=cell.id, task=TASK, doc_id=doc_id, request_index=0, repeat=0, prompt_sha256="p",
                    generation=generation,
                )
            )  # fmt: skip
    plan |= {"tasks": [TASK]}
    header = manifest(RUN_ID, "run", cells, plan=plan, plan_sha256=sha256_text(canonical_json(plan)))
    return write(root, header, rows, complete=complete)


ALIKE = [(20 + i % 40, 20 + i % 40) for i in range(400)]
RUNAWAYS = [(own, 400) if i % 50 == 49 else (own, other) for i, (own, other) in enumerate(ALIKE)]


def point_of(*folders: Path) -> SpeedPoint:
    [point] = speed_points([store.load(folder) for folder in folders])[0]
    return point


def test_a_run_of_all_documents_tells_what_the_budget_cannot(tmp_path: Path) -> None:
    """Timed alone, forty answers do not exclude that some run on to a budget ten times as long."""
    timed = speed_folder(tmp_path)
    alone = point_of(timed)
    assert alone.time.estimate
    assert alone.time.estimate.value == pytest.approx(2.0)
    assert alone.timed.limits_s == pytest.approx((4.0, 0.1975 + 0.01 * (400 - 39.5)))
    assert alone.time.estimate.low < 1.0, "a share of 8.8 % at the budget, in the candidate alone, undoes the speedup"
    known = point_of(timed, scored_folder(tmp_path, ALIKE))
    assert known.time.estimate
    assert known.time.estimate.low == pytest.approx(2.0, rel=0.01)
    assert [(one.arm, len(one.timed_tokens), len(one.all_tokens)) for one in known.lengths] == [
        ("baseline", 40, 400), ("candidate", 40, 400)
    ]  # fmt: skip
    assert known.lengths[0].quantiles()[1] == pytest.approx((39.5, 55.1), abs=0.5)
    assert "unlike_lengths" not in {one.kind for one in known.warnings}


@pytest.mark.parametrize(
    ("lengths", "how"),
    [
        (ALIKE[:40], {"limit": 40}),  # a run on exactly the timed documents
        (ALIKE[:40], {"first": 360}),  # the timed ones are not among those that it has
        (ALIKE[:40], {"complete": False}),
        (ALIKE[:20], {"limit": 20}),
    ],
)
def test_a_run_of_some_documents_does_not_close_the_interval(
    tmp_path: Path, lengths: Sequence[tuple[int, int]], how: dict[str, Any]
) -> None:
    """As many documents as were timed, whichever, passed for all that there are."""
    timed = speed_folder(tmp_path)
    alone, point = point_of(timed), point_of(timed, scored_folder(tmp_path, lengths, **how))
    assert alone.time.estimate
    assert point.time.estimate
    num = len({(TASK, i) for i in range(40)} | {(TASK, how.get("first", 0) + i) for i in range(len(lengths))})
    share, limit = 1 - 0.025 ** (1 / num), (0.1975 + 3.605) / 0.1975 - 1
    assert point.time.estimate.low <= 2 / (1 + share * limit) * (1 + 1e-9), "nothing is taken back of what is unseen"
    assert point.time.estimate.low >= alone.time.estimate.low - 1e-9
    assert point.timed.documents
    assert (point.timed.documents.whole, len(point.timed.documents.baseline_tokens)) == (False, num)
    assert not point.lengths[0].whole


def test_a_limit_that_leaves_nothing_out_is_none(tmp_path: Path) -> None:
    timed = speed_folder(tmp_path)
    known = point_of(timed, scored_folder(tmp_path, ALIKE, limit=1_000))
    assert known.time.estimate
    assert known.time.estimate.low == pytest.approx(2.0, rel=0.01)
    assert known.lengths[0].whole


def test_a_run_of_ten_times_as_many_documents_narrows_what_is_open(tmp_path: Path) -> None:
    timed = speed_folder(tmp_path)
    point = point_of(timed, scored_folder(tmp_path, ALIKE, limit=400))
    assert point.time.estimate
    assert 1.6 < point.time.estimate.low < 1.8  # 0.9 % of 400 may be at the budget, not 8.8 % of 40
    text = speed_section(Runs([store.load(folder) for folder in tmp_path.iterdir()])).markdown
    assert "| 40, 400 (not all) |" in text


def test_runaways_among_all_documents_are_told_and_allowed_for(tmp_path: Path) -> None:
    point = point_of(speed_folder(tmp_path), scored_folder(tmp_path, RUNAWAYS))
    candidate = point.lengths[1]
    assert candidate.shares_at_budget() == (0.0, 0.02)
    assert candidate.misses_the_tail
    assert "unlike_lengths" in {one.kind for one in point.warnings}
    truth = sum(own for own, _ in RUNAWAYS) / sum(0.5 * n if n < 400 else n for _, n in RUNAWAYS)
    assert point.time.estimate
    assert truth / 1.3 < point.time.estimate.low < truth, "what is long has no gain here, and may have less than none"


def test_a_run_that_cut_its_answers_earlier_says_nothing_of_their_lengths(tmp_path: Path) -> None:
    point = point_of(speed_folder(tmp_path), scored_folder(tmp_path, ALIKE, budget=60))
    assert point.timed.documents is None
    assert point.lengths[0].all_tokens == ()


def test_prompts_of_no_documents_have_nothing_beside_them(tmp_path: Path) -> None:
    point = point_of(speed_folder(tmp_path, name=""))
    assert point.timed.limits_s is None
    assert point.lengths == ()


def test_the_report_shows_timed_answers_beside_all(tmp_path: Path) -> None:
    runs = Runs([store.load(speed_folder(tmp_path)), store.load(scored_folder(tmp_path, RUNAWAYS))])
    text = speed_section(runs).markdown
    assert "Timed answers beside all answers" in text
    assert "| 40, 400 | 40 / 55 | 40 / 56 | 0.0 % / 2.0 % | 40 | 37 |" in text
    assert "effective calls (Kish)" in text
