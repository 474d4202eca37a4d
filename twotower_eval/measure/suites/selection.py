"""From names to tasks: suites and their members, tasks, groups, tags, wildcards, and paths of task and suite files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.measure.suites import groups, lm_tasks
from twotower_eval.measure.suites.groups import SuiteTask, load_suite, suite_names
from twotower_eval.measure.suites.included import SUITE_FILE, Included, is_path, is_pattern, matching, nearest_path
from twotower_eval.names import did_you_mean, nearest

NOTHING = Included()


def select(names: Sequence[str], included: Included = NOTHING) -> list[SuiteTask]:
    """The tasks that names stand for, before any data is read; UserError for tasks that execute model output.

    A name is a suite, ``SUITE/TASK``, a task, a group or a tag, or a wildcard over these (``arc_*``, ``SUITE/mgsm*``);
    ``-NAME`` leaves out what it names. Paths of task files are in ``included``, those of suites are read here.
    """
    chosen: dict[str, SuiteTask] = {}
    by_wildcard: dict[str, str] = {}
    for name in names:
        if name.startswith("-"):
            continue
        for task in _named(name, included):
            if chosen.setdefault(task.name, task) != task:
                raise UserError(f"task {task.name!r} is named twice with different settings (by {name!r} and before)")
            if is_pattern(name) and "/" not in name:
                by_wildcard.setdefault(task.name, name)
    for name in names:
        if name.startswith("-"):
            _leave_out(name[1:], chosen)
    if not chosen:
        raise UserError("no task is left to run")
    _refuse_code([task.name for task in chosen.values() if task.executes_code], names)
    _refuse_overlap(chosen, by_wildcard, included)
    return list(chosen.values())


def _leave_out(name: str, chosen: dict[str, SuiteTask]) -> None:
    found = matching(name, chosen) if is_pattern(name) else [name] if name in chosen else []
    if not found:
        raise UserError(f"cannot leave out {name!r}: not among the tasks{did_you_mean(name, chosen)}")
    for one in found:
        del chosen[one]


def _refuse_code(tasks: Sequence[str], names: Sequence[str]) -> None:
    if tasks:
        without = ",".join([name for name in names if name not in tasks] + [f"-{task}" for task in tasks])
        alone = all(name in tasks for name in names)
        hint = "" if alone else f"; to run without: --tasks {without}"
        raise UserError(f"{', '.join(tasks)}: scoring executes model output, refused while there is no sandbox{hint}")


def _refuse_overlap(chosen: dict[str, SuiteTask], by_wildcard: dict[str, str], included: Included) -> None:
    """UserError, as in lm-eval, where a wildcard matches a group and a task of it: that task would count twice."""
    first: dict[str, str] = {}
    for task in (chosen[name] for name in by_wildcard if name in chosen):
        for path in task.parts.values():
            for leaf in groups.leaves(groups.node(path, included.indexes)):
                other = first.setdefault(leaf.name, task.name)
                if other != task.name:
                    group = other if task.name == leaf.name else task.name
                    raise UserError(
                        f"{by_wildcard[task.name]!r} matches {other!r} and {task.name!r}, which both have task "
                        f"{leaf.name!r}: leave one of them out, as with -{group}"
                    )


def _named(name: str, included: Included) -> Sequence[SuiteTask]:
    """The tasks of one name or path."""
    if paths := included.tasks_at(name):
        return [task for one in paths for task in _single(one, included)]
    if name.endswith(SUITE_FILE):
        return load_suite(name).tasks
    suite, slash, member = name.rpartition("/")
    if slash and (suite.endswith(SUITE_FILE) or not is_path(name)):
        return _members(suite, member)
    if is_path(name):
        raise UserError(f"no task file or folder {name}{nearest_path(Path(name).expanduser())}")
    if is_pattern(name):
        known = [*included.names, *lm_tasks.local_index(), *lm_tasks.stock_index()]
        found = matching(name, known)
        if not found or included.broken:
            _refuse_unread(included)
        if not found:
            raise UserError(f"{name!r} matches no task{_near_pattern(name, known)}: no local task and none of lm-eval")
        return [task for one in found for task in _single(one, included)]
    if name in suite_names() and name not in included.names:
        return load_suite(name).tasks
    return _single(name, included)


def _near_pattern(pattern: str, known: Sequence[str]) -> str:
    """`` (did you mean 'arc_*'?)`` for a pattern whose beginning is nearly that of a known name."""
    head = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    near = nearest(head, dict.fromkeys(name[: len(head)] for name in known)) if head else None
    wanted = None if near is None else near + pattern[len(head) :]
    return f" (did you mean {wanted!r}?)" if wanted is not None and matching(wanted, known) else ""


def _members(suite: str, member: str) -> Sequence[SuiteTask]:
    """A task of a suite, or all that a wildcard matches."""
    tasks = {task.name: task for task in load_suite(suite).tasks}
    found = matching(member, tasks) if is_pattern(member) else [member] if member in tasks else []
    if not found:
        raise UserError(f"suite {suite!r} has no task {member!r}{did_you_mean(member, tasks)}")
    return [tasks[one] for one in tasks if one in found]


def _single(name: str, included: Included) -> Sequence[SuiteTask]:
    """The tasks of a name that lm-eval's index or the user's own folders hold."""
    top = name.partition(groups.WITHIN)[0]
    if top not in lm_tasks.index_of(top, included.indexes):
        _refuse_unread(included)
        known: Iterable[str] = [*included.names, *suite_names(), *lm_tasks.local_index(), *lm_tasks.stock_index()]
        raise UserError(f"unknown task {name!r}{did_you_mean(name, known)}: no suite, local task or lm-eval task")
    single = groups.apart(groups.node(name, included.indexes))
    return [SuiteTask(name=one.name, parts={"": one.path}, executes_code=groups.executes_code(one)) for one in single]


def _refuse_unread(included: Included) -> None:
    """UserError for a file of an included folder that cannot be read: what was looked for may be in it."""
    if included.broken:
        more = f" (and {len(included.broken) - 1} more)" if len(included.broken) > 1 else ""
        raise UserError(f"{included.broken[0]}{more}")
