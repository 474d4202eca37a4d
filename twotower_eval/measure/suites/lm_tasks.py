"""lm-eval's tasks, found by name and loaded from local files or the hub.

Only this module touches lm-eval's private or global parts: its YAML reader, progress bars, template compiler and
filters. tests/test_suites.py checks what is relied on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from twotower_eval.errors import UserError
from twotower_eval.measure.suites.lm_types import Aggregation, Entry, Filter, Instance, Task
from twotower_eval.measure.suites.local_data import Origin, first_line, on_local_files, places
from twotower_eval.names import did_you_mean
from twotower_eval.records import MEAN, PLAIN_TEXT, ChatOptions, ChatPrompt, chat_json
from twotower_eval.resources import data_path
from twotower_eval.strict import JsonObject
from twotower_eval.task_options import Seeds

T = TypeVar("T")
Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages, bool], str]  # the messages of a chat, and whether an answer begins behind them
# What a task's own code may raise on items that it cannot handle, or without a package, a file or the network.
MISTAKEN = (
    ArithmeticError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    NameError,
)
LACKING = (ImportError, OSError)
EXTRAS = {"math": {"math_verify", "sympy", "antlr4", "antlr4-python3-runtime", "latex2sympy2_extended"}}
NOT_OF_CONFIG = ("group", "task_list", "class", "include", "dataset_config")  # keys of a YAML that are no setting


@cache
def local_index() -> Mapping[str, Entry]:
    """The tasks under ``tasks/`` by name."""
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Entry] = TaskManager(include_path=str(data_path("tasks")), include_defaults=False).task_index
    return index


@cache
def stock_index() -> Mapping[str, Entry]:
    """lm-eval's own tasks by name. Reads some 14,000 files, about seven seconds: only when a stock task is named."""
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Entry] = TaskManager().task_index
    return index


def roots() -> tuple[Path, ...]:
    """The folders that tasks lie in, local ones first."""
    import lm_eval.tasks

    return (data_path("tasks").resolve(), *(Path(path).resolve() for path in lm_eval.tasks.__path__))


def folder_index(folder: Path, say: Callable[[str], None]) -> Mapping[str, Entry]:
    """The tasks, groups and tags in a folder and below it; ``say`` receives a line for each file that is no YAML."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex

    with _no_notes():
        index: Mapping[str, Entry] = TaskManager(include_path=str(folder), include_defaults=False).task_index
    read = {Path(entry.yaml_path) for entry in index.values() if entry.yaml_path is not None}
    for file in TaskIndex._iter_yaml_files(folder):
        if file not in read:
            try:
                load_yaml(file, resolve_func=False)
            except UserError as error:
                say(str(error))
    return index


def file_entry(file: Path) -> Entry:
    """The task or group of a YAML file; UserError if it is none."""
    from lm_eval.tasks._index import TaskIndex

    config = load_yaml(file, resolve_func=False)
    found: dict[str, Entry] = {}
    if isinstance(config.get("task" if "group" not in config else "group"), str):
        TaskIndex.process_cfg(config, file, found)
    entry = next((one for one in found.values() if one.yaml_path == file), None)
    if entry is None:
        raise UserError(f"{file} is no task: it has neither `task: NAME` nor `group: NAME`")
    return entry


def is_task_file(file: Path) -> bool:
    """Whether a YAML file is a task or a group, not a part that others include."""
    config = load_yaml(file, resolve_func=False)
    return isinstance(config.get("task"), str) or "group" in config


def index_of(name: str, included: Sequence[Mapping[str, Entry]] = ()) -> Mapping[str, Entry]:
    """The index that holds ``name``: the user's own first, then shipped tasks, then lm-eval's."""
    for index in (*included, local_index()):
        if name in index:
            return index
    return stock_index()


def origin_of(name: str, included: Sequence[Mapping[str, Entry]] = ()) -> Origin:
    """Whose task a name stands for."""
    if any(name in index for index in included):
        return "own"
    return "shipped" if name in local_index() else "lm-eval"


def load_task(
    name: str, settings: JsonObject, data_dir: Path | None, included: Sequence[Mapping[str, Entry]] = ()
) -> Task:
    """Load one lm-eval task with ``settings`` over its own. UserError that says what to do.

    Local tasks read the files beside their YAML; the user's own those that their YAML names, from the current folder
    or from beside it; stock tasks those under ``data_dir`` if given, else the hub.
    """
    where = f"task {name!r}"
    entry = index_of(name, included)[name]
    own = {**_resolved(name, entry), **settings}
    _check_keys(where, own)
    config = on_local_files(name, own, Path(entry.yaml_path), data_dir, origin_of(name, included))
    from lm_eval.tasks import TaskManager

    try:
        task: Task = TaskManager(include_defaults=False).load(config)["tasks"][name]
    except OSError as error:
        if data_dir is not None or "custom_dataset" in config:
            raise UserError(f"{where}: {error}") from error
        raise UserError(
            f"{where}: its data {config.get('dataset_path')!r} cannot be reached ({first_line(error)}); "
            f"give it with --data-dir DIR, as {places(name, config)}"
        ) from error
    except misfits() as error:
        raise UserError(f"{where}: its data lacks what the task reads ({first_line(error)})") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{where}: needs images or audio, which no model here takes")
    _check_metrics(where, task)
    return task


def seed_tasks(seeds: Seeds) -> None:
    """Seed what the code of tasks draws from, as lm-eval does before it loads them; inside :func:`quiet`."""
    import numpy as np

    random.seed(seeds.python)
    np.random.seed(seeds.numpy % 2**32)


def build_instances(
    name: str, task: Task, fewshot_seed: int, chat: ChatOptions = PLAIN_TEXT, render: Render | None = None
) -> list[Instance]:
    """lm-eval's requests for every document of the task; ``render`` writes the messages of a chat as text."""
    task.set_fewshot_seed(fewshot_seed)
    try:
        task.build_all_requests(**_how(chat, render))
    except misfits() as error:
        raise UserError(f"task {name!r}: its data lacks what the prompts read ({first_line(error)})") from error
    except UserError:
        raise
    except MISTAKEN as error:
        raise UserError(f"task {name!r}: its own code fails on its documents ({first_line(error)})") from error
    return list(task.instances)


