"""Plans: what TOML and the command line may say, and what is refused in one clear line."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from twotower_eval import resources
from twotower_eval.decoder_settings import cross_decoders
from twotower_eval.errors import UserError
from twotower_eval.names import resolve
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_files import load_plan, merge, plan_from_json
from twotower_eval.plan_sources import baseline_source, model_source
from twotower_eval.records import to_json


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_gives_a_plan_and_overrides_win(tmp_path: Path) -> None:
    text = 'tasks = ["gsm8k", "mgsm"]\nblock_sizes = [8, 16]\nsteps = ["auto", 4]\nthresholds = [0.8, 1]\nlimit = 5\n'
    plan = load_plan(write(tmp_path, text), RunPlan)
    assert plan.tasks == ("gsm8k", "mgsm")
    assert plan.steps == ("auto", 4)
    merged = merge(plan, {"limit": 7, "tasks": ("arc",)})
    assert (merged.limit, merged.tasks, merged.seed, merged.block_sizes) == (7, ("arc",), 0, (8, 16))


@pytest.mark.parametrize("plan", [RunPlan(limit=3, steps=("auto", 2)), SpeedPlan(batch_sizes=(1, 4))])
def test_a_plan_survives_its_manifest(plan: RunPlan | SpeedPlan) -> None:
    assert plan_from_json(type(plan), to_json(plan)) == plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("block_size = [8]", "unknown key 'block_size' (did you mean 'block_sizes'?)"),
        ("block_sizes = 8.5", "block_sizes[0] must be a whole number, not 8.5"),
        ("block_sizes = [0]", "block_sizes must be 1 or more, not 0"),
        ("block_sizes = []", "block_sizes is empty"),
        ("block_sizes = [8, 8]", "block_sizes names 8 twice"),
        ('steps = ["all"]', "steps[0] must be a whole number or auto, not 'all'"),
        ("thresholds = [nan]", "thresholds must be a finite number, not nan"),
        ("limit = true", "limit must be a whole number, not True"),
        ("limit = 0", "limit must be 1 or more"),
        ("temperature = -1", "temperature must be 0 or more"),
        ("seed = 1.5", "seed must be a whole number"),
        ('dtype = "float8"', "dtype must be auto or float32 or bfloat16 or float16"),
        ('likelihood = "guess"', "likelihood must be exact or context_tower"),
        ("tasks = [", "is not valid TOML"),
        ("[run]\nlimit = 4", "plans have no tables such as [run]: write its keys without it"),
    ],
)
def test_bad_toml_is_refused_with_the_reason_and_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"plan\.toml") as caught:
        load_plan(path, RunPlan)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_a_missing_plan_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read plan"):
        load_plan(tmp_path / "none.toml", RunPlan)


def test_speed_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="no effect on the answer workload"):
        SpeedPlan(workload="answer", prompt_tokens=64)
    with pytest.raises(ValueError, match="needs new_tokens"):
        SpeedPlan(workload="fixed")
    with pytest.raises(ValueError, match="batch_sizes must be 1 or more"):
        SpeedPlan(batch_sizes=(1, 0))


def test_steps_auto_is_the_block_size_and_equal_settings_appear_once() -> None:
    plan = RunPlan(block_sizes=(8, 16), steps=("auto", 8), thresholds=(0.8, 0.9))
    specs = cross_decoders(plan)
    settings = [(s.params["block_size"], s.params["steps_per_block"], s.params["threshold"]) for s in specs]
    assert settings == [(8, 8, 0.8), (8, 8, 0.9), (16, 16, 0.8), (16, 16, 0.9), (16, 8, 0.8), (16, 8, 0.9)]
    assert {s.kind for s in specs} == {"block_diffusion"}


def test_a_setting_the_decoder_lacks_is_refused_unless_it_is_the_default() -> None:
    [spec] = cross_decoders(RunPlan(decoder="autoregressive", temperature=0.5))
    assert spec.params["temperature"] == 0.5
    assert "block_size" not in spec.params
    with pytest.raises(ValueError, match="'autoregressive' has no block_size: drop block-sizes"):
        cross_decoders(RunPlan(decoder="autoregressive", block_sizes=(8,)))


def test_an_unknown_decoder_gets_a_near_miss_hint() -> None:
    with pytest.raises(ValueError, match="did you mean block_diffusion"):
        cross_decoders(RunPlan(decoder="block_difusion"))


def test_other_words_for_a_decoder_are_understood() -> None:
    with pytest.raises(ValueError, match="did you mean autoregressive"):
        cross_decoders(RunPlan(decoder="greedy"))
    assert RunPlan(decoder="ar").decoder == "autoregressive"


def test_a_module_that_is_not_found_may_lie_in_this_folder() -> None:
    with pytest.raises(ValueError, match=r"cannot import 'no_such_foo'.* set PYTHONPATH=\."):
        resolve("no_such_foo:Bar")


def test_a_decoder_from_another_package_is_crossed_by_its_own_params(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Params:
        threshold: float = 0.5

    class Mine:
        VERSION = 3

    Mine.Params = Params  # type: ignore[attr-defined]
    module = types.ModuleType("somebodys_package")
    module.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_package", module)
    specs = cross_decoders(RunPlan(decoder="somebodys_package:Mine", thresholds=(0.1, 0.2)))
    assert [(s.kind, dict(s.params), s.version) for s in specs] == [
        ("somebodys_package:Mine", {"threshold": 0.1}, 3),
        ("somebodys_package:Mine", {"threshold": 0.2}, 3),
    ]


def test_resolve_names_the_half_that_is_wrong() -> None:
    assert resolve("twotower_eval.plan:RunPlan") is RunPlan
    with pytest.raises(ValueError, match="not of the form"):
        resolve("twotower_eval.plan")
    with pytest.raises(ValueError, match=r"cannot import 'twotower_eval\.plam'"):
        resolve("twotower_eval.plam:RunPlan")
    with pytest.raises(ValueError, match="did you mean 'RunPlan'"):
        resolve("twotower_eval.plan:RunPlam")


def test_data_path_finds_tasks_beside_or_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources.data_path("tasks", "miniature").is_dir()
    assert resources.data_path("miniature", "corpus.py").is_file()
    package = tmp_path / "twotower_eval"
    (package / "_data" / "tasks").mkdir(parents=True)
    monkeypatch.setattr(resources, "__file__", str(package / "resources.py"))
    assert resources.data_path("tasks", "x.yaml") == package / "_data" / "tasks" / "x.yaml"


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfseed = 3\r\n", b"seed = 3"])
def test_a_byte_order_mark_and_line_ends_of_an_editor_are_no_part_of_a_plan(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.toml").write_bytes(content)
    assert load_plan(tmp_path / "plan.toml", RunPlan).seed == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed = 3".encode("utf-16"), "it is UTF-16, not UTF-8"),
        (b"# a comment\nmodel = 'caf\xe9'", "line 2: not UTF-8 (byte 0xe9)"),
        (b"seed = 9223372036854775808", "'seed': a whole number beyond 64 bits"),
        (b"seed = " + b"9" * 5000, "a whole number has more digits than Python reads"),
        (b"tasks = " + b"[" * 9000, "nested too deeply"),
        (b"seed = 1\nseed = 2", "is not valid TOML"),
        (b'model = "\\ud800"', "is not valid TOML"),
        (b"min_seconds = nan", "unknown key 'min_seconds'"),
        (b"temperature = inf", "temperature must be a finite number, not inf"),
    ],
)
def test_an_odd_plan_is_refused_in_one_line_that_names_it(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "plan.toml").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.toml") as caught:
        load_plan(tmp_path / "plan.toml", RunPlan)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_baselines_family_needs_a_baselines_folder() -> None:
    with pytest.raises(UserError, match="baseline_family has no effect on context-tower: drop it, or name a baseline"):
        RunPlan(baseline_family="transformers")
    assert RunPlan(baseline="miniature", baseline_family="nemotron_h").family is None


def test_the_miniature_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a folder here is called so."""
    monkeypatch.chdir(tmp_path)
    plan = RunPlan(model="miniature", baseline="miniature")
    assert model_source(plan) == baseline_source(plan) == model_source(RunPlan())
    (tmp_path / "miniature").mkdir()
    assert model_source(plan).folder == Path("miniature") != model_source(RunPlan()).folder
