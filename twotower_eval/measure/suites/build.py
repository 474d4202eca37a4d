"""From task and suite names to documents and requests, built once for all models.

lm-eval loads the tasks, makes the prompts and later scores the answers. Few-shot prompts of lm-eval's random sampler
depend on a document's position, so all requests are built first and then cut to ``limit``: a document has the same
prompt at any limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from twotower_eval.errors import UserError
from twotower_eval.measure.suites import groups, lm_tasks
from twotower_eval.measure.suites.asked import DecodingRequest, merged
from twotower_eval.measure.suites.documents import (
    BuildOptions,
    BuiltDoc,
    build_docs,
    check_options,
    generates,
    joined,
    joins,
)
from twotower_eval.measure.suites.groups import SuiteTask, load_suite, suite_names
from twotower_eval.measure.suites.lm_types import Task
from twotower_eval.measure.suites.parts import task_parts
from twotower_eval.names import did_you_mean
from twotower_eval.records import MEAN, canonical_json, sha256_text
from twotower_eval.strict import JsonObject


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltTask:
    """One task, ready for models: what a cell works on.

    ``digest`` covers every document and request of the task, independent of the limit, and the code that asks and
    scores; ``parts`` are its components (see suites.parts). ``asked_samples`` is the number that the task or the suite
    names. ``pools_samples``: the task's filters take all samples of a problem together, as in lm-eval, so its score is
    no mean over samples. ``joins``: clusters to merge because they hold near-duplicates.
    """

    name: str
    group: str | None
    request: str  # "generate_until", "loglikelihood" or "loglikelihood_rolling"
    docs: tuple[BuiltDoc, ...]
    num_docs_in_all: int
    samples: int
    asked_samples: int | None
    pools_samples: bool
    asked: DecodingRequest
    max_new_tokens: int | None
    metric: str
    filter: str
    headline: bool
    digest: str
    parts: Mapping[str, str]
    spec: SuiteTask
    by_size: bool = False  # the group's mean weighs it by its documents
    joins: tuple[tuple[str, str], ...] = ()

    @property
    def generates(self) -> bool:
        """Whether the task is answered by generated text."""
        return self.request == "generate_until"


@dataclass(frozen=True, kw_only=True)
class TimedPrompt:
    """A prompt for ``speed``, with what is needed to find its document again for scoring."""

    task: str
    doc_id: int
    text: str
    stop: tuple[str, ...]
    max_new_tokens: int
    prompt_sha256: str
    task_parts: Mapping[str, str] = field(default_factory=dict)  # those of its task
    cluster_id: str | None = None


def resolve_tasks(
    names: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
) -> list[BuiltTask]:
    """Build the named tasks: suites, members (``SUITE/TASK``), tasks under ``tasks/``, stock lm-eval tasks.

    ``-NAME`` leaves a task out. ``limit`` keeps the first documents of each task (of each subject, if lm-eval's task is
    a group). ``seed`` changes the few-shot examples of tasks that draw them. ``samples``, ``max_new_tokens`` and
    ``temperature`` override suite and task; :func:`settle` reports that. UserError for unknown names, tasks that
    execute model output, settings that no decoder here follows, and data that is missing or does not fit.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder; `twotower-eval data prepare` makes one")
    build_options = BuildOptions(
        None if data_dir is None else Path(data_dir), limit, seed, samples, max_new_tokens, temperature
    )
    with lm_tasks.quiet():
        built = [task for member in select(names) for task in _build(member, build_options)]
    twice = {task.name for task in built if sum(other.name == task.name for other in built) > 1}
    if twice:
        raise UserError(f"task {min(twice)!r} is named twice, alone and as a part of another")
    pairs = [*chain.from_iterable(task.joins for task in built)]
    return [dataclasses.replace(task, docs=joined(task.docs, pairs)) for task in built] if pairs else built


