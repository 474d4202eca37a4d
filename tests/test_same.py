"""Quality and speed of one thing: what forbids to take two runs for the halves of one claim."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from report_fixture import quality_run, saying, speed_run
from test_claims_judge import BOTH, FAST, KEPT, POINT, claims_of

from twotower_eval import store
from twotower_eval.analyse.claims import judge, verdict_lines
from twotower_eval.analyse.compare import Runs
from twotower_eval.analyse.report.gates import gates as gates_section
from twotower_eval.analyse.report.verdicts import headline
from twotower_eval.analyse.words import found_text
from twotower_eval.records import (
    Cell,
    FileDigest,
    Gate,
    GenerationRow,
    PromptTiming,
    Score,
    SpeedSample,
    Verdict,
    sha256_text,
)
from twotower_eval.store import Run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A quality run and a scored speed run of one thing."""
    root = tmp_path_factory.mktemp("good")
    return [store.load(quality_run(root)), store.load(speed_run(root, scored=True))]


def with_cells(run: Run, change: Callable[[Cell], Cell]) -> Run:
    """The run as if its cells had been others; ids stay, so that rows find theirs."""
    cells = tuple(change(cell) for cell in run.manifest.cells)
    return dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, cells=cells))


def in_dtype(run: Run, dtype: str) -> Run:
    return with_cells(
        run, lambda cell: dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, dtype=dtype))
    )


def test_float32_quality_and_bfloat16_speed_are_of_two_points(good: list[Run]) -> None:
    """They were joined: a point had no dtype, and "keeps 95 % at 1.4x" was said of numbers that nothing had both of."""
    apart = [good[0], in_dtype(good[1], "bfloat16")]
    kept, _, both = judge(claims_of(KEPT, FAST, BOTH), apart)
    assert kept.outcome == "SUPPORTED"
    assert both.outcome != "SUPPORTED"
    runs = Runs(apart)
    assert {key.dtype for key in runs.points} == {"float32", "bfloat16"}
    assert len(runs.points) == 2
    assert {runs.name(cell).partition(":")[0] for cell in runs.points.values()} == {"float32", "bfloat16"}
    assert not any(panel for panel in runs.trade_offs if not panel.same_outputs)


def test_in_one_dtype_a_point_is_named_without_it(good: list[Run]) -> None:
    runs = Runs([in_dtype(run, "bfloat16") for run in good])
    assert [runs.name(cell) for cell in runs.points.values()] == ["block 16, 16 steps, threshold 0.8"]


# Timed as scored


def rows_changed(run: Run, change: Callable[[GenerationRow], GenerationRow]) -> Run:
    return dataclasses.replace(run, generations=[change(row) for row in run.generations])


def arm_of(run: Run, cell: str) -> str:
    return run.cells[cell].arm


def answers_otherwise(run: Run, arm: str, docs: Collection[int], place: int = 5) -> Run:
    """The run with another token at one place of an arm's answers to some documents, and with a text to go with it."""

    def change(row: GenerationRow) -> GenerationRow:
        if arm_of(run, row.cell) != arm or row.doc_id not in docs:
            return row
        tokens = [*row.generation.token_ids]
        tokens[place] += 1
        text = f"{row.generation.text} and {place}"
        return dataclasses.replace(
            row, generation=dataclasses.replace(row.generation, token_ids=tuple(tokens), text=text)
        )

    return rows_changed(run, change)


def scored(run: Run, worth: Callable[[Score], float | None]) -> Run:
    """The run with other scores of its answers, each answer with its own in it: equal ones have equal scores."""
    scores = [
        dataclasses.replace(row, value=worth(row)) if row.scored_by == "generation" else row for row in run.scores
    ]
    values = {(row.cell, row.task, row.doc_id): row.value or 0.0 for row in scores if row.scored_by == "generation"}
    rows = [saying(row, values[row.cell, row.task, row.doc_id]) for row in run.generations]
    return dataclasses.replace(run, scores=scores, generations=rows)


