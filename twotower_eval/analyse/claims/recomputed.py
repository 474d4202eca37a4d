"""Stated summaries against the figures that they summarise: averages of a table, speedups from rates and from other
speedups.

Some papers divide or subtract means or rates that they have rounded first. That reading is tried where no other gives
the summary, and is then named with the figures that give it.

Every stated figure is an interval (see ``stated``). Each formula here uses every figure once and is monotone in it, so
the ends of its result are reached at ends of the figures, and all values between are reached too. A summary CONTRADICTS
only if no value of the figures gives any value of it, by any usual reading. It is CONFIRMED only if no other figure
with as many decimals could stand there; else it FITS, and the figures that would fit as well are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Literal

from twotower_eval.analyse.claims.published import (
    AggregateOf,
    Published,
    PublishedAggregate,
    PublishedRate,
    PublishedSpeedup,
    PublishedTask,
    Span,
    Stated,
    difference,
    ratio,
    total,
)
from twotower_eval.names import plural

Kind = Literal["CONFIRMS", "FITS", "CONTRADICTS", "REMARK"]
Weights = Sequence[int]
Columns = tuple[Sequence[Span], Sequence[Span]]  # the candidate's figures and the baseline's
SHOWN = 4
MOST_ROUNDINGS = 100  # of one mean: where there are more, its column hardly rounds it


@dataclass(frozen=True, kw_only=True)
class AuditLine:
    """One result of an audit, in words."""

    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to read a stated summary: its name, and the value that it gives."""

    name: str
    span: Span

    def text(self, decimals: int, unit: str, stated: Stated) -> str:
        """``mean of per-task ratios 98.65 %``, with its ends where the figures' own rounding leaves it open.

        Where it fits what is stated, and other figures as well: ``98.65 % (fits: 98.6 to 98.7)``.
        """
        if not self.fits(stated) or self.is_only(stated):
            return f"{self.name} {span_text(self.span, decimals, unit)}"
        ends = self.span.figures(stated.decimals)
        low, high = (f"{float(f(*ends, stated.value)):.{stated.decimals}f}" for f in (min, max))
        return f"{self.name} {float(self.span.value):.{decimals}f}{unit} (fits: {low} to {high})"

    def fits(self, stated: Stated) -> bool:
        """Whether it can be the stated figure."""
        return self.span.meets(stated.span())

    def is_only(self, stated: Stated) -> bool:
        """Whether no other figure with as many decimals fits."""
        return self.span.figures(stated.decimals) == (stated.value, stated.value)


def span_text(span: Span, decimals: int, unit: str) -> str:
    """A number with its ends, unless they lie within a unit of the last place but one."""
    value, low, high = (f"{float(end):.{decimals}f}" for end in (span.value, span.low, span.high))
    is_narrow = span.high - span.low <= Fraction(10, 10**decimals)
    return f"{value}{unit}" if is_narrow else f"{value}{unit} ({low} to {high})"


def of_kinds(tasks: Sequence[PublishedTask], kinds: Sequence[str]) -> list[PublishedTask]:
    """Tasks of one of the kinds, all without any."""
    return [task for task in tasks if not kinds or set(kinds) & set(task.kinds)]


def retention(tasks: Sequence[PublishedTask]) -> Span:
    """Percent: the unweighted mean of the candidate's column over that of the baseline's."""
    return _ratio_of_means(_columns(tasks), [1] * len(tasks))


def _columns(tasks: Sequence[PublishedTask], *, cut: bool = False) -> Columns:
    return tuple([getattr(task, arm).percent_span(cut=cut) for task in tasks] for arm in ("candidate", "baseline"))  # type: ignore[return-value]


def _mean(spans: Sequence[Span], weights: Weights) -> Span:
    weighted = total(span.times(weight) for span, weight in zip(spans, weights, strict=True))
    return weighted.times(Fraction(1, sum(weights)))


