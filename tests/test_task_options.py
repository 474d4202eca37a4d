"""Options on tasks, spelled as in lm_eval: read, checked, recorded, and part of what identifies a request."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_task_sources import write_task

from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.errors import UserError
from twotower_eval.measure import harness, suites
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_files import load_plan
from twotower_eval.records import Override
from twotower_eval.rules import override_lines
from twotower_eval.task_options import read_gen_kwargs, read_seed, seeds_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    write_task(tmp_path / "own", "sums", "num_fewshot: 2")
    write_task(tmp_path / "own", "bare", "num_fewshot: 0")
    return tmp_path / "own"


def plan_of(pair: Path, own: Path, **options: Any) -> RunPlan:
    common: dict[str, Any] = {"block_sizes": (4,), "batch_size": 3, "include_path": (str(own),)}
    return RunPlan(model=str(pair), **{**common, "tasks": ("sums",), **options})


def run(plan: RunPlan, root: Path) -> store.Run:
    return store.load(harness.run(plan, root=root / "runs"))


def cells(run: store.Run) -> set[str]:
    return {cell.id for cell in run.manifest.cells}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("temperature=0,max_gen_toks=64", {"temperature": 0, "max_gen_toks": 64}),
        (' until=["\\n\\n", "a,b"] , do_sample=False', {"until": ["\n\n", "a,b"], "do_sample": False}),
        ("until=Question: x,top_p=None", {"until": "Question: x", "top_p": None}),
        ("temperature=1e-1,seed='7'", {"temperature": 0.1, "seed": "7"}),
        ('{"a": {"b": [1, null]}, "c": 0.5}', {"a": {"b": [1, None]}, "c": 0.5}),
    ],
)
def test_gen_kwargs_are_read_as_lm_eval_reads_them(text: str, value: dict[str, Any]) -> None:
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    assert read_gen_kwargs(text) == value
    theirs = try_parse_json(text) if text.startswith("{") else key_val_to_dict(text.replace(" ,", ",").strip())
    assert {str(key).strip(): held for key, held in theirs.items()} == value  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("temperature", "takes key=value with commas between, or JSON, not 'temperature'"),
        ("temperature=0,temperature=1", "names temperature twice"),
        ("temperature=nan", "temperature must be a finite number"),
        ('{"temperature": 0', "gen_kwargs: not valid JSON"),
        ("x=1e400", "x must be a finite number"),
        (7, "gen_kwargs must be a table"),
        ({"x": b"1"}, "JSON has no such value"),
    ],
)
def test_gen_kwargs_that_are_none_are_one_line(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunPlan(gen_kwargs=given)


def test_nothing_given_is_no_gen_kwargs() -> None:
    assert RunPlan(gen_kwargs={}) == RunPlan(gen_kwargs="") == RunPlan()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "seed"),
    [
        ("7", 7),
        (7, 7),
        ("0,None,8,52", (0, None, 8, 52)),
        ([1, 2, 3], (1, 2, 3)),
        ((5,), 5),
        (["0", "none"], (0, None)),
    ],
)
def test_seeds_are_read_from_numbers_texts_and_lists(given: Any, seed: Any) -> None:
    assert RunPlan(seed=given).seed == read_seed(given) == seed
    assert SpeedPlan(seed=given).seed == seed


@pytest.mark.parametrize("given", ["x", "1,x", "1,2,3,4,5", "", "-1", "1,-1", [], True, 1.5, 2**70, "None", [[1]]])
def test_seeds_that_are_none_are_one_line(given: Any) -> None:
    with pytest.raises(UserError, match="seed"):
        RunPlan(seed=given)


def test_lm_evals_default_seeds_are_those_of_zero() -> None:
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    seeds = seeds_of(0)
    assert (seeds.python, seeds.numpy, seeds.fewshot) == (DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED, DEFAULT_OTHER_SEED)
    assert seeds_of(42) == seeds_of((42, 42, 42, 42)), "a single number is every seed, as lm_eval has it"
    assert seeds_of((3, 4)) == seeds_of((3, 4, None, None)) == seeds_of((3, 4, 1234, 1234))


def test_a_toml_plan_holds_them(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('seed = [0, "None", 8]\ngen_kwargs = { until = ["#"] }\nnum_fewshot = 2\ninclude_path = "a,b"\n')
    plan = load_plan(file, RunPlan)
    assert (plan.seed, plan.gen_kwargs, plan.num_fewshot) == ((0, None, 8), {"until": ["#"]}, 2)
    assert plan.include_path == ("a,b",)
    file.write_text("seed = 3\n")
    assert load_plan(file, RunPlan).seed == 3


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 3, "gen_kwargs": {"max_tokens": 4}},
        {"temperature": 0.0, "gen_kwargs": {"do_sample": True}},
        {"temperature": 0.5, "gen_kwargs": {"temperature": 0.5}},
    ],
)
def test_what_is_said_twice_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="of gen_kwargs say the same: give one of them"):
        suites.resolve_tasks(["miniature_sort"], **options)


def test_there_are_no_fewer_examples_than_none() -> None:
    with pytest.raises(UserError, match="num_fewshot must be 0 or more"):
        RunPlan(num_fewshot=-1)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, False),
        ({"seed": (0, 1234, 1234, 1234)}, False),
        ({"num_fewshot": 2}, False),
        ({"num_fewshot": 1}, True),
        ({"seed": (0, 1234, 1234, 5)}, True),
        ({"gen_kwargs": {"until": ["#"]}}, False),
        ({"gen_kwargs": {"until": ["##"]}}, True),
        ({"gen_kwargs": {"max_gen_toks": 3}}, True),
        ({"gen_kwargs": {"temperature": 0.7, "do_sample": True}}, True),
    ],
)
def test_they_are_part_of_what_identifies_a_cell(pair: Path, own: Path, options: dict[str, Any], moves: bool) -> None:
    plain, given = (harness.prepare(plan_of(pair, own, **more)) for more in ({}, options))
    ids = [{job.cell.id for job in prepared.jobs} for prepared in (plain, given)]
    assert ids[0].isdisjoint(ids[1]) if moves else ids[0] == ids[1]


def test_a_run_records_them_and_its_report_says_them(pair: Path, own: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tasks": ("sums", "bare"),
        "num_fewshot": 1,
        "gen_kwargs": "max_gen_toks=3,temperature=0",
    }
    found = run(plan_of(pair, own, seed=(1, 2, 3, 4), limit=2, **options), tmp_path)
    assert found.manifest.seeds == {"run": 3, "python": 1, "numpy": 2, "fewshot": 4}
    held = found.manifest.plan
    assert held["include_path"] == [str(own)]
    assert held["gen_kwargs"] == {"max_gen_toks": 3, "temperature": 0}
    lines = override_lines(found.manifest.overrides)
    assert "sums asks for num_fewshot: 2, done with 1: --num-fewshot overrides it" in lines
    assert "bare sets num_fewshot: 0, which is kept, as in lm-eval: --num-fewshot does not count there" in lines
    assert "sums, bare ask for max_gen_toks: 6, done with 3: --gen-kwargs overrides it" in lines
    assert {row.generation.num_tokens <= 3 for row in found.generations} == {True}
    page = (report.write([found.path], tmp_path / "reports") / report.MARKDOWN).read_text(encoding="utf-8")
    assert "asked and not done: sums asks for num\\_fewshot: 2, done with 1" in page.replace(
        "num_fewshot", "num\\_fewshot"
    )
    assert "seeds: run 3; python 1; numpy 2; fewshot 4" in page
    assert "--gen-kwargs" in page
    # It continues with its own plan.
    assert harness.run(plan_of(pair, own, seed=(1, 2, 3, 4), limit=3, **options), root=tmp_path, resume=found.path)


def test_a_plain_run_says_nothing_of_them(pair: Path, own: Path, tmp_path: Path) -> None:
    found = run(plan_of(pair, own, limit=1), tmp_path)
    assert not found.manifest.plan.keys() & {"num_fewshot", "gen_kwargs"}
    assert found.manifest.plan["seed"] == 0
    assert found.manifest.seeds == {"run": 0, "fewshot": 1234}
    assert found.manifest.overrides == ()


def test_examples_that_differ_from_a_suites_published_number_are_said(own: Path) -> None:
    suite = own / "mine.toml"
    suite.write_text('[[task]]\nname = "mine"\nlm_eval = "sums"\nnum_fewshot = 3\npublished = ["num_fewshot"]\n')
    (task,) = suites.resolve_tasks([str(suite)], include_path=[str(own)], num_fewshot=1)
    expected = Override(task="mine", setting="num_fewshot", asked=3, done=1, option="num_fewshot", published=True)
    assert suites.settle([task], temperature=None, samples=None).overrides == (expected,)
    assert override_lines([expected]) == [
        "mine is published with num_fewshot: 3, done with 1: --num-fewshot overrides it"
    ]
    (same,) = suites.resolve_tasks([str(suite)], include_path=[str(own)], num_fewshot=3)
    assert same.overrides == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 0.9, "temperature": 1, "do_sample": True}, "--gen-kwargs asks for top_p: 0.9: no decoder here does"),
        ({"temperture": 1}, "temperture: 1, which is no known setting .did you mean 'temperature'"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number of at least 1"),
        ({"until": 3}, "until must be a text or a list of texts"),
        ({"do_sample": True}, "do_sample: true without a temperature above 0"),
    ],
)
def test_what_no_decoder_follows_is_refused(own: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        suites.resolve_tasks(["sums"], include_path=[str(own)], gen_kwargs=given)


def test_a_budget_replaces_the_tasks_under_any_name(own: Path) -> None:
    """lm-eval keeps the task's max_gen_toks beside a max_new_tokens that was given, with a warning."""
    (task,) = suites.resolve_tasks(["sums"], include_path=[str(own)], gen_kwargs={"max_new_tokens": 4})
    assert task.max_new_tokens == 4


def test_building_tasks_leaves_the_callers_random_numbers(own: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).random_sample()
    suites.resolve_tasks(["sums"], include_path=[str(own)], seed=(1, 2))
    assert (random.random(), np.random.random_sample()) == expected
