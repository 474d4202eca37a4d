"""Run folders as the command line names them: found, resumed, and resumable after Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import typer

from twotower_eval import store
from twotower_eval.decoder_settings import check_said_once, typed_settings
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, load_plan, merge, plan_from_json
from twotower_eval.records import Verb, verb_of

P = TypeVar("P", RunPlan, SpeedPlan, SizingPlan)
VERBS: dict[type[Any], Verb] = {RunPlan: "run", SpeedPlan: "speed", SizingPlan: "size"}
EXIT_INTERRUPTED = 130


@contextmanager
def resumable(verb: str, out: Path, resumed: Path | None) -> Iterator[None]:
    """On Ctrl-C say how to go on with the run that was being written, if one was begun."""
    before = _run_folders(out)
    try:
        yield
    except KeyboardInterrupt:
        begun = resumed or next(iter(sorted(_run_folders(out) - before, reverse=True)), None)
        if begun is None:
            typer.echo("interrupted before anything was begun", err=True)
        else:
            hint = f"twotower-eval {verb} --resume {begun}"
            typer.echo(f"interrupted; what is finished is kept. To go on: {hint}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _run_folders(out: Path) -> set[Path]:
    return {manifest.parent for manifest in out.glob(f"*/{store.MANIFEST}")}


def run_path(name: str, out: Path) -> Path:
    """A run named by its folder or by its id under ``out``."""
    for path in (Path(name), out / name):
        if (path / store.MANIFEST).is_file():
            return path
    raise UserError(f"{name!r} is no run: there is no {store.MANIFEST} in it or in {out / name}")


def newest_of_each_verb(results: Path) -> list[Path]:
    """What a reading verb reads when nothing is named."""
    found = [store.find_runs(results, verb) for verb in get_args(Verb)]
    newest = [paths[0] for paths in found if paths]
    if not newest:
        raise UserError(f"no runs in {results}: make one with `twotower-eval run`, or name run folders")
    return newest


def resolve_plan(cls: type[P], plan_file: Path | None, resumed: Path | None, given: dict[str, Any]) -> P:
    """The plan of a resumed run or of a file, or the defaults, with the options given laid over it.

    What ``--set`` gives is as texts, and becomes what the decoder's parameters are.
    """
    if resumed is not None and plan_file is not None:
        raise UserError("--resume takes the plan from the run: drop --plan")
    held: P | None = None
    if resumed is not None:
        manifest = store.load(resumed).manifest
        verb = verb_of(manifest)
        if verb != VERBS[cls]:
            raise UserError(f"{resumed} is a {verb!r}, not a {VERBS[cls]!r}: twotower-eval {verb} --resume …")
        held = plan_from_json(cls, manifest.plan)
    elif plan_file is not None:
        held = load_plan(plan_file, cls)
    given = {name: value for name, value in given.items() if value is not None}
    if "set" in given:
        check_said_once(given["set"], given)
        kind = given.get("decoder") or getattr(held or cls, "decoder")  # noqa: B009
        given["set"] = typed_settings(kind, given["set"])
    return plan_from_json(cls, given) if held is None else merge(held, given)
