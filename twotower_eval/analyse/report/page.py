"""A report as one self-contained HTML file, without script or request."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import cast

from markdown_it import MarkdownIt
from markdown_it.token import Token

from twotower_eval.analyse.report.text import VERBATIM

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
