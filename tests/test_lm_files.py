"""lm-eval's own files beside the journals, held against those that lm-eval writes for the same model and tasks."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd
import pytest
from chat_models import CHATML, save_chat, write_chat_tasks
from hf_models import save_reading
from hf_oracle import lm_evals_hf
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_results_filenames, get_sample_results_filenames, handle_non_serializable, make_table
from own_tasks import task_yaml, use_tasks, write_tasks

import twotower_eval as tt
from twotower_eval import cli, store
from twotower_eval.measure.harness.lm_files import model_args, model_names
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.records import Checkpoint, DecoderSpec, Workload, make_cell

WORDS = ("red", "blue", "green", "gold", "teal")
ASKED = [
    {"prompt": f"say {word}=", "answer": word, "choices": list(WORDS), "gold": at} for at, word in enumerate(WORDS)
]
TASKS = ("asked", "chosen", "colours")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reading("llama", tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tasks")
    match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    acc = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    first = {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]}
    whole = {"name": "whole", "filter": [{"function": "take_first"}]}
    configs: list[dict[str, Any]] = [
        task_yaml("asked", "words", "generate_until", [match], filter_list=[first, whole]),
        task_yaml("chosen", "words", "multiple_choice", acc, num_fewshot=2, fewshot_split="test",
                  fewshot_config={"sampler": "first_n"}),
        task_yaml("warm", "words", "multiple_choice", acc),
        task_yaml("cold", "fewer", "multiple_choice", acc, doc_to_text="never {{prompt}}"),
        {"group": "colours", "task": ["warm", "cold"],
         "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]},
    ]  # fmt: skip
    write_tasks(found, configs, {"words": ASKED, "fewer": ASKED[:3]})
    return found


@pytest.fixture(scope="module")
def ours(folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tt.Run:
    with pytest.MonkeyPatch.context() as patch:
        use_tasks(patch, tasks)
        return tt.evaluate(
            model=folder, decoder="autoregressive", tasks=TASKS, out=tmp_path_factory.mktemp("ours"), progress=False
        )


@pytest.fixture(scope="module")
def theirs(folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``lm_eval --output_path … --log_samples`` fills it."""
    out = tmp_path_factory.mktemp("theirs")
    tracker = EvaluationTracker(output_path=str(out))
    with pytest.MonkeyPatch.context() as patch, lm_tasks.quiet():
        patch.chdir(tasks)  # where its data files are
        results: Any = lm_eval.simple_evaluate(
            lm_evals_hf(folder),
            model_args={"pretrained": str(folder)},
            tasks=list(TASKS),
            log_samples=True,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            evaluation_tracker=tracker,
        )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    return out


def read(root: Path) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """As users of lm-eval read them: names by its own functions, samples by pandas."""
    names = [str(path) for path in root.glob("*/*")]
    [results] = get_results_filenames(names)
    samples = {
        Path(name).name.split("_")[1]: pd.read_json(name, lines=True) for name in get_sample_results_filenames(names)
    }
    return json.loads(Path(results).read_text(encoding="utf-8")), samples


def test_the_results_have_the_keys_and_the_scores_of_lm_eval(ours: tt.Run, theirs: Path) -> None:
    made, expected = read(ours.path / "lm_eval")[0], read(theirs)[0]
    assert set(expected) - set(made) == set(), "a consumer would miss these"
    assert set(made["config"]) >= set(expected["config"]) - {"model_num_parameters", "peft_sha", "delta_sha"}
    for part in ("results", "groups"):
        assert made[part].keys() == expected[part].keys()
        for task, entry in expected[part].items():
            for name, value in entry.items():
                if name not in ("sample_count",):
                    assert made[part][task][name] == pytest.approx(value, abs=1e-9), (task, name)
    for part in ("versions", "n-shot", "n-samples"):
        assert {name: made[part][name] for name in expected[part] if name != "colours"} == {
            name: value for name, value in expected[part].items() if name != "colours"
        }, part
    assert made["higher_is_better"] == expected["higher_is_better"]
    assert made["group_subtasks"]["colours"] == expected["group_subtasks"]["colours"]
    assert made["task_hashes"] == expected["task_hashes"]
    assert made["configs"].keys() == expected["configs"].keys()


