"""Groups of lm-eval's tasks: their figure is lm-eval's, or they are refused before any model loads."""

from pathlib import Path
from typing import Any

import lm_eval.evaluator
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from tests import own_tasks
from tests.report_fixture import AUTOREGRESSIVE, block_diffusion, make_cell, manifest
from twotower_eval import stats, store, suites
from twotower_eval.evidence.quality import quality_points
from twotower_eval.harness.scoring import aggregate_rows, score_rows
from twotower_eval.records import Workload
from twotower_eval.suites import groups, lm_tasks

CHOICES = ["no", "yes", "perhaps"]
ROWS = {
    "few": [{"prompt": f"few {i}", "choices": CHOICES[:2], "gold": i % 2} for i in range(2)],
    "some": [{"prompt": f"some {i}", "choices": CHOICES, "gold": i % 3} for i in range(7)],
    "many": [{"prompt": f"many {i}", "choices": CHOICES, "gold": i % 3} for i in range(12)],
    "asked": [{"prompt": f"say {i}", "answer": "yes"} for i in range(5)],
    "prose": [{"text": "cat " * (i + 1)} for i in range(6)],
}
TASKS: list[Any] = [
    own_tasks.task_yaml("few", "few", "multiple_choice", [{"metric": "acc"}]),
    own_tasks.task_yaml("some", "some", "multiple_choice", [{"metric": "acc_norm"}, {"metric": "acc"}]),
    own_tasks.task_yaml("many", "many", "multiple_choice", [{"metric": "acc"}, {"metric": "mcc"}]),
    own_tasks.task_yaml("asked", "asked", "generate_until", [{"metric": "acc_asked"}], process_results=None),
    own_tasks.task_yaml("more", "some", "multiple_choice", [{"metric": "mcc"}, {"metric": "acc"}]),
    own_tasks.task_yaml("prose", "prose", "loglikelihood_rolling", [{"metric": "word_perplexity"}]),
]
TASKS[3] = """
task: asked
dataset_path: json
dataset_kwargs: {data_files: {test: asked.jsonl}}
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 16}
process_results: !function utils.results
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CODE = """
def results(doc, results):
    return {"acc": float(results[0] == doc["answer"])}
