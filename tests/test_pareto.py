"""Quality and speed of the same outputs: one table of samples, one front of operating points."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import report_fixture as made
from hypothesis import given
from hypothesis import strategies as st

from twotower_eval import store
from twotower_eval.evidence import Runs
from twotower_eval.evidence.pareto import front
from twotower_eval.records import Generation, GenerationRow, Score

GRID = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda p: (p[0] / 4, p[1] / 4))


@given(st.lists(GRID, min_size=1, max_size=12))
def test_a_point_is_on_the_front_if_and_only_if_nothing_beats_it(points: list[tuple[float, float]]) -> None:
    on = front(points)
    assert any(on)
    for point, is_on in zip(points, on, strict=True):
        better = [p for p in points if p[0] >= point[0] and p[1] >= point[1] and p != point]
        assert is_on == (not better)
    kept = sorted(p for p, is_on in zip(points, on, strict=True) if is_on)
    # Along the front more retention costs speed.
    assert all(a == b or (a[0] < b[0] and a[1] > b[1]) for a, b in itertools.pairwise(kept))


def test_operating_points_are_named_and_boxed(tmp_path: Path) -> None:
    decoders = (made.block_diffusion(8), made.block_diffusion(16), made.block_diffusion(32, threshold=0.7))
    paths = [made.quality_run(tmp_path, decoders=decoders), made.speed_run(tmp_path, decoders=decoders)]
    found = Runs([store.load(path) for path in paths]).trade_offs
    assert [point.name for point in found] == [
        "block 8, 8 steps, threshold 0.8", "block 16, 16 steps, threshold 0.8", "block 32, 32 steps, threshold 0.7",
    ]  # fmt: skip
    assert [p.on_front for p in found] == list(front([(p.retention.value, p.speedup.value) for p in found]))
    assert any(point.on_front for point in found)
    assert not any(point.same_outputs for point in found)
    for point in found:
        assert point.retention.low <= point.retention.value <= point.retention.high
        assert not (point.on_front and point.surely_beaten)


def answered(tmp_path: Path, *, scored: bool = True) -> Runs:
    """Timed answers whose texts are kept in each round and scored; the candidate fails and loops on document 3."""
    plain = store.load(made.speed_run(tmp_path / "plain", num_rounds=3))
    arm_of = {cell.id: cell.arm for cell in plain.manifest.cells}
    rows: list[object] = []
    for sample in plain.speed:
        prompts = [dataclasses.replace(p, prompt_id=p.prompt_id.replace("q", "sorting/")) for p in sample.prompts]
        rows.append(dataclasses.replace(sample, prompts=tuple(prompts)))
        if sample.replica or sample.phase != "measure":
            continue
        for prompt in prompts:
            doc_id = int(prompt.prompt_id.removeprefix("sorting/"))
            bad = arm_of[sample.cell] == "candidate" and doc_id == 3
            text = "8 " * 40 if bad else f"{doc_id} low {sample.round if doc_id == 5 else 1} high 9"
            generation = Generation(
                prompt_id=prompt.prompt_id, token_ids=tuple(text.encode()), text=text, finish=prompt.finish,
                num_prompt_tokens=3, num_tokens=prompt.num_tokens, num_discarded_tokens=0, num_context_forwards=1,
                num_denoiser_forwards=0,
            )  # fmt: skip
            rows.append(
                GenerationRow(
                    cell=sample.cell,
                    task="sorting",
                    doc_id=doc_id,
                    request_index=0,
                    repeat=sample.round,
                    prompt_sha256="p",
                    generation=generation,
                )
            )
    for cell in plain.manifest.cells:
        for doc_id in range(8) if scored else ():
            rows.append(score(cell.id, doc_id, 0.0 if cell.arm == "candidate" and doc_id == 3 else 1.0))
    return Runs([store.load(made.write(tmp_path / "kept", plain.manifest, rows))])  # type: ignore[arg-type]


def score(cell: str, doc_id: int, value: float) -> Score:
    return Score(
        cell=cell, task="sorting", doc_id=doc_id, cluster_id=str(doc_id), doc_sha256="d", prompt_sha256="p",
        target_sha256="t", metric="exact_match", filter="none", higher_is_better=True, headline=True,
        scored_by="generation", value=value,
    )  # fmt: skip


def test_each_timed_answer_has_its_time_its_score_and_its_flags(tmp_path: Path) -> None:
    runs = answered(tmp_path)
    (point,) = runs.speed
    assert [sample.doc_id for sample in point.samples] == list(range(8))
    by_doc = {sample.doc_id: sample for sample in point.samples}
    assert (by_doc[3].baseline.score, by_doc[3].candidate.score) == (1.0, 0.0)
    assert by_doc[3].candidate.flags == ("periodic_tail", "repeated_ngrams")
    assert by_doc[3].baseline.flags == ()
    assert by_doc[3].metric == "exact_match"
    assert (by_doc[5].candidate.num_rounds, by_doc[5].candidate.num_different) == (3, 2)
    assert (by_doc[4].candidate.num_rounds, by_doc[4].candidate.num_different) == (3, 0)
    # One prompt a call here, so that the samples add up to the arms' totals.
    for arm in ("baseline", "candidate"):
        total_s = sum(getattr(sample, arm).wall_s for sample in point.samples) * point.num_rounds
        calls = [s for run in runs for s in run.speed if s.cell == getattr(point, arm).id]
        measured = [s for s in calls if s.phase == "measure" and s.replica == 0]
        assert total_s == pytest.approx(sum(s.wall_s for s in measured))
    assert all(sample.speedup and sample.speedup > 0 for sample in point.samples)
    (trade_off,) = runs.trade_offs
    assert trade_off.same_outputs
    assert trade_off.retention.value == pytest.approx(7 / 8)


def test_answers_that_were_not_scored_say_so(tmp_path: Path) -> None:
    (point,) = answered(tmp_path, scored=False).speed
    assert {sample.candidate.score for sample in point.samples} == {None}
    assert {sample.candidate.score_reason for sample in point.samples} == {"not scored"}
    assert {sample.metric for sample in point.samples} == {None}


def test_there_are_no_samples_where_no_text_was_kept(tmp_path: Path) -> None:
    (point,) = Runs([store.load(made.speed_run(tmp_path, workload="fixed"))]).speed
    assert point.samples == ()
