"""Names that users give: resolved to objects, shortened, and answered with the nearest known one where wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from twotower_eval.errors import UserError
from twotower_eval.plugin_calls import imported


def resolve(name: str) -> Any:
    """The object that ``"package.module:attribute"`` names; ValueError says which half is wrong, and how."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{name!r} is not of the form package.module:attribute")
    try:
        module = imported(module_name, name)
    except ImportError as error:
        raise UserError(f"cannot import {module_name!r} (named by {name!r}): {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"module {module_name!r} has no {attribute!r}{did_you_mean(attribute, dir(module))}")
    return getattr(module, attribute)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` was probably meant to be; None where none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def config_name(path: str) -> str:
    """What the size of a model is called after its config's file, or the folder of it, wherever that lies."""
    last = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return last.removesuffix(".json").removesuffix(".config")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where ``known`` holds something near ``word``, else the whole list if it is short."""
    names = list(known)
    near = nearest(word, names)
    if near is not None:
        return f" (did you mean {near!r}?)"
    return f" (known: {', '.join(names)})" if 0 < len(names) <= 30 else ""
