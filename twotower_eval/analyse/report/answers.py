"""Answers side by side: those that only one of the models got right, and how their tokens were committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from twotower_eval.analyse.compare.clean import flags
from twotower_eval.analyse.compare.documents import DocumentPair, document_pairs
from twotower_eval.analyse.compare.points import PointKey, QualityPoint, point_key, setting
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.plots import GREY, png
from twotower_eval.analyse.report.rendering import Column, Raw, Show, frame_of, markdown
from twotower_eval.analyse.report.text import (
    NONE,
    Row,
    Section,
    code,
    count,
    details,
    escape,
    lines_of,
    operating_point,
    outputs_columns,
)
from twotower_eval.records import Cell, CommitStep, Generation, GenerationRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

MAX_LOST, MAX_GAINED = 3, 1  # of each task; losses are what a claim is about
MAX_CHARACTERS, MAX_FILTERED = 400, 80
GIVEN = {"question": "question", "right answer": "gold"}  # headers and columns


def flips(runs: Runs) -> Section:
    """A handful of flipped answers per task at the headline's operating point, those with the lowest numbers."""
    title = "Flips: what the two models wrote"
    point = runs.shown.quality or next(iter(runs.quality), None)
    if point is None:
        return Section(title=title, markdown="Nothing has been scored in both arms, so nothing can have flipped.\n")
    flipped = [pair for pair in document_pairs(runs, point) if pair.change]
    shown = [pair for pair in flipped if pair.baseline and pair.candidate]
    lead = _lead(runs, point, flipped, shown)
    tasks = dict.fromkeys(pair.task for pair in shown)
    parts = [_of_task(point, task, [pair for pair in shown if pair.task == task]) for task in tasks]
    return Section(title=title, markdown="\n".join([lead, *parts]))


def _lead(runs: Runs, point: QualityPoint, flipped: Sequence[DocumentPair], shown: Sequence[DocumentPair]) -> str:
    lost = sum(pair.change == "lost" for pair in flipped)
    where = f"{escape(runs.name(point.candidate))}, run {code(point.run_id)}"
    text = f"At {where}: {count(lost)} documents lost, {count(len(flipped) - lost)} gained by the candidate. "
    if not flipped:
        return text + "No document flipped, so there is nothing to show.\n"
    if not shown:
        return text + "All of them were answered by likelihoods, so there are no texts to show.\n"
    return text + (
        f"Of each task up to {MAX_LOST} lost and {MAX_GAINED} gained ones, those with the lowest document numbers; "
        f"texts are cut after {MAX_CHARACTERS} characters.\n"
    )


def all_flips(runs: Runs) -> pd.DataFrame:
    """Every flip of every measurement of retention."""
    return flips_frame((p, pair) for p in runs.quality for pair in document_pairs(runs, p) if pair.change)


def flips_frame(flipped: Iterable[tuple[QualityPoint, DocumentPair]]) -> pd.DataFrame:
    """One row for each document that only one of the models got right, with what both wrote."""
    return frame_of(
        {
            "run": pair.run_id,
            **operating_point(point.candidate),
            **outputs_columns(point.candidate),
            "task": pair.task,
            "doc_id": pair.doc_id,
            "change": pair.change,
            "baseline_score": pair.baseline_score,
            "candidate_score": pair.candidate_score,
            **_answer("baseline", pair.baseline, pair.baseline_filtered),
            **_answer("candidate", pair.candidate, pair.candidate_filtered),
            "question": None if pair.text is None else pair.text.question,
            "gold": None if pair.text is None else pair.text.gold,
        }
        for point, pair in flipped
    )


def _answer(arm: str, made: Generation | None, filtered: str | None) -> Row:
    return {
        f"{arm}_text": None if made is None else made.text,
        f"{arm}_filtered": filtered,
        f"{arm}_num_tokens": None if made is None else made.num_tokens,
        f"{arm}_flags": None if made is None else " ".join(flags(made).names),
    }


def _of_task(point: QualityPoint, task: str, flipped: Sequence[DocumentPair]) -> str:
    """Some of a task's flips, lost ones first."""
    lost, gained = ([pair for pair in flipped if pair.change == change] for change in ("lost", "gained"))
    chosen = flips_frame((point, pair) for pair in (*lost[:MAX_LOST], *gained[:MAX_GAINED]))
    asked = [Column(header=header, show=_end_of(name)) for header, name in GIVEN.items()]
    columns = [
        Column(header="document", show=_document),
        *(asked if chosen["gold"].notna().any() else []),
        Column(header="baseline says", show=_text("baseline")),
        Column(header="candidate says", show=_text("candidate")),
    ]
    summary = f"{task}: {count(len(lost))} lost, {count(len(gained))} gained"
    return details(summary, markdown(chosen, columns, left=len(columns), verbatim=True))


def _document(row: Raw) -> str:
    return f"{row['doc_id']}: **{row['change']}**, {row['baseline_score']:g} to {row['candidate_score']:g}"


def _end_of(name: str) -> Show:
    """A text as it is; of a long one the end, where a question asks and a solution has its result."""

    def show(row: Raw) -> str:
        text = row[name]
        if text is None:
            return NONE
        return ("… " if len(text) > MAX_CHARACTERS else "") + (lines_of(text[-MAX_CHARACTERS:]) or NONE)

    return show


