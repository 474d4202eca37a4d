"""Published numbers alone: do they follow from one another, and what do they give away?

Nothing is measured here. A stated aggregate that no usual reading gives back CONTRADICTS the table it summarises;
everything else is a remark. Percentages are taken as printed, to the digit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from twotower_eval import stats
from twotower_eval.claims.published import Published, PublishedAggregate, PublishedSpeedup, PublishedTask
from twotower_eval.evidence.numbers import TIMES

EXIT_CONTRADICTED = 3
Kind = Literal["CONFIRMS", "CONTRADICTS", "REMARK"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that an audit found, in words."""

    kind: Kind
    text: str


def audit(published: Published | None) -> tuple[Finding, ...]:
    """All findings, in the order aggregates, granularity, identical columns, speedups, variants."""
    if published is None:
        raise ValueError("this claim file has no [published] numbers, so there is nothing to audit")
    return (
        *_aggregates(published),
        *_readings(published),
        *_granularity(published),
        *_identical(published),
        *_speedups(published.speedups),
        *_gaps(published),
    )


def audit_code(findings: Sequence[Finding]) -> int:
    """3 where something contradicts, else 0: remarks are no contradictions."""
    return EXIT_CONTRADICTED if any(finding.kind == "CONTRADICTS" for finding in findings) else 0


def ratio_of_means(tasks: Sequence[PublishedTask]) -> float:
    """Percent: the unweighted mean of the candidate's column over that of the baseline's."""
    return 100 * sum(task.candidate for task in tasks) / sum(task.baseline for task in tasks)


def mean_of_ratios(tasks: Sequence[PublishedTask]) -> float:
    """Percent: the unweighted mean of every task's own ratio."""
    return 100 * sum(task.candidate / task.baseline for task in tasks) / len(tasks)


READINGS: dict[str, Callable[[Sequence[PublishedTask]], float]] = {
    "ratio of the unweighted means": ratio_of_means,
    "mean of per-task ratios": mean_of_ratios,
}


def _of_kinds(published: Published, kinds: Sequence[str]) -> list[PublishedTask]:
    return [task for task in published.tasks if not kinds or set(kinds) & set(task.kinds)]


def _aggregates(published: Published) -> Iterator[Finding]:
    for aggregate in published.aggregates:
        tasks = _of_kinds(published, aggregate.kinds)
        values = {name: reading(tasks) for name, reading in READINGS.items()}
        fitting = [name for name, value in values.items() if _rounds_to(value, aggregate)]
        stated = f"{aggregate.name}: stated {aggregate.percent:.{aggregate.decimals}f} %"
        decimals = max(2, aggregate.decimals + 1)  # one more than stated, so that what contradicts looks different
        listed = ", ".join(f"{name} {value:.{decimals}f} %" for name, value in values.items())
        if not fitting:
            yield Finding(kind="CONTRADICTS", text=f"{stated} over {len(tasks)} tasks, recomputed {listed}")
            continue
        means = [sum(getattr(task, arm) for task in tasks) / len(tasks) for arm in ("candidate", "baseline")]
        text = f"{stated} is the {' or the '.join(fitting)} of {len(tasks)} tasks: {listed}"
        yield Finding(kind="CONFIRMS", text=f"{text}; the means are {means[0]:.3f} % and {means[1]:.3f} %")


def _rounds_to(value: float, aggregate: PublishedAggregate) -> bool:
    """Half a unit in the last place either way, as rounding conventions differ."""
    return abs(value - aggregate.percent) <= 0.5 * 10.0**-aggregate.decimals + 1e-9


def _readings(published: Published) -> Iterator[Finding]:
    """What the table says of each kind of task, and of code and math together."""
    kinds = list(dict.fromkeys(kind for task in published.tasks for kind in task.kinds))
    groups: list[tuple[str, ...]] = [(kind,) for kind in kinds]
    if {"code", "math"} <= set(kinds):
        groups.append(("code", "math"))
    for group in groups:
        tasks = _of_kinds(published, group)
        name, num = " + ".join(group).replace("_", " "), len(tasks)
        text = f"{name} ({num} task{'s' if num > 1 else ''}: {', '.join(task.name for task in tasks)})"
        yield Finding(kind="REMARK", text=f"{text}: retention {ratio_of_means(tasks):.2f} %")


