"""The picture of quality against speed: numbered points, their boxes and the Pareto front.

One number stands for one operating point in every panel; the legend names it. So a dense picture stays readable, and
a number that had to move aside is tied to its point by a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import cos, radians, sin
from typing import TYPE_CHECKING, Any

import pandas as pd

from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import PointKey, setting
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.tradeoff import Panel, TradeOff
from twotower_eval.analyse.report.plots import COLOURS, CROSS, GREY, MARKERS, handle, legend_columns, png
from twotower_eval.analyse.report.rendering import frame_of
from twotower_eval.analyse.report.text import Section, count, measured_columns, run_list
from twotower_eval.records import Cell, DecoderSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox, BboxBase

FRONT = "#F0B400"
BASELINE: dict[str, Any] = {"marker": "*", "color": "black", "markersize": 11}
FRONT_LINE: dict[str, Any] = {"color": FRONT, "linewidth": 3.2, "alpha": 0.85, "drawstyle": "steps-pre"}
NUMBER_REACH = (9, 14, 20, 27, 35, 44, 54, 66, 80, 96)  # points from a marker to its number, nearest first
NUMBER_ANGLES = (30, 150, -30, -150, 90, -90, 0, 180, 60, 120, -60, -120)  # degrees
MARKER_ROOM = 4.0  # points around the middle of a marker that no number may cover

Numbers = Mapping[PointKey, tuple[int, Cell]]


def tradeoff(runs: Runs) -> Section:
    """Quality against speed: one panel for what was timed and scored alike, one box for each operating point."""
    title = "Quality against speed: the Pareto front"
    panels = runs.trade_offs
    if not panels:
        text = "No operating point has both a retention and a speedup, so there is no plot: run both verbs on it.\n"
        return Section(title=title, markdown=text)
    columns = min(2, len(panels))
    numbers = _numbers(panels)
    draw = partial(_draw, runs=runs, panels=panels, numbers=numbers)
    in_a_row = _in_a_row(runs, numbers, columns)
    legend_height = 0.17 * (len(numbers) + 6) / in_a_row  # inches for the names below the panels
    rows = -(-len(panels) // columns)
    picture = png(draw, columns=columns, rows=rows, row_height=4.2 + legend_height / rows)
    run_ids = {run_id for panel in panels for run_id in panel.run_ids}
    blocks = all("block_size" in cell.decoder.params for _, cell in numbers.values())
    by = " by block size / steps / threshold" if blocks else ""
    text = (
        "![Retention against speedup](tradeoff.png)\n\n"
        f"Each number is an operating point, named in the legend{by}; the box around it "
        "spans both 95 % intervals. Up and to the right is better; the baseline stands at 1x and 100 %. The thick line "
        "is the Pareto front: of the points at its corners none, the baseline included, is beaten in both by its "
        "estimates. Points whose timing is INVALID are crossed and never on the front. Hollow: fast and broken. "
        f"Behind a number, ~: answers differ in length by more than a tenth. {_sources(panels)} "
        f"Runs: {run_list(run_ids)}.\n"
    )
    tables = {"tradeoff": tradeoff_frame(runs, numbers)}
    return Section(title=title, markdown=text, files={"tradeoff.png": picture}, tables=tables)


def tradeoff_frame(runs: Runs, numbers: Numbers) -> pd.DataFrame:
    """One row for each point of each panel: what the picture shows, by its number in it."""
    return frame_of(
        {
            "number": numbers[point.key][0],
            "operating_point": runs.name(point.candidate),
            "workload": panel.workload,
            "batch_size": panel.batch_size,
            "outputs": "timed" if panel.same_outputs else "whole_tasks",
            "num_documents": panel.scored.num_documents,
            **measured_columns("retention", Measured(estimate=point.retention)),
            **measured_columns("time_speedup", Measured(estimate=point.speedup)),
            "on_front": point.on_front,
            "invalid": point.invalid,
            "broken": point.broken,
            "lengths_differ": point.uneven,
            "runs": " ".join(sorted(panel.run_ids)),
        }
        for panel in runs.trade_offs
        for point in panel.points
    )


def _in_a_row(runs: Runs, numbers: Numbers, columns: int) -> int:
    """Names beside each other in the legend below so many panels."""
    names = [f"{number}  {runs.name(cell, short=True)}" for number, cell in numbers.values()]
    return legend_columns(names, 3 if columns == 1 else 5, panels=columns)


def _sources(panels: Sequence[Panel]) -> str:
    """Where the retentions are from: of one kind within a panel."""
    kinds = {panel.same_outputs for panel in panels}
    if len(kinds) > 1:
        return "Retention is of the kind that each panel names."
    if kinds == {True}:
        return "Retention is that of the timed outputs themselves."
    return "Retention is that of the scored run, of whole tasks."


def _numbers(panels: Sequence[Panel]) -> Numbers:
    """Operating points by number, from 1: by block size, then in the order of the plan."""
    first: dict[PointKey, Cell] = {}
    for panel in panels:
        for point in panel.points:
            first.setdefault(point.key, point.candidate)
    ordered = sorted(first.items(), key=lambda item: _family(item[1].decoder))
    return {key: (number, cell) for number, (key, cell) in enumerate(ordered, start=1)}


def _family(decoder: DecoderSpec) -> tuple[int, str]:
    """What shares a colour, in the order of the legend."""
    block = setting(decoder, "block_size")
    return (0, decoder.kind) if block is None else (int(block), f"block {block}")


def _draw(figure: Figure, *, runs: Runs, panels: Sequence[Panel], numbers: Numbers) -> None:
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    families = sorted({_family(cell.decoder) for _, cell in numbers.values()})
    colours = {key: families.index(_family(cell.decoder)) for key, (_, cell) in numbers.items()}
    drawn = []
    for i, (panel, title) in enumerate(zip(panels, _titles(panels), strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw_panel(axes, panel.points, colours)
        axes.set_title(title, loc="left", fontsize=9)
        drawn.append((axes, panel.points))
    handles = _legend([point for panel in panels for point in panel.points])
    for key, (number, cell) in numbers.items():
        handles[f"{number}  {runs.name(cell, short=True)}"] = handle(**_look(colours[key]))
    in_a_row = _in_a_row(runs, numbers, columns)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=in_a_row, fontsize=8)
    figure.draw_without_rendering()  # numbers are placed in pixels, so the layout must stand
    for axes, points in drawn:
        labels = [f"{numbers[point.key][0]}{'~' if point.uneven else ''}" for point in points]
        _place_numbers(axes, labels, [_place(point) for point in points], [colours[point.key] for point in points])


def _titles(panels: Sequence[Panel]) -> list[str]:
    """How a panel's points were timed and what their retention is of; with its run where others say the same."""
    titles = []
    for panel in panels:
        kept = "timed outputs" if panel.same_outputs else "whole tasks"
        documents = f"{count(panel.scored.num_documents or 0)} documents"
        titles.append(f"{panel.workload} workload, batch {panel.batch_size}; {kept}, {documents}")
    runs = [", ".join(panel.timed.run_ids) for panel in panels]
    return [f"{t}\n{run}" if titles.count(t) > 1 else t for t, run in zip(titles, runs, strict=True)]


