"""Measuring as the verbs do it: the power line comes first, and timed answers are scored afterwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from twotower_eval.analyse import stats
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.suites import BuiltTask
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.progress import Progress, SilentProgress


def evaluated(plan: RunPlan, *, root: Path, resume: Path | None = None, progress: Progress | None = None) -> Path:
    """Score both arms and return the run's folder; the power line is shown before anything is answered.

    See :func:`harness.answer`.
    """
    progress = progress or SilentProgress()
    prepared = harness.prepare(plan)
    line = power_line(prepared.tasks, prepared.scored_once) if prepared.compares else None
    if line is not None:
        progress.note(line)
    return harness.answer(prepared, root=root, resume=resume, progress=progress)


def timed_and_scored(
    plan: SpeedPlan, *, root: Path, resume: Path | None = None, progress: Progress | None = None
) -> Path:
    """Time both arms, then score the timed answers; the run's folder.

    The answers of a fixed workload are not scored: it takes only prompts from the tasks. See :func:`speed.run`.
    """
    tasks = harness.timed_tasks(plan)
    requests = suites.build_requests(tasks)  # the plan's number is chosen from all of them
    if plan.workload != "answer":
        return speed.run(plan, requests, root=root, resume=resume, progress=progress)
    settled = suites.settle(tasks, temperature=plan.temperature, samples=plan.samples, timed=True)
    path = speed.run(
        plan,
        requests,
        root=root,
        resume=resume,
        progress=progress,
        temperature=settled.temperature,
        overrides=settled.overrides,
    )
    return harness.score_journal(path)


def power_line(tasks: Sequence[BuiltTask], scored_once: Collection[str]) -> str | None:
    """The power line: the smallest drop of retention that these documents can show, and what that assumes.

    Empty (``None``) without a headline. Members of a multi-language task count once, by the problems that they share.
    """
    clusters: dict[str, set[str]] = {}
    for task in (task for task in tasks if task.headline):
        clusters.setdefault(task.group or task.name, set()).update(doc.cluster_id for doc in task.docs)
    once = {task.group or task.name for task in tasks if task.name in scored_once}
    once -= {task.group or task.name for task in tasks if task.name not in scored_once}
    planned = [
        stats.PlannedTask(
            name=name,
            num_clusters=len(own),
            accuracy=stats.ASSUMED_ACCURACY,
            discordance=0.0 if name in once else stats.ASSUMED_DISCORDANCE,
        )
        for name, own in clusters.items()
    ]
    return stats.power_text(stats.power_plan(planned, 1.0)) if planned else None