def worth_nothing(run: Run, arm: str, docs: Collection[int]) -> Run:
    """The run with wrong answers of an arm to some documents; what log-likelihoods score stays as they are."""

    def worth(row: Score) -> float | None:
        return 0.0 if arm_of(run, row.cell) == arm and row.doc_id in docs else row.value

    return scored(answers_otherwise(run, arm, docs, place=4), worth)


def verdicts(runs: list[Run], *, fast: dict[str, Any] | None = None, **point: Any) -> tuple[Verdict, ...]:
    return judge(claims_of(KEPT, {**FAST, **(fast or {})}, BOTH, **point), runs)


def gate(verdict: Verdict, name: str) -> Gate:
    [found] = {gate for gate in verdict.gates if gate.kind == name.replace(" ", "_")}
    return found


@pytest.mark.parametrize("arm", ["baseline", "candidate"])
def test_one_timed_answer_that_is_not_the_scored_one_is_invalid_in_full_precision(good: list[Run], arm: str) -> None:
    """Nothing compared them: a decoder could answer well when scored and otherwise when timed."""
    kept, fast, both = verdicts([good[0], answers_otherwise(good[1], arm, {7})])
    assert kept.outcome == "SUPPORTED"
    assert (fast.outcome, both.outcome) == ("INVALID", "INVALID")
    where = f"{arm}: 1 of 60 answers (1.7 %) differ in float32 at temperature 0: task sorting, document 7 from token 6"
    assert where in fast.reason
    assert where in both.reason


def test_an_answer_that_only_begins_as_the_scored_one_differs_from_it(good: list[Run]) -> None:
    def cut(row: GenerationRow) -> GenerationRow:
        short = dataclasses.replace(row.generation, token_ids=row.generation.token_ids[:20], num_tokens=20)
        return dataclasses.replace(row, generation=short)

    *_, both = verdicts([good[0], rows_changed(good[1], cut)])
    assert both.outcome == "INVALID"
    assert "from token 21 on" in both.reason


def test_a_joint_claim_on_answers_that_nothing_compares_says_so(good: list[Run]) -> None:
    silent = dataclasses.replace(good[1], generations=[], scores=[])
    *_, both = verdicts([good[0], silent])
    assert both.outcome == "SUPPORTED"
    [_, _, line, _] = verdict_lines(claims_of(KEPT, FAST, BOTH), verdicts([good[0], silent]))
    assert "same answers (baseline: no document was both timed and scored" in line


def test_answers_of_another_task_or_of_drawn_tokens_are_not_compared(good: list[Run]) -> None:
    elsewhere = rows_changed(good[1], lambda row: dataclasses.replace(row, task="poetry"))
    assert gate(verdicts([good[0], elsewhere])[1], "same answers").outcome == "not_checked"
    hot = [
        with_cells(
            answers_otherwise(matching(*good), "baseline", range(60)) if run is good[1] else run,
            lambda cell: dataclasses.replace(
                cell, decoder=dataclasses.replace(cell.decoder, params={**cell.decoder.params, "temperature": 0.7})
            ),
        )
        for run in good
    ]
    decoder = {**POINT["decoder"], "temperature": 0.7}
    _, fast, both = verdicts(hot, decoder=decoder)
    assert "baseline: its answers are drawn at random" in found_text(gate(fast, "same answers"))
    assert fast.outcome == both.outcome == "SUPPORTED"
    noisy = [hot[0], worth_nothing(hot[1], "candidate", range(3))]
    assert verdicts(noisy, decoder=decoder)[2].outcome == "SUPPORTED"
    worse = [hot[0], worth_nothing(hot[1], "candidate", range(0, 60, 2))]
    assert verdicts(worse, decoder=decoder)[2].outcome == "INVALID", "drawn or not, timed answers are worth as much"