def _granularity(published: Published) -> Iterator[Finding]:
    """Percentages that are no k of the task's documents, and how many samples each would make them possible.

    A percentage that fits is a remark only where another could have failed to; the others are counted in one line.
    """
    vacuous = []
    for task in published.tasks:
        if task.num_documents is None or not task.single_mean:
            continue
        places = {"AR baseline": task.baseline, "candidate": task.candidate}
        places |= {score.where: score.percent for score in published.scores if score.task == task.name}
        if stats.can_misfit(published.decimals, task.num_documents):
            # None and all of n are possible whatever n is.
            telling = {where: percent for where, percent in places.items() if 0 < percent < 100}
            yield from _task_granularity(task, telling, published.decimals)
        else:
            telling = {}
        vacuous += [(task, num)] if (num := len(places) - len(telling)) else []
    if vacuous:
        num, names = sum(num for _, num in vacuous), ", ".join(_size(task) for task, _ in vacuous)
        checks = "1 check of granularity" if num == 1 else f"{num} checks of granularity"
        decimals = f"{published.decimals} decimal{'' if published.decimals == 1 else 's'}"
        why = f"could not have failed and {'is' if num == 1 else 'are'} left out"
        text = f"{checks} at {decimals} {why}: {names}"
        yield Finding(kind="REMARK", text=text)


def _size(task: PublishedTask) -> str:
    return f"{task.name} (n = {task.num_documents})"


def _task_granularity(task: PublishedTask, places: dict[str, float], decimals: int) -> Iterator[Finding]:
    n = task.num_documents
    assert n is not None, "the caller leaves out tasks of unknown size"
    counts = {where: stats.possible_counts(percent, decimals, n) for where, percent in places.items()}
    fitting = [
        f"{places[where]:.{decimals}f} % ({where}) = {found[0]}/{n}"
        for where, found in counts.items()
        if len(found) == 1
    ]
    if fitting:
        yield Finding(kind="REMARK", text=f"{task.name}: {', '.join(fitting)}: as from one greedy run")
    odd = [where for where, found in counts.items() if not found]
    if not odd:
        return
    shown = ", ".join(f"{places[where]:.{decimals}f} % ({where})" for where in odd)
    smallest = stats.smallest_samples([places[where] for where in odd], decimals, n)
    verb = "is" if len(odd) == 1 else "are"
    yield Finding(kind="REMARK", text=f"{task.name}: {shown} {verb} no k/{n}: {_fewest(smallest, decimals, n, odd)}")


def _fewest(smallest: int | None, decimals: int, n: int, odd: Sequence[str]) -> str:
    """What is known of the number of samples a problem, where one sample does not fit."""
    if smallest is None:
        return "no number of samples up to 100 fits"
    if stats.can_misfit(decimals, n * smallest):
        return f"{smallest} samples a problem are the fewest that fit{' all of them' if len(odd) > 1 else ''}"
    return f"{smallest} samples a problem fit, but with so many every percentage does"


def _identical(published: Published) -> Iterator[Finding]:
    same = [task.name for task in published.tasks if task.baseline == task.candidate]
    if same:
        why = "very likely scored by the context tower that both share"
        yield Finding(kind="REMARK", text=f"{', '.join(same)}: identical in both columns, {why}")


def _speedups(speedups: Sequence[PublishedSpeedup]) -> Iterator[Finding]:
    for speedup in speedups:
        devices = speedup.baseline_devices, speedup.candidate_devices
        if devices[0] and devices[1] and devices[0] != devices[1]:
            each = speedup.factor * devices[0] / devices[1]
            text = f"{speedup.name}: {_factor(speedup)} on {devices[1]} devices against {devices[0]}"
            yield Finding(kind="REMARK", text=f"{text} is {each:.2f}x per device")
    by_block: dict[int, list[PublishedSpeedup]] = defaultdict(list)
    for speedup in speedups:
        by_block[speedup.block_size].append(speedup)
    for block_size, found in by_block.items():
        if len({speedup.factor for speedup in found}) > 1:
            listed = ", ".join(f"{_factor(speedup)} ({speedup.name})" for speedup in found)
            text = f"block {block_size} is stated at {listed}: they differ in something that is not stated"
            yield Finding(kind="REMARK", text=text)


def _factor(speedup: PublishedSpeedup) -> str:
    """As printed: two decimals, more where it has more."""
    decimals = next(places for places in range(2, 16) if round(speedup.factor, places) == speedup.factor)
    return TIMES.text(speedup.factor, decimals)


def _gaps(published: Published) -> Iterator[Finding]:
    """How far variants lie apart, group by group: the first one listed against each of the others."""
    for other in published.gaps[1:]:
        first = published.gaps[0]
        shared = [group for group in first.points if group in other.points]
        apart = ", ".join(f"{group} {first.points[group] - other.points[group]:+.1f}" for group in shared)
        yield Finding(kind="REMARK", text=f"{first.name} against {other.name}, points: {apart}")
