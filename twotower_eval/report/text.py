"""Words and numbers of a report: formats, Markdown tables, and the sections that are text."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence

from twotower_eval.evidence.naming import checkpoint_name, long_name
from twotower_eval.evidence.points import Measured, QualityPoint
from twotower_eval.evidence.runs import Runs
from twotower_eval.evidence.timing import SpeedPoint
from twotower_eval.records import Cell, Estimate
from twotower_eval.report.section import Section
from twotower_eval.store import Run

NONE = "\u2013"  # a dash: there is no such number
SCORED_BY = {
    "generation": "generation",
    "exact": "autoregressive likelihood (exact)",
    "context_tower": "context-tower likelihood",
    "denoiser_left_to_right": "denoiser likelihood (left-to-right)",
    "bound": "denoiser bound (Monte-Carlo)",
}


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
    return f"{number:.{places}f}" if number < 1000 else "over 1000"


# --- Markdown ------------------------------------------------------------------------------------------------------


def escape(text: object) -> str:
    """Text that Markdown and HTML take for nothing but text, on one line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore within a word, as in exact_match, is plain text to Markdown already.
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)[_#]|_(?!\w))", r"\\\1", plain)


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


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are flush left, the others right."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    lines = [header, rule, *rows]
    assert all(len(line) == len(header) for line in lines), "a table row has another number of cells than its header"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list, empty for no lines."""
    return "".join(f"- {line}\n" for line in lines)


def details(summary: str, body: str) -> str:
    """A part that is folded away at first. The summary is plain text: Markdown is not read within raw HTML."""
    plain = html.escape(" ".join(summary.split()), quote=False)
    return f"<details><summary>{plain}</summary>\n\n{body.rstrip()}\n\n</details>\n"


def scored_by_words(kinds: str) -> str:
    """How a task was scored, for people; a task of several members may have several kinds."""
    return " + ".join(SCORED_BY.get(kind, escape(kind)) for kind in kinds.split(" + "))


def run_list(run_ids: Iterable[str]) -> str:
    """Run ids as code, each once, in order."""
    return ", ".join(code(run_id) for run_id in sorted(set(run_ids)))


# --- the headline --------------------------------------------------------------------------------------------------


def headline(runs: Runs) -> Section:
    """One sentence to quote, and what a reader must know before quoting it."""
    key = runs.chosen
    quality, speed = (None, None) if key is None else (runs.quality_at(key), runs.speed_at(key))
    lines = [_incomplete(run) for run in runs if not run.complete]
    if key is None:
        lines.append("**Nothing has been scored or timed completely yet, so there is nothing to quote.**")
    else:
        lines.append(_sentence(runs, runs.points[key], quality, speed))
    lines.append(bullets(_caveats(runs, quality, speed)))
    return Section(title="Verdict", markdown="\n\n".join(line for line in lines if line) + "\n")


def _incomplete(run: Run) -> str:
    rows = f"{len(run.scores):,} scores, {len(run.generations):,} generations, {len(run.speed):,} timed calls"
    return (
        f"> **INCOMPLETE: run {code(run.manifest.run_id)} has not finished.** So far: {rows}. Figures may still move."
    )


def _sentence(runs: Runs, candidate: Cell, quality: QualityPoint | None, speed: SpeedPoint | None) -> str:
    who = f"{escape(checkpoint_name(candidate.checkpoint))} decoding with {escape(runs.name(candidate))}"
    kept = _kept(quality)
    faster = _faster(speed)
    if kept and faster:
        return f"**{who} keeps {kept} at {faster}.**"
    if kept:
        reason = (speed and speed.time.reason) or "not measured; `twotower-eval speed` measures it"
        return f"**{who} keeps {kept}.** Its speed: {reason}."
    if faster:
        reason = (quality and quality.headline.reason) or "not measured; `twotower-eval run` measures it"
        return f"**{who} runs at {faster}.** Its quality: {reason}."
    reasons = {reason for reason in (quality and quality.headline.reason, speed and speed.time.reason) if reason}
    return f"**{who}: nothing to quote.** {'; '.join(sorted(reasons))}."


def _kept(quality: QualityPoint | None) -> str | None:
    if quality is None or quality.headline.estimate is None:
        return None
    text = f"{retention(quality.headline)} of the baseline's quality"
    if not quality.all_exercise_decoder and quality.exercised.estimate:
        text += f" ({retention(quality.exercised)} on the tasks that its decoder answers)"
    return text


def _faster(speed: SpeedPoint | None) -> str | None:
    if speed is None or speed.time.estimate is None:
        return None
    invalid = any(warning.startswith("INVALID") for warning in speed.warnings)
    return f"{times(speed.time)} its wall-clock speed" + (" (INVALID timing, see below)" if invalid else "")


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _caveats(runs: Runs, quality: QualityPoint | None, speed: SpeedPoint | None) -> list[str]:
    lines = []
    point = quality or speed
    if point is not None:
        who = f"{escape(checkpoint_name(point.baseline.checkpoint))}, {escape(long_name(point.baseline.decoder))}"
        lines.append(f"The baseline is {who}. Brackets hold 95 % intervals.")
    if quality and quality.tasks:
        num_documents = sum(task.num_documents for task in quality.tasks)
        num_exercising = sum(task.exercises_decoder for task in quality.tasks)
        what = f"{_plural(len(quality.tasks), 'task')}, {_plural(num_documents, 'document')}"
        lines.append(f"Quality: {what}; {num_exercising} answered by the decoder. Run {run_list([quality.run_id])}.")
    if speed and speed.time.estimate:
        setting = f"{speed.workload} workload, batch {speed.batch_size}"
        size = f"{_plural(speed.num_rounds, 'round')} of {_plural(speed.num_calls, 'timed call')}"
        useful = ""
        if speed.workload == "answer" and speed.throughput.estimate:
            useful = f"; {times(speed.throughput)} in useful tokens per second"
        lines.append(f"Speed: {setting}, {size}{useful}. Run {run_list(speed.run_ids)}.")
    if len(runs.points) > 1:
        lines.append(
            f"{len(runs.points)} operating points were measured. The one above was chosen without a look at the "
            "results; a point picked from the tables below needs a new run on other documents before it is quoted."
        )
    if quality and quality.equal_tasks:
        names = escape(", ".join(quality.equal_tasks))
        lines.append(
            f"Equal by construction: {names}, scored by the context tower that both arms share. This pulls the "
            "headline towards 100 %."
        )
    lines += [f"Quality: {warning}." for warning in (quality.warnings if quality else ())]
    lines += [f"Speed: {warning}." for warning in (speed.warnings if speed else ())]
    return lines
