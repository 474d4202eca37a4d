"""Values of a plan's fields against their annotations and bounds: what TOML and the command line may have wrong."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from twotower_eval.errors import UserError
from twotower_eval.records import GRAPH_DEVICES
from twotower_eval.strict import check_value


def check_fields(plan: Any) -> None:
    """ValueError for a value of another type than its field's, and for a list that is empty or names one twice."""
    hints = typing.get_type_hints(type(plan), include_extras=True)
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        check_value(field.name, hints[field.name], value)
        if isinstance(value, tuple):
            if not value:
                raise UserError(f"{field.name} is empty: name at least one")
            twice = sorted({str(item) for item in value if value.count(item) > 1})
            if twice:
                raise UserError(f"{field.name} names {', '.join(twice)} twice")


def check_at_least(plan: Any, least: int, *names: str) -> None:
    """ValueError for a number below ``least`` or not finite among the named fields; ``None`` is none."""
    for name in names:
        value = getattr(plan, name)
        for item in value if isinstance(value, tuple) else (value,):
            # "not >=" and not "<", so that NaN is refused too.
            if isinstance(item, (int, float)) and not least <= item < float("inf"):
                raise UserError(f"{name} must be {least} or more, not {item}")


def check_cuda_graphs(plan: Any) -> None:
    """ValueError for graphs on devices that have none: known from the plan, so before anything is loaded."""
    if plan.cuda_graphs and any(device.partition(":")[0] not in GRAPH_DEVICES for device in plan.devices):
        raise UserError("CUDA graphs need CUDA devices: name some with --devices, or drop --cuda-graphs")
