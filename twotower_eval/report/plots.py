"""Sections that are pictures. The same data give the same bytes: no pyplot, no dates, no settings of the user's.

Colours are Okabe and Ito's, told apart by every kind of colour vision; markers repeat what colours say.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from twotower_eval.records import DecoderSpec, Estimate
from twotower_eval.report.quality import PointKey
from twotower_eval.report.runs import Runs, Section, setting, short_name
from twotower_eval.report.text import run_list
from twotower_eval.report.timing import SpeedPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
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
AXES = {"block_size": "block size (tokens)", "steps_per_block": "steps per block", "threshold": "confidence threshold"}
LABEL_SPOTS = ((6, 5), (6, -11), (-6, 5), (-6, -11), (0, 10), (0, -16), (14, 14), (-14, 14), (14, -20), (-14, -20))


def _png(draw: Callable[[Figure], None], *, columns: int = 1, rows: int = 1) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        width, height = {1: (6.4, 4.6), 2: (10.4, 4.2)}.get(columns, (11.4, 4.0))
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def tradeoff(runs: Runs) -> Section:
    """Quality against speed: one panel for each workload and batch size, one box for each operating point."""
    title = "Quality against speed"
    panels = _panels(runs)
    if not panels:
        text = "No operating point has both a retention and a speedup, so there is no plot: run both verbs on it.\n"
        return Section(title=title, markdown=text)
    columns = min(2, len(panels))
    draw = partial(_draw_tradeoff, runs=runs, panels=panels)
    picture = _png(draw, columns=columns, rows=-(-len(panels) // columns))
    used = [point for panel in panels for point in panel]
    run_ids = {run_id for point in used for run_id in point.run_ids}
    run_ids |= {found.run_id for point in used if (found := runs.quality_at(point.key))}
    text = (
        "![Retention against speedup](tradeoff.png)\n\n"
        "Each point is named by block size / steps / threshold; its box spans both 95 % intervals. Up and to the right "
        f"is better; the baseline stands at 1x and 100 %. Hollow: answers differ in length by more than a tenth. "
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
    blocks = sorted({setting(point.candidate.decoder, "block_size") or 0 for panel in panels for point in panel})
    named = []
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        named.append((axes, _draw_panel(axes, runs, panel, blocks)))
        axes.set_title(f"{panel[0].workload} workload, batch {panel[0].batch_size}", loc="left", fontsize=9)
    figure.draw_without_rendering()  # names are placed in pixels, so the layout must stand
    for axes, names in named:
        _place_labels(axes, names)


def _draw_panel(axes: Axes, runs: Runs, panel: list[SpeedPoint], blocks: list[Any]) -> list[tuple[float, float, str]]:
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
        block = setting(point.candidate.decoder, "block_size") or 0
        colour = COLOURS[blocks.index(block) % len(COLOURS)]
        corner, width, height = (faster.low, 100 * kept.low), faster.high - faster.low, 100 * (kept.high - kept.low)
        axes.add_patch(Rectangle(corner, width, height, facecolor=colour, alpha=0.13, edgecolor=colour, linewidth=0.6))
        uneven = point.length.estimate is not None and not 0.9 <= point.length.estimate.value <= 1.1
        axes.plot(
            [faster.value],
            [100 * kept.value],
            marker=MARKERS[blocks.index(block) % len(MARKERS)],
            color=colour,
            markerfacecolor="white" if uneven else colour,
            linestyle="none",
            markersize=5,
            label=None if block in shown else f"block {block}",
            zorder=3,
        )
        shown.add(block)
        labels.append((faster.value, 100 * kept.value, runs.name(point.candidate, short=True)))
    axes.set_xlabel("speedup in wall-clock time, S_time (x)")
    axes.set_ylabel("retention of quality (%)")
    axes.margins(0.08)
    axes.legend(loc="best", fontsize=8)
    return labels


def _place_labels(axes: Axes, labels: list[tuple[float, float, str]]) -> None:
    """Put each name beside its point, at the first spot where it covers no other name and no point."""
    taken: list[Any] = []
    dots = [tuple(axes.transData.transform((x, y))) for x, y, _ in labels]
    for x, y, text in labels:
        for spot in LABEL_SPOTS:
            side = "left" if spot[0] > 0 else "right" if spot[0] < 0 else "center"
            note = axes.annotate(text, (x, y), xytext=spot, textcoords="offset points", ha=side, fontsize=7)
            box = note.get_window_extent()
            clear = not any(box.overlaps(other) for other in taken)
            if clear and not any(box.x0 <= dx <= box.x1 and box.y0 <= dy <= box.y1 for dx, dy in dots):
                taken.append(box)
                break
            note.remove()  # a name without a free spot is left out: the tables have them all


# --- sweeps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """One panel of a sweep: a value for each operating point."""

    label: str
    reference: float | None
    scale: float
    values: dict[PointKey, tuple[float, Estimate | None]]


def sweeps(runs: Runs) -> Section:
    """Retention, speedup and tokens per NFE over block size, step count and threshold, one picture each."""
    parts, files = [], {}
    decoders = {key: cell.decoder for key, cell in runs.points.items() if "block_size" in cell.decoder.params}
    measures = [measure for measure in _measures(runs) if measure.values]
    for name, label in AXES.items():
        values = sorted({value for decoder in decoders.values() if (value := setting(decoder, name)) is not None})
        if len(values) < 2 or not measures:
            held = f"only {values[0]:g} was measured" if values else "no decoder that was measured has it"
            parts.append(f"Over {label}: {held}, so there is no plot.")
            continue
        file = f"over_{name}.png"
        draw = partial(_draw_sweep, name=name, decoders=decoders, measures=measures)
        files[file] = _png(draw, columns=len(measures))
        parts.append(f"![Over {label}]({file})")
    if files:
        run_ids = {point.run_id for point in runs.quality} | {i for point in runs.speed for i in point.run_ids}
        parts.append(
            f"Bars are 95 % intervals; lines join points that differ in nothing else. {_speed_setting(runs)}"
            f"Runs: {run_list(run_ids)}."
        )
    return Section(title="Over block size, steps and threshold", markdown="\n\n".join(parts) + "\n", files=files)


def _speed_setting(runs: Runs) -> str:
    used = {(p.workload, p.batch_size) for key in runs.points if (p := runs.speed_at(key))}
    return "".join(f"Speedups on the {workload} workload at batch {batch}. " for workload, batch in sorted(used))


def _measures(runs: Runs) -> Iterator[_Measure]:
    kept: dict[PointKey, tuple[float, Estimate | None]] = {}
    faster: dict[PointKey, tuple[float, Estimate | None]] = {}
    parallel: dict[PointKey, tuple[float, Estimate | None]] = {}
    for key in runs.points:
        quality, speed = runs.quality_at(key), runs.speed_at(key)
        if quality and quality.headline.estimate:
            kept[key] = (quality.headline.estimate.value, quality.headline.estimate)
        if speed and speed.time.estimate:
            faster[key] = (speed.time.estimate.value, speed.time.estimate)
        counted = [point.counts.tokens_per_nfe for point in (speed, quality) if point]
        if per_nfe := next((value for value in counted if value is not None), None):
            parallel[key] = (per_nfe, None)
    yield _Measure(label="retention of quality (%)", reference=100, scale=100, values=kept)
    yield _Measure(label="speedup in wall-clock time, S_time (x)", reference=1, scale=1, values=faster)
    yield _Measure(label="useful tokens per NFE", reference=1, scale=1, values=parallel)


def _lines(name: str, decoders: dict[PointKey, DecoderSpec]) -> dict[str, list[tuple[float, PointKey]]]:
    """Points by what they share apart from ``name``; steps equal to the block size count as following it."""
    lines: dict[str, list[tuple[float, PointKey]]] = {}
    for key, decoder in decoders.items():
        value = setting(decoder, name)
        if value is None:
            continue
        parts = []
        if name != "block_size":
            parts.append(f"block {setting(decoder, 'block_size')}")
        if name != "steps_per_block":
            steps = setting(decoder, "steps_per_block")
            parts.append("steps = block" if steps == setting(decoder, "block_size") else f"{steps} steps")
        if name != "threshold" and "threshold" in decoder.params:
            parts.append(f"threshold {decoder.params['threshold']:g}")
        rest = short_name(decoder).partition(", ")[2]
        lines.setdefault(", ".join([*parts, rest] if rest else parts), []).append((float(value), key))
    return {label: sorted(points) for label, points in lines.items()}


def _draw_sweep(figure: Figure, *, name: str, decoders: dict[PointKey, DecoderSpec], measures: list[_Measure]) -> None:
    lines = _lines(name, decoders)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    handles: dict[str, Any] = {}
    for i, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), i + 1)
        if measure.reference is not None:
            axes.axhline(measure.reference, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        for j, (label, points) in enumerate(lines.items()):
            found = [(x, *measure.values[key]) for x, key in points if key in measure.values]
            if found:
                handles.setdefault(label, _draw_line(axes, found, j, measure.scale))
        if name != "threshold":
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.12)
        axes.set_xlabel(AXES[name])
        axes.set_ylabel(measure.label)
    columns = 3 if len(measures) > 1 else 1
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def _draw_line(axes: Axes, found: list[tuple[float, float, Estimate | None]], index: int, scale: float) -> Any:
    x_values = [x for x, _, _ in found]
    y_values = [scale * y for _, y, _ in found]
    reach = [(scale * (y - e.low), scale * (e.high - y)) if e else (0.0, 0.0) for _, y, e in found]
    return axes.errorbar(
        x_values,
        y_values,
        yerr=[[low for low, _ in reach], [high for _, high in reach]],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=("-", "--", ":")[index // len(COLOURS) % 3],
        markersize=5,
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2.5,
    )
