"""What a plan leaves open is what the decoder's own Params say; what it gives is never ignored."""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made

from tests.two_parameters import Impatient
from twotower_eval import cli
from twotower_eval.analyse import report
from twotower_eval.analyse.report.provenance import command, typed
from twotower_eval.analyse.report.provenance import plan_of as plan_of_verb
from twotower_eval.api.given import plan_of
from twotower_eval.decoder_settings import block_sizes, cross_decoders, given_settings
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_files import load_plan, plan_from_json
from twotower_eval.records import DecoderSpec, Workload, to_json

OLD: dict[str, Any] = {"block_sizes": [16], "steps": ["auto"], "thresholds": [0.8]}  # as manifests used to hold them


WORK = Workload(kind="task", name="copy", digest="d")


@dataclasses.dataclass(frozen=True, kw_only=True)
class All:
    block_size: int = 32
    steps_per_block: int = 4
    threshold: float = 0.5
    temperature: float = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsAlone:
    steps_per_block: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsOpen:
    block_size: int = 8
    steps_per_block: int | None = None


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("a_package")
    for params in (All, StepsAlone, StepsOpen):
        setattr(module, params.__name__, type(params.__name__, (Impatient,), {"VERSION": 1, "Params": params}))
    monkeypatch.setitem(sys.modules, "a_package", module)


def points(decoder: str, **fields: Any) -> list[tuple[Any, ...]]:
    return [tuple(spec.params.values()) for spec in cross_decoders(RunPlan(decoder=f"a_package:{decoder}", **fields))]


def test_a_decoders_own_defaults_hold_where_nothing_is_given() -> None:
    """Sixteen, sixteen and 0.8 were laid over them in silence. The temperature is the tasks', for both arms."""
    assert points("All") == [(32, 4, 0.5, 0.0)]
    assert points("StepsAlone") == [(4,)]
    assert points("StepsOpen") == [(8, 8)]


def test_what_is_given_is_laid_over_them_one_by_one() -> None:
    assert points("All", block_sizes=(8, 64)) == [(8, 4, 0.5, 0.0), (64, 4, 0.5, 0.0)]
    assert points("All", steps=("auto", 2), thresholds=(0.8,), temperature=1.0) == [(32, 32, 0.8, 1), (32, 2, 0.8, 1)]
    assert points("All", set={"block_size": (8, 16)}, steps=("auto",)) == [(8, 8, 0.5, 0.0), (16, 16, 0.5, 0.0)]
    assert points("StepsOpen", block_sizes=(4, 16)) == [(4, 4), (16, 16)]
    assert points("StepsAlone", steps=(2,)) == [(2,)]