def test_in_half_precision_rounding_may_part_some_answers_that_are_worth_the_same(good: list[Run]) -> None:
    same = [in_dtype(one, "bfloat16") for one in (good[0], matching(*good))]
    some = verdicts([same[0], answers_otherwise(same[1], "candidate", range(9))])[2]
    assert some.outcome == "SUPPORTED"
    assert "candidate: 9 of 60 answers (15 %) differ in bfloat16" in found_text(gate(some, "same answers"))
    assert gate(some, "effect on scores").outcome == "passed"
    many = verdicts([same[0], answers_otherwise(same[1], "candidate", range(20))])[2]
    assert many.outcome == "INVALID"
    moved = worth_nothing(answers_otherwise(same[1], "candidate", range(12)), "candidate", range(12))
    worse = verdicts([same[0], moved])[2]
    assert worse.outcome == "INVALID"
    assert "effect on scores: candidate: timed answers score -" in worse.reason
    few = worth_nothing(answers_otherwise(same[1], "candidate", range(12)), "candidate", range(3))
    open_ = verdicts([same[0], few])[2]
    assert open_.outcome == "INCONCLUSIVE"
    assert "not shown to be within 2 points" in open_.reason


def matching(quality: Run, speed: Run) -> Run:
    """The speed run with the texts and scores of the quality run's answers, which are the same tokens."""
    known = {(arm_of(quality, row.cell), row.task, row.doc_id, row.metric): row.value for row in quality.scores}
    return scored(speed, lambda row: known[arm_of(speed, row.cell), row.task, row.doc_id, row.metric])


def test_how_many_answers_may_differ_is_the_claims(good: list[Run]) -> None:
    run = answers_otherwise(good[1], "candidate", {7})
    loose = {"limits": {"differing_answers": 0.02}}
    assert verdicts([good[0], matching(good[0], run)], fast=loose)[2].outcome == "SUPPORTED"
    with pytest.raises(ValueError, match=r"differing_answers must be between 0 and 0.02 \(shipped: 0\), not 0.5"):
        claims_of({**FAST, "limits": {"differing_answers": 0.5}})


def test_the_same_answers_in_a_fraction_of_the_passes_are_remembered_ones(good: list[Run]) -> None:
    def remembered(row: GenerationRow) -> GenerationRow:
        if arm_of(good[1], row.cell) == "baseline":
            return row
        generation = dataclasses.replace(row.generation, num_context_forwards=1, num_denoiser_forwards=0)
        return dataclasses.replace(row, generation=generation)

    _, fast, both = verdicts([good[0], rows_changed(good[1], remembered)])
    assert fast.outcome == both.outcome == "INVALID"
    assert "of the forwards that the same answers took when they were scored" in fast.reason


# From round to round


def timings_changed(run: Run, change: Callable[[SpeedSample, PromptTiming], PromptTiming]) -> Run:
    speed = [
        dataclasses.replace(sample, prompts=tuple(change(sample, prompt) for prompt in sample.prompts))
        for sample in run.speed
    ]
    return dataclasses.replace(run, speed=speed)


@pytest.mark.parametrize("where", ["round 3", "warm-up", "copy", "passes"])
def test_every_round_gives_the_same_answers_in_the_same_passes(good: list[Run], where: str) -> None:
    """A decoder that answers otherwise once it has seen a prompt was timed as if nothing had happened."""

    def change(sample: SpeedSample, prompt: PromptTiming) -> PromptTiming:
        arm = arm_of(good[1], sample.cell)
        there = {
            "round 3": arm == "candidate" and sample.phase == "measure" and sample.round == 3,
            "warm-up": arm == "candidate" and sample.phase == "warmup",
            "copy": sample.replica == 1,
            "passes": arm == "candidate" and sample.phase == "measure" and sample.round == 3,
        }[where]
        if not there or prompt.prompt_id != "q2":
            return prompt
        if where == "passes":
            return dataclasses.replace(prompt, num_denoiser_forwards=0)
        return dataclasses.replace(prompt, tokens_sha256="1" * 64)

    _, fast, both = verdicts([good[0], timings_changed(good[1], change)])
    assert fast.outcome == both.outcome == "INVALID"
    arm = "baseline" if where == "copy" else "candidate"
    assert f"same rounds: {arm}: 1 of 8 answers (12 %) differ in float32 at temperature 0: prompt q2" in fast.reason
    assert ("in its forwards" in fast.reason) == (where == "passes")


