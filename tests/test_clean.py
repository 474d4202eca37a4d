"""Figures on clean outputs: who is flagged, how far the arms differ in it, what remains without these outputs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from report_fixture import quality_run, speed_run, write

from twotower_eval import store
from twotower_eval.analyse.compare import Runs
from twotower_eval.analyse.compare.clean import flagged, flags
from twotower_eval.records import Generation, GenerationRow, PromptTiming, Score, SpeedSample

LOOP = "31 50 " + "8 " * 40
NUM_DOCS = 60


def looping(arm_cells: set[str], docs: set[int]) -> Callable[..., object]:
    """Give those documents of those cells a loop for an output, and let a loop score 0."""

    def edit(row: object) -> object:
        if isinstance(row, GenerationRow) and row.cell in arm_cells and row.doc_id in docs:
            ids = tuple(LOOP.encode())
            loop = dataclasses.replace(row.generation, text=LOOP, token_ids=ids, num_tokens=len(ids), finish="length")
            return dataclasses.replace(row, generation=loop)
        if isinstance(row, Score) and row.cell in arm_cells and row.doc_id in docs and row.scored_by == "generation":
            return dataclasses.replace(row, value=0.0)
        return row

    return edit


def quality(tmp_path: Path, baseline_docs: set[int], candidate_docs: set[int]):
    made = store.load(
        quality_run(tmp_path / "all", num_docs=NUM_DOCS, tasks=("arithmetic", "choice"), perplexity=False)
    )
    cells = {arm: {cell.id for cell in made.manifest.cells if cell.arm == arm} for arm in ("baseline", "candidate")}
    edits = [looping(cells["baseline"], baseline_docs), looping(cells["candidate"], candidate_docs)]

    def edit(row):
        return edits[1](edits[0](row))

    rows = [*made.generations, *made.likelihoods, *made.scores]
    path = write(tmp_path / "edited", made.manifest, rows, edit=edit)
    return Runs([made]).quality[0], Runs([store.load(path)]).quality[0]


def test_clean_outputs_give_the_same_retention_twice(tmp_path: Path) -> None:
    point, _ = quality(tmp_path, set(), set())
    assert (point.flagged.baseline, point.flagged.candidate, point.flagged.num_outputs) == (0.0, 0.0, NUM_DOCS)
    assert point.clean.headline == point.headline
    assert (point.clean.dropped_baseline, point.clean.dropped_candidate) == (0.0, 0.0)
    estimate = point.flagged.difference.estimate
    assert estimate is not None
    assert estimate.low < estimate.value == 0.0 < estimate.high  # nothing seen bounds the rate, and is not certainty


def test_pairs_of_which_either_is_flagged_are_dropped_and_each_share_is_told(tmp_path: Path) -> None:
    _, point = quality(tmp_path, {0, 1}, {1, *range(10, 20)})
    assert point.flagged.baseline == pytest.approx(2 / NUM_DOCS)
    assert point.flagged.candidate == pytest.approx(11 / NUM_DOCS)
    assert point.flagged.by_flag["periodic_tail"] == (2, 11)
    assert point.flagged.by_flag["empty"] == (0, 0)
    difference = point.flagged.difference.estimate
    assert difference is not None
    assert difference.value == pytest.approx(9 / NUM_DOCS)
    assert 0 < difference.low < difference.value < difference.high
    by_name = {task.name: task for task in point.clean.tasks}
    # Likelihoods have no outputs, so that none of their documents is dropped.
    assert {name: task.num_documents for name, task in by_name.items()} == {"arithmetic": 48, "choice": NUM_DOCS}
    assert point.clean.dropped_candidate == pytest.approx(11 / (2 * NUM_DOCS))
    assert point.clean.dropped_baseline == pytest.approx(2 / (2 * NUM_DOCS))
    all_outputs, clean = point.headline.estimate, point.clean.headline.estimate
    assert all_outputs is not None
    assert clean is not None
    assert all_outputs.value < clean.value  # verdicts rest on the first: loops cost what they cost


def test_a_task_with_nothing_clean_leaves_no_headline(tmp_path: Path) -> None:
    _, point = quality(tmp_path, set(), set(range(NUM_DOCS)))
    assert point.clean.headline.estimate is None
    assert point.clean.headline.reason == "nothing clean is left of arithmetic"
    assert point.flagged.candidate == 1.0


def timed(tmp_path: Path, candidate_text: str | None):
    """A speed run of 8 calls of one prompt whose outputs are kept in each round; the candidate loops on two."""
    made = store.load(speed_run(tmp_path / "all"))
    rows: list[object] = []
    arm_of = {cell.id: cell.arm for cell in made.manifest.cells}
    for sample in made.speed:
        numbered = [renamed(prompt) for prompt in sample.prompts]
        rows.append(dataclasses.replace(sample, prompts=tuple(numbered)))
        if candidate_text is not None and sample.replica == 0 and sample.phase == "measure":
            rows += [kept(sample, prompt, arm_of[sample.cell], candidate_text) for prompt in numbered]
    return Runs([store.load(write(tmp_path / "edited", made.manifest, rows))]).speed[0]  # type: ignore[arg-type]


def renamed(prompt: PromptTiming) -> PromptTiming:
    return dataclasses.replace(prompt, prompt_id=prompt.prompt_id.replace("q", "sorting/"))


def kept(sample: SpeedSample, prompt: PromptTiming, arm: str, text: str) -> GenerationRow:
    doc_id = int(prompt.prompt_id.removeprefix("sorting/"))
    shown = text if arm == "candidate" and doc_id in (2, 5) else f"{doc_id} low 31 high 95"
    generation = Generation(
        prompt_id=prompt.prompt_id, token_ids=tuple(shown.encode()), text=shown, finish=prompt.finish,
        num_prompt_tokens=3, num_tokens=len(shown), num_discarded_tokens=0, num_context_forwards=1,
        num_denoiser_forwards=1,
    )  # fmt: skip
    return GenerationRow(
        cell=sample.cell, task="sorting", doc_id=doc_id, request_index=0, repeat=sample.round, prompt_sha256="p",
        generation=generation,
    )  # fmt: skip


def test_speed_on_clean_outputs_leaves_out_the_calls_that_looped(tmp_path: Path) -> None:
    point = timed(tmp_path, LOOP)
    assert (point.num_calls, point.clean.num_calls) == (8, 6)
    assert (point.clean.dropped_baseline, point.clean.dropped_candidate) == (0.0, 0.25)
    assert (point.flagged.baseline, point.flagged.candidate) == (0.0, 0.25)
    assert point.clean.time.estimate is not None
    assert point.time.estimate is not None
    assert point.clean.time.estimate.n == 6 * point.num_rounds


def test_speed_without_kept_outputs_says_so(tmp_path: Path) -> None:
    point = timed(tmp_path, None)
    assert point.clean.time.estimate is None
    assert point.clean.time.reason == "the outputs of this workload are not kept"
    assert point.flagged.baseline is None
    assert point.flagged.difference.reason == "no output of both arms was kept, so that none can be looked at"


def test_outputs_are_paired_by_document_and_sample() -> None:
    good = flags(dataclasses.replace(GOOD, text="so 12"))
    bad = flags(dataclasses.replace(GOOD, text="", token_ids=()))
    found = flagged({("r", "t", 0, 0): good, ("r", "t", 1, 0): good}, {("r", "t", 1, 0): bad, ("r", "t", 2, 0): bad})
    assert (found.num_outputs, found.baseline, found.candidate) == (1, 0.0, 1.0)


GOOD = Generation(
    prompt_id="p", token_ids=(1, 2), text="so 12", finish="eos", num_prompt_tokens=3, num_tokens=2,
    num_discarded_tokens=0, num_context_forwards=1, num_denoiser_forwards=0,
)  # fmt: skip
