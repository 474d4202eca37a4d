"""Published numbers alone: do they follow from one another, and what do they reveal?

Nothing is measured here. A stated summary that no usual reading gives, whatever the figures were before rounding,
CONTRADICTS what it summarises (see ``recomputed``); everything else is a remark.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from twotower_eval.analyse import stats
from twotower_eval.analyse.claims.published import Published, PublishedSpeedup, PublishedTask, Stated
from twotower_eval.analyse.claims.recomputed import AuditLine as AuditLine
from twotower_eval.analyse.claims.recomputed import aggregates, of_kinds, retention, span_text, speedups
from twotower_eval.analyse.compare.figures import TIMES
from twotower_eval.errors import UserError

EXIT_CONTRADICTED = 3
BY_LIKELIHOOD = {"multiple_choice", "likelihood"}  # kinds of tasks that a model writes nothing for
TELLING_SHARE = 0.5  # of all percentages: where more of them fit, that one does says nothing
Places = Mapping[str, Stated]  # where a percentage of a task is printed


def audit(published: Published | None) -> tuple[AuditLine, ...]:
    """All results, in the order aggregates, kinds of task, granularity, identical columns,
    speedups, devices, variants.
    """
    if published is None:
        raise UserError("this claim file has no [published] numbers to audit")
    return (
        *aggregates(published),
        *_by_kind(published),
        *_granularity(published),
        *_identical(published),
        *speedups(published),
        *_devices(published),
        *_blocks(published.speedups),
        *_gaps(published),
    )


def audit_code(findings: Sequence[AuditLine]) -> int:
    """3 where a line contradicts, else 0."""
    return EXIT_CONTRADICTED if any(finding.kind == "CONTRADICTS" for finding in findings) else 0


def _by_kind(published: Published) -> Iterator[AuditLine]:
    """The retention of each kind of task, and of code and math together."""
    kinds = list(dict.fromkeys(kind for task in published.tasks for kind in task.kinds))
    groups: list[tuple[str, ...]] = [(kind,) for kind in kinds]
    if {"code", "math"} <= set(kinds):
        groups.append(("code", "math"))
    for group in groups:
        tasks = of_kinds(published.tasks, group)
        name, num = " + ".join(group).replace("_", " "), len(tasks)
        text = f"{name} ({num} task{'s' if num > 1 else ''}: {', '.join(task.name for task in tasks)})"
        yield AuditLine(kind="REMARK", text=f"{text}: retention {span_text(retention(tasks), 2, ' %')}")


def _granularity(published: Published) -> Iterator[AuditLine]:
    """Percentages that are no k / n of the task's documents, and how many samples each would make them possible.

    A fitting percentage is a remark only where most others would not fit; the rest are counted in one line.
    """
    vacuous: dict[tuple[int, bool], list[tuple[PublishedTask, int]]] = defaultdict(list)
    for task in published.tasks:
        if task.num_documents is None or not task.single_mean:
            continue
        places = {"AR baseline": task.baseline, "candidate": task.candidate}
        places |= {score.where: score.percent for score in published.scores if score.task == task.name}
        for decimals in sorted({one.decimals for one in places.values()}):
            own = {where: one for where, one in places.items() if one.decimals == decimals}
            can, likely = _can_misfit(decimals, task.num_documents)
            # None and all of n are possible whatever n is.
            telling = {where: one for where, one in own.items() if can and 0 < one.value < 100}
            fitting, odd = _fits(telling, task.num_documents)
            yield from _task_granularity(task, {**(fitting if likely else {}), **odd}, task.num_documents, decimals)
            if num := len(own) - len(telling):
                vacuous[decimals, False].append((task, num))
            if not likely and fitting:
                vacuous[decimals, True].append((task, len(fitting)))
    for (decimals, could), found in sorted(vacuous.items()):
        yield AuditLine(kind="REMARK", text=_vacuous_text(found, decimals, could))


def _can_misfit(decimals: int, n: int) -> tuple[bool, bool]:
    """Whether a percentage of n documents may fail to be some k / n, and whether most would."""
    return stats.can_misfit(decimals, n), stats.share_possible(decimals, n) <= TELLING_SHARE


def _fits(places: Places, n: int) -> tuple[dict[str, Stated], dict[str, Stated]]:
    """Those that are some k / n, and those that are not."""
    found = {where: stats.possible_counts(float(one), one.decimals, n) for where, one in places.items()}
    return tuple({where: places[where] for where in found if bool(found[where]) == fits} for fits in (True, False))  # type: ignore[return-value]


def _vacuous_text(found: Sequence[tuple[PublishedTask, int]], decimals: int, could: bool) -> str:
    num, names = sum(num for _, num in found), ", ".join(f"{task.name} (n = {task.num_documents})" for task, _ in found)
    checks = "1 check of granularity" if num == 1 else f"{num} checks of granularity"
    places = f"{decimals} decimal{'' if decimals == 1 else 's'}"
    why = "could hardly have failed, as most percentages fit," if could else "could not have failed"
    return f"{checks} at {places} {why} and {'is' if num == 1 else 'are'} left out: {names}"


def _task_granularity(task: PublishedTask, places: Places, n: int, decimals: int) -> Iterator[AuditLine]:
    counts = {where: stats.possible_counts(float(one), decimals, n) for where, one in places.items()}
    fitting = [f"{places[where].text} % ({where}) = {k[0]}/{n}" for where, k in counts.items() if len(k) == 1]
    if fitting:
        yield AuditLine(kind="REMARK", text=f"{task.name}: {', '.join(fitting)}: as from one greedy run")
    odd = [where for where, found in counts.items() if not found]
    if not odd:
        return
    shown = ", ".join(f"{places[where].text} % ({where})" for where in odd)
    smallest = stats.smallest_samples([float(places[where]) for where in odd], decimals, n)
    verb = "is" if len(odd) == 1 else "are"
    yield AuditLine(kind="REMARK", text=f"{task.name}: {shown} {verb} no k/{n}: {_fewest(smallest, decimals, n, odd)}")


def _fewest(smallest: int | None, decimals: int, n: int, odd: Sequence[str]) -> str:
    """What follows for the number of samples a problem, where one sample does not fit."""
    if smallest is None:
        return "no number of samples up to 100 fits"
    if stats.can_misfit(decimals, n * smallest):
        return f"{smallest} samples a problem are the fewest that fit{' all of them' if len(odd) > 1 else ''}"
    return f"{smallest} samples a problem fit, but with so many every percentage does"


def _identical(published: Published) -> Iterator[AuditLine]:
    """Equal figures in both columns; tasks that one computation may score for both models are listed apart."""
    same = [task for task in published.tasks if task.baseline.value == task.candidate.value]
    for by_likelihood, why in (
        (True, "one computation for both models, as of likelihoods of a tower that they share, or equal answers"),
        (False, "equal answers, or one column copied from the other"),
    ):
        found = [task for task in same if bool(BY_LIKELIHOOD & set(task.kinds)) == by_likelihood]
        if found:
            named = ", ".join(task.name for task in found)
            text = f"{named}: identical in both columns: {why}, or chance{_by_chance(found)}"
            yield AuditLine(kind="REMARK", text=text)


def _by_chance(tasks: Sequence[PublishedTask]) -> str:
    """How often models that are right independently of each other would print the same figure."""
    known = [
        (task.name, stats.chance_of_equal(float(task.baseline), task.baseline.decimals, task.num_documents))
        for task in tasks
        if task.num_documents is not None and task.single_mean and 0 < task.baseline.value < 100
    ]
    if not known:
        return ""
    listed = ", ".join(f"{name} {100 * chance:.1f} %" for name, chance in known)
    return f" (how often equally good models that err independently of each other print the same: {listed})"


def _devices(published: Published) -> Iterator[AuditLine]:
    rates = {rate.name: rate for rate in published.rates}
    for speedup in published.speedups:
        devices = speedup.baseline_devices, speedup.candidate_devices
        if speedup.of and None in devices:
            devices = rates[speedup.of[1]].devices, rates[speedup.of[0]].devices
        if devices[0] and devices[1] and devices[0] != devices[1]:
            each = float(speedup.factor) * devices[0] / devices[1]
            text = f"{speedup.name}: {_factor(speedup)} on {devices[1]} devices against {devices[0]}"
            yield AuditLine(kind="REMARK", text=f"{text} is {each:.2f}x per device")


def _blocks(speedups: Sequence[PublishedSpeedup]) -> Iterator[AuditLine]:
    by_block: dict[int, list[PublishedSpeedup]] = defaultdict(list)
    for speedup in speedups:
        if speedup.block_size is not None:
            by_block[speedup.block_size].append(speedup)
    for block_size, found in by_block.items():
        spans = [speedup.factor.span() for speedup in found]
        if any(not one.meets(other) for one in spans for other in spans):
            listed = ", ".join(f"{_factor(speedup)} ({speedup.name})" for speedup in found)
            text = f"block {block_size} is stated at {listed}: they differ in something that is not stated"
            yield AuditLine(kind="REMARK", text=text)


def _factor(speedup: PublishedSpeedup) -> str:
    """As printed."""
    return TIMES.text(float(speedup.factor), speedup.factor.decimals)


def _gaps(published: Published) -> Iterator[AuditLine]:
    """How far variants lie apart, by group: the first one listed against each of the others."""
    for other in published.gaps[1:]:
        first = published.gaps[0]
        shared = [group for group in first.points if group in other.points]
        apart = ", ".join(f"{group} {first.points[group] - other.points[group]:+.1f}" for group in shared)
        yield AuditLine(kind="REMARK", text=f"{first.name} against {other.name}, points: {apart}")
