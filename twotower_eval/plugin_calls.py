"""Calls into a user's own code: whatever it raises becomes an error of one line that says where.

Errors of this project's own code pass through unchanged.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import TypeVar

from twotower_eval.errors import UserError

OWN = __name__.partition(".")[0]
T = TypeVar("T")
TRACEBACK_VARIABLE = "TWOTOWER_EVAL_TRACEBACK"  # if set, errors end with the whole traceback
SHOWN = 4  # innermost lines of a plug-in that an error names


class PluginError(UserError):
    """A user's own code raised an exception, which is the cause of this one."""


def is_own(module: str) -> bool:
    """Whether a module is part of this project."""
    return module.partition(".")[0] == OWN


def module_of(plugin: object) -> str:
    """The module of a class, of a function or of an object's class."""
    kind = plugin if hasattr(plugin, "__qualname__") else type(plugin)
    return str(getattr(kind, "__module__", OWN))


@contextmanager
def calls_of(
    module: str,
    name: str,
    what: str,
    *,
    pass_through: tuple[type[BaseException], ...] = (),
    ours: Sequence[BaseException] = (),
) -> Iterator[None]:
    """Context of a call into ``module``: whatever it raises becomes a PluginError.

    ``what`` and ``name`` are for the error's text: the ``what`` of ``name``. Exceptions of the classes in
    ``pass_through`` are raised on unchanged, and so are the objects in ``ours``, which this project's own callbacks
    raised. Nothing is caught where the module is part of this project.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # whatever a user's own code may raise
        if is_own(module) or isinstance(error, (PluginError, *pass_through)) or any(error is one for one in ours):
            raise
        raise PluginError(_error_line(error, module, name, what)) from error


@contextmanager
def calls_in(module: str, name: str, *, pass_through: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Context of work that may call into ``module`` from anywhere: an exception that passed through its lines becomes a
    PluginError.

    ``name`` is for the error's text, with the first function of the module on the traceback. Anything else passes
    through. See :func:`calls_of`.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # whatever a user's own code may raise
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if _is_of(frame, module)]
        if is_own(module) or isinstance(error, (PluginError, *pass_through)) or not frames:
            raise
        raise PluginError(_error_line(error, module, name, frames[0].f_code.co_name)) from error


def _error_line(error: BaseException, module: str, name: str, what: str) -> str:
    said = f"{type(error).__name__}{f': {error}' if str(error) else ''}{_place(error, module)}"
    return f"{name}: its {what} raised {said}; set {TRACEBACK_VARIABLE}=1 for the whole traceback"


def noting(failed: list[BaseException], function: Callable[..., T]) -> Callable[..., T]:
    """A callback for a plug-in; what it raises is recorded in ``failed``, as it is no fault of the plug-in."""

    def noted(*given: object) -> T:
        try:
            return function(*given)
        except Exception as error:
            failed.append(error)
            raise

    return noted


def _place(error: BaseException, module: str) -> str:
    """`` at mine.py:41 in _step, called at mine.py:20 in generate``, and the function it called if that raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [number for number, (frame, _) in enumerate(frames) if _is_of(frame, module)]
    if not own:
        return ""  # the call itself failed
    places = [_line(*frames[number]) for number in reversed(own)][:SHOWN]
    below = frames[own[-1] + 1 :]
    called = f", in its call of {below[0][0].f_code.co_qualname}" if below else ""
    return f" at {places[0]}{called}" + "".join(f", called at {place}" for place in places[1:])


def _is_of(frame: FrameType, module: str) -> bool:
    """Whether a line belongs to a plug-in: to its package or, without one, to a file beside it."""
    name = str(frame.f_globals.get("__name__", OWN))
    if is_own(name):
        return False
    home = getattr(sys.modules.get(module), "__file__", None)
    beside = "." not in module and home is not None and Path(frame.f_code.co_filename).parent == Path(home).parent
    return name.partition(".")[0] == module.partition(".")[0] or beside


def _line(frame: FrameType, number: int) -> str:
    return f"{frame.f_code.co_filename}:{number} in {frame.f_code.co_qualname}"


def imported(module: str, name: str) -> ModuleType:
    """Import a module; ImportError if there is none, PluginError if a user's own raises anything else."""
    with calls_of(module, name, "module", pass_through=(ImportError,)):
        return importlib.import_module(module)
