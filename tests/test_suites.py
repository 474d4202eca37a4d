"""Names to tasks: suites, local tasks and stock tasks on local files; prompts that depend on nothing but themselves."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from twotower_eval.measure import suites
from twotower_eval.measure.suites import groups, lm_tasks
from twotower_eval.measure.suites.datafiles import prepare
from twotower_eval.measure.suites.groups import SETTINGS, cluster_id, load_suite, read_suite, suite_names

STOCK = Path(lm_eval.tasks.__file__).parent


@pytest.fixture(scope="module")
def few_stock_tasks() -> Any:
    """An index of a few stock folders: the whole one takes seven seconds to read."""
    names = ("gsm8k", "mgsm", "mmlu/default", "hellaswag", "humaneval", "winogrande")
    return lm_eval.tasks.TaskManager(include_path=[STOCK / name for name in names], include_defaults=False).task_index


@pytest.fixture(autouse=True)
def _stock(few_stock_tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_tasks, "stock_index", lambda: few_stock_tasks)


@pytest.fixture
def gsm8k_files(tmp_path: Path) -> Path:
    """Twelve questions to answer and thirty to learn from."""
    for split, num in (("test", 12), ("train", 30)):
        rows = [{"question": f"{split} {i}: how much is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(num)]
        path = tmp_path / "gsm8k" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def prompts(task: suites.BuiltTask) -> list[str]:
    return [doc.instances[0].args[0] for doc in task.docs]


def test_the_miniature_suite_builds_and_cuts_to_the_limit() -> None:
    built = suites.resolve_tasks(["miniature"], limit=2)
    assert {len(task.docs) for task in built} == {2}
    assert all(task.num_docs_in_all >= 100 for task in built)
    requests = {task.name: task.request for task in built}
    assert requests["miniature_choice"] == "loglikelihood"
    assert requests["miniature_perplexity"] == "loglikelihood_rolling"
    assert [task.name for task in built if task.generates and task.headline and task.max_new_tokens] == [
        f"miniature_{kind}" for kind in ("arithmetic", "recall", "sort", "program", "english")
    ]


@pytest.mark.parametrize("name", ["paper-11", "paper-generative", "miniature"])
def test_shipped_suites_say_what_is_published(name: str) -> None:
    suite = load_suite(name)
    assert suite.description
    for task in suite.tasks:
        assert task.metric
        assert task.filter
        origins = {setting: task.origin(setting) for setting in SETTINGS}
        published = {setting for setting, origin in origins.items() if origin == "published"}
        assert published <= {"num_fewshot", "metric"}
        assert (name == "miniature") == (not published)


def test_the_paper_suite_has_the_published_shots() -> None:
    shots = {task.name: task.num_fewshot for task in load_suite("paper-11").tasks}
    assert shots == {
        **{"mmlu": 5, "mmlu_pro": 5, "arc_challenge": 25, "winogrande": 5, "race": 0, "humaneval": 0},
        **{"mbpp_sanitized": 3, "gsm8k": 8, "math500": 4, "global_mmlu_lite": 5, "mgsm": 8},
    }


@pytest.mark.slow
def test_every_task_of_every_suite_exists_in_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    wanted = {part for suite in suite_names() for task in load_suite(suite).tasks for part in task.parts.values()}
    for name in wanted:
        leaves = groups.leaves(groups.node(name))
        assert leaves
        assert groups.executes_code(groups.node(name)) == (name in ("humaneval", "mbpp"))


def test_tasks_that_execute_model_output_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="no sandbox") as caught:
        suites.select(["paper-generative"])
    message = str(caught.value)
    assert "\n" not in message
    assert "humaneval, mbpp_sanitized" in message
    assert "--tasks paper-generative,-humaneval,-mbpp_sanitized" in message
    names = [task.name for task in suites.select(["paper-generative", "-humaneval", "-mbpp_sanitized"])]
    assert names == ["mmlu_pro", "gsm8k", "math500", "mgsm"]


def test_a_stock_task_that_executes_model_output_is_refused_without_loading_it() -> None:
    """Resolving its functions would download a metric."""
    with pytest.raises(ValueError, match=r"^humaneval: scoring executes model output") as caught:
        suites.select(["humaneval"])
    assert "--tasks" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minature", "did you mean 'miniature'"),
        ("miniature_sorts", "did you mean 'miniature_sort'"),
        ("gsm8kk", "did you mean 'gsm8k'"),
        ("paper-11/gsm8", "did you mean 'gsm8k'"),
        ("paper-12/gsm8k", "unknown suite 'paper-12'"),
    ],
)
def test_unknown_names_get_the_nearest_known_one(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suites.select([name])


def test_leaving_out_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot leave out 'miniature_sorts': not among") as caught:
        suites.select(["miniature", "-miniature_sorts"])
    assert "did you mean 'miniature_sort'" in str(caught.value)


def test_the_same_task_twice_is_built_once_and_two_meanings_are_refused() -> None:
    assert [task.name for task in suites.select(["gsm8k", "gsm8k"])] == ["gsm8k"]
    with pytest.raises(ValueError, match="named twice with different settings"):
        suites.select(["gsm8k", "paper-11/gsm8k"])


def test_a_tag_is_its_tasks_and_a_group_is_one_task(few_stock_tasks: Any) -> None:
    assert len(suites.select(["mgsm_direct"])) == 11
    assert [task.name for task in suites.select(["mmlu"])] == ["mmlu"]
    assert len(groups.leaves(groups.node("mmlu"))) == 57


def test_fewshot_prompts_do_not_depend_on_the_limit(gsm8k_files: Path) -> None:
    """lm-eval's random sampler moves on with every document; a limit must not shift it."""
    whole = suites.resolve_tasks(["gsm8k"], data_dir=gsm8k_files)[0]
    few = suites.resolve_tasks(["gsm8k"], data_dir=gsm8k_files, limit=3)[0]
    assert prompts(whole)[:3] == prompts(few)
    assert prompts(whole)[0].count("Question:") == 6
    assert whole.digest == few.digest
    shots = [text.rsplit("Question:", 1)[0] for text in prompts(whole)]
    assert len(set(shots)) > 1


