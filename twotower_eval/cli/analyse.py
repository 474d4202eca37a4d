"""``twotower-eval report``, ``claims`` and ``calibrate``: the verbs that only read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_eval import store
from twotower_eval.cli.options import REPORTS, RESULTS, option, texts
from twotower_eval.cli.runs import EXIT_INTERRUPTED, chosen
from twotower_eval.cli.tables import show
from twotower_eval.errors import UserError
from twotower_eval.records import verb_of
from twotower_eval.store.environment import read_on_one_thread

MODEL_CARD, LM_EVAL = "model-card", "lm-eval"  # kinds of --format


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Run folders or ids [the newest complete one of each verb].", metavar="RUN", show_default=False
        ),
    ] = None,
    results: Annotated[Path, option("Parent folder of run folders [results].", metavar="DIR")] = RESULTS,
    out: Annotated[Path, option("Parent folder of reports [reports].", metavar="DIR")] = REPORTS,
    section: Annotated[
        list[str] | None,
        option(
            "Shipped section, to show only those named, or package.module:render, to add one of your own; may be given "
            "several times [all shipped ones that concern the runs].",
            metavar="NAME",
        ),
    ] = None,
    claims: Annotated[
        str | None,
        option("Claim file, or the name of a shipped one [a shipped one about this model].", metavar="FILE"),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Also write one self-contained HTML file.")] = False,
    format: Annotated[
        list[str] | None,
        option(
            "csv: also write the tables, with all digits. model-card: also write evaluation results for a card of the "
            "Hugging Face hub. lm-eval: also write lm-eval's result files into the folders of run. May be given "
            "several times.",
            metavar="KIND",
        ),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Copy the runs and the report to published/ in their folders.")
    ] = False,
) -> None:
    """Verb ``report``."""
    formats = texts(",".join(format or ())) or ()
    for kind in formats:
        if kind not in ("csv", MODEL_CARD, LM_EVAL):
            kinds = f"csv, {MODEL_CARD} or {LM_EVAL}"
            raise UserError(f"--format can be {kinds}, not {kind!r}: Markdown is always written, --html adds HTML")
    read_on_one_thread()
    from twotower_eval import api

    named = chosen(runs, results, count_others=True)
    kinds_of = {"csv": "csv" in formats, "model_card": MODEL_CARD in formats}
    page = api.report(*named, out=out, sections=section, claims=claims, html=html, results=results, **kinds_of)
    show(lambda: page.tables)
    typer.echo(page.path)
    if MODEL_CARD in formats:
        typer.echo(page.folder / "model-card.md")
    if LM_EVAL in formats:
        for path in (api.run_path(one, results) for one in named):
            if verb_of(store.read_manifest(path)) == "run":
                typer.echo(api.write_lm_files(path))
    if publish:
        for target in api.publish(page, *named, results=results, reports=out, say=typer.echo):
            typer.echo(target)


FileName = Annotated[str, typer.Argument(help="Claim file, or the name of a shipped one.", metavar="FILE")]


def check(
    file: FileName,
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Run folders or ids [the newest complete one of each verb].", metavar="RUN", show_default=False
        ),
    ] = None,
    claim: Annotated[
        list[str] | None, option("This claim only; may be given several times [all].", "--claim", metavar="NAME")
    ] = None,
    strict: Annotated[
        bool,
        option(
            "Count SUPPORTED as inconclusive where it rests on fewer than 5 launches or leaves out runs of the folder.",
            "--strict",
        ),
    ] = False,
    results: Annotated[Path, option("Parent folder of run folders [results].", metavar="DIR")] = RESULTS,
) -> None:
    """Verb ``claims check``."""
    read_on_one_thread()
    from twotower_eval import api

    selected = api.claims_of(file, claim or ())  # a mistake in them is an error before any run is looked for
    verdicts = api.judge(selected, *chosen(runs, results), names=claim or (), results=results)
    for line in verdicts.lines:
        typer.echo(line)
    if strict and (note := verdicts.strict_line):
        typer.echo(note)
    raise typer.Exit(verdicts.strict_exit_code if strict else verdicts.exit_code)


def audit(file: FileName) -> None:
    """Verb ``claims audit``."""
    from twotower_eval import api

    findings = api.audit(file)
    for line in findings.lines:
        typer.echo(line)
    raise typer.Exit(findings.exit_code)


def calibrate(
    repetitions: Annotated[int, option("Simulated measurements per world [1000].", metavar="N")] = 1_000,
    seed: Annotated[int, option("Seed of everything random [0].", metavar="S")] = 0,
    out: Annotated[
        Path, option("Folder for calibration.md and calibration.csv [reports/calibration].", metavar="DIR")
    ] = REPORTS / "calibration",
) -> None:
    """Verb ``calibrate``."""
    from twotower_eval import api

    try:
        path = api.calibrate(out, repetitions=repetitions, seed=seed)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written. The same command starts again", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(path)
