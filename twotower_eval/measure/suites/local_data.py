"""A task's documents in local files: beside its YAML, where the YAML says, or in a folder of prepared benchmarks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from twotower_eval.errors import UserError
from twotower_eval.measure.suites.datafiles import folders, numbered_rows
from twotower_eval.measure.suites.lm_types import Entry
from twotower_eval.names import nearest
from twotower_eval.strict import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HERE, NOT_HERE = "here", "not here"
Origin = Literal["own", "shipped", "lm-eval"]  # of a task: the user's, this project's, lm-eval's
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def on_local_files(
    name: str, config: dict[str, object], yaml: Path, data_dir: Path | None, origin: Origin
) -> dict[str, object]:
    """``config`` reading local files, where there are any for it; ``yaml`` is the task's own file.

    A shipped task reads files beside its YAML, a user's own those that it names, any other those under ``data_dir``.
    """
    named = _kwargs(config).get("data_files")
    beside = yaml.parent
    if origin == "shipped":
        if config.get("dataset_path") != "json" or not isinstance(named, Mapping):
            return config
        return _on_files(config, {split: beside / file for split, file in named.items()})
    if named is not None and origin == "own":
        return _on_named_files(name, config, named, beside)
    if data_dir is None or (origin == "own" and config.get("custom_dataset")):
        return config
    names = folders(name, str(config.get("dataset_path") or ""), str(config.get("dataset_name")))
    folder = next((data_dir / candidate for candidate in names if (data_dir / candidate).is_dir()), None)
    if folder is None:
        raise UserError(f"task {name!r}: {data_dir} has no folder {' or '.join(names)}")
    files = {split: folder / f"{split}.jsonl" for split in {str(config[key]) for key in SPLITS if config.get(key)}}
    there = {split: path for split, path in files.items() if path.is_file()}
    _check_splits(name, config, files, there)
    lacking = {key: None for key in SPLITS if config.get(key) and config[key] not in there}
    return _on_files({**config, **lacking}, there)


def _kwargs(config: JsonObject) -> JsonObject:
    """What a task's YAML hands to the reader of its data set; nothing where it is no table."""
    kwargs = config.get("dataset_kwargs")
    return kwargs if isinstance(kwargs, Mapping) else {}


def _on_named_files(name: str, config: dict[str, object], named: object, beside: Path) -> dict[str, object]:
    """``config`` of a user's own task, reading the files that it names.

    lm-eval looks for them in the current folder; those that are not there may lie beside the YAML.
    """

    def found(given: object) -> object:
        if isinstance(given, Mapping):
            return {split: found(one) for split, one in given.items()}
        if isinstance(given, (list, tuple)):
            return [found(one) for one in given]
        if not isinstance(given, str) or "://" in given or Path(given).exists() or not (beside / given).exists():
            return given
        return str(beside / given)

    files = found(named)
    plain = set(_kwargs(config)) == {"data_files"} and config.get("dataset_path") == "json"
    if plain and isinstance(files, Mapping):
        paths = {split: Path(one) for split, one in files.items() if isinstance(one, str) and one.endswith(".jsonl")}
        if len(paths) == len(files):
            for path in (path for path in paths.values() if not path.is_file()):
                near = nearest(path.name, [one.name for one in beside.iterdir()])
                hint = f" (did you mean {near!r}?)" if near else ""
                raise UserError(f"task {name!r}: there is no data file {path}, here or beside its YAML{hint}")
            return _on_files(config, paths)
    return {**config, "dataset_kwargs": {**_kwargs(config), "data_files": files}}


def where_data_is(name: str, entry: Entry, data_dir: Path | None, origin: Origin) -> str:
    """Whether a task's documents are on this machine: ``here``, ``in the hub's cache``, or ``not here``."""
    config = entry.cfg or {}
    dataset = str(config.get("dataset_path") or "")
    named = _kwargs(config).get("data_files")
    if origin != "lm-eval" and named is not None:
        files = named.values() if isinstance(named, Mapping) else [named]
        listed = [str(one) for several in files for one in (several if isinstance(several, list) else [several])]
        beside = Path(entry.yaml_path).parent
        return HERE if all(Path(one).exists() or (beside / one).exists() for one in listed) else NOT_HERE
    if config.get("custom_dataset"):
        return "made by its own code"
    if data_dir is not None:
        there = (data_dir / folder for folder in folders(name, dataset, str(config.get("dataset_name"))))
        return HERE if any(folder.is_dir() for folder in there) else NOT_HERE
    if Path(dataset).exists() and dataset:
        return HERE
    cached = data_cache() / f"datasets--{dataset.replace('/', '--')}"
    return "in the hub's cache" if dataset and cached.is_dir() else NOT_HERE


def data_cache() -> Path:
    """The folder in which the Hugging Face hub's client keeps data sets."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(given or Path(home, "hub")).expanduser()


def places(name: str, config: JsonObject) -> str:
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
    raise UserError(f"{path}, line {line}: values that do not fit those of the lines before ({first_line(why)})")


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
