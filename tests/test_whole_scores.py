"""From journalled answers to reports: scores of all documents together are lm-eval's numbers, for both arms."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from tests import own_tasks
from tests.report_fixture import AUTOREGRESSIVE, block_diffusion, make_cell, manifest
from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.compare.quality import quality_points
from twotower_eval.analyse.compare.wholes import WholeScore, current_scores, one_whole
from twotower_eval.cli import main
from twotower_eval.measure import suites
from twotower_eval.measure.harness.jobs import KnownScores
from twotower_eval.measure.harness.scoring import aggregate_rows, score_rows
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.records import Claim, Likelihood, LikelihoodRow, OperatingPoint, Score, Workload

WORDS = ("cat sat", "the mat", "a cat", "the cat sat on a mat", "mat", "sat on", "on the mat", "cat")
GENERATING = [{"prompt": f"say {i}", "answer": WORDS[i % 8]} for i in range(24)]
CHOOSING = [{"prompt": f"choose {i}", "choices": ["no", "yes"], "gold": i % 2} for i in range(24)]
ROLLING = [{"text": " ".join(f"{words} {chr(97 + i)}" for words in WORDS[: i % 8 + 1])} for i in range(24)]

CODE = """
def results(doc, results):
    text = results[0]
    return {"size": len(text), "half": float("nan") if "on" in text else float("cat" in text)}

def largest(items):
    return max(items)
"""
HOOKED = """
task: hooked
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
  - {metric: size, aggregation: !function utils.largest, higher_is_better: true}
  - {metric: half, aggregation: nanmean, higher_is_better: true}
"""
CONFIGS = [
    own_tasks.task_yaml(
        "translating",
        "generating",
        "generate_until",
        [{"metric": "bleu"}, {"metric": "chrf"}, {"metric": "ter"}, {"metric": "exact_match"}],
    ),
    own_tasks.task_yaml(
        "choosing",
        "choosing",
        "multiple_choice",
        [{"metric": "f1"}, {"metric": "mcc"}, {"metric": "acc"}, {"metric": "brier_score"}],
    ),
    own_tasks.task_yaml(
        "rolling",
        "rolling",
        "loglikelihood_rolling",
        [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    ),
    own_tasks.task_yaml("briers", "choosing", "multiple_choice", [{"metric": "brier_score"}]),
    own_tasks.task_yaml("ending", "generating", "loglikelihood", [{"metric": "perplexity"}, {"metric": "acc"}]),
    HOOKED,
]
TASK = "miniature_perplexity"
NAMES = ("translating", "choosing", "rolling", "ending", "hooked")
NO_MEANS = {
    "bleu": "higher", "chrf": "higher", "ter": "lower", "f1": "higher", "mcc": "higher", "word_perplexity": "lower",
    "byte_perplexity": "lower", "bits_per_byte": "lower", "perplexity": "lower", "size": "higher", "half": "higher",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"generating": GENERATING, "choosing": CHOOSING, "rolling": ROLLING}
    own_tasks.write_tasks(tmp_path, CONFIGS, rows, CODE)
    own_tasks.use_tasks(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("twotower_eval.measure.harness.scoring.NUM_REPLICATES", 200)


def model(seed: int) -> Callable[[Instance], Any]:
    """Answers that depend on the request and the seed, some of them right."""

    def answer(instance: Instance) -> Any:
        rng = np.random.default_rng([seed, *"".join(arg for arg in instance.args if isinstance(arg, str)).encode()])
        if instance.request_type == "generate_until":
            right = instance.doc["answer"]
            return right if rng.random() < 0.5 else str(rng.choice(WORDS))
        nats = -float(rng.gamma(3, 4))
        if instance.request_type == "loglikelihood_rolling":
            # The second text is so unlikely that its own word perplexity is beyond every float.
            return -900.0 if instance.args[0] == ROLLING[0]["text"] else nats
        gold = instance.doc.get("gold")
        helped = gold is not None and instance.args[1].strip() == ["no", "yes"][gold]
        return (nats / (2 if helped else 1), bool(rng.random() < 0.5))

    return answer


def journalled(tmp_path: Path, names: tuple[str, ...] = NAMES, seeds: tuple[int, int] = (1, 2)) -> store.Run:
    """A run of two such models over the tasks."""
    cells, rows = [], []
    for task in suites.resolve_tasks(list(names)):
        workload = Workload(kind="task", name=task.name, digest=task.digest)
        for arm, decoder, seed in (("baseline", AUTOREGRESSIVE, seeds[0]), ("candidate", block_diffusion(), seeds[1])):
            cell = make_cell(arm, decoder, workload)
            answers = own_tasks.rows_of(task, cell.id, model(seed))
            cells.append(cell)
            rows += [*answers, *score_rows(task, cell.id, answers), *aggregate_rows(task, cell.id, answers)]
    with store.create(tmp_path / "runs", manifest("20261101T120000Z-run-aaaaaa", "run", cells)) as writer:
        for row in rows:
            writer.append(row)
        writer.finish()
    return store.load(writer.path)


def wholes(run: store.Run) -> dict[tuple[str, str], WholeScore]:
    [point] = quality_points(run)
    return {(whole.task, whole.metric): whole for whole in point.wholes}


def lm_evals(seed: int) -> dict[tuple[str, str], float]:
    """What lm-eval's own evaluator makes of the same answers."""
    with lm_tasks.quiet():
        sources = {name: lm_tasks.load_task(name, {}, None) for name in NAMES}
        found = lm_eval.evaluator.evaluate(own_tasks.Written(model(seed)), {"tasks": sources}, bootstrap_iters=0)
    assert found is not None
    return {
        (task, key.partition(",")[0]): value
        for task, metrics in found["results"].items()
        for key, value in metrics.items()
        if key.endswith(",none") and "stderr" not in key
    }


