"""What guessing scores: from a task's documents, through score rows, to retention above chance and to verdicts."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixture import quality_run
from scipy.stats import binomtest
from tiny_pair import write_pair

from twotower_eval import cli, store
from twotower_eval.analyse import stats
from twotower_eval.analyse.claims import judge, verdict_lines
from twotower_eval.analyse.claims.files import claims_from
from twotower_eval.analyse.compare import ArmsDifferError, QualityPoint, Runs
from twotower_eval.analyse.compare.gates import floor_gate
from twotower_eval.analyse.compare.quality import quality_points
from twotower_eval.analyse.report.tables import quality
from twotower_eval.analyse.report.text import retention
from twotower_eval.analyse.report.verdicts import JudgedRuns, headline
from twotower_eval.analyse.words import found_text
from twotower_eval.measure import suites
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.records import GateLimits, Score, Verdict
from twotower_eval.strict import from_json

HEAD = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: q
doc_to_choice: choices
doc_to_target: gold
metric_list:
"""
TEXT = """
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tasks folder of its own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lm_tasks.local_index.cache_clear()
    monkeypatch.setattr(lm_tasks, "data_path", lambda *parts: folder)
    yield folder
    lm_tasks.local_index.cache_clear()


def metrics(*names: str) -> str:
    return "".join(f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n" for name in names)


def write_task(folder: Path, yaml: str, docs: Sequence[dict[str, Any]]) -> None:
    (folder / "own.yaml").write_text(HEAD + yaml)
    (folder / "own.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))


def chances(folder: Path, yaml: str, docs: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    write_task(folder, yaml, docs)
    return [dict(doc.chance) for doc in suites.resolve_tasks(["own"])[0].docs]


def question(num: int, gold: Any, **more: Any) -> dict[str, Any]:
    return {"q": f"which of {num}?", "choices": [f"no. {i}" * (i + 1) for i in range(num)], "gold": gold, **more}


# --- documents -----------------------------------------------------------------------------------------------------


def test_options_are_counted_document_by_document(own_task: Path) -> None:
    docs = [question(num, num - 1) for num in (2, 3, 4, 5)]
    found = chances(own_task, CHOICE + metrics("acc", "acc_norm", "acc_bytes"), docs)
    assert [one["acc"] for one in found] == [1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert all(one == dict.fromkeys(("acc", "acc_norm", "acc_bytes"), one["acc"]) for one in found)


def test_several_right_options_count_and_one_that_is_not_there_does_not(own_task: Path) -> None:
    docs = [question(4, [0, 2]), question(5, [1]), question(4, [0, 1, 2, 3]), question(4, [3, 9])]
    found = chances(own_task, CHOICE + metrics("acc", "acc_norm"), docs)
    assert [one["acc"] for one in found] == [1 / 2, 1 / 5, 1.0, 1 / 4]


def test_a_gold_by_its_words_and_metrics_that_are_no_share(own_task: Path) -> None:
    """F1 over the set and log-likelihoods have no chance; asking each option twice does not halve it."""
    yaml = CHOICE + metrics("acc", "acc_mutual_info", "f1") + metrics("likelihood", "brier_score")
    assert chances(own_task, yaml, [question(4, "no. 0"), question(2, "no. 1no. 1")]) == [
        {"acc": 0.25, "acc_mutual_info": 0.25},
        {"acc": 0.5, "acc_mutual_info": 0.5},
    ]


def test_options_in_the_context(own_task: Path) -> None:
    """As in WinoGrande: the options stand in the contexts, and the text is the number of the right one."""
    yaml = """
