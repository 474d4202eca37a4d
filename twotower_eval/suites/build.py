"""From task and suite names to documents and requests, built once for all documents and all models.

lm-eval loads the tasks, makes the prompts and later scores the answers; nothing of that is redone here. Few-shot
prompts of lm-eval's random sampler depend on a document's position in the run, so all documents' requests are built,
and only then cut to ``limit``: a document has the same prompt whatever the limit.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from twotower_eval.names import did_you_mean
from twotower_eval.records import canonical_json, sha256_text
from twotower_eval.suites import lm_tasks
from twotower_eval.suites.files import SuiteTask, cluster_id, load_suite, suite_names

DEFAULT_MAX_NEW_TOKENS = 256  # for tasks that name no budget; lm-eval's own models default to the same
FEWSHOT_SEED = 1234  # lm-eval's own default, so that seed 0 gives the prompts that lm-eval gives
BUDGET_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltDoc:
    """A document with its requests; ``source`` is the lm-eval task that it comes from and that scores it."""

    doc_id: int
    doc: Mapping[str, Any]
    source: Any
    instances: tuple[Any, ...]
    cluster_id: str
    doc_sha256: str
    prompt_sha256: str
    target_sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltTask:
    """One task ready to be given to models: what a cell works on.

    ``digest`` covers every document and request of the task, whatever the limit, and how answers are scored.
    """

    name: str
    group: str | None
    request: str  # "generate_until", "loglikelihood" or "loglikelihood_rolling"
    docs: tuple[BuiltDoc, ...]
    num_docs_in_all: int
    samples: int
    max_new_tokens: int | None
    metric: str
    filter: str
    headline: bool
    digest: str
    spec: SuiteTask

    @property
    def generates(self) -> bool:
        """Whether models answer in text."""
        return self.request == "generate_until"


@dataclass(frozen=True, kw_only=True)
class TimedPrompt:
    """A prompt to be timed by ``speed``, with all that is needed to find its document again for scoring."""

    task: str
    doc_id: int
    text: str
    stop: tuple[str, ...]
    max_new_tokens: int
    prompt_sha256: str


def resolve_tasks(
    names: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    samples: int | None = None,
    max_new_tokens: int | None = None,
) -> list[BuiltTask]:
    """Build the named tasks: suites, members (``SUITE/TASK``), tasks under ``tasks/``, stock lm-eval tasks.

    ``-NAME`` leaves a task out. ``limit`` keeps the first documents of each task (of each subject, where lm-eval's
    task is a group). ``seed`` moves the few-shot examples of tasks that draw them. Raises ValueError for unknown
    names, tasks that execute model output, and data that is missing or does not fit.
    """
    wishes = _Wishes(None if data_dir is None else Path(data_dir), limit, seed, samples, max_new_tokens)
    with lm_tasks.quiet():
        built = [task for member in select(names) for task in _build(member, wishes)]
    twice = {task.name for task in built if sum(other.name == task.name for other in built) > 1}
    if twice:
        raise ValueError(f"task {min(twice)!r} is named twice, alone and as a part of another")
    return built


def build_requests(tasks: Sequence[BuiltTask], num: int) -> list[TimedPrompt]:
    """``num`` prompts of the generation tasks, one task after the other in turn, documents in their order."""
    by_task = [[(task, doc) for doc in task.docs] for task in tasks if task.generates]
    if not by_task:
        raise ValueError(f"none of the tasks {', '.join(t.name for t in tasks)} generates text: nothing to time")
    in_turn = [pair for round_ in zip_longest(*by_task) for pair in round_ if pair is not None]
    if len(in_turn) < num:
        raise ValueError(f"only {len(in_turn)} prompts in the tasks, {num} wanted: name more tasks or ask for fewer")
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
            )
        )
    return prompts


def select(names: Sequence[str]) -> list[SuiteTask]:
    """What the names stand for, before any data is read. Tasks that execute model output are refused here."""
    chosen: dict[str, SuiteTask] = {}
    for name in names:
        if name.startswith("-"):
            continue
        for task in _named(name):
            if chosen.setdefault(task.name, task) != task:
                raise ValueError(f"task {task.name!r} is named twice with different settings (by {name!r} and before)")
    for name in names:
        if name.startswith("-") and chosen.pop(name[1:], None) is None:
            raise ValueError(f"cannot leave out {name[1:]!r}: not among the tasks{did_you_mean(name[1:], chosen)}")
    if not chosen:
        raise ValueError("no task is left to run")
    _refuse_code([task.name for task in chosen.values() if task.executes_code], names)
    return list(chosen.values())


def _refuse_code(tasks: Sequence[str], names: Sequence[str]) -> None:
    if tasks:
        without = ",".join([name for name in names if name not in tasks] + [f"-{task}" for task in tasks])
        alone = all(name in tasks for name in names)
        hint = "" if alone else f"; to run without: --tasks {without}"
        raise ValueError(f"{', '.join(tasks)}: scoring executes model output, refused while there is no sandbox{hint}")


def _named(name: str) -> Sequence[SuiteTask]:
    suite, slash, member = name.partition("/")
    if slash:
        tasks = {task.name: task for task in load_suite(suite).tasks}
        if member not in tasks:
            raise ValueError(f"suite {suite!r} has no task {member!r}{did_you_mean(member, tasks)}")
        return [tasks[member]]
    if name in suite_names():
        return load_suite(name).tasks
    if name not in lm_tasks.index_of(name):
        known = [*suite_names(), *lm_tasks.local_index(), *lm_tasks.stock_index()]
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, known)}: no suite, local task or lm-eval task")
    single = [leaf for leaf, _ in lm_tasks.leaves(name)] if lm_tasks.is_tag(name) else [name]
    return [SuiteTask(name=one, parts={"": one}, executes_code=lm_tasks.executes_code(one)) for one in single]


@dataclass(frozen=True)
class _Wishes:
    """What the caller of :func:`resolve_tasks` asks for beside the names."""

    data_dir: Path | None
    limit: int | None
    seed: int
    samples: int | None
    max_new_tokens: int | None


def _build(member: SuiteTask, wishes: _Wishes) -> Iterator[BuiltTask]:
    for label, lm_eval_name in member.parts.items():
        name = f"{member.name}_{label}" if label else member.name
        yield _build_part(name, member.name if label else None, lm_eval_name, member, wishes)


def _build_part(name: str, group: str | None, lm_eval_name: str, member: SuiteTask, wishes: _Wishes) -> BuiltTask:
    kept: list[BuiltDoc] = []
    identity: list[Any] = []
    sources = []
    num_docs = 0
    samples = wishes.samples or member.samples
    for leaf, overrides in lm_tasks.leaves(lm_eval_name):
        shots = {} if member.num_fewshot is None else {"num_fewshot": member.num_fewshot}
        source = lm_tasks.load_task(leaf, {**overrides, **shots}, wishes.data_dir)
        samples = samples or source.config.repeats
        docs = _docs(name, leaf, source, num_docs, member, wishes)
        sources.append(source)
        num_docs += len(docs)
        identity.append(_identity(source, docs))
        kept += docs[: wishes.limit]
    metric, filter_ = _headline(name, member, sources[0])
    _check_samples(name, sources[0], samples or 1)
    return BuiltTask(
        name=name,
        group=group,
        request=kept[0].instances[0].request_type,
        docs=tuple(kept),
        num_docs_in_all=num_docs,
        samples=samples or 1,
        max_new_tokens=max(
            (i.args[1]["max_gen_toks"] for d in kept for i in d.instances if _generates(i)), default=None
        ),
        metric=metric,
        filter=filter_,
        headline=member.headline,
        digest=sha256_text(canonical_json(identity)),
        spec=member,
    )


def _docs(name: str, leaf: str, source: Any, first_id: int, member: SuiteTask, wishes: _Wishes) -> list[BuiltDoc]:
    by_doc = defaultdict(list)
    for instance in lm_tasks.build_instances(leaf, source, FEWSHOT_SEED + wishes.seed):
        by_doc[instance.doc_id].append(instance)
    docs = []
    for index in sorted(by_doc):
        instances = sorted(by_doc[index], key=lambda instance: instance.idx)
        for instance in instances:
            instance.metadata = (name, first_id + index, 1)
            instance.task_name, instance.doc_id, instance.repeats = instance.metadata
            if _generates(instance):
                instance.arguments = (instance.args[0], _generation_settings(instance.args[1], member, wishes))
        docs.append(_doc(name, leaf, source, index, instances))
    return docs


def _doc(name: str, leaf: str, source: Any, index: int, instances: Sequence[Any]) -> BuiltDoc:
    # doc and target hashes are lm-eval's own, so that they can be compared with its sample logs.
    from lm_eval.utils import handle_non_serializable

    doc, doc_id = instances[0].doc, instances[0].doc_id
    text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    prompts = [instance_sha256(instance) for instance in instances]
    return BuiltDoc(
        doc_id=doc_id,
        doc=doc,
        source=source,
        instances=tuple(instances),
        cluster_id=cluster_id(name, leaf, doc, index, doc_id),
        doc_sha256=_sha256(text),
        prompt_sha256=prompts[0] if len(prompts) == 1 else sha256_text("".join(prompts)),
        target_sha256=_sha256(str(source.doc_to_target(doc))),
    )


def instance_sha256(instance: Any) -> str:
    """Hash of what a model is asked: the prompt of a generation, else all texts of the request."""
    texts = [arg for arg in instance.args if isinstance(arg, str)]
    return _sha256(texts[0]) if len(texts) == 1 else _sha256(canonical_json(texts))


def _sha256(text: str) -> str:
    # Web text may hold half of a surrogate pair, which strict UTF-8 refuses.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _generates(instance: Any) -> bool:
    return bool(instance.request_type == "generate_until")


def stops_and_budget(settings: Mapping[str, Any], default_budget: int) -> tuple[tuple[str, ...], int]:
    """Stop strings and token budget in lm-eval's settings of a generation, under any of the names it goes by."""
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else until
    budgets = (settings.get(name) for name in BUDGET_NAMES)
    return tuple(stop for stop in stops if stop), next((int(b) for b in budgets if b is not None), default_budget)


