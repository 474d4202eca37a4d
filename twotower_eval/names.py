"""Names that users give: resolved to objects, shortened, and answered with the nearest known one if wrong.

A name is that of something shipped, one that an installed package registers (see :data:`GROUPS`), or
``package.module:attribute``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from twotower_eval.errors import UserError
from twotower_eval.plugin_calls import imported
from twotower_eval.records import COMMIT

if TYPE_CHECKING:
    from importlib.metadata import Distribution

# What users may add -> the entry-point group in which their packages register it.
GROUPS = {
    "model family": "twotower_eval.families",
    "decoder": "twotower_eval.decoders",
    "report section": "twotower_eval.sections",
}


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A place where users may add something of their own.

    ``what`` is a key of :data:`GROUPS`, ``shipped`` maps this project's names to places (``package.module:attribute``),
    ``form`` shows how a user's own is written, as in ``package.module:Class``.
    """

    what: str
    form: str
    shipped: Mapping[str, str]
    other_words: Mapping[str, str] = field(default_factory=dict)  # what others call something shipped

    def place(self, name: str) -> str:
        """The ``package.module:attribute`` behind a name. UserError, with a hint, for an unknown name.

        A shipped name always means the shipped thing; installed packages are searched only for other names.
        """
        if name in self.shipped:
            return self.shipped[name]
        if ":" in name:
            return name
        others = self.registered()
        if name in others:
            return others[name]
        if (wrong := _misregistered(self.what, name)) is not None:
            raise UserError(wrong)
        known = [*self.shipped, *others]
        near = self.other_words.get(name) or nearest(name, known)
        choose = f"choose from {', '.join(known)}, or name your own as {self.form}"
        raise UserError(f"{self.what} {name!r} is unknown; {f'did you mean {near}?' if near else choose}")

    def registered(self) -> dict[str, str]:
        """Name -> place of everything that installed packages register. UserError if a name is taken."""
        found = registered(self.what)
        for name in found:
            if name in self.shipped:
                raise UserError(
                    f"an installed package registers {found[name]} as {self.what} {name!r}, which is shipped: "
                    f"uninstall it, or have it take another name in its entry points ({GROUPS[self.what]})"
                )
        return found


@cache
def registered(what: str) -> dict[str, str]:
    """Name -> ``package.module:attribute`` of what installed packages register, by name. UserError where two packages
    register different things under one name. ``what`` is a key of :data:`GROUPS`."""
    found: dict[str, str] = {}
    for name, place in sorted({line for lines in _lines(GROUPS[what]).values() for line in lines}):
        if ":" in place and found.setdefault(name, place) != place:
            raise UserError(
                f"installed packages register both {found[name]} and {place} as {what} {name!r}: uninstall one of them"
            )
    return found


def _misregistered(what: str, name: str) -> str | None:
    """What is wrong with how an installed package registers a name; None where none does, or nothing is."""
    for package, lines in _lines(GROUPS[what]).items():
        for left, place in lines:
            if ":" not in place and name in re.findall(r"[\w.-]+", left):
                said = f"{left} = {place}" if place else left
                return (
                    f"{what} {name!r}: package {package} registers it as {said!r}, which is not of the form "
                    "name = package.module:attribute"
                )
    return None


def _lines(group: str) -> dict[str, list[tuple[str, str]]]:
    """Installed package -> name and place of each line below ``[group]`` in its entry_points.txt.

    These files are read line by line, not by importlib's parser: it stops at the first line of any package that it
    cannot read. Of two copies of a package the first on Python's path counts.
    """
    from importlib import metadata

    found: dict[str, list[tuple[str, str]]] = {}
    for package in metadata.distributions():
        text = _entry_points(package)
        if f"[{group}]" not in text or (package.read_text("METADATA") or package.read_text("PKG-INFO")) is None:
            continue
        name = package.name
        if name in found or _entry_points(metadata.distribution(name)) != text:
            continue
        below = text.partition(f"[{group}]")[2].splitlines()[1:]
        own = list(takewhile(lambda line: not line.lstrip().startswith("["), below))
        lines = [line.partition("=") for line in own if line.strip() and not line.lstrip().startswith(("#", ";"))]
        found[name] = [(one.strip(), "".join(place.partition("[")[0].split())) for one, _, place in lines]
    return found


def _entry_points(package: Distribution) -> str:
    try:
        return package.read_text("entry_points.txt") or ""
    except UnicodeDecodeError:
        return ""


def resolve(name: str) -> object:
    """The object named by ``"package.module:attribute"``; UserError says which half is wrong, and how."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{name!r} is not of the form package.module:attribute")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(
            f"{name!r}: {module_name!r} is no module's name but, it seems, a file's: write module:{attribute}, and set "
            "PYTHONPATH to the folder that the module is in"
        )
    try:
        module = imported(module_name, name)
    except ImportError as error:
        hint = _beside(module_name) if error.name == module_name.partition(".")[0] else ""
        raise UserError(f"cannot import {module_name!r} (named by {name!r}): {error}{hint}") from error
    if not hasattr(module, attribute):
        raise UserError(f"module {module_name!r} has no {attribute!r}{did_you_mean(attribute, dir(module))}")
    return getattr(module, attribute)


def _beside(module: str) -> str:
    """How Python finds a module in the current folder, which it does not look into by itself."""
    top = module.partition(".")[0]
    there = next((path for path in (Path(f"{top}.py"), Path(top)) if path.exists()), None)
    if there is None:
        return f"; if {top}.py is in the current folder, set PYTHONPATH=."
    return f"; {there} lies in this folder: set PYTHONPATH=. to have Python look here"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` probably means; None if none is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def config_name(path: str) -> str:
    """A name for a size of model: its config's file, or that file's folder, without the path, and without a commit."""
    path = re.sub(rf"@{COMMIT.pattern}$", "", path)
    last = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return last.removesuffix(".json").removesuffix(".config")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` if ``known`` has something close to ``word``, else the whole list if it is short."""
    names = list(known)
    near = nearest(word, names)
    if near is not None:
        return f" (did you mean {near!r}?)"
    return f" (known: {', '.join(names)})" if 0 < len(names) <= 30 else ""


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """``1 task``, ``1,800 documents``; ``nouns`` is the plural where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