def build_requests(tasks: Sequence[BuiltTask], num: int | None = None) -> list[TimedPrompt]:
    """``num`` prompts (``None``: all) of the generation tasks, taking turns between tasks, documents in order."""
    by_task = [[(task, doc) for doc in task.docs] for task in tasks if task.generates]
    if not by_task:
        raise UserError(f"none of the tasks {', '.join(t.name for t in tasks)} generates text: nothing to time")
    in_turn = [pair for round_ in zip_longest(*by_task) for pair in round_ if pair is not None]
    if num is not None and len(in_turn) < num:
        raise UserError(f"only {len(in_turn)} prompts in the tasks, {num} wanted: name more tasks or ask for fewer")
    prompts = []
    for task, doc in in_turn[:num]:
        text, settings = doc.instances[0].args
        prompts.append(
            TimedPrompt(
                task=task.name,
                doc_id=doc.doc_id,
                text=text,
                stop=tuple(settings["until"]),
                max_new_tokens=settings["max_gen_toks"],
                prompt_sha256=doc.prompt_sha256,
                task_parts=task.parts,
                cluster_id=doc.cluster_id,
            )
        )
    return prompts


def select(names: Sequence[str]) -> list[SuiteTask]:
    """The tasks that names stand for, before any data is read; UserError for tasks that execute model output."""
    chosen: dict[str, SuiteTask] = {}
    for name in names:
        if name.startswith("-"):
            continue
        for task in _named(name):
            if chosen.setdefault(task.name, task) != task:
                raise UserError(f"task {task.name!r} is named twice with different settings (by {name!r} and before)")
    for name in names:
        if name.startswith("-") and chosen.pop(name[1:], None) is None:
            raise UserError(f"cannot leave out {name[1:]!r}: not among the tasks{did_you_mean(name[1:], chosen)}")
    if not chosen:
        raise UserError("no task is left to run")
    _refuse_code([task.name for task in chosen.values() if task.executes_code], names)
    return list(chosen.values())


def _refuse_code(tasks: Sequence[str], names: Sequence[str]) -> None:
    if tasks:
        without = ",".join([name for name in names if name not in tasks] + [f"-{task}" for task in tasks])
        alone = all(name in tasks for name in names)
        hint = "" if alone else f"; to run without: --tasks {without}"
        raise UserError(f"{', '.join(tasks)}: scoring executes model output, refused while there is no sandbox{hint}")


def _named(name: str) -> Sequence[SuiteTask]:
    suite, slash, member = name.partition("/")
    if slash:
        tasks = {task.name: task for task in load_suite(suite).tasks}
        if member not in tasks:
            raise UserError(f"suite {suite!r} has no task {member!r}{did_you_mean(member, tasks)}")
        return [tasks[member]]
    if name in suite_names():
        return load_suite(name).tasks
    if name.partition(groups.WITHIN)[0] not in lm_tasks.index_of(name.partition(groups.WITHIN)[0]):
        known = [*suite_names(), *lm_tasks.local_index(), *lm_tasks.stock_index()]
        raise UserError(f"unknown task {name!r}{did_you_mean(name, known)}: no suite, local task or lm-eval task")
    single = groups.apart(groups.node(name))
    return [SuiteTask(name=one.name, parts={"": one.path}, executes_code=groups.executes_code(one)) for one in single]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """A single lm-eval task with the settings that override its own."""

    node: groups.Node
    given: JsonObject
    source: Task


def _build(member: SuiteTask, build_options: BuildOptions) -> Iterator[BuiltTask]:
    """A task for each part. A group whose members cannot be scored as one task gives a task for each member."""
    for label, path in member.parts.items():
        name = f"{member.name}_{label}" if label else member.name
        top = groups.node(path)
        loaded = [_load(leaf, member, build_options) for leaf in groups.leaves(top)]
        known = [groups.facts(one.node.name, one.source) for one in loaded]
        figure = groups.figure(name, top.rules, known, member.metric, member.filter)
        if figure.together:
            group = member.name if label else None
            yield _build_part(name, group, top, loaded, figure, member, build_options)
        elif label:
            raise UserError(f"task {name!r}: {path!r} is no task and no group whose documents are scored alike")
        else:
            yield from _members(name, loaded, known, figure, member, build_options)


def _members(
    name: str,
    loaded: Sequence[_Loaded],
    known: Sequence[groups.Facts],
    figure: groups.Figure,
    member: SuiteTask,
    build_options: BuildOptions,
) -> Iterator[BuiltTask]:
    """The tasks of a group. Those with its metric are parts of its figure; a headline takes all of these or none."""
    has = [fact.has(figure.metric, figure.filter) for fact in known]
    averages = all(_averages(one.source, figure.metric) for one, there in zip(loaded, has, strict=True) if there)
    for one, fact, there in zip(loaded, known, has, strict=True):
        own = figure if there else groups.figure(one.node.name, (), [fact])
        built = _build_part(one.node.name, name if there else None, one.node, [one], own, member, build_options)
        headline = built.headline and there and averages
        yield dataclasses.replace(built, by_size=there and figure.by_size, headline=headline)


