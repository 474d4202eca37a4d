"""A report as one self-contained HTML file, without script or request; and published, a small run and its report side
by side.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from markdown_it import MarkdownIt
from markdown_it.token import Token

from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.provenance import plain_argv
from twotower_eval.analyse.report.text import VERBATIM
from twotower_eval.errors import UserError
from twotower_eval.store import FILES, Run
from twotower_eval.store.journal import DONE, LOCK, MANIFEST, close_run, packed, packed_path, read_closing
from twotower_eval.strict import JsonObject

# All the raw HTML that is let through: folded parts, and line breaks within a table cell.
OWN_MARKS = re.compile(r"<details><summary>([^<>\n]*)</summary>|</details>|<br>|<!-- verbatim -->")
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #5c6670; --line: #d5dae0; --band: #f5f7f9;
  --accent: #0b62a3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14181c; --faint: #9aa5b0; --line: #343c45;
  --band: #1c2228; --accent: #6cb8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: .4rem 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .5rem; }
h2:first-of-type { border: 0; margin-top: 0; padding-top: 0; }
h2:first-of-type + p { font-size: 1.15rem; border-left: .25rem solid var(--accent); padding-left: .8rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem .9rem; font-size: .9rem; margin-bottom: 1rem; }
a { color: var(--accent); }
ul { padding-left: 1.2rem; }
li { margin: .2rem 0; }
.table { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { background: var(--band); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
th.number { white-space: normal; }
td:not(.number) { min-width: 7rem; }
td:first-child:not(:only-child) { min-width: 9rem; }
.texts td:last-child, .texts td:nth-last-child(2) { min-width: 15rem; font-family: ui-monospace, Menlo, Consolas,
  monospace; font-size: .8rem; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .88em; background: var(--band);
  border-radius: .2rem; }
code { padding: .05em .3em; overflow-wrap: anywhere; }
pre { padding: .7rem; overflow-x: auto; }
pre code { padding: 0; overflow-wrap: normal; }
img { display: block; max-width: 100%; height: auto; margin: .8rem 0; background: #fff; border-radius: .3rem; }
blockquote { margin: .8rem 0; padding: .1rem .8rem; border-left: .25rem solid #d9822b; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); }
td:nth-child(n + 4):not(.number) { min-width: 11rem; }
@media (max-width: 40rem) { p:has(> img) { overflow-x: auto; } p > img { max-width: none; width: 36rem; }
  body { padding: .8rem; } h1 { font-size: 1.2rem; } table { font-size: .8rem; }
  th, td { padding: .3rem .45rem; } td:first-child:not(:only-child) { min-width: 7rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .table { overflow: visible; border: 0; } table { font-size: 7.5pt; } .number { white-space: normal; }
  td, td:first-child:not(:only-child), .texts td, td:nth-child(n + 4):not(.number) { min-width: 0 !important; }
  h2, h3, summary { break-after: avoid; } img, tr { break-inside: avoid; } }
"""


def page(markdown: str, files: Mapping[str, bytes]) -> str:
    """The whole page; ``files`` holds the pictures that the Markdown shows, by name."""
    reader = _reader(files)
    tokens = reader.parse(markdown)
    headings = [(i, tokens[i + 1].content) for i, t in enumerate(tokens) if t.type == "heading_open" and t.tag == "h2"]
    for number, (i, _) in enumerate(headings):
        tokens[i].attrSet("id", f"part-{number}")
    _class_cells(tokens)
    links = "".join(f'<a href="#part-{n}">{reader.renderInline(title)}</a>' for n, (_, title) in enumerate(headings))
    title = next((tokens[i + 1].content for i, t in enumerate(tokens) if t.tag == "h1"), "Report")
    body = reader.renderer.render(tokens, reader.options, {})
    first, end_of_title, rest = body.partition("</h1>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">\n'
        f"<title>{html.escape(_plain(reader, title))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{first}{end_of_title}\n<nav>{links}</nav>{rest}\n</body>\n</html>\n"
    )


def _reader(files: Mapping[str, bytes]) -> MarkdownIt:
    # "html" only makes raw HTML arrive as tokens of its own, which the rules below turn into text.
    reader = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")

    def raw(_self: object, tokens: Sequence[Token], index: int, *_rest: object) -> str:
        return _own_marks(reader, tokens[index].content)

    def image(_self: object, tokens: Sequence[Token], index: int, *_rest: object) -> str:
        return _picture(files, str(tokens[index].attrGet("src")), tokens[index].content)

    reader.add_render_rule("html_block", raw)
    reader.add_render_rule("html_inline", raw)
    reader.add_render_rule("image", image)
    # Nothing in a report links outside itself; what looks like a link is shown as its text.
    for end in ("link_open", "link_close"):
        reader.add_render_rule(end, lambda *_: "")
    reader.add_render_rule("table_open", lambda _self, tokens, i, *_: _box(tokens[i]))
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return reader


def _own_marks(reader: MarkdownIt, raw: str) -> str:
    """Raw HTML with everything escaped but our own marks; the summary's text is Markdown's no more, but may hold
    entities."""
    parts, at = [], 0
    for mark in OWN_MARKS.finditer(raw):
        summary = mark.group(1)
        own = mark.group(0)
        if summary is not None:
            own = f"<details><summary>{html.escape(html.unescape(summary))}</summary>"
        own = "" if own == VERBATIM else own
        parts += [html.escape(raw[at : mark.start()]), own]
        at = mark.end()
    return "".join([*parts, html.escape(raw[at:])])


