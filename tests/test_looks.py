"""Looks: every run towards a claim counts, given or not, and each further one is judged more strictly."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_fixture import RUN_ID, SPEED_ID, Row, quality_run, speed_run
from test_claims_judge import BOTH, FAST, KEPT, claims_of

import twotower_eval as tt
from twotower_eval import cli, store
from twotower_eval.analyse import stats
from twotower_eval.analyse.claims import exit_code, judge, strict_line, verdict_lines
from twotower_eval.analyse.claims.looks import num_measurings
from twotower_eval.analyse.claims.ruling import look_text
from twotower_eval.records import Score, SpeedSample, Verdict
from twotower_eval.store import Run

SECOND_ID, SECOND_SPEED_ID = "20261105T120000Z-run-dddddd", "20261106T120000Z-speed-eeeeee"


def worse(row: Row) -> Row:
    """The candidate loses whatever it had right in the first ninety documents."""
    lost = isinstance(row, Score) and row.scored_by == "generation" and row.doc_id < 90
    return dataclasses.replace(row, value=0.0) if lost and row.cell in CANDIDATES else row


CANDIDATES: set[str] = set()


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = store.load(quality_run(tmp_path_factory.mktemp("kept")))
    CANDIDATES.update(cell.id for cell in run.manifest.cells if cell.arm == "candidate")
    return run


def relaunched(root: Path, *, run_id: str = SECOND_SPEED_ID, slower: float = 1.0, **options: Any) -> Run:
    """Another speed run of the same cells, its launch with a name of its own."""

    def change(row: Row) -> Row:
        if not isinstance(row, SpeedSample):
            return row
        factor = slower if row.prompts[0].num_denoiser_forwards else 1.0
        return dataclasses.replace(row, launch_id=run_id, wall_s=row.wall_s * factor)

    return store.load(speed_run(root, run_id=run_id, edit=change, **options))


def verdict_on(table: dict[str, Any], runs: list[Run]) -> Verdict:
    [verdict] = judge(claims_of(table), runs)
    return verdict


@pytest.mark.parametrize("declared", [1, 2, 3, 20])
def test_all_looks_together_err_less_than_six_in_a_hundred(declared: int) -> None:
    spent = [stats.look_alpha(num, declared) for num in range(1, declared + 12)]
    assert sum(alpha for alpha in spent if alpha is not None) < 0.06
    assert spent[:declared] == [0.05 / declared] * declared
    assert spent[declared : declared + 5] == [0.005, 0.0025, 0.00125, 0.000625, None]
    assert stats.strictest_alpha() == 0.000625
    with pytest.raises(ValueError, match="at least one of each"):
        stats.look_alpha(0)


def test_a_second_timing_is_pooled_counted_and_judged_more_strictly(tmp_path: Path, kept_run: Run) -> None:
    """Measuring again until it is supported cost nothing."""
    first = store.load(speed_run(tmp_path / "a", scored=True))
    once = verdict_on(FAST, [kept_run, first])
    again = verdict_on(FAST, [kept_run, first, relaunched(tmp_path / "b", scored=True)])
    assert (once.num_looks, once.level, again.num_looks, again.level) == (1, 0.95, 2, 0.995)
    assert again.estimate is not None
    assert once.estimate is not None
    assert (once.estimate.level, again.estimate.level) == (pytest.approx(0.9), pytest.approx(0.99))
    assert set(again.evidence) == {RUN_ID, SPEED_ID, SECOND_SPEED_ID}
    line, counts = verdict_lines(claims_of(FAST), [again])
    assert "second look, one was declared: bounds are one-sided 99.5 %" in line
    assert "one-sided 99.5 % bounds" in counts
    assert "look" not in verdict_lines(claims_of(FAST), [once])[0]
    both = verdict_lines(claims_of(FAST, KEPT), [again, *judge(claims_of(KEPT), [kept_run])])[-1]
    assert "one-sided bounds, at 95 % where no other level is named" in both


def test_declared_looks_share_the_error_rate(tmp_path: Path, kept_run: Run) -> None:
    planned = {**FAST, "looks": 2}
    first = store.load(speed_run(tmp_path / "a", scored=True))
    for runs, num, nth in (([first], 1, "first"), ([first, relaunched(tmp_path / "b", scored=True)], 2, "second")):
        verdict = verdict_on(planned, [kept_run, *runs])
        assert (verdict.num_looks, verdict.level) == (num, 0.975)
        assert (
            f"{nth} look, 2 were declared: bounds are one-sided 97.5 %"
            in verdict_lines(claims_of(planned), [verdict])[0]
        )


def test_looking_without_end_decides_nothing(tmp_path: Path, kept_run: Run) -> None:
    more = [
        relaunched(tmp_path / str(num), run_id=f"2026120{num}T120000Z-speed-eeeeee", scored=True, num_rounds=4)
        for num in range(1, 7)
    ]
    five = verdict_on(FAST, [kept_run, *more[:5]])
    assert (five.num_looks, five.level) == (5, 1 - 0.000625)
    six = verdict_on({**FAST, "expected": 1.1}, [kept_run, *more])
    assert (six.outcome, six.num_looks) == ("INCONCLUSIVE", 6)
    assert "too many looks (sixth look, one was declared): no error rate is left" in six.reason


def test_what_is_left_open_says_what_a_further_look_costs(tmp_path: Path, kept_run: Run) -> None:
    fast = verdict_on(FAST, [kept_run, store.load(speed_run(tmp_path, scored=True))])
    assert fast.estimate is not None
    near = {**FAST, "expected": round(fast.estimate.value, 2), "margin": 0.0}
    for declared, words in ((1, "look is judged at 99.5 %"), (2, "look is judged at 97.5 %")):
        claims = claims_of({**near, "looks": declared})
        verdict = judge(claims, [kept_run, store.load(tmp_path / SPEED_ID)])[0]
        assert f"more runs would be {words.removeprefix('look is ')}" in verdict_lines(claims, [verdict])[0]
    spent = dataclasses.replace(verdict, num_looks=6)
    assert "more runs can decide nothing" in verdict_lines(claims_of(near), [spent])[0]


def test_an_equal_run_is_no_look_and_the_first_is_judged(tmp_path: Path, kept_run: Run) -> None:
    again = store.load(quality_run(tmp_path, run_id=SECOND_ID))
    verdict = verdict_on(KEPT, [kept_run, again])
    assert (verdict.num_looks, verdict.level, verdict.evidence) == (1, 0.95, (RUN_ID,))


def test_the_run_of_most_documents_is_judged_however_new_the_others_are(tmp_path: Path, kept_run: Run) -> None:
    """The newest was, and nothing said that there was another."""
    few = store.load(quality_run(tmp_path / "few", run_id=SECOND_ID, num_docs=60))
    verdict = verdict_on(KEPT, [kept_run, few])
    assert (verdict.num_looks, verdict.level, verdict.evidence) == (2, 0.995, (RUN_ID,))
    trial = store.load(quality_run(tmp_path / "trial", run_id=SECOND_ID, num_docs=5))
    assert verdict_on(KEPT, [kept_run, trial]).num_looks == 1, "nothing can be decided by ten documents"


def test_looks_that_contradict_each_other_decide_nothing(tmp_path: Path, kept_run: Run) -> None:
    """An older REFUTED was passed over for a newer SUPPORTED."""
    bad = store.load(quality_run(tmp_path, run_id=SECOND_ID, edit=worse))
    claim = {**KEPT, "expected": 0.7}
    assert verdict_on(claim, [bad]).outcome == "REFUTED"
    assert verdict_on(claim, [kept_run]).outcome == "SUPPORTED"
    verdict = verdict_on(claim, [kept_run, bad])
    assert verdict.outcome == "INCONCLUSIVE"
    assert f"{RUN_ID} is SUPPORTED, {SECOND_ID} is REFUTED" in verdict.reason


def test_timings_on_other_machines_that_contradict_each_other_decide_nothing(tmp_path: Path, kept_run: Run) -> None:
    first = store.load(speed_run(tmp_path / "a", scored=True))
    machine = {"system": "Linux", "cpu": "another", "num_cores": 2, "devices": [{"device": "cpu"}]}
    other = relaunched(tmp_path / "b", scored=True, slower=2.0, machine=machine)
    verdict = verdict_on(FAST, [kept_run, first, other])
    assert (verdict.outcome, verdict.num_looks) == ("INCONCLUSIVE", 2)
    assert f"{SECOND_SPEED_ID} is REFUTED, {SPEED_ID} is SUPPORTED" in verdict.reason


@pytest.mark.parametrize("complete", [True, False])
def test_runs_beside_the_given_ones_count_and_are_named(tmp_path: Path, kept_run: Run, complete: bool) -> None:
    """A run that was left off the command line had never been."""
    first = store.load(speed_run(tmp_path, scored=True))
    relaunched(tmp_path, scored=True, complete=complete)
    kept, fast, both = judge(claims_of(KEPT, FAST, BOTH), [kept_run, first])
    assert (kept.not_given, fast.not_given, both.not_given) == ((), (SECOND_SPEED_ID,), (SECOND_SPEED_ID,))
    assert (fast.num_looks, fast.level) == (2, 0.995)
    line = verdict_lines(claims_of(KEPT, FAST, BOTH), [kept, fast, both])[1]
    assert f"1 further run of this point lies in the results folder, unused: {SECOND_SPEED_ID}" in line
    five = dataclasses.replace(fast, scope=None)
    assert (exit_code([five]), exit_code([five], strict=True)) == (0, 4)
    left_out = "SUPPORTED verdict{} out runs of the same point in this results folder and {} as inconclusive"
    assert f"1 {left_out.format(' leaves', 'counts')}" in strict_line([five])
    assert f"2 {left_out.format('s leave', 'count')}" in strict_line([five, five])


def test_a_run_that_was_left_out_may_contradict_the_given_one(tmp_path: Path, kept_run: Run) -> None:
    """Giving the better of two runs was enough."""
    quality, first = store.load(quality_run(tmp_path)), store.load(speed_run(tmp_path, scored=True))
    quality_run(tmp_path, run_id=SECOND_ID, edit=worse)
    relaunched(tmp_path, scored=True, slower=2.0)
    kept, fast = judge(claims_of({**KEPT, "expected": 0.7}, FAST), [quality, first])
    assert (kept.outcome, fast.outcome) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert f"{RUN_ID} is SUPPORTED, {SECOND_ID} is REFUTED" in kept.reason
    assert f"{SPEED_ID} is SUPPORTED, {SECOND_SPEED_ID} is REFUTED" in fast.reason


def warm_up_only(row: Row) -> Row | None:
    return row if isinstance(row, SpeedSample) and row.phase == "warmup" else None


def test_what_showed_nothing_of_the_point_is_no_look(tmp_path: Path, kept_run: Run) -> None:
    first = store.load(speed_run(tmp_path, scored=True))
    speed_run(tmp_path, run_id=SECOND_SPEED_ID, complete=False, edit=warm_up_only)
    speed_run(tmp_path, run_id="20261107T120000Z-speed-ffffff", batch_sizes=(4,), scored=True)
    speed_run(tmp_path, run_id="20261108T120000Z-speed-ffffff", workload="fixed")
    quality_run(tmp_path, run_id="20261109T120000Z-run-ffffff", num_docs=5)
    quality_run(tmp_path, run_id="20261110T120000Z-run-ffffff")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / store.MANIFEST).write_text("{")
    quality = store.load(quality_run(tmp_path))
    kept, fast = judge(claims_of(KEPT, FAST), [quality, first])
    assert (kept.not_given, fast.not_given, kept.num_looks, fast.num_looks) == ((), (), 1, 1)
    differing = quality_run(tmp_path, run_id="20261111T120000Z-run-ffffff", edit=worse)
    kept = verdict_on(KEPT, [quality, first])
    assert (kept.not_given, kept.num_looks) == ((differing.name,), 2)


def of_task(root: Path, run_id: str, task: str, device: str) -> Run:
    """A speed run on the prompts of one task, on one device."""

    def change(row: Row) -> Row:
        if not isinstance(row, SpeedSample):
            return row
        prompts = [dataclasses.replace(one, prompt_id=f"{task}/{one.prompt_id[1:]}") for one in row.prompts]
        return dataclasses.replace(row, launch_id=run_id, prompts=tuple(prompts))

    machine = {"system": "Linux", "num_cores": 2, "devices": [{"device": "cuda:0", "name": device}]}
    return store.load(speed_run(root, run_id=run_id, edit=change, machine=machine))


@pytest.mark.parametrize(
    ("point", "task", "device", "num"),
    [
        ({"timed_tasks": ["sorting"]}, "arithmetic", "NVIDIA H100", 1),
        ({"timed_tasks": ["sorting"]}, "sorting", "NVIDIA H100", 2),
        ({"hardware": "H100"}, "sorting", "NVIDIA A100", 1),
        ({"hardware": "H100"}, "arithmetic", "NVIDIA H100", 2),
        ({}, "arithmetic", "NVIDIA A100", 2),
    ],
)
def test_a_run_beside_counts_only_where_it_times_the_point_itself(
    tmp_path: Path, kept_run: Run, point: dict[str, Any], task: str, device: str, num: int
) -> None:
    """Timings of other tasks or on other machines took their price, though no verdict could be made of them."""
    first = of_task(tmp_path, SPEED_ID, "sorting", "NVIDIA H100")
    of_task(tmp_path, SECOND_SPEED_ID, task, device)
    [verdict] = judge(claims_of(FAST, **point), [kept_run, first])
    assert (verdict.num_looks, len(verdict.not_given)) == (num, num - 1)


@pytest.mark.parametrize(("num", "words"), [(1, "first look"), (10, "tenth look"), (11, "look 11")])
def test_looks_are_counted_in_words(num: int, words: str) -> None:
    assert look_text(num) == words
    assert look_text(num, 1) == f"{words}, one was declared"
    assert look_text(num, 2) == f"{words}, 2 were declared"


def measured(*numbers: int, launched: bool = True, missing: int = 0) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"kind": "started"}]
    for number in numbers:
        events += [{"kind": "launched"}] * launched
        events += [{"kind": "measured", "num_rounds": number, "num_missing": missing}]
    return events


@pytest.mark.parametrize(
    ("events", "num"),
    [
        ([], 1),
        (measured(5), 1),
        (measured(5, 9), 2),
        (measured(5, 5, launched=False), 1),
        (measured(5, 9, launched=False), 2),
        (measured(2, 2, missing=1) + measured(2), 1),
    ],
)
def test_rounds_added_to_a_finished_run_are_another_look(kept_run: Run, events: list[dict[str, Any]], num: int) -> None:
    assert num_measurings(dataclasses.replace(kept_run, events=events)) == num


def test_a_resume_that_adds_nothing_to_several_launches_is_no_look(kept_run: Run) -> None:
    """Such a resume tells of 0 rounds of its own, and these were counted as another measuring."""
    events = [*measured(5, missing=1), *measured(5), {"kind": "finished"}, {"kind": "resumed"}]
    events += measured(0, launched=False)[1:]
    assert num_measurings(dataclasses.replace(kept_run, events=events)) == 1


def in_steps(root: Path, run: Run, key: Callable[[Any], float], *steps: float, complete: bool = True) -> Run:
    """The run as if it was made in steps, each of them finished: rows below a step's number, by ``key``."""
    done: set[int] = set()
    rows: list[Row] = [*run.speed, *run.generations, *run.likelihoods, *run.scores]
    for number, step in enumerate(steps, start=1):
        again = store.resume(root / run.path.name, run.manifest) if done else store.create(root, run.manifest)
        with again as writer:
            for row in rows:
                if key(row) < step and id(row) not in done:
                    writer.append(row)
                    done.add(id(row))
            if complete or number < len(steps):
                writer.finish()
    return store.load(root / run.path.name)


