"""Reports from run folders: Markdown and PNG, from the files alone, without torch or lm-eval.

A section is a function ``render(runs) -> Section``; :data:`SECTIONS` holds the shipped ones in their order, and users'
own are added to them (see docs/section.md). Beside the Markdown there may be one HTML page of it and the tables
as CSV.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from twotower_eval import store
from twotower_eval.analyse.claims import load_claims
from twotower_eval.analyse.compare.points import checkpoint_name
from twotower_eval.analyse.compare.runs import Runs, is_alone
from twotower_eval.analyse.compare.sizing import is_sizing_run
from twotower_eval.analyse.report.alone import names_alone
from twotower_eval.analyse.report.baselines import of_all
from twotower_eval.analyse.report.publishing import publish
from twotower_eval.analyse.report.rendering import csv as csv_of
from twotower_eval.analyse.report.rendering import table
from twotower_eval.analyse.report.text import Section, bullets, details, escape
from twotower_eval.analyse.report.verdicts import JudgedRuns, shipped_claims
from twotower_eval.analyse.words.glossary import terms_in
from twotower_eval.errors import UserError
from twotower_eval.names import Seam, resolve
from twotower_eval.plugin_calls import PluginError, calls_of, is_own, module_of
from twotower_eval.records import (
    sha256_text,
    time_and_verb,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SECTIONS", "JudgedRuns", "Runs", "Section", "publish", "read", "report_id", "table", "write", "write_of"]

SECTIONS = {
    "headline": "twotower_eval.analyse.report.verdicts:headline",
    "claims": "twotower_eval.analyse.report.verdicts:claims",
    "baselines": "twotower_eval.analyse.report.baselines:baselines",
    "quality": "twotower_eval.analyse.report.tables:quality",
    "speed": "twotower_eval.analyse.report.speed_tables:speed",
    "tradeoff": "twotower_eval.analyse.report.tradeoff:tradeoff",
    "sweeps": "twotower_eval.analyse.report.sweeps:sweeps",
    "traces": "twotower_eval.analyse.report.answers:traces",
    "flips": "twotower_eval.analyse.report.answers:flips",
    "scoring": "twotower_eval.analyse.report.gates:scoring",
    "gates": "twotower_eval.analyse.report.gates:gates",
    "latency": "twotower_eval.analyse.report.call_tables:latency",
    "sizing": "twotower_eval.analyse.report.sizing:sizing",
    "training": "twotower_eval.analyse.report.provenance:training",
    "setup": "twotower_eval.analyse.report.provenance:setup",
    "reproduce": "twotower_eval.analyse.report.provenance:reproduce",
}
LAST = ("setup", "reproduce")  # what users add stands before these
SEAM = Seam(what="report section", form="package.module:render", shipped=SECTIONS)
OLDER_NAMES = {"scale": "sizing"}  # of sections
MARKDOWN, PAGE, TABLES = "report.md", "report.html", "tables"


def read(run_paths: Sequence[Path], claims: str | None = None) -> JudgedRuns:
    """The runs with the claims that they are held against: those of a file, or of the shipped one of a name; by
    default the shipped one about a candidate of these runs."""
    with store.paused_garbage_collection():
        loaded = [store.load(Path(path)) for path in run_paths]
    return JudgedRuns(loaded, shipped_claims(loaded) if claims is None else load_claims(claims))


def write(
    run_paths: Sequence[Path],
    out_root: Path,
    *,
    sections: Sequence[str] | None = None,
    claims: str | None = None,
    html: bool = False,
    csv: bool = False,
) -> Path:
    """Write the report of these runs; see :func:`read` and :func:`write_of`."""
    return write_of(read(run_paths, claims), out_root, sections=sections, html=html, csv=csv)


def write_of(
    runs: JudgedRuns,
    out_root: Path,
    *,
    sections: Sequence[str] | None = None,
    html: bool = False,
    csv: bool = False,
    model_card: bool = False,
) -> Path:
    """Write ``out_root/<id>/report.md`` and its pictures; return the folder.

    The id follows from the run ids, and the same runs give the same bytes. ``sections`` names entries of
    :data:`SECTIONS`, of which by default all that concern these runs are shown, and sections of the user's own
    (``package.module:render``, or as installed packages call theirs), which are added to them. ``html`` adds
    ``report.html``, all in one file; ``csv`` adds the tables with all their digits under ``tables/``, ``model_card``
    the metadata of a model card. Raises UserError where the arms of the runs are no pair.
    """
    with store.paused_garbage_collection():
        folder, files = _made(runs, out_root, sections or (), html=html, csv=csv)
        if model_card:
            from twotower_eval.analyse.report import model_card as card

            files[card.FILE] = card.model_card(runs, MARKDOWN).encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _made(
    runs: JudgedRuns, out_root: Path, sections: Sequence[str], *, html: bool, csv: bool
) -> tuple[Path, dict[str, bytes]]:
    """The report's folder, and its files by name."""
    rendered = [(name, _rendered(name, runs)) for name in _chosen(sections, runs)]
    files: dict[str, bytes] = {}
    for _, section in rendered:
        clash = sorted(files.keys() & section.files.keys())
        if clash:
            raise UserError(f"two sections of the report write {clash[0]}")
        files.update(section.files)
    bodies = [f"## {section.title}\n\n{section.markdown.strip()}\n" for _, section in rendered]
    body = "\n".join([bodies[0] + _words_used("\n".join(bodies)), *bodies[1:]]) if bodies else ""
    markdown = f"# {_title(runs)}\n\n{body}"
    pictures = dict(files)
    files[MARKDOWN] = markdown.encode()
    if html:
        from twotower_eval.analyse.report.page import page

        files[PAGE] = page(markdown, pictures).encode()
    if csv:
        files |= _csv_files(runs, rendered)
    return Path(out_root) / report_id([run.manifest.run_id for run in runs]), files


