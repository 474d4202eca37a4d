"""Values of a plan's fields against their annotations and bounds: what TOML and the command line may have wrong."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from twotower_eval.records import GRAPH_DEVICES


def check_fields(plan: Any) -> None:
    """ValueError for a value of another type than its field's, and for a list that is empty or names one twice."""
    hints = typing.get_type_hints(type(plan))
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if not _fits(value, hints[field.name]):
            raise ValueError(f"{field.name} must be {_in_words(hints[field.name])}, not {value!r}")
        if isinstance(value, tuple):
            if not value:
                raise ValueError(f"{field.name} is empty: name at least one")
            twice = sorted({str(item) for item in value if value.count(item) > 1})
            if twice:
                raise ValueError(f"{field.name} names {', '.join(twice)} twice")


def check_at_least(plan: Any, least: int, *names: str) -> None:
    """ValueError for a number below ``least`` or not finite among the named fields; ``None`` is none."""
    for name in names:
        value = getattr(plan, name)
        for item in value if isinstance(value, tuple) else (value,):
            # "not >=" and not "<", so that NaN is refused too.
            if isinstance(item, (int, float)) and not least <= item < float("inf"):
                raise ValueError(f"{name} must be {least} or more, not {item}")


def check_cuda_graphs(plan: Any) -> None:
    """ValueError for graphs on devices that have none: known from the plan, so before anything is loaded."""
    if plan.cuda_graphs and any(device.partition(":")[0] not in GRAPH_DEVICES for device in plan.devices):
        raise ValueError("CUDA graphs need CUDA devices: name some with --devices, or drop --cuda-graphs")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in typing.get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not isinstance(value, bool)


def _in_words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " or ".join(str(arg) for arg in args)
    if origin is tuple:
        return f"a list of {_in_words(args[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
