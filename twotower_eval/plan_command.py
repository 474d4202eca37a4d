"""A plan as the command line that makes it: what one types to do a run again, whatever began it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from twotower_eval.plan import AnyPlan, RunPlan, ScalePlan, SpeedPlan, VerifyPlan, plan_from_json

PROGRAM = "twotower-eval"
HOME = "~/"


def plan_of(verb: str, values: Mapping[str, Any]) -> AnyPlan:
    """The plan that a run's manifest holds; ValueError where this version knows no such plan."""
    if verb == "run":
        return plan_from_json(RunPlan, values)
    if verb == "verify":
        return plan_from_json(VerifyPlan, values)
    return plan_from_json(ScalePlan, values) if "random_weights" in values else plan_from_json(SpeedPlan, values)


def command(plan: AnyPlan) -> list[str]:
    """The words of a command line that makes this plan; fields at their default go unsaid.

    Options are called as fields are; only the checkpoint of ``verify`` has none.
    """
    verb = {RunPlan: "run", SpeedPlan: "speed", ScalePlan: "speed", VerifyPlan: "verify"}[type(plan)]
    words = [PROGRAM, verb]
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if value == field.default:
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(plan, VerifyPlan) and field.name == "model":
            words.append(str(value))
        else:
            words += [f"--{option}", ",".join(map(_text, value)) if isinstance(value, tuple) else _text(value)]
    return words


def typed(words: Sequence[str]) -> str:
    """Words as one types them in a shell, which has to see the ~ of a home folder."""
    return " ".join(HOME + shlex.quote(word[2:]) if word.startswith(HOME) else shlex.quote(word) for word in words)


def _text(value: str | int | float) -> str:
    """A number with all its digits and no more."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
