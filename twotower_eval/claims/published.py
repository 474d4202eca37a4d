"""Published numbers as they were printed, for the audit: percentages and factors, exactly as many digits as printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twotower_eval.claims.reading import texts, value_of, within
from twotower_eval.names import did_you_mean


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """One row of a table: percentages of both models. ``single_mean``: a mean over documents of one task.

    ``num_documents`` is ``None`` where it is not surely known.
    """

    name: str
    shots: int
    metric: str
    kinds: tuple[str, ...]
    baseline: float
    candidate: float
    num_documents: int | None = None
    single_mean: bool = True


@dataclass(frozen=True, kw_only=True)
class PublishedAggregate:
    """A stated summary of the table, in percent, over tasks of one of the ``kinds`` (all without any)."""

    name: str
    percent: float
    decimals: int
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """A further percentage of a task of the table, from elsewhere in the paper."""

    task: str
    percent: float
    where: str


@dataclass(frozen=True, kw_only=True)
class PublishedSpeedup:
    """A stated speedup, with what was said of the point it belongs to."""

    name: str
    factor: float
    block_size: int
    baseline_devices: int | None = None
    candidate_devices: int | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedGap:
    """A variant's scores relative to the baseline's, in points, by group of tasks."""

    name: str
    points: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Published:
    """All that an audit looks at."""

    decimals: int
    tasks: tuple[PublishedTask, ...]
    aggregates: tuple[PublishedAggregate, ...] = ()
    scores: tuple[PublishedScore, ...] = ()
    speedups: tuple[PublishedSpeedup, ...] = ()
    gaps: tuple[PublishedGap, ...] = ()


def published_from(table: Any) -> Published:
    """``[published]`` as records; ValueError for what is unknown, missing or does not fit together."""
    within("published", table, ("decimals", "task", "aggregate", "score", "speedup", "gap"))
    tasks = tuple(_task(row) for row in table.get("task", []))
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError("published: it needs [[published.task]] rows, each task once")
    scores = tuple(_record(PublishedScore, "score", row, "task") for row in table.get("score", []))
    for score in scores:
        if score.task not in names:
            raise ValueError(f"published score: no task {score.task!r}{did_you_mean(score.task, names)}")
    aggregates = tuple(_aggregate(row) for row in table.get("aggregate", []))
    known = {kind for task in tasks for kind in task.kinds}
    for aggregate in aggregates:
        for kind in aggregate.kinds:
            if kind not in known:
                raise ValueError(f"published aggregate {aggregate.name!r}: no task is of kind {kind!r}")
    return Published(
        decimals=value_of("published", table, "decimals", int),
        tasks=tasks,
        aggregates=aggregates,
        scores=scores,
        speedups=tuple(_record(PublishedSpeedup, "speedup", row, "name") for row in table.get("speedup", [])),
        gaps=tuple(_gap(row) for row in table.get("gap", [])),
    )


def _record(cls: type[Any], what: str, table: Mapping[str, Any], named_by: str) -> Any:
    """A flat record of texts, whole numbers and numbers."""
    where = f"published {what} {table.get(named_by, '?')!r}"
    fields = {field.name: field for field in dataclasses.fields(cls)}
    within(where, table, fields)
    kinds = {"str": str, "int": int, "float": float, "int | None": int}
    values = {}
    for name, field in fields.items():
        default = () if field.default is dataclasses.MISSING else (field.default,)
        values[name] = value_of(where, table, name, kinds[str(field.type)], *default)
    return cls(**values)


def _task(table: Mapping[str, Any]) -> PublishedTask:
    where = f"published task {table.get('name', '?')!r}"
    within(where, table, [field.name for field in dataclasses.fields(PublishedTask)])
    percents = {key: value_of(where, table, key, float) for key in ("baseline", "candidate")}
    if not all(0 <= percent <= 100 for percent in percents.values()) or percents["baseline"] == 0:
        raise ValueError(f"{where}: scores are percentages, the baseline's above 0")
    return PublishedTask(
        name=value_of(where, table, "name", str),
        shots=value_of(where, table, "shots", int),
        metric=value_of(where, table, "metric", str),
        kinds=texts(where, table, "kinds"),
        num_documents=value_of(where, table, "num_documents", int, None),
        single_mean=value_of(where, table, "single_mean", bool, True),
        **percents,
    )


def _aggregate(table: Mapping[str, Any]) -> PublishedAggregate:
    where = f"published aggregate {table.get('name', '?')!r}"
    within(where, table, [field.name for field in dataclasses.fields(PublishedAggregate)])
    return PublishedAggregate(
        name=value_of(where, table, "name", str),
        percent=value_of(where, table, "percent", float),
        decimals=value_of(where, table, "decimals", int),
        kinds=texts(where, table, "kinds"),
    )


def _gap(table: Mapping[str, Any]) -> PublishedGap:
    where = f"published gap {table.get('name', '?')!r}"
    within(where, table, ("name", "points"))
    points = value_of(where, table, "points", dict)
    name = value_of(where, table, "name", str)
    return PublishedGap(name=name, points={key: value_of(where, points, key, float) for key in points})
