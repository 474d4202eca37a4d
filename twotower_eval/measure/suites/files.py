"""Suites as data: which tasks, how many shots, which metric and filter, and which of it is published.

A suite is ``tasks/suites/NAME.toml``. Every setting of a member that is not listed under its ``published`` key is our
own choice; :meth:`SuiteTask.origin` tells them apart, so that no report sells a choice of ours as the paper's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject
from twotower_eval.names import did_you_mean
from twotower_eval.plan import data_path, read_toml
from twotower_eval.strict import from_json

SETTINGS = ("num_fewshot", "metric", "filter", "max_new_tokens", "samples", "headline", "stop")


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task as we score it: one or several lm-eval tasks whose documents are scored together.

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
        """Whether a setting is what the paper says or what we chose."""
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
    """Read a shipped suite; an unknown name or a broken file is a UserError."""
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
    """The problem a document belongs to, across languages and tasks; by default the document itself.

    ``index`` is its position within its lm-eval task, ``doc_id`` its id within ``task``. A document can name its
    cluster in a column ``cluster``. GSM8K items are known by the hash of their question, and so are the English MGSM
    items, which are GSM8K items; in other languages an MGSM item is the item of the same position. Global-MMLU items
    share ``sample_id``, RACE questions their article.
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
    """12 hex digits over the words alone: files differ in double spaces and line ends."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]
