"""Metrics that a task's own code gives for some answers only, or fails to give: told, never dropped, never a crash."""

import csv
import re
from pathlib import Path

import pytest

from tests import own_tasks
from tests import test_whole_scores as whole
from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.analyse.compare.figures import ArmsDifferError
from twotower_eval.analyse.compare.quality import NOT_GIVEN, quality_points
from twotower_eval.measure import suites
from twotower_eval.measure.harness.scoring import aggregate_rows, score_rows

CODE = """
import math

def results(doc, results):
    text = results[0]
    found = {"length": len(text), "over": math.inf if text == "mat" else 1.0, "digits": "3"}
    if "on" not in text:
        found["cats"] = float("cat" in text)
        found["longest"] = len(text)
    return found

def largest(items):
    return max(items)

def broken(items):
    raise RuntimeError("no luck")

def none_of_some(doc, results):
    return {} if results[0] == "mat" else {"length": float(len(results[0]))}

def failing(doc, results):
    return {"length": {"cat": 1}[results[0]]}
"""
TASK = """
task: given
dataset_path: json
dataset_kwargs: {data_files: {test: generating.jsonl}}
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 16}
process_results: !function utils.results
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: true}
  - {metric: cats, aggregation: mean, higher_is_better: true}
  - {metric: longest, aggregation: !function utils.largest, higher_is_better: true}
"""
SPARING = TASK.replace("task: given", "task: sparing").replace("utils.results", "utils.none_of_some")
LUCKLESS = TASK.replace("task: given", "task: luckless").replace("utils.largest", "utils.broken")
FAILING = TASK.replace("task: given", "task: failing").replace("utils.results", "utils.failing")