def test_seed_moves_the_examples_and_the_digest(gsm8k_files: Path) -> None:
    first, second = (suites.resolve_tasks(["gsm8k"], data_dir=gsm8k_files, seed=seed)[0] for seed in (0, 1))
    assert prompts(first) != prompts(second)
    assert first.digest != second.digest


def test_prompts_are_lm_evals_own(gsm8k_files: Path) -> None:
    built = suites.resolve_tasks(["gsm8k"], data_dir=gsm8k_files, limit=4)[0]
    task = lm_tasks.load_task("gsm8k", {}, gsm8k_files)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    assert prompts(built) == [instance.args[0] for instance in task.instances][:4]


def test_budget_comes_from_the_plan_then_the_suite_then_the_task_then_the_default(gsm8k_files: Path) -> None:
    def budget(name: str, **wishes: Any) -> int | None:
        return suites.resolve_tasks([name], data_dir=gsm8k_files, limit=1, **wishes)[0].max_new_tokens

    assert budget("gsm8k") == suites.DEFAULT_MAX_NEW_TOKENS == 256
    assert budget("miniature_sort") == 96
    assert budget("paper-11/gsm8k") == 512
    assert budget("paper-11/gsm8k", max_new_tokens=7) == 7


def test_a_split_that_the_examples_come_from_must_be_there(gsm8k_files: Path) -> None:
    """lm-eval would quietly draw the examples from the test set instead."""
    (gsm8k_files / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"task 'gsm8k': file .*train\.jsonl is missing"):
        suites.resolve_tasks(["gsm8k"], data_dir=gsm8k_files)
    # Examples written into the task need no file.
    assert len(suites.resolve_tasks(["gsm8k_cot"], data_dir=gsm8k_files)[0].docs) == 12


