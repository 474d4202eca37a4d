"""Tasks and suites of the user's own: folders of ``--include-path``, and files that ``--tasks`` names by their path."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.measure.suites import lm_tasks
from twotower_eval.measure.suites.lm_types import Entry
from twotower_eval.names import nearest

TASK_FILES, SUITE_FILE = (".yaml", ".yml"), ".toml"
WILDCARDS = "*?["


@dataclass(frozen=True, kw_only=True)
class Included:
    """What users add to the shipped tasks and lm-eval's own.

    ``indexes`` are looked up in this order, before all others: files by path, then folders, the last given first, as a
    later folder wins in lm-eval. ``named`` holds the tasks of each path that was named. ``broken`` has a line for each
    file in the folders that cannot be read; lm-eval leaves these out without a word.
    """

    indexes: tuple[Mapping[str, Entry], ...] = ()
    folders: tuple[Path, ...] = ()
    named: Mapping[str, tuple[str, ...]] | None = None
    broken: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of all tasks, groups and tags here."""
        return [*dict.fromkeys(name for index in self.indexes for name in index)]

    def tasks_at(self, path: str) -> tuple[str, ...]:
        """The tasks and groups of a path that was named; none for a name that is no path."""
        return (self.named or {}).get(path, ())


def read_included(include_path: Sequence[str] = (), names: Sequence[str] = ()) -> Included:
    """The user's own tasks: all in the folders ``include_path``, and those of the paths among ``names``.

    UserError, in one line with the nearest name, for a folder that is none and a file that is missing, is not valid
    YAML, or is no task.
    """
    folders = [Path(path).expanduser() for path in include_path]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--include-path {folder}: no such folder{nearest_path(folder, folders_only=True)}")
    broken: list[str] = []
    indexes = [lm_tasks.folder_index(folder, broken.append) for folder in folders]
    named: dict[str, tuple[str, ...]] = {}
    of_files: dict[str, Entry] = {}
    for name in names:
        files = task_files(name)
        if files is not None:
            found = [lm_tasks.file_entry(file) for file in files]
            named[name] = tuple(one.name for one in found)
            for one in found:
                if of_files.setdefault(one.name, one).yaml_path != one.yaml_path:
                    raise UserError(f"{of_files[one.name].yaml_path} and {one.yaml_path} are both task {one.name!r}")
    parents = [Path(entry.yaml_path).parent for entry in of_files.values()]
    return Included(
        indexes=(*([of_files] if of_files else []), *reversed(indexes)),
        folders=tuple(dict.fromkeys(folder.resolve() for folder in (*reversed(folders), *parents))),
        named=named,
        broken=tuple(broken),
    )


def task_files(name: str) -> list[Path] | None:
    """The YAML files that a name is the path of, by a wildcard or as their folder, too; None for a name that is no
    path. UserError if there is no such file."""
    path = Path(name).expanduser()
    if name.endswith(TASK_FILES):
        files = sorted(path.parent.glob(path.name)) if is_pattern(path.name) else [path] if path.is_file() else []
        if not files:
            raise UserError(f"no task file {name}{nearest_path(path)}")
        return files
    if not is_path(name) or not path.is_dir():
        return None
    files = [file for end in TASK_FILES for file in sorted(path.glob(f"*{end}")) if lm_tasks.is_task_file(file)]
    if not files:
        raise UserError(f"folder {name} holds no task: none of its YAML files names a task or a group")
    return files


def is_path(name: str) -> bool:
    """Whether a name can only be a path: a suite's member has one slash and no file's ending."""
    begins = name.startswith((".", "/", "~"))
    return "/" in name and (begins or name.endswith((SUITE_FILE, *TASK_FILES)) or Path(name).is_dir())


def is_pattern(name: str) -> bool:
    """Whether a name has wildcards."""
    return any(sign in name for sign in WILDCARDS)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern matches, sorted, as lm-eval does it."""
    return sorted({*fnmatch.filter(list(names), pattern)})


def nearest_path(path: Path, *, folders_only: bool = False) -> str:
    """`` (did you mean DIR/other.yaml?)`` if something beside ``path``, or else beside its folder, is called like
    it."""
    for parent, wanted in ((path.parent, path.name), (path.parent.parent, path.parent.name)):
        if parent.is_dir():
            there = [one for one in parent.iterdir() if one.is_dir() or not folders_only]
            near = nearest(wanted, [one.name for one in _of_kind(there, wanted)])
            return f" (did you mean {parent / near}?)" if near else ""
    return ""


def _of_kind(paths: Sequence[Path], wanted: str) -> Iterator[Path]:
    """Those with the ending of the wanted name, if any has it."""
    ending = Path(wanted).suffix
    alike = [path for path in paths if path.suffix == ending]
    yield from alike or paths