def _place(point: TradeOff) -> tuple[float, float]:
    return point.speedup.value, 100 * point.retention.value


def _look(family: int, *, broken: bool = False) -> dict[str, Any]:
    """How a marker is drawn, in the picture and in the legend alike."""
    colour = COLOURS[family % len(COLOURS)]
    return {
        "marker": MARKERS[family % len(MARKERS)],
        "color": colour,
        "markerfacecolor": "white" if broken else colour,
        "markeredgecolor": colour if broken else "white",  # an edge parts markers that overlap
        "markeredgewidth": 1.0 if broken else 0.4,
        "markersize": 5.5,
    }


def _legend(points: Sequence[TradeOff]) -> dict[str, Line2D]:
    """What is not an operating point: of the odd kinds of points, those that occur."""
    handles = {"baseline": handle(**BASELINE), "Pareto front": handle(**{**FRONT_LINE, "linestyle": "-"})}
    if any(point.invalid for point in points):
        handles["INVALID"] = handle(**CROSS)
    if any(point.broken for point in points):
        handles["fast and broken"] = handle(marker="o", color=GREY, markersize=5.5, markerfacecolor="white")
    if any(point.uneven for point in points):
        handles["lengths differ"] = handle(marker="$\\sim$", color="black", markersize=8)
    return handles