def _ratio_of_means(columns: Columns, weights: Weights) -> Span:
    return ratio(*(_mean(column, weights) for column in columns)).times(100)


def _mean_of_ratios(columns: Columns, weights: Weights) -> Span:
    ratios = [ratio(candidate, baseline) for candidate, baseline in zip(*columns, strict=True)]
    return _mean(ratios, weights).times(100)


def _difference(columns: Columns, weights: Weights) -> Span:
    return difference(*(_mean(column, weights) for column in columns))


Formula = Callable[[Columns, Weights], Span]
OF_RATIOS = "{} mean of per-task ratios"
READINGS: Mapping[AggregateOf, Mapping[str, Formula]] = {
    "retention": {"ratio of the {} means": _ratio_of_means, OF_RATIOS: _mean_of_ratios},
    "candidate": {"{} mean of the candidate's column": lambda columns, weights: _mean(columns[0], weights)},
    "baseline": {"{} mean of the baseline's column": lambda columns, weights: _mean(columns[1], weights)},
    "difference": {"difference of the {} means": _difference},
}


def _readings(aggregate: PublishedAggregate, tasks: Sequence[PublishedTask], *, cut: bool = False) -> list[Reading]:
    """Equal weights first, then weights by documents where their numbers are known and differ."""
    columns, weights = _columns(tasks, cut=cut), _weights(tasks)
    return [
        Reading(name=_named(name, how), span=formula(columns, weights[how]))
        for how in weights
        for name, formula in READINGS[aggregate.of].items()
    ]


def _weights(tasks: Sequence[PublishedTask]) -> dict[str, Weights]:
    weights: dict[str, Weights] = {"unweighted": [1] * len(tasks)}
    sizes = [task.num_documents for task in tasks]
    if None not in sizes and len(set(sizes)) > 1:
        weights["document-weighted"] = [size or 0 for size in sizes]
    return weights


def _of_rounded_means(
    aggregate: PublishedAggregate, tasks: Sequence[PublishedTask], published: Published
) -> Iterator[Reading]:
    """A ratio or difference of means that were rounded first: the stated ones or, without any, to their columns'
    decimals.

    A stated mean is used for the weights that can give it.
    """
    if aggregate.of not in ("retention", "difference") or len(tasks) < 2:  # the mean of one figure is that figure
        return
    noun = "ratio" if aggregate.of == "retention" else "difference"
    for how, weights in _weights(tasks).items():
        means = [_mean(column, weights) for column in _columns(tasks)]
        for candidate, baseline in _rounded_pairs(means, _stated_means(aggregate, published), tasks):
            if baseline.value <= 0:
                continue
            value = candidate.value - baseline.value if noun == "difference" else 100 * candidate.value / baseline.value
            name = f"{noun} of the {how} means once rounded, {candidate.text} % and {baseline.text} %,"
            yield Reading(name=name, span=Span(value, value, value))


def _stated_means(aggregate: PublishedAggregate, published: Published) -> tuple[list[Stated], list[Stated]]:
    """The stated means of both columns that a summary is made of: the candidate's, and the baseline's."""
    here = [one for one in published.aggregates if one.kinds == aggregate.kinds]
    candidate, baseline = ([one.percent for one in here if one.of == arm] for arm in ("candidate", "baseline"))
    return candidate, baseline


def _rounded_pairs(
    means: Sequence[Span], stated: tuple[list[Stated], list[Stated]], tasks: Sequence[PublishedTask]
) -> Iterator[tuple[Stated, Stated]]:
    known = [[one for one in found if mean.meets(one.span())] for mean, found in zip(means, stated, strict=True)]
    if all(known):
        yield from product(*known)
        return
    own = max(task.candidate.decimals for task in tasks), max(task.baseline.decimals for task in tasks)
    for places in dict.fromkeys([own, (own[0], own[0]), (own[1], own[1])]):
        if all((mean.high - mean.low) * 10**one <= MOST_ROUNDINGS for mean, one in zip(means, places, strict=True)):
            yield from product(
                *(
                    [Stated(value=value, decimals=one) for value in mean.roundings(one)]
                    for mean, one in zip(means, places, strict=True)
                )
            )


