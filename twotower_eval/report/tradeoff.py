"""The picture of quality against speed: numbered points, their boxes and the Pareto front.

One number stands for one operating point in every panel; the legend names it. So a dense picture stays readable, and
a number that had to move aside is tied to its point by a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import cos, radians, sin
from typing import TYPE_CHECKING, Any

from twotower_eval.evidence.naming import setting
from twotower_eval.evidence.nulls import is_invalid
from twotower_eval.evidence.pareto import front, is_fast_and_broken
from twotower_eval.evidence.points import PointKey
from twotower_eval.evidence.runs import Runs
from twotower_eval.evidence.timing import SpeedPoint
from twotower_eval.records import DecoderSpec, Estimate
from twotower_eval.report.plots import COLOURS, GREY, MARKERS, png
from twotower_eval.report.section import Section
from twotower_eval.report.text import run_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRONT = "#F0B400"
NUMBER_REACH = (9, 14, 20, 27, 35, 44, 54, 66, 80, 96)  # points from a marker to its number, nearest first
NUMBER_ANGLES = (30, 150, -30, -150, 90, -90, 0, 180, 60, 120, -60, -120)  # degrees
MARKER_ROOM = 4.0  # points around the middle of a marker that no number may cover


@dataclass(frozen=True, kw_only=True)
class _Dot:
    """One point of a panel."""

    number: int
    retention: Estimate
    speedup: Estimate
    family: int
    uneven: bool
    broken: bool
    invalid: bool

    @property
    def place(self) -> tuple[float, float]:
        return self.speedup.value, 100 * self.retention.value


def tradeoff(runs: Runs) -> Section:
    """Quality against speed: one panel for each workload and batch size, one box for each operating point."""
    title = "Quality against speed: the Pareto front"
    panels = _panels(runs)
    if not panels:
        text = "No operating point has both a retention and a speedup, so there is no plot: run both verbs on it.\n"
        return Section(title=title, markdown=text)
    columns = min(2, len(panels))
    used = [point for panel in panels for point in panel]
    numbered = _numbered(used)
    draw = partial(_draw, runs=runs, panels=panels, numbered=numbered)
    legend_height = 0.17 * (len(numbered) + 6) / (3 if columns == 1 else 5)  # inches for the names below the panels
    rows = -(-len(panels) // columns)
    picture = png(draw, columns=columns, rows=rows, row_height=4.2 + legend_height / rows)
    run_ids = {run_id for point in used for run_id in point.run_ids}
    run_ids |= {found.run_id for point in used if (found := runs.quality_at(point.key))}
    text = (
        "![Retention against speedup](tradeoff.png)\n\n"
        "Each number is an operating point, named in the legend by block size / steps / threshold; the box around it "
        "spans both 95 % intervals. Up and to the right is better; the baseline stands at 1x and 100 %. The thick line "
        "is the Pareto front: no other point, the baseline included, is both faster and better by its estimate. Points "
        "whose timing is INVALID are crossed and never on the front. Hollow: fast and broken. Half filled: answers "
        "differ in length by more than a tenth. "
        f"Retention is that of {_source(runs, used)}. Runs: {run_list(run_ids)}.\n"
    )
    return Section(title=title, markdown=text, files={"tradeoff.png": picture})


def _source(runs: Runs, points: Sequence[SpeedPoint]) -> str:
    timed = {found.timed for point in points if (found := runs.quality_at(point.key))}
    names = {True: "the timed outputs themselves", False: "the scored run"}
    return " or ".join(names[kind] for kind in sorted(timed))


def _panels(runs: Runs) -> list[list[SpeedPoint]]:
    panels: dict[tuple[str, str, int], list[SpeedPoint]] = {}
    for point in runs.speed:
        quality = runs.quality_at(point.key)
        if quality and quality.headline.estimate and point.time.estimate:
            panels.setdefault((point.workload, point.candidate.workload.name, point.batch_size), []).append(point)
    return [panels[key] for key in sorted(panels)]


def _numbered(points: Sequence[SpeedPoint]) -> dict[PointKey, tuple[int, SpeedPoint]]:
    """Operating points by number, from 1: by block size, then in the order of the plan."""
    first: dict[PointKey, SpeedPoint] = {}
    for point in points:
        first.setdefault(point.key, point)
    ordered = sorted(first.items(), key=lambda item: _family(item[1].candidate.decoder))
    return {key: (number, point) for number, (key, point) in enumerate(ordered, start=1)}


def _family(decoder: DecoderSpec) -> tuple[int, str]:
    """What shares a colour, in the order of the legend."""
    block = setting(decoder, "block_size")
    return (0, decoder.kind) if block is None else (int(block), f"block {block}")


def _draw(
    figure: Figure,
    *,
    runs: Runs,
    panels: list[list[SpeedPoint]],
    numbered: Mapping[PointKey, tuple[int, SpeedPoint]],
) -> None:
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    families = sorted({_family(point.candidate.decoder) for _, point in numbered.values()})
    drawn = []
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        dots = [_dot(runs, point, numbered[point.key][0], families) for point in panel]
        _draw_panel(axes, dots)
        axes.set_title(f"{panel[0].workload} workload, batch {panel[0].batch_size}", loc="left", fontsize=9)
        drawn.append((axes, dots))
    handles = _legend([dot for _, dots in drawn for dot in dots])
    for number, point in numbered.values():
        family = families.index(_family(point.candidate.decoder))
        handles[f"{number}  {runs.name(point.candidate, short=True)}"] = _handle(**_look(family))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3 if columns == 1 else 5, fontsize=8
    )
    figure.draw_without_rendering()  # numbers are placed in pixels, so the layout must stand
    for axes, dots in drawn:
        _place_numbers(axes, dots)


def _dot(runs: Runs, point: SpeedPoint, number: int, families: list[tuple[int, str]]) -> _Dot:
    quality = runs.quality_at(point.key)
    assert quality is not None
    kept, faster, length = quality.headline.estimate, point.time.estimate, point.length.estimate
    assert kept is not None
    assert faster is not None
    return _Dot(
        number=number,
        retention=kept,
        speedup=faster,
        family=families.index(_family(point.candidate.decoder)),
        uneven=length is not None and not 0.9 <= length.value <= 1.1,
        broken=is_fast_and_broken(kept, faster),
        invalid=is_invalid(point.warnings),
    )


def _look(family: int, *, uneven: bool = False, broken: bool = False) -> dict[str, Any]:
    """How a marker is drawn, in the picture and in the legend alike."""
    colour = COLOURS[family % len(COLOURS)]
    return {
        "marker": MARKERS[family % len(MARKERS)],
        "color": colour,
        "fillstyle": "left" if uneven and not broken else "full",
        "markerfacecolor": "white" if broken else colour,
        "markerfacecoloralt": "white",
        "markeredgecolor": colour if broken or uneven else "white",  # an edge parts markers that overlap
        "markeredgewidth": 1.0 if broken or uneven else 0.4,
        "markersize": 5.5,
    }


def _handle(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"linestyle": "none", **look})


CROSS: dict[str, Any] = {"marker": "x", "color": "black", "markersize": 9, "markeredgewidth": 1.1}
BASELINE: dict[str, Any] = {"marker": "*", "color": "black", "markersize": 11}
FRONT_LINE: dict[str, Any] = {"color": FRONT, "linewidth": 3.2, "alpha": 0.85, "solid_capstyle": "round"}


def _legend(dots: Sequence[_Dot]) -> dict[str, Any]:
    """What is not an operating point: of the odd kinds of points, those that occur."""
    handles = {"baseline": _handle(**BASELINE), "Pareto front": _handle(linestyle="-", **FRONT_LINE)}
    grey = {"marker": "o", "color": GREY, "markersize": 5.5, "markerfacecoloralt": "white"}
    if any(dot.invalid for dot in dots):
        handles["INVALID timing"] = _handle(**CROSS)
    if any(dot.broken for dot in dots):
        handles["fast and broken"] = _handle(**grey, markerfacecolor="white")
    if any(dot.uneven for dot in dots):
        handles["lengths differ"] = _handle(**grey, fillstyle="left")
    return handles


def _draw_panel(axes: Axes, dots: Sequence[_Dot]) -> None:
    from matplotlib.patches import Rectangle

    axes.axhline(100, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    corners = [(1.0, 100.0), *(dot.place for dot in dots if not dot.invalid)]
    line = sorted({corner for corner, on in zip(corners, front([(y, x) for x, y in corners]), strict=True) if on})
    axes.plot(*zip(*line, strict=True), zorder=2, **FRONT_LINE)
    axes.plot([1], [100], linestyle="none", zorder=5, **BASELINE)
    for dot in dots:
        kept, faster = dot.retention, dot.speedup
        corner, width, height = (faster.low, 100 * kept.low), faster.high - faster.low, 100 * (kept.high - kept.low)
        look = _look(dot.family, uneven=dot.uneven, broken=dot.broken)
        box = {"facecolor": look["color"], "alpha": 0.08, "edgecolor": look["color"], "linewidth": 0.5}
        axes.add_patch(Rectangle(corner, width, height, zorder=1.5, **box))
        x, y = dot.place
        axes.plot([x], [y], linestyle="none", zorder=3, **look)
        if dot.invalid:
            axes.plot([x], [y], linestyle="none", zorder=4, **CROSS)
    axes.set_xlabel("wall-clock speedup, S_time (x)")
    axes.set_ylabel("retention of quality (%)")
    axes.margins(0.08)


def _place_numbers(axes: Axes, dots: Sequence[_Dot]) -> None:
    """Put each number at the nearest spot where it covers no other number, no marker and no line to a number."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixels = figure.dpi / 72
    inside = axes.get_window_extent()
    middles = [tuple(axes.transData.transform(place)) for place in [(1.0, 100.0), *(dot.place for dot in dots)]]
    blocked = [_square(x, y, MARKER_ROOM * pixels) for x, y in middles]
    for dot, (x, y) in zip(dots, middles[1:], strict=True):
        half_w, half_h = (2.4 * len(str(dot.number)) + 0.8) * pixels, 3.8 * pixels
        spots = [(reach * cos(radians(a)), reach * sin(radians(a))) for reach in NUMBER_REACH for a in NUMBER_ANGLES]
        free = [
            spot
            for spot in spots
            if _free(_rectangle(x + spot[0] * pixels, y + spot[1] * pixels, half_w, half_h), blocked, inside)
        ]
        spot = free[0] if free else spots[0]
        middle_x, middle_y = x + spot[0] * pixels, y + spot[1] * pixels
        blocked.append(_rectangle(middle_x, middle_y, half_w, half_h))
        steps = [i / 6 for i in range(2, 5)]  # a number upon another's line would seem to be at its end
        blocked += [_square(x + s * (middle_x - x), y + s * (middle_y - y), pixels) for s in steps]
        axes.annotate(
            str(dot.number),
            dot.place,
            xytext=spot,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            fontweight="bold",
            color=COLOURS[dot.family % len(COLOURS)],
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 1},
        )


def _square(x: float, y: float, half: float) -> Any:
    return _rectangle(x, y, half, half)


def _rectangle(x: float, y: float, half_w: float, half_h: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox([[x - half_w, y - half_h], [x + half_w, y + half_h]])


def _free(box: Any, blocked: Sequence[Any], inside: Any) -> bool:
    held = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    return held and not any(box.overlaps(other) for other in blocked)
