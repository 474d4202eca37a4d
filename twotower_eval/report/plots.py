"""The picture of quality against speed, and how all pictures here are made.

The same data give the same bytes: no pyplot, no dates, no settings of the user's. Colours are Okabe and Ito's, told
apart by every kind of colour vision; markers repeat what colours say.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twotower_eval.evidence.naming import setting
from twotower_eval.evidence.pareto import front
from twotower_eval.evidence.runs import Runs
from twotower_eval.evidence.timing import SpeedPoint
from twotower_eval.records import DecoderSpec
from twotower_eval.report.section import Section
from twotower_eval.report.text import run_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
Label = tuple[float, float, str]  # x, y, name

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#666666"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.dpi": 150,
}
LABEL_SPOTS = ((6, 4), (6, -10), (-6, 4), (-6, -10), (16, 14), (-16, 14), (16, -20), (-16, -20), (24, 26), (-24, -30))


def png(draw: Callable[[Figure], None], *, columns: int = 1, rows: int = 1, row_height: float | None = None) -> bytes:
    """A PNG of what ``draw`` puts on a figure with room for so many panels; no date and no version in it.

    ``row_height`` in inches is for panels that are flatter than usual.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        width, height = {1: (6.4, 4.6), 2: (10.4, 4.2)}.get(columns, (11.4, 4.0))
        figure = Figure(figsize=(width, (row_height or height) * rows), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def tradeoff(runs: Runs) -> Section:
    """Quality against speed: one panel for each workload and batch size, one box for each operating point."""
    title = "Quality against speed: the Pareto front"
    panels = _panels(runs)
    if not panels:
        text = "No operating point has both a retention and a speedup, so there is no plot: run both verbs on it.\n"
        return Section(title=title, markdown=text)
    columns = min(2, len(panels))
    draw = partial(_draw_tradeoff, runs=runs, panels=panels)
    picture = png(draw, columns=columns, rows=-(-len(panels) // columns))
    used = [point for panel in panels for point in panel]
    run_ids = {run_id for point in used for run_id in point.run_ids}
    run_ids |= {found.run_id for point in used if (found := runs.quality_at(point.key))}
    text = (
        "![Retention against speedup](tradeoff.png)\n\n"
        "Each point is named by block size / steps / threshold (left out where there is no room); its box spans both "
        "95 % intervals. Up and to the right is better; the baseline stands at 1x and 100 %. The line is the Pareto "
        "front: no other point measured, the baseline included, is both faster and better by its estimate. Hollow: "
        "answers differ in length by more than a tenth. "
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


def _draw_tradeoff(figure: Figure, runs: Runs, panels: list[list[SpeedPoint]]) -> None:
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    families = sorted({_family(point.candidate.decoder) for panel in panels for point in panel})
    named = []
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        named.append((axes, _draw_panel(axes, runs, panel, families)))
        axes.set_title(f"{panel[0].workload} workload, batch {panel[0].batch_size}", loc="left", fontsize=9)
    handles: dict[Any, Any] = {}
    for axes, _ in named:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    figure.draw_without_rendering()  # names are placed in pixels, so the layout must stand
    for axes, names in named:
        _place_labels(axes, names)


def _family(decoder: DecoderSpec) -> tuple[int, str]:
    """What shares a colour, in the order of the legend."""
    block = setting(decoder, "block_size")
    return (0, decoder.kind) if block is None else (int(block), f"block {block}")


def _draw_panel(axes: Axes, runs: Runs, panel: list[SpeedPoint], families: list[tuple[int, str]]) -> list[Label]:
    from matplotlib.patches import Rectangle

    axes.axhline(100, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.plot([1], [100], marker="*", markersize=11, color="black", linestyle="none", label="baseline", zorder=4)
    labels = []
    shown: set[Any] = set()
    for point in panel:
        quality = runs.quality_at(point.key)
        assert quality is not None
        kept, faster = quality.headline.estimate, point.time.estimate
        assert kept is not None
        assert faster is not None
        family = _family(point.candidate.decoder)
        index = families.index(family)
        colour = COLOURS[index % len(COLOURS)]
        corner, width, height = (faster.low, 100 * kept.low), faster.high - faster.low, 100 * (kept.high - kept.low)
        axes.add_patch(Rectangle(corner, width, height, facecolor=colour, alpha=0.13, edgecolor=colour, linewidth=0.6))
        uneven = point.length.estimate is not None and not 0.9 <= point.length.estimate.value <= 1.1
        axes.plot(
            [faster.value],
            [100 * kept.value],
            marker=MARKERS[index % len(MARKERS)],
            color=colour,
            markerfacecolor="white" if uneven else colour,
            linestyle="none",
            markersize=5,
            label=None if family in shown else family[1],
            zorder=3,
        )
        shown.add(family)
        labels.append((faster.value, 100 * kept.value, runs.name(point.candidate, short=True)))
    corners = [(1.0, 100.0), *((x, y) for x, y, _ in labels)]
    on_front = front([(y, x) for x, y in corners])
    line = sorted(corner for corner, on in zip(corners, on_front, strict=True) if on)
    axes.plot(*zip(*line, strict=True), color=GREY, linewidth=1, zorder=2, label="Pareto front")
    labels.sort(key=lambda label: label[:2] not in line)  # those on the front find a place for their names first
    axes.set_xlabel("speedup in wall-clock time, S_time (x)")
    axes.set_ylabel("retention of quality (%)")
    axes.margins(0.08)
    return labels


def _place_labels(axes: Axes, labels: list[Label]) -> None:
    """Put each name beside its point, at the first spot where it covers no other name and no point."""
    from matplotlib.text import Text

    taken: list[Any] = []
    inside = axes.get_window_extent()
    dots = [tuple(axes.transData.transform((x, y))) for x, y, _ in [(1.0, 100.0, ""), *labels]]
    for x, y, text in labels:
        for spot in LABEL_SPOTS:
            side = "left" if spot[0] > 0 else "right" if spot[0] < 0 else "center"
            far = abs(spot[0]) > 6 or abs(spot[1]) > 11
            note = axes.annotate(
                text,
                (x, y),
                xytext=spot,
                textcoords="offset points",
                ha=side,
                fontsize=7,
                parse_math=False,
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0} if far else None,
            )
            note.get_window_extent()  # moves the text to its spot; its own extent would hold the line as well
            box = Text.get_window_extent(note)
            covers = any(box.overlaps(other) for other in taken) or any(box.contains(*dot) for dot in dots)
            if not covers and inside.containsx(box.x0) and inside.containsx(box.x1):
                taken.append(box)
                break
            note.remove()  # a name without a free spot is left out: the tables have them all
