"""The code of a plug-in: the file of its module and of every module beside it that it imports, each with a sha256.

The plug-in itself is imported. What it imports is only read, never run: names are followed through ``import``
statements, wherever they stand. What is imported by a name made up at run time is not found, nor what lies in another
package.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from twotower_eval.names import resolve
from twotower_eval.plugin_calls import OWN, is_own
from twotower_eval.records import FileDigest

NO_FILE = "no file"  # in place of a sha256
SHARED_FOLDERS = ("site-packages", "dist-packages")  # modules there lie beside each other by chance


def plugin_code(name: str) -> tuple[FileDigest, ...] | None:
    """Files of the plug-in that a ``"module:attribute"`` names; ``None`` for what is part of this project.

    A compiled module stands for itself, and one without a file has the reason in place of its sha256. UserError where
    there is no such module or attribute.
    """
    found = resolve(name)
    modules = {name.partition(":")[0], str(getattr(found, "__module__", None) or OWN)}
    plugin = sorted(module for module in modules if not is_own(module) and module != "builtins")
    if not plugin:
        return None
    digests = {one.name: one for module in plugin for one in _files_of(module)}
    return tuple(digests[file] for file in sorted(digests))


def _files_of(module: str) -> Iterator[FileDigest]:
    """The module's own file, and those of what it imports from the same package or, without one, the same folder."""
    homes = _homes(module)
    waiting, seen = [*_with_parents(module)], set[str]()
    while waiting:
        name = waiting.pop()
        file = None if name in seen else _file_of(name)
        if name == module and file is None and name not in seen:
            yield FileDigest(name=module, sha256=NO_FILE)
        seen.add(name)
        home = next((home for home in homes if file is not None and file.is_relative_to(home)), None)
        if file is None or (home is None and name != module):
            continue
        content = file.read_bytes()
        shown = file.name if home is None else _below(file, home, module)
        yield FileDigest(name=shown, sha256=hashlib.sha256(content).hexdigest())
        if file.suffix == ".py" and home is not None:
            waiting += _imported(name, content, is_package=file.name == "__init__.py")


def _below(file: Path, home: Path, module: str) -> str:
    """A file's name as an import would have it: the package's own folder first."""
    inside = file.relative_to(home).as_posix()
    return f"{module.partition('.')[0]}/{inside}" if _is_package(module.partition(".")[0]) else inside


def _homes(module: str) -> list[Path]:
    """Folders of the package that a module is in; of a single file its folder, unless unrelated ones share that."""
    top = module.partition(".")[0]
    spec = _spec(top)
    if spec is not None and spec.submodule_search_locations:
        return [Path(place).resolve() for place in spec.submodule_search_locations]
    file = _file_of(top)
    shared = file is None or file.parent.name in SHARED_FOLDERS or file.parent == Path(ast.__file__).resolve().parent
    return [] if file is None or shared else [file.parent]


def _is_package(name: str) -> bool:
    spec = _spec(name)
    return spec is not None and bool(spec.submodule_search_locations)


def _spec(name: str) -> ModuleSpec | None:
    """The module's spec; ``None`` for anything that is not a module.

    Looked up folder by folder: ``importlib.util.find_spec`` would import every package that the module is in.
    """
    loaded = sys.modules.get(name)
    if isinstance(loaded, ModuleType) and loaded.__spec__ is not None:
        return loaded.__spec__
    package = name.rpartition(".")[0]
    if package:
        finders = (pkgutil.get_importer(folder) for folder in _folders(package))
        return next((found for finder in finders if finder and (found := finder.find_spec(name))), None)
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # not a module's name, or a module without a spec
        return None


def _folders(package: str) -> list[str]:
    """Folders of a package's modules; none for anything that is not a package."""
    loaded, spec = sys.modules.get(package), _spec(package)
    places = getattr(loaded, "__path__", None) or (spec and spec.submodule_search_locations)
    return [str(place) for place in places or ()]


def _file_of(name: str) -> Path | None:
    spec = _spec(name)
    loaded = sys.modules.get(name)
    origin = spec.origin if spec is not None and spec.has_location else getattr(loaded, "__file__", None)
    file = None if origin is None else Path(origin).resolve()
    return file if file is not None and file.is_file() else None


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: num + 1]) for num in range(len(parts))]


def _imported(module: str, content: bytes, *, is_package: bool) -> list[str]:
    """Names that a file imports, with the packages that they are in; some may be attributes and no modules."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # running it reports what is wrong
        return []
    package = module if is_package else module.rpartition(".")[0]
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return [parent for name in names if name for parent in _with_parents(name)]
