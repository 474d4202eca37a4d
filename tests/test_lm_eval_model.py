"""Our models and decoders within lm-eval, as ``--model twotower``: the scores of ``twotower-eval run``."""

import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tiny_pair import write_pair

import twotower_eval as tt
from twotower_eval import cli
from twotower_eval.errors import UserError
from twotower_eval.lm_eval import TwoTowerLM, main
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.resources import data_path

TASKS = ["miniature_sort", "miniature_choice"]
SETTING = "decoder=block_diffusion,block_size=4,threshold=0.9"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_its_scores_are_those_of_run(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tt.evaluate(
        model=pair, tasks=TASKS, block_sizes=4, thresholds=0.9, limit=3, max_new_tokens=96, out=tmp_path,
        progress=False,
    )  # fmt: skip
    folder = data_path("tasks", "miniature")
    monkeypatch.chdir(folder)  # where lm-eval looks for the data beside these YAMLs
    with lm_tasks.quiet():
        theirs: Any = lm_eval.simple_evaluate(
            model="twotower",
            model_args=f"pretrained={pair},{SETTING}",
            batch_size="auto",
            tasks=TASKS,
            limit=3,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
    candidate = {cell.id for cell in ours.manifest.cells if cell.arm == "candidate"}
    scores = {(s.task, s.doc_id, s.metric): s.value for s in ours.record.scores if s.cell in candidate}
    found = {
        (task, sample["doc_id"], metric): sample[metric]
        for task, samples in theirs["samples"].items()
        for sample in samples
        for metric in sample["metrics"]
    }
    assert found == scores
    assert {task for task, _, _ in found} == set(TASKS)
    texts = {row.doc_id: row.generation.text for row in ours.record.generations if row.cell in candidate}
    assert {sample["doc_id"]: sample["resps"][0][0] for sample in theirs["samples"]["miniature_sort"]} == texts
    assert theirs["config"]["decoder"].startswith("block_diffusion(block_size=4")
    assert theirs["config"]["model_dtype"] == "float32"


def test_without_a_decoder_a_pair_decodes_in_blocks_and_a_tower_token_by_token(pair: Path) -> None:
    made = TwoTowerLM.create_from_arg_string(f"pretrained={pair}", {"batch_size": "4", "device": None})
    assert made.spec.kind == "block_diffusion"
    assert made.batch_size == 4
    alone = TwoTowerLM.create_from_arg_obj({"pretrained": str(pair), "tower": "context"}, {"device": "cpu"})
    assert alone.spec.kind == "autoregressive"
    assert alone.kind == "exact"
    sampled = TwoTowerLM.create_from_arg_string(f"pretrained={pair},temperature=0.5")
    assert sampled.spec.params["temperature"] == 0.5


def test_lm_eval_finds_it_and_keeps_its_own(pair: Path) -> None:
    assert get_model("twotower") is TwoTowerLM
    assert get_model("dummy").__name__ == "DummyLM", "a registry with one entry of ours would lack all others"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("threshold=0.9", "needs pretrained=CHECKPOINT"),
        (f"pretrained=x,{SETTING},treshold=0.9", r"no argument 'treshold' \(did you mean 'threshold'\?\)"),
        ("pretrained=x,decoder=block_difusion", "did you mean block_diffusion"),
        ("pretrained=no/such,decoder=autoregressive", "no/such"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        TwoTowerLM.create_from_arg_string(arguments)
    assert "\n" not in str(raised.value)


def test_a_batch_size_is_a_number(pair: Path) -> None:
    with pytest.raises(UserError, match="batch_size must be"):
        TwoTowerLM.create_from_arg_string(f"pretrained={pair}", {"batch_size": "many"})


def test_the_verb_is_lm_evals_own_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append([*sys.argv]))
    before = [*sys.argv]
    asked = ["run", "--model", "twotower", "--model_args", "pretrained=miniature", "--tasks", "x", "-h"]
    assert cli.main(["lm-eval", *asked]) == 0
    main(["ls", "tasks"])
    assert seen == [["lm_eval", *asked], ["lm_eval", "ls", "tasks"]]
    assert sys.argv == before

    def fails() -> None:
        raise UserError("no argument 'x'")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fails)
    assert cli.main(["lm-eval", "run"]) == 2
    assert capsys.readouterr().err == "error: no argument 'x'\n"
