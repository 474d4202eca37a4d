"""Our models and decoders within lm-eval, as ``--model twotower``: the scores of ``twotower-eval run``."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from chat_models import QWEN_3, save_chat, write_chat_tasks
from datasets.packaged_modules.json.json import Json
from fake_hub import files_in, use_cache, write_cache
from hf_oracle import lm_evals_hf
from lm_eval.api.registry import get_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from pages import DOCS
from tiny_pair import write_pair

import twotower_eval as tt
from twotower_eval import cli
from twotower_eval.engine.models.chat import format_of
from twotower_eval.engine.models.choices import choose_device
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


@pytest.mark.parametrize(
    "asked",
    [
        {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Be brief."},
        {"apply_chat_template": True, "fewshot_as_multiturn": False},
        {"apply_chat_template": "default", "fewshot_as_multiturn": True},
    ],
)
def test_a_chat_model_is_asked_what_lm_evals_hf_is_token_for_token(asked: dict[str, Any], tmp_path: Path) -> None:
    chat, tasks = save_chat(tmp_path / "chat", QWEN_3), write_chat_tasks(tmp_path / "tasks", 1)
    told = {"enable_thinking": False}
    hf, ours = lm_evals_hf(chat, chat_template_args=told), TwoTowerLM(pretrained=str(chat), chat_template_args=told)

    def evaluated(model: Any) -> Any:
        with lm_tasks.quiet():
            return lm_eval.simple_evaluate(
                model=model,
                model_args={"pretrained": str(chat)},
                tasks=["sums_generate_until", "sums_multiple_choice", "sums_loglikelihood"],
                task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
                evaluation_tracker=EvaluationTracker(),
                bootstrap_iters=0,
                **asked,
            )

    theirs, found = evaluated(hf), evaluated(ours)
    for task, samples in theirs["samples"].items():
        texts = [sample["arguments"][0][0] for sample in samples]
        own = [sample["arguments"][0][0] for sample in found["samples"][task]]
        assert own == texts
        assert all(text.endswith("<think>\n\n</think>\n\n") for text in texts)
        for text in texts:
            assert ours.tok_encode(text) == hf.tok_encode(text)
        for one, other in zip(found["samples"][task], samples, strict=True):
            for metric in other["metrics"]:
                assert one[metric] == other[metric]
            assert task != "sums_generate_until" or one["resps"] == other["resps"]
    assert ours.chat_template(True) == hf.chat_template(True)


def test_thinking_has_an_end_and_scores_no_options(tmp_path: Path) -> None:
    chat = str(save_chat(tmp_path / "chat", QWEN_3))
    with pytest.raises(UserError, match="enable_thinking needs think_end_token"):
        TwoTowerLM(pretrained=chat, enable_thinking=True)
    thinking = TwoTowerLM.create_from_arg_string(f"pretrained={chat},enable_thinking=True,think_end_token=</think>")
    assert format_of(thinking.model).think_end_token == "</think>"
    with pytest.raises(UserError, match="enable_thinking has no effect on tasks that score options"):
        thinking.loglikelihood([])
    assert thinking.apply_chat_template([{"role": "user", "content": "Hello"}]).endswith("assistant\n")
    plain = TwoTowerLM(pretrained=str(save_chat(tmp_path / "plain", None)))
    with pytest.raises(UserError, match="has no chat template"):
        plain.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_without_a_decoder_a_pair_decodes_in_blocks_and_a_tower_token_by_token(pair: Path) -> None:
    made = TwoTowerLM.create_from_arg_string(f"pretrained={pair}", {"batch_size": "4", "device": None})
    assert made.spec.kind == "block_diffusion"
    assert made.batch_size == 4
    alone = TwoTowerLM.create_from_arg_obj({"pretrained": str(pair), "tower": "context"}, {"device": "cpu"})
    assert alone.spec.kind == "autoregressive"
    assert alone.kind == "exact"
    short = TwoTowerLM.create_from_arg_string(f"pretrained={pair},decoder=ar")
    assert short.spec == alone.spec
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
        ("pretrained=miniature,decoder=ar,seed=few", "seed must be a whole number of at least 0, not 'few'"),
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


def cached_gsm8k(cache: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    """The data set as its library leaves it in its cache once it was downloaded."""
    cache.mkdir()
    files = {split: str(cache / f"{split}.jsonl") for split in rows}
    for split, held in rows.items():
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    options = {"dataset_name": "gsm8k", "config_name": "main", "hash": "0" * 40}
    builder = Json(cache_dir=str(cache), data_files=files, **options)  # type: ignore[no-untyped-call]
    builder.download_and_prepare()
    made = Path(builder.cache_dir)
    home = cache / "openai___gsm8k" / "main" / made.parent.name / made.name
    home.parent.mkdir(parents=True)
    made.rename(home)


def lm_eval_lines() -> list[str]:
    """Commands of the page on one's own models that call lm-eval's command."""
    page = (DOCS / "your-model.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```\n", page, re.S)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.startswith("twotower-eval lm-eval ")]


@pytest.mark.parametrize("verb", ["run ", ""], ids=["with run", "in the older form without it"])
def test_the_line_in_the_docs_runs_as_it_stands(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended in "device 'cuda:0' cannot be used here", as that is what lm-eval's command gives without --device."""
    [line] = lm_eval_lines()
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n + 1}\n#### {n + 1}"} for n in range(6)]
    cached_gsm8k(tmp_path / "datasets", {"train": rows, "test": rows[:2]})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    use_cache(monkeypatch, tmp_path / "hub")
    write_cache(tmp_path / "hub", "example/pair", files_in(data_path("miniature", "pair")))
    stock = {"include_path": [str(lm_tasks.roots()[1] / "gsm8k")], "include_defaults": False}
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *_, **__: TaskManager(**stock))
    monkeypatch.chdir(tmp_path)
    _, _, *rest = shlex.split(line.replace("lm-eval run ", f"lm-eval {verb}"))
    with lm_tasks.quiet():
        assert cli.main(["lm-eval", *rest]) == 0
    assert "|gsm8k|" in capsys.readouterr().out
    [results] = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(results.read_text(encoding="utf-8"))["config"]
    assert config["decoder"].startswith("block_diffusion(block_size=16, steps_per_block=16, threshold=0.9")
    [samples] = (tmp_path / "out").rglob("samples_gsm8k_*.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 4, "two documents under two filters"


def test_a_device_that_was_asked_for_is_held_to() -> None:
    for asked in ({"device": "cuda:7"}, {"device": "cuda:0"}):
        with pytest.raises(UserError, match="cannot be used here"):
            TwoTowerLM.create_from_arg_obj({"pretrained": "miniature", **asked}, {"device": "cuda:0"})
    made = TwoTowerLM.create_from_arg_obj({"pretrained": "miniature", "tower": "context"}, {"device": "cuda:0"})
    assert made.model.checkpoint.devices == (choose_device(["nemotron_h"]).value,)