def _words_used(markdown: str) -> str:
    """The terms that a report uses, folded behind its first section, before any of them is needed."""
    lines = bullets([f"**{term.name}**: {term.meaning}" for term in terms_in(markdown)])
    return f"\n{details('Words used in this report', lines)}\n" if lines else ""


def _csv_files(runs: JudgedRuns, rendered: Sequence[tuple[str, Section]]) -> dict[str, bytes]:
    """CSV files by their names in the report's folder: what was measured row by row, then each section's tables.

    Shipped sections that concern the runs give their tables whether they are shown or not, and so does the one on
    claims. Users' own come last, so that an error about a name that is taken is about theirs.
    """
    from twotower_eval.analyse.report.frames import tables

    with_tables = dict.fromkeys([*_concerning(runs), *(["claims"] if runs.claims is not None else [])])
    shown = {name for name, _ in rendered}
    hidden = [(name, _rendered(name, runs)) for name in with_tables if name not in shown]
    own = [section for name, section in rendered if name not in SECTIONS]
    shipped = [(one.title, _tables_of(name, one, runs)) for name, one in (*hidden, *rendered) if name in SECTIONS]
    found: dict[str, bytes] = {}
    for title, frames in [("", of_all(runs, tables)), *shipped, *((one.title, one.tables) for one in own)]:
        for name, frame in frames.items():
            file = f"{TABLES}/{name}.csv"
            if file in found:
                raise UserError(f"two tables of the report are {file}: section {title!r} needs another name")
            if not frame.empty:
                found[file] = csv_of(frame)
    return found


def _tables_of(name: str, section: Section, runs: JudgedRuns) -> Mapping[str, pd.DataFrame]:
    """A shipped section's tables, with several baselines those against each."""
    if name in ("claims", "baselines") or not runs.baselines:
        return section.tables
    return of_all(runs, lambda one: section.tables if one is runs else _rendered(name, one).tables)


