"""Turns what callers pass (keywords, texts, lists, paths, objects) into plans and runs."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
import multiprocessing
import os
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar, cast

from twotower_eval import store
from twotower_eval.api.runs import Run
from twotower_eval.decoder_settings import (
    BASELINE_DECODER,
    as_tuple,
    check_given_once,
    given_settings,
    typed_settings,
)
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_fields import list_fields
from twotower_eval.plan_files import load_plan, merge, plan_from_json
from twotower_eval.progress import Progress, SilentProgress, choose_progress
from twotower_eval.records import AUTO, Verb, verb_of
from twotower_eval.sources import ENDPOINT, located, read_source
from twotower_eval.store.environment import let_threads_sleep
from twotower_eval.usual import has_own_form, usual_of

P = TypeVar("P", RunPlan, SpeedPlan, SizingPlan, VerifyPlan)
F = TypeVar("F", bound=Callable[..., object])
PathText = str | os.PathLike[str]
GivenRun = Run | store.Run | PathText
CALLER = 6  # whose line a warning names: it calls compare, judge or report; then come four functions of this file


class Unset(enum.Enum):
    """What an argument is that was not given, where ``None`` would say something."""

    UNSET = enum.auto()

    def __repr__(self) -> str:
        return "not given"


UNSET = Unset.UNSET
VERBS: dict[type, Verb] = {RunPlan: "run", SpeedPlan: "speed", SizingPlan: "size", VerifyPlan: "verify"}


def takes_fields(cls: type) -> Callable[[F], F]:
    """Show a plan's fields as keywords, with their defaults, in the signature of a function that takes ``**fields``."""

    def shown(function: F) -> F:
        hints = typing.get_type_hints(cls)
        own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
        taken = {one.name for one in own}
        fields = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in dataclasses.fields(cls)
            if field.name not in taken
        ]
        function.__dict__["__signature__"] = inspect.signature(function).replace(parameters=[*own, *fields])
        return function

    return shown


def plan_of(cls: type[P], plan: P | PathText | None, resumed: Path | None, given: Mapping[str, object]) -> P:
    """The plan that a call asks for: ``plan``, a TOML file, a resumed run's plan or the defaults, overridden by
    ``given``.

    ``None`` is a value: ``limit=None`` lifts the plan's limit. A single value stands for a list of one; whatever can be
    iterated is a list, except a set. UserError for an unknown field, with the nearest known one, and for a value that
    does not fit.
    """
    base = _base_of(cls, plan, resumed)
    values = _values(cls, given)
    if isinstance(settings := values.get("set"), Mapping):
        check_given_once(settings, values)
        kind = _decoder_of(values, base or cls)
        values["set"] = {**settings, **typed_settings(str(kind), _texts(settings))}
    if isinstance(settings := values.get("baseline_set"), Mapping):
        named = values.get("baseline_decoder") or getattr(base, "baseline_decoder", None) or BASELINE_DECODER
        if isinstance(named, str) and "," not in named:  # several decoders are refused where they are crossed
            typed = typed_settings(named, _texts(settings), "--baseline-set")
            values["baseline_set"] = {**settings, **typed}
    return plan_from_json(cls, values) if base is None else merge(base, values)


def _decoder_of(values: Mapping[str, object], base: object) -> str:
    """The decoder whose parameters are given; ``auto`` is that of the model's family, where it has one of its own."""
    kind, model, family = (values.get(name) or getattr(base, name, None) for name in ("decoder", "model", "family"))
    if kind != AUTO or model is None or str(model).startswith(ENDPOINT):
        return str(kind or "")
    from twotower_eval.engine.models import family_of

    with contextlib.suppress(UserError):  # said where the model is looked for
        revision = cast("str | None", values.get("revision") or getattr(base, "revision", None))
        files = located(read_source(cast(str, model), revision), extent="config").files
        found = str(family or family_of(files))
        return str(kind) if has_own_form(found) else usual_of(found).decoder
    return str(kind)


def _base_of(cls: type[P], plan: P | PathText | None, resumed: Path | None) -> P | None:
    """The plan that the keywords override."""
    if plan is not None and resumed is not None:
        raise UserError("a run that is resumed has its own plan: drop --plan (in Python plan), or do not resume")
    if isinstance(plan, cls):
        return plan
    if isinstance(plan, str | os.PathLike):
        if not (Path(plan).is_file() or Path(plan).suffix == ".toml"):
            model = f"; a checkpoint is given as model={os.fspath(plan)!r}" if "model" in cls.__annotations__ else ""
            raise UserError(f"no plan file {os.fspath(plan)}: a plan is a {cls.__name__} or a TOML file's path{model}")
        return load_plan(Path(plan), cls)
    if plan is not None:
        raise UserError(f"plan must be a {cls.__name__} or the path of a TOML file, not a {type(plan).__name__}")
    return None if resumed is None else plan_from_json(cls, _stored_plan(cls, resumed))


def _texts(settings: Mapping[str, tuple[object, ...]]) -> dict[str, tuple[str, ...]]:
    """Decoder parameters given as texts, converted to the types that the decoder declares."""
    return {
        name: cast(tuple[str, ...], values)
        for name, values in settings.items()
        if all(isinstance(one, str) for one in values) and values
    }


