"""Plans from plain values: a TOML file, the plan that a run's manifest holds, options in the place of what is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from twotower_eval.decoder_settings import check_given_once
from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean, nearest
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_baselines import overridden, with_baselines
from twotower_eval.plan_fields import list_fields, option_of
from twotower_eval.records import sizing_config
from twotower_eval.resources import read_toml
from twotower_eval.strict import JsonObject

P = TypeVar("P", RunPlan, SpeedPlan, SizingPlan, VerifyPlan)


def load_plan(path: Path, cls: type[P]) -> P:
    """Read a plan from a TOML file; an unknown key, a wrong type or a missing file is a UserError."""
    values = read_toml(path, "plan")
    try:
        if isinstance(settings := values.get("set"), Mapping):
            check_given_once(settings, values)
        return plan_from_json(cls, values)
    except UserError as error:
        raise UserError(f"plan {path}: {error}") from error


def is_older_sizing_plan(path: Path) -> bool:
    """Whether a plan file for ``speed`` is one for ``size``, from before that was a verb of its own."""
    return sizing_config("speed", read_toml(path, "plan")) is not None


def plan_from_json(cls: type[P], values: JsonObject) -> P:
    """A plan from plain values, as TOML or a run's manifest holds them."""
    if cls is SizingPlan and "config" not in values and (older := sizing_config("speed", values)) is not None:
        values = {"config": older, **{key: value for key, value in values.items() if key != "random_weights"}}
    return cls(**cast(dict[str, Any], _by_field(cls, values)))


def _by_field(cls: type, values: JsonObject) -> dict[str, object]:
    """Values by the plan's fields, of which some have other names; one value of a list is a list of one.

    UserError for keys that are no field: those that look like one come first.
    """
    fields = {field.name: option_of(cls, field.name)[0] for field in dataclasses.fields(cls)}
    others = {other: name for name, option in fields.items() for other in option.other_names}
    unknown = sorted(
        (key for key in values if key not in fields and key not in others), key=lambda key: not nearest(key, fields)
    )
    for key in unknown:
        if isinstance(values[key], Mapping):
            raise UserError(f"plans have no tables such as [{key}]: write its keys without it, above all tables")
        others_text = f"; also unknown: {', '.join(map(repr, unknown[1:]))}" if unknown[1:] else ""
        raise UserError(f"unknown key {key!r}{did_you_mean(key, fields)}{others_text}")
    for other, name in others.items():
        if other in values and name in values:
            raise UserError(f"{other} and {name} are the same: give one of them")
    lists = list_fields(cls)
    named = with_baselines(cls, {others.get(key, key): value for key, value in values.items()})
    return {
        name: (value,) if name in lists and isinstance(value, (str, int, float)) else value
        for name, value in named.items()
    }


def merge(plan: P, overrides: JsonObject) -> P:
    """``plan`` with every override put in its place, of ``set`` and ``baseline_set`` parameter by parameter; checked
    like any plan."""
    given = _by_field(type(plan), overrides)
    for name in ("set", "baseline_set"):
        if isinstance(settings := given.get(name), Mapping):
            given[name] = {**(getattr(plan, name, None) or {}), **settings}
    held = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    if "baselines" in held:
        held["baselines"] = overridden(type(plan), held["baselines"], given)
    return plan_from_json(type(plan), held | given)