def test_the_round_in_which_an_answer_parts_names_its_token(good: list[Run]) -> None:
    later = [
        dataclasses.replace(row, repeat=1, generation=dataclasses.replace(row.generation, token_ids=(0, 1, 9)))
        for row in good[1].generations
        if row.doc_id == 3
    ]
    ids = timings_changed(
        good[1], lambda _, prompt: dataclasses.replace(prompt, prompt_id=f"sorting/{prompt.prompt_id[1:]}")
    )
    _, fast, _ = verdicts([good[0], dataclasses.replace(ids, generations=[*ids.generations, *later])])
    assert fast.outcome == "INVALID"
    assert "task sorting, document 3 from token 3 on" in found_text(gate(fast, "same rounds"))


# Quality and speed of one setting


def other_baseline(cell: Cell) -> Cell:
    if cell.arm == "candidate":
        return cell
    return dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, digest=sha256_text("other")))


def other_config(cell: Cell) -> Cell:
    if cell.arm == "candidate":
        return cell
    files = (FileDigest(name="config.json", sha256=sha256_text("other")),)
    return dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, files=files))


def other_version(cell: Cell) -> Cell:
    return dataclasses.replace(cell, decoder=dataclasses.replace(cell.decoder, version=2))


def other_code(cell: Cell) -> Cell:
    code = (FileDigest(name="plugin.py", sha256=sha256_text("other")),)
    return dataclasses.replace(cell, decoder=dataclasses.replace(cell.decoder, code=code))


def on_cuda(cell: Cell) -> Cell:
    return dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, devices=("cuda:0",)))


def on_bfloat16(cell: Cell) -> Cell:
    return dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, dtype="bfloat16"))


def with_less_room(cell: Cell) -> Cell:
    """The cell with a smaller budget, in which every answer still ends."""
    return dataclasses.replace(cell, workload=dataclasses.replace(cell.workload, max_new_tokens=60))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_baseline, "baseline: tensors "),
        (other_config, "baseline: config.json none in kept, "),
        (other_version, "candidate: version 1 in kept, 2 in fast"),
        (other_code, "candidate: code plugin.py none in kept, "),
        (on_cuda, "candidate: device type cpu in kept, cuda in fast"),
        (on_bfloat16, "candidate: dtype float32 in kept, bfloat16 in fast"),
    ],
)
def test_what_the_halves_do_not_share_is_named_and_joins_nothing(
    good: list[Run], change: Callable[[Cell], Cell], words: str
) -> None:
    kept, fast, both = verdicts([good[0], with_cells(good[1], change)])
    assert kept.outcome == "SUPPORTED"
    assert both.outcome == ("NOT_MEASURED" if fast.outcome == "SUPPORTED" else fast.outcome)
    assert both.outcome != "SUPPORTED"
    assert f"one thing: {words}" in both.reason or f"; {words}" in both.reason


def of_tasks(run: Run, *tasks: str) -> Run:
    """The speed run as if its prompts had been of these tasks, in turn."""
    return timings_changed(
        run,
        lambda _, prompt: dataclasses.replace(
            prompt, prompt_id=f"{tasks[int(prompt.prompt_id[1:]) % len(tasks)]}/{prompt.prompt_id[1:]}"
        ),
    )


def test_budgets_that_differ_are_named_and_their_answers_are_not_held_against_each_other(good: list[Run]) -> None:
    run = answers_otherwise(with_cells(of_tasks(good[1], "arithmetic", "sorting"), with_less_room), "candidate", {7})
    _, fast, both = verdicts([good[0], run])
    assert both.outcome == "NOT_MEASURED"
    assert (
        "the budget of arithmetic 64 in kept, 60 in fast; the budget of sorting 64 in kept, 60 in fast" in both.reason
    )
    assert gate(fast, "same answers").outcome == "not_checked"