def _stored_plan(cls: type, resumed: Path) -> Mapping[str, object]:
    manifest = store.read_manifest(resumed)
    verb = verb_of(manifest)
    if verb != VERBS[cls]:
        raise UserError(f"{resumed} is a {verb!r}, not a {VERBS[cls]!r}: twotower-eval {verb} --resume …")
    return given_settings(manifest.plan, manifest.cells)


def _values(cls: type, given: Mapping[str, object]) -> dict[str, object]:
    listed = list_fields(cls)
    values: dict[str, object] = {}
    for name, value in given.items():
        if value is UNSET:
            continue
        if isinstance(value, Mapping) and name in ("set", "baseline_set"):
            value = {str(key): as_tuple(held) for key, held in value.items()}
        values[name] = as_tuple(value) if name in listed and value is not None else value
    return values


def run_path(run: GivenRun, root: Path) -> Path:
    """A run's folder, named by itself or by its id under ``root``."""
    if isinstance(run, Run | store.Run):
        return run.path
    if not isinstance(run, str | os.PathLike):
        raise UserError(f"{run!r} is no run: give its folder, its id, or what tt.evaluate or tt.time returned")
    for path in (Path(run), root / run):
        if (path / store.MANIFEST).is_file():
            return path
    by_id = f" or in {root / run}" if len(Path(run).parts) == 1 else ""
    raise UserError(f"{os.fspath(run)!r} is no run: there is no {store.MANIFEST} in it{by_id}")


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=CALLER)


def resumed_path(resume: GivenRun | None, root: Path) -> Path | None:
    """The folder of the run to continue, if any."""
    return None if resume is None else run_path(resume, root)


def newest_runs(root: Path, say: Callable[[str], None] = _warn) -> list[Path]:
    """The runs to read when none is named: the newest complete one of each verb, or the newest if none is complete.

    ``say`` is called with a line that names newer unfinished runs which were skipped; by default that is a warning.
    """
    newest, skipped = [], []
    for verb in typing.get_args(Verb):
        paths = store.find_runs(root, verb)
        at = next((at for at, path in enumerate(paths) if store.is_closed(path)), 0)
        newest += paths[at : at + 1]
        skipped += paths[:at]
    if not newest:
        if broken := store.unreadable_runs(root):
            raise UserError(f"no run in {root} can be read: {broken[0]}")
        raise UserError(f"no runs in {root}: make one with `twotower-eval run`, or name run folders")
    if skipped:
        named = ", ".join(path.name for path in skipped)
        it = "it" if len(skipped) == 1 else "them"
        say(f"skipped, as newer but unfinished: {named}; to read {it}, name every run to read, by folder or id")
    return newest


def loaded_runs(runs: Iterable[GivenRun | Iterable[GivenRun]], root: Path) -> list[store.Run]:
    """The given runs, alone or in lists; without any, those of :func:`newest_runs`."""
    return [_loaded(one, root) for one in _named(runs, root)]


def run_paths(runs: Iterable[GivenRun | Iterable[GivenRun]], root: Path) -> list[Path]:
    """Folders of the given runs, alone or in lists; without any, of those of :func:`newest_runs`."""
    return [run_path(one, root) for one in _named(runs, root)]


def _named(runs: Iterable[GivenRun | Iterable[GivenRun]], root: Path) -> list[GivenRun]:
    """Every run that is meant, alone. A folder that holds runs stands for all of them, the oldest first."""
    given = list(runs)
    if not given:
        return [*newest_runs(root)]
    named: list[GivenRun] = []
    for one in given:
        alone = isinstance(one, str | os.PathLike | store.Run) or not isinstance(one, Iterable)
        named += [cast(GivenRun, one)] if alone else cast(Iterable[GivenRun], one)
    if not named:
        raise UserError("the list of runs is empty: name runs, or leave it out for the newest of each verb")
    return [run for one in named for run in _runs_in(one, root)]


def _runs_in(given: GivenRun, root: Path) -> list[GivenRun]:
    if not isinstance(given, str | os.PathLike) or isinstance(given, Run):
        return [given]
    is_run = any((path / store.MANIFEST).is_file() for path in (Path(given), root / given))
    return [given] if is_run else [*reversed(store.find_runs(Path(given)))] or [given]


def _loaded(run: GivenRun, root: Path) -> store.Run:
    if isinstance(run, store.Run):
        return run
    return run.record if isinstance(run, Run) else store.load(run_path(run, root))


def begin() -> None:
    """What comes before every measurement, and before torch loads: idle threads are to sleep.

    UserError if a script that measures is being read a second time: a launch is a fresh process that imports the
    script which started it, and would measure everything again.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "a launch imports the script that started it and would run all of it again: put what the script does below "
            'if __name__ == "__main__":'
        )
    let_threads_sleep()


def shown_progress(progress: Progress | bool) -> Progress:
    """A display for ``True`` (bars or lines), ``False`` (none), or the given one."""
    if isinstance(progress, bool):
        return choose_progress() if progress else SilentProgress()
    return progress