def _text(arm: str) -> Show:
    """A text as it is, marked where it is cut, empty or degenerate."""

    def show(row: Raw) -> str:
        text = row[f"{arm}_text"]
        if text is None:
            return f"{count(int(row[f'{arm}_num_tokens']))} tokens without a text"
        more = len(text) - MAX_CHARACTERS
        shown = lines_of(text[:MAX_CHARACTERS]) or NONE
        notes = [f"{count(more)} more characters"] if more > 0 else []
        filtered = row[f"{arm}_filtered"]
        notes += [] if filtered is None else [f"read as {escape(filtered[:MAX_FILTERED]) or 'nothing'}"]
        notes += [name.replace("_", " ") for name in row[f"{arm}_flags"].split()]
        return f"{shown} *({', '.join(notes)})*" if notes else shown

    return show


MAX_SHOWN = 6
NAME = "traces.png"


@dataclass(frozen=True, kw_only=True)
class Committed:
    """One committed position: counted over the whole answer, at which step of its block, how sure."""

    position: int
    step: int
    confidence: float


def traces(runs: Runs) -> Section:
    """Traces of a few answers at the headline's operating point, one of each task first."""
    title = "How answers came about"
    found = _chosen(runs)
    if found is None:
        text = "No trace was kept. `twotower-eval run --trace N` keeps those of the first N documents of each task.\n"
        return Section(title=title, markdown=text)
    run_id, cell, rows = found
    block_size = _block_size(cell, rows)
    draw = partial(_draw, rows=rows, block_size=block_size)
    columns = min(2, len(rows))
    picture = png(draw, columns=columns, rows=-(-len(rows) // columns), row_height=2.3)
    text = (
        f"![Which position was committed at which step]({NAME})\n\n"
        f"Each panel is one answer at {escape(runs.name(cell))}: blocks from left to right, a dot for each position "
        "at the step that committed it, the darker the surer the denoiser was. A low block came about in few passes; "
        "a staircase is decoding one token after another. The dashed line is where the answer ended: what stands "
        f"behind it was discarded. Run {code(run_id)}.\n"
    )
    return Section(title=title, markdown=text, files={NAME: picture})


def _block_size(cell: Cell, rows: Sequence[GenerationRow]) -> int:
    """The decoder's own; of one that has no such parameter as far as the positions reach that it committed."""
    size = setting(cell.decoder, "block_size")
    reached = (position for row in rows for step in row.generation.trace or () for position in step.positions)
    return size if isinstance(size, int) else 1 + max(reached, default=0)


def _chosen(runs: Runs) -> tuple[str, Cell, list[GenerationRow]] | None:
    """The headline point's traced rows of the first run that has any, else those of another point."""
    found: dict[PointKey, tuple[str, Cell, list[GenerationRow]]] = {}
    for run in runs:
        for row in run.generations:
            cell = run.cells[row.cell]
            if row.generation.trace:
                entry = found.setdefault(point_key(cell), (run.manifest.run_id, cell, []))
                if entry[0] == run.manifest.run_id and row.repeat == 0:
                    entry[2].append(row)
    if not found:
        return None
    chosen = runs.chosen if runs.chosen in found else next(iter(found))
    assert chosen is not None
    run_id, cell, rows = found[chosen]
    return run_id, cell, _one_of_each_task_first(rows)[:MAX_SHOWN]


def _one_of_each_task_first(rows: Sequence[GenerationRow]) -> list[GenerationRow]:
    seen: dict[str, int] = {}
    numbered = []
    for row in sorted(rows, key=lambda row: (row.task, row.doc_id, row.request_index)):
        seen[row.task] = seen.get(row.task, -1) + 1
        numbered.append((seen[row.task], row))
    return [row for _, row in sorted(numbered, key=lambda pair: pair[0])]


def committed(trace: Sequence[CommitStep], block_size: int) -> Iterator[Committed]:
    """Every committed position of a trace, in the order of the trace."""
    for step in trace:
        for position, confidence in zip(step.positions, step.confidences, strict=True):
            yield Committed(position=step.block * block_size + position, step=step.step, confidence=confidence)


def _draw(figure: Figure, *, rows: Sequence[GenerationRow], block_size: int) -> None:
    columns = min(2, len(rows))
    panels = figure.subplots(-(-len(rows) // columns), columns, squeeze=False)
    points: Any = None
    for axes, row in zip(panels.flat, rows, strict=False):
        points = _draw_answer(axes, row, block_size)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("position in the answer (tokens)", fontsize=9)
    figure.supylabel("step within the block", fontsize=9)
    bar = figure.colorbar(points, ax=panels.ravel().tolist(), fraction=0.025, pad=0.01)
    bar.set_label("confidence", fontsize=8)


def _draw_answer(axes: Axes, row: GenerationRow, block_size: int) -> PathCollection:
    from matplotlib.ticker import MaxNLocator

    made = row.generation
    assert made.trace is not None
    dots = list(committed(made.trace, block_size))
    num_blocks = 1 + max(step.block for step in made.trace)
    for block in range(num_blocks + 1):
        axes.axvline(block * block_size - 0.5, color=GREY, linewidth=0.5, zorder=1)
    if made.num_tokens < num_blocks * block_size:
        axes.axvline(made.num_tokens - 0.5, color="black", linewidth=1, linestyle="--", zorder=2)
    points = axes.scatter(
        [dot.position for dot in dots],
        [dot.step + 1 for dot in dots],
        c=[dot.confidence for dot in dots],
        cmap="viridis_r",
        vmin=0,
        vmax=1,
        s=14,
        marker="s",
        zorder=3,
    )
    axes.set_xlim(-1, num_blocks * block_size)
    axes.set_ylim(0.3, max(2, *(dot.step + 1 for dot in dots)) + 0.7)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    per_pass = f"{made.num_tokens} tokens, {made.num_denoiser_forwards} denoiser passes"
    name = f"{row.task} {row.doc_id}: {per_pass}"
    axes.set_title(name, loc="left", fontsize=8, parse_math=False)
    axes.grid(visible=False, axis="x")
    return points