@pytest.mark.parametrize(("steps", "num"), [((40,), 1), ((40, 40), 1), ((30, 40), 2), ((3, 30, 40, 40), 3)])
@pytest.mark.parametrize("complete", [True, False])
def test_documents_added_to_a_finished_run_are_another_look(
    tmp_path: Path, steps: tuple[int, ...], num: int, complete: bool
) -> None:
    """A run could be extended by --resume until its verdict pleased, and that cost nothing."""
    whole = store.load(quality_run(tmp_path / "a", tasks=("arithmetic", "sorting"), num_docs=40, perplexity=False))
    run = in_steps(tmp_path / "b", whole, lambda row: row.doc_id, *steps, complete=complete)
    assert len([event for event in run.events if event["kind"] == "finished"]) == len(steps) - (not complete)
    verdict = verdict_on(KEPT, [run])
    alpha = stats.look_alpha(num)
    assert alpha is not None
    assert (verdict.num_looks, verdict.level) == (num, pytest.approx(1 - alpha))
    other = dataclasses.replace(whole, manifest=dataclasses.replace(whole.manifest, run_id=SECOND_ID))
    assert verdict_on(KEPT, [run, other]).num_looks == num, "both say the same in the end"


def test_an_extended_run_beside_the_given_one_counts_twice(tmp_path: Path) -> None:
    whole = store.load(quality_run(tmp_path / "a", tasks=("arithmetic", "sorting"), num_docs=40, perplexity=False))
    given = store.load(quality_run(tmp_path / "b", tasks=("arithmetic", "sorting"), num_docs=60, perplexity=False))
    in_steps(
        tmp_path / "b",
        dataclasses.replace(
            whole, manifest=dataclasses.replace(whole.manifest, run_id=SECOND_ID), path=tmp_path / SECOND_ID
        ),
        lambda row: row.doc_id,
        30,
        40,
    )
    assert verdict_on(KEPT, [given]).num_looks == 3


