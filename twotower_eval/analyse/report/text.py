"""Words and numbers of a report: formats, Markdown, sections, and columns that several tables share."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from twotower_eval.analyse.compare.calls import WithinCalls
from twotower_eval.analyse.compare.figures import Counts, Measured
from twotower_eval.analyse.compare.points import NAMED, checkpoint_name, setting
from twotower_eval.analyse.compare.timing import SpeedPoint, best_warning
from twotower_eval.analyse.compare.tradeoff import MeasuredOn
from twotower_eval.analyse.words import INVALID
from twotower_eval.analyse.words.facts import method_text
from twotower_eval.records import FAMILY_DECODERS, Cell, Estimate, Finding, Workload
from twotower_eval.rules import SCORED_BY, load_text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report: a title, Markdown below it, and the files that the Markdown links to.

    ``tables`` are frames of raw values by name: with ``--format csv`` each is written as ``tables/NAME.csv``.
    """

    title: str
    markdown: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)


Row = dict[str, object]
LEAST_P = 1e-4  # smaller ones are not told apart


def measured_columns(name: str, found: Measured) -> Row:
    """An estimate as four columns and the reason where there is none."""
    estimate = found.estimate
    numbers = (None,) * 4 if estimate is None else (estimate.value, estimate.low, estimate.high, estimate.level)
    values = dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_level"), numbers, strict=True))
    method = None if estimate is None else method_text(estimate)
    return {**values, f"{name}_method": method, f"{name}_missing_reason": found.reason}


def operating_point(cell: Cell) -> Row:
    """An operating point's columns: three usual settings, then the other parameters of a plug-in or a family's decoder
    as ``param_NAME``, and whether its answers are approximate."""
    named = {name: setting(cell.decoder, name) for name in NAMED}
    if cell.decoder.approximate:
        named["approximate"] = True
    if cell.decoder.is_plug_in or cell.decoder.kind in FAMILY_DECODERS:
        others = (name for name in cell.decoder.params if name not in NAMED)
        named |= {f"param_{name}": cell.decoder.params[name] for name in others}
    return {"checkpoint": checkpoint_name(cell.checkpoint), "decoder": cell.decoder.label, **named}


def load_columns(workload: Workload) -> Row:
    """What was timed and how many prompts at a time, of which there is no number at a rate of requests."""
    sent = "" if workload.requests is None else f", {load_text(workload)}"
    size = None if workload.request_rate is not None else workload.batch_size or 1
    return {"workload": f"{workload.kind}{sent}", "batch_size": size}


def outputs_columns(cell: Cell) -> Row:
    """Whether scores are of whole tasks or of timed answers, and the batch size of the latter."""
    outputs = "whole_tasks" if cell.workload.kind == "task" else "timed"
    return {"outputs": outputs, "batch_size": cell.workload.batch_size}


def ends(arm: str, interval: Measured) -> Row:
    """The ends of an arm's own interval, or why it has none."""
    columns = measured_columns(arm, interval)
    return {name: columns[name] for name in (f"{arm}_low", f"{arm}_high", f"{arm}_missing_reason")}


FINISHES = ("eos", "stop", "length")


def count_columns(arm: str, counts: Counts) -> Row:
    """What an arm's answers cost: tokens and forwards."""
    return {
        f"{arm}_num_prompts": counts.num_prompts,
        f"{arm}_num_tokens": counts.num_tokens,
        f"{arm}_num_discarded_tokens": counts.num_discarded_tokens,
        f"{arm}_num_context_forwards": counts.num_context_forwards,
        f"{arm}_num_prefill_forwards": counts.num_prefill_forwards,
        f"{arm}_num_denoiser_forwards": counts.num_denoiser_forwards,
        f"{arm}_num_draft_forwards": counts.num_draft_forwards,
        f"{arm}_num_forced_commits": counts.num_forced_commits,
        f"{arm}_tokens_per_nfe": counts.tokens_per_nfe,
        f"{arm}_tokens_per_nfe_and_commit": counts.tokens_per_nfe_and_commit,
        f"{arm}_tokens_per_forward": counts.tokens_per_forward,
        f"{arm}_forced_share": counts.forced_share,
        **{f"{arm}_num_ended_by_{reason}": counts.num_finished[reason] for reason in FINISHES},
    }


def within_columns(arm: str, within: WithinCalls) -> Row:
    """Medians within timed calls and peak memory; None where nothing was recorded."""
    return {
        f"{arm}_prefill_median_s": within.prefill_s,
        f"{arm}_first_output_median_s": within.first_output_s,
        f"{arm}_peak_memory_bytes": within.peak_memory_bytes,
    }


NONE = "\u2013"  # a dash: there is no such number
VERBATIM = "<!-- verbatim -->"  # before a table: no Markdown can say what a table holds


