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
from twotower_eval.measure.suites.groups import SuiteTask
from twotower_eval.measure.suites.included import read_included
from twotower_eval.measure.suites.lm_types import Task
from twotower_eval.measure.suites.parts import task_parts
from twotower_eval.measure.suites.selection import select
from twotower_eval.records import MEAN, PLAIN_TEXT, ChatOptions, Override, canonical_json, sha256_text
from twotower_eval.strict import JsonObject
from twotower_eval.task_options import BUDGET_NAMES, GenKwargs, GivenSeed, seeds_of


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltTask:
    """One task, ready for models: what a cell works on.

    ``digest`` covers every document and request of the task, independent of the limit, and the code that asks and
    scores; ``parts`` are its components (see suites.parts). ``asked_samples`` is the number that the task or the suite
    names. ``pools_samples``: the task's filters take all samples of a problem together, as in lm-eval, so its score is
    no mean over samples. ``joins``: clusters to merge because they hold near-duplicates. ``overrides``: what
    ``num_fewshot`` and ``gen_kwargs`` change of what suite and task say.
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
    overrides: tuple[Override, ...] = ()

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
    seed: GivenSeed = 0,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    include_path: Sequence[str] | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: GenKwargs | None = None,
    chat: ChatOptions = PLAIN_TEXT,
    render: lm_tasks.Render | None = None,
) -> list[BuiltTask]:
    """Build the named tasks: suites, members (``SUITE/TASK``), tasks of the folders ``include_path``, tasks under
    ``tasks/``, stock lm-eval tasks, and paths of task and suite files (see :func:`select`).

    ``-NAME`` leaves a task out. ``limit`` keeps the first documents of each task (of each subject, if lm-eval's task is
    a group). ``seed`` changes the few-shot examples of tasks that draw them, and whatever else tasks draw.
    ``num_fewshot`` and ``gen_kwargs`` override suite and task as in lm-eval, ``samples``, ``max_new_tokens`` and
    ``temperature`` these too; :func:`settle` reports that. ``render`` writes chats as the candidate reads them, asked
    as ``chat`` says; other models write the same messages in their own way. UserError for unknown names, tasks that
    execute model output, settings that no decoder here follows, and data that is missing or does not fit.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder; `twotower-eval data prepare` makes one")
    _refuse_twice("temperature", temperature, ("temperature", "do_sample"), gen_kwargs or {})
    _refuse_twice("max_new_tokens", max_new_tokens, BUDGET_NAMES, gen_kwargs or {})
    included = read_included(include_path or (), names)
    build_options = BuildOptions(
        data_dir=None if data_dir is None else Path(data_dir),
        limit=limit,
        seeds=seeds_of(seed),
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        included=included,
        num_fewshot=num_fewshot,
        gen_kwargs=gen_kwargs or {},
        chat=chat,
        render=render,
    )
    built: list[BuiltTask] = []
    with lm_tasks.quiet():
        for member in select(names, included):
            lm_tasks.seed_tasks(build_options.seeds)
            built += _build(member, build_options)
    twice = {task.name for task in built if sum(other.name == task.name for other in built) > 1}
    if twice:
        raise UserError(f"task {min(twice)!r} is named twice, alone and as a part of another")
    pairs = [*chain.from_iterable(task.joins for task in built)]
    return [dataclasses.replace(task, docs=joined(task.docs, pairs)) for task in built] if pairs else built


def _refuse_twice(option: str, value: object, same: Sequence[str], gen_kwargs: GenKwargs) -> None:
    twice = [] if value is None else [one for one in same if one in gen_kwargs]
    if twice:
        raise UserError(f"{option} and {twice[0]} of gen_kwargs say the same: give one of them")


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """A single lm-eval task with the settings that override its own; ``own_shots`` is the number of examples that its
    YAML and its groups say."""

    node: groups.Node
    given: JsonObject
    own_shots: object
    source: Task


def _build(member: SuiteTask, build_options: BuildOptions) -> Iterator[BuiltTask]:
    """A task for each part. A group whose members cannot be scored as one task gives a task for each member."""
    for label, path in member.parts.items():
        name = f"{member.name}_{label}" if label else member.name
        top = groups.node(path, build_options.included.indexes)
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
    included = build_options.included.indexes
    own = {**lm_tasks.load_yaml(leaf.yamls[-1], resolve_func=False), **leaf.settings}.get("num_fewshot")
    wanted = _wanted_shots(own, member, build_options)
    prefix = build_options.chat.gen_prefix
    given = {**leaf.settings, **({} if wanted is None else {"num_fewshot": wanted})}
    given |= {} if prefix is None else {"gen_prefix": prefix}
    return _Loaded(
        node=leaf,
        given=given,
        own_shots=own,
        source=lm_tasks.load_task(leaf.name, given, build_options.data_dir, included),
    )


def _wanted_shots(own: object, member: SuiteTask, build_options: BuildOptions) -> int | None:
    """The number of examples to set; None where the task's own number holds. As in lm-eval, a task that says 0 keeps
    it."""
    wanted = build_options.num_fewshot
    if wanted is None or (own == 0 and not member.num_fewshot):
        return member.num_fewshot
    return None if member.num_fewshot is None and wanted == (own or 0) else wanted


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
    given = [one.given for one in loaded]
    parts = task_parts(top, given, sources, every, member, folders=build_options.included.folders)
    parts |= build_options.chat.parts
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
        overrides=tuple(dict.fromkeys(_overrides(name, loaded, kept, member, build_options))),
    )


def _overrides(
    name: str, loaded: Sequence[_Loaded], docs: Sequence[BuiltDoc], member: SuiteTask, build_options: BuildOptions
) -> Iterator[Override]:
    """What the options ``num_fewshot`` and ``gen_kwargs`` change, or leave as it is, of what suite and task say."""
    shots = build_options.num_fewshot
    for one in loaded if shots is not None else ():
        suites_own = member.num_fewshot
        asked = one.own_shots if suites_own is None else suites_own
        done = one.given.get("num_fewshot", one.own_shots)
        if isinstance(asked, int) and isinstance(done, int) and (asked != shots or done != shots):
            published = True if suites_own is not None and member.origin("num_fewshot") == "published" else None
            common = {"task": name, "setting": "num_fewshot", "option": "num_fewshot", "published": published}
            yield Override(asked=asked, done=done, **common)  # type: ignore[arg-type]
    for doc in docs:
        yield from (dataclasses.replace(one, task=name) for one in doc.overrides)


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