def _named(name: str, how: str) -> str:
    """A mean of ratios is called unweighted only where it could be weighted."""
    plain = name == OF_RATIOS and how == "unweighted"
    return name.format("" if plain else how).strip()


def aggregates(published: Published) -> Iterator[AuditLine]:
    """Each stated summary with the readings that give it, or with all that do not."""
    for aggregate in published.aggregates:
        tasks = of_kinds(published.tasks, aggregate.kinds)
        readings = _readings(aggregate, tasks)
        unit = " points" if aggregate.of == "difference" else " %"
        stated = f"{aggregate.name}: stated {aggregate.percent.text}{unit}"
        decimals = max(2, aggregate.percent.decimals + 1)  # one more, so that what contradicts looks different
        fitting = _fitting(readings, aggregate.percent)
        if not fitting:
            fitting = _first_of_all(_of_rounded_means(aggregate, tasks, published), aggregate.percent)
            readings += fitting
        listed = ", ".join(reading.text(decimals, unit, aggregate.percent) for reading in readings)
        if not fitting:
            why = _if_cut(aggregate, tasks) + _untried(aggregate, tasks)
            text = f"{stated} over {plural(len(tasks), 'task')}, recomputed {listed}{why}"
            yield AuditLine(kind="CONTRADICTS", text=text)
            continue
        text = f"{stated} {_is_or_fits(fitting, aggregate.percent)} of {plural(len(tasks), 'task')}: {listed}"
        text += _means(tasks) if aggregate.of == "retention" else ""
        yield AuditLine(kind=_kind(fitting, aggregate.percent), text=text)


def _fitting(readings: Iterable[Reading], stated: Stated) -> list[Reading]:
    return [reading for reading in readings if reading.fits(stated)]


def _first_of_all(readings: Iterable[Reading], stated: Stated) -> list[Reading]:
    """The first that fits, if any, with the ends of all: any of them may have been meant."""
    every = list(readings)
    fitting = _fitting(every, stated)[:1]
    low, high = (end(one.span.value for one in every) if every else None for end in (min, max))
    return [replace(one, span=Span(one.span.value, low, high)) for one in fitting if low is not None is not high]


def _kind(fitting: Sequence[Reading], stated: Stated) -> Kind:
    return "CONFIRMS" if any(one.is_only(stated) for one in fitting) else "FITS"


def _is_or_fits(fitting: Sequence[Reading], stated: Stated) -> str:
    """What a figure is, and what it only fits, as others would."""
    only = [one.name for one in fitting if one.is_only(stated)]
    other = [one.name for one in fitting if not one.is_only(stated)]
    parts = [f"{verb} the {' or the '.join(names)}" for verb, names in (("is", only), ("fits", other)) if names]
    return " and ".join(parts)


def _means(tasks: Sequence[PublishedTask]) -> str:
    candidate, baseline = (_mean(column, [1] * len(tasks)) for column in _columns(tasks))
    return f"; the means are {float(candidate.value):.3f} % and {float(baseline.value):.3f} %"


def _if_cut(aggregate: PublishedAggregate, tasks: Sequence[PublishedTask]) -> str:
    """Whether digits that were dropped instead of rounded would explain it: a remark, and no excuse."""
    cut = aggregate.percent.span(cut=True)
    if any(reading.span.meets(cut) for reading in _readings(aggregate, tasks, cut=True)):
        return "; it would fit had all figures been cut off instead of rounded"
    return ""


def _untried(aggregate: PublishedAggregate, tasks: Sequence[PublishedTask]) -> str:
    """Which sizes a mean over documents would need."""
    unknown = [task.name for task in tasks if task.num_documents is None]
    if not unknown or len(tasks) == 1:
        return ""
    named = ", ".join(unknown[:SHOWN]) + (f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else "")
    return f"; not tried weighted by documents, as num_documents is missing for {named}"


