"""What no run folder can hold is refused before there is one; a folder that cannot be read keeps nobody from others."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made

import twotower_eval as tt
from tests.example_decoder import Greedy
from tests.test_store import make_manifest
from twotower_eval import api, cli, store
from twotower_eval.decoder_settings import cross_decoders, typed_settings
from twotower_eval.engine.decoders import decoder_spec, from_spec
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plugin_calls import PluginError, calls_of, imported

LARGE = 10**30
HERE = "tests.test_out_of_range"
FIELDS: list[tuple[Any, dict[str, Any], str]] = [
    (RunPlan, {"seed": LARGE}, "seed"),
    (RunPlan, {"limit": 2**63}, "limit"),
    (RunPlan, {"block_sizes": (4, LARGE)}, "block_sizes"),
    (RunPlan, {"set": {"block_size": LARGE}}, "set.block_size"),
    (SpeedPlan, {"min_rounds": 10**5000}, "min_rounds"),
    (SizingPlan, {"config": "x", "repeats": LARGE}, "repeats"),
    (VerifyPlan, {"seed": LARGE}, "seed"),
]


@pytest.mark.parametrize(("cls", "given", "name"), FIELDS)
def test_whole_numbers_beyond_64_bits_are_refused_with_the_fields_name(cls: Any, given: Any, name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name} must be a whole number of at most 64 bits"):
        cross_decoders(cls(**given))
    held = {key: 2**63 - 1 for key, value in given.items() if isinstance(value, int)}
    assert not held or cls(**{**given, **held})


@pytest.mark.parametrize("option", ["--seed", "--limit", "--block-sizes"])
def test_the_command_line_makes_no_folder_for_them(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", option, str(LARGE), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{option[2:].replace('-', '_')} must be a whole number of at most 64 bits" in line
    assert not (tmp_path / "out").exists()


class Large(Greedy):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Params:
        width: int = 2**70


class NotANumber(Greedy):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Params:
        rate: float = float("nan")


class Raised(Greedy):
    VERSION = 2**70


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        ("Large", "its parameter width must be a whole number of at most 64 bits"),
        ("NotANumber", "its parameter rate must be a finite number, not nan"),
        ("Raised", "VERSION must be a whole number of at most 64 bits"),
    ],
)
def test_a_plug_ins_default_that_no_folder_can_hold_is_told_in_one_line(
    decoder: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--decoder", f"{HERE}:{decoder}", "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_could_not_be_read_back_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="64 bits"):
        store.create(tmp_path, make_manifest(seeds={"run": LARGE}))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_read_is_left_out_where_nobody_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.quality_run(tmp_path / "runs", num_docs=5)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "manifest.json").write_text('{"schema": 99}')
    assert api.newest_runs(tmp_path / "runs") == [path]
    assert cli.main(["report", "--results", str(tmp_path / "runs"), "--out", str(tmp_path / "reports")]) == 0
    told = capsys.readouterr().err.splitlines()[1]
    assert re.match(r"left out, as it cannot be read: .*broken/manifest\.json: schema 99", told)
    with pytest.raises(UserError, match="broken"):
        tt.load_run("broken", results=tmp_path / "runs")
    path.rename(tmp_path / path.name)
    with pytest.raises(UserError, match=r"no run in .* can be read: .*broken"):
        api.newest_runs(tmp_path / "runs")


class Shadowing(Greedy):
    """Parameters that are called like arguments of this project's own functions."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Params:
        model: int = 1
        kind: str = "a"
        clock: float = 0.5

    def __init__(self, model: Any, params: Any, *, clock: Any = None) -> None:
        self.params = params


def test_parameters_may_be_called_like_arguments_of_our_own() -> None:
    (spec,) = cross_decoders(RunPlan(decoder=f"{HERE}:Shadowing", set={"model": 2, "kind": "b", "clock": 1.5}))
    assert spec.params == {"model": 2, "kind": "b", "clock": 1.5}
    assert spec == decoder_spec(f"{HERE}:Shadowing", model=2, kind="b", clock=1.5)
    decoder: Any = from_spec(None, spec)  # type: ignore[arg-type]
    assert dataclasses.asdict(decoder.params) == spec.params


class Either(Greedy):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Params:
        x: int | bool = 0


def test_one_and_true_are_two_cells() -> None:
    """They are equal in Python, and one of the two was silently left out."""
    plan = RunPlan(decoder=f"{HERE}:Either", set=typed_settings(f"{HERE}:Either", {"x": ("1", "true", "0")}))
    assert [repr(spec.params["x"]) for spec in cross_decoders(plan)] == ["1", "True", "0"]


def test_a_plug_in_that_exits_is_told_as_one_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sys.exit(0)`` in a plug-in had the command end as if all were done."""
    with (
        pytest.raises(PluginError, match="its run raised SystemExit: 0"),
        calls_of("mine", "x", "run"),
    ):
        raise SystemExit(0)
    (tmp_path / "exits_at_import.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"exits_at_import\.py:2"):
        imported("exits_at_import", "exits_at_import:Class")
    assert cli.main(["run", "--decoder", "exits_at_import:Class", "--out", str(tmp_path / "out")]) == 2
    with pytest.raises(KeyboardInterrupt), calls_of("mine", "x", "run"):
        raise KeyboardInterrupt
