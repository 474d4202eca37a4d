"""The product as Python functions: one call for each verb. The command line calls these and prints what they return.

Heavy packages are imported where they are needed: reading runs needs neither torch nor lm-eval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twotower_eval.api.given import (
    UNSET,
    GivenRun,
    PathText,
    Unset,
    begin,
    loaded_runs,
    newest_runs,
    plan_of,
    resumed_path,
    run_path,
    run_paths,
    shown_progress,
    takes_fields,
)
from twotower_eval.api.runs import Run
from twotower_eval.engine.models import check_settings
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_sources import check_checkpoints, check_config
from twotower_eval.progress import Progress
from twotower_eval.records import Claim

if TYPE_CHECKING:
    from twotower_eval.analyse.claims import ClaimFile
    from twotower_eval.api.comparison import Comparison
    from twotower_eval.api.shown import Audit, Page, Verdicts
    from twotower_eval.measure.suites.datafiles import PreparedFile

__all__ = [
    "Run",
    "audit",
    "calibrate",
    "claims_of",
    "compare",
    "evaluate",
    "judge",
    "lm_eval",
    "load_run",
    "newest_runs",
    "prepare_data",
    "publish",
    "report",
    "run_path",
    "size",
    "time",
    "train",
    "verify",
    "write_lm_files",
]

Runs = GivenRun | Sequence[GivenRun]


@takes_fields(RunPlan)
def evaluate(
    plan: RunPlan | PathText | None = None,
    *,
    out: PathText = "results",
    resume: GivenRun | None = None,
    progress: Progress | bool = True,
    **fields: object,
) -> Run:
    """Score candidate and baseline on the same documents; the run.

    Keywords are the fields of :class:`RunPlan`. They override those of ``plan``, which is a plan or the path of a TOML
    file, also with ``None``: ``limit=None`` lifts its limit. ``model="miniature"`` is the shipped pair. Lists, tuples
    and single values are all accepted. The run gets its own folder under ``out``. ``resume`` continues a stopped run
    with its own plan. ``progress=False`` shows nothing. UserError for whatever the caller can mend.

    >>> import twotower_eval as tt
    >>> tt.evaluate(model="miniature", tasks="miniature", treshold=0.9)
    Traceback (most recent call last):
    twotower_eval.errors.UserError: unknown key 'treshold' (did you mean 'thresholds'?)
    """
    begin()
    root = Path(out)
    resumed = resumed_path(resume, root)
    asked = plan_of(RunPlan, plan, resumed, fields)
    asked = check_checkpoints(asked, check=check_settings, silent=progress is False)
    from twotower_eval.api import measuring

    return Run(measuring.evaluated(asked, root=root, resume=resumed, progress=shown_progress(progress)))


@takes_fields(SpeedPlan)
def time(
    plan: SpeedPlan | PathText | None = None,
    *,
    out: PathText = "results",
    resume: GivenRun | None = None,
    progress: Progress | bool = True,
    **fields: object,
) -> Run:
    """Time candidate and baseline in interleaved rounds, then score the timed answers; the run.

    Keywords are the fields of :class:`SpeedPlan`; everything else is as in :func:`evaluate`.
    """
    begin()
    root = Path(out)
    resumed = resumed_path(resume, root)
    asked = plan_of(SpeedPlan, plan, resumed, fields)
    asked = check_checkpoints(asked, check=check_settings, silent=progress is False)
    from twotower_eval.api import measuring

    return Run(measuring.timed_and_scored(asked, root=root, resume=resumed, progress=shown_progress(progress)))


@takes_fields(SizingPlan)
def size(
    config: PathText | Unset = UNSET,
    plan: SizingPlan | PathText | None = None,
    *,
    out: PathText = "results",
    resume: GivenRun | None = None,
    progress: Progress | bool = True,
    **fields: object,
) -> Run:
    """Measure what a size of model costs on random weights; the run. No checkpoint is needed.

    ``config`` is a ``config.json``, a folder with one, or the name of a shipped one or of the hub; keywords are the
    fields of :class:`SizingPlan`. ``profile`` may be a run's id under ``out``. All else is as in :func:`evaluate`.
    """
    begin()
    root = Path(out)
    resumed = resumed_path(resume, root)
    given = {**fields, "config": config}
    if isinstance(profile := fields.get("profile"), str | os.PathLike):
        given["profile"] = run_path(profile, root)
    asked = check_config(plan_of(SizingPlan, plan, resumed, given), silent=progress is False)
    from twotower_eval.measure import sizing

    return Run(sizing.run(asked, root=root, resume=resumed, progress=shown_progress(progress)))


@takes_fields(VerifyPlan)
def verify(
    model: PathText | Unset | None = UNSET,
    plan: VerifyPlan | PathText | None = None,
    *,
    out: PathText = "results",
    **fields: object,
) -> Run:
    """Check a checkpoint, its kernels and its decoding; the results are the run's ``checks``.

    Keywords are the fields of :class:`VerifyPlan`. A failed check raises no error.
    """
    begin()
    asked = plan_of(VerifyPlan, plan, None, {**fields, "model": model})
    if asked.golden is not None:  # without reference outputs torch is not loaded for a model that is not there
        from twotower_eval.measure.verify import without_model

        asked = without_model(asked)
    asked = check_checkpoints(asked, check=check_settings)
    from twotower_eval.measure import verify as verify_room

    return Run(verify_room.verify(asked, root=Path(out)))


def load_run(run: GivenRun, *, results: PathText = "results") -> Run:
    """Open a run by its folder, or by its id under ``results``. Needs neither torch nor lm-eval.

    UserError if there is no such run, or if one of its files is broken.
    """
    path = run_path(run, Path(results))
    found = Run(path)
    _ = found.record  # raises now if a file is broken
    return found


def compare(*runs: Runs, results: PathText = "results") -> Comparison:
    """Compare both arms at every operating point of these runs: retention and speedup with intervals, as in a report.

    Runs are named by folder or id, alone or in lists; a folder of runs stands for all of them. Without any, the newest
    complete one of each verb in ``results`` is compared.
    """
    from twotower_eval.api.comparison import Comparison

    return Comparison(loaded_runs(runs, Path(results)))


def judge(
    claims: ClaimFile | Claim | Sequence[Claim] | PathText,
    *runs: Runs,
    names: str | Sequence[str] = (),
    results: PathText = "results",
) -> Verdicts:
    """Judge the claims of a file; a verdict for each.

    ``claims`` is a file or the name of a shipped one; ``names`` picks some of its claims. Every run at a claim's
    operating point is a look, including runs beside the given ones in their folder.
    """
    from twotower_eval.analyse import claims as claims_room
    from twotower_eval.api.shown import Verdicts

    if not isinstance(names, Iterable):
        raise UserError(f"names are those of claims, as in names=['speed'], not {names!r}")
    wanted = [names] if isinstance(names, str) else list(names)
    asked = claims_of(claims, wanted)
    return Verdicts(asked, claims_room.judge(asked, loaded_runs(runs, Path(results)), wanted))


def claims_of(claims: ClaimFile | Claim | Sequence[Claim] | PathText, names: Sequence[str] = ()) -> tuple[Claim, ...]:
    """The claims of a file, or the given ones. UserError if there are none, or none of a name in ``names``."""
    from twotower_eval.analyse import claims as claims_room

    if isinstance(claims, str | os.PathLike):
        claims = claims_room.load_claims(os.fspath(claims))
    if isinstance(claims, claims_room.ClaimFile):
        if not claims.claims:
            raise UserError(f"{claims.name} holds no claims: `twotower-eval claims audit` reads its published numbers")
        claims = claims.claims
    asked = tuple(claims) if isinstance(claims, Iterable) else (claims,)
    if odd := [one for one in asked if not isinstance(one, Claim)]:
        raise UserError(f"{odd[0]!r} is no claim: give a claim file, the name of a shipped one, or claims of a file")
    if not asked:
        raise UserError("the list of claims is empty: give one claim at least")
    claims_room.select(asked, names)
    return asked


def audit(claims: ClaimFile | PathText) -> Audit:
    """Recompute the published numbers of a claim file from one another; nothing is measured."""
    from twotower_eval.analyse import claims as claims_room
    from twotower_eval.api.shown import Audit

    if not isinstance(claims, claims_room.ClaimFile | str | os.PathLike):
        raise UserError(f"{claims!r} is no claim file: give its path, or the name of a shipped one")
    held = claims if isinstance(claims, claims_room.ClaimFile) else claims_room.load_claims(os.fspath(claims))
    return Audit(claims_room.audit(held.published))


def report(
    *runs: Runs,
    out: PathText = "reports",
    sections: str | Sequence[str] | None = None,
    claims: PathText | None = None,
    html: bool = False,
    csv: bool = False,
    model_card: bool = False,
    results: PathText = "results",
) -> Page:
    """Write a report of these runs under ``out``: verdicts, tables and plots. Needs neither torch nor a GPU.

    Without runs it covers the newest complete one of each verb in ``results``. ``sections`` names the shipped sections
    to show, and adds your own (``package.module:function``). ``claims`` is a claim file or the name of a shipped one;
    by default the shipped one about these models. ``html`` adds one self-contained page, ``csv`` the tables with all
    their digits, ``model_card`` the evaluation results of a model card for the Hugging Face hub.
    """
    from twotower_eval.analyse import report as report_room
    from twotower_eval.api.shown import Page

    named = [sections] if isinstance(sections, str) else sections
    paths = run_paths(runs, Path(results))
    file = None if claims is None else os.fspath(claims)
    runs_read = report_room.read(paths, file)
    folder = report_room.write_of(
        runs_read, Path(out), sections=named or None, html=html, csv=csv, model_card=model_card
    )
    return Page(folder, report_room.PAGE if html else report_room.MARKDOWN, runs_read)


def write_lm_files(run: GivenRun, *, results: PathText = "results") -> Path:
    """Write lm-eval's ``results_*.json`` and ``samples_*.jsonl`` of a finished ``run`` again; their folder.

    Needs lm-eval and the data of the tasks, but neither torch nor the models.
    """
    from twotower_eval.measure import harness

    return harness.write_lm_files(run_path(run, Path(results)))


def lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's own command, which knows our models as ``--model twotower``."""
    begin()
    from twotower_eval import lm_eval as ours

    ours.main(arguments)


