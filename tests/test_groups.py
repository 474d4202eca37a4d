"""Groups of lm-eval's tasks: their figure is lm-eval's, or they are refused before any model loads."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import numpy as np
import pandas as pd
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from tests import own_tasks
from tests.hf_oracle import lm_evals_hf
from tests.report_fixture import AUTOREGRESSIVE, block_diffusion, make_cell, manifest
from tests.scripted_llama import byte_tokenizer, save_random, save_tokenizer
from twotower_eval import store
from twotower_eval.analyse import report, stats
from twotower_eval.analyse.compare.quality import quality_points
from twotower_eval.analyse.compare.runs import group_scores
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.report.text import significant
from twotower_eval.measure import harness, suites
from twotower_eval.measure.harness.run import group_lines, task_figure
from twotower_eval.measure.harness.scoring import aggregate_rows, score_rows
from twotower_eval.measure.suites import groups, lm_tasks
from twotower_eval.plan import RunPlan
from twotower_eval.progress import SilentProgress
from twotower_eval.records import Aggregate, DecoderSpec, Score, Workload

CHOICES = ["no", "yes", "perhaps"]
ROWS = {
    "few": [{"prompt": f"few {i}", "choices": CHOICES[:2], "gold": i % 2} for i in range(2)],
    "some": [{"prompt": f"some {i}", "choices": CHOICES, "gold": i % 3} for i in range(7)],
    "many": [{"prompt": f"many {i}", "choices": CHOICES, "gold": i % 3} for i in range(12)],
    "asked": [{"prompt": f"say {i}", "answer": "yes"} for i in range(5)],
    "prose": [{"text": "cat " * (i + 1)} for i in range(6)],
    "verse": [{"text": "a dog " * (i + 1)} for i in range(9)],
    "pairs": [{"prompt": f"pair {i}", "choices": CHOICES[:2], "gold": i % 2} for i in range(9)],
}
TASKS: list[Any] = [
    own_tasks.task_yaml("few", "few", "multiple_choice", [{"metric": "acc"}]),
    own_tasks.task_yaml("some", "some", "multiple_choice", [{"metric": "acc_norm"}, {"metric": "acc"}]),
    own_tasks.task_yaml("many", "many", "multiple_choice", [{"metric": "acc"}, {"metric": "mcc"}]),
    own_tasks.task_yaml("asked", "asked", "generate_until", [{"metric": "acc_asked"}], process_results=None),
    own_tasks.task_yaml("more", "some", "multiple_choice", [{"metric": "mcc"}, {"metric": "acc"}]),
    own_tasks.task_yaml("prose", "prose", "loglikelihood_rolling", [{"metric": "word_perplexity"}]),
    own_tasks.task_yaml("verse", "verse", "loglikelihood_rolling", [{"metric": "word_perplexity"}]),
    own_tasks.task_yaml("few_brier", "few", "multiple_choice", [{"metric": "brier_score"}]),
    own_tasks.task_yaml("many_brier", "pairs", "multiple_choice", [{"metric": "brier_score"}]),
    own_tasks.task_yaml("middle", "some", "multiple_choice", [{"metric": "acc", "aggregation": "median"}]),
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
OUTSIDE = [  # figures of scores of all documents together, or of which less is better
    group("texts", ["prose", "verse"], {"metric": "word_perplexity", "weight_by_size": False}),
    group("texts_by_size", [{"group": "inner_texts", "task": ["prose"]}, "verse"], {"metric": "word_perplexity"}),
    group("brier", ["few_brier", "many_brier"], {"metric": "brier_score", "weight_by_size": False}),
    group("unlike", ["few", "middle", "many"], {**ACC, "weight_by_size": False}),
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
    own_tasks.write_tasks(tmp_path, [*TASKS, *FIGURES, *OUTSIDE, *OTHERS], ROWS, CODE)
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


ARMS = (("baseline", AUTOREGRESSIVE, 1), ("candidate", block_diffusion(), 2))


def journalled(tmp_path: Path, name: str, arms: Sequence[tuple[Any, DecoderSpec, int]] = ARMS) -> store.Run:
    cells, rows = [], []
    for task in suites.resolve_tasks([name]):
        workload = Workload(kind="task", name=task.name, digest=task.digest)
        for arm, decoder, seed in arms:
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


GROUPS = [figure["group"] for figure in (*FIGURES, *OUTSIDE, *OTHERS[:2])]


def told(run: store.Run, name: str) -> list[str]:
    """What the terminal says of the groups of a run."""
    figures = []
    for task in suites.resolve_tasks([name]):
        for cell in (cell for cell in run.manifest.cells if cell.workload.name == task.name):
            rows = [row for row in (*run.scores, *run.aggregates) if row.cell == cell.id]
            scores = [row for row in rows if isinstance(row, Score)]
            made = [row for row in rows if isinstance(row, Aggregate)]
            figures.append(task_figure(task, cell, scores, made))
    return list(group_lines(figures))


@pytest.mark.parametrize("name", GROUPS)
def test_a_model_alone_has_its_groups_figures(name: str, tmp_path: Path) -> None:
    """Reports of one model and the terminal had the members only."""
    run = journalled(tmp_path, name, ARMS[:1])
    theirs = lm_evals(tmp_path, name, 1)
    found = group_scores(run)
    built = suites.resolve_tasks([name])
    assert [(one.group, one.cell.arm) for one in found] == [(name, "baseline")] * (built[0].group is not None)
    for one in found:
        figure = theirs[name][f"{one.metric},{one.filter}"]
        assert one.value.value == pytest.approx(figure, abs=1e-12)
        assert one.members == tuple(task.name for task in built if task.group == name)
        interval = one.interval.estimate
        assert interval is not None, one.interval.reason
        assert interval.value == pytest.approx(figure)
        assert interval.low <= figure <= interval.high
        assert interval.low < interval.high
        assert one.metric != "acc" or one.aggregation != "mean" or 0 <= interval.low < interval.high <= 1
        how = f"mean of {len(one.members)} task{'s' * (len(one.members) > 1)}{' by their documents' * one.by_size}"
        assert told(run, name) == [f"group {name}, baseline {one.cell.decoder.label}: {one.metric} {figure:.4g}, {how}"]


@pytest.mark.parametrize("name", [figure["group"] for figure in OUTSIDE])
def test_figures_outside_retention_are_lm_evals_for_both_arms(name: str, tmp_path: Path) -> None:
    [point] = quality_points(journalled(tmp_path, name))
    assert point.tasks == (), "no part of them makes a headline of its own"
    [row] = [one for one in (*point.others, *point.wholes) if one.task == name]
    [baseline, candidate] = [lm_evals(tmp_path, name, seed)[name][f"{row.metric},none"] for seed in (1, 2)]
    if isinstance(row, WholeScore):
        assert row.baseline.value == pytest.approx(baseline)
        assert row.candidate.value == pytest.approx(candidate)
    else:
        assert (row.baseline, row.candidate) == (pytest.approx(baseline), pytest.approx(candidate))
    assert sorted(row.members) == sorted(task.name for task in suites.resolve_tasks([name]))


class Told(SilentProgress):
    """Keeps what the terminal is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("name", "how"), [("macro", "mean of 2 tasks"), ("mixed", "mean of 3 tasks by their documents")]
)
def test_a_run_ends_with_its_groups_as_lm_evals_own_model_has_them(name: str, how: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    (tmp_path / "model").mkdir()
    save_tokenizer(tokenizer, tmp_path / "model")
    folder = save_random(tmp_path / "model", tokenizer.get_vocab_size())
    terminal = Told()
    plan = RunPlan(model=str(folder), baseline=str(folder), decoder="autoregressive", tasks=(name,))
    run = store.load(harness.run(plan, root=tmp_path / "runs", progress=terminal))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with lm_tasks.quiet():
        found = lm_eval.evaluator.simple_evaluate(
            lm_evals_hf(folder), tasks=[name], task_manager=manager, bootstrap_iters=0
        )
    assert found is not None
    theirs = found["groups"][name]["acc,none"]
    [one] = group_scores(run)
    assert one.value.value == pytest.approx(theirs)
    [line] = [line for line in terminal.notes if line.startswith("group ")]
    assert line == f"group {name}, baseline {one.cell.decoder.label}: acc {theirs:.4g}, {how}"


def test_the_report_of_one_model_has_its_groups(tmp_path: Path) -> None:
    run = journalled(tmp_path, "mixed_macro", ARMS[:1])
    [one] = group_scores(run)
    folder = report.write([run.path], tmp_path / "reports", csv=True)
    [line] = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| mixed_macro ")]
    assert line.startswith("| mixed_macro (mean of 3) | acc | ")
    assert f"| 14 | {significant(one.value.value or 0, 4)} [" in line
    table = pd.read_csv(folder / "tables" / "scores_alone.csv").set_index("task")
    assert table.loc["mixed_macro", "score"] == pytest.approx(one.value.value)
    assert table.loc["mixed_macro", "members"] == "few asked some"
    assert "(mean of 3, by documents)" in _report(tmp_path, journalled(tmp_path / "sized", "mixed", ARMS[:1]))


def _report(tmp_path: Path, run: store.Run) -> str:
    return (report.write([run.path], tmp_path / "more") / "report.md").read_text()


def test_a_group_has_no_figure_while_members_may_be_missing(tmp_path: Path) -> None:
    run = journalled(tmp_path, "macro", ARMS[:1])
    assert group_scores(dataclasses.replace(run, complete=False)) == ()
    scores = [dataclasses.replace(s, value=None, missing_reason="lost") if s.task == "few" else s for s in run.scores]
    run = dataclasses.replace(run, scores=scores)
    assert group_scores(run)[0].value.reason == "no document of few has a value"
    assert told(run, "macro")[0].endswith(": acc without a value (few has none)")


def test_a_group_of_small_members_has_an_interval_that_knows_how_little_they_say() -> None:
    few, many = [0.0] * 2, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    tasks, clusters = ["few"] * 2 + ["many"] * 6, [str(i) for i in range(8)]
    alike = stats.mean_of_members(few + many, tasks, clusters, by_size=False)
    sized = stats.mean_of_members(few + many, tasks, clusters, by_size=True)
    assert (alike.value, sized.value) == (pytest.approx(1 / 6), pytest.approx(0.25))
    assert alike.low == 0.0
    assert 0.4 < alike.high <= 1.0
    for value in (0.0, 1.0):
        known = stats.mean_of_members([value] * 200, ["a"] * 50 + ["b"] * 150, list(map(str, range(200))), by_size=True)
        assert known.value == pytest.approx(value)
        assert 0.01 < known.high - known.low < 0.06, "as many alike leave room for a rare other"
    assert stats.mean_of_members([0.1, 0.4], ["a"] * 2, ["x", "y"], by_size=True) == stats.mean_score(
        [0.1, 0.4], ["x", "y"]
    )
    with pytest.raises(ValueError, match="b has one cluster only"):
        stats.mean_of_members([0.5] * 3, ["a", "a", "b"], ["x", "y", "z"], by_size=True)


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