def _picture(files: Mapping[str, bytes], source: str, words: str) -> str:
    """A picture of the report's own, inside the page; any other is its words."""
    if source not in files:
        return html.escape(words)
    data = base64.b64encode(files[source]).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(words)}">'


def _box(table: Token) -> str:
    kind = f" {name}" if (name := table.meta.get("kind")) else ""
    return f'<div class="table{kind}" tabindex="0"><table>\n'


def _class_cells(tokens: Sequence[Token]) -> None:
    """Numbers, which Markdown sets flush right, get a class for it; tables of texts get one by the mark before them."""
    for i, token in enumerate(tokens):
        if token.type == "table_open" and i and tokens[i - 1].content.strip() == VERBATIM:
            token.meta["kind"] = "texts"
        if token.type in ("th_open", "td_open"):
            if "right" in cast(str, token.attrGet("style") or ""):
                token.attrSet("class", "number")
            token.attrs.pop("style", None)


def _plain(reader: MarkdownIt, text: str) -> str:
    """Inline Markdown without its marks."""
    inline = reader.parseInline(text)[0].children or []
    return "".join(child.content for child in inline)


PUBLISHED = "published"
MAX_BYTES = 20 * 2**20  # packed: what a repository carries without pain
PACKED_FROM = 64 * 2**10  # bytes from which on a journal is packed: smaller ones are read as they are
Say = Callable[[str], None]


def publish(runs: Sequence[Run], report: Path, *, results: Path, reports: Path, say: Say) -> tuple[Path, Path]:
    """Copy run folders to ``results/published/NAME/RUN`` and a report to ``reports/published/NAME``; the two folders.

    Long journals are packed; every reader of runs takes them for the journals themselves. NAME is
    ``<model>_<hardware>_<date>``. UserError where a run is incomplete, where the runs together are larger than
    :data:`MAX_BYTES`, or where either folder exists already.
    """
    name = published_name(Runs(runs))
    targets = (results / PUBLISHED / name, reports / PUBLISHED / name)
    for run in runs:
        if not run.complete:
            raise UserError(f"run {run.manifest.run_id} is not complete: finish it with --resume before publishing it")
    for target in targets:
        if target.exists():
            raise UserError(f"{target} exists already and nothing published is overwritten: move it away first")
    num_bytes = sum(len(_carried(file)[1]) for run in runs for file in _files(run.path))
    if num_bytes > MAX_BYTES:
        sizes = f"{num_bytes / 2**20:.1f} MiB when packed, more than the {MAX_BYTES / 2**20:.0f} MiB that are published"
        raise UserError(f"the runs are {sizes}: publish fewer runs or ones of fewer documents")
    for run in runs:
        _copy(run.path, targets[0] / run.manifest.run_id)
        for line in _make_plain(targets[0] / run.manifest.run_id / MANIFEST):
            say(f"{run.manifest.run_id}: {line}")
    _copy(report, targets[1])
    return targets


def published_name(runs: Runs) -> str:
    """``<model>_<hardware>_<date>``: the candidates' names, the devices', the day of the newest run."""
    models = {cell.checkpoint.name for run in runs for cell in run.manifest.cells if cell.arm == "candidate"}
    models = models or {cell.checkpoint.name for run in runs for cell in run.manifest.cells}
    hardware = {_hardware(run.manifest.machine) for run in runs}
    date = max(run.manifest.started_at[:10] for run in runs)
    return "_".join(["+".join(sorted(map(_slug, names))) for names in (models, hardware)] + [date])


def _hardware(machine: JsonObject) -> str:
    """The accelerators' name with their number if there are several, else ``cpu``."""
    devices: Any = machine.get("devices", ())
    names = [str(d.get("name") or str(d.get("device", "cpu")).split(":")[0]) for d in devices]
    distinct = sorted(set(names)) or ["cpu"]
    number = f"-x{len(names)}" if len(names) > 1 else ""
    return "-".join(distinct) + number


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


def _files(folder: Path) -> Iterator[Path]:
    """Everything but the empty lock of whoever wrote the run."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK)


def _copy(source: Path, target: Path) -> None:
    for file in _files(source):
        name, content = _carried(file)
        place = (target / file.relative_to(source)).with_name(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


def _carried(file: Path) -> tuple[str, bytes]:
    """Under which name a file is published, and its bytes there."""
    content = file.read_bytes()
    if file.suffix != ".jsonl" or len(content) < PACKED_FROM:
        return file.name, content
    return packed_path(file).name, packed(content)


def _make_plain(manifest: Path) -> Iterator[str]:
    """Make the command line plain in a copied manifest; a line for it, and one for each other path that remains.

    The closing file's digest of the manifest then is the copy's own.
    """
    held = json.loads(manifest.read_text(encoding="utf-8"))
    plain = list(plain_argv(held["argv"]))
    if plain != held["argv"]:
        held["argv"] = plain
        held["notes"] = [*held["notes"], "published: paths of the machine in argv were made plain"]
        manifest.write_text(json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        close_run(manifest.parent, FILES, read_closing(manifest.with_name(DONE), FILES).finished_at)
        yield "paths in its argv were made plain"
    yield from (f"still names {path!r} under {where}" for where, path in _paths(held) if where.split(".")[0] != "argv")


def _paths(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Absolute paths anywhere in a manifest, with the keys that lead to them."""
    if isinstance(value, str) and re.match(r"/\w|[A-Za-z]:\\", value):
        yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, f"{where}.{key}".lstrip("."))