def _concerning(runs: JudgedRuns) -> list[str]:
    """Shipped sections that these runs call for: the one on sizing with sizing runs only, and alone without others."""
    of_size = [is_sizing_run(run) for run in runs]
    if all(of_size):
        return ["sizing", "setup", "reproduce"]
    if not runs.compare:
        return _concerning_one(runs)
    unasked = {"sizing": not any(of_size), "baselines": not runs.baselines}
    return [name for name in SECTIONS if not unasked.get(name)]


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
    verbs = {verb for _, verb in map(time_and_verb, ordered) if verb}
    return "-".join([time_and_verb(ordered[-1])[0], *sorted(verbs), sha256_text(" ".join(ordered))[:6]])


def _chosen(names: Sequence[str], runs: JudgedRuns) -> list[str]:
    """The sections that are shown, in their order. Shipped ones that are named stand for all shipped ones; users' own
    stand where they are named among these, and else before the last ones of the report."""
    names = [OLDER_NAMES.get(name, name) for name in names]
    if any(name in SECTIONS for name in names):
        return names
    shipped = _concerning(runs)
    return [*(name for name in shipped if name not in LAST), *names, *(name for name in shipped if name in LAST)]


def _rendered(name: str, runs: Runs) -> Section:
    """One section. A user's own that raises, or returns something else, is a one-line error."""
    render = cast(Callable[[Runs], Section], resolve(SEAM.place(name)))
    if not callable(render):
        raise UserError(f"section {name} is no function render(runs) that returns a Section: docs/section.md has one")
    module = module_of(render)
    try:
        with calls_of(module, f"section {name}", getattr(render, "__name__", "render"), pass_through=(UserError,)):
            made = render(runs)
    except PluginError:
        raise
    except UserError as error:
        if is_own(module):
            raise
        raise UserError(f"section {name}: {error}") from error
    wrong = _wrong_with(made)
    if wrong is not None:
        raise UserError(f"section {name}: {wrong}; return Section(title=…, markdown=…, files=…)")
    return made


def _wrong_with(made: object) -> str | None:
    """What keeps a value from being a section; None where nothing does."""
    if not isinstance(made, Section):
        return f"it returned {'nothing' if made is None else f'a {type(made).__name__}'}, not a Section"
    for field in ("title", "markdown"):
        if not isinstance(getattr(made, field), str):
            return f"its {field} is a {type(getattr(made, field)).__name__}, not a text"
    if not made.title or "\n" in made.title:
        return "its title is empty or longer than a line"
    if not isinstance(made.files, Mapping):
        return f"its files are a {type(made.files).__name__}, not a dictionary of names and bytes"
    odd = [name for name, content in made.files.items() if not (isinstance(name, str) and isinstance(content, bytes))]
    if odd:
        return f"its files hold {odd[0]!r}, which is not a name with bytes"
    if (wrong := _wrong_tables(made.tables)) is not None:
        return wrong
    taken = [name for name in made.files if name in (MARKDOWN, PAGE, TABLES, "..") or Path(name).name != name]
    return f"its files hold {taken[0]!r}, which is a file of the report's own or in another folder" if taken else None


def _wrong_tables(tables: object) -> str | None:
    """What keeps a value from being a section's tables."""
    import pandas as pd

    if not isinstance(tables, Mapping):
        return f"its tables are a {type(tables).__name__}, not a dictionary of names and frames"
    for name, frame in tables.items():
        if not isinstance(frame, pd.DataFrame):
            return f"its table {name!r} is a {type(frame).__name__}, not a pandas DataFrame"
        if not isinstance(name, str) or not name or Path(name).name != name:
            return f"its tables hold {name!r}, which is no name of a file"
    return None


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
    named = [run for run in runs.whole if not is_alone(run) and not is_sizing_run(run)] or runs.whole
    cells = [cell for run in named for cell in run.manifest.cells if cell.arm == arm]
    return sorted({escape(checkpoint_name(cell.checkpoint)) for cell in cells})
