"""Runs whose files contradict each other: every kind is found and named, an honest run has none."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from report_fixture import (
    AUTOREGRESSIVE,
    PAIR,
    block_diffusion,
    make_cell,
    manifest,
    quality_run,
    speed_run,
)

from twotower_eval import cli, store
from twotower_eval.analyse import report
from twotower_eval.analyse.compare.consistency import CHECKS, contradictions
from twotower_eval.analyse.words.gates import contradiction_text
from twotower_eval.records import (
    FileDigest,
    Generation,
    GenerationRow,
    Passes,
    PromptTiming,
    RunManifest,
    Score,
    SpeedSample,
    Workload,
    canonical_json,
    cell_id,
    sha256_text,
)
from twotower_eval.store import Run
from twotower_eval.store.journal import DONE, close_run

RUN_ID, ROUNDS, DOCS = "20261103T120000Z-speed-cccccc", 3, 4
PLAN = {"workload": "answer", "batch_sizes": [2], "dtype": "float32", "seed": 7}
WORK = Workload(kind="answer", name="answer: sums", digest="d", max_new_tokens=8, batch_size=2, num_devices=1)
CELLS = tuple(
    dataclasses.replace(
        make_cell(arm, decoder, WORK),
        extra={"seed": None},
        id=cell_id(make_cell(arm, decoder, WORK).checkpoint, decoder, WORK, {"seed": None}),
    )
    for arm, decoder in (("baseline", AUTOREGRESSIVE), ("candidate", block_diffusion()))
)


def answer(cell: str, doc: int) -> Generation:
    wrong = cell == CELLS[1].id and doc == 0
    text = "no" if wrong else f"{doc}"
    ids = (9, 9, 9) if wrong else (doc, 1)
    denoised = 0 if cell == CELLS[0].id else 2
    return Generation(
        prompt_id=f"sums/{doc}",
        token_ids=ids,
        text=text,
        finish="eos",
        num_prompt_tokens=5 + doc,
        num_tokens=len(ids),
        num_discarded_tokens=0,
        num_context_forwards=len(ids) if not denoised else 1,
        num_denoiser_forwards=denoised,
    )


def generation_row(cell: str, doc: int, round_: int) -> GenerationRow:
    return GenerationRow(
        cell=cell,
        task="sums",
        doc_id=doc,
        request_index=0,
        repeat=round_,
        prompt_sha256=sha256_text(f"prompt {doc}"),
        generation=answer(cell, doc),
    )


def timing(made: Generation) -> PromptTiming:
    counts = {f.name: getattr(made, f.name) for f in dataclasses.fields(PromptTiming) if hasattr(made, f.name)}
    tokens_sha256 = sha256_text(canonical_json(list(made.token_ids)))
    return PromptTiming(**{**counts, "finish_s": 0.5, "tokens_sha256": tokens_sha256})


def sample(cell: str, round_: int, call: int, second: int) -> SpeedSample:
    made = [answer(cell, 2 * call + slot) for slot in (0, 1)]
    context, denoised = (sum(getattr(g, f"num_{kind}_forwards") for g in made) for kind in ("context", "denoiser"))
    passes = [Passes(kind="extend", rows=1, tokens=1, num=context)]
    passes += [Passes(kind="denoise", rows=2, tokens=16, num=denoised // 2)] if denoised else []
    return SpeedSample(
        call_id=f"b2-{call}",
        launch_id=f"{RUN_ID}/1",
        cell=cell,
        replica=0,
        round=round_,
        phase="measure",
        batch_size=2,
        wall_s=0.9,
        prefill_s=None,
        first_output_s=None,
        peak_memory_bytes=None,
        peak_memory_reason="none",
        started_at=f"2026-11-03T12:00:{second:02}.000+00:00",
        prompts=tuple(map(timing, made)),
        passes=tuple(passes),
    )


def score(cell: str, doc: int, **changes: Any) -> Score:
    plain = Score(
        cell=cell,
        task="sums",
        doc_id=doc,
        cluster_id=f"sums/{doc}",
        doc_sha256=sha256_text(f"doc {doc}"),
        prompt_sha256=sha256_text(f"prompt {doc}"),
        target_sha256=sha256_text(f"{doc}"),
        metric="exact_match",
        filter="none",
        higher_is_better=True,
        headline=True,
        scored_by="generation",
        value=float(answer(cell, doc).text == f"{doc}"),
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def honest(tmp_path: Path) -> Run:
    """Two cells, three rounds of two calls of two prompts, scored: as the tool writes them."""
    told = {"plan": PLAN, "plan_sha256": sha256_text(canonical_json(PLAN))}
    header = manifest(RUN_ID, "speed", CELLS, **told)
    with store.create(tmp_path, header) as writer:
        writer.event("launched", launch=f"{RUN_ID}/1", process="p")
        second = 0
        for round_ in range(ROUNDS):
            for cell in CELLS:
                for call in range(DOCS // 2):
                    for doc in (2 * call, 2 * call + 1):
                        writer.append(generation_row(cell.id, doc, round_))
                    writer.append(sample(cell.id, round_, call, second))
                    second += 1
        writer.event("measured", num_rounds=ROUNDS, timed_s=0.9 * second)
        for cell in CELLS:
            for doc in range(DOCS):
                writer.append(score(cell.id, doc))
            writer.event("cell_done", cell=cell.id, task="sums", num_documents=DOCS)
        writer.finish()
    return store.load(writer.path)


def test_an_honest_run_agrees_with_itself(honest: Run) -> None:
    assert contradictions(honest) == ()


Edit = Callable[[Run], Run]


def speed(change: Callable[[SpeedSample], SpeedSample | None]) -> Edit:
    """Rows of speed.jsonl changed, or dropped."""
    return lambda run: dataclasses.replace(run, speed=[new for row in run.speed if (new := change(row)) is not None])


def first_prompt(**changes: Any) -> Callable[[SpeedSample], SpeedSample]:
    """The first prompt of one call of the candidate."""

    def change(row: SpeedSample) -> SpeedSample:
        if (row.cell, row.round, row.call_id) != (CELLS[1].id, 1, "b2-1"):
            return row
        return dataclasses.replace(row, prompts=(dataclasses.replace(row.prompts[0], **changes), *row.prompts[1:]))

    return speed(change)  # type: ignore[return-value]


def call(**changes: Any) -> Edit:
    is_it = lambda row: (row.cell, row.round, row.call_id) == (CELLS[1].id, 1, "b2-1")  # noqa: E731
    return speed(lambda row: dataclasses.replace(row, **changes) if is_it(row) else row)


def scores(change: Callable[[Score], Score | None]) -> Edit:
    return lambda run: dataclasses.replace(run, scores=[new for row in run.scores if (new := change(row)) is not None])


def one_score(**changes: Any) -> Edit:
    return scores(
        lambda row: dataclasses.replace(row, **changes) if (row.cell, row.doc_id) == (CELLS[1].id, 1) else row
    )


def answers(change: Callable[[GenerationRow], GenerationRow | None]) -> Edit:
    return lambda run: dataclasses.replace(
        run, generations=[new for row in run.generations if (new := change(row)) is not None]
    )


def retold(row: GenerationRow, **changes: Any) -> GenerationRow:
    is_it = (row.cell, row.doc_id, row.repeat) == (CELLS[1].id, 1, 1)
    return dataclasses.replace(row, generation=dataclasses.replace(row.generation, **changes)) if is_it else row


def head(**changes: Any) -> Edit:
    return lambda run: dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, **changes))


def told(kind: str, **changes: Any) -> Edit:
    return lambda run: dataclasses.replace(
        run, events=[{**event, **changes} if event["kind"] == kind else event for event in run.events]
    )


def other_decoder(run: Run) -> Run:
    cells = (CELLS[0], dataclasses.replace(CELLS[1], decoder=block_diffusion(16, 4)))
    return head(cells=cells)(run)


def read_by(tokenizer: str) -> Edit:
    """Both arms of one tokenizer, by the files of their checkpoints; ids follow."""

    def change(run: Run) -> Run:
        files = (FileDigest(name="tokenizer.json", sha256=tokenizer),)
        cells = [dataclasses.replace(c, checkpoint=dataclasses.replace(c.checkpoint, files=files)) for c in CELLS]
        ids = {c.id: cell_id(c.checkpoint, c.decoder, c.workload, c.extra) for c in cells}
        run = head(cells=tuple(dataclasses.replace(c, id=ids[c.id]) for c in cells))(run)
        rows = {n: [dataclasses.replace(r, cell=ids[r.cell]) for r in getattr(run, n)] for n in ROWS}
        events = [{**e, "cell": ids[e["cell"]]} if "cell" in e else e for e in run.events]
        return dataclasses.replace(run, events=events, **rows)

    return change


ROWS = ("speed", "generations", "scores")


def longer_prompt_of_the_candidate(run: Run) -> Run:
    run = read_by("one")(run)
    candidate = run.manifest.cells[1].id

    def longer(prompt: PromptTiming) -> PromptTiming:
        return dataclasses.replace(prompt, num_prompt_tokens=prompt.num_prompt_tokens + 1)

    rows = [
        dataclasses.replace(r, prompts=tuple(map(longer, r.prompts))) if r.cell == candidate else r for r in run.speed
    ]
    made = [
        dataclasses.replace(r, generation=dataclasses.replace(r.generation, num_prompt_tokens=6 + r.doc_id))
        if r.cell == candidate
        else r
        for r in run.generations
    ]
    return dataclasses.replace(run, speed=rows, generations=made)


def without_round(row: SpeedSample) -> SpeedSample | None:
    return None if row.round == 1 else row


def without_call(row: SpeedSample) -> SpeedSample | None:
    return None if (row.cell, row.round, row.call_id) == (CELLS[1].id, 1, "b2-1") else row


def faster(row: SpeedSample) -> SpeedSample:
    return dataclasses.replace(row, wall_s=row.wall_s / 10) if row.cell == CELLS[1].id else row


def slower(row: SpeedSample) -> SpeedSample:
    return dataclasses.replace(row, wall_s=row.wall_s * 2) if row.cell == CELLS[0].id else row


def swapped(row: SpeedSample) -> SpeedSample:
    return dataclasses.replace(row, prompts=row.prompts[::-1]) if (row.cell, row.round) == (CELLS[1].id, 1) else row


def later_launch(row: SpeedSample) -> SpeedSample:
    return dataclasses.replace(row, launch_id=f"{RUN_ID}/2") if row.round == 2 else row


EDITS: dict[str, tuple[Edit, str, str]] = {
    "time divided": (
        speed(faster),
        "seconds recorded",
        "10.800 s on the clock, the calls of speed.jsonl add up to 5.9",
    ),
    "time doubled": (speed(slower), "calls overlap", "took 1.800 s, and the next call of its launch began 1.000 s"),
    "a round deleted": (speed(without_round), "rounds recorded", "recorded 3 measured rounds, speed.jsonl has 2"),
    "a call deleted": (speed(without_call), "rounds recorded", "recorded 3 measured rounds, speed.jsonl has 2"),
    "answers left over": (
        speed(without_round),
        "answer without call",
        "has an answer, but its timed call is missing",
    ),
    "seconds retold": (told("measured", timed_s=5.0), "seconds recorded", "recorded 5.000 s on the clock"),
    "documents retold": (
        told("cell_done", num_documents=400),
        "documents recorded",
        "recorded 400 documents of task sums",
    ),
    "a launch renamed": (speed(later_launch), "launch not recorded", f"speed.jsonl has launch {RUN_ID}/2"),
    "the plan edited": (head(plan={**PLAN, "seed": 8}), "plan hash", "but the plan hashes to"),
    "another plan": (
        head(plan={**PLAN, "dtype": "bfloat16"}),
        "plan and cells",
        "dtype is bfloat16 in the plan and float32 in its cells",
    ),
    "a decoder edited": (other_decoder, "cell id", f"the id of cell {CELLS[1].id} does not follow"),
    "a batch size": (call(batch_size=3), "batch size", "has 3 prompts, its cell's batch size is 2"),
    "prompts in another order": (speed(swapped), "prompts of a call", "has different prompts in different rounds"),
    "num_tokens raised": (
        first_prompt(num_tokens=3),
        "call and answer",
        "num_tokens is 3 in the timed call and 2",
    ),
    "tokens of a hash": (first_prompt(num_tokens=3), "tokens of equal hash", "stands for 2 tokens and for 3"),
    "tokens beyond the budget": (
        first_prompt(num_tokens=9),
        "tokens beyond budget",
        "got 9 tokens, above the budget of 8",
    ),
    "a hash": (first_prompt(tokens_sha256=sha256_text("x")), "call and answer", "have different tokens"),
    "prompt tokens": (first_prompt(num_prompt_tokens=1), "prompt tokens", "has 7 tokens in one round and 1 in another"),
    "prompt tokens of one arm": (longer_prompt_of_the_candidate, "prompt tokens of arms", "in one arm and"),
    "forwards": (
        call(passes=(Passes(kind="denoise", rows=1, tokens=1, num=1),)),
        "forwards counted",
        "counted 0 (and 1",
    ),
    "an answer deleted": (
        answers(lambda row: None if (row.doc_id, row.repeat) == (1, 1) else row),
        "call without answer",
        "was timed, but its answer is missing",
    ),
    "a text changed": (answers(lambda row: retold(row, text="1!")), "text of equal tokens", "have two different texts"),
    "all answers to one document deleted": (
        answers(lambda row: None if row.doc_id == 1 else row),
        "score without answer",
        "has a score, but its answer is missing",
    ),
    "a document unscored": (scores(lambda row: None if row.doc_id == 1 else row), "answer without score", "no score"),
    "a score flipped": (one_score(value=0.0), "scores of equal answers", "are scored 1 and 0"),
    "a right answer called wrong": (one_score(value=0.0), "score of the target", "is the target itself"),
    "another prompt": (one_score(prompt_sha256="p"), "score of another prompt", "scored on another prompt"),
    "more than all": (one_score(value=1.5), "score outside 0 to 1", "is 1.5"),
}


@pytest.mark.parametrize(("edit", "kind", "words"), EDITS.values(), ids=EDITS)
def test_each_edit_is_found_and_named(honest: Run, edit: Edit, kind: str, words: str) -> None:
    found = {one.kind: contradiction_text(one) for one in contradictions(edit(honest))}
    assert kind in found
    assert words in found[kind]


def test_a_contradiction_is_facts_and_words_come_last(honest: Run) -> None:
    """Whoever read one had to take its figures out of a sentence."""
    edited = call(batch_size=3)(honest)
    [one] = [one for one in contradictions(edited) if one.kind == "batch size"]
    assert (one.file, one.field, one.stated, one.found, one.num) == ("speed.jsonl", "batch_size", 2, 3, 1)
    assert one.line is not None
    row = json.loads((honest.path / one.file).read_text(encoding="utf-8").splitlines()[one.line - 1])
    assert (row["cell"], row["call_id"], row["round"]) == (one.location.cell, one.location.call, one.location.round)
    [flipped] = [one for one in contradictions(one_score(value=1.5)(honest)) if one.kind == "score outside 0 to 1"]
    assert (flipped.file, flipped.found, flipped.location.document) == ("scores.jsonl", 1.5, 1)
    [retold] = [one for one in contradictions(told("measured", timed_s=5.0)(honest)) if one.kind == "seconds recorded"]
    assert (retold.stated, retold.found, retold.line) == (5.0, pytest.approx(10.8), None)


def test_a_clock_that_is_set_once_contradicts_nothing(honest: Run) -> None:
    """One call of thousands that seems to overlap the next one, by more than 2 ms, made the run INVALID."""
    rows = list(honest.speed)
    rows[5] = dataclasses.replace(rows[5], started_at=rows[5].started_at.replace(".000", ".400"))
    assert contradictions(dataclasses.replace(honest, speed=rows)) == ()


@pytest.mark.parametrize(
    ("metric", "outcome"), [("pass@1", []), ("pass_at_1", []), ("acc", ["scores of equal answers"])]
)
def test_code_that_ran_out_of_time_in_one_arm_contradicts_nothing(honest: Run, metric: str, outcome: list[str]) -> None:
    """Equal answers that are run as code need not end alike: a sandbox has its limits."""
    run = one_score(value=0.0)(scores(lambda row: dataclasses.replace(row, metric=metric))(honest))
    assert [one.kind for one in contradictions(run)] == outcome


def test_a_launch_that_goes_on_tells_of_all_before_it_or_of_its_own_rounds(honest: Run) -> None:
    """A resumed run counts all rounds, one of several launches its own."""
    run = speed(later_launch)(honest)
    first = [{"at": "t", "kind": "launched", "launch": f"{RUN_ID}/{n}"} for n in (1, 2)]
    for num, seconds in ((3, 10.8), (1, 3.6)):
        events = [*first, {"at": "t", "kind": "measured", "num_rounds": num, "timed_s": seconds}]
        assert not [c for c in contradictions(dataclasses.replace(run, events=events)) if "told" in c.kind]
    events = [*first, {"at": "t", "kind": "measured", "num_rounds": 2, "timed_s": 7.2}]
    assert "rounds recorded" in {one.kind for one in contradictions(dataclasses.replace(run, events=events))}


def test_a_call_without_a_time_contradicts_nothing(honest: Run) -> None:
    """It is void by itself; the seconds of its round are those that passed."""
    void = call(wall_s=-5.0)(honest)
    run = told("measured", timed_s=10.8 - 0.9)(void)
    assert contradictions(run) == ()


def test_what_is_not_recorded_is_not_looked_at(tmp_path: Path) -> None:
    """Made-up runs without moments, kept answers or telling ids, as tests and old versions write them."""
    for path in (quality_run(tmp_path, num_docs=30), speed_run(tmp_path, num_rounds=2, num_calls=2)):
        run = store.load(path)
        assert contradictions(run) == ()
        named = [dataclasses.replace(cell, id=f"{n:012}") for n, cell in enumerate(run.manifest.cells)]
        assert list(CHECKS["cell id"](head(cells=tuple(named))(run))) == []


def published() -> Sequence[Path]:
    root = Path(__file__).parent.parent / "results" / "published"
    return [path for path in sorted(root.glob("*/*")) if "speed-e406b9" not in path.name]  # that one is large


@pytest.mark.parametrize("path", published(), ids=lambda path: path.name)
def test_published_runs_agree_with_themselves(path: Path) -> None:
    assert contradictions(store.load(path)) == ()


def test_likelihoods_computed_once_are_scored_alike(tmp_path: Path) -> None:
    run = store.load(quality_run(tmp_path, tasks=("choice",), num_docs=30, perplexity=False))
    candidate = next(cell.id for cell in run.manifest.cells if cell.arm == "candidate")
    edited = scores(
        lambda row: dataclasses.replace(row, value=0.5) if (row.cell, row.doc_id) == (candidate, 3) else row
    )
    [found] = contradictions(edited(run))
    assert found.kind == "scores of one likelihood"


CLAIM = """title = "t"
[[point]]
name = "p"
decoder = { kind = "block_diffusion", block_size = 16, steps_per_block = 16, threshold = 0.8 }
[[claim]]
name = "kept"
quantity = "retention"
subject = "pair"
baseline = "context-tower"
point = "p"
scope = ["arithmetic"]
expected = 0.5
margin = 0.05
source = "us"
"""


def test_edited_files_are_invalid_and_loud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One score flipped, the closing file made again: it was SUPPORTED, as if nothing had been touched."""
    path = quality_run(tmp_path / "runs", tasks=("arithmetic",), perplexity=False, cut={})
    claims = tmp_path / "claims.toml"
    claims.write_text(CLAIM, encoding="utf-8")
    assert cli.main(["claims", "check", str(claims), str(path)]) == 0
    lines = (path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[0])
    lines[0] = json.dumps({**row, "value": 1 - row["value"]}, separators=(",", ":"))
    (path / "scores.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path / DONE).unlink()
    close_run(path, store.FILES)
    capsys.readouterr()
    assert cli.main(["claims", "check", str(claims), str(path)]) == 5
    text = capsys.readouterr().out
    assert "INVALID" in text
    assert f"files agree: run {path.name} contradicts itself: scores.jsonl: lines 1 to " in text
    folder = report.write([path], tmp_path / "out", claims=str(claims), sections=["headline", "gates"])
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert f"> **INVALID: the files of run `{path.name}` contradict each other: scores.jsonl: lines 1 to" in markdown
    assert "| files agree | **FAILED** | scores.jsonl" in markdown


def test_lines_lost_from_a_finished_run_are_missed(tmp_path: Path) -> None:
    path = quality_run(tmp_path / "runs", tasks=("arithmetic",), perplexity=False, cut={})
    lines = (path / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    (path / "generations.jsonl").write_text("\n".join(lines[:-10]) + "\n", encoding="utf-8")
    (path / DONE).unlink()
    unfinished = {one.kind for one in contradictions(store.load(path))}
    assert "journal short" not in unfinished  # a crash may have taken them, and a resume makes them again
    close_run(path, store.FILES)
    assert "journal short" in {one.kind for one in contradictions(store.load(path))}


def test_a_point_that_was_edited_away_is_invalid_not_unmeasured(tmp_path: Path) -> None:
    from twotower_eval.analyse.claims import judge
    from twotower_eval.analyse.claims.files import claims_from
    from twotower_eval.resources import read_toml

    run = store.load(quality_run(tmp_path / "runs", tasks=("arithmetic",), perplexity=False))
    (tmp_path / "claims.toml").write_text(CLAIM, encoding="utf-8")
    claims = claims_from("claims", read_toml(tmp_path / "claims.toml", "claims")).claims
    edited: RunManifest = dataclasses.replace(
        run.manifest,
        cells=tuple(
            dataclasses.replace(c, decoder=block_diffusion(8)) if c.checkpoint == PAIR else c
            for c in run.manifest.cells
        ),
    )
    [verdict] = judge(claims, [dataclasses.replace(run, manifest=edited)])
    assert verdict.outcome == "INVALID"
    assert "does not follow from its checkpoint, decoder and workload" in verdict.reason
