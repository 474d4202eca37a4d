"""Several baselines of one plan: repeated options, lists and tables come to the same plans; names, slips, overrides."""

from __future__ import annotations

from typing import Any

import pytest

from twotower_eval.cli.options import read
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SpeedPlan, each_baseline, named_baselines
from twotower_eval.plan_baselines import table_of, table_text
from twotower_eval.plan_files import merge, plan_from_json
from twotower_eval.records import to_json


def names(**values: Any) -> list[str | None]:
    return [name for name, _ in named_baselines(plan_from_json(SpeedPlan, values))]


@pytest.mark.parametrize("cls", [RunPlan, SpeedPlan])
def test_one_baseline_is_what_it_was(cls) -> None:
    plan = plan_from_json(cls, {"baseline": "a/x"})
    assert "baselines" not in to_json(plan)
    assert named_baselines(plan) == ((None, plan),)
    assert plan_from_json(cls, {"baseline": ["a/x"]}) == plan_from_json(cls, {"baselines": [{"model": "a/x"}]}) == plan


def test_lists_options_and_tables_say_the_same() -> None:
    tables = plan_from_json(SpeedPlan, {"baselines": [{"model": "a/x"}, {"model": "b/y"}]})
    assert plan_from_json(SpeedPlan, {"baseline": ["a/x", "b/y"]}) == tables
    assert plan_from_json(SpeedPlan, {"baseline": read(SpeedPlan, "baseline", ["a/x", "b/y"])}) == tables
    assert read(SpeedPlan, "baseline", ["a/x"]) == "a/x"
    typed = read(SpeedPlan, "baselines", ['{model = "a/x"}', '{model = "b/y"}'])
    assert plan_from_json(SpeedPlan, {"baselines": typed}) == tables
    assert [single.baseline for single in each_baseline(tables)] == ["a/x", "b/y"]
    assert plan_from_json(SpeedPlan, to_json(tables)) == tables


def test_models_and_decoders_are_crossed() -> None:
    plan = plan_from_json(SpeedPlan, {"baseline": ["a/x", "b/y"], "baseline_decoder": "autoregressive,prompt_lookup"})
    assert [(one.baseline, one.baseline_decoder) for one in each_baseline(plan)] == [
        ("a/x", "autoregressive"),
        ("a/x", "prompt_lookup"),
        ("b/y", "autoregressive"),
        ("b/y", "prompt_lookup"),
    ]


def test_names_are_what_tells_baselines_apart() -> None:
    assert names(baseline=["a/x", "b/y"]) == ["x", "y"]
    assert names(baseline=["a/x", "b/x"]) == ["a/x", "b/x"]
    assert names(baselines=[{}, {"decoder": "prompt_lookup"}]) == ["autoregressive", "prompt_lookup"]
    assert names(baselines=[{}, {"set": {"patience": 3}}]) == ["1", "patience=3"]
    assert names(baselines=[{"name": "plain"}, {"decoder": "prompt_lookup"}]) == ["plain", "prompt_lookup"]
    assert names(baselines=[{"name": "plain"}]) == ["plain"]


def test_what_is_said_of_all_holds_where_a_table_is_silent() -> None:
    plan = plan_from_json(
        SpeedPlan,
        {
            "baseline_family": "transformers",
            "baseline_set": {"patience": 3},
            "baselines": [{"model": "x"}, {"model": "y", "family": "nemotron_h", "decoder": "autoregressive"}],
        },
    )
    one, other = each_baseline(plan)
    assert (one.baseline_family, one.baseline_set) == ("transformers", {"patience": (3,)})
    assert (other.baseline_family, other.baseline_set) == ("nemotron_h", None)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"baselines": [{"modle": "x"}]}, "unknown key 'modle' in [[baselines]] (did you mean 'model'?)"),
        ({"baseline": ["x", "x"]}, "baseline names x twice"),
        ({"baseline": []}, "baseline is empty: name at least one"),
        ({"baselines": [{"model": "x"}, {"model": "x", "name": "b"}]}, "baselines 1 and 2 are the same: drop one"),
        ({"baselines": [{"model": 3}, {"model": "x"}]}, "baseline 1: baseline must be a text, not 3"),
        ({"baselines": [{"family": "q"}, {"model": "x"}]}, "baseline 1: baseline_family has no effect on"),
        ({"baselines": {"model": "x"}}, "baselines are tables: in TOML [[baselines]]"),
        ({"baselines": [{"model": "x"}], "baseline": ["y", "z"]}, "two ways to say the same: take one"),
        ({"baselines": [{"model": "x", "name": "a"}, {"model": "y", "name": "a"}]}, "two baselines are called 'a'"),
        (
            {"baseline_decoder": "autoregressive,prompt_lookup", "baseline_set": {"max_matching_ngram_size": 3}},
            "baseline_set does not say which of several decoders it is for: give each a table, --baselines",
        ),
        ({"baselines": [{"model": "x", "name": "a\nb"}, {"model": "y"}]}, "is no name of a baseline"),
    ],
)
def test_slips_are_told_in_a_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as found:
        plan_from_json(SpeedPlan, values)
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_settings_beside_several_decoders_are_refused_as_they_are_typed() -> None:
    from twotower_eval.api.given import plan_of

    with pytest.raises(UserError, match="baseline_set does not say which"):
        plan_of(SpeedPlan, None, None, {"baseline_decoder": "autoregressive,draft", "baseline_set": {"draft": "x"}})


def test_an_option_overrides_what_tables_say() -> None:
    plan = plan_from_json(SpeedPlan, {"baselines": [{"model": "x", "name": "a"}, {"model": "y", "family": "f"}]})
    assert [one.baseline_family for one in each_baseline(merge(plan, {"baseline_family": "g"}))] == ["g", "g"]
    assert merge(plan, {"baseline": ("p", "q")}) == plan_from_json(SpeedPlan, {"baseline": ["p", "q"]})
    decoders = plan_from_json(SpeedPlan, {"baselines": [{}, {"decoder": "prompt_lookup"}]})
    assert [one.baseline for one in each_baseline(merge(decoders, {"baseline": "z"}))] == ["z", "z"]
    models = plan_from_json(SpeedPlan, {"baseline": ["p", "q"]})
    assert merge(models, {"baseline": "z"}) == plan_from_json(SpeedPlan, {"baseline": "z"})


@pytest.mark.parametrize("table", [{"model": "a b", "set": {"n": 3, "x.y": [1.5, True]}}, {}, {"name": 'a "b" \\ ü'}])
def test_a_table_is_read_as_it_is_written(table: dict[str, Any]) -> None:
    assert table_of(table_text(table)) == table


@pytest.mark.parametrize("text", ["gpt2", "{model = gpt2}", "", "3"])
def test_what_is_no_table_is_told(text: str) -> None:
    with pytest.raises(UserError, match="--baselines takes a table such as"):
        table_of(text)