NEEDY = """
def loaded(name):
    if name == "package":
        import not_installed_here
    if name == "data":
        raise LookupError("\\n****\\nResource punkt not found.\\n")
    if name == "net":
        raise ConnectionError("Couldn't reach the Hub")
    return open("/not/there/" + name)

def results(doc, results):
    return {"length": loaded("package")}

def scores(doc, results):
    return {"length": 1.0, "longest": results[0]}

def of_package(items):
    return loaded("package")

def of_data(items):
    return loaded("data")

def of_net(items):
    return loaded("net")

def of_file(items):
    return loaded("squad_v2.py")
"""


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("of_package", "its metric 'longest' needs what is not here (ModuleNotFoundError: No module named"),
        ("of_data", "its metric 'longest' needs what is not here (LookupError: Resource punkt not found."),
        ("of_net", "its metric 'longest' needs what is not here (ConnectionError: Couldn't reach the Hub"),
        ("of_file", "its metric 'longest' needs what is not here (FileNotFoundError: [Errno 2]"),
        ("results", "its scoring needs what is not here (ModuleNotFoundError: No module named 'not_installed_here'"),
    ],
)
def test_what_scoring_needs_is_missed_before_any_model_loads(
    function: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers were there before lm-eval's function of all documents asked for what is not."""
    folder = tmp_path / "needy"
    folder.mkdir()
    hook, last = ("results", "largest") if function == "results" else ("scores", function)
    code = NEEDY + "\ndef largest(items):\n    return max(map(len, items))\n"
    yaml = TASK.replace("utils.results", f"utils.{hook}").replace("utils.largest", f"utils.{last}")
    own_tasks.write_tasks(folder, [yaml], {"generating": whole.GENERATING}, code)
    own_tasks.use_tasks(monkeypatch, folder)
    with pytest.raises(ValueError, match=re.escape(f"task 'given': {why}")) as raised:
        suites.resolve_tasks(["given"])
    assert "\n" not in str(raised.value)


def test_what_goes_missing_while_models_answer_is_no_score_that_is_kept(tmp_path: Path) -> None:
    [task] = suites.resolve_tasks(["given"])
    rows = own_tasks.rows_of(task, "baseline", whole.model(1))
    (tmp_path / "here").touch()
    function = task.docs[0].source.aggregation()["longest"]

    def gone(items: list[int]) -> int:
        raise OSError("the network is down")

    task.docs[0].source._aggregation_list["longest"] = gone
    with pytest.raises(ValueError, match="task 'given': its metric 'longest' needs what is not here"):
        aggregate_rows(task, "baseline", rows)
    task.docs[0].source._aggregation_list["longest"] = function
    assert aggregate_rows(task, "baseline", rows)[0].value is not None


@pytest.fixture(autouse=True)
def _tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_tasks.write_tasks(tmp_path, [TASK, FAILING, LUCKLESS, SPARING], {"generating": whole.GENERATING}, CODE)
    own_tasks.use_tasks(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("twotower_eval.measure.harness.scoring.NUM_REPLICATES", 200)


def texts(seed: int) -> list[str]:
    [task] = suites.resolve_tasks(["given"])
    answer = whole.model(seed)
    return [answer(doc.instances[0]) for doc in task.docs]


def test_a_metric_of_some_answers_only_is_compared_where_both_arms_have_it(tmp_path: Path) -> None:
    run = whole.journalled(tmp_path, ("given",))
    [point] = quality_points(run)
    without = [{i for i, text in enumerate(texts(seed)) if "on" in text} for seed in (1, 2)]
    assert without[0] - without[1], "made so that the arms differ"
    [cats] = [other for other in point.others if other.metric == "cats"]
    both = set(range(24)) - without[0] - without[1]
    assert cats.num_documents == len(both)
    assert cats.baseline == pytest.approx(sum("cat" in texts(1)[i] for i in both) / len(both))
    gaps = {gap.arm: gap for gap in point.missing if gap.metric == "cats"}
    assert {gap.reason for gap in gaps.values()} == {NOT_GIVEN}
    assert set(gaps["baseline"].doc_ids) == without[0] - without[1]
    assert set(gaps["candidate"].doc_ids) == without[1] - without[0]


def test_a_score_of_all_documents_is_each_arms_own_and_not_compared_on_unlike_ones(tmp_path: Path) -> None:
    [point] = quality_points(whole.journalled(tmp_path, ("given",)))
    [longest] = [found for found in point.wholes if found.metric == "longest"]
    assert longest.aggregation == "utils.largest", "no folder of this machine"
    for seed, figure in ((1, longest.baseline), (2, longest.candidate)):
        assert figure.value == max(len(text) for text in texts(seed) if "on" not in text)
    assert longest.difference.estimate is longest.retention.estimate is None
    assert "other documents in one arm" in (longest.difference.reason or "")


def test_an_arm_without_the_answer_is_still_no_pair(tmp_path: Path) -> None:
    run = whole.journalled(tmp_path, ("given",))
    [candidate] = [cell.id for cell in run.manifest.cells if cell.arm == "candidate"]
    run.scores[:] = [row for row in run.scores if (row.cell, row.doc_id) != (candidate, 3)]
    with pytest.raises(ArmsDifferError, match="document 3, metric 'digits' is scored in one arm only"):
        quality_points(run)


def test_an_answer_that_is_given_nothing_at_all_is_told(tmp_path: Path) -> None:
    [point] = quality_points(whole.journalled(tmp_path, ("sparing",)))
    gaps = {gap.arm: gap for gap in point.missing}
    for seed, arm in ((1, "baseline"), (2, "candidate")):
        assert gaps[arm].doc_ids == tuple(i for i, text in enumerate(texts(seed)) if text == "mat")
        assert gaps[arm].headline


def test_one_model_alone_says_what_has_no_value(tmp_path: Path) -> None:
    run = whole.journalled(tmp_path, ("given",))
    [baseline] = [cell for cell in run.manifest.cells if cell.arm == "baseline"]
    rows = [*run.generations, *run.scores, *run.aggregates]
    header = whole.manifest("20261101T120000Z-run-bbbbbb", "run", [baseline])
    with store.create(tmp_path / "alone", header) as writer:
        for row in rows:
            if row.cell == baseline.id:
                writer.append(row)
        writer.finish()
    folder = report.write([writer.path], tmp_path / "reports", csv=True)
    num = sum(text == "mat" for text in texts(1))
    said = (folder / "report.md").read_text()
    assert re.search(rf"given, over, .*: {num} of 24 documents: over of this document is inf", said)
    assert re.search(r"given, digits, .*: 24 of 24 documents: digits of this document is a text", said)
    with open(folder / "tables/scores_alone.csv") as file:
        counts = {
            row["metric"]: (row["num_documents"], row["num_documents_without_value"]) for row in csv.DictReader(file)
        }
    assert counts["over"] == (str(24 - num), str(num))
    assert counts["length"] == ("24", "0")


def test_code_that_fails_on_an_answer_names_the_document() -> None:
    [task] = suites.resolve_tasks(["failing"])
    rows = own_tasks.rows_of(task, "c", lambda instance: "cat" if instance.doc_id != 2 else "dog")
    with pytest.raises(ValueError, match=r"task 'failing', document 2: its own code fails .*\(KeyError: 'dog'\)"):
        score_rows(task, "c", rows)
    with pytest.raises(ValueError, match="document 2"):
        aggregate_rows(task, "c", rows)


def test_a_function_over_all_documents_may_fail_in_its_own_way(tmp_path: Path) -> None:
    [task] = suites.resolve_tasks(["luckless"])
    rows = own_tasks.rows_of(task, "c", lambda instance: "cat")
    [made] = [row for row in aggregate_rows(task, "c", rows) if row.metric == "longest"]
    assert made.value is None
    assert made.missing_reason == "lm-eval's utils.broken of all documents fails (RuntimeError: no luck)"
