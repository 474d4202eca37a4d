"""Generation settings of a checkpoint that change greedy texts under transformers and are not done here: said."""

import json
from pathlib import Path

import pytest
from hf_models import save_reading, save_tiny

from twotower_eval import store
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.provenance import setup
from twotower_eval.cli import main
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.identity import unheeded_settings


def ask(folder: Path, **settings: object) -> Path:
    file = folder / "generation_config.json"
    there = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**there, **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": 1.3, "num_beams": 1}, {"repetition_penalty": 1.3}),
        ({"suppress_tokens": [5]}, {"suppress_tokens": [5]}),
        ({"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": []}, {}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8}, {}),  # the tasks say whether to sample
    ],
)
def test_what_changes_greedy_texts_is_found(tmp_path: Path, settings: dict[str, object], expected: object) -> None:
    model = load_model(ask(save_tiny("llama", tmp_path / "hf"), **settings))
    assert unheeded_settings([model]) == ({"hf": expected} if expected else {})


def test_a_run_says_it_in_manifest_terminal_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ask(save_reading("llama", tmp_path / "hf"), repetition_penalty=1.3)
    arguments = ["--model", str(folder), "--decoder", "autoregressive", "--max-new-tokens", "2", "--limit", "1"]
    assert main(["run", *arguments, "--tasks", "miniature_sort", "--out", str(tmp_path / "runs")]) == 0
    told = "generation_config.json of hf asks for repetition_penalty 1.3, which is not done here"
    assert f"warning: {told}" in capsys.readouterr().err
    [path] = store.find_runs(tmp_path / "runs")
    run = store.load(path)
    assert run.manifest.unheeded == {"hf": {"repetition_penalty": 1.3}}
    assert "asks for repetition_penalty 1.3" in setup(Runs([run])).markdown.replace("\\", "")
