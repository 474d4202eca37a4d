"""A model card's evaluation results: read back by huggingface_hub as the hub reads them."""

from pathlib import Path
from typing import Any

import pytest
import report_fixture as made
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from pages import run_commands
from test_report_alone import scored

import twotower_eval as tt
from twotower_eval import cli

SMALL: dict[str, Any] = {"num_docs": 40, "tasks": ("arithmetic", "choice"), "perplexity": False}


def card_of(root: Path, *runs: Path, **options: Any) -> Path:
    page = tt.report(*runs, out=root / "reports", model_card=True, **options)
    return page.folder / "model-card.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("runs")
    return made.quality_run(out, **SMALL), made.speed_run(out, num_rounds=6, num_calls=4)


def test_the_card_holds_what_was_measured(runs: tuple[Path, Path], tmp_path: Path) -> None:
    card = card_of(tmp_path, *runs)
    metadata = metadata_load(card)
    assert metadata is not None
    name, results = model_index_to_eval_results(metadata["model-index"])
    point = tt.compare(*runs).first
    assert point is not None
    assert point.quality is not None
    assert name == point.candidate.checkpoint.name
    by_metric = {(one.dataset_name, one.metric_type): one for one in results}
    for task in point.quality.tasks:
        score = by_metric[task.name, task.metric]
        assert score.metric_value == pytest.approx(task.candidate)
        assert score.metric_args["baseline"] == pytest.approx(task.baseline)
        assert score.task_type == "text-generation"
        kept = by_metric[task.name, "retention"]
        assert task.retention.estimate is not None
        assert kept.metric_value == pytest.approx(task.retention.estimate.value)
        assert kept.metric_args["low"] == pytest.approx(task.retention.estimate.low)
    assert point.retention is not None
    assert by_metric["mean of 2 tasks", "retention"].metric_value == pytest.approx(point.retention.value)
    speed = by_metric.get(("twotower-eval speed", "speedup"))
    assert (speed is None) == point.invalid, "what must not be quoted is in no card"
    if speed is not None and point.speedup is not None:
        assert speed.metric_value == pytest.approx(point.speedup.value)
    assert all(one.source_name and one.source_url == "report.md" for one in results)


def test_hubs_own_card_reads_it_back(runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = card_of(tmp_path, *runs)
    card = ModelCard.load(path)
    assert card.data.eval_results
    again = yaml.safe_load(str(card.data))
    assert again["model-index"] == (metadata_load(path) or {})["model-index"]
    report = (path.parent / "report.md").read_text(encoding="utf-8")
    sentence = next(line for line in path.read_text(encoding="utf-8").splitlines() if " keeps " in line)
    assert sentence in report, "the sentence of the report, and no other"


def test_a_model_alone_has_its_scores(tmp_path: Path) -> None:
    metadata = metadata_load(card_of(tmp_path, scored(tmp_path)))
    assert metadata is not None
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "gpt2"
    assert {one.dataset_name for one in results} >= {"arithmetic", "sorting"}
    assert all("retention" not in one.metric_type for one in results)


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    path = made.write(tmp_path / "runs", made.manifest("20261101T120000Z-run-000001", "run", ()), ())
    assert "Nothing has been scored or timed" in card_of(tmp_path, path, sections=["headline"]).read_text(
        encoding="utf-8"
    )


def test_the_command_names_the_card(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", *map(str, runs), "--out", str(tmp_path), "--format", "model-card"]) == 0
    page, card = capsys.readouterr().out.splitlines()
    assert Path(page).name == "report.md"
    assert Path(card).name == "model-card.md"
    assert cli.main(["report", *map(str, runs), "--out", str(tmp_path), "--format", "pdf"]) == 2
    assert "csv, model-card or lm-eval, not 'pdf'" in capsys.readouterr().err


def test_the_pages_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_commands("your-model.md", tmp_path, monkeypatch, "Results that other tools read")
    assert len(list(tmp_path.glob("results/*/lm_eval/*/samples_miniature_*.jsonl"))) == 4
    assert len(list(tmp_path.glob("reports/*/model-card.md"))) == 1
