"""Import paths from before the rooms were moved."""

import importlib
import subprocess
import sys

import pytest

from twotower_eval import moved

OLD = {
    "twotower_eval.decoders": ["make_decoder", "make_scorer"],
    "twotower_eval.decoders.pieces": ["ScoreRequest"],
    "twotower_eval.harness.adapter": ["HarnessLM"],
    "twotower_eval.stats.paired": ["PairedScores"],
    "twotower_eval.suites": ["lm_tasks"],
}
# What other modules hold now, by old path.
JOINED = {
    "claims.gates": ["null_gate", "floor_gate"],
    "comparability": ["differences", "warnings"],
    "evidence.nulls": ["Nulled", "caution"],
    "evidence.pairing": ["Pairing", "paired"],
    "harness.aggregates": ["mean_item", "replicates_of"],
    "models": ["CausalModel", "TwoTowerModel", "BranchingModel", "load_model"],
    "models.routing": ["ForcedRouting", "expected_touched"],
    "plan_command": ["command"],
    "report.flips": ["flips"],
    "report.headline": ["headline"],
    "report.section": ["Section"],
    "shortfalls": ["override_lines", "truncation_line"],
    "speed.loop": ["RoundLoop"],
    "speed.phases": ["prefill", "denoise"],
    "speed.rounds": ["run"],
    "suites.chance": ["chance_by_metric"],
    "suites.files": ["Suite", "load_suite"],
    "ways": ["Handicap", "ways_text"],
}


@pytest.mark.parametrize("old", OLD)
def test_old_paths_give_the_same_objects_and_say_where_they_are(old: str) -> None:
    for name in [name for name in sys.modules if name == old or old.startswith(f"{name}.")]:
        if moved.homes_of(name):
            del sys.modules[name]
    parent = old.rpartition(".")[0]
    if moved.homes_of(parent):
        with pytest.warns(DeprecationWarning, match=parent):
            importlib.import_module(parent)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to twotower_eval\\.") as said:
        module = importlib.import_module(old)
    assert "goes with version 0.2" in str(said[0].message)
    for name in OLD[old]:
        found = getattr(module, name)
        homes = [importlib.import_module(home) for home in moved.homes_of(old)]
        assert found is next(getattr(home, name) for home in homes if hasattr(home, name))


def test_a_room_is_imported_from_the_package_by_its_old_name() -> None:
    code = "from twotower_eval import stats; from twotower_eval.analyse import stats as now; "
    code += "print(stats.mcnemar is now.mcnemar)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_paths_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("twotower_eval.stats.nothing_of_that_name")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("twotower_eval.nothing_of_that_name")
    assert moved.homes_of("twotower_eval.records") == ()
    assert moved.homes_of("somebody.stats") == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("old", JOINED)
def test_names_of_modules_that_others_hold_now_are_served(old: str) -> None:
    """They were joined with others, and their old paths with them."""
    module = importlib.import_module(f"twotower_eval.{old}")
    for name in JOINED[old]:
        now = moved.RENAMED.get(f"{old}.{name}", name)
        assert getattr(module, name).__name__ == now


def test_every_home_is_there() -> None:
    for old, homes in moved.HOMES.items():
        assert moved.homes_of(f"twotower_eval.{old}") == tuple(f"twotower_eval.{home}" for home in homes)


@pytest.mark.parametrize("old", [old for old in moved.HOMES if old.partition(".")[0] in moved.HOMES and "." in old])
def test_no_path_is_led_past_the_module_that_its_room_still_has(old: str) -> None:
    """A module that got its file back was looked for in the one that had held it in between."""
    room, _, module = old.partition(".")
    kept = [f"twotower_eval.{home}.{module}" for home in moved.HOMES[room]]
    assert not [name for name in kept if moved._is_there(name)]


def test_an_old_path_is_not_loaded_by_who_only_asks_what_it_is() -> None:
    """Torch asks every module for its file while it is imported: the room was then loaded amid that, in a circle."""
    code = "import warnings; warnings.simplefilter('ignore'); from twotower_eval import harness; "
    code += "import sys; print(hasattr(harness, '__file__'), 'twotower_eval.measure.harness' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_a_function_of_the_package_stays_where_an_old_room_had_its_name() -> None:
    """`twotower_eval.report` was a room and is a verb: importing the room put it over the verb."""
    code = (
        "import warnings; warnings.simplefilter('ignore'); import twotower_eval as tt; "
        "from twotower_eval.report import Section; import twotower_eval.verify; "
        "from twotower_eval import api; print(tt.report is api.report, tt.verify is api.verify)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