def test_documents_of_other_tasks_are_no_look(tmp_path: Path) -> None:
    whole = store.load(quality_run(tmp_path / "a", tasks=("arithmetic", "sorting"), num_docs=40, perplexity=False))
    run = in_steps(tmp_path / "b", whole, lambda row: row.task != "arithmetic", 1, 2)
    assert verdict_on({**KEPT, "scope": ["arithmetic"]}, [run]).num_looks == 1
    assert verdict_on(KEPT, [run]).num_looks == 2


@pytest.mark.parametrize(
    ("steps", "complete", "num"), [((4,), True, 1), ((4, 4), True, 1), ((2, 4), True, 2), ((2, 4), False, 2)]
)
def test_calls_timed_after_a_run_was_complete_are_another_look(
    tmp_path: Path, steps: tuple[int, ...], complete: bool, num: int
) -> None:
    """Also where none finished it again: what was timed can be read."""
    whole = store.load(speed_run(tmp_path / "a", num_rounds=4, num_calls=2))
    run = in_steps(tmp_path / "b", whole, round_of, *steps, complete=complete)
    assert num_measurings(run) == num


def round_of(row: Any) -> int:
    return row.round if isinstance(row, SpeedSample) else getattr(row, "repeat", 0)


def test_looks_are_said_on_the_command_line(tmp_path: Path, kept_run: Run, capsys: Any) -> None:
    from test_claims_terms import CLAIM_FILE

    file = tmp_path / "mine.toml"
    file.write_text(CLAIM_FILE + "looks = 3\n")
    first = speed_run(tmp_path / "runs", scored=True)
    assert cli.main(["claims", "check", str(file), str(kept_run.path), str(first)]) == 0
    assert "first look, 3 were declared: bounds are one-sided 98.33 %" in capsys.readouterr().out
    file.write_text(CLAIM_FILE + "looks = 0\n")
    assert cli.main(["claims", "check", str(file), str(first)]) == 2
    assert "looks must be between 1 and 20, not 0" in capsys.readouterr().err