def test_both_arms_have_lm_evals_own_numbers(tmp_path: Path) -> None:
    run = journalled(tmp_path)
    found = wholes(run)
    [point] = quality_points(run)
    assert {metric for _, metric in found} == set(NO_MEANS)
    for seed, arm in ((1, "baseline"), (2, "candidate")):
        theirs = lm_evals(seed)
        for key, whole in found.items():
            assert getattr(whole, arm).value == theirs.pop(key), key
            interval = getattr(whole, f"{arm}_interval").estimate
            assert interval is not None, getattr(whole, f"{arm}_interval").reason
            assert interval.low < interval.high
            assert interval.low > 0 or "perplexity" not in whole.metric
        means = {(other.task, other.metric): getattr(other, arm) for other in point.others}
        assert means == pytest.approx({key: value for key, value in theirs.items() if key in means})
        assert theirs.keys() == means.keys(), "every metric is shown, and nothing else under its name"


def test_replicates_on_disk_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is, and where it differs, the run is refused as before."""
    run = journalled(tmp_path, ("hooked",))
    [row] = [row for row in run.aggregates if row.metric == "size" and run.cells[row.cell].arm == "baseline"]
    assert row.replicates is not None
    monkeypatch.setattr(
        "twotower_eval.measure.harness.scoring.replicates_of", lambda *args: pytest.fail("called again")
    )
    [task] = suites.resolve_tasks(["hooked"])
    answers = [one for one in run.generations if one.cell == row.cell]
    fewer = dataclasses.replace(row, replicates=row.replicates[:150])
    known = KnownScores(dataclasses.replace(run, aggregates=[fewer, *run.aggregates[1:]]))
    made = aggregate_rows(task, row.cell, answers, known.stored)
    assert fewer in made
    assert known.new_aggregates(made) == [one for one in made if one.metric != "size" and one not in run.aggregates]
    other = KnownScores(dataclasses.replace(run, aggregates=[dataclasses.replace(row, value=-1.0)]))
    with pytest.raises(ValueError, match="has another score"):
        other.new_aggregates(aggregate_rows(task, row.cell, answers, other.stored))


def test_directions_of_better_are_the_metrics_own(tmp_path: Path) -> None:
    for (_, metric), whole in wholes(journalled(tmp_path)).items():
        assert whole.higher_is_better == (NO_MEANS[metric] == "higher")
        assert (whole.retention.reason == "less is better") == (not whole.higher_is_better)
        assert whole.difference.estimate is not None
        assert whole.difference.estimate.value == pytest.approx(
            (whole.candidate.value or 0) - (whole.baseline.value or 0)
        )


def test_no_document_has_a_value_under_the_name_of_a_score_of_all(tmp_path: Path) -> None:
    run = journalled(tmp_path)
    for score in run.scores:
        assert (score.value is None) == (score.metric in NO_MEANS), score
        assert not (score.headline and score.metric in NO_MEANS)
        assert (score.aggregation == "mean") == (score.metric not in NO_MEANS)


def test_no_mean_of_them_is_part_of_retention(tmp_path: Path) -> None:
    """Only a mean of which more is better has a place in the headline."""
    tasks = {task.name: task for task in suites.resolve_tasks(list(NAMES))}
    assert not any(task.headline for task in tasks.values())
    assert [(task.metric, task.filter) for task in tasks.values()] == [
        (metric, "none") for metric in ("bleu", "f1", "word_perplexity", "perplexity", "size")
    ]
    [point] = quality_points(journalled(tmp_path))
    assert point.tasks == ()
    assert point.missing == ()


def test_a_score_that_lm_eval_cannot_compute_is_missing_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "model", lambda seed: lambda instance: -1e6)
    found = wholes(journalled(tmp_path, ("rolling",)))
    whole = found["rolling", "word_perplexity"]
    assert whole.baseline.value is whole.candidate.value is None
    assert "fails (OverflowError" in (whole.baseline.reason or "")
    assert "fails (OverflowError" in (whole.difference.reason or "")
    assert found["rolling", "bits_per_byte"].baseline.value is not None


def test_one_document_without_a_number_leaves_no_score_of_the_rest(tmp_path: Path) -> None:
    run = journalled(tmp_path, ("rolling",))
    first = run.scores[0]
    broken = dataclasses.replace(first, parts=None, missing_reason="lm-eval's item of this document is -inf")
    run = dataclasses.replace(run, scores=[broken, *run.scores[1:]], aggregates=[])
    whole = wholes(run)["rolling", first.metric]
    assert whole.baseline.value is None
    assert whole.baseline.reason == "1 of 24 documents: lm-eval's item of this document is -inf"
    assert whole.candidate.value is not None


def test_equal_answers_of_one_computation_are_equal_by_construction(tmp_path: Path) -> None:
    run = journalled(tmp_path, ("rolling",), seeds=(1, 1))
    once = [row for row in run.likelihoods if run.cells[row.cell].arm == "baseline"]
    run = dataclasses.replace(run, likelihoods=once)
    for whole in wholes(run).values():
        assert whole.difference.estimate is not None
        assert whole.difference.estimate.method_kind == "equal_by_construction"


def old_rows(metric: str, answers: list[tuple[float, int]]) -> tuple[list[Score], list[LikelihoodRow]]:
    """Score rows as versions wrote them that kept of each document its own perplexity only."""
    cell = make_cell("baseline", AUTOREGRESSIVE, Workload(kind="task", name="prose", digest="d"))
    scores, rows = [], []
    for doc_id, (nats, weight) in enumerate(answers):
        value = -nats / weight / math.log(2) if metric == "bits_per_byte" else math.exp(-nats / weight)
        scores.append(
            Score(
                cell=cell.id,
                task="prose",
                doc_id=doc_id,
                cluster_id=f"prose:{doc_id}",
                doc_sha256="d",
                prompt_sha256="p",
                target_sha256="t",
                metric=metric,
                filter="none",
                higher_is_better=False,
                headline=False,
                scored_by="exact",
                value=value,
            )
        )
        likelihood = Likelihood(logprob_nats=nats, is_greedy=False, kind="exact")
        rows.append(
            LikelihoodRow(
                cell=cell.id,
                task="prose",
                doc_id=doc_id,
                request_index=0,
                repeat=0,
                request="loglikelihood_rolling",
                prompt_sha256="p",
                num_tokens=9,
                likelihood=likelihood,
            )
        )
    return scores, rows


@pytest.mark.parametrize("metric", ["word_perplexity", "byte_perplexity", "bits_per_byte"])
def test_rows_of_older_versions_give_the_whole_score_from_their_likelihoods(metric: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    answers = [(-float(rng.gamma(4, 30)), int(rng.integers(1, 4000))) for _ in range(50)]
    scores, rows = old_rows(metric, answers)
    run = dataclasses.replace(journalled(tmp_path, ("rolling",)), scores=scores, likelihoods=rows)
    found = current_scores(run)
    assert [score.parts for score in found] == [(nats, float(weight)) for nats, weight in answers]
    assert {score.value for score in found} == {None}
    unknown = current_scores(dataclasses.replace(run, likelihoods=[]))
    assert {(score.value, score.parts) for score in unknown} == {(None, None)}
    assert all("did not keep" in (score.missing_reason or "") for score in unknown)


CLAIMS = """title = "Ours"
[[point]]
name = "p"
decoder = {{ kind = "block_diffusion", block_size = 16, steps_per_block = "auto", threshold = 0.8, temperature = 0.0 }}
[[claim]]
name = "one"
subject = "pair"
baseline = "context-tower"
point = "p"
source = "a test"
margin = 0
{more}
"""


def check(tmp_path: Path, run: store.Run, capsys: pytest.CaptureFixture[str], **more: Any) -> tuple[int, str]:
    """Exit code and first line of ``claims check`` on one claim."""
    claims = tmp_path / "claims.toml"
    claims.write_text(CLAIMS.format(more="\n".join(f"{key} = {json.dumps(value)}" for key, value in more.items())))
    code = main(["claims", "check", str(claims), str(run.path)])
    return code, capsys.readouterr().out.partition("\n")[0]


def test_claims_on_scores_of_all_documents_are_judged_by_lm_evals_function(tmp_path: Path, capsys: Any) -> None:
    """There was no estimate for any task whose aggregation is no mean."""
    run = journalled(tmp_path)
    theirs = lm_evals(2)
    mains = {"translating": "bleu", "choosing": "f1", "rolling": "word_perplexity", "ending": "perplexity"}
    for task, metric in mains.items():
        value = theirs[task, metric]
        about = {"quantity": "score", "scope": [task]}
        code, line = check(tmp_path, run, capsys, **about, relation="at_most", expected=value + 1e15)
        assert code == 0, line
        assert f"SUPPORTED     one  {metric} {value:.4f} [" in line
        assert "%" not in line
        assert check(tmp_path, run, capsys, **about, relation="at_least", expected=value + 1e15)[0] == 3
        code, line = check(tmp_path, run, capsys, **about, relation="at_least", expected=value)
        assert (code, "does not clear" in line) == (4, True)


def test_bounds_of_claims_are_the_tables_at_the_verdicts_level(tmp_path: Path, capsys: Any) -> None:
    run = journalled(tmp_path)
    found = wholes(run)["rolling", "word_perplexity"]
    both, alone = found.resampled.both, found.resampled.singles[1]
    assert not isinstance(both, str)
    assert not isinstance(alone, str)
    for quantity, estimate in (("score", alone.score(level=0.9)), ("score_difference", both.difference(level=0.9))):
        shown = f"one  word_perplexity {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]: "
        for relation, end in (("at_most", estimate.high), ("at_least", estimate.low)):
            step = 1e-3 if relation == "at_most" else -1e-3
            about = {"quantity": quantity, "scope": ["rolling"], "relation": relation}
            code, line = check(tmp_path, run, capsys, **about, expected=end + step)
            assert (code, shown in line) == (0, True), line
            assert check(tmp_path, run, capsys, **about, expected=end - step)[0] == 4
    wide = found.difference.estimate
    assert wide is not None
    assert wide.low < both.difference(level=0.9).low, "the report's table is at 95 %"


def test_a_claim_names_the_metric_that_it_means(tmp_path: Path, capsys: Any) -> None:
    run = journalled(tmp_path)
    theirs = lm_evals(2)
    about = {"quantity": "score", "relation": "at_most", "expected": 1e6}
    for task, metric, asked in (
        ("rolling", "byte_perplexity", "byte_perplexity"),
        ("rolling", "bits_per_byte", "bits_per_byte,none"),
        ("choosing", "brier_score", "brier_score"),
        ("translating", "exact_match", "exact_match"),
    ):
        most = (
            {"expected": 0.98} if metric == "exact_match" else {}
        )  # a share is at most 1: more than that says nothing
        code, line = check(tmp_path, run, capsys, **(about | most), scope=[task], metric=asked)
        assert (code, f"one  {metric} {theirs[task, metric]:.4f} [" in line) == (0, True), line
    code, line = check(tmp_path, run, capsys, **about, scope=["rolling"], metric="bpb")
    assert code == 6
    assert line.endswith(
        "one  rolling has no one score 'bpb': name one by metric, of "
        "bits_per_byte,none, byte_perplexity,none, word_perplexity,none; "
        "claimed: score (bpb) at most 1e+06, without a margin"
    )
    unsaid = [dataclasses.replace(score, main=None) for score in run.scores]
    [verdict] = judge([claim_on("score", "rolling")], [dataclasses.replace(run, scores=unsaid)])
    assert verdict.outcome == "NOT_MEASURED", "which one stands for the task was not kept"
    assert "rolling has several scores: name one by metric" in verdict.reason


def claim_on(quantity: Any, *scope: str, **more: Any) -> Claim:
    decoder = block_diffusion()
    return Claim(
        name="one", quantity=quantity, subject="pair", baseline="context-tower", scope=scope, source="a test",
        point=OperatingPoint(name="p", decoder=decoder), expected=1.0, margin=0.0, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("quantity", "scope", "reason"),
    [
        (
            "retention",
            ["rolling"],
            "rolling cannot be part of a retention: its word_perplexity is not a mean over documents but lm-eval's "
            "weighted_perplexity over all of them; claim its score or score_difference by itself",
        ),
        (
            "score_difference",
            ["choosing", "rolling"],
            "choosing cannot be part of a score_difference over several tasks: its f1 is not a mean over documents but "
            "lm-eval's f1 over all of them; claim its score or score_difference by itself",
        ),
        (
            "decoder_exercised_retention",
            ["hooked"],
            "hooked cannot be part of a decoder_exercised_retention: its size ",
        ),
    ],
)
def test_what_such_a_task_has_no_part_in_is_not_measured(
    quantity: str, scope: list[str], reason: str, tmp_path: Path, capsys: Any
) -> None:
    run = journalled(tmp_path)
    code, line = check(tmp_path, run, capsys, quantity=quantity, scope=scope, expected=0.5)
    assert code == 6
    assert line.startswith(f"NOT MEASURED  one  {reason}")


def test_means_of_which_less_is_better_are_judged_as_they_are(tmp_path: Path, capsys: Any) -> None:
    run = journalled(tmp_path, ("hooked", "briers"))
    [other] = [other for other in quality_points(run)[0].others if other.task == "briers"]
    about = {"quantity": "score_difference", "scope": ["briers"], "relation": "at_most"}
    code, line = check(tmp_path, run, capsys, **about, expected=other.candidate - other.baseline + 5)
    assert (code, f"one  brier_score {other.candidate - other.baseline:.4f} [" in line) == (0, True), line
    assert check(tmp_path, run, capsys, **about, expected=-5.0)[0] == 3
    gone = [dataclasses.replace(score, value=None, missing_reason="lost") for score in run.scores[-1:]]
    [verdict] = judge([claim_on("score", "briers")], [dataclasses.replace(run, scores=[*run.scores[:-1], *gone])])
    assert (verdict.outcome, "all scored" in verdict.reason) == ("INVALID", True), verdict.reason


def test_one_computation_of_both_arms_is_no_difference(tmp_path: Path) -> None:
    run = journalled(tmp_path, ("rolling",), seeds=(1, 1))
    once = [row for row in run.likelihoods if run.cells[row.cell].arm == "baseline"]
    run = dataclasses.replace(run, likelihoods=once)
    [verdict] = judge([dataclasses.replace(claim_on("score_difference", "rolling"), expected=0.0)], [run])
    assert verdict.outcome == "SUPPORTED"
    assert verdict.reason.startswith("equal by construction")
    [other] = judge([dataclasses.replace(claim_on("score_difference", "rolling"), relation="equal")], [run])
    assert other.outcome == "REFUTED"


def test_reports_show_such_claims_in_the_metrics_unit(tmp_path: Path) -> None:
    run = journalled(tmp_path, ("rolling",))
    claims = tmp_path / "claims.toml"
    about = {"quantity": "score", "scope": ["rolling"], "relation": "at_most", "expected": 1e15}
    claims.write_text(CLAIMS.format(more="\n".join(f"{key} = {json.dumps(value)}" for key, value in about.items())))
    shown = (report.write([run.path], tmp_path / "reports", claims=str(claims)) / "report.md").read_text()
    assert "| one | **SUPPORTED** | word_perplexity " in shown.replace("\\_", "_")
    assert "score (word_perplexity) at most 1e+15, without a margin |" in shown.replace("\\_", "_")


def test_the_published_miniature_has_perplexities_of_all_its_documents() -> None:
    """The mean of the documents' own perplexities stood there under lm-eval's name."""
    folder = Path(__file__).parent.parent / "results/published/miniature_cpu_2026-11-25"
    run = next(store.load(path) for path in sorted(folder.glob("*-run-*")))
    run = dataclasses.replace(run, scores=[score for score in run.scores if score.task == TASK])
    [baseline] = [cell.id for cell in run.manifest.cells if cell.arm == "baseline" and cell.workload.name == TASK]
    scores = [score for score in current_scores(run) if score.cell == baseline and score.metric == "word_perplexity"]
    nats = sum(row.likelihood.logprob_nats for row in run.likelihoods if row.task == TASK)
    value, interval = one_whole(scores, run)
    assert value.value == pytest.approx(math.exp(-nats / sum(score.parts[1] for score in scores if score.parts)))
    assert interval.estimate is not None
    assert (len(scores), round(value.value or 0, 2)) == (100, 33.27), "the mean was 65.50"
