"""Suites as data (tasks, shots, metric, published figures), and lm-eval's groups of tasks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from twotower_eval.errors import UserError
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.measure.suites.included import SUITE_FILE, nearest_path
from twotower_eval.measure.suites.lm_types import Entry, Task
from twotower_eval.names import did_you_mean
from twotower_eval.records import MEAN
from twotower_eval.resources import data_path, read_toml
from twotower_eval.strict import JsonObject, from_json

SETTINGS = ("num_fewshot", "metric", "filter", "max_new_tokens", "samples", "headline", "stop")


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task as it is scored here: one or several lm-eval tasks whose documents are scored together.

    ``parts`` maps a label to an lm-eval task or group. A single part has the label ``""``; labelled parts are the
    languages of a multi-language task, whose mean is the mean over languages: they become the tasks ``NAME_LABEL`` of
    the group ``NAME``. ``None`` means what lm-eval's own task says (``max_new_tokens``: its own budget, else the
    harness default; ``metric``/``filter``: its first one; ``samples``: 1).
    """

    name: str
    parts: Mapping[str, str]
    num_fewshot: int | None = None
    metric: str | None = None
    filter: str | None = None
    max_new_tokens: int | None = None
    samples: int | None = None
    headline: bool = True
    stop: tuple[str, ...] | None = None
    executes_code: bool = False
    published: tuple[str, ...] = ()
    note: str | None = None

    def origin(self, setting: str) -> Literal["published", "our choice"]:
        """Whether a setting is published or was chosen here."""
        assert setting in SETTINGS, setting
        return "published" if setting in self.published else "our choice"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named list of tasks."""

    name: str
    description: str
    tasks: tuple[SuiteTask, ...] = field(default_factory=tuple)


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return sorted(path.stem for path in data_path("tasks", "suites").glob("*.toml"))


def load_suite(name: str) -> Suite:
    """Read a suite by its path, ``DIR/NAME.toml``, or a shipped one by its name; an unknown name or a broken file is a
    UserError."""
    if name.endswith(SUITE_FILE):
        file = Path(name).expanduser()
        if not file.is_file():
            raise UserError(f"no suite file {name}{nearest_path(file)}")
        return read_suite(file)
    path = data_path("tasks", "suites", f"{name}.toml")
    if not path.is_file():
        raise UserError(f"unknown suite {name!r}{did_you_mean(name, suite_names())}")
    return read_suite(path)


def read_suite(path: Path) -> Suite:
    """Read one suite file; unknown keys, repeated names and impossible values are a UserError naming the task."""
    data = read_toml(path, "suite")
    unknown = set(data) - {"description", "task"}
    if unknown:
        raise UserError(f"suite {path}: unknown key {min(unknown)!r} (known: description, task)")
    entries = data.get("task", [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UserError(f"suite {path}: task must be a list of tables, as [[task]] makes them")
    tasks = tuple(_suite_task(entry, path) for entry in entries)
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise UserError(f"suite {path}: it needs at least one task, and no name twice")
    return Suite(name=path.stem, description=str(data.get("description", "")), tasks=tasks)


def _suite_task(entry: JsonObject, path: Path) -> SuiteTask:
    where = f"suite {path}, task {entry.get('name')!r}"
    known = [f.name for f in dataclasses.fields(SuiteTask)] + ["lm_eval"]
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")
    values = dict(entry)
    if not isinstance(values.get("name"), str) or ("lm_eval" in values) == ("parts" in values):
        raise UserError(f"{where}: it needs a name and one of lm_eval (a task) and parts (label -> task)")
    values.setdefault("parts", {"": values.pop("lm_eval", None)})
    try:
        task = from_json(SuiteTask, values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for setting in task.published:
        if setting not in SETTINGS:
            raise UserError(f"{where}: published names {setting!r}{did_you_mean(setting, SETTINGS)}")
    for least, setting in ((0, "num_fewshot"), (1, "max_new_tokens"), (1, "samples")):
        value = getattr(task, setting)
        if value is not None and value < least:
            raise UserError(f"{where}: {setting} must be a whole number of at least {least}, not {value!r}")
    return task


def cluster_id(task: str, lm_eval_name: str, doc: JsonObject, index: int, doc_id: int) -> str:
    """The cluster of a document: the problem it belongs to, across languages and tasks; by default itself.

    ``index`` is its position in its lm-eval task, ``doc_id`` its id in ``task``. A column ``cluster`` names the cluster
    explicitly. GSM8K items, and the English MGSM items (which are GSM8K items), are identified by the hash of their
    question; an MGSM item in another language is the item at the same position. Global-MMLU items share ``sample_id``,
    RACE questions their article.
    """
    if isinstance(doc.get("cluster"), str):
        return str(doc["cluster"])
    if re.match(r"gsm8k($|_cot)", lm_eval_name) or re.match(r"mgsm_\w+_en$", lm_eval_name):
        known = gsm8k_items().get(_short_hash(str(doc["question"])))
        return f"gsm8k:{known if known is not None else _short_hash(str(doc['question']))}"
    if lm_eval_name.startswith("mgsm_"):
        return f"gsm8k:{index}"
    if lm_eval_name.startswith("global_mmlu_") and "sample_id" in doc:
        return f"global_mmlu:{doc['sample_id']}"
    if lm_eval_name == "race":
        return f"race:{_short_hash(str(doc['article']))}"
    return f"{task}:{doc_id}"


@cache
def gsm8k_items() -> dict[str, int]:
    """Position in MGSM (and in GSM8K's test split, whose first 250 items they are) by question hash."""
    hashes = json.loads(data_path("tasks", "suites", "mgsm_items.json").read_text(encoding="utf-8"))
    return {short: index for index, short in enumerate(hashes)}


def _short_hash(text: str) -> str:
    """12 hex digits over the words alone, as files differ in double spaces and line ends."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]


STRUCTURE = ("group", "group_alias", "task", "task_alias", "tag", "aggregate_metric_list", "metadata")
MOST_LEVELS = 30
WITHIN = "::"  # lm-eval's separator between a group and a group defined inside it
KINDS = {"multiple_choice": "loglikelihood"}  # request type by output type, if it differs


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One metric that a group averages; without ``filters``, under every filter that its members have."""

    metric: str
    filters: tuple[str, ...] | None
    by_size: bool


Indexes = Sequence[Mapping[str, Entry]]  # the user's own tasks, the first that has a name counts


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How a node is reached: through the YAML files of enclosing groups, by names that the user's own tasks may
    have."""

    yamls: tuple[Path, ...] = ()
    included: Indexes = ()


@dataclass(frozen=True, kw_only=True)
class Node:
    """A task, or a group or tag with ``members``. ``path`` finds it again: ``GROUP::NAME`` inside a group."""

    name: str
    path: str
    settings: JsonObject = field(default_factory=dict)
    members: tuple[Node, ...] | None = None
    rules: tuple[Rule, ...] = ()
    yamls: tuple[Path, ...] = ()  # its own and those of groups on the way


def node(path: str, included: Indexes = ()) -> Node:
    """The node at a path. UserError for what lm-eval does not have or what cannot be a task here."""
    root = _indexed(path.partition(WITHIN)[0], {}, None, _Way(included=included))
    found = next((one for one in _all(root) if one.path == path), None)
    if found is None:
        raise UserError(f"lm-eval has no task {path!r}{did_you_mean(path, [one.path for one in _all(root)])}")
    return found


def leaves(top: Node) -> list[Node]:
    """The single tasks below a node, each once.

    UserError for an empty group, and for a task that several groups below it name: lm-eval would count it twice.
    """
    found = {one.name: one for one in _all(top) if one.members is None}
    if not found:
        raise UserError(f"group {top.name!r} has no tasks")
    naming: dict[str, list[str]] = {}
    for one in _all(top):
        for name in {member.name for member in one.members or () if member.members is None}:
            naming.setdefault(name, []).append(one.name)
    twice = next(((name, by) for name, by in naming.items() if len(by) > 1), None)
    if twice:
        by = " and ".join(map(repr, twice[1]))
        raise UserError(f"group {top.name!r} has task {twice[0]!r} twice, by {by}: name the tasks you want instead")
    return list(found.values())


def apart(top: Node) -> Iterator[Node]:
    """The units that count separately: a task, a group with a figure, or each member of any other group."""
    if top.members is None or top.rules:
        yield top
        return
    for member in top.members:
        yield from apart(member)


def executes_code(top: Node) -> bool:
    """Whether scoring any task below a node runs model output; decided without importing the task's functions."""
    return any(lm_tasks.load_yaml(leaf.yamls[-1], resolve_func=False).get("unsafe_code") for leaf in leaves(top))


def yaml_files(top: Node) -> Iterator[Path]:
    """Every YAML file that a node is read from: its own, those of enclosing groups, and all that they include."""
    for one in _all(top):
        for path in one.yamls:
            yield from _with_includes(path.resolve())


def _with_includes(path: Path) -> Iterator[Path]:
    yield path
    included = lm_tasks.load_yaml(path, resolve_func=False, recursive=False).get("include", [])
    for name in included if isinstance(included, list) else [included]:
        yield from _with_includes((path.parent / str(name)).resolve())


def _all(top: Node) -> Iterator[Node]:
    yield top
    for member in top.members or ():
        yield from _all(member)


def _indexed(name: str, settings: JsonObject, parent: str | None, way: _Way) -> Node:
    """A task, group or tag by its lm-eval name, with the ``settings`` of enclosing groups."""
    if len(way.yamls) > MOST_LEVELS:
        raise UserError(f"group {name!r} contains itself, or groups more than {MOST_LEVELS} deep")
    index = lm_tasks.index_of(name, way.included)
    if name not in index:
        inside = f", which group {parent!r} names" if parent else ""
        own = [one for several in way.included for one in several]
        raise UserError(f"lm-eval has no task {name!r}{inside}{did_you_mean(name, [*own, *index])}")
    entry = index[name]
    path = name if parent is None or not settings else f"{parent}{WITHIN}{name}"
    if entry.yaml_path is not None:
        way = dataclasses.replace(way, yamls=(*way.yamls, Path(entry.yaml_path)))
    if entry.kind.name == "TAG":
        members = tuple(_indexed(one, settings, parent, way) for one in sorted(entry.tags))
        return Node(name=name, path=path, settings=settings, members=members, yamls=way.yamls)
    if entry.kind.name == "GROUP":
        sets = any(key not in STRUCTURE for key in entry.cfg)
        # The index does not resolve functions in the settings of a group's members.
        config = lm_tasks.load_yaml(entry.yaml_path) if sets else entry.cfg
        return _group(name, path, config, settings, way)
    return Node(name=name, path=path, settings=settings, yamls=way.yamls)


def _group(name: str, path: str, config: JsonObject, settings: JsonObject, way: _Way) -> Node:
    """A group from its YAML, or from its definition inside another group."""
    own = {key: value for key, value in config.items() if key not in STRUCTURE}
    together = {**own, **settings}
    members: Any = config.get("task") or []
    return Node(
        name=name,
        path=path,
        settings=together,
        members=tuple(
            _member(path, one, together, way) for one in (members if isinstance(members, list) else [members])
        ),
        rules=tuple(_rules(name, config.get("aggregate_metric_list") or [])),
        yamls=way.yamls,
    )


def _member(group: str, given: str | JsonObject, settings: JsonObject, way: _Way) -> Node:
    if isinstance(given, str):
        return _indexed(given, settings, group, way)
    own = {key: value for key, value in given.items() if key not in STRUCTURE}
    known = given.get("group", given.get("task"))
    if not isinstance(known, str):
        raise UserError(f"group {group!r} names a member without a name: {dict(given)!r}")
    if known in lm_tasks.index_of(known, way.included):
        return _indexed(known, {**settings, **own}, group, way)
    if "group" in given:
        # lm-eval gives these only the settings of the enclosing group.
        inner = f"{group}{WITHIN}{known}"
        return _group(inner, inner, given, settings, way)
    raise UserError(
        f"group {group!r} defines task {known!r} inside itself, without a file of its own, which is not supported: "
        "name the tasks you want instead"
    )


def _rules(group: str, listed: object) -> Iterator[Rule]:
    for one in listed if isinstance(listed, list) else [listed]:
        if not isinstance(one, Mapping) or not isinstance(one.get("metric"), str):
            raise UserError(f"group {group!r}: an entry of its aggregate_metric_list names no metric: {one!r}")
        aggregation, filters = one.get("aggregation", MEAN), one.get("filter_list")
        if aggregation != MEAN and isinstance(aggregation, str) and not aggregation.startswith("/"):
            raise UserError(f"group {group!r} aggregates by {aggregation!r}: lm-eval knows no way but {MEAN!r}")
        yield Rule(
            metric=one["metric"],
            filters=None if filters is None else (filters,) if isinstance(filters, str) else tuple(filters),
            by_size=bool(one.get("weight_by_size", True)),
        )


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of a single task that decide whether it can be scored together with others."""

    name: str
    kind: str  # what is asked of a model
    metrics: Mapping[str, str]  # name -> aggregation
    filters: tuple[str, ...]

    def has(self, metric: str, filter_: str) -> bool:
        return metric in self.metrics and filter_ in self.filters


@dataclass(frozen=True, kw_only=True)
class Figure:
    """The scores that a group's figure averages, and whether its documents may be scored as one task."""

    metric: str
    filter: str
    by_size: bool
    together: bool


def facts(name: str, task: Task) -> Facts:
    """The facts of a loaded task."""
    return Facts(
        name=name,
        kind=KINDS.get(task.OUTPUT_TYPE, task.OUTPUT_TYPE),
        metrics={metric: lm_tasks.aggregation_name(task, metric) for metric in task.higher_is_better()},
        filters=tuple(filter_.name for filter_ in lm_tasks.filters_of(task)),
    )


def figure(
    name: str, rules: Sequence[Rule], members: Sequence[Facts], metric: str | None = None, filter_: str | None = None
) -> Figure:
    """How ``members`` combine into one figure; ``metric`` and ``filter_`` are a suite's choice and must exist.

    UserError if lm-eval has no such figure, or several over different members.
    """
    known = (("metric", metric, list(members[0].metrics)), ("filter", filter_, list(members[0].filters)))
    for kind, wanted, there in known:
        if wanted is not None and wanted not in there:
            raise UserError(f"task {name!r} has no {kind} {wanted!r}{did_you_mean(wanted, there)}")
    found = (metric or known[0][2][0], filter_ or known[1][2][0], True)
    if rules and metric is None:
        chosen = _listed(name, rules, members)
        found = (chosen[0], filter_ or chosen[1], chosen[2])
    plain = all(aggregation == MEAN for one in members for aggregation in one.metrics.values())
    alike = plain and found[2] and len({one.kind for one in members}) == 1
    return Figure(metric=found[0], filter=found[1], by_size=found[2], together=alike or len(members) == 1)


def _listed(name: str, rules: Sequence[Rule], members: Sequence[Facts]) -> tuple[str, str, bool]:
    """The first listed metric and filter that all members have; a single metric may be that of some members only."""
    every = sorted({filter_ for one in members for filter_ in one.filters})
    listed = [(rule.metric, filter_, rule.by_size) for rule in rules for filter_ in rule.filters or every]
    there = [one for one in listed if any(member.has(*one[:2]) for member in members)]
    if not there:
        metrics = ", ".join(dict.fromkeys(rule.metric for rule in rules))
        raise UserError(f"group {name!r} aggregates {metrics}, which none of its tasks has: name its tasks instead")
    whole = [one for one in there if all(member.has(*one[:2]) for member in members)]
    if not whole and len({rule.metric for rule in rules}) > 1:
        raise UserError(
            f"group {name!r} has several figures, each over some of its tasks only: name its parts instead, "
            f"such as --tasks {','.join(member.name for member in members[:3])}"
        )
    return (whole or there)[0]