def _load(leaf: groups.Node, member: SuiteTask, build_options: BuildOptions) -> _Loaded:
    shots = {} if member.num_fewshot is None else {"num_fewshot": member.num_fewshot}
    given = {**leaf.settings, **shots}
    return _Loaded(node=leaf, given=given, source=lm_tasks.load_task(leaf.name, given, build_options.data_dir))


def _build_part(
    name: str,
    group: str | None,
    top: groups.Node,
    loaded: Sequence[_Loaded],
    figure: groups.Figure,
    member: SuiteTask,
    build_options: BuildOptions,
) -> BuiltTask:
    kept: list[BuiltDoc] = []
    every: list[BuiltDoc] = []
    repeats: set[int] = set()
    for one in loaded:
        repeats.add(one.source.config.repeats)
        docs = build_docs(name, one.node.name, one.source, len(every), member, build_options)
        every += docs
        kept += docs[: build_options.limit]
    check_options(kept)
    sampled = _samples(name, repeats, kept[0], member, build_options)
    sources = [one.source for one in loaded]
    for source in sources:
        _check_samples(name, source, sampled["samples"])
    parts = task_parts(top, [one.given for one in loaded], sources, every, member)
    return BuiltTask(
        name=name,
        group=group,
        request=kept[0].instances[0].request_type,
        docs=tuple(kept),
        num_docs_in_all=len(every),
        **sampled,
        asked=_asked(name, kept),
        max_new_tokens=_largest_budget(kept),
        metric=figure.metric,
        filter=figure.filter,
        # An average of ratios takes means of which more is better, and nothing else.
        headline=member.headline and all(_averages(source, figure.metric) for source in sources),
        digest=sha256_text(canonical_json(parts)),
        joins=joins(every),
        parts=parts,
        spec=member,
    )


def _largest_budget(docs: Sequence[BuiltDoc]) -> int | None:
    budgets = [i.args[1]["max_gen_toks"] for doc in docs for i in doc.instances if generates(i)]
    return max(budgets, default=None)


def _averages(source: Task, metric: str) -> bool:
    """Whether a metric is absent, or a mean over documents of which higher is better."""
    if metric not in source.higher_is_better():
        return True
    more_is_better = source.higher_is_better()[metric] is not False
    return more_is_better and lm_tasks.aggregation_name(source, metric) == MEAN


def _samples(
    name: str, repeats: set[int], doc: BuiltDoc, member: SuiteTask, build_options: BuildOptions
) -> dict[str, Any]:
    """The BuiltTask fields about samples: the given number, else the suite's, else lm-eval's ``repeats``."""
    given = build_options.samples or member.samples
    if len(repeats) > 1 and not given:
        raise UserError(f"task {name!r}: its parts differ in samples {sorted(repeats)}: give --samples")
    asked = member.samples or max(repeats)
    # Log-likelihoods are the same however often they are asked for.
    samples = given or asked if generates(doc.instances[0]) else 1
    asked_samples = asked if member.samples or asked > 1 else None
    return {"samples": samples, "asked_samples": asked_samples, "pools_samples": samples > 1 and not given}


def _asked(name: str, docs: Sequence[BuiltDoc]) -> DecodingRequest:
    try:
        return merged(frozenset[DecodingRequest]().union(*(doc.asked for doc in docs)))
    except UserError as error:
        raise UserError(f"task {name!r}: {error}") from error


def _check_samples(name: str, source: Task, samples: int) -> None:
    """UserError if a filter needs more samples of each problem than there are."""
    steps = [(f["name"], step) for f in source.config.filter_list or [] for step in f["filter"]]
    for filter_name, step in steps:
        if step["function"] == "take_first_k" and step["k"] > samples:
            raise UserError(
                f"task {name!r}: filter {filter_name!r} needs {step['k']} samples of each problem: "
                f"give --samples {step['k']} and a --temperature above 0"
            )
