"""Pictures over one setting at a time: block size, steps per block, threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from twotower_eval.evidence.naming import setting, short_name
from twotower_eval.evidence.nulls import is_invalid
from twotower_eval.evidence.pareto import BROKEN, is_fast_and_broken
from twotower_eval.evidence.points import PointKey
from twotower_eval.evidence.runs import Runs
from twotower_eval.records import DecoderSpec, Estimate
from twotower_eval.report.plots import COLOURS, GREY, MARKERS, png
from twotower_eval.report.section import Section
from twotower_eval.report.text import bullets, escape, retention, run_list, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"block_size": "block size (tokens)", "steps_per_block": "steps per block", "threshold": "confidence threshold"}


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
        lines = _lines(name, decoders)
        values = sorted({x for points in lines.values() for x, _ in points})
        if not measures or all(len(points) < 2 for points in lines.values()):
            parts.append(f"Over {label}: {_why_no_plot(values)}, so there is no plot.")
            continue
        file = f"over_{name}.png"
        draw = partial(_draw_sweep, label=label, lines=lines, measures=measures, logarithmic=name != "threshold")
        files[file] = png(draw, columns=len(measures))
        parts.append(f"![Over {label}]({file})")
    if files:
        run_ids = {point.run_id for point in runs.quality} | {i for point in runs.speed for i in point.run_ids}
        parts.append(
            f"Bars are 95 % intervals; lines join points that differ in nothing else. {_speed_setting(runs)}"
            f"Runs: {run_list(run_ids)}."
        )
    parts[:0] = [_collapsed(runs)] if files else []
    title = "Collapse: over block size, steps and threshold"
    return Section(title=title, markdown="\n\n".join(parts) + "\n", files=files)


def _collapsed(runs: Runs) -> str:
    """Which points are fast and broken, so that no speedup is read without its quality."""
    what = f"faster than the baseline by its estimate, surely less than {100 * BROKEN:g} % of its quality kept"
    found = []
    for key, cell in runs.points.items():
        quality, speed = runs.quality_at(key), runs.speed_at(key)
        kept, faster = quality and quality.headline.estimate, speed and speed.time.estimate
        if kept and faster and is_fast_and_broken(kept, faster):
            assert quality is not None
            assert speed is not None
            invalid = " (INVALID timing)" if is_invalid(speed.warnings) else ""
            figures = f"{times(speed.time)}{invalid} at {retention(quality.headline)} of the quality"
            found.append(f"{escape(runs.name(cell))}: {figures}")
    if not found:
        return f"No measured point is fast and broken: {what}."
    return f"**Fast and broken**: {what}.\n\n{bullets(found)}"


def _why_no_plot(values: Sequence[float]) -> str:
    if not values:
        return "no decoder that was measured has it"
    if len(values) == 1:
        return f"only {values[0]:g} was measured"
    return f"{', '.join(f'{value:g}' for value in values)} were measured, but never with the other settings kept"


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


def _draw_sweep(
    figure: Figure,
    *,
    label: str,
    lines: dict[str, list[tuple[float, PointKey]]],
    measures: list[_Measure],
    logarithmic: bool,
) -> None:
    ticks = sorted({x for points in lines.values() for x, _ in points})
    handles: dict[str, Any] = {}
    for i, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), i + 1)
        if measure.reference is not None:
            axes.axhline(measure.reference, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        for j, (name, points) in enumerate(lines.items()):
            # A little to the side of each other, so that no line hides another.
            aside = (j - (len(lines) - 1) / 2) / max(len(lines) - 1, 1)
            factor, offset = (2 ** (0.24 * aside), 0.0) if logarithmic else (1.0, 0.06 * aside * (ticks[-1] - ticks[0]))
            found = [(factor * x + offset, *measure.values[key]) for x, key in points if key in measure.values]
            if found:
                handles.setdefault(name, _draw_line(axes, found, j, measure.scale))
        if logarithmic:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.12)
        axes.set_xlabel(label)
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