# --- numbers -------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """A share as ``91.2 %``."""
    return f"{100 * value:.1f} %"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits: ``0.0123``, ``4.56``, ``12,300``; an exponent from 10 million."""
    if abs(value) >= 1e7:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - int(f"{rounded:e}".partition("e")[2])) if rounded else 0
    return f"{rounded:,.{decimals}f}"


def p_value(value: float) -> str:
    """``0.012``; below 0.0001 only that it is."""
    return "&lt; 0.0001" if value < LEAST_P else significant(value, 2)


def seconds(value_s: float) -> str:
    """A time in seconds, or in milliseconds below one second."""
    return f"{significant(1000 * value_s)} ms" if value_s < 1 else f"{significant(value_s)} s"


def count(number: int) -> str:
    """A whole number with separators."""
    return f"{number:,}"


def retention(value: Measured) -> str:
    """``91.2 % [88.0, 94.1]``; one more digit where the interval is narrower than a fifth of a point."""
    return _interval(value, lambda e: _decimals(100 * (e.high - e.low), coarse=1), scale=100, unit=" %")


def times(value: Measured) -> str:
    """``2.31x [2.27, 2.35]``; one more digit where the interval is narrower than 0.02."""
    return _interval(value, lambda e: _decimals(10 * (e.high - e.low), coarse=2), unit="x")


def speedup(point: SpeedPoint, value: Measured) -> str:
    """A figure of a point's timing, marked where the timing is INVALID."""
    marked = point.invalid and value.estimate is not None
    return times(value) + (f" **{INVALID}**" if marked else "")


def ratio(value: Measured) -> str:
    """``1.03 [1.01, 1.05]``: as :func:`times`, of what is no number of times."""
    return _interval(value, lambda e: _decimals(10 * (e.high - e.low), coarse=2))


def rate(value: Measured) -> str:
    """Tokens per second with their interval, three significant digits."""
    found = value.estimate
    return (
        NONE if found is None else f"{significant(found.value)} [{significant(found.low)}, {significant(found.high)}]"
    )


def _decimals(width: float, *, coarse: int) -> int:
    return coarse if width >= 0.2 else coarse + 1


def _interval(value: Measured, decimals: Callable[[Estimate], int], *, scale: float = 1, unit: str = "") -> str:
    found = value.estimate
    if found is None:
        return NONE
    places = decimals(found)
    middle, low, high = (_capped(scale * number, places) for number in (found.value, found.low, found.high))
    return f"{middle}{unit} [{low}, {high}]"


def _capped(number: float, places: int) -> str:
    """A number, or only that it is large: the ends of an interval from next to no data can lie anywhere."""
    return f"{number:z.{places}f}" if number < 1000 else "over 1000"


# --- Markdown ------------------------------------------------------------------------------------------------------


def escape(text: object) -> str:
    """Text that Markdown and HTML take for nothing but text, on one line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore within a word, as in exact_match, is plain text to Markdown already.
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)[_#]|_(?!\w))", r"\\\1", plain)


def with_commands(text: str) -> str:
    """Text of our own as :func:`escape` gives it, but for what stands between backticks: commands to type."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return "".join(code(part) if at % 2 else _escaped_within(part) for at, part in enumerate(parts))


def _escaped_within(part: str) -> str:
    """As :func:`escape`, the blanks at both ends kept."""
    inner = escape(part)
    return f"{' ' if part[:1].isspace() else ''}{inner}{' ' if inner and part[-1:].isspace() else ''}"


def lines_of(text: str) -> str:
    """A text within a table cell with its own lines and indentation; empty for one of blanks only."""
    lines = [line.replace("\t", "    ") for line in text.strip("\n").splitlines()]
    indents = ["&nbsp;" * (len(line) - len(line.lstrip(" "))) for line in lines]
    shown = [indent + escape(line) for indent, line in zip(indents, lines, strict=True)]
    return "<br>".join(shown) if text.strip() else ""


def code(text: object) -> str:
    """Text in a code span, which nothing in it can end."""
    plain = " ".join(str(text).split()).replace("|", "\\|")
    return f"`{plain}`" if "`" not in plain else f"`` {plain} ``"


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list, empty for no lines."""
    return "".join(f"- {line}\n" for line in lines)


def details(summary: str, body: str) -> str:
    """A part that is folded away at first. The summary is plain text: Markdown is not read within raw HTML."""
    plain = html.escape(" ".join(summary.split()), quote=False)
    return f"<details><summary>{plain}</summary>\n\n{body.rstrip()}\n\n</details>\n"


def scored_by_words(kinds: Sequence[str]) -> str:
    """How a task was scored, for people; a task of several members may have several kinds."""
    return " + ".join(SCORED_BY.get(kind, escape(kind)) for kind in kinds)


def mean_of(num: int, by_size: bool) -> str:
    """Behind a group's name: of how many members its figure is the mean."""
    return f" (mean of {num}{', by documents' if by_size else ''})"


def measured_on_words(on: MeasuredOn) -> str:
    """``1,800 documents of 6 tasks``, ``128 documents of 6 tasks, timed at batch 1``, ``answer workload, batch 1``."""
    if on.num_documents is None:
        return f"{on.kind} workload, batch {on.batch_size}, {count(on.num_calls or 0)} calls a round"
    tasks = "1 task" if on.num_tasks == 1 else f"{count(on.num_tasks or 0)} tasks"
    documents = "1 document" if on.num_documents == 1 else f"{count(on.num_documents)} documents"
    return f"{documents} of {tasks}" + ("" if on.kind == "task" else f", timed at batch {on.batch_size}")


def speed_findings(point: SpeedPoint) -> tuple[Finding, ...]:
    """What a reader of this speedup must know; last why it is INVALID, if it is."""
    slow, failed = best_warning(point.best), [gate for gate in point.gates if gate.outcome == "failed"]
    wrong = [Finding(kind=gate.kind, severity="invalid", facts=gate.facts) for gate in failed]
    return (*point.warnings, *([] if slow is None else [slow]), *wrong)


def run_list(run_ids: Iterable[str]) -> str:
    """Run ids as code, each once, in order."""
    return ", ".join(code(run_id) for run_id in sorted(set(run_ids)))
