"""The product in Python: plans from keywords, runs as frames, comparisons, verdicts and pages."""

import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import report_fixture as made

import twotower_eval as tt
from tests.tiny_pair import write_pair
from twotower_eval import api, cli, store
from twotower_eval.analyse import report as report_room
from twotower_eval.analyse.claims import load_claims
from twotower_eval.api.given import plan_of
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_sources import model_source
from twotower_eval.records import to_json

SMALL: dict[str, Any] = {"tasks": ["miniature_sort", "miniature_choice"], "limit": 2, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def scored(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tt.Run:
    out = tmp_path_factory.mktemp("scored")
    return tt.evaluate(model=pair, block_sizes=4, thresholds=(0.9,), out=out, progress=False, **SMALL)


@pytest.fixture(scope="module")
def timed(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tt.Run:
    return tt.time(
        model=pair, tasks="miniature_sort", block_sizes=[4], thresholds=[0.9], num_prompts=3, new_tokens=6,
        min_rounds=2, warmup_rounds=1, probes=0, costs=False, threads=1, progress=False,
        out=tmp_path_factory.mktemp("timed"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of known truth, of quality and of speed."""
    out = tmp_path_factory.mktemp("measured")
    points = [made.block_diffusion(threshold=threshold) for threshold in (0.8, 0.9, 0.7)]
    small: dict[str, Any] = {"num_docs": 60, "tasks": ("arithmetic", "choice"), "perplexity": False}
    timed: dict[str, Any] = {"num_rounds": 6, "num_calls": 4, "batch_sizes": (1, 2)}
    return made.quality_run(out, decoders=points[:2], **small), made.speed_run(out, decoders=points[1:], **timed)


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [list, tuple])
def test_lists_tuples_and_single_values_are_one_plan(listed: Any) -> None:
    wanted = RunPlan(tasks=("gsm8k",), thresholds=(0.9,), block_sizes=(8,), steps=("auto",), devices=("cpu",))
    values = {"tasks": "gsm8k", "thresholds": 0.9, "block_sizes": 8, "steps": "auto", "devices": "cpu"}
    assert plan_of(RunPlan, None, None, values) == wanted
    assert plan_of(RunPlan, None, None, {name: listed([value]) for name, value in values.items()}) == wanted


def test_the_shipped_pair_is_named_miniature(tmp_path: Path) -> None:
    pair = model_source(RunPlan())
    assert model_source(plan_of(RunPlan, None, None, {"model": "miniature"})) == pair
    assert model_source(plan_of(RunPlan, RunPlan(model="mine"), None, {"model": "miniature"})) == pair
    assert plan_of(RunPlan, None, None, {"model": tmp_path}) == RunPlan(model=str(tmp_path))


def test_a_plan_may_be_given_whole_or_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('tasks = ["gsm8k"]\nlimit = 9\n')
    assert plan_of(RunPlan, file, None, {"limit": 4}) == RunPlan(tasks=("gsm8k",), limit=4)
    assert plan_of(RunPlan, str(file), None, {}) == RunPlan(tasks=("gsm8k",), limit=9)
    assert plan_of(SpeedPlan, SpeedPlan(min_rounds=3), None, {"threads": 1}) == SpeedPlan(min_rounds=3, threads=1)
    with pytest.raises(tt.UserError, match="must be a SpeedPlan or the path of a TOML file, not a RunPlan"):
        tt.time(RunPlan())  # type: ignore[arg-type]


def test_further_parameters_of_a_decoder_are_a_table() -> None:
    plan = plan_of(RunPlan, None, None, {"set": {"batch_mean_t": [True, False]}})
    assert plan == RunPlan(set={"batch_mean_t": (True, False)})
    assert plan_of(RunPlan, None, None, {"set": {"batch_mean_t": "true"}}) == RunPlan(set={"batch_mean_t": (True,)})
    with pytest.raises(tt.UserError, match="block_size is given twice"):
        plan_of(RunPlan, None, None, {"set": {"block_size": 8}, "block_sizes": 16})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tt.evaluate(treshold=0.9), r"unknown key 'treshold' \(did you mean 'thresholds'\?\)"),
        (lambda: tt.time(min_round=3), r"did you mean 'min_rounds'"),
        (lambda: tt.evaluate(limit="many"), "limit must be a whole number"),
        (lambda: tt.evaluate(thresholds=1.5), "a threshold is a probability"),
        (lambda: tt.evaluate(resume="no-such-run"), "'no-such-run' is no run"),
        (lambda: tt.load_run("no-such-run"), "'no-such-run' is no run"),
        (lambda: tt.size(), "name the config.json"),
        (lambda: tt.judge("miniatur", "x"), "did you mean 'miniature'"),
        (lambda: tt.judge("miniature", names="fastr"), "did you mean 'faster'"),
        (lambda: tt.audit("miniature"), r"no \[published\] numbers"),
        (lambda: tt.compare(results="nowhere"), "no runs in nowhere"),
        (lambda: tt.compare([]), "the list of runs is empty"),
        (lambda: tt.judge("miniature", []), "the list of runs is empty"),
        (lambda: tt.report([], []), "the list of runs is empty"),
        (lambda: tt.compare(None), "None is no run: give its folder"),
        (lambda: tt.compare([None]), "None is no run: give its folder"),
        (lambda: tt.load_run(3), "3 is no run: give its folder"),
        (lambda: tt.evaluate("miniature"), "no plan file miniature: .* given as model='miniature'"),
        (lambda: tt.verify(plan="mine"), "no plan file mine: a plan is a VerifyPlan or a TOML file's path"),
    ],
)
def test_what_a_caller_can_mend_is_one_line(
    call: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tt.UserError, match=words) as found:
        call()
    assert isinstance(found.value, ValueError)
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "cls"), [(tt.evaluate, RunPlan), (tt.time, SpeedPlan), (tt.size, SizingPlan), (tt.verify, VerifyPlan)]
)
def test_a_signature_shows_every_field_with_its_default(function: Any, cls: type) -> None:
    shown = inspect.signature(function).parameters
    for field in dataclasses.fields(cls):
        assert field.name in shown
        if field.name not in ("model", "config"):
            assert shown[field.name].default == field.default


# --- runs -----------------------------------------------------------------------------------------------------------


def test_scores_carry_point_prompt_target_and_answer(scored: tt.Run) -> None:
    record = scored.record
    assert scored.complete
    assert scored.run_id == scored.path.name == record.manifest.run_id
    frame = scored.scores
    assert len(frame) == len(record.scores) == 8
    documents = {}
    for task in SMALL["tasks"]:
        file = Path(__file__).parent.parent / "tasks" / "miniature" / f"{task}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        documents |= {(task, number): json.loads(line) for number, line in enumerate(lines)}
    for row, stored in zip(frame.to_dict("records"), record.scores, strict=True):
        cell = record.cells[stored.cell]
        assert (row["arm"], row["decoder"], row["value"]) == (cell.arm, cell.decoder.kind, stored.value)
        document = documents[row["task"], row["doc_id"]]
        assert row["prompt"] == document["prompt"]
        assert row["target"] == document.get("answer", str(document.get("gold")))
        made_here = [g for g in record.generations if (g.cell, g.doc_id) == (stored.cell, stored.doc_id)]
        assert [row["answer"]] == [g.generation.text for g in made_here] or pd.isna(row["answer"])
    candidates = frame[frame["arm"] == "candidate"]
    assert set(candidates["threshold"]) == {0.9}
    assert set(candidates["block_size"]) == {4}


def test_generations_and_likelihoods_know_what_was_asked(scored: tt.Run) -> None:
    assert scored.generations["prompt"].notna().all()
    assert (scored.generations["num_tokens"] == [len(g.generation.token_ids) for g in scored.record.generations]).all()
    options = scored.likelihoods
    assert options["prompt"].notna().all()
    assert options.groupby(["task", "doc_id"])["option"].nunique().min() > 1
    assert (options["logprob_nats"] < 0).all()


def test_a_text_that_no_file_holds_is_none(measured: tuple[Path, Path]) -> None:
    frame = tt.load_run(measured[0]).scores
    assert frame["prompt"].isna().all()
    assert frame["target"].isna().all()
    assert frame["answer"].notna().any(), "answers are in the run itself"


def test_prompts_of_a_data_folder_are_found_by_their_hash(scored: tt.Run, tmp_path: Path) -> None:
    """A task of another name than any shipped one: its texts are in the folder that the plan names, or nowhere."""
    from twotower_eval.api.frames import known_texts

    record = scored.record
    mine = tmp_path / "data" / "mine"
    mine.mkdir(parents=True)
    prompts = ["sort this", "and that"]
    (mine / "test.jsonl").write_text("".join(json.dumps({"question": one}) + "\n" for one in prompts))
    rows = [
        dataclasses.replace(row, task="mine", prompt_sha256=made.sha256_text(prompts[row.doc_id]))
        for row in record.generations
    ]
    manifest = dataclasses.replace(record.manifest, plan={"data_dir": str(tmp_path / "data")})
    mine_run = dataclasses.replace(record, manifest=manifest, generations=rows, likelihoods=[], scores=[])
    assert {text.text for text in known_texts(mine_run).values()} == set(prompts)
    elsewhere = dataclasses.replace(manifest, plan={"data_dir": None})
    assert known_texts(dataclasses.replace(mine_run, manifest=elsewhere)) == {}


def test_timed_calls_know_their_document(timed: tt.Run) -> None:
    frame = timed.speed
    assert len(frame) == len(timed.record.speed)
    assert (frame["wall_s"] == [row.wall_s for row in timed.record.speed]).all()
    calls = frame[(frame["phase"] == "measure") & (frame["replica"] == 0)]
    assert set(calls["task"]) == {"miniature_sort"}
    assert calls["prompt"].notna().all()
    denoised = calls[calls["arm"] == "candidate"]
    assert (denoised["num_denoise_passes"] > 0).all()
    assert (denoised["num_denoise_passes"] == denoised["num_denoiser_forwards"]).all()
    assert frame[frame["phase"] == "warmup"]["task"].isna().all()


def test_a_parameter_named_like_a_column_stands_beside_it(measured: tuple[Path, Path]) -> None:
    from twotower_eval.api import frames

    record = store.load(measured[0])
    cells = tuple(
        dataclasses.replace(cell, decoder=dataclasses.replace(cell.decoder, params={"task": 3, **cell.decoder.params}))
        for cell in record.manifest.cells
    )
    frame = frames.scores(dataclasses.replace(record, manifest=dataclasses.replace(record.manifest, cells=cells)), {})
    assert set(frame["decoder_task"]) == {3}
    assert set(frame["task"]) == {score.task for score in record.scores}


def test_parameters_named_like_columns_of_a_comparison_stand_beside_them(measured: tuple[Path, Path]) -> None:
    """The batch size of a decoder's own was lost behind that of the timing."""
    own = {"batch_size": 5, "decoder_batch_size": 6, "workload": "mine", "point": 3}
    found = []
    for record in map(store.load, measured):
        cells = tuple(
            dataclasses.replace(cell, decoder=dataclasses.replace(cell.decoder, params=own | cell.decoder.params))
            for cell in record.manifest.cells
        )
        found.append(dataclasses.replace(record, manifest=dataclasses.replace(record.manifest, cells=cells)))
    frame, plain = tt.compare(found).to_frame(), tt.compare(*measured).to_frame()
    assert frame[list(plain.columns.drop("point"))].equals(plain.drop(columns="point"))
    added = ["decoder_decoder_batch_size", "decoder_batch_size", "decoder_workload", "decoder_point"]
    assert frame[added].drop_duplicates().to_numpy().tolist() == [[5, 6, "mine", 3]]
    assert list(frame.columns) == list(dict.fromkeys(frame.columns))


def test_counts_that_a_decoder_does_not_say_are_missing_not_0(measured: tuple[Path, Path]) -> None:
    """An answer without a number of forced commits made the sum one of fewer answers, or 0."""
    from twotower_eval.api import frames

    record = store.load(measured[1])
    sample = next(row for row in record.speed if len(row.prompts) == 2)
    said, silent = (dataclasses.replace(sample.prompts[0], num_forced_commits=num) for num in (4, None))
    prompts = [(said, said), (said, silent), (silent, silent)]
    rows = [dataclasses.replace(sample, prompts=pair) for pair in prompts]
    frame = frames.speed(dataclasses.replace(record, speed=rows), {})
    assert frame["num_forced_commits"].dtype == "Int64"
    assert frame["num_forced_commits"].tolist() == [8, pd.NA, pd.NA]
    assert frame["num_tokens"].tolist() == [2 * said.num_tokens] * 3


def test_counts_and_truth_values_stay_what_they_are_beside_missing_ones(
    measured: tuple[Path, Path], scored: tt.Run
) -> None:
    """One missing count made floats of all the others, one missing truth value made objects of them."""
    frame = tt.compare(*measured).to_frame()
    assert frame["num_rounds"].isna().any()
    for name in ("num_documents", "batch_size", "num_rounds", "num_launches", "block_size"):
        assert frame[name].dtype == "Int64", name
    assert frame["invalid"].dtype == "boolean"
    scores = scored.scores
    assert scores["num_tokens"].isna().any()
    assert {str(scores[name].dtype) for name in ("num_tokens", "doc_id", "block_size")} == {"Int64"}
    assert {str(scores[name].dtype) for name in ("headline", "higher_is_better")} == {"boolean"}
    assert scores["value"].dtype == "float64"
    assert scored.likelihoods["is_greedy"].dtype == "boolean"


def test_frames_of_empty_journals_have_their_columns(measured: tuple[Path, Path]) -> None:
    run = tt.load_run(measured[0])
    assert run.speed.empty
    assert {"arm", "wall_s", "num_tokens"} <= set(run.speed.columns)
    assert run.costs.empty
    assert run.checks.empty


def test_runs_show_themselves(scored: tt.Run, timed: tt.Run) -> None:
    shown = scored._repr_html_()
    assert scored.run_id in shown
    assert "<td>candidate</td>" in shown
    assert f"{len(timed.record.speed):,} timed calls" in timed._repr_html_()
    assert os.fspath(scored) == str(scored.path)


def test_a_run_is_resumed_with_its_own_plan(scored: tt.Run) -> None:
    again = tt.evaluate(resume=scored, out=scored.path.parent, limit=3, progress=False)
    assert again.path == scored.path
    assert len(again.record.scores) > 8
    assert again.manifest.plan["limit"] == 2, "the manifest is what the run began with"


def test_reading_loads_neither_torch_nor_lm_eval(measured: tuple[Path, Path]) -> None:
    code = "import sys, twotower_eval as tt; loaded = set(sys.modules); run = tt.load_run(sys.argv[1]); run.scores; "
    code += "tt.compare(run, sys.argv[2]).to_frame(); run._repr_html_(); import time; time.monotonic(); "
    code += "print(*loaded & {'torch', 'pandas', 'numpy', 'lm_eval'}, '|', *{*sys.modules} & {'torch', 'lm_eval'})"
    done = subprocess.run([sys.executable, "-c", code, *map(str, measured)], capture_output=True, text=True, check=True)
    assert done.stdout == "|\n"


# --- comparisons, verdicts, pages -----------------------------------------------------------------------------------


def test_a_comparison_has_the_numbers_of_the_report(measured: tuple[Path, Path], tmp_path: Path) -> None:
    frame = tt.compare(*measured).to_frame()
    tables = tt.report(measured, out=tmp_path, csv=True, sections="headline").folder / "tables"
    retention = pd.read_csv(tables / "retention.csv")
    speed = pd.read_csv(tables / "speed.csv")
    assert len(frame) == 1 + 2 + 2, "one scored alone, one timed twice, and one timed twice and not scored"
    for row in frame.to_dict("records"):
        settings = ("block_size", "steps_per_block", "threshold")
        for table, own, theirs in (
            (retention[retention["task"] == "(headline)"], "retention", "retention"),
            (retention[retention["task"] == "(decoder_exercised)"], "exercised_retention", "retention"),
            (speed, "speedup", "time_speedup"),
            (speed, "throughput_speedup", "throughput_speedup"),
        ):
            at = table
            for name in (*settings, *(["batch_size"] if table is speed else [])):
                at = at[at[name] == row[name]]
            for end in ("", "_low", "_high"):
                [wanted] = at[f"{theirs}{end}"] if len(at) else [math.nan]
                assert row[f"{own}{end}"] == pytest.approx(wanted, rel=1e-12, nan_ok=True), (own, end)


def test_the_first_point_is_that_of_the_report(measured: tuple[Path, Path]) -> None:
    comparison = tt.compare(*measured)
    first = comparison.runs.first
    assert first.quality is not None
    assert first.speed is not None
    assert comparison.retention == first.quality.headline.estimate
    assert comparison.speedup == first.speed.time.estimate
    assert comparison.first in comparison.points
    shown = comparison._repr_html_()
    assert comparison.first.text("retention") in shown
    assert comparison.first.text("speedup") in shown
    assert comparison.first.name in repr(comparison)


def test_what_was_not_measured_has_its_reason(measured: tuple[Path, Path]) -> None:
    comparison = tt.compare(measured[0])
    assert comparison.speedup is None
    assert "not timed" in comparison.reasons["speedup"]
    assert comparison.first is not None
    assert "not timed" in comparison.first.reasons["speedup"]
    assert comparison.to_frame()["speedup_reason"].str.contains("not timed").all()
    assert "not timed" in comparison._repr_html_()


def test_runs_are_taken_as_objects_paths_ids_and_lists(measured: tuple[Path, Path]) -> None:
    quality, speed = measured
    wanted = tt.compare(quality, speed).to_frame()
    for runs in (
        [tt.load_run(quality), tt.load_run(speed)],
        [[str(quality), speed]],
        [store.load(quality), speed.name],
        [],
    ):
        assert tt.compare(*runs, results=quality.parent).to_frame().equals(wanted)


def test_a_folder_of_runs_stands_for_all_of_them(measured: tuple[Path, Path], tmp_path: Path) -> None:
    root = measured[0].parent
    assert set(api.given.run_paths([root], Path("results"))) == set(store.find_runs(root)) >= set(measured)
    assert tt.compare(root).to_frame().equals(tt.compare(*reversed(store.find_runs(root))).to_frame())
    assert tt.report(root, out=tmp_path, sections="headline").path.is_file()
    with pytest.raises(tt.UserError, match="is no run"):
        tt.compare(tmp_path / "empty")


def test_an_estimate_is_a_number_with_its_interval_in_print(measured: tuple[Path, Path]) -> None:
    """It was a record of 400 characters."""
    estimate = tt.compare(*measured).retention
    assert estimate is not None
    assert str(estimate) == f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}] at 95 %"
    assert "method=" in repr(estimate)


def test_both_exit_codes_are_read_the_same_way(measured: tuple[Path, Path]) -> None:
    verdicts = tt.judge("miniature", *measured)
    assert isinstance(verdicts.exit_code, int)
    assert verdicts.exit_code == verdicts.exit_code(), "it was a method, and may still be called"
    assert verdicts.strict_exit_code == verdicts.exit_code(strict=True)


def test_verdicts_are_those_of_the_command_line(measured: tuple[Path, Path], capsys: Any) -> None:
    verdicts = tt.judge("miniature", *measured)
    assert len(verdicts) == len(load_claims("miniature").claims)
    assert verdicts.of(verdicts[0].claim) is verdicts[0]
    assert cli.main(["claims", "check", "miniature", *map(str, measured)]) == verdicts.exit_code
    assert capsys.readouterr().out.splitlines() == verdicts.lines
    assert list(verdicts.to_frame()["outcome"]) == [verdict.outcome for verdict in verdicts]
    assert "NOT MEASURED" in verdicts._repr_html_()
    [one] = tt.judge(load_claims("miniature").claims, *measured, names=verdicts[0].claim)
    assert one == verdicts[0]
    [alone] = tt.judge(load_claims("miniature").claims[0], list(measured))
    assert alone.claim == load_claims("miniature").claims[0].name


def test_an_audit_is_that_of_the_command_line(capsys: Any) -> None:
    audit = tt.audit("nemotron-labs-twotower")
    assert cli.main(["claims", "audit", "nemotron-labs-twotower"]) == audit.exit_code
    assert capsys.readouterr().out.splitlines() == audit.lines


def test_a_page_is_a_path_that_shows_itself(measured: tuple[Path, Path], tmp_path: Path) -> None:
    page = tt.report(*measured, out=tmp_path, sections=["headline", "tradeoff"], html=True)
    written = report_room.write(list(measured), tmp_path / "again", sections=["headline", "tradeoff"], html=True)
    assert Path(page) == page.path == page.folder / "report.html"
    assert page.markdown == (written / "report.md").read_text(encoding="utf-8")
    assert page.html == (written / "report.html").read_text(encoding="utf-8")
    shown = page._repr_html_()
    assert shown.startswith("<iframe sandbox srcdoc=")
    assert "data:image/png;base64," in shown
    assert shown.count("<") == 2, "what is inside the frame is escaped, and no part of the notebook"
    assert tt.report(measured, out=tmp_path, sections="headline").path.name == "report.md"


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_room_of_old_does_not_stand_in_the_way_of_a_verb(measured: tuple[Path, Path]) -> None:
    """``import twotower_eval.report``, the old path, puts a module where the function is."""
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import twotower_eval as tt; "
        "from twotower_eval.report import write; import twotower_eval.verify; "
        "print(tt.report(sys.argv[1], out=sys.argv[2], sections='headline').path); print(write.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(measured[0]), str(measured[0].parent / "reports")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    path, module = done.stdout.splitlines()
    assert Path(path).is_file()
    assert module == "twotower_eval.analyse.report"


def test_the_verbs_are_those_of_the_api() -> None:
    for name in ("evaluate", "time", "compare", "judge", "report", "load_run", "verify", "size", "audit"):
        assert getattr(tt, name) is getattr(api, name)
        assert name in dir(tt)


def test_a_size_and_a_check_are_runs_with_frames(pair: Path, tmp_path: Path) -> None:
    sized = tt.size(
        pair / "config.json", dtype="float32", prompt_tokens=8, repeats=1, min_rounds=1, warmup_rounds=0,
        tokens_per_nfe=2.0, block_sizes=4, threads=1, out=tmp_path, progress=False,
    )  # fmt: skip
    assert list(sized.costs["part"]) == [row.part for row in sized.record.costs]
    assert sized.manifest.plan["tokens_per_nfe"] == [2.0]
    checked = tt.verify(pair, out=tmp_path)
    assert list(checked.checks["outcome"]) == [row.outcome for row in checked.record.checks]
    assert checked.check_lines[-1].startswith(str(checked.path))
    assert to_json(checked.manifest)["verb"] == "verify"


def test_idle_threads_sleep_where_torch_is_not_loaded_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python they spun, which only the command line prevented."""

    def policy(loaded: bool, value: str | None) -> str | None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if value is not None:
            monkeypatch.setenv("OMP_WAIT_POLICY", value)
        with monkeypatch.context() as patch:
            if not loaded:
                patch.delitem(sys.modules, "torch", raising=False)
            with pytest.raises(tt.UserError, match="limit must be"):
                tt.evaluate(limit="many")
        return os.environ.get("OMP_WAIT_POLICY")

    assert (policy(False, None), policy(False, "ACTIVE")) == ("PASSIVE", "ACTIVE")
    monkeypatch.setitem(sys.modules, "torch", sys.modules.get("torch", types.ModuleType("torch")))
    assert policy(True, None) is None, "torch has read it already: the record would say what is not so"


def test_data_and_training_are_functions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line went round them."""
    from twotower_eval.miniature import train

    (tmp_path / "published" / "gsm8k").mkdir(parents=True)
    row = {"question": "2 + 2?", "answer": "4 #### 4"}
    for split in ("train", "test"):
        (tmp_path / "published" / "gsm8k" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    written = api.prepare_data(tmp_path / "published", str(tmp_path / "data"), only="gsm8k", partial=True)
    assert {file.path.read_text(encoding="utf-8") for file in written} == {json.dumps(row) + "\n"}
    assert cli.main(["data", "prepare", str(tmp_path / "published"), str(tmp_path / "data"), "--partial"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{file.path}: 1 rows" for file in written]
    calls: list[object] = []
    monkeypatch.setattr(train, "train_pair", lambda folder, **given: calls.append((folder, given)) or folder / "pair")
    assert api.train(str(tmp_path), recipe="mine.toml", threads=1) == tmp_path / "pair"
    assert cli.main(["train", "miniature", "--out", str(tmp_path), "--recipe", "mine.toml", "--threads", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'pair'}\n"
    assert calls == [(tmp_path, {"recipe_file": Path("mine.toml"), "threads": 1, "device": None})] * 2


def test_a_script_that_a_launch_reads_again_does_not_begin_anew(tmp_path: Path) -> None:
    """Without the guard a fresh process evaluated everything a second time before it failed."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import multiprocessing, sys, twotower_eval as tt\n"
        "if __name__ != '__main__': tt.evaluate(limit=1)\n"
        "else:\n"
        "    child = multiprocessing.get_context('spawn').Process(target=print)\n"
        "    child.start(); child.join(); sys.exit(child.exitcode)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "put what the script does below if __name__" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [script]


# --- prompts --------------------------------------------------------------------------------------------------------


def test_a_prompt_of_a_text_is_read_as_tasks_are(pair: Path) -> None:
    from twotower_eval.engine.models.tokenizer import prompt_ids

    model = tt.load_model(pair)
    text = "sort 3 1 2="
    prompt = tt.Prompt.from_text(text, model)
    assert prompt.token_ids == tuple(prompt_ids(model, text)) == tt.Prompt.from_text(text, model.tokenizer).token_ids
    assert prompt.text == text
    assert prompt == tt.Prompt.from_text(text, model)
    assert prompt.id != tt.Prompt.from_text("sort 1=", model).id
    decoder = tt.make_decoder(model, "block_diffusion", block_size=4)
    named = tt.Prompt.from_text(text, model, id="mine", seed=3)
    same = tt.Prompt(id="list", token_ids=list(prompt.token_ids))
    answers = decoder.generate([prompt, named, same], max_new_tokens=8)
    assert [answer.prompt_id for answer in answers] == [prompt.id, "mine", "list"]
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids


def test_a_text_that_begins_with_bos_gets_no_second_one(pair: Path) -> None:
    class Reader:
        """A tokenizer that adds a BOS by itself."""

        bos_token_id, eos_token_id = 1, 2

        def encode(self, text: str, special: bool = False) -> list[int]:
            return [1] * special + [1 if part == "<s>" else 7 for part in text.replace("<s>", "<s> ").split()]

        def decode_with_special(self, token_ids: Any) -> str:
            return "<s>"

        def prompt_ids(self, text: str) -> list[int]:
            return Tokenizer.prompt_ids(self, text)  # type: ignore[arg-type]

    from twotower_eval.engine.models.tokenizer import Tokenizer

    assert tt.Prompt.from_text("a b", Reader()).token_ids == (1, 7, 7)
    assert tt.Prompt.from_text("<s>a b", Reader()).token_ids == (1, 7, 7)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tt.Prompt(id="p", token_ids="abc"), "whole numbers"),
        (lambda: tt.Prompt(id="p", token_ids=[1.5]), "whole numbers"),
        (lambda: tt.Prompt(id="p", token_ids=7), "whole numbers"),
        (lambda: tt.Prompt(id="p", token_ids=[3, -1]), "token id -1 is below 0"),
        (lambda: tt.Prompt(id=3, token_ids=[3]), "id must be a text"),
        (lambda: tt.Prompt.from_text("a", object()), "a object reads no text"),
        (lambda: tt.Prompt.from_text("a", types.SimpleNamespace(tokenizer=None)), "no tokenizer files"),
        (lambda: tt.DecoderSpec(kind=""), "kind must be a name"),
        (lambda: tt.DecoderSpec(kind="x", params=[3]), "params must be a table"),
    ],
)
def test_a_prompt_or_a_decoder_that_cannot_be_is_refused(make: Any, words: str) -> None:
    """1.5 was the token 1, and -1 the last one of the vocabulary."""
    with pytest.raises(tt.UserError, match=words):
        make()


# --- what newcomers try -----------------------------------------------------------------------------------------------


def test_a_device_is_taken_as_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('device = "cuda:0"\nthresholds = 0.9\n')
    wanted = RunPlan(devices=("cuda:0",), thresholds=(0.9,))
    assert plan_of(RunPlan, None, None, {"device": "cuda:0", "thresholds": 0.9}) == wanted
    assert plan_of(RunPlan, file, None, {}) == wanted
    assert plan_of(RunPlan, file, None, {"device": "cpu"}) == RunPlan(devices=("cpu",), thresholds=(0.9,))
    with pytest.raises(tt.UserError, match="device and devices are the same: give one of them"):
        plan_of(RunPlan, None, None, {"device": "cpu", "devices": ["cpu"]})


def test_of_several_unknown_keys_the_near_miss_comes_first() -> None:
    with pytest.raises(tt.UserError, match=r"'treshold' \(did you mean 'thresholds'\?\); also unknown: 'xyzzy'"):
        plan_of(RunPlan, None, None, {"xyzzy": 1, "treshold": 0.9})


def test_load_model_knows_the_shipped_pair_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tt.load_model("miniature").checkpoint.family == "nemotron_h"
    (tmp_path / "miniature").mkdir()
    with pytest.raises(tt.UserError, match=r"^miniature is no checkpoint folder: it has no config.json$"):
        tt.load_model("miniature")


def test_texts_are_refused_with_what_makes_prompts_of_them(pair: Path) -> None:
    decoder = tt.make_decoder(tt.load_model(pair), "autoregressive")
    with pytest.raises(tt.UserError, match=r"takes Prompts, not 'hello': tt.Prompt.from_text\(text, model\)"):
        decoder.generate(["hello"], max_new_tokens=4)  # type: ignore[list-item]


@pytest.mark.parametrize("verb", ["evaluate", "time", "verify"])
def test_a_checkpoint_that_is_not_there_is_said_before_torch_is_loaded(verb: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    script = f"""
import sys
import twotower_eval as tt
for name in ("gpt2", "docs"):
    try:
        tt.{verb}(model=name)
    except tt.UserError as error:
        print(error)
print({{"torch", "lm_eval"}} & sys.modules.keys())
"""
    hub = {**os.environ, "HF_HUB_CACHE": f"{tmp_path}/hub", "HF_HUB_OFFLINE": "1"}
    python = [sys.executable, "-c", script]
    done = subprocess.run(python, cwd=tmp_path, env=hub, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"gpt2 is no folder here, nor in the Hugging Face cache {tmp_path}/hub, and the hub is not asked, as "
        "HF_HUB_OFFLINE is set",
        "docs is no checkpoint folder: it has no config.json",
        "set()",
    ]