def test_documents_asked_otherwise_are_of_another_claim(good: list[Run]) -> None:
    """As with other few-shot examples: the same documents, other prompts."""
    asked = rows_changed(good[1], lambda row: dataclasses.replace(row, prompt_sha256=sha256_text(f"{row.doc_id}")))
    scores = [dataclasses.replace(row, prompt_sha256=sha256_text(f"{row.doc_id}")) for row in asked.scores]
    *_, both = verdicts([good[0], dataclasses.replace(asked, scores=scores)])
    assert both.outcome == "NOT_MEASURED"
    assert "60 documents timed on other prompts than scored, first task sorting" in (both.reason)


def prompt_tokens(run: Run, arm: str, num: int) -> Run:
    def change(row: GenerationRow) -> GenerationRow:
        if arm_of(run, row.cell) != arm or row.doc_id != 4:
            return row
        return dataclasses.replace(row, generation=dataclasses.replace(row.generation, num_prompt_tokens=num))

    return rows_changed(run, change)


def test_a_prompt_in_other_tokens_is_another_prompt(good: list[Run]) -> None:
    both_arms = prompt_tokens(prompt_tokens(good[1], "baseline", 9), "candidate", 9)
    *_, both = verdicts([good[0], both_arms])
    assert both.outcome == "INVALID"
    assert "task sorting, document 4 (12 tokens scored, 9 timed)" in both.reason
    kept, *_ = verdicts([prompt_tokens(good[0], "candidate", 9), good[1]])
    assert kept.outcome == "INVALID"
    assert "document 4 (12 tokens in the baseline, 9 in the candidate)" in kept.reason
    cut = timings_changed(
        good[1],
        lambda sample, prompt: dataclasses.replace(
            prompt, num_prompt_tokens=30 - (arm_of(good[1], sample.cell) == "candidate")
        ),
    )
    _, fast, _ = verdicts([good[0], cut])
    assert "8 prompts with different tokens in the two arms: prompt q0 (30 tokens in the baseline, 29" in fast.reason


def test_tokenizers_that_differ_read_prompts_as_they_do(good: list[Run]) -> None:
    def of_its_own(cell: Cell) -> Cell:
        files = (FileDigest(name="tokenizer.json", sha256=sha256_text(cell.arm)),)
        return dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, files=files))

    kept, *_ = verdicts([with_cells(run, of_its_own) for run in (prompt_tokens(good[0], "candidate", 9), good[1])])
    assert kept.outcome == "SUPPORTED"


def test_a_speed_is_of_the_tasks_that_the_quality_is_over(good: list[Run]) -> None:
    """Quality over all tasks joined the speed on the easiest of them."""
    assert verdicts([good[0], of_tasks(good[1], "arithmetic", "sorting")])[2].outcome == "SUPPORTED"
    *_, one = verdicts([good[0], of_tasks(good[1], "sorting")])
    assert one.outcome == "NOT_MEASURED"
    assert "same tasks: not timed: arithmetic" in one.reason
    *_, other = verdicts([good[0], of_tasks(good[1], "arithmetic", "sorting", "words_de")])
    assert other.outcome == "NOT_MEASURED"
    assert "also timed: words_de, outside the claimed quality" in other.reason
    group = claims_of({**KEPT, "scope": ["arithmetic", "words", "choice"]}, FAST, BOTH)
    *_, of_group = judge(group, [good[0], of_tasks(good[1], "arithmetic", "words_de")])
    assert gate(of_group, "same tasks").outcome == "passed", (
        "one language stands for the group; choices are not written"
    )


def test_a_point_may_say_which_tasks_are_timed(good: list[Run]) -> None:
    run = of_tasks(good[1], "sorting")
    assert verdicts([good[0], run], timed_tasks=["sorting"])[2].outcome == "SUPPORTED"
    _, fast, both = verdicts([good[0], run], timed_tasks=["arithmetic"])
    assert (fast.outcome, both.outcome) == ("NOT_MEASURED", "NOT_MEASURED")
    assert "on prompts of sorting" in fast.reason
    assert "--tasks arithmetic " in fast.reason