def publish(
    page: Page,
    *runs: Runs,
    results: PathText = "results",
    reports: PathText = "reports",
    say: Callable[[str], None] = print,
) -> tuple[Path, Path]:
    """Copy runs and their report to ``published/`` in their folders; the two new folders.

    ``say`` is called with a line for each thing that the copy leaves out or changes, such as paths of this machine.
    """
    from twotower_eval.analyse import report as report_room

    held = loaded_runs(runs, Path(results))
    return report_room.publish(held, page.folder, results=Path(results), reports=Path(reports), say=say)


def calibrate(
    out: PathText = "reports/calibration",
    *,
    repetitions: int = 1_000,
    seed: int = 0,
    progress: Progress | bool = True,
) -> Path:
    """Simulate data with known truth: how often intervals cover it and verdicts are wrong; the report's path."""
    from twotower_eval.analyse import calibration

    shown = shown_progress(progress)
    return calibration.calibrate(Path(out), num_repetitions=repetitions, seed=seed, progress=shown)


def prepare_data(
    source: PathText, target: PathText, *, only: str | Sequence[str] | None = None, partial: bool = False
) -> list[PreparedFile]:
    """Make ``TARGET/TASK/SPLIT.jsonl``, which ``data_dir`` reads, from the files that benchmarks publish; what was
    written. ``only`` names some of the benchmarks; by default all that have a folder in ``source``. ``partial``
    also takes files with another number of rows than was published."""
    from twotower_eval.measure.suites import datafiles

    names = [only] if isinstance(only, str) else only
    return datafiles.prepare(Path(source), Path(target), names, whole=not partial)


def train(
    out: PathText = "training/miniature",
    *,
    family: str = "twotower",
    recipe: PathText | None = None,
    threads: int = 2,
    device: str | None = None,
) -> Path:
    """Train a miniature in ``out``, continuing what is there; the folder of the exported checkpoint.

    ``family``: ``twotower`` (the pair), or a small model of ``ar``, ``sdar``, ``mdlm``, ``bd3lm`` or ``e2d2`` on the
    same corpus. ``recipe`` is a TOML file, by default the shipped one; ``device`` by default a GPU if there is one.
    """
    begin()
    from twotower_eval.miniature import family_training
    from twotower_eval.miniature import train as training
    from twotower_eval.miniature.networks import TRAINABLE

    file = None if recipe is None else Path(recipe)
    if family in TRAINABLE:
        return family_training.train_family(Path(out), family, recipe_file=file, threads=threads, device=device)
    if family != "twotower":
        raise UserError(f"unknown family {family!r} to train; choose from twotower, {', '.join(TRAINABLE)}")
    return training.train_pair(Path(out), recipe_file=file, threads=threads, device=device)