def test_the_samples_are_those_of_lm_eval(ours: tt.Run, theirs: Path) -> None:
    made, expected = read(ours.path / "lm_eval")[1], read(theirs)[1]
    assert made.keys() == expected.keys() == {"asked", "chosen", "warm", "cold"}
    for task, frame in expected.items():
        assert set(frame.columns) == set(made[task].columns), task
        assert list(frame["filter"]) == list(made[task]["filter"])
        same = ["doc_id", "doc", "target", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash"]
        scores = sorted({metric for metrics in frame["metrics"] for metric in metrics})
        for column in [*same, *scores]:
            assert made[task][column].tolist() == frame[column].tolist(), (task, column)
    assert made["asked"]["filtered_resps"].tolist() == expected["asked"]["filtered_resps"].tolist()
    assert made["asked"]["resps"].tolist() == expected["asked"]["resps"].tolist()
    for task in ("chosen", "warm", "cold"):  # log-likelihoods, as texts
        for one, other in zip(made[task]["filtered_resps"], expected[task]["filtered_resps"], strict=True):
            assert [float(pair[0]) for pair in one] == pytest.approx([float(pair[0]) for pair in other], abs=1e-4)
            assert [pair[1] for pair in one] == [pair[1] for pair in other]
        arguments = zip(made[task]["arguments"], expected[task]["arguments"], strict=True)
        assert all(one == other for one, other in arguments)
    for one, other in zip(made["asked"]["arguments"], expected["asked"]["arguments"], strict=True):
        assert one["gen_args_0"]["arg_0"] == other["gen_args_0"]["arg_0"]
        assert one["gen_args_0"]["arg_1"]["until"] == other["gen_args_0"]["arg_1"]["until"]


def test_lm_evals_table_shows_them(ours: tt.Run, theirs: Path) -> None:
    made, expected = read(ours.path / "lm_eval")[0], read(theirs)[0]
    assert make_table(made) == make_table(expected)
    assert make_table(made, "groups") == make_table(expected, "groups")


def test_scores_say_what_the_filter_made_of_an_answer(ours: tt.Run) -> None:
    by_filter = {(score.doc_id, score.filter): score.filtered for score in ours.record.scores if score.task == "asked"}
    answers = {row.doc_id: row.generation.text for row in ours.record.generations}
    for doc_id, answer in answers.items():
        assert answer
        assert by_filter[doc_id, "whole"] is None
        assert by_filter[doc_id, "first"] in (answer.lstrip("\n")[:1], None)


def test_documents_keep_their_question_and_their_gold(ours: tt.Run) -> None:
    documents = {(one.task, one.doc_id): one for one in ours.record.documents}
    assert documents["asked", 1].question == "say blue="
    assert documents["asked", 1].gold == "blue"
    assert documents["chosen", 1].question == "say blue=", "without the examples before it"
    assert documents["chosen", 1].target == "1"
    assert documents["chosen", 1].gold == "blue"
    assert documents["cold", 2].question == "never say green="
    assert set(ours.scores["target"]) >= {"blue", "1"}, "frames find them, too"


@pytest.mark.parametrize(
    "asked",
    [
        {"apply_chat_template": True, "system_instruction": "Be brief."},
        {"apply_chat_template": True, "fewshot_as_multiturn": False},
        {"system_instruction": "Be brief."},
    ],
)
def test_how_prompts_were_asked_is_said_as_by_lm_eval(asked: dict[str, Any], tmp_path: Path) -> None:
    """The template and its sha256, the system instruction, examples as turns; and the prompts themselves."""
    model, tasks = save_chat(tmp_path / "chat", CHATML), write_chat_tasks(tmp_path / "tasks", 1)
    names = ("sums_generate_until", "sums_multiple_choice")
    with pytest.MonkeyPatch.context() as patch:
        use_tasks(patch, tasks)
        run = tt.evaluate(
            model=model, baseline=model, decoder="ar", tasks=names, out=tmp_path / "ours", progress=False, **asked
        )
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    multiturn = asked.get("fewshot_as_multiturn", True if "apply_chat_template" in asked else None)
    with lm_tasks.quiet():
        results: Any = lm_eval.simple_evaluate(
            lm_evals_hf(model),
            model_args={"pretrained": str(model)},
            tasks=list(names),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            evaluation_tracker=tracker,
            bootstrap_iters=0,
            **{**asked, "fewshot_as_multiturn": multiturn},  # as its command line fills it
        )
    tracker.save_results_aggregated(results=results, samples=results.pop("samples"))
    [file] = (tmp_path / "theirs").glob("*/results_*.json")
    expected, made = json.loads(file.read_text(encoding="utf-8")), read(run.path / "lm_eval")[0]
    for name in (
        "chat_template", "chat_template_sha", "system_instruction", "system_instruction_sha", "fewshot_as_multiturn",
    ):  # fmt: skip
        assert made[name] == expected[name], name
    assert made["task_hashes"] == expected["task_hashes"], "of every prompt"


def test_without_samples_there_are_results_and_no_texts(folder: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_tasks(patch, tasks)
        run = tt.evaluate(
            model=folder, decoder="autoregressive", tasks="warm", log_samples=False, out=tmp_path, progress=False
        )
    assert [path.name.partition("_")[0] for path in run.path.glob("lm_eval/*/*")] == ["results"]
    assert not (run.path / "documents.jsonl").exists()


def test_a_resumed_run_has_one_set_of_files(folder: Path, tasks: Path, tmp_path: Path) -> None:
    """A raised limit makes them anew; nothing of before is left."""
    with pytest.MonkeyPatch.context() as patch:
        use_tasks(patch, tasks)
        given: dict[str, Any] = {"out": tmp_path, "progress": False}
        run = tt.evaluate(model=folder, decoder="autoregressive", tasks="warm", limit=2, **given)
        again = tt.evaluate(resume=run, limit=None, **given)
    assert again.path == run.path
    results, samples = read(again.path / "lm_eval")
    assert results["n-samples"]["warm"] == {"original": 5, "effective": 5}
    assert results["config"]["limit"] is None
    assert samples["warm"]["doc_id"].tolist() == [0, 1, 2, 3, 4]
    assert len(again.record.documents) == 5
    assert not list(again.path.glob("lm_eval.*"))


def cell(name: str, digest: str, dtype: str = "float32", **params: Any) -> Any:
    checkpoint = Checkpoint(name=name, family="f", source=name, digest=digest, dtype=dtype, devices=("cpu",))
    return make_cell(
        "candidate", checkpoint, DecoderSpec(kind="d", params=params), Workload(kind="task", name="t", digest="0")
    )


def test_every_model_of_a_run_has_a_folder_of_its_own() -> None:
    cells = [
        cell("org/m", "1", x=1),
        cell("org/m", "1", x=2),
        cell("org/m", "2", x=1),
        cell("org/m", "1", "bfloat16", x=1),
    ]
    names = model_names(cells)
    assert names[cells[0].id] == "org/m:d:x=1"
    assert names[cells[1].id] == "org/m:d:x=2"
    assert len(set(names.values())) == 4
    assert model_args(cells[0]) == {"pretrained": "org/m", "dtype": "float32", "decoder": "d", "x": 1}
    assert json.dumps(names, default=handle_non_serializable)


def test_files_are_written_again_from_the_journals(
    folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of an arm whose scores rest on the other's log-likelihoods."""
    with pytest.MonkeyPatch.context() as patch:
        use_tasks(patch, tasks)
        given: dict[str, Any] = {"tasks": ("warm", "asked"), "limit": 2, "max_new_tokens": 4, "out": tmp_path}
        run = tt.evaluate(block_sizes=4, thresholds=0.9, log_samples=False, progress=False, **given)
        before = {path.parent.name: json.loads(path.read_text()) for path in run.path.glob("lm_eval/*/results_*")}
        assert cli.main(["report", str(run.path), "--out", str(tmp_path / "reports"), "--format", "lm-eval"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run.path / "lm_eval")
    after = {path.parent.name: json.loads(path.read_text()) for path in run.path.glob("lm_eval/*/results_*")}
    assert len(after) == 2
    assert {name: one["results"] for name, one in after.items()} == {n: one["results"] for n, one in before.items()}
    assert len(list(run.path.glob("lm_eval/*/samples_*"))) == 4
    assert store.load(run.path).complete, "they are no part of the journals"