def test_block_diffusion_is_what_it_was() -> None:
    """The cells of runs that exist are of these parameters, steps as a number."""
    left_open = DecoderSpec(
        kind="block_diffusion",
        params={
            "block_size": 16, "steps_per_block": 16, "threshold": 0.8, "temperature": 0.0, "batch_mean_t": False,
            "trace": False,
        },
        version=cross_decoders(RunPlan())[0].version,
    )  # fmt: skip
    given = plan_from_json(RunPlan, OLD)
    assert cross_decoders(RunPlan()) == cross_decoders(SpeedPlan()) == cross_decoders(given) == (left_open,)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--thresholds", "0.8", "--decoder", "mock_ar"], "decoder 'mock_ar' has no threshold: drop thresholds"),
        (["--block-sizes", "16", "--decoder", "autoregressive"], "has no block_size: drop block-sizes"),
        (["--steps", "auto", "--decoder", "mock_ar"], "has no steps_per_block: drop steps"),
        (["--steps", "auto", "--decoder", "a_package:StepsAlone"], "steps auto are the block size, and decoder"),
        (["--temperature", "0.5", "--decoder", "a_package:StepsOpen"], "has no temperature: drop temperature"),
    ],
)
def test_what_is_given_is_never_ignored(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even where it is what a plan used to say by itself."""
    assert cli.main(["run", "--tasks", "miniature_sort", "--limit", "1", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_plan_file_says_it_as_options_do(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('decoder = "mock_ar"\nthresholds = [0.8]\n')
    with pytest.raises(UserError, match="has no threshold"):
        cross_decoders(load_plan(path, RunPlan))


def test_the_sizes_that_graphs_are_made_for_are_the_decoders() -> None:
    assert block_sizes(RunPlan(decoder="a_package:All")) == (32,)
    assert block_sizes(RunPlan(decoder="a_package:StepsOpen", set={"block_size": (2, 4)})) == (2, 4)
    assert block_sizes(RunPlan(decoder="a_package:StepsAlone")) == (16,)


def resumed(folder: Path, kind: str, params: dict[str, Any], **plan: Any) -> RunPlan:
    """The plan of a run that a version made which wrote sixteen, auto and 0.8 for every decoder."""
    cell = made.make_cell("candidate", DecoderSpec(kind=kind, params=params), WORK)
    manifest = made.manifest("20261101T120000Z-run-aaaaaa", "run", (cell,), plan={"decoder": kind, **OLD, **plan})
    return plan_of(RunPlan, None, made.write(folder, manifest, []), {})


PAIRS = cross_decoders(RunPlan())[0]  # what a pair is decoded by unless a plan says otherwise


def test_an_older_run_goes_on_as_it_was(tmp_path: Path) -> None:
    """A decoder that has the parameter was run with what the manifest says; one that lacks it was not."""
    kind = "a_package:All"
    assert resumed(tmp_path / "a", "mock_ar", {"temperature": 0.0}) == RunPlan(decoder="mock_ar")
    assert resumed(tmp_path / "b", "block_diffusion", PAIRS.params) == RunPlan(decoder=PAIRS.kind)  # type: ignore[arg-type]
    params = {"block_size": 16, "steps_per_block": 16, "threshold": 0.8, "temperature": 0.0}
    plan = resumed(tmp_path / "c", kind, params)
    assert [dict(spec.params) for spec in cross_decoders(plan)] == [params]
    kind, further = "a_package:StepsOpen", {"block_size": [4]}
    plan = resumed(tmp_path / "d", kind, {"block_size": 4, "steps_per_block": 4}, set=further)
    assert [dict(spec.params) for spec in cross_decoders(plan)] == [{"block_size": 4, "steps_per_block": 4}]


@pytest.mark.parametrize(
    ("kind", "params", "options"),
    [
        ("mock_ar", {"temperature": 0.0}, "--decoder mock_ar"),
        ("block_diffusion", {"block_size": 16, "steps_per_block": 16, "threshold": 0.8}, "--tasks arithmetic"),
        ("a:B", {"block_size": 16}, "--decoder a:B --block-sizes 16"),
    ],
)
def test_an_older_runs_command_can_be_typed(kind: str, params: Any, options: str) -> None:
    """The report's command for a run must name no option that its decoder refuses, and all that made it."""
    cell = made.make_cell("candidate", DecoderSpec(kind=kind, params=params), WORK)
    plan = {**to_json(RunPlan(tasks=("arithmetic",), decoder=kind)), **OLD}
    held = given_settings(plan, (cell,))
    assert typed(command(plan_of_verb("run", held))).endswith(options)
    changed = {**plan, "thresholds": [0.9]}
    assert given_settings(changed, (cell,)) == {**held, "thresholds": [0.9]}  # that was given


def test_the_report_prints_it(tmp_path: Path) -> None:
    plan = {**to_json(RunPlan(tasks=("arithmetic",), decoder=PAIRS.kind)), **OLD}
    path = made.quality_run(tmp_path, num_docs=20, tasks=("arithmetic",), plan=plan)
    folder = report.write([path], tmp_path / "reports", sections=["reproduce"])
    assert "twotower-eval run --tasks arithmetic --out" in (folder / "report.md").read_text(encoding="utf-8")


def test_the_help_says_whose_default_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Block sizes, crossed [the decoder's own, 16]" in text
    assert "auto: the block size [the decoder's own, auto]" in text
