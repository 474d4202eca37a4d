"""What a task consists of: its YAML, the code that it names, its settings, its documents.

A task is the same only if all of them are; each has a digest, so that a refusal can name what changed. Code is found
without running it: functions that a YAML names with ``!function``, what such files import from beside themselves or
from folders without installed packages, and neighbouring files that their texts name. The manifest records the versions
of installed packages, and those that score are compared.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import json
import re
import site
import sys
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from twotower_eval.measure.suites import groups, lm_tasks
from twotower_eval.measure.suites.documents import BuiltDoc, generates
from twotower_eval.measure.suites.groups import SuiteTask
from twotower_eval.measure.suites.lm_types import Task
from twotower_eval.records import canonical_json, sha256_text
from twotower_eval.strict import JsonObject

FUNCTION = re.compile(r"""!function\s+["']?([\w.]+)""")
FILE_PATTERN = re.compile(r"[\w.-]*\*\.\w+")  # as in *.txt, not as in a regular expression
INSTALLED = {"site-packages", "dist-packages"}  # folders that were put on the search path by hand
OURS = "twotower_eval"  # compared by version


def task_parts(
    node: groups.Node,
    given: Sequence[JsonObject],
    sources: Sequence[Task],
    docs: Sequence[BuiltDoc],
    member: SuiteTask,
    folders: Sequence[Path] = (),
) -> dict[str, str]:
    """Part -> digest: the task's settings, all of its documents (independent of the limit), each file.

    ``sources`` are the single tasks below ``node``, ``given`` the settings that override theirs. ``folders`` hold the
    user's own tasks: their files are called by their place in them.
    """
    scoring = [[s.config.output_type, s.config.metric_list, s.config.filter_list] for s in sources]
    stops = sorted({canonical_json(i.args[1]["until"]) for doc in docs for i in doc.instances if generates(i)})
    chosen = [member.metric, member.filter, member.headline]
    settings = json.dumps([scoring, stops, chosen, list(given)], default=_name_of, sort_keys=True)
    documents = canonical_json([[doc.doc_sha256, doc.prompt_sha256, doc.target_sha256] for doc in docs])
    return {"settings": sha256_text(settings), "documents": sha256_text(documents), **_file_digests(node, folders)}


def _name_of(part: object) -> str:
    return str(getattr(part, "__qualname__", type(part).__name__))


def _file_digests(node: groups.Node, folders: Sequence[Path]) -> dict[str, str]:
    yamls = set(groups.yaml_files(node))
    code = with_imports(file for yaml in yamls for file in _named_code(yaml))
    files = shown_names(yamls | code, folders)
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in sorted(files.items())}


def shown_names(files: Collection[Path], folders: Sequence[Path] = ()) -> dict[str, Path]:
    """Files by names that do not depend on where the checkout lies: relative to the tasks folder, or to one of
    ``folders``, else by name with as many parent folders as it takes to tell files apart."""
    num_parts = {file: _num_parts(file, folders) for file in files}
    while True:
        names = {file: "/".join(file.parts[-num:]) for file, num in num_parts.items()}
        used = Counter(names.values())
        if all(num == 1 for num in used.values()):
            return {name: file for file, name in names.items()}
        num_parts = {file: num + (used[names[file]] > 1) for file, num in num_parts.items()}


def _num_parts(file: Path, folders: Sequence[Path]) -> int:
    for root in (*folders, *lm_tasks.roots()):
        if file.is_relative_to(root):
            return len(file.relative_to(root).parts)
    return 2


def _named_code(yaml: Path) -> Iterator[Path]:
    """The files of the functions that a YAML names: beside it, else where Python would import them from."""
    for function in FUNCTION.findall(yaml.read_text(encoding="utf-8")):
        yield from _modules(function.rpartition(".")[0], [yaml.parent, *_search_path()])


def with_imports(files: Iterable[Path]) -> set[Path]:
    """The files and everything they import or name, directly or not, that is not an installed package."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop().resolve()
        if file not in found:
            found.add(file)
            tree = _parsed(file)
            if tree is not None:
                waiting += [*_imported(file, tree), *_named_in_texts(file, tree)]
    return found


def _parsed(file: Path) -> ast.Module | None:
    if file.suffix != ".py":
        return None
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # running it will report what is wrong
        return None


def _named_in_texts(file: Path, tree: ast.Module) -> Iterator[Path]:
    """Neighbouring files and folders that the code names in texts: what ``import_module``, ``open`` or a changed search
    path may reach."""
    names = {*_texts(tree), *_module_names(tree)}
    words = {word for name in names for word in (name, *re.split(r"[/\\]", name), *name.split("."))}
    patterns = [word for word in words if FILE_PATTERN.fullmatch(word)]
    folders = [file.parent]
    while folders:
        for entry in sorted(folders.pop().iterdir()):
            is_module = entry.suffix == ".py" and entry.stem in words
            if not (is_module or entry.name in words or any(fnmatch.fnmatch(entry.name, one) for one in patterns)):
                continue
            if entry.is_file():
                yield entry
            elif entry.is_dir() and not entry.is_symlink():  # a link may lead back
                folders.append(entry)


def _texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _module_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(alias.name for alias in node.names))


def _imported(file: Path, tree: ast.Module) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _modules(alias.name, [file.parent, *_search_path()])
        if isinstance(node, ast.ImportFrom):
            roots = [file.parents[node.level - 1]] if node.level else [file.parent, *_search_path()]
            for name in (node.module or "", *(f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names)):
                yield from _modules(name, roots)


def _modules(dotted: str, roots: Sequence[Path]) -> Iterator[Path]:
    """The module's file and its packages' files, under the first root that has it."""
    names = dotted.split(".")
    if names[0] in ("", OURS):
        return
    if dotted.startswith("lm_eval.tasks."):
        names, roots = names[2:], lm_tasks.roots()[1:]
    for root in roots:
        packages = [root.joinpath(*names[:end], "__init__.py") for end in range(1, len(names) + 1)]
        module = root.joinpath(*names).with_suffix(".py")
        if module.is_file() or packages[-1].is_file():
            yield from (file for file in (*packages, module) if file.is_file())
            return


def _search_path() -> list[Path]:
    """Folders of Python's search path that hold neither Python's own modules nor installed packages."""
    named = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed = {Path(path).resolve() for path in (*named, *site.getsitepackages(), site.getusersitepackages())}
    folders = [Path(entry or ".").resolve() for entry in sys.path]
    return [
        folder
        for folder in folders
        if folder.is_dir() and INSTALLED.isdisjoint(folder.parts) and not any(map(folder.is_relative_to, installed))
    ]
