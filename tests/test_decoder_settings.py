"""``--set`` and a plan's ``set``: any parameter of any decoder, typed by its own Params, crossed in a stated order."""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from tests.two_parameters import Impatient
from twotower_eval import cli
from twotower_eval.api.given import plan_of
from twotower_eval.decoder_settings import block_sizes, cross_decoders, parse_set, set_text, typed_settings
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan
from twotower_eval.plan_files import load_plan, merge, plan_from_json
from twotower_eval.records import to_json

KIND = "tests.two_parameters:Impatient"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """One parameter of each type."""

    width: int = 4
    share: float = 0.5
    order: str = "left"
    either: str | int = "left"
    greedy: bool = True
    mode: Literal["fast", "sure", 3] = "fast"
    most: int | None = None
    rows: Annotated[int, msgspec.Meta(ge=1)] = 1
    block_size: int = 16
    layers: tuple[int, ...] = ()


class Typed(Impatient):
    VERSION, Params = 1, Params  # type: ignore[assignment]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> str:
    """A decoder's name, importable."""
    module: Any = types.ModuleType("a_package")
    module.Typed = Typed
    monkeypatch.setitem(sys.modules, "a_package", module)
    return "a_package:Typed"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("width=4,-8", (4, -8)),
        ("share=1,.5,1e-3", (1.0, 0.5, 0.001)),
        ('order=left, right,"a,b",7', ("left", "right", "a,b", "7")),
        ("greedy=true,false", (True, False)),
        ("mode=sure,3", ("sure", 3)),
        ("most=none,4", (None, 4)),
        ("block-size=8", (8,)),
        ("order=", ("",)),
        ('either=1,"1",left,"a ""b"""', (1, "1", "left", 'a "b"')),
        ('width="4"', (4,)),
    ],
)
def test_texts_become_what_the_decoders_params_are(typed: str, text: str, values: tuple[Any, ...]) -> None:
    [found] = typed_settings(typed, parse_set([text])).values()
    assert found == values
    assert [type(one) for one in found] == [type(one) for one in values]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("width=wide", "--set width must be a whole number, not 'wide'"),
        ("width=4.5", "--set width must be a whole number, not '4.5'"),
        ("share=nan", "--set share must be a finite number"),
        ("greedy=1", "--set greedy must be true or false, not '1'"),
        ("mode=quick", "--set mode must be fast or sure or 3, not 'quick'"),
        ("rows=0", "--set rows must be at least 1, not 0"),
        ("widht=4", "has no parameter 'widht' to set (did you mean 'width'?)"),
        ("width", "--set takes name=value[,value…], not 'width'"),
        ("=4", "--set takes name=value[,value…]"),
        ("width=4,4", "set.width names 4 twice"),
        ("temperature=0.5", "give --temperature, not set"),
        ("layers=1", "--set layers must be"),
        ("share=0.9\n1", "--set share must be a number, not '0.9\\n1'"),
        ('order="left', "a value in quotes ends with a quote"),
        ('order="left"right', "a value in quotes ends with a quote"),
        ("trace=true", "give --trace of `run`, not set"),
    ],
)
def test_a_slip_is_one_line_and_nothing_is_loaded(
    typed: str, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--decoder", typed, "--set", text, "--model", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--block-sizes", "8", "--set", "block_size=4"],
        ["--block-sizes", "16", "--set", "block_size=4"],
        ["--set", "block_size=4", "--thresholds", "0.9", "--set", "threshold=0.7"],
    ],
)
def test_a_parameter_is_said_once(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """By its shorthand or by --set, be it the default that the shorthand says."""
    assert cli.main(["run", *argv]) == 2
    assert "is given twice, by --" in capsys.readouterr().err


def test_a_plan_file_says_a_parameter_once(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("thresholds = [0.8]\nset = { threshold = [0.9] }\n")
    with pytest.raises(ValueError, match=r"plan\.toml: threshold is given twice"):
        load_plan(path, RunPlan)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("set = 4", "set must be a table of a decoder's parameters"),
        ("set = { patience = [] }", "set.patience is empty"),
        ("set = { patience = [1, 1] }", "set.patience names 1 twice"),
        ("set = { patience = [[1]] }", r"set.patience\[0\] must be"),
    ],
)
def test_a_plans_table_is_checked_where_it_is_read(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_plan(path, RunPlan)


def test_a_plans_values_are_held_against_the_decoder() -> None:
    for values, words in (
        ({"patience": "4"}, "set.patience must be a whole number, not '4'"),
        ({"patience": -1}, "patience must be 0 or more"),
        ({"choice": "third"}, "set.choice must be first or second"),
        ({"patients": 1}, "did you mean 'patience'"),
    ):
        with pytest.raises(ValueError, match=words):
            cross_decoders(RunPlan(decoder=KIND, set=values))  # type: ignore[arg-type]


def test_parameters_are_crossed_in_the_order_that_they_stand_in() -> None:
    plan = plan_from_json(RunPlan, {"decoder": KIND, "set": {"patience": [0, 2], "choice": ["second", "first"]}})
    assert [tuple(spec.params.values()) for spec in cross_decoders(plan)] == [
        (0, "second"),
        (0, "first"),
        (2, "second"),
        (2, "first"),
    ]
    turned = dataclasses.replace(plan, set={"choice": ("second", "first"), "patience": (0, 2)})
    settings = [(spec.params["choice"], spec.params["patience"]) for spec in cross_decoders(turned)]
    assert settings == [("second", 0), ("second", 2), ("first", 0), ("first", 2)]


def test_set_and_shorthands_make_the_same_points() -> None:
    """By ``set`` every parameter of block diffusion can be said; what equals another point is one with it."""
    short = RunPlan(block_sizes=(8, 16), steps=("auto", 4), thresholds=(0.8, 0.9))
    said = {"threshold": (0.8, 0.9), "block_size": (8, 16), "steps_per_block": (None, 4), "batch_mean_t": (False,)}
    assert cross_decoders(RunPlan(set=said)) == cross_decoders(short)  # type: ignore[arg-type]
    twice = RunPlan(block_sizes=(8,), set={"steps_per_block": (None, 8)})
    assert len(cross_decoders(twice)) == 1
    assert block_sizes(RunPlan(set={"block_size": (4, 8)})) == (4, 8)
    assert block_sizes(short) == (8, 16)


def test_a_parameter_that_no_cell_can_hold_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match="layers is a tuple; take a text, a number"):
        cross_decoders(RunPlan(decoder=typed))


