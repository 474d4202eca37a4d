"""Names that users give: resolved to objects, shortened, and answered with the nearest known one if wrong.

A name is that of something shipped, one that an installed package registers (see :data:`GROUPS`), or
``package.module:attribute``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.plugin_calls import imported

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
        known = [*self.shipped, *others]
        near = nearest(name, known)
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
    """Name -> ``package.module:attribute`` of what installed packages register under ``what``, a key of :data:`GROUPS`.

    UserError if two packages register different things under one name.
    """
    from importlib.metadata import entry_points

    found: dict[str, str] = {}
    for entry in sorted(entry_points(group=GROUPS[what])):
        place = f"{entry.module}:{entry.attr}"
        if found.setdefault(entry.name, place) != place:
            raise UserError(
                f"installed packages register both {found[entry.name]} and {place} as {what} {entry.name!r}: "
                "uninstall one of them"
            )
    return found


def resolve(name: str) -> object:
    """The object named by ``"package.module:attribute"``; UserError says which half is wrong, and how."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{name!r} is not of the form package.module:attribute")
    try:
        module = imported(module_name, name)
    except ImportError as error:
        raise UserError(f"cannot import {module_name!r} (named by {name!r}): {error}{_beside(module_name)}") from error
    if not hasattr(module, attribute):
        raise UserError(f"module {module_name!r} has no {attribute!r}{did_you_mean(attribute, dir(module))}")
    return getattr(module, attribute)


def _beside(module: str) -> str:
    """A hint if a module that Python does not find lies in the current folder."""
    top = module.partition(".")[0]
    there = next((path for path in (Path(f"{top}.py"), Path(top)) if path.exists()), None)
    return "" if there is None else f"; {there} lies in this folder: set PYTHONPATH=. to have Python look here"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` probably means; None if none is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def config_name(path: str) -> str:
    """A name for a size of model: its config's file, or that file's folder, without the path."""
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