output_type: multiple_choice
doc_to_text: "{{ gold }}"
doc_to_choice: choices
doc_to_target: rest
metric_list:
"""
    docs = [{"choices": ["Ann was", "Bob was", "Cy was"][:num], "gold": 1, "rest": "late"} for num in (2, 3)]
    assert chances(own_task, yaml + metrics("acc"), docs) == [{"acc": 1 / 2}, {"acc": 1 / 3}]


def test_a_scoring_function_of_its_own(own_task: Path) -> None:
    """As in TruthfulQA's second form: the score is the probability of all true options together."""
    (own_task / "own_code.py").write_text(
        "import math\n"
        "def score(doc, results):\n"
        "    shares = [math.exp(nats) for nats, _ in results]\n"
        "    true = sum(share for share, label in zip(shares, doc['labels']) if label)\n"
        "    return {'acc': true / sum(shares), 'nats': max(nats for nats, _ in results)}\n"
    )
    yaml = CHOICE.replace("metric_list:", "process_results: !function own_code.score\nmetric_list:")
    docs = [question(4, 0, labels=[1, 1, 1, 0]), question(5, 0, labels=[1, 0, 0, 0, 0])]
    assert chances(own_task, yaml + metrics("acc", "nats"), docs) == [{"acc": 0.75}, {"acc": 0.2}]


def test_scores_of_a_ranking_count_every_place_once(own_task: Path) -> None:
    """As in MuTual: is the right option among the first two, and one over its place."""
    (own_task / "own_code.py").write_text(
        "def score(doc, results):\n"
        "    order = sorted(range(len(results)), key=lambda i: -results[i][0])\n"
        "    place = order.index(doc['gold'])\n"
        "    return {'r@2': place < 2, 'mrr': 1 / (1 + place)}\n"
    )
    yaml = CHOICE.replace("metric_list:", "process_results: !function own_code.score\nmetric_list:")
    [found] = chances(own_task, yaml + metrics("r@2", "mrr"), [question(4, 2)])
    assert found == {"r@2": 0.5, "mrr": pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)}


def test_a_scoring_function_that_takes_no_made_up_answers_has_no_chance(own_task: Path) -> None:
    (own_task / "own_code.py").write_text(
        "def score(doc, results):\n    assert max(nats for nats, _ in results) < -0.1\n    return {'acc': 1}\n"
    )
    yaml = CHOICE.replace("metric_list:", "process_results: !function own_code.score\nmetric_list:")
    assert chances(own_task, yaml + metrics("acc"), [question(4, 0)]) == [{}]


def test_a_last_word_and_a_text_have_no_options(own_task: Path) -> None:
    docs = [{"q": "once upon a", "a": "time"}]
    base = "doc_to_text: q\ndoc_to_target: a\nmetric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]\n"
    assert chances(own_task, "output_type: loglikelihood\n" + base % "acc", docs) == [{}]
    assert chances(own_task, "output_type: loglikelihood_rolling\n" + base % "bits_per_byte", docs) == [{}]
    assert chances(own_task, TEXT + "doc_to_text: q\ndoc_to_target: a\n", docs) == [{}]


@pytest.mark.parametrize(
    ("text", "docs", "expected"),
    [
        # As in MMLU-Pro: a column of options, the answer's letter.
        (
            "{{q}}",
            [{"q": "?", "options": list("wxyz"), "a": "C"}, {"q": "?", "options": list("uv"), "a": "(b)"}],
            [4, 2],
        ),
        # As in ARC: the column holds texts and labels.
        ("{{q}}", [{"q": "?", "choices": {"text": ["u", "v", "w"], "label": ["A", "B", "C"]}, "a": "v"}], [3]),
        # As in BIG-Bench Hard: options within the question.
        ("Q: {{q}}\nA: think.", [{"q": "Which?\nOptions:\n(A) red\n(B) blue\n(C) no colour", "a": "(B)"}], [3]),
        ("{{q}}", [{"q": "Which? A. red B. blue", "a": "B"}], [2]),
        ("{{q}}\nA:", [{"q": "Is it so?\nOptions:\n- Yes\n- No\n- Not told", "a": "No"}], [3]),
        ("{{q}}", [{"q": "Options:\n* u\n* v", "a": "u"}, {"q": "Options:\n- u\n- v", "a": "w"}], [2, None]),
        ("{{q}}", [{"q": "Plan A: go. Plan B: stay. Which letter is the better one", "a": "B"}], [None]),
        # A letter that is an answer of its own, a list that lacks the answer, a list of accepted answers.
        ("{{q}}", [{"q": "Which letter follows A?", "a": "B"}], [None]),
        ("{{q}}", [{"q": "?", "choices": ["u", "v"], "a": "w"}], [None]),
        ("{{q}}", [{"q": "?", "aliases": ["u", "v"], "a": "u"}], [None]),
    ],
)
def test_answers_in_text_have_the_options_that_the_document_lists(
    own_task: Path, text: str, docs: list[dict[str, Any]], expected: list[int | None]
) -> None:
    yaml = f"{TEXT}doc_to_text: {json.dumps(text)}\ndoc_to_target: a\n"
    wanted = [{} if num is None else {"exact_match": pytest.approx(1 / num)} for num in expected]
    assert chances(own_task, yaml, docs) == wanted