def test_missing_folder_missing_split_and_missing_column_are_one_line_each(gsm8k_files: Path) -> None:
    with pytest.raises(ValueError, match=r"has no folder mgsm_direct_en or mgsm_en"):
        suites.resolve_tasks(["mgsm_direct_en"], data_dir=gsm8k_files)
    (gsm8k_files / "gsm8k" / "test.jsonl").write_text('{"query": "?", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"task 'gsm8k': its data lacks .*'question' is undefined"):
        suites.resolve_tasks(["gsm8k"], data_dir=gsm8k_files)
    (gsm8k_files / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test\.jsonl is missing"):
        suites.resolve_tasks(["gsm8k"], data_dir=gsm8k_files)


def test_a_column_of_mixed_types_names_file_and_line(gsm8k_files: Path) -> None:
    (gsm8k_files / "gsm8k" / "test.jsonl").write_text(
        '{"question": "?", "answer": "1"}\n{"question": 3, "answer": "1"}\n'
    )
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2, 'question': a number, but a text in line 1"):
        suites.resolve_tasks(["gsm8k"], data_dir=gsm8k_files)


DEEP = "[" * 60 + '"v"' + "]" * 60


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"a": 18446744073709551616}'], "line 1, 'a': a whole number beyond 64 bits"),
        (['{"a": 1}', "", '{"a": 9007199254740993}', '{"a": 0.5}'], "line 4: values that do not fit"),
        (['{"a": [1]}', '{"a": [null]}', '{"a": ["x"]}'], "line 3, 'a[]': a text, but a number in line 1"),
        (['{"a": {"k": 1}}', '{"a": {"k": {"k": 1}}}'], "line 2, 'a.k': an object, but a number in line 1"),
        (['{"a": [1, "x"]}'], "line 1, 'a[]': a text, but a number in line 1"),
        (['{"a": [1.5, true]}'], "line 1, 'a[]': true or false, but a number in line 1"),
        ([f'{{"a": {DEEP}}}'], "line 1: values that do not fit"),
    ],
)  # fmt: skip
def test_what_no_table_carries_is_refused_with_its_line(tmp_path: Path, lines: list[str], words: str) -> None:
    """A whole number beyond 64 bits was a traceback of pyarrow; other misfits named no line."""
    from twotower_eval.measure.suites.local_data import _read_dataset

    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"test\.jsonl, line ") as caught:
        _read_dataset({"test": tmp_path / "test.jsonl"})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_task_out_of_reach_says_data_dir() -> None:
    with pytest.raises(ValueError, match="--data-dir") as caught:
        suites.resolve_tasks(["winogrande"])
    assert "\n" not in str(caught.value)
    assert "winogrande" in str(caught.value)


def test_quiet_gives_logging_and_progress_bars_back() -> None:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    with pytest.raises(ValueError, match="boom"), lm_tasks.quiet():
        raise ValueError("boom")
    assert logger.level == before


def test_compiled_templates_are_kept() -> None:
    from lm_eval.utils import env

    with lm_tasks.quiet():
        assert env.from_string("{{ a }}") is env.from_string("{{ a }}")


def test_lm_evals_private_yaml_reader_still_does_what_we_rely_on() -> None:
    """Includes are merged, local keys win, functions are resolved or left as text."""
    from lm_eval.tasks._yaml_loader import load_yaml

    merged = load_yaml(STOCK / "mmlu" / "default" / "mmlu_anatomy.yaml")
    assert merged["task"] == "mmlu_anatomy"
    assert merged["fewshot_split"] == "dev"
    assert "include" not in merged
    path = STOCK / "hellaswag" / "hellaswag.yaml"
    assert callable(load_yaml(path)["process_docs"])
    assert load_yaml(path, resolve_func=False)["process_docs"].endswith("utils.process_docs")


def test_clusters_join_languages_and_gsm8k() -> None:
    question = (
        "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her "
    )
    question += "friends every day with four. She sells the remainder at the farmers' market daily for $2 per fresh "
    question += "duck egg. How much in dollars does she make every day at the farmers' market?"
    doc = {"question": question}
    assert cluster_id("gsm8k", "gsm8k", doc, 0, 0) == "gsm8k:0"
    assert cluster_id("gsm8k", "gsm8k_cot", doc, 77, 77) == "gsm8k:0"
    assert cluster_id("mgsm_en", "mgsm_native_cot_en", doc, 0, 0) == "gsm8k:0"
    assert cluster_id("mgsm_fr", "mgsm_native_cot_fr", {"question": "Les canes"}, 0, 0) == "gsm8k:0"
    assert cluster_id("gsm8k", "gsm8k", {"question": "unheard of"}, 0, 0) != "gsm8k:0"
    assert cluster_id("t", "gsm8k_platinum", doc, 4, 4) == "t:4"
    assert cluster_id("race", "race", {"article": "A"}, 0, 0) == cluster_id("race", "race", {"article": "A"}, 1, 1)
    assert cluster_id("t", "own", {"cluster": "passage 3"}, 4, 4) == "passage 3"
    assert len(set(groups.gsm8k_items())) == 250


