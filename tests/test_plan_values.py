"""A plan holds its values in one form, whichever way they are given: equal plans make cells of the same ids."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_fixture as made

import twotower_eval as tt
from twotower_eval import cli
from twotower_eval.api.given import plan_of
from twotower_eval.decoder_settings import cross_decoders
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_files import load_plan
from twotower_eval.records import Checkpoint, Workload, make_cell

CHECKPOINT = Checkpoint(
    name="pair", family="two_tower", source="here", digest="0" * 12, dtype="float32", devices=("cpu",)
)
WORK = Workload(kind="task", name="copy", digest="1" * 12)
Parse = Callable[..., RunPlan]


def cell_ids(plan: RunPlan) -> list[str]:
    return [
        make_cell(arm="candidate", checkpoint=CHECKPOINT, decoder=spec, workload=WORK).id
        for spec in cross_decoders(plan)
    ]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Parse:
    """The plan that ``run`` makes of its options."""
    seen: list[RunPlan] = []
    monkeypatch.setattr("twotower_eval.api.measuring.evaluated", lambda plan, **_: seen.append(plan) or tmp_path)

    def parsed(*argv: str) -> RunPlan:
        assert cli.main(["run", *argv]) == 0
        return seen.pop()

    return parsed


@pytest.mark.parametrize(
    ("argv", "toml", "fields"),
    [
        (["--thresholds", "1"], "thresholds = [1]", {"thresholds": [1]}),
        (["--thresholds", "1.0,0"], "thresholds = [1, 0]", {"thresholds": (1, 0.0)}),
        (["--block-sizes", "8"], "block_sizes = [8]", {"block_sizes": 8}),
        (["--steps", "auto,4"], 'steps = ["auto", 4]', {"steps": ["auto", 4]}),
        (["--temperature", "1"], "temperature = 1", {"temperature": 1}),
        (["--set", "threshold=1"], "set = { threshold = 1 }", {"set": {"threshold": 1}}),
        (["--set", "threshold=1,.5"], "set = { threshold = [1, 0.5] }", {"set": {"threshold": (1, 0.5)}}),
    ],
)
def test_every_way_to_say_an_operating_point_is_the_same_cell(
    argv: list[str], toml: str, fields: dict[str, Any], parse: Parse, tmp_path: Path
) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(toml)
    plans = [parse(*argv), load_plan(path, RunPlan), plan_of(RunPlan, None, None, fields)]
    assert plans[0] == plans[1] == plans[2]
    assert cell_ids(plans[0]) == cell_ids(plans[1]) == cell_ids(plans[2])
    [one] = {repr([dict(spec.params) for spec in cross_decoders(plan)]) for plan in plans}  # 1 is written unlike 1.0
    assert "threshold': 1," not in one


def test_a_set_threshold_is_the_shorthands_cell() -> None:
    assert cell_ids(RunPlan(set={"threshold": (1,)})) == cell_ids(RunPlan(thresholds=(1.0,)))


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (RunPlan, {"block_sizes": [0]}, "block_sizes must be 1 or more, not 0"),
        (RunPlan, {"block_sizes": [8, 8]}, "block_sizes names 8 twice"),
        (RunPlan, {"thresholds": [-0.1]}, "thresholds must be 0 or more"),
        (RunPlan, {"steps": []}, "steps is empty"),
        (SpeedPlan, {"batch_sizes": [1, 0]}, "batch_sizes must be 1 or more"),
        (SizingPlan, {"config": "c.json", "tokens_per_nfe": [0.5]}, "tokens_per_nfe must be 1 or more"),
        (VerifyPlan, {"devices": []}, "devices is empty"),
        (RunPlan, {"tasks": "gsm8k"}, "tasks must be a list"),
        (RunPlan, {"tasks": {"gsm8k", "mgsm"}}, "has no order: give a list"),
    ],
)
def test_a_list_is_checked_as_a_tuple_is(cls: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cls(**fields)


def test_a_list_in_a_plan_cannot_be_changed_from_outside() -> None:
    sizes = [8, 16]
    plan = RunPlan(block_sizes=sizes)  # type: ignore[arg-type]
    sizes.append(0)
    assert plan.block_sizes == (8, 16)
    assert plan == RunPlan(block_sizes=(8, 16)) == dataclasses.replace(plan, block_sizes=[8, 16])  # type: ignore[arg-type]


def halves() -> Iterator[float]:
    yield from (0.5, 1)


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({"thresholds": np.float64(0.5)}, {"thresholds": (0.5,)}),
        ({"thresholds": np.array([0.5, 1])}, {"thresholds": (0.5, 1.0)}),
        ({"thresholds": halves}, {"thresholds": (0.5, 1.0)}),
        ({"block_sizes": range(4, 12, 4)}, {"block_sizes": (4, 8)}),
        ({"block_sizes": np.array(4)}, {"block_sizes": (4,)}),
        ({"steps": ["auto", np.int64(4)]}, {"steps": ("auto", 4)}),
        ({"limit": np.int64(3), "seed": np.uint8(1)}, {"limit": 3, "seed": 1}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"cuda_graphs": np.bool_(False)}, {}),
        ({"tasks": np.array(["gsm8k", "mgsm"])}, {"tasks": ("gsm8k", "mgsm")}),
        ({"data_dir": Path("here")}, {"data_dir": "here"}),
        ({"set": {"threshold": np.linspace(0, 1, 3)}}, {"set": {"threshold": (0.0, 0.5, 1.0)}}),
        ({"set": {"block_size": range(4, 9, 4)}}, {"set": {"block_size": (4, 8)}}),
        ({"set": {"threshold": halves}}, {"set": {"threshold": (0.5, 1)}}),
    ],
)
def test_numbers_of_numpy_and_whatever_can_be_gone_through_are_taken(given: Any, held: Any) -> None:
    def fresh(value: Any) -> Any:
        """A generator can be gone through once."""
        return value() if value is halves else {k: fresh(v) for k, v in value.items()} if type(value) is dict else value

    plan = RunPlan(**held)
    assert plan_of(RunPlan, None, None, fresh(given)) == plan
    assert plan_of(RunPlan, RunPlan(), None, fresh(given)) == plan
    if not isinstance(given.get("thresholds"), np.float64) and not isinstance(given.get("block_sizes"), np.ndarray):
        assert RunPlan(**fresh(given)) == plan  # a class takes no value for a list
    assert {type(one) for one in (*(plan.thresholds or ()), *(plan.block_sizes or ()))} <= {int, float}


def test_none_is_a_value_too(tmp_path: Path) -> None:
    """``limit=None`` over a plan or a run was ignored."""
    path = tmp_path / "plan.toml"
    path.write_text('limit = 2\nmodel = "pair"\n[set]\nthreshold = 0.9\n')
    plan = load_plan(path, RunPlan)
    assert plan_of(RunPlan, plan, None, {"limit": None}) == RunPlan(model="pair", set={"threshold": (0.9,)})
    assert plan_of(RunPlan, path, None, {"set": None, "model": None}) == RunPlan(limit=2)
    stopped = run_folder(tmp_path, limit=3, tasks=["arithmetic"])
    assert plan_of(RunPlan, None, stopped, {"limit": None}) == RunPlan(tasks=("arithmetic",))
    assert plan_of(RunPlan, None, stopped, {}).limit == 3
    with pytest.raises(UserError, match="seed must be a whole number, not None"):
        plan_of(RunPlan, None, None, {"seed": None})
    with pytest.raises(UserError, match="tasks must be a list, not None"):
        plan_of(RunPlan, plan, None, {"tasks": None})


def test_a_model_that_is_not_named_stays_the_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("twotower_eval.measure.verify.verify", lambda plan, **_: seen.append(plan) or tmp_path)
    monkeypatch.setattr("twotower_eval.measure.sizing.run", lambda plan, **_: seen.append(plan) or tmp_path)
    monkeypatch.setattr("twotower_eval.api.check_settings", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "config.json").write_text("{}")
    tt.verify(plan=VerifyPlan(model="pair"))
    tt.verify(None, VerifyPlan(model="pair"))
    tt.size(plan=SizingPlan(config="c.json"))
    assert seen == [VerifyPlan(model="pair"), VerifyPlan(), SizingPlan(config="c.json")]


def test_a_run_that_goes_on_takes_no_second_plan(tmp_path: Path) -> None:
    """A plan object was taken in silence, where a path was refused."""
    for plan in (RunPlan(limit=5), "plan.toml"):
        with pytest.raises(UserError, match="a run that is resumed has its own plan"):
            tt.evaluate(plan, resume=run_folder(tmp_path / str(type(plan).__name__)), out=tmp_path)


def run_folder(folder: Path, **plan: Any) -> Path:
    return made.write(folder, made.manifest("20261101T120000Z-run-aaaaaa", "run", (), plan=plan), [])
