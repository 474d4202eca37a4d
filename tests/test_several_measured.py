"""Several baselines measured: their lanes, cells, models and probes; two that are the same are told at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pages import DOCS
from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.engine import models
from twotower_eval.errors import UserError
from twotower_eval.measure import harness, speed, suites
from twotower_eval.plan import RunPlan, SpeedPlan, named_baselines
from twotower_eval.plan_files import load_plan
from twotower_eval.progress import SilentProgress

TASKS = ("miniature_sort",)
LOOKUP = {"decoder": "prompt_lookup", "name": "lookup"}
TABLES = ({"name": "plain"}, LOOKUP, {"model": "miniature", "name": "miniature"})


class Counting(SilentProgress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def requests() -> list[suites.TimedPrompt]:
    return suites.build_requests(suites.resolve_tasks(TASKS))


def plan(pair: Path, **changes: object) -> SpeedPlan:
    fields = {"block_sizes": (4,), "num_prompts": 2, "new_tokens": 4, "min_rounds": 2, "probes": 1, "costs": False}
    return SpeedPlan(model=str(pair), tasks=TASKS, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(pair: Path, requests: list[suites.TimedPrompt], tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    loads: list[str] = []
    load = models.load_model

    def counted(model: object, **options: object) -> object:
        loads.append(str(model))
        return load(model, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", counted)
        path = speed.run(plan(pair, baselines=TABLES), requests, root=tmp_path_factory.mktemp("results"))
    assert len(loads) == 2  # the pair, of which two baselines are a part, and the miniature
    return store.load(path)


def test_each_has_its_two_lanes_in_every_round(run: store.Run) -> None:
    assert run.complete
    assert [(cell.arm, cell.baseline) for cell in run.manifest.cells] == [
        ("baseline", "plain"),
        ("baseline", "lookup"),
        ("baseline", "miniature"),
        ("candidate", None),
    ]
    lanes = [(cell.id, copy) for cell in run.manifest.cells for copy in ((0, 1) if cell.arm == "baseline" else (0,))]
    for number in range(2):
        timed = [(s.cell, s.replica, s.call_id) for s in run.speed if s.phase == "measure" and s.round == number]
        assert sorted(timed) == sorted((*lane, f"b1-{call}") for lane in lanes for call in range(2))
    assert Runs([run]).contradictions == {}


def test_new_prompts_of_a_candidate_are_also_every_baselines(run: store.Run) -> None:
    [candidate] = [cell.id for cell in run.manifest.cells if cell.arm == "candidate"]
    probes = [sample for sample in run.speed if sample.phase == "probe"]
    own = {sample.call_id for sample in probes if sample.cell == candidate}
    beside = {sample.cell for sample in probes if sample.call_id in own}
    assert beside == set(run.cells)
    assert len(probes) == (2 * 4 + 3) * 2 - 4  # as the progress counts them


def test_a_cell_is_the_one_that_it_would_be_alone(
    run: store.Run, pair: Path, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    single = plan(pair, baseline_decoder="prompt_lookup", min_rounds=1, warmup_rounds=0, probes=0)
    alone = store.load(speed.run(single, requests, root=tmp_path))
    assert {cell.id for cell in alone.manifest.cells} <= set(run.cells)
    assert all(cell.baseline is None for cell in alone.manifest.cells)


def test_one_that_is_another_or_the_candidate_is_told_before_anything_is_timed(
    pair: Path, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    same = ({"name": "a"}, {"model": str(pair), "name": "b"}, {"model": f"{pair}/.", "name": "c"})
    with pytest.raises(UserError, match="baseline b and baseline c are one model with one decoder"):
        speed.run(plan(pair, baselines=same), requests, root=tmp_path)
    itself = plan(pair, baselines=({"name": "a"}, {"model": str(pair), "name": "b"}), decoder="autoregressive")
    itself = SpeedPlan(**{**vars(itself), "block_sizes": None})
    with pytest.raises(UserError, match="baseline b and candidate are one model with one decoder"):
        speed.run(itself, requests, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_run_scores_them_and_says_whose_log_likelihoods_serve(pair: Path, tmp_path: Path) -> None:
    asked = RunPlan(model=str(pair), tasks=("miniature_choice",), limit=2, block_sizes=(4,), baselines=TABLES)
    found = store.load(harness.run(asked, root=tmp_path))
    cells = {cell.baseline: cell for cell in found.manifest.cells}
    donor = cells["plain"].id
    assert {name: cell.likelihoods_of == donor for name, cell in cells.items()} == {
        "plain": True,
        "lookup": True,
        "miniature": False,
        None: True,
    }
    runs = Runs([found])
    equal = {name: bool(runs.against(name).quality[0].equal_tasks) for name in runs.baselines}
    assert equal == {"plain": True, "lookup": True, "miniature": False}


def test_the_tables_of_the_page_are_a_plan(tmp_path: Path) -> None:
    text = (DOCS / "your-model.md").read_text(encoding="utf-8")
    [block] = [one for one in re.findall(r"```toml\n(.*?)```", text, re.S) if "[[baselines]]" in one]
    (tmp_path / "plan.toml").write_text(block, encoding="utf-8")
    found = load_plan(tmp_path / "plan.toml", SpeedPlan)
    assert [name for name, _ in named_baselines(found)] == ["autoregressive", "lookup"]


def test_a_model_against_itself_is_still_one_model_alone(
    pair: Path, requests: list[suites.TimedPrompt], tmp_path: Path
) -> None:
    itself = plan(pair, baseline=str(pair), decoder="autoregressive", block_sizes=None, min_rounds=1, probes=0)
    [cell] = store.load(speed.run(itself, requests, root=tmp_path)).manifest.cells
    assert (cell.arm, cell.baseline) == ("baseline", None)
