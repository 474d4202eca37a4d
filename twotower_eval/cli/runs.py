"""What measuring verbs print after Ctrl-C, and what reading verbs print when no run was named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from twotower_eval import store
from twotower_eval.names import plural

EXIT_INTERRUPTED = 130


@contextmanager
def resumable(verb: str, out: Path, resume: str | None) -> Iterator[None]:
    """On Ctrl-C print how to continue the run that was being written, if one was started."""
    before = _run_folders(out)
    try:
        yield
    except KeyboardInterrupt:
        from twotower_eval import api

        newest = next(iter(sorted(_run_folders(out) - before, reverse=True)), None)
        begun = newest if resume is None else api.run_path(resume, out)
        if begun is None:
            typer.echo("interrupted before a run was started", err=True)
        else:
            hint = f"twotower-eval {verb} --resume {begun}"
            typer.echo(f"interrupted; what is finished is kept. To continue: {hint}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _run_folders(out: Path) -> set[Path]:
    return {manifest.parent for manifest in out.glob(f"*/{store.MANIFEST}")}


def chosen(runs: list[str] | None, results: Path, *, count_others: bool = False) -> list[str]:
    """The named runs, else the newest complete one of each verb, which are printed."""
    from twotower_eval import api

    if runs:
        return runs
    newest = api.newest_runs(results, say=lambda text: typer.echo(text, err=True))
    num_others = len(store.find_runs(results)) - len(newest) if count_others else 0
    are = "is" if num_others == 1 else "are"
    older = f"{plural(num_others, 'older run')} in {results} {are} not used; name runs to use them"
    others = f"; {older}" if num_others else ""
    typer.echo(f"the newest of each verb: {', '.join(path.name for path in newest)}{others}", err=True)
    for why in store.unreadable_runs(results):
        typer.echo(f"left out, as it cannot be read: {why}", err=True)
    return [str(path) for path in newest]