def test_a_plan_of_before_is_read_and_stays_as_it_was() -> None:
    values = to_json(RunPlan())
    assert "set" not in values
    assert plan_from_json(RunPlan, values) == RunPlan(set=None) == RunPlan(set={})


def test_options_override_a_plan_parameter_by_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("twotower_eval.api.measuring.evaluated", lambda plan, **_: seen.append(plan) or tmp_path)
    path = tmp_path / "plan.toml"
    path.write_text(f'decoder = "{KIND}"\n[set]\npatience = [1, 2]\nchoice = "second"\n')
    assert cli.main(["run", "--plan", str(path), "--set", "patience=3"]) == 0
    assert seen[0].set == {"patience": (3,), "choice": ("second",)}
    assert merge(seen[0], {"set": {"choice": ("first",)}}).set == {"patience": (3,), "choice": ("first",)}
    assert plan_from_json(RunPlan, to_json(seen[0])) == seen[0]


def test_what_set_prints_is_what_it_reads(typed: str) -> None:
    held = {"share": (1.0, 0.1 + 0.2), "order": ("a,b", 'c"d', "", " e"), "greedy": (True,), "most": (None, 3)}
    held |= {"either": (1, "1", "true", "none", "x\ny")}
    assert typed_settings(typed, parse_set([set_text(name, values) for name, values in held.items()])) == held


def test_a_text_in_python_stays_one_where_it_may_be_one(typed: str) -> None:
    """``"1"`` became 1; a text for a number is still read."""
    plan = plan_of(RunPlan, None, None, {"decoder": typed, "set": {"either": "1", "width": "4", "most": "none"}})
    assert plan.set == {"either": ("1",), "width": (4,), "most": (None,)}


@pytest.mark.parametrize("kind", ["block_diffusion", "reference"])
def test_bounds_are_the_decoders_whichever_way_a_value_comes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--set threshold=1.5`` ran, where ``--thresholds 1.5`` was refused."""
    words = "a threshold is a probability, 1.5 is above 1"
    with pytest.raises(UserError, match=words):
        cross_decoders(RunPlan(decoder=kind, thresholds=(1.5,)))
    assert cli.main(["run", "--decoder", kind, "--set", "threshold=1.5", "--limit", "1"]) == 2
    assert words in capsys.readouterr().err


def test_a_trace_makes_no_operating_point() -> None:
    """Two points of one name came of it."""
    with pytest.raises(UserError, match="trace changes no answer"):
        RunPlan(set={"trace": (False, True)})