def _how(chat: ChatOptions, render: Render | None) -> dict[str, object]:
    """What lm-eval's evaluator passes on; nothing by default."""
    how: dict[str, object] = {}
    if chat.system_instruction is not None:
        how["system_instruction"] = chat.system_instruction
    if render is not None:
        how |= {"apply_chat_template": True, "fewshot_as_multiturn": chat.fewshot_as_multiturn}
        how["chat_template"] = partial(_chat_prompt, render)
    return how


def _chat_prompt(render: Render, messages: Messages, add_generation_prompt: bool = True) -> ChatPrompt:
    """A chat as one template writes it, with the messages beside it."""
    return ChatPrompt(render(messages, add_generation_prompt), chat_json(messages, add_generation_prompt))


def aggregation(task: Task, metric: str) -> Aggregation:
    """lm-eval's aggregation function, from all documents' items to one number; a mean if the task names none."""
    from lm_eval.api.metrics import mean

    return task.aggregation().get(metric, mean)


def aggregation_name(task: Task, metric: str) -> str:
    """The name of the aggregation: as in lm-eval's registry, else its name in the task's code."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    function = aggregation(task, metric)
    known = {AGGREGATION_REGISTRY[name]: name for name in AGGREGATION_REGISTRY}
    named = known.get(function) or _own_name(function, metric)
    return MEAN if named == "brier_score" else named  # a mean of what it makes of each document


def _own_name(function: object, metric: str) -> str:
    """``utils.agg('f1')`` for a partial function; a function without a name is called after its metric."""
    if isinstance(function, partial):
        words = [
            *map(_argument, function.args),
            *(f"{key}={_argument(function.keywords[key])}" for key in function.keywords),
        ]
        return f"{_own_name(function.func, metric)}({', '.join(words)})"
    own = str(getattr(function, "__qualname__", type(function).__name__))
    # A task's own module goes by its path, which says nothing about the function and differs between machines.
    module = str(getattr(function, "__module__", "")).rpartition("/")[2]
    return f"{module}.{own.replace('<locals>.', '').replace('<lambda>', metric)}".lstrip(".")


def _argument(value: object) -> str:
    """A text of an argument that is the same in every process: no address."""
    if callable(value):
        return _own_name(value, "function")
    return type(value).__name__ if " at 0x" in repr(value) else repr(value)


def is_lacking(error: Exception) -> bool:
    """Whether an error means a missing package, file or network; NLTK raises a bare error for missing data."""
    return isinstance(error, LACKING) or type(error) is LookupError


@contextlib.contextmanager
def needing(name: str, what: str, *, made_up: bool = False) -> Iterator[None]:
    """UserError, naming the task, if ``what`` of it needs something that is not available. ``made_up`` answers need not
    suit it."""
    try:
        yield
    except (*LACKING, *MISTAKEN) as error:
        if is_lacking(error):
            why = " ".join(str(error).strip("* \n").split())[:300]
            raise UserError(f"task {name!r}: {what} needs what is not here ({type(error).__name__}: {why})") from error
        if not made_up:
            raise


def _resolved(name: str, entry: Entry) -> dict[str, Any]:
    """A task's YAML with the functions that it names."""
    where = f"task {name!r}"
    try:
        return {**load_yaml(entry.yaml_path), "task": name}
    except (ImportError, AssertionError) as error:  # lm-eval asserts the version of a package
        raise UserError(f"{where}: {first_line(error)}{extra_hint(error)}") from error
    except OSError as error:
        raise UserError(f"{where}: its code needs what is not here ({first_line(error)})") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (*MISTAKEN, SyntaxError) as error:
        raise UserError(f"{where}: its code fails as it is read ({first_line(error)})") from error