# Of answers


def test_a_fixed_workload_supports_nothing_about_answers(good: list[Run], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"claim 'both': the fixed workload decodes past the end of answers") as caught:
        claims_of(KEPT, FAST, BOTH, workload="fixed")
    assert "\n" not in str(caught.value)
    run = store.load(speed_run(tmp_path, workload="fixed"))
    [fast] = judge(claims_of(FAST, workload="fixed"), [good[0], run])
    assert fast.outcome == "SUPPORTED"
    assert fast.reason.endswith("on the fixed workload: a claim about forwards, not about answers")
    unread = [
        dataclasses.replace(claim, point=dataclasses.replace(claim.point, workload="fixed"))
        for claim in claims_of(KEPT, FAST, BOTH)
    ]
    *_, both = judge(unread, [good[0], run])
    assert both.outcome == "INVALID"
    assert "answers are timed: outputs of the fixed workload are no answers" in both.reason


def test_far_more_than_the_baseline_scores_is_a_warning_to_read(good: list[Run]) -> None:
    """A baseline whose config is broken makes 415 % of any candidate."""
    runs = [worth_nothing(run, "baseline", [doc for doc in range(150) if doc % 4]) for run in good]
    claims = claims_of(KEPT, FAST, BOTH)
    found = judge(claims, runs)
    assert [verdict.outcome for verdict in found] == ["SUPPORTED"] * 3
    kept, _, both = found
    assert kept.estimate is not None
    assert kept.high_retention == pytest.approx(kept.estimate.value)
    assert both.high_retention is not None
    lines = verdict_lines(claims, found)
    percent = (
        f"WARNING: the candidate scores {100 * kept.estimate.value:.0f} % of the baseline: a baseline with a broken"
    )
    assert percent in lines[0]
    assert all("WARNING" in line for line in lines[:3])
    assert all(verdict.high_retention is None for verdict in verdicts(good))
    quiet = claims_of({**KEPT, "limits": {"warn_retention": 2.0}})
    assert (judge(quiet, runs)[0].high_retention is None) == (kept.estimate.value <= 2)


# Reports


def test_a_report_says_what_is_not_of_one_thing_apart(good: list[Run]) -> None:
    """It put any quality and any speed of a decoder's setting into one sentence to quote."""
    together = headline(Runs(good)).markdown
    assert "of the baseline's quality" in together
    assert "not of one thing" not in together
    for speed, words in (
        (with_cells(good[1], other_baseline), "one thing: baseline: tensors "),
        (answers_otherwise(good[1], "candidate", {7}), "same answers: candidate: 1 of 60 answers"),
        (of_tasks(good[1], "words_de"), "same tasks: not timed: arithmetic, sorting"),
    ):
        text = headline(Runs([good[0], speed])).markdown
        assert "must not be quoted together" in text
        assert words in text.replace("\\", "")


def test_a_report_warns_of_a_retention_far_above_its_baseline(good: list[Run]) -> None:
    runs = [worth_nothing(run, "baseline", [doc for doc in range(150) if doc % 4]) for run in good]
    assert "**Read this first:** the candidate scores " in headline(Runs(runs)).markdown
    assert "Read this first" not in headline(Runs(good)).markdown


def test_a_report_lists_what_is_alike_once_and_each_cell_that_is_not(good: list[Run]) -> None:
    rows = [line for line in gates_section(Runs(good)).markdown.splitlines() if line.startswith("| same ")]
    assert [row.split(" | ")[:2] for row in rows[-2:]] == [["| same rounds", "passed"], ["| same answers", "passed"]]
    text = gates_section(Runs([good[0], answers_otherwise(good[1], "candidate", {7})])).markdown
    assert (
        "| same answers, answer, batch 1 | **FAILED** | block 16, 16 steps, threshold 0.8: candidate: 1 of 60" in text
    )
