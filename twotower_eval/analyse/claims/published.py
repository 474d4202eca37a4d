"""Published numbers as they were printed, for the audit: percentages, rates and factors, to the last digit.

A number may be written as a text, ``"98.70"``, which says its own decimals. Numbers of TOML lose trailing zeros: theirs
are those of the table (``decimals``), of its column (``baseline_decimals``, ``candidate_decimals``) or of the row.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from twotower_eval.analyse.claims.reading import at_least, tables, texts, value_of, within
from twotower_eval.analyse.claims.stated import Stated, check_decimals, percent_of, stated_of
from twotower_eval.analyse.compare.pairing import ARMS
from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject
from twotower_eval.names import did_you_mean

AggregateOf = Literal["retention", "baseline", "candidate", "difference"]


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """One row of a table: percentages of both models. ``single_mean``: a mean over documents of one task.

    ``num_documents`` is ``None`` where it is not surely known.
    """

    name: str
    shots: int
    metric: str
    kinds: tuple[str, ...]
    baseline: Stated
    candidate: Stated
    num_documents: int | None = None
    single_mean: bool = True


@dataclass(frozen=True, kw_only=True)
class PublishedAggregate:
    """A stated summary of the table, in percent, over tasks of one of the ``kinds`` (all without any).

    ``of`` says of what: the candidate's mean over the baseline's (retention), either column's own mean, or the
    candidate's mean less the baseline's, in points.
    """

    name: str
    percent: Stated
    kinds: tuple[str, ...] = ()
    of: AggregateOf = "retention"


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """A further percentage of a task of the table, from elsewhere in the paper."""

    task: str
    percent: Stated
    where: str


@dataclass(frozen=True, kw_only=True)
class PublishedRate:
    """A stated number of tokens per second, with what was said of how it was measured."""

    name: str
    tokens_per_s: Stated
    devices: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedSpeedup:
    """A stated speedup, with what was said of the point it belongs to.

    ``of`` names two rates, the first of which is so many times the second; ``product_of`` names other speedups that
    it is the product of.
    """

    name: str
    factor: Stated
    block_size: int | None = None
    baseline_devices: int | None = None
    candidate_devices: int | None = None
    of: tuple[str, ...] = ()
    product_of: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PublishedGap:
    """A variant's scores relative to the baseline's, in points, by group of tasks."""

    name: str
    points: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Published:
    """All that an audit looks at."""

    tasks: tuple[PublishedTask, ...] = ()
    aggregates: tuple[PublishedAggregate, ...] = ()
    scores: tuple[PublishedScore, ...] = ()
    rates: tuple[PublishedRate, ...] = ()
    speedups: tuple[PublishedSpeedup, ...] = ()
    gaps: tuple[PublishedGap, ...] = ()


KINDS = ("task", "aggregate", "score", "rate", "speedup", "gap")


def published_from(given: object) -> Published:
    """``[published]`` as records; UserError for what is unknown, missing or does not fit together."""
    table = within("published", given, ("decimals", *(f"{column}_decimals" for column in ARMS), *KINDS))
    decimals = _decimals("published", table, "decimals", None)
    of_column = {column: _decimals("published", table, f"{column}_decimals", decimals) for column in ARMS}
    rows = {kind: tables("published", table, kind) for kind in KINDS}
    tasks = tuple(_task(row, of_column) for row in rows["task"])
    names = [task.name for task in tasks]
    if not (names or rows["speedup"]) or len(set(names)) != len(names):
        raise UserError("published: it needs [[published.task]] rows, each task once, or [[published.speedup]] rows")
    _check_percentages(tasks)
    rates = tuple(_rate(row) for row in rows["rate"])
    speedups = tuple(_speedup(row) for row in rows["speedup"])
    for what, found in (("rate", [one.name for one in rates]), ("speedup", [one.name for one in speedups])):
        _check_once(what, found)
    for speedup in speedups:
        where = f"published speedup {speedup.name!r}"
        _check_named(f"{where}, of", "rate", speedup.of, [rate.name for rate in rates])
        others = [one.name for one in speedups if one is not speedup and not one.product_of]
        _check_named(f"{where}, product_of", "speedup", speedup.product_of, others)
    return Published(
        tasks=tasks,
        aggregates=tuple(_aggregate(row, decimals, tasks) for row in rows["aggregate"]),
        scores=tuple(_score(row, decimals, names) for row in rows["score"]),
        rates=rates,
        speedups=speedups,
        gaps=tuple(_gap(row) for row in rows["gap"]),
    )


def _decimals(where: str, table: JsonObject, key: str, default: int | None) -> int | None:
    found = value_of(where, table, key, int, default)
    if found is not None:
        check_decimals(where, found)
    return found


def _check_once(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"published: {what} {twice[0]!r} is there twice")


def _check_named(where: str, what: str, named: Sequence[str], known: Sequence[str]) -> None:
    for name in named:
        if name not in known:
            raise UserError(f"{where}: no {what} {name!r}{did_you_mean(name, known)}")


def _check_percentages(tasks: Sequence[PublishedTask]) -> None:
    """Shares of 1 would give the same retention, and nonsense where figures are held against document counts."""
    if tasks and all(max(task.baseline.value, task.candidate.value) <= 1 for task in tasks):
        raise UserError("published: no score is above 1 %: write shares of 1 as percentages, 79.27 for 0.7927")


def _rate(table: JsonObject) -> PublishedRate:
    where = f"published rate {table.get('name', '?')!r}"
    within(where, table, ("name", "tokens_per_s", "decimals", "devices", "batch_size"))
    rate = PublishedRate(
        name=value_of(where, table, "name", str),
        tokens_per_s=stated_of(where, table, "tokens_per_s", _decimals(where, table, "decimals", None)),
        devices=value_of(where, table, "devices", int, None),
        batch_size=value_of(where, table, "batch_size", int, None),
    )
    if rate.tokens_per_s.value <= 0:
        raise UserError(f"{where}: tokens_per_s must be above 0, not {rate.tokens_per_s.text}")
    at_least(where, 1, rate, "devices", "batch_size")
    return rate


def _speedup(table: JsonObject) -> PublishedSpeedup:
    where = f"published speedup {table.get('name', '?')!r}"
    known = [field.name for field in dataclasses.fields(PublishedSpeedup)]
    within(where, table, (*known, "percent_faster", "decimals"))
    speedup = PublishedSpeedup(
        name=value_of(where, table, "name", str),
        factor=_factor(where, table),
        of=texts(where, table, "of"),
        product_of=texts(where, table, "product_of"),
        **{name: value_of(where, table, name, int, None) for name in known if name.endswith(("_size", "_devices"))},
    )
    if speedup.factor.value <= 0:
        raise UserError(f"{where}: factor must be above 0, not {speedup.factor.text}")
    if speedup.of and (len(speedup.of) != 2 or speedup.product_of):
        raise UserError(f"{where}: of names two rates, and there is no product_of beside it")
    at_least(where, 1, speedup, "block_size", "baseline_devices", "candidate_devices")
    return speedup


def _factor(where: str, table: JsonObject) -> Stated:
    """As it was printed: ``factor = 2.42``, or ``percent_faster = 142``."""
    decimals = _decimals(where, table, "decimals", None)
    if "percent_faster" not in table:
        return stated_of(where, table, "factor", decimals)
    if "factor" in table:
        raise UserError(f"{where}: factor and percent_faster say the same: keep the one that was printed")
    more = stated_of(where, table, "percent_faster", decimals)
    return Stated(value=1 + more.value / 100, decimals=more.decimals + 2)


def _score(table: JsonObject, decimals: int | None, names: Sequence[str]) -> PublishedScore:
    where = f"published score of {table.get('task', '?')!r}"
    within(where, table, ("task", "percent", "where", "decimals"))
    score = PublishedScore(
        task=value_of(where, table, "task", str),
        percent=_percent(where, table, "percent", _decimals(where, table, "decimals", decimals)),
        where=value_of(where, table, "where", str),
    )
    _check_named("published score", "task", [score.task], names)
    return score


def _percent(where: str, table: JsonObject, key: str, decimals: int | None) -> Stated:
    if decimals is None and not isinstance(table.get(key, ""), str):
        raise UserError(f"{where}: say with how many decimals {key} was printed, or write it as a text")
    if key not in table:
        raise UserError(f"{where}: {key} is missing")
    return percent_of(where, table, key, decimals)


def _task(table: JsonObject, decimals: Mapping[str, int | None]) -> PublishedTask:
    where = f"published task {table.get('name', '?')!r}"
    within(where, table, [field.name for field in dataclasses.fields(PublishedTask)])
    percents = {key: _percent(where, table, key, decimals[key]) for key in ARMS}
    if percents["baseline"].value == 0:
        raise UserError(f"{where}: the baseline's score must be above 0")
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


def _aggregate(table: JsonObject, decimals: int | None, tasks: Sequence[PublishedTask]) -> PublishedAggregate:
    where = f"published aggregate {table.get('name', '?')!r}"
    within(where, table, ("name", "percent", "decimals", "kinds", "of"))
    of = cast(AggregateOf, value_of(where, table, "of", str, "retention"))
    if of not in typing.get_args(AggregateOf):
        raise UserError(f"{where}: of must be {' or '.join(typing.get_args(AggregateOf))}, not {of!r}")
    own = _decimals(where, table, "decimals", decimals)
    read = _percent if of in ARMS else stated_of
    percent = read(where, table, "percent", own)
    aggregate = PublishedAggregate(
        name=value_of(where, table, "name", str), percent=percent, kinds=texts(where, table, "kinds"), of=of
    )
    if of != "difference" and aggregate.percent.value < 0:
        raise UserError(f"{where}: percent must be 0 or more, not {aggregate.percent.text}")
    known = {kind for task in tasks for kind in task.kinds}
    for kind in aggregate.kinds:
        if kind not in known:
            raise UserError(f"{where}: no task is of kind {kind!r}")
    if not tasks:
        raise UserError(f"{where}: there are no [[published.task]] rows that it could be over")
    return aggregate


def _gap(table: JsonObject) -> PublishedGap:
    where = f"published gap {table.get('name', '?')!r}"
    within(where, table, ("name", "points"))
    points = value_of(where, table, "points", dict)
    name = value_of(where, table, "name", str)
    return PublishedGap(name=name, points={key: value_of(where, points, key, float) for key in points})