# --- statistics ----------------------------------------------------------------------------------------------------


def paired(*tasks: tuple[str, list[float], list[float], list[float]], clusters: list[str] | None = None) -> Any:
    """Scores of tasks: name, chance, baseline, candidate; each document its own cluster unless told."""
    names = [name for name, chance, *_ in tasks for _ in chance]
    columns = [[value for task in tasks for value in task[i]] for i in (1, 2, 3)]
    own = [f"{name}/{i}" for i, name in enumerate(names)]
    return stats.PairedScores(
        tasks=names,
        groups=names,
        clusters=clusters or own,
        chance=columns[0],
        baseline=columns[1],
        candidate=columns[2],
    )


def answers(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def above(scores: Any, tasks: Sequence[str] | None = None, **options: Any) -> Any:
    table = scores.table
    draws = stats.draw_task_means(table, num_resamples=2000)
    return stats.retention_above_chance(table, draws, table.weights_K(tasks), **options)


def test_retention_above_chance_is_the_ratio_of_what_lies_above_it() -> None:
    quarter = ("quarter", [0.25] * 80, answers(60, 80), answers(50, 80))  # 0.5 above chance, then 0.375
    mixed = ("mixed", [0.5, 0.2] * 40, answers(68, 80), answers(48, 80))  # 0.5 above 0.35, then 0.25
    text = ("text", [0.0] * 80, answers(40, 80), answers(30, 80))  # nothing to guess at
    scores = paired(quarter, mixed, text)
    assert above(scores, ["quarter"]).value == pytest.approx(0.375 / 0.5)
    assert above(scores, ["mixed"]).value == pytest.approx(0.25 / 0.5)
    assert above(scores, ["text"]).value == pytest.approx(0.75)
    assert above(scores).value == pytest.approx((0.375 + 0.25 + 0.375) / 1.5)
    table = scores.table
    kept = stats.retention(table, stats.draw_task_means(table, num_resamples=2000), table.weights_K(["text"]))
    assert (above(scores, ["text"]).low, above(scores, ["text"]).high) == (kept.low, kept.high)


def test_a_candidate_that_guesses_keeps_nothing_and_one_below_chance_less() -> None:
    docs = [0.25] * 200, answers(150, 200)
    assert above(paired(("t", *docs, answers(50, 200)))).value == pytest.approx(0.0)
    worse = above(paired(("t", *docs, answers(0, 200))))
    assert worse.value == pytest.approx(-0.5)
    assert worse.low < -0.5 < worse.high < 0


def test_all_alike_is_one_with_an_exact_bound() -> None:
    found = above(paired(("t", [0.25] * 100, answers(70, 100), answers(70, 100))))
    assert found.value == 1.0
    assert stats.is_exact(found)
    lost = 1 - 0.025 ** (1 / 100)
    assert found.low == pytest.approx(1 - lost / (binomtest(70, 100).proportion_ci(0.95).low - 0.25))


@pytest.mark.parametrize("right", [26, 30])
def test_near_chance_there_is_no_ratio(right: int) -> None:
    """Neither infinite nor 100 %."""
    with pytest.raises(ValueError, match="too near chance"):
        above(paired(("t", [0.25] * 100, answers(right, 100), answers(25, 100))))
    table = paired(("t", [0.0] * 9, answers(0, 9), answers(3, 9))).table
    with pytest.raises(ValueError, match="scores 0 everywhere"):
        stats.retention(table, stats.draw_task_means(table))


def stands(*tasks: tuple[str, float, int, int], **options: Any) -> list[str]:
    """How tasks stand, each of a name, a chance, right answers and documents."""
    rows = [(name, [chance] * n, answers(right, n), answers(right, n)) for name, chance, right, n in tasks]
    return [found.stand for found in stats.standings(paired(*rows).table, **options)]


def test_clearly_above_chance_is_the_exact_binomial_test() -> None:
    for n, chance in ((3, 0.25), (10, 0.5), (40, 0.25), (200, 0.2)):
        found = [stands(("t", chance, right, n))[0] for right in range(1, n + 1)]
        tested = [binomtest(right, n, chance, alternative="greater").pvalue < 0.05 for right in range(1, n + 1)]
        assert [one == "above" for one in found] == tested
        below = [binomtest(right, n, chance, alternative="less").pvalue < 0.05 for right in range(1, n + 1)]
        assert [one == "below" for one in found] == below


def test_few_documents_no_documents_right_and_nothing_to_guess_at() -> None:
    assert stands(("t", 0.25, 3, 3)) == ["above"]  # 1 in 64
    assert stands(("t", 0.25, 2, 2)) == ["near"]  # 1 in 16
    assert stands(("a", 0.25, 0, 30), ("b", 0.0, 0, 30), ("c", 0.0, 1, 300)) == ["zero", "zero", "above"]


def test_tasks_that_are_tested_together_need_more() -> None:
    """10 of 20 with 4 options: p = 0.0139, clear alone and among 3, not among 4; tasks without options do not count."""
    assert stands(("a", 0.25, 10, 20)) == ["above"]
    others = [(name, 0.25, 5, 20) for name in "bcd"]
    assert stands(("a", 0.25, 10, 20), *others[:2], ("e", 0.0, 5, 20))[0] == "above"
    assert stands(("a", 0.25, 10, 20), *others)[0] == "near"
    assert stands(("a", 0.25, 10, 20), *others, tasks=["a"]) == ["above"]
    assert stands(("a", 0.25, 10, 20), level=0.99) == ["near"]


def test_guessing_passes_for_more_in_one_of_twenty_at_most_whatever_the_options() -> None:
    for chance in ([0.5] * 30 + [0.1] * 70, [0.2] * 25, [1.0] * 3 + [0.25] * 30, [0.5] * 4 + [1 / 3] * 4):
        n, pmf = len(chance), np.ones(1)
        for one in chance:
            pmf = np.convolve(pmf, [1 - one, one])
        passed = [
            stats.standings(paired(("t", chance, answers(right, n), answers(right, n))).table)[0].is_clear
            for right in range(n + 1)
        ]
        assert pmf[np.array(passed)].sum() <= 0.05


def test_questions_of_one_passage_are_no_independent_evidence() -> None:
    """80 of 200 with 4 options is far above chance; not if only 4 of 10 passages are known at all."""
    rows = ("t", [0.25] * 200, answers(80, 200), answers(80, 200))
    assert stats.standings(paired(rows).table)[0].is_clear
    passages = [f"passage {i // 20}" for i in range(200)]
    found = stats.standings(paired(rows, clusters=passages).table)[0]
    assert found.stand == "near"
    assert found.low is not None
    assert found.low < 0 < found.baseline - 0.25
    one = stats.standings(paired(rows, clusters=["passage"] * 200).table)[0]
    assert (one.stand, one.low) == ("near", None)


def test_chance_changes_no_retention_and_no_order_matters() -> None:
    rng = np.random.default_rng(3)
    base, candidate = (rng.random(120) < 0.6).astype(float), (rng.random(120) < 0.5).astype(float)
    clusters = [f"c{i // 3}" for i in range(120)]
    found = []
    for chance in ([0.25] * 120, [0.0] * 120):
        table = paired(("t", chance, list(base), list(candidate)), clusters=clusters).table
        found.append(stats.retention(table, stats.draw_task_means(table, num_resamples=500)))
    assert found[0] == found[1]
    mixed = [1 / (2 + i % 5) for i in range(120)]
    for some in (mixed, rng.random(120).tolist()):
        for own in (clusters, [f"c{i}" for i in range(120)], ["c0"] * 60 + [f"c{i // 9}" for i in range(60)]):
            tables = [
                paired(("t", one, list(base), list(candidate)), clusters=own).table for one in ([0.0] * 120, some)
            ]
            draws = [stats.draw_task_means(table, num_resamples=500) for table in tables]
            assert (draws[0].baseline_QK == draws[1].baseline_QK).all()
            assert (draws[0].candidate_QK == draws[1].candidate_QK).all()
            assert stats.retention(tables[0], draws[0]) == stats.retention(tables[1], draws[1])
    order = rng.permutation(120)
    columns = [np.array(column)[order].tolist() for column in (mixed, base, candidate, clusters)]
    scores = paired(("t", mixed, list(base), list(candidate)), clusters=clusters)
    assert above(scores) == above(paired(("t", *columns[:3]), clusters=columns[3]))


def test_chance_is_drawn_with_the_documents_that_it_is_of() -> None:
    """Right answers where there are two options, wrong ones where there are five: score and chance go together."""
    n = 400
    chance = [0.5] * (n // 2) + [0.2] * (n // 2)
    base = [1.0] * (n // 2) + [0.0] * (n // 2)
    mixed = [1.0, 0.0] * (n // 2)  # nothing to do with the number of options
    for scores, correlation in ((base, 1.0), (mixed, 0.0)):
        draws = stats.draw_task_means(paired(("t", chance, scores, scores)).table, num_resamples=4000)
        assert np.corrcoef(draws.baseline_QK[:, 0], draws.chance_QK[:, 0])[0, 1] == pytest.approx(correlation, abs=0.05)
        assert draws.chance_QK.mean() == pytest.approx(0.35, abs=0.001)
        assert draws.chance_QK.std() == pytest.approx(0.15 / n**0.5, rel=0.05)


def test_the_interval_holds_the_truth() -> None:
    """Baselines not far above chance, and a candidate that keeps 80 % of what lies above it."""
    rng = np.random.default_rng(11)
    missed = [0, 0]
    for _ in range(60):
        rows = []
        for name, options, n, right in (("four", 4, 150, 0.5), ("two", 2, 150, 0.7)):
            base = rng.random(n) < right
            wanted = 1 / options + 0.8 * (right - 1 / options)
            gained = (wanted - 0.85 * right) / (1 - right)
            draw = rng.random(n)
            candidate = np.where(base, draw >= 0.15, draw < gained)
            rows.append((name, [1 / options] * n, base.astype(float).tolist(), candidate.astype(float).tolist()))
        found = above(paired(*rows), level=0.90)
        missed[0] += found.low > 0.8
        missed[1] += found.high < 0.8
    assert max(missed) <= 7  # 3 are due on either side; more than 7 would come by chance once in 70


# --- reports and verdicts ------------------------------------------------------------------------------------------

Chances = dict[str, float]


def guessable(**chances: float) -> Any:
    """An edit of rows that gives the tasks named a chance."""
    return lambda row: (
        replace(row, chance=chances[row.task])
        if getattr(row, "task", "") in chances and isinstance(row, Score)
        else row
    )


def measured_run(root: Path, tasks: Sequence[str], num_docs: int = 150, **chances: float) -> store.Run:
    return store.load(quality_run(root, tasks=tasks, perplexity=False, num_docs=num_docs, edit=guessable(**chances)))


def the_point(run: store.Run) -> QualityPoint:
    return quality_points(run)[0]


def retention_claim(*scope: str, quantity: str = "retention", **changes: Any) -> dict[str, Any]:
    point = {"name": "here", "batch_size": 1, "num_devices": 1, "workload": "answer"}
    decoder = {"kind": "block_diffusion", "block_size": 16, "steps_per_block": 16, "threshold": 0.8}
    claim = {"name": "kept", "quantity": quantity, "subject": "pair", "baseline": "context-tower", "point": "here"}
    claim |= {"scope": list(scope), "expected": 0.5, "margin": 0.0, "source": "a test", **changes}
    return {"title": "claims of a test", "point": [{**point, "decoder": decoder}], "claim": [claim]}


def verdicts(run: store.Run, *scope: str, **changes: Any) -> tuple[Verdict, list[str]]:
    claims = claims_from("test", retention_claim(*scope, **changes)).claims
    found = judge(claims, [run])
    return found[0], verdict_lines(claims, found)


def test_a_report_shows_retention_above_chance_and_chance(tmp_path: Path) -> None:
    run = measured_run(tmp_path, ("sorting", "choice"), choice=0.25)
    point, markdown = the_point(run), quality(Runs([run])).markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert table[0].startswith("| task | retention [95 %] | above chance [95 %] | chance | baseline | candidate |")
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:6]] for row in table[2:6]}
    by_name = {task.name: task for task in point.tasks}
    assert cells["choice"][:3] == ["100 % by construction", "100 % by construction", "25.0 %"]
    assert cells["sorting"][0] == cells["sorting"][1]
    assert cells["sorting"][2] == "\u2013"
    raised = [
        (task.baseline - (task.standing.chance or 0), task.candidate - (task.standing.chance or 0))
        for task in point.tasks
    ]
    assert point.chance.headline.estimate is not None
    assert point.chance.headline.estimate.value == pytest.approx(sum(b for _, b in raised) / sum(a for a, _ in raised))
    assert cells["**headline** (2 tasks)"][2] == "**12.5 %**"
    assert by_name["choice"].above_chance.estimate == by_name["choice"].retention.estimate
    assert "not clearly above chance" not in markdown


def test_without_options_a_report_is_as_it_was(tmp_path: Path) -> None:
    markdown = quality(Runs([measured_run(tmp_path, ("sorting", "arithmetic"))])).markdown
    assert "chance" not in markdown


def test_tasks_near_chance_are_named_and_the_headline_without_them_stands_beside(tmp_path: Path) -> None:
    run = measured_run(tmp_path, ("sorting", "arithmetic", "choice"), choice=0.62, arithmetic=0.25)
    point, runs = the_point(run), JudgedRuns([run])
    choice = next(task for task in point.tasks if task.name == "choice")
    assert (choice.standing.stand, choice.above_chance.estimate) == ("near", None)
    table = point.scores.table if point.scores else None
    assert table is not None
    without = stats.retention(table, stats.draw_task_means(table), table.weights_K(["sorting", "arithmetic"]))
    assert point.chance.clear_headline.estimate == without
    assert point.headline.estimate is not None
    assert point.headline.estimate != without
    for markdown in (quality(runs).markdown, headline(runs).markdown):
        assert f"choice ({100 * choice.baseline:.1f} % is not clearly above chance, 62.0 %)" in markdown
        left = "over the 2 tasks left"
        assert f"Without them the headline is {retention(point.chance.clear_headline)}, {left};" in markdown
        assert f"with them it is {retention(point.headline)}" in markdown
    assert "| choice | 100 % by construction | \u2013 | 62.0 % |" in quality(runs).markdown


def test_a_baseline_of_zero_has_no_retention_and_is_named(tmp_path: Path) -> None:
    def zero(row: Any) -> Any:
        return replace(row, value=0.0) if isinstance(row, Score) and row.task == "sorting" else row

    run = store.load(quality_run(tmp_path, tasks=("sorting", "arithmetic"), perplexity=False, edit=zero))
    point, markdown = the_point(run), quality(Runs([run])).markdown
    assert "sorting (0.0 % is zero)" in markdown
    assert "| sorting | \u2013 | 0.0 % | 0.0 % |" in markdown
    assert not re.search(r"\b(inf|nan)\b", markdown)
    kept = next(task for task in point.tasks if task.name == "arithmetic").retention.estimate
    assert point.chance.clear_headline.estimate == kept


def test_a_baseline_below_chance_is_named_as_that(tmp_path: Path) -> None:
    markdown = quality(Runs([measured_run(tmp_path, ("sorting", "choice"), choice=0.9)])).markdown
    assert re.search(r"choice \(\d\d\.\d % lies below chance, 90\.0 %\)", markdown)


def test_both_arms_have_the_same_chance(tmp_path: Path) -> None:
    def edit(row: Any) -> Any:
        other = isinstance(row, Score) and row.doc_id == 3 and row.cell in odd
        return replace(row, chance=0.5 if other else 0.25) if isinstance(row, Score) else row

    plain = store.load(quality_run(tmp_path / "plain", tasks=("sorting",), perplexity=False))
    odd = {cell.id for cell in plain.manifest.cells if cell.arm == "candidate"}
    run = store.load(quality_run(tmp_path / "odd", tasks=("sorting",), perplexity=False, edit=edit))
    with pytest.raises(ArmsDifferError, match="document 3: chance differs"):
        quality_points(run)


def test_rows_of_versions_that_did_not_say_count_the_options_that_were_scored(tmp_path: Path) -> None:
    run = measured_run(tmp_path, ("sorting", "choice"))
    assert the_point(run).chance.has_options is False  # one request a document is no choice
    asked = [replace(row, request_index=i) for row in run.likelihoods for i in range(2 + row.doc_id % 2)]
    found = next(task for task in the_point(replace(run, likelihoods=asked)).tasks if task.name == "choice")
    assert found.standing.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    twice = [replace(row, metric="acc_mutual_info") if row.metric == "acc_norm" else row for row in run.scores]
    asked = [replace(row, request_index=i) for row in run.likelihoods for i in range(8)]
    found = next(t for t in the_point(replace(run, likelihoods=asked, scores=twice)).tasks if t.name == "choice")
    assert found.standing.chance == pytest.approx(1 / 4)


def test_a_claim_over_tasks_at_chance_is_invalid(tmp_path: Path) -> None:
    run = measured_run(tmp_path, ("sorting", "choice"), choice=0.75, sorting=0.75)
    for scope, quantity in ((["sorting", "choice"], "retention"), (["sorting"], "decoder_exercised_retention")):
        found, lines = verdicts(run, *scope, quantity=quantity)
        assert found.outcome == "INVALID"
        assert "above chance: no task in scope has a baseline clearly above chance: " in lines[0]
        assert "sorting (" in lines[0]
        assert found.near_chance == tuple(sorted(scope))
    by_construction, _ = verdicts(run, "choice", relation="equal", expected=1.0)
    assert by_construction.outcome == "INVALID"


def test_a_joint_claim_is_as_invalid_as_its_part(tmp_path: Path) -> None:
    values = retention_claim("sorting")
    joint = {name: values["claim"][0][name] for name in ("subject", "baseline", "point", "source")}
    values["claim"].append({**joint, "name": "both", "quantity": "joint", "parts": ["kept"]})
    run = measured_run(tmp_path, ("sorting",), sorting=0.7)
    assert [one.outcome for one in judge(claims_from("test", values).claims, [run])] == ["INVALID", "INVALID"]


def test_a_claim_with_some_task_above_chance_names_the_others_and_says_what_it_is_without(tmp_path: Path) -> None:
    run = measured_run(tmp_path, ("sorting", "arithmetic", "choice"), choice=0.62, arithmetic=0.25)
    found, lines = verdicts(run, "sorting", "arithmetic", "choice")
    alone, _ = verdicts(run, "sorting", "arithmetic")
    assert (found.outcome, alone.outcome) == ("SUPPORTED", "SUPPORTED")
    assert (found.near_chance, found.above_chance) == (("choice",), alone.estimate)
    assert "; without choice, whose baseline is not clearly above chance: " in lines[0]
    assert (alone.near_chance, alone.above_chance) == ((), None)
    gate = next(gate for gate in found.gates if gate.kind == "above_chance")
    assert gate.outcome == "passed"
    assert "on 2 of 3 tasks; not on choice (" in found_text(gate)


def test_how_sure_is_the_claims_own_limit(tmp_path: Path) -> None:
    run = measured_run(tmp_path, ("sorting",), num_docs=40, sorting=0.55)
    share = the_point(run).tasks[0].baseline
    p_value = binomtest(round(40 * share), 40, 0.55, alternative="greater").pvalue
    assert 0.01 < p_value < 0.2
    for level in (1 - p_value - 0.001, 1 - p_value + 0.001):
        found, _ = verdicts(run, "sorting", limits={"above_chance_level": level})
        assert (found.outcome == "INVALID") == (p_value > 1 - level)
    with pytest.raises(ValueError, match=r"above_chance_level must be between 0.75 and 0.9999 .*, not 95"):
        claims_from("test", retention_claim("sorting", limits={"above_chance_level": 95.0}))


def test_a_score_is_judged_whatever_its_chance(tmp_path: Path) -> None:
    run = measured_run(tmp_path, ("sorting",), sorting=0.7)
    for quantity, expected in (("score", 0.1), ("score_difference", -0.5)):
        found, _ = verdicts(run, "sorting", quantity=quantity, expected=expected)
        assert found.outcome == "SUPPORTED"


def test_a_run_of_options_is_judged_by_the_chance_of_its_documents(own_task: Path, capsys: Any) -> None:
    """From documents to a verdict: random weights guess, whatever the number of options and of right ones."""
    docs = []
    for i in range(24):
        num, first = 2 + i % 4, i // 4
        docs.append(question(num, [first % num, *([(first + 1) % num] if num > 3 and i % 3 == 0 else [])]))
    write_task(own_task, CHOICE + metrics("acc", "acc_norm"), docs)
    root = own_task.parent
    pair = write_pair(root / "pair")
    options = ["--tasks", "own", "--block-sizes", "16", "--thresholds", "0.8", "--out", str(root / "results")]
    assert cli.main(["run", "--model", str(pair), *options]) == 0
    run = store.load(next((root / "results").glob("*-run-*")))
    shares = [len(doc["gold"]) / len(doc["choices"]) for doc in docs]
    for metric in ("acc", "acc_norm"):
        assert {score.doc_id: score.chance for score in run.scores if score.metric == metric} == dict(enumerate(shares))
    claims = root / "claims.toml"
    claims.write_text(
        'title = "t"\n[[point]]\nname = "here"\n'
        'decoder = {kind = "block_diffusion", block_size = 16, steps_per_block = 16, threshold = 0.8}\n'
        '[[claim]]\nname = "kept"\nquantity = "retention"\nsubject = "pair"\nbaseline = "context-tower"\n'
        'point = "here"\nscope = ["own"]\nexpected = 0.987\nsource = "a test"\n'
    )
    capsys.readouterr()
    assert cli.main(["claims", "check", str(claims), "--results", str(root / "results")]) == 5
    printed = capsys.readouterr().out
    assert "INVALID" in printed
    assert f"chance, {100 * sum(shares) / len(shares):.1f} %" in printed


def test_a_row_with_a_chance_that_is_none_is_refused() -> None:
    row = dict.fromkeys(("cell", "task", "cluster_id", "doc_sha256", "prompt_sha256", "target_sha256"), "x")
    row |= {"metric": "acc", "filter": "none", "scored_by": "exact"}
    whole = {**row, "doc_id": 0, "higher_is_better": True, "headline": True, "value": 1.0}
    assert from_json(Score, {**whole, "chance": 0.25}).chance == 0.25
    assert from_json(Score, whole).chance is None
    for chance in (1.5, -0.25, "a quarter"):
        with pytest.raises(ValueError, match="Score: chance must be"):
            from_json(Score, {**whole, "chance": chance})


def test_a_decoder_that_only_names_some_option_gives_no_answers(tmp_path: Path) -> None:
    """Of two options it is right on half: 60 % of a baseline that is right on 83 %, above the floor of 50 %."""

    plain = measured_run(tmp_path, ("sorting",))
    baseline = plain.manifest.cells[0].id
    gates = []
    for chance in (0.5, None):
        scores = [
            replace(row, chance=chance, value=float(row.doc_id % 6 < (5 if row.cell == baseline else 3)))
            for row in plain.scores
        ]
        gates.append(floor_gate([the_point(replace(plain, scores=scores))], GateLimits()))
    assert [gate.outcome for gate in gates] == ["failed", "passed"]
    assert found_text(gates[0]).startswith("fast and broken: retention above chance 0.0 % [")
