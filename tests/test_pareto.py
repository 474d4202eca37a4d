"""Quality and speed of the same outputs: one table of samples, one front of operating points."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made
from hypothesis import given
from hypothesis import strategies as st

from twotower_eval import store
from twotower_eval.analyse.compare import Runs
from twotower_eval.analyse.compare.tradeoff import front
from twotower_eval.analyse.report.tradeoff import corners
from twotower_eval.records import Generation, GenerationRow, Score, SpeedSample, sha256_text

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


def swept(tmp_path: Path, **options: Any) -> Runs:
    decoders = (made.block_diffusion(8), made.block_diffusion(16), made.block_diffusion(32, threshold=0.7))
    paths = [
        made.quality_run(tmp_path, decoders=decoders),
        made.speed_run(tmp_path, decoders=decoders, batch_sizes=(1, 4), **options),
    ]
    return Runs([store.load(path) for path in paths])


def test_points_that_were_timed_alike_share_a_panel(tmp_path: Path) -> None:
    runs = swept(tmp_path)
    assert [(panel.workload, panel.batch_size, panel.same_outputs) for panel in runs.trade_offs] == [
        ("answer", 1, False), ("answer", 4, False),
    ]  # fmt: skip
    for panel in runs.trade_offs:
        assert [p.candidate.decoder.params["block_size"] for p in panel.points] == [8, 16, 32]
        values = [(p.retention.value, p.speedup.value) for p in panel.points]
        assert [p.on_front for p in panel.points] == list(front([*values, (1.0, 1.0)]))[:3]
        assert any(p.on_front for p in panel.points)
        assert not any(p.invalid for p in panel.points)
        assert {run.manifest.run_id for run in runs} == panel.run_ids


def test_invalid_timings_are_never_on_the_front_and_beat_nobody(tmp_path: Path) -> None:
    def slow_copy(row: Any) -> Any:
        bent = isinstance(row, SpeedSample) and row.replica == 1 and row.batch_size == 4
        return dataclasses.replace(row, wall_s=1.1 * row.wall_s) if bent else row

    good, bad = swept(tmp_path, edit=slow_copy).trade_offs
    assert all(point.invalid and not point.on_front for point in bad.points)
    assert corners(bad.points) == [(1.0, 100.0)]
    assert corners(good.points)[0] == (1.0, 100.0)
    assert len(corners(good.points)) == 1 + sum(point.on_front for point in good.points)


def test_the_baseline_stands_on_the_front_unless_it_is_beaten(tmp_path: Path) -> None:
    point = swept(tmp_path).trade_offs[0].points[0]
    better = dataclasses.replace(
        point,
        retention=dataclasses.replace(point.retention, value=1.02),
        speedup=dataclasses.replace(point.speedup, value=1.5),
        on_front=True,
    )
    assert corners([better]) == [(1.5, 102.0)]


def test_retentions_of_two_kinds_make_no_front(tmp_path: Path) -> None:
    """One point stood with the retention of whole tasks beside others with that of a few timed answers."""
    decoders = (made.block_diffusion(8), made.block_diffusion(16))
    paths = [
        made.quality_run(tmp_path, decoders=decoders[:1]),
        made.speed_run(tmp_path, decoders=decoders, scored=True),
    ]
    runs = Runs([store.load(path) for path in paths])
    [panel] = runs.trade_offs
    assert panel.same_outputs
    of_timed = {q.candidate.id: q.headline.estimate for q in runs.quality if q.timed}
    assert [point.retention for point in panel.points] == [of_timed[point.candidate.id] for point in panel.points]


def test_points_on_other_documents_make_no_front(tmp_path: Path) -> None:
    """Workloads were told apart by their names, and the retention of whole tasks was taken from any set of tasks."""
    fast, slow = made.block_diffusion(8), made.block_diffusion(16)
    speed = made.speed_run(tmp_path, decoders=(fast, slow))
    few = made.quality_run(tmp_path, decoders=(fast,), tasks=["arithmetic"])
    many = made.quality_run(tmp_path, decoders=(slow,), run_id="20261103T120000Z-run-cccccc")
    [panel] = Runs([store.load(path) for path in (speed, few, many)]).trade_offs
    assert [point.candidate.decoder for point in panel.points] == [slow]
    both = made.quality_run(tmp_path / "both", decoders=(fast, slow), tasks=["arithmetic"])
    [panel] = Runs([store.load(path) for path in (speed, both)]).trade_offs
    assert len(panel.points) == 2

    run = store.load(made.speed_run(tmp_path / "other", decoders=(slow,)))
    cells = [
        dataclasses.replace(
            cell, id=f"{i}" * 12, workload=dataclasses.replace(cell.workload, digest=sha256_text("other prompts"))
        )
        for i, cell in enumerate(run.manifest.cells)
    ]
    ids = {old.id: new.id for old, new in zip(run.manifest.cells, cells, strict=True)}
    header = dataclasses.replace(run.manifest, run_id="20261104T120000Z-speed-dddddd", cells=tuple(cells))
    rows = [dataclasses.replace(sample, cell=ids[sample.cell]) for sample in run.speed]
    other = made.write(tmp_path / "other prompts", header, rows)
    alone = made.speed_run(tmp_path / "alone", decoders=(fast,))
    panels = Runs([store.load(path) for path in (alone, other, both)]).trade_offs
    assert [[point.candidate.decoder for point in panel.points] for panel in panels] == [[fast], [slow]]


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
                num_prompt_tokens=3, num_tokens=len(text.encode()), num_discarded_tokens=0, num_context_forwards=1,
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
    (panel,) = runs.trade_offs
    assert panel.same_outputs
    (trade_off,) = panel.points
    assert trade_off.retention.value == pytest.approx(7 / 8)


def test_answers_that_were_not_scored_say_so(tmp_path: Path) -> None:
    (point,) = answered(tmp_path, scored=False).speed
    assert {sample.candidate.score for sample in point.samples} == {None}
    assert {sample.candidate.score_reason for sample in point.samples} == {"not scored"}
    assert {sample.metric for sample in point.samples} == {None}


def test_there_are_no_samples_where_no_text_was_kept(tmp_path: Path) -> None:
    (point,) = Runs([store.load(made.speed_run(tmp_path, workload="fixed"))]).speed
    assert point.samples == ()