def _generation_settings(own: Mapping[str, Any], member: SuiteTask, wishes: _Wishes) -> dict[str, Any]:
    """lm-eval's settings of one generation with the stops and the budget that hold here."""
    stops, own_budget = stops_and_budget(own, DEFAULT_MAX_NEW_TOKENS)
    kept = {key: value for key, value in own.items() if key not in BUDGET_NAMES}
    budget = wishes.max_new_tokens or member.max_new_tokens or own_budget
    return {**kept, "until": list(stops if member.stop is None else member.stop), "max_gen_toks": budget}


def _identity(source: Any, docs: Sequence[BuiltDoc]) -> list[Any]:
    """All that makes two results comparable but the budget, which the workload names."""
    config = source.config
    parts = [config.output_type, config.metric_list, config.filter_list]
    scoring = json.dumps(parts, default=lambda part: getattr(part, "__qualname__", type(part).__name__))
    stops = sorted({canonical_json(i.args[1]["until"]) for doc in docs for i in doc.instances if _generates(i)})
    return [scoring, stops, [[doc.doc_sha256, doc.prompt_sha256, doc.target_sha256] for doc in docs]]


def _headline(name: str, member: SuiteTask, source: Any) -> tuple[str, str]:
    """The metric and the filter that stand for the task; those of a suite must exist."""
    metrics, filters = list(source.higher_is_better()), [f.name for f in source._filters]
    for kind, wanted, known in (("metric", member.metric, metrics), ("filter", member.filter, filters)):
        if wanted is not None and wanted not in known:
            raise ValueError(f"task {name!r} has no {kind} {wanted!r}{did_you_mean(wanted, known)}")
    return member.metric or metrics[0], member.filter or filters[0]


def _check_samples(name: str, source: Any, samples: int) -> None:
    """A filter that picks k samples of each problem needs them."""
    steps = [(f["name"], step) for f in source.config.filter_list or [] for step in f["filter"]]
    for filter_name, step in steps:
        if step["function"] == "take_first_k" and step["k"] > samples:
            raise ValueError(
                f"task {name!r}: filter {filter_name!r} needs {step['k']} samples of each problem: "
                f"give --samples {step['k']} and a --temperature above 0"
            )
