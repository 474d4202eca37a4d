"""lm-eval's tasks, found by name and loaded from local files or the hub.

Only this module touches lm-eval's private or global parts: its YAML reader, progress bars, template compiler and
filters. tests/test_suites.py checks what is relied on.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from twotower_eval.errors import UserError
from twotower_eval.measure.suites.datafiles import folders, numbered_rows
from twotower_eval.measure.suites.lm_types import Aggregation, Entry, Filter, Instance, Task
from twotower_eval.records import MEAN
from twotower_eval.resources import data_path
from twotower_eval.strict import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

T = TypeVar("T")
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
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


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


def index_of(name: str) -> Mapping[str, Entry]:
    """The index that holds ``name``, local tasks first."""
    return local_index() if name in local_index() else stock_index()


def load_task(name: str, settings: JsonObject, data_dir: Path | None) -> Task:
    """Load one lm-eval task with ``settings`` over its own. UserError that says what to do.

    Local tasks read the files beside their YAML; stock tasks those under ``data_dir`` if given, else the hub.
    """
    config = _with_data(name, {**_resolved(name), **settings}, data_dir)
    where = f"task {name!r}"
    from lm_eval.tasks import TaskManager

    try:
        task: Task = TaskManager(include_defaults=False).load(config)["tasks"][name]
    except OSError as error:
        if data_dir is not None or "custom_dataset" in config:
            raise UserError(f"{where}: {error}") from error
        raise UserError(
            f"{where}: its data {config.get('dataset_path')!r} cannot be reached ({_first_line(error)}); "
            f"give it with --data-dir DIR, as {_places(name, config)}"
        ) from error
    except misfits() as error:
        raise UserError(f"{where}: its data lacks what the task reads ({_first_line(error)})") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{where}: needs images or audio, which no model here takes")
    return task


def build_instances(name: str, task: Task, fewshot_seed: int) -> list[Instance]:
    """lm-eval's requests for every document of the task."""
    task.set_fewshot_seed(fewshot_seed)
    try:
        task.build_all_requests()
    except misfits() as error:
        raise UserError(f"task {name!r}: its data lacks what the prompts read ({_first_line(error)})") from error
    except UserError:
        raise
    except MISTAKEN as error:
        raise UserError(f"task {name!r}: its own code fails on its documents ({_first_line(error)})") from error
    return list(task.instances)


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


def _resolved(name: str) -> dict[str, Any]:
    try:
        return {**load_yaml(index_of(name)[name].yaml_path), "task": name}
    except (ImportError, AssertionError) as error:
        # Only lm-eval's mathematics tasks import more than lm-eval installs.
        raise UserError(
            f"task {name!r}: {_first_line(error)} (for mathematics tasks: pip install 'lm-eval[math]')"
        ) from error
    except OSError as error:
        raise UserError(f"task {name!r}: its code needs what is not here ({_first_line(error)})") from error


def _with_data(name: str, config: dict[str, Any], data_dir: Path | None) -> dict[str, Any]:
    """``config`` reading local files, where there are any for it."""
    if name in local_index():
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        if config.get("dataset_path") != "json" or not isinstance(files, Mapping):
            return config
        beside = Path(index_of(name)[name].yaml_path).parent
        return _on_files(config, {split: beside / file for split, file in files.items()})
    if data_dir is None:
        return config
    names = folders(name, config.get("dataset_path"), config.get("dataset_name"))
    folder = next((data_dir / candidate for candidate in names if (data_dir / candidate).is_dir()), None)
    if folder is None:
        raise UserError(f"task {name!r}: {data_dir} has no folder {' or '.join(names)}")
    files = {split: folder / f"{split}.jsonl" for split in {config[key] for key in SPLITS if config.get(key)}}
    there = {split: path for split, path in files.items() if path.is_file()}
    _check_splits(name, config, files, there)
    lacking = {key: None for key in SPLITS if config.get(key) and config[key] not in there}
    return _on_files({**config, **lacking}, there)


def _places(name: str, config: JsonObject) -> str:
    """``DIR/hellaswag/SPLIT.jsonl, SPLIT being train and validation``: where a data folder holds a task's data."""
    folder = folders(name, *(str(config.get(key)) for key in ("dataset_path", "dataset_name")))[-1]
    splits = dict.fromkeys(str(config[key]) for key in SPLITS if config.get(key))
    return f"DIR/{folder}/SPLIT.jsonl, SPLIT being {' and '.join(splits)}"


def _check_splits(name: str, config: JsonObject, files: Mapping[str, Path], there: Mapping[str, Path]) -> None:
    """Documents and few-shot examples must come from the split that the stock task takes them from, or fail."""
    documents = str(config.get("test_split") or config.get("validation_split") or "")
    if documents not in there:
        raise UserError(f"task {name!r}: file {files.get(documents, 'with its documents')} is missing")
    shots = config.get("num_fewshot")
    own = config.get("fewshot_config")
    if shots and not (isinstance(own, Mapping) and own.get("samples")):
        order = ("fewshot_split", "training_split", "validation_split", "test_split")
        split = next((str(config[key]) for key in order if config.get(key)), "")
        if split not in there:
            raise UserError(f"task {name!r}: file {files[split]} is missing, which its {shots} examples come from")


def _on_files(config: JsonObject, files: Mapping[str, Path]) -> dict[str, object]:
    # Not the "json" builder of datasets: it writes a copy into the user's cache and takes 0.3 s a file.
    return {**config, "dataset_kwargs": None, "custom_dataset": partial(_read_dataset, dict(files))}


def _read_dataset(files: Mapping[str, Path], **_metadata: object) -> DatasetDict:
    from datasets import DatasetDict

    return DatasetDict({split: _split(path, numbered_rows(path)) for split, path in files.items()})


def _split(path: Path, rows: Sequence[tuple[int, JsonObject]]) -> Dataset:
    """The rows as a data set; UserError with the first line that does not fit the earlier ones."""
    from datasets import Dataset
    from pyarrow import ArrowException

    def made(num: int) -> Dataset:
        return Dataset.from_list([dict(row) for _, row in rows[:num]])

    misfits = (ArrowException, OverflowError, RecursionError)
    try:
        return made(len(rows))
    except misfits as error:
        fitting, failing, why = 0, len(rows), error
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        try:
            made(middle)
            fitting = middle
        except misfits as error:
            failing, why = middle, error
    line = rows[failing - 1][0]
    raise UserError(f"{path}, line {line}: values that do not fit those of the lines before ({_first_line(why)})")


def load_yaml(path: Path, *, resolve_func: bool = True, recursive: bool = True) -> dict[str, object]:
    """A task's or group's YAML with its includes; ``resolve_func`` imports the functions it names."""
    from lm_eval.tasks import _yaml_loader

    config: dict[str, object] = _yaml_loader.load_yaml(path, resolve_func=resolve_func, recursive=recursive)
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


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
