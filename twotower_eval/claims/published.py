"""Published numbers as they were printed, for the audit: percentages and factors, exactly as many digits as printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twotower_eval.claims.reading import at_least, tables, texts, value_of, within
from twotower_eval.names import did_you_mean

DECIMALS = range(10)  # of a percentage that somebody prints


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
    decimals = value_of("published", table, "decimals", int)
    if decimals not in DECIMALS:
        raise ValueError(f"published: decimals must be from 0 to {DECIMALS[-1]}, not {decimals}")
    tasks = tuple(_task(row, decimals) for row in tables("published", table, "task"))
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError("published: it needs [[published.task]] rows, each task once")
    scores = tuple(_record(PublishedScore, "score", row, "task") for row in tables("published", table, "score"))
    for score in scores:
        where = f"published score of {score.task!r}"
        if score.task not in names:
            raise ValueError(f"published score: no task {score.task!r}{did_you_mean(score.task, names)}")
        _check_percent(where, "percent", score.percent, decimals)
    aggregates = tuple(_aggregate(row) for row in tables("published", table, "aggregate"))
    known = {kind for task in tasks for kind in task.kinds}
    for aggregate in aggregates:
        for kind in aggregate.kinds:
            if kind not in known:
                raise ValueError(f"published aggregate {aggregate.name!r}: no task is of kind {kind!r}")
    return Published(
        decimals=decimals,
        tasks=tasks,
        aggregates=aggregates,
        scores=scores,
        speedups=tuple(_speedup(row) for row in tables("published", table, "speedup")),
        gaps=tuple(_gap(row) for row in tables("published", table, "gap")),
    )


def _check_percent(where: str, key: str, percent: float, decimals: int) -> None:
    if not 0 <= percent <= 100 or abs(round(percent, decimals) - percent) > 1e-9:
        raise ValueError(f"{where}: {key} must be a percentage with {decimals} decimals, as printed, not {percent!r}")


def _speedup(table: Mapping[str, Any]) -> PublishedSpeedup:
    speedup: PublishedSpeedup = _record(PublishedSpeedup, "speedup", table, "name")
    where = f"published speedup {speedup.name!r}"
    if speedup.factor <= 0:
        raise ValueError(f"{where}: factor must be above 0, not {speedup.factor:g}")
    at_least(where, 1, speedup, "block_size", "baseline_devices", "candidate_devices")
    return speedup


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


def _task(table: Mapping[str, Any], decimals: int) -> PublishedTask:
    where = f"published task {table.get('name', '?')!r}"
    within(where, table, [field.name for field in dataclasses.fields(PublishedTask)])
    percents = {key: value_of(where, table, key, float) for key in ("baseline", "candidate")}
    for key, percent in percents.items():
        _check_percent(where, key, percent, decimals)
    if percents["baseline"] == 0:
        raise ValueError(f"{where}: the baseline's score must be above 0")
    task = PublishedTask(
        name=value_of(where, table, "name", str),
        shots=value_of(where, table, "shots", int),
        metric=value_of(where, table, "metric", str),
        kinds=texts(where, table, "kinds"),
        num_documents=value_of(where, table, "num_documents", int, None),
        single_mean=value_of(where, table, "single_mean", bool, True),
        **percents,
    )
    at_least(where, 0, task, "shots")
    at_least(where, 1, task, "num_documents")
    return task


def _aggregate(table: Mapping[str, Any]) -> PublishedAggregate:
    where = f"published aggregate {table.get('name', '?')!r}"
    within(where, table, [field.name for field in dataclasses.fields(PublishedAggregate)])
    aggregate = PublishedAggregate(
        name=value_of(where, table, "name", str),
        percent=value_of(where, table, "percent", float),
        decimals=value_of(where, table, "decimals", int),
        kinds=texts(where, table, "kinds"),
    )
    if aggregate.decimals not in DECIMALS:
        raise ValueError(f"{where}: decimals must be from 0 to {DECIMALS[-1]}, not {aggregate.decimals}")
    return aggregate


def _gap(table: Mapping[str, Any]) -> PublishedGap:
    where = f"published gap {table.get('name', '?')!r}"
    within(where, table, ("name", "points"))
    points = value_of(where, table, "points", dict)
    name = value_of(where, table, "name", str)
    return PublishedGap(name=name, points={key: value_of(where, points, key, float) for key in points})