def extra_hint(error: BaseException | None) -> str:
    """How to install what an error says is missing, if one of this project's extras brings it."""
    while error is not None:
        words = set(re.findall(r"\w+", str(error)))
        for extra, packages in EXTRAS.items():
            if words & packages:
                return f"; to install it: pip install 'twotower-eval[{extra}]'"
        error = error.__cause__ or error.__context__
    return ""


def _check_keys(where: str, config: JsonObject) -> None:
    """UserError for a key of a task's YAML that lm-eval does not know."""
    from lm_eval.api.task import ALL_OUTPUT_TYPES, TaskConfig

    known = [*(field.name for field in dataclasses.fields(TaskConfig)), *NOT_OF_CONFIG]
    for key in config if "class" not in config else ():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
    output_type = config.get("output_type", ALL_OUTPUT_TYPES[0])
    if output_type not in ALL_OUTPUT_TYPES:
        raise UserError(
            f"{where}: unknown output_type {output_type!r}{did_you_mean(str(output_type), ALL_OUTPUT_TYPES)}"
        )


def _check_metrics(where: str, task: Task) -> None:
    """UserError for a metric or an aggregation that lm-eval does not know: it would score nothing."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY

    if getattr(task.config, "process_results", None) is not None:
        return
    for what, held, known in (
        ("metric", getattr(task, "_metric_fn_list", {}), METRIC_REGISTRY),
        ("aggregation", getattr(task, "_aggregation_list", {}), AGGREGATION_REGISTRY),
    ):
        for name, function in held.items():
            if function is None:
                said = name if what == "metric" else _aggregation_of(task, name)
                raise UserError(f"{where}: unknown {what} {said!r}{did_you_mean(str(said), list(known))}")


def _aggregation_of(task: Task, metric: str) -> object:
    """The aggregation that a task's YAML names for a metric."""
    listed = task.config.metric_list
    entries = [one for one in (listed if isinstance(listed, list) else []) if isinstance(one, Mapping)]
    return next((one.get("aggregation") for one in entries if one.get("metric") == metric), metric)


def load_yaml(path: Path, *, resolve_func: bool = True, recursive: bool = True) -> dict[str, object]:
    """A task's or group's YAML with its includes; ``resolve_func`` imports the functions it names.

    UserError, in one line with its place, for a file that is not valid YAML or that includes one that is missing.
    """
    import yaml
    from lm_eval.tasks import _yaml_loader

    try:
        config: dict[str, object] = _yaml_loader.load_yaml(path, resolve_func=resolve_func, recursive=recursive)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML ({error.problem or error.context})") from error
    except yaml.YAMLError as error:  # such as a character that YAML does not allow
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except FileNotFoundError as error:
        if error.filename is None or Path(error.filename).suffix == ".py":
            raise
        raise UserError(f"{path}: it includes {error.filename}, which is not there") from error
    except ValueError as error:
        if not str(error).startswith(("Include cycle", "Expected YAML dict")):
            raise
        raise UserError(f"{path}: {error}") from error
    return config


def filters_of(task: Task) -> Sequence[Filter]:
    """The filter chains that each turn a task's answers into scores."""
    return task._filters


def sacrebleu_pair(reference: object, answer: object) -> tuple[list[object], list[str]]:
    """References and answers of one document in the form that lm-eval passes to sacrebleu."""
    from lm_eval.api.metrics import _sacreformat

    found: tuple[list[object], list[str]] = _sacreformat([reference], [answer])
    return found


def misfits() -> tuple[type[Exception], ...]:
    """The errors that lm-eval raises for a document without a column or with an unexpected value."""
    from jinja2 import TemplateError

    return (TemplateError, KeyError, IndexError, TypeError, AttributeError, AssertionError)


@contextlib.contextmanager
def _no_notes() -> Iterator[None]:
    """lm-eval without its notes on tasks that are defined twice."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval without progress bars and without notes on settings that we set, with templates compiled once.

    Compiling per call is most of its overhead: 1,000 prompts took 3.8 s, with the cache 0.3 s. Everything is undone
    afterwards, including the random numbers that lm-eval draws for task names; compiled templates are kept.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.utils
    import numpy as np

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with _put(lm_eval.api.task, "tqdm", _no_bar), _put(lm_eval.utils.env, "from_string", _compiled()):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _put(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of ``owner`` for the duration of the context."""
    own = dict(vars(owner))
    setattr(owner, name, value)
    try:
        yield
    finally:
        if name in own:
            setattr(owner, name, own[name])
        else:  # inherited from its class
            delattr(owner, name)


@cache
def _compiled() -> Callable[[str], object]:
    """lm-eval's templates by their source."""
    import lm_eval.utils

    compiled: Callable[[str], object] = lru_cache(maxsize=1024)(lm_eval.utils.env.from_string)
    return compiled


def _no_bar(items: Iterable[T], **_options: object) -> Iterable[T]:
    return items
