"""Published numbers as they were printed: each is an interval of half a unit in its last place either way."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Literal, cast

from twotower_eval.analyse.claims.terms import at_least, tables, texts, value_of, within
from twotower_eval.analyse.compare.quality import ARMS
from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean
from twotower_eval.strict import JsonObject

DECIMALS = range(10)  # of a number that somebody prints
HUNDRED = Fraction(100)
_PRINTED = re.compile(r"[+-]?\d+(\.\d+)?")


@dataclass(frozen=True)
class Span:
    """What a number can be: ``value`` from the figures as printed, ``low`` to ``high`` from all that round to them."""

    value: Fraction
    low: Fraction
    high: Fraction

    def meets(self, other: Span) -> bool:
        """Whether some value lies in both."""
        return self.low <= other.high and other.low <= self.high

    def roundings(self, decimals: int) -> list[Fraction]:
        """All numbers of so many decimals that it may round to, whichever way ties go."""
        units, half = 10**decimals, Fraction(1, 2)
        first, last = -floor(half - self.low * units), floor(self.high * units + half)
        return [Fraction(number, units) for number in range(first, last + 1)]

    def figures(self, decimals: int) -> tuple[Fraction, Fraction]:
        """The least and the largest of them, but for those that only an end itself rounds to."""
        if self.low == self.high:
            found = self.roundings(decimals)
            return found[0], found[-1]
        units, half = 10**decimals, Fraction(1, 2)
        return Fraction(floor(self.low * units - half) + 1, units), Fraction(ceil(self.high * units + half) - 1, units)

    def times(self, factor: Fraction | int) -> Span:
        """A multiple, by a factor that is not negative."""
        return Span(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Stated:
    """A number as printed, with its decimals."""

    value: Fraction
    decimals: int

    def span(self, *, cut: bool = False) -> Span:
        """What it can stand for; with ``cut``, had the digits behind the last one been dropped."""
        unit = Fraction(1, 10**self.decimals)
        below, above = (Fraction(0), unit) if cut else (unit / 2, unit / 2)
        return Span(self.value, self.value - below, self.value + above)

    def percent_span(self, *, cut: bool = False) -> Span:
        """The same of a percentage, which is never below 0 or above 100."""
        span = self.span(cut=cut)
        return Span(span.value, max(span.low, Fraction(0)), min(span.high, HUNDRED))

    @property
    def text(self) -> str:
        """The digits, trailing zeros included."""
        return f"{float(self.value):.{self.decimals}f}"

    def __float__(self) -> float:
        return float(self.value)


def total(spans: Iterable[Span]) -> Span:
    """The sum; every term may lie anywhere in its interval, independently of the others."""
    found = list(spans)
    return Span(*(sum((getattr(one, end) for one in found), Fraction(0)) for end in ("value", "low", "high")))


def ratio(above: Span, below: Span) -> Span:
    """The quotient of two numbers at or above 0; the whole of ``below`` is above 0."""
    return Span(above.value / below.value, above.low / below.high, above.high / below.low)


def difference(first: Span, second: Span) -> Span:
    """The first minus the second."""
    return Span(first.value - second.value, first.low - second.high, first.high - second.low)


def stated_of(where: str, table: JsonObject, key: str, decimals: int | None = None) -> Stated:
    """The number of a key. A text such as ``"98.70"`` gives its own decimals.

    A TOML number has lost its trailing zeros, so ``decimals`` is how many it was printed with; if ``None``, as many as
    it shows. UserError where it has more, or is not a number.
    """
    value = table.get(key)
    if isinstance(value, str) and _PRINTED.fullmatch(value.strip()):
        number, own = Decimal(value.strip()), len(value.strip().partition(".")[2])
    elif isinstance(value, str):
        raise UserError(f"{where}: {key} must be a number, as printed, not {value!r}")
    else:
        read = value_of(where, table, key, float)
        number = Decimal(value if isinstance(value, int) else repr(read))
        shown = max(0, -int(number.as_tuple().exponent))
        if decimals is not None and abs(round(read, decimals) - read) > 1e-9:
            raise UserError(f"{where}: {key} must be a number with {decimals} decimals, as printed, not {value!r}")
        own = shown if decimals is None else decimals
    check_decimals(where, own)
    return Stated(value=Fraction(round(number, own)), decimals=own)


def check_decimals(where: str, decimals: int) -> None:
    """UserError for a number of decimals outside :data:`DECIMALS`."""
    if decimals not in DECIMALS:
        raise UserError(f"{where}: decimals must be from 0 to {DECIMALS[-1]}, not {decimals}")


def percent_of(where: str, table: JsonObject, key: str, decimals: int | None = None) -> Stated:
    """The same for a percentage from 0 to 100; another unit is refused with a hint."""
    value = table.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and decimals is not None:
        odd = abs(round(value, decimals) - value) > 1e-9 or not 0 <= value <= 100
        outside = ": scores in other units than percent are left out" if not 0 <= value <= 100 else ""
        if odd:
            what = f"{key} must be a percentage with {decimals} decimals, as printed, not {value!r}"
            raise UserError(f"{where}: {what}{outside}")
    stated = stated_of(where, table, key, decimals)
    if not 0 <= stated.value <= 100:
        what = f"{key} must be a percentage from 0 to 100, not {stated.text}"
        raise UserError(f"{where}: {what}: scores in other units than percent are left out")
    return stated


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
        raise UserError(f"published: {what} {twice[0]!r} is defined twice")


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