"""


def group(name: str, members: list[Any], *listed: dict[str, Any]) -> dict[str, Any]:
    aggregated = [{"aggregation": "mean", **one} for one in listed]
    return {"group": name, "task": members, **({"aggregate_metric_list": aggregated} if aggregated else {})}


ACC = {"metric": "acc"}
FIGURES = [  # with what lm-eval makes of them
    group("micro", ["few", "some"], {**ACC, "weight_by_size": True}),
    group("macro", ["few", "some"], {**ACC, "weight_by_size": False}),
    group("mixed", ["few", "asked", "some"], ACC),
    group("mixed_macro", ["few", "asked", "some"], {**ACC, "weight_by_size": False}),
    group("other", ["some", "few"], ACC),
    group("lone", ["some", "few"], {"metric": "acc_norm"}),
    group("deep", [{"group": "inner", "task": ["few", {"group": "deeper", "task": ["some"]}]}, "asked"], ACC),
    group("deep_macro", [{"group": "inner", "task": ["few", "some"]}, "asked"], {**ACC, "weight_by_size": False}),
    group("second", ["few", "some"], {"metric": "acc_norm"}, ACC),
    group("with_mcc", ["few", "many"], ACC),
    group("set_up", [{"task": "few", "doc_to_text": "Q: {{prompt}}"}, "some"], {**ACC, "weight_by_size": False}),
]
OTHERS = [
    group("correlated", ["many", "more"], {"metric": "mcc"}),
    group("correlated_macro", ["many", "more"], {"metric": "mcc", "weight_by_size": False}),
    group("names", ["few", "asked", "prose"]),
    group("names_of_groups", ["macro", {"task": "asked", "doc_to_text": "Q: {{prompt}}"}]),
    group("inline", [{"group": "inner", "task": ["few", "some"], "aggregate_metric_list": [ACC]}, "asked"]),
    group("absent", ["few", "asked"], {"metric": "acc_bytes"}),
    group("split", ["some", "prose"], {"metric": "acc"}, {"metric": "word_perplexity"}),
    group("by_median", ["few", "some"], {**ACC, "aggregation": "median"}),
    group("homemade", [{"task": "new", "dataset_path": "json"}], ACC),
    group("unknown", ["few", "fwe"], ACC),
]


@pytest.fixture(autouse=True)
def _tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_tasks.write_tasks(tmp_path, [*TASKS, *FIGURES, *OTHERS], ROWS, CODE)
    own_tasks.use_tasks(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)


def answer(seed: int) -> own_tasks.Answer:
    def answered(instance: Instance) -> Any:
        rng = np.random.default_rng([seed, *"".join(arg for arg in instance.args if isinstance(arg, str)).encode()])
        if instance.request_type == "generate_until":
            return str(rng.choice(["yes", "no"]))
        nats = -float(rng.gamma(3, 4))
        return nats if instance.request_type == "loglikelihood_rolling" else (nats, False)

    return answered


def journalled(tmp_path: Path, name: str) -> store.Run:
    cells, rows = [], []
    for task in suites.resolve_tasks([name]):
        workload = Workload(kind="task", name=task.name, digest=task.digest)
        for arm, decoder, seed in (("baseline", AUTOREGRESSIVE, 1), ("candidate", block_diffusion(), 2)):
            cell = make_cell(arm, decoder, workload)
            answers = own_tasks.rows_of(task, cell.id, answer(seed))
            cells.append(cell)
            rows += [*answers, *score_rows(task, cell.id, answers), *aggregate_rows(task, cell.id, answers)]
    with store.create(tmp_path / "runs", manifest("20261101T120000Z-run-aaaaaa", "run", cells)) as writer:
        for row in rows:
            writer.append(row)
        writer.finish()
    return store.load(writer.path)


def lm_evals(tmp_path: Path, name: str, seed: int) -> dict[str, dict[str, Any]]:
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with lm_tasks.quiet():
        found = lm_eval.evaluator.simple_evaluate(
            own_tasks.Written(answer(seed)), tasks=[name], task_manager=manager, bootstrap_iters=0
        )
    assert found is not None
    return found["results"]


@pytest.mark.parametrize("name", ["correlated", "correlated_macro"])
def test_a_groups_figure_of_scores_of_all_documents_is_the_mean_of_its_members(name: str, tmp_path: Path) -> None:
    [point] = quality_points(journalled(tmp_path, name))
    [whole] = [whole for whole in point.wholes if whole.task == name]
    for seed, found in ((1, whole.baseline), (2, whole.candidate)):
        assert found.value == pytest.approx(lm_evals(tmp_path, name, seed)[name]["mcc,none"])
    assert whole.baseline_interval.estimate is not None
    assert point.tasks == ()


@pytest.mark.parametrize("name", [figure["group"] for figure in FIGURES])
def test_a_groups_figure_is_lm_evals(name: str, tmp_path: Path) -> None:
    [point] = quality_points(journalled(tmp_path, name))
    [task] = [task for task in point.tasks if task.name == name]
    key = f"{task.metric},{task.filter}"
    baseline, candidate = (lm_evals(tmp_path, name, seed) for seed in (1, 2))
    assert task.baseline == pytest.approx(baseline[name][key], abs=1e-12)
    assert task.candidate == pytest.approx(candidate[name][key], abs=1e-12)
    assert len(point.tasks) == 1, "a group counts once in the headline"
    for member, _, own, others in task.members:
        assert own == pytest.approx(baseline[member][key])
        assert others == pytest.approx(candidate[member][key])


def test_groups_without_a_figure_are_names_for_their_members(tmp_path: Path) -> None:
    built = suites.resolve_tasks(["names"])
    assert [(task.name, task.group, task.headline) for task in built] == [
        ("few", None, True), ("asked", None, True), ("prose", None, False),
    ]  # fmt: skip
    built = suites.resolve_tasks(["names_of_groups"])
    assert [(task.name, task.group) for task in built] == [("few", "macro"), ("some", "macro"), ("asked", None)]
    assert built[-1].docs[0].instances[0].args[0] == "Q: say 0"
    [inner, asked] = suites.resolve_tasks(["inline"])
    assert (inner.name, len(inner.docs), asked.name) == ("inline::inner", 9, "asked")
    assert lm_evals(tmp_path, "inline", 1)["inline::inner"]["acc,none"] is not None


def test_settings_that_a_group_gives_make_another_task() -> None:
    alone, set_up = suites.resolve_tasks(["few"])[0], suites.resolve_tasks(["set_up"])[0]
    assert alone.digest != set_up.digest
    assert set_up.docs[0].instances[0].args[0].startswith("Q: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "group 'absent' aggregates acc_bytes, which none of its tasks has: name its tasks instead"),
        ("split", "group 'split' has several figures, each over some of its tasks only: name its parts instead"),
        ("by_median", "group 'by_median' aggregates by 'median': lm-eval knows no way but 'mean'"),
        ("homemade", "group 'homemade' defines task 'new' inside itself"),
        ("unknown", "lm-eval has no task 'fwe', which group 'unknown' names"),
    ],
)
def test_what_has_no_figure_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        suites.resolve_tasks([name])
    assert reason in str(caught.value)


def test_members_weigh_by_their_documents_only_where_the_group_says_so() -> None:
    columns = {
        "tasks": ["a"] * 2 + ["b"] * 8,
        "groups": ["g"] * 10,
        "clusters": [str(i) for i in range(10)],
        "baseline": [1.0] * 2 + [0.0] * 8,
        "candidate": [1.0] * 2 + [0.5] * 8,
    }
    alike, sized = stats.PairedScores(**columns).table, stats.PairedScores(**columns, by_size=frozenset({"g"})).table
    assert alike.task_means_K(alike.baseline_CL) == pytest.approx([0.5])
    assert sized.task_means_K(sized.baseline_CL) == pytest.approx([0.2])
    assert sized.task_means_K(sized.candidate_CL) == pytest.approx([0.6])


def test_a_leaf_named_twice_in_a_group_counts_once() -> None:
    assert [leaf.name for leaf in groups.leaves(groups.node("deep_macro"))] == ["few", "some", "asked"]


AGAIN = [
    group("empty", [], ACC),
    group("itself", ["itself", "few"], ACC),
    group("round_a", ["round_b"], ACC),
    group("round_b", ["round_a"], ACC),
    group("nameless", ["few", "some"], {"weight_by_size": True}),
    group("overlapping", ["macro", "some"], ACC),
    group("less_is_better", ["graded", "graded_more"], {"metric": "brier_score", "weight_by_size": False}),
    own_tasks.task_yaml("graded", "few", "multiple_choice", [{"metric": "acc"}, {"metric": "brier_score"}]),
    own_tasks.task_yaml("graded_more", "some", "multiple_choice", [{"metric": "acc"}, {"metric": "brier_score"}]),
]


@pytest.fixture
def again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_tasks.write_tasks(tmp_path, [*TASKS, *FIGURES, *OTHERS, *AGAIN], ROWS, CODE)
    own_tasks.use_tasks(monkeypatch, tmp_path)


@pytest.mark.usefixtures("again")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "group 'empty' has no tasks"),
        ("itself", "group 'itself' contains itself"),
        ("round_a", "contains itself"),
        ("nameless", "group 'nameless': an entry of its aggregate_metric_list names no metric"),
        ("overlapping", "group 'overlapping' has task 'some' twice, by 'overlapping' and 'macro'"),
    ],
)
def test_groups_that_are_none_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        suites.resolve_tasks([name])


@pytest.mark.usefixtures("again")
def test_a_groups_figure_of_which_less_is_better_is_beside_retention(tmp_path: Path) -> None:
    [point] = quality_points(journalled(tmp_path, "less_is_better"))
    [found] = [other for other in point.others if other.task == "less_is_better"]
    for seed, value in ((1, found.baseline), (2, found.candidate)):
        assert value == pytest.approx(lm_evals(tmp_path, "less_is_better", seed)["less_is_better"]["brier_score,none"])
    assert (found.higher_is_better, found.num_documents) == (False, 9)