def speedups(published: Published) -> Iterator[AuditLine]:
    """Each stated speedup against the rates or other speedups that it is made of."""
    rates = {rate.name: rate for rate in published.rates}
    factors = {speedup.name: speedup for speedup in published.speedups}
    for speedup in published.speedups:
        if speedup.of:
            yield from _of_rates(speedup, rates[speedup.of[0]], rates[speedup.of[1]])
        if speedup.product_of:
            parts = [factors[name].factor for name in speedup.product_of]
            text = f"the product of {', '.join(f'{part.text}x' for part in parts)}"
            yield _compared(speedup, [Reading(name=text, span=_product(parts))])


def _of_rates(speedup: PublishedSpeedup, first: PublishedRate, second: PublishedRate) -> Iterator[AuditLine]:
    quotient = ratio(first.tokens_per_s.span(), second.tokens_per_s.span())
    shown = f"{first.tokens_per_s.text} / {second.tokens_per_s.text} tokens/s"
    readings = [Reading(name=shown, span=quotient)]
    if first.devices and second.devices and first.devices != second.devices:
        each = quotient.times(Fraction(second.devices, first.devices))
        readings.append(Reading(name=f"per device, on {first.devices} and {second.devices} of them", span=each))
    if not _fitting(readings, speedup.factor):
        readings = _first_of_all(_of_rounded_rates(first, second), speedup.factor) or readings
    yield _compared(speedup, readings, upside_down=Reading(name="", span=ratio(*reversed(_spans(first, second)))))
    if first.batch_size and second.batch_size and first.batch_size != second.batch_size:
        sizes = f"batch {first.batch_size} against batch {second.batch_size}"
        yield AuditLine(kind="REMARK", text=f"{speedup.name}: its rates were measured at {sizes}")


def _of_rounded_rates(first: PublishedRate, second: PublishedRate) -> Iterator[Reading]:
    """Quotients of the two rates after rounding to as many decimals as the coarser one has."""
    rates = first.tokens_per_s, second.tokens_per_s
    decimals = min(rate.decimals for rate in rates)
    for above, below in product(*(Span(rate.value, rate.value, rate.value).roundings(decimals) for rate in rates)):
        if below > 0:
            shown = " / ".join(Stated(value=one, decimals=decimals).text for one in (above, below))
            value = above / below
            yield Reading(name=f"{shown} tokens/s, once rounded,", span=Span(value, value, value))


def _spans(first: PublishedRate, second: PublishedRate) -> tuple[Span, Span]:
    return first.tokens_per_s.span(), second.tokens_per_s.span()


def _product(parts: Sequence[Stated]) -> Span:
    product = Span(Fraction(1), Fraction(1), Fraction(1))
    for one in (part.span() for part in parts):
        product = Span(product.value * one.value, product.low * one.low, product.high * one.high)
    return product


def _compared(speedup: PublishedSpeedup, readings: Sequence[Reading], upside_down: Reading | None = None) -> AuditLine:
    decimals = max(2, speedup.factor.decimals + 1)
    listed = ", ".join(reading.text(decimals, "x", speedup.factor) for reading in readings)
    fitting = _fitting(readings, speedup.factor)
    if fitting:
        kind = _kind(fitting, speedup.factor)
        verb = "is" if kind == "CONFIRMS" else "fits"
        return AuditLine(kind=kind, text=f"{speedup.name}: stated {speedup.factor.text}x {verb} {listed}")
    swapped = upside_down is not None and upside_down.fits(speedup.factor)
    hint = "; the rates in the other order would give it" if swapped else ""
    text = f"{speedup.name}: stated {speedup.factor.text}x, recomputed {listed}{hint}"
    return AuditLine(kind="CONTRADICTS", text=text)