def test_an_unfinished_run_does_not_hide_an_older_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was begun and stopped took the place of the one with the result."""
    monkeypatch.chdir(tmp_path)
    results = Path("results")
    few: dict[str, Any] = {"tasks": ("arithmetic",), "perplexity": False, "num_docs": 5}
    for day, complete in ((1, True), (2, True), (3, False), (4, False)):
        begun = f"2026-11-0{day}T12:00:00.000+00:00"
        run_id = f"2026110{day}T120000Z-run-aaaaaa"
        quality_run(results, **few, run_id=run_id, complete=complete, started_at=begun)
    timed = speed_run(results, num_rounds=2, num_calls=2, complete=False)
    skipped = (
        "skipped, as newer but unfinished: 20261104T120000Z-run-aaaaaa, 20261103T120000Z-run-aaaaaa; "
        "to read them, name every run to read, by folder or id"
    )
    taken = f"the newest of each verb: 20261102T120000Z-run-aaaaaa, {timed.name}"
    assert cli.main(["claims", "check", "miniature"]) == 6
    assert capsys.readouterr().err == f"{skipped}\n{taken}\n"
    assert cli.main(["report", "--section", "setup"]) == 0
    told_by_report = f"{skipped}\n{taken}; 3 older runs in results are not used; name runs to use them\n"
    assert capsys.readouterr().err.startswith(f"{told_by_report}Quality at block 16")
    for call in (tt.compare, lambda: tt.judge("miniature"), lambda: tt.report(sections="setup")):
        with pytest.warns(UserWarning, match=skipped) as told:
            call()
        assert [one.filename for one in told] == [__file__]