def _draw_panel(axes: Axes, points: Sequence[TradeOff], colours: Mapping[PointKey, int]) -> None:
    from matplotlib.patches import Rectangle

    axes.axhline(100, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.plot(*zip(*corners(points), strict=True), zorder=2, **FRONT_LINE)
    axes.plot([1], [100], linestyle="none", zorder=5, **BASELINE)
    for point in points:
        kept, faster = point.retention, point.speedup
        corner, width, height = (faster.low, 100 * kept.low), faster.high - faster.low, 100 * (kept.high - kept.low)
        look = _look(colours[point.key], broken=point.broken)
        box = {"facecolor": look["color"], "alpha": 0.08, "edgecolor": look["color"], "linewidth": 0.5}
        axes.add_patch(Rectangle(corner, width, height, zorder=1.5, **box))
        x, y = _place(point)
        axes.plot([x], [y], linestyle="none", zorder=3, **look)
        if point.invalid:
            axes.plot([x], [y], linestyle="none", zorder=4, **CROSS)
    axes.set_xlabel("wall-clock speedup, S_time (x)")
    axes.set_ylabel("retention of quality (%)")
    axes.margins(0.08)


def corners(points: Sequence[TradeOff]) -> list[tuple[float, float]]:
    """Corners of the front, from left to right, in the picture's units: the baseline unless a point beats it."""
    on = [_place(point) for point in points if point.on_front]
    beaten = any(x >= 1 and y >= 100 for x, y in on)
    return sorted({*on, *([] if beaten else [(1.0, 100.0)])})


def _place_numbers(
    axes: Axes, labels: Sequence[str], places: Sequence[tuple[float, float]], colours: Sequence[int]
) -> None:
    """Put each number at the nearest place where it covers no other number, no marker and no line to a number."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixels = figure.dpi / 72
    inside = axes.get_window_extent()
    middles = [tuple(axes.transData.transform(place)) for place in [(1.0, 100.0), *places]]
    blocked = [_square(x, y, MARKER_ROOM * pixels) for x, y in middles]
    for label, place, colour, (x, y) in zip(labels, places, colours, middles[1:], strict=True):
        half_w, half_h = (2.4 * len(label) + 0.8) * pixels, 3.8 * pixels
        offsets = [(reach * cos(radians(a)), reach * sin(radians(a))) for reach in NUMBER_REACH for a in NUMBER_ANGLES]
        free = [
            offset
            for offset in offsets
            if _free(_rectangle(x + offset[0] * pixels, y + offset[1] * pixels, half_w, half_h), blocked, inside)
        ]
        offset = free[0] if free else offsets[0]
        middle_x, middle_y = x + offset[0] * pixels, y + offset[1] * pixels
        blocked.append(_rectangle(middle_x, middle_y, half_w, half_h))
        steps = [i / 6 for i in range(2, 5)]  # a number upon another's line would seem to be at its end
        blocked += [_square(x + s * (middle_x - x), y + s * (middle_y - y), pixels) for s in steps]
        axes.annotate(
            label,
            place,
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            fontweight="bold",
            color=COLOURS[colour % len(COLOURS)],
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 1},
        )


def _square(x: float, y: float, half: float) -> Bbox:
    return _rectangle(x, y, half, half)


def _rectangle(x: float, y: float, half_w: float, half_h: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox([[x - half_w, y - half_h], [x + half_w, y + half_h]])


def _free(box: BboxBase, blocked: Sequence[BboxBase], inside: BboxBase) -> bool:
    held = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    return held and not any(box.overlaps(other) for other in blocked)