def test_timed_prompts_go_round_the_generation_tasks() -> None:
    built = suites.resolve_tasks(["miniature"], limit=3)
    timed = suites.build_requests(built, 7)
    assert [prompt.task for prompt in timed[:6]] == [
        *(f"miniature_{kind}" for kind in ("arithmetic", "recall", "sort", "program", "english")),
        "miniature_arithmetic",
    ]
    assert [prompt.doc_id for prompt in timed] == [0, 0, 0, 0, 0, 1, 1]
    assert timed[0].prompt_sha256 == built[0].docs[0].prompt_sha256
    assert timed[0].max_new_tokens == 96
    with pytest.raises(ValueError, match="only 15 prompts"):
        suites.build_requests(built, 16)
    with pytest.raises(ValueError, match="nothing to time"):
        suites.build_requests([task for task in built if not task.generates], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[task]]\nname = 'a'", "needs a name and one of"),
        ("[[task]]\nname = 'a'\nlm_eval = 'b'\nfewshot = 3", "did you mean 'num_fewshot'"),
        ("[[task]]\nname = 'a'\nlm_eval = 'b'\npublished = ['shots']", "published names 'shots'"),
        ("[[task]]\nname = 'a'\nlm_eval = 'b'\nsamples = 0", "samples must be a whole number"),
        ("title = 'x'", "unknown key 'title'"),
        ("description = 'x'", "at least one task"),
        ("[[task]", r"suite .*own\.toml is not valid TOML"),
        ("task = 3", "task must be a list of tables"),
        ("task = ['a']", "task must be a list of tables"),
        ("[[task]]\nname = 'a'\nlm_eval = 3", "task 'a': SuiteTask: parts.* must be a text, not 3"),
        ("[[task]]\nname = 'a'\nparts = 'b'", "task 'a': SuiteTask: parts must be a JSON object"),
        ("[[task]]\nname = 'a'\nlm_eval = 'b'\nsamples = true", "samples must be a whole number"),
        ("[[task]]\nname = 'a'\nlm_eval = 'b'\nheadline = 'no'", "headline must be true or false"),
        ("[[task]]\nname = 'a'\nlm_eval = 'b'\nstop = 'x'", "stop must be a list, not 'x'"),
        ("[[task]]\nname = 'a'\nlm_eval = 'b'\nmetric = 1", "metric must be a text"),
        ("[[task]]\nname = 'a'\nlm_eval = 'b'\nmax_new_tokens = 9223372036854775808", "beyond 64 bits"),
    ],
)
def test_a_broken_suite_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_suite(path)


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tasks folder of its own with one YAML, its data beside it."""
    (tmp_path / "own.jsonl").write_text('{"q": "1 + 1", "a": "2"}\n{"q": "2 + 2", "a": "4"}\n')
    lm_tasks.local_index.cache_clear()
    monkeypatch.setattr(lm_tasks, "data_path", lambda *parts: tmp_path)
    yield tmp_path
    lm_tasks.local_index.cache_clear()


OWN = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}} ="
doc_to_target: a
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_a_yaml_and_a_jsonl_file_make_a_task(own_task: Path) -> None:
    (own_task / "own.yaml").write_text(OWN)
    built = suites.resolve_tasks(["own"])[0]
    assert prompts(built) == ["1 + 1 =", "2 + 2 ="]
    assert (built.metric, built.filter, built.samples) == ("exact_match", "none", 1)
    assert [doc.cluster_id for doc in built.docs] == ["own:0", "own:1"]


def test_a_vote_over_samples_needs_the_samples(own_task: Path) -> None:
    votes = "filter_list: [{name: vote, filter: [{function: take_first_k, k: 4}, {function: majority_vote}]}]\n"
    (own_task / "own.yaml").write_text(OWN + votes)
    with pytest.raises(ValueError, match="needs 4 samples of each problem"):
        suites.resolve_tasks(["own"])
    assert suites.resolve_tasks(["own"], samples=4)[0].samples == 4


def test_a_suites_metric_must_exist(own_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_task / "own.yaml").write_text(OWN)
    for change, message in (({"metric": "acc"}, "no metric 'acc'"), ({"filter": "strict"}, "no filter 'strict'")):
        member = groups.SuiteTask(name="own", parts={"": "own"}, **change)  # type: ignore[arg-type]
        monkeypatch.setattr(
            "twotower_eval.measure.suites.build.select", lambda names, included, member=member: [member]
        )
        with pytest.raises(ValueError, match=message):
            suites.resolve_tasks(["own"])


def test_languages_become_tasks_of_a_group(data_dir: Path, tmp_path: Path) -> None:
    """MGSM without its eight examples, which the published files do not hold."""
    prepare(data_dir, tmp_path, ["mgsm", "gsm8k"])
    member = groups.SuiteTask(
        name="mgsm", parts={"en": "mgsm_direct_en", "fr": "mgsm_direct_fr"}, filter="flexible-extract"
    )
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("twotower_eval.measure.suites.build.select", lambda names, included: [member])
        english, french = suites.resolve_tasks(["mgsm"], data_dir=tmp_path)
    gsm8k = suites.resolve_tasks(["gsm8k"], data_dir=tmp_path)[0]
    assert [(task.name, task.group) for task in (english, french)] == [("mgsm_en", "mgsm"), ("mgsm_fr", "mgsm")]
    clusters = [[doc.cluster_id for doc in task.docs] for task in (english, french, gsm8k)]
    assert clusters[0] == clusters[1] == clusters[2][:250]
    assert len(set(clusters[2])) == 1318, "two of its problems are the same with other numbers"
    assert gsm8k.joins


@pytest.mark.slow
def test_published_files_feed_the_stock_tasks(data_dir: Path, tmp_path: Path) -> None:
    prepare(data_dir, tmp_path, ["gsm8k", "mmlu", "hellaswag"])
    names = ["gsm8k", "paper-11/mmlu", "hellaswag"]
    gsm8k, mmlu, hellaswag = suites.resolve_tasks(names, data_dir=tmp_path, limit=2)
    assert (gsm8k.num_docs_in_all, mmlu.num_docs_in_all, hellaswag.num_docs_in_all) == (1319, 14042, 10042)
    assert len(mmlu.docs) == 57 * 2
    assert len({doc.doc_id for doc in mmlu.docs}) == 57 * 2
    assert mmlu.docs[0].instances[0].args[0].count("Answer:") == 6
    assert "A man is sitting on a roof. He" in prompts(hellaswag)[0]


@pytest.mark.parametrize(("context", "delimiter", "fine"), [("Q:", "", False), ("Q: ", "", True), ("Q:", " ", True)])
def test_an_empty_option_names_its_document(
    context: str, delimiter: str, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-likelihood would be 0.0, and it won every question. Blanks that end the context are scored with it."""
    (tmp_path / "made_up.yaml").write_text(
        "task: made_up\ndataset_path: nowhere\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        f"doc_to_choice: options\ndoc_to_target: 0\ntarget_delimiter: '{delimiter}'\nnum_fewshot: 0\n"
    )
    rows = [{"q": context, "options": ["a", "b"]}, {"q": context, "options": ["a", ""]}]
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = lm_eval.tasks.TaskManager(include_path=[tmp_path], include_defaults=False).task_index
    monkeypatch.setattr(lm_tasks, "stock_index", lambda: index)
    suites.resolve_tasks(["made_up"], data_dir=tmp_path, limit=1)
    if fine:
        suites.resolve_tasks(["made_up"], data_dir=tmp_path)
        return
    with pytest.raises(ValueError, match="task 'made_up', document 1: option 2 is empty"):
        suites.resolve_tasks(["made_up"], data_dir=tmp_path)


def test_a_data_folder_that_is_not_there_is_refused_also_where_no_task_reads_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        suites.resolve_tasks(["miniature_sort"], data_dir=tmp_path / "nowhere")
