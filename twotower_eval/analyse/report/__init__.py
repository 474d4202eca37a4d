"""Reports from run folders: Markdown and PNG, from the files alone, without torch or lm-eval.

A section is a function ``render(runs) -> Section``; :data:`SECTIONS` holds the shipped ones in their order, and any
``package.module:function`` can be added to them. Beside the Markdown there may be one HTML page of it and the tables
as CSV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from twotower_eval import store
from twotower_eval.analyse.claims import load_claims
from twotower_eval.analyse.compare.alone import is_alone
from twotower_eval.analyse.compare.naming import checkpoint_name
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.sizing import is_sizing_run
from twotower_eval.analyse.report.alone import names_alone
from twotower_eval.analyse.report.publishing import publish
from twotower_eval.analyse.report.section import Section
from twotower_eval.analyse.report.text import escape
from twotower_eval.analyse.report.verdicts import JudgedRuns, shipped_claims
from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean, resolve
from twotower_eval.records import sha256_text

__all__ = ["SECTIONS", "Runs", "Section", "publish", "report_id", "write"]

SECTIONS = {
    "headline": "twotower_eval.analyse.report.headline:headline",
    "claims": "twotower_eval.analyse.report.verdicts:claims",
    "quality": "twotower_eval.analyse.report.tables:quality",
    "speed": "twotower_eval.analyse.report.speed_tables:speed",
    "tradeoff": "twotower_eval.analyse.report.tradeoff:tradeoff",
    "sweeps": "twotower_eval.analyse.report.sweeps:sweeps",
    "traces": "twotower_eval.analyse.report.traces:traces",
    "flips": "twotower_eval.analyse.report.flips:flips",
    "scoring": "twotower_eval.analyse.report.gates:scoring",
    "gates": "twotower_eval.analyse.report.gates:gates",
    "latency": "twotower_eval.analyse.report.latency:latency",
    "sizing": "twotower_eval.analyse.report.sizing:sizing",
    "training": "twotower_eval.analyse.report.training:training",
    "setup": "twotower_eval.analyse.report.provenance:setup",
    "reproduce": "twotower_eval.analyse.report.reproduce:reproduce",
}
OLDER_NAMES = {"scale": "sizing"}  # of sections
MARKDOWN, PAGE, TABLES = "report.md", "report.html", "tables"


def write(
    run_paths: Sequence[Path],
    out_root: Path,
    *,
    sections: Sequence[str] | None = None,
    claims: str | None = None,
    html: bool = False,
    csv: bool = False,
) -> Path:
    """Write ``out_root/<id>/report.md`` and its pictures; return the folder.

    The id follows from the run ids, and the same runs give the same bytes. ``sections`` names entries of
    :data:`SECTIONS` or ``package.module:function``; by default all shipped ones. ``claims`` is a claim file or the name
    of a shipped one, by default the shipped one about a candidate of these runs. ``html`` adds ``report.html``, all in
    one file; ``csv`` adds the tables with all their digits under ``tables/``. Raises ValueError where the runs cannot
    be read or their arms are no pair.
    """
    loaded = [store.load(Path(path)) for path in run_paths]
    runs = JudgedRuns(loaded, shipped_claims(loaded) if claims is None else load_claims(claims))
    rendered = [_renderer(name)(runs) for name in sections or _concerning(runs)]
    files: dict[str, bytes] = {}
    for section in rendered:
        clash = sorted(files.keys() & section.files.keys())
        if clash:
            raise UserError(f"two sections of the report write {clash[0]}")
        files.update(section.files)
    body = "\n".join(f"## {section.title}\n\n{section.markdown.strip()}\n" for section in rendered)
    markdown = f"# {_title(runs)}\n\n{body}"
    pictures = dict(files)
    files[MARKDOWN] = markdown.encode()
    if html:
        from twotower_eval.analyse.report.page import page

        files[PAGE] = page(markdown, pictures).encode()
    if csv:
        from twotower_eval.analyse.report.frames import tables

        files |= {f"{TABLES}/{name}": content for name, content in tables(runs).items()}
    folder = Path(out_root) / report_id([run.manifest.run_id for run in runs])
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _concerning(runs: JudgedRuns) -> list[str]:
    """Shipped sections; that on sizing only where a run is of it, and alone where none is of anything else."""
    of_size = [is_sizing_run(run) for run in runs]
    if all(of_size):
        return ["sizing", "setup", "reproduce"]
    if not runs.compare:
        return _concerning_one(runs)
    return [name for name in SECTIONS if name != "sizing" or any(of_size)]


def _concerning_one(runs: JudgedRuns) -> list[str]:
    """Sections on one model alone: of what was done with it, and nothing that compares."""
    verbs = {run.manifest.verb for run in runs}
    scored = "run" in verbs or runs.scored_alone
    timed = ["speed", "latency"] if "speed" in verbs else []
    claims = ["claims"] if runs.claims is not None else []
    sizing = ["sizing"] if any(map(is_sizing_run, runs)) else []
    return ["headline", *claims, *(["quality"] if scored else []), *timed, "gates", *sizing, "setup", "reproduce"]


def report_id(run_ids: Sequence[str]) -> str:
    """A single run's own id; for several, the newest one's time with the verbs and a hash over all ids."""
    ordered = sorted(run_ids)
    if len(ordered) == 1:
        return ordered[0]
    verbs = {part for run_id in ordered for part in run_id.split("-")[1:2]}
    return "-".join([ordered[-1].split("-")[0], *sorted(verbs), sha256_text(" ".join(ordered))[:6]])


def _renderer(name: str) -> Callable[[Runs], Section]:
    name = OLDER_NAMES.get(name, name)
    if ":" not in name and name not in SECTIONS:
        raise UserError(f"unknown report section {name!r}{did_you_mean(name, SECTIONS)}")
    render: Callable[[Runs], Section] = resolve(SECTIONS.get(name, name))
    return render


def _title(runs: Runs) -> str:
    """Who is compared with whom, or who was measured alone."""
    if all(is_sizing_run(run) for run in runs):
        return f"What decoding would cost: {' and '.join(_names(runs, 'candidate'))}"
    if not runs.compare:
        return " and ".join(names_alone(runs))
    compared = " against ".join(" and ".join(_names(runs, arm)) or f"no {arm}" for arm in ("candidate", "baseline"))
    return compared + (f"; {' and '.join(names_alone(runs))} alone" if any(map(is_alone, runs)) else "")


def _names(runs: Runs, arm: str) -> list[str]:
    """Checkpoints of an arm, those measured alone left out; those of random weights where there are no others."""
    named = [run for run in runs if not is_alone(run) and not is_sizing_run(run)] or runs
    cells = [cell for run in named for cell in run.manifest.cells if cell.arm == arm]
    return sorted({escape(checkpoint_name(cell.checkpoint)) for cell in cells})
