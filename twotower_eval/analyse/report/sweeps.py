"""Pictures over one setting at a time: block size, steps per block, threshold, and any other number that varies."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from twotower_eval.analyse.compare.points import number, unusual
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.tradeoff import (
    BROKEN,
    Curve,
    MeasuredOn,
    PointFigure,
    Series,
    curves,
    families,
    family_key,
    is_fast_and_broken,
    is_swept,
    scored_on,
    series,
    timed_on,
)
from twotower_eval.analyse.report.plots import COLOURS, CROSS, GREY, MARKERS, handle, legend_columns, png
from twotower_eval.analyse.report.rendering import Column, fixed, frame_of, ids, markdown, whole, words
from twotower_eval.analyse.report.text import (
    Section,
    bullets,
    count_columns,
    details,
    escape,
    measured_on_words,
    operating_point,
    retention,
    run_list,
    times,
)
from twotower_eval.records import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AUP_WORDS = (
    "The area under accuracy (percent) over useful tokens per forward, over thresholds and steps of one decoder: "
    "rho_1 y_1, then trapezoids of y W with W = min(1, exp(-3 (1 - y / y_max))), y_max the best accuracy on the task, "
    "the baseline included. Points more than 5 points below the first are left out (here counted by NFE). "
    "Numbers by different counts of forwards are not to be compared."
)
AXES: Mapping[str, str] = {
    "block_size": "block size (tokens)",
    "steps_per_block": "steps per block",
    "threshold": "confidence threshold",
}

LOGARITHMIC = ("block_size", "steps_per_block")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One panel of a sweep: every figure of one kind that there is of any operating point."""

    label: str
    reference: float
    scale: float
    figures: tuple[PointFigure, ...]

    def series(self, name: str) -> dict[str, tuple[Series, ...]]:
        """By family, what is drawn over the setting ``name``."""
        labels = families(name, [figure.candidate for figure in self.figures])
        members: dict[str, list[PointFigure]] = {key: [] for key in labels}
        for figure in self.figures:
            if number(figure.candidate.decoder, name) is not None:
                members[family_key(name, figure.candidate)].append(figure)
        return {key: series(name, labels[key], own) for key, own in members.items()}


def sweeps(runs: Runs) -> Section:
    """Retention, speedup and tokens per NFE over each setting that is a number, one picture each."""
    parts, files = [], {}
    found = [measure for measure in measures(runs) if measure.figures]
    cells = [figure.candidate for measure in found for figure in measure.figures]
    crossed = False
    axes = _axes(cells)
    for name, label in axes.items():
        labels, values = families(name, cells), _values(name, cells)
        if not any(len(own) > 1 for own in values.values()):
            parts.append(f"Over {label}: {_why_no_plot(sorted(set().union(*values.values())))}, so there is no plot.")
            continue
        file = f"over_{name}.png"
        draw = partial(_draw_sweep, name=name, label=label, labels=labels, measures=found)
        files[file] = png(draw, columns=len(found))
        parts.append(f"![Over {label}]({file})")
        crossed |= any(one.crossed for measure in found for own in measure.series(name).values() for one in own)
    if files:
        run_ids = {point.run_id for point in runs.quality} | {i for point in runs.speed for i in point.run_ids}
        parts.append(
            "Bars are 95 % intervals. A line joins points that differ in nothing else and were measured on the same "
            "documents, tasks and kind of outputs in one run; others stand alone. What each was measured on stands "
            f"above the panels.{' Points whose timing is INVALID are crossed.' if crossed else ''} "
            f"Runs: {run_list(run_ids)}."
        )
    parts[:0] = [_collapsed(runs)] if files else []
    frame = parallelism_frame(runs)
    parts += [_parallelism(frame)] if files else []
    text = "\n\n".join(parts) + "\n"
    return Section(title=f"Collapse: over {_listed(axes)}", markdown=text, files=files, tables={"aup": frame})


def _axes(cells: Sequence[Cell]) -> Mapping[str, str]:
    """What there is to draw over: every other number that a decoder has and that varies, behind the usual three; these
    are left out where there are others and no decoder has one of them."""
    names = dict.fromkeys(name for cell in cells for name in cell.decoder.params if name not in AXES)
    varying = [name for name in names if any(len(own) > 1 for own in _values(name, cells).values())]
    usual = AXES if not varying or any(_values(name, cells) for name in AXES) else {}
    return {**usual, **{name: name.replace("_", " ") for name in varying}}


def _listed(axes: Mapping[str, str]) -> str:
    """``block size, steps and threshold``"""
    words = {"block_size": "block size", "steps_per_block": "steps", "threshold": "threshold"}
    *first, last = [words.get(name, label) for name, label in axes.items()]
    return " and ".join([", ".join(first), last] if first else [last])


def parallelism_frame(runs: Runs) -> pd.DataFrame:
    """One row for each point of each curve of accuracy over parallelism, with the areas under the curve."""
    return frame_of(
        {
            "run": curve.run_id,
            **operating_point(point.candidate),
            "task": curve.task,
            "metric": curve.metric,
            "accuracy_percent": point.accuracy,
            "best_accuracy_percent": curve.best,
            **count_columns("candidate", point.counts),
            "aup_by_nfe": curve.aup,
            "aup_by_nfe_and_commit": curve.aup_with_commits,
            "aup_by_all_forwards": curve.aup_with_all,
            "curve": number,
            "decoder_of_curve": _curve_name(curve),
            "num_points": len(curve.points),
            "num_left_out": curve.num_left_out,
        }
        for number, curve in enumerate(curves(runs, runs.quality), start=1)
        for point in curve.points
    )


def _parallelism(frame: pd.DataFrame) -> str:
    """Accuracy under parallelism of every curve; empty without any."""
    if frame.empty:
        return ""
    columns = [
        Column(header="task", show=words("task")),
        Column(header="decoder", show=words("decoder_of_curve")),
        Column(header="points", show=whole("num_points")),
        Column(header="left out", show=whole("num_left_out")),
        Column(header="AUP by NFE", show=fixed("aup_by_nfe", 1)),
        Column(header="with commits", show=fixed("aup_by_nfe_and_commit", 1)),
        Column(header="with prefill and all else", show=fixed("aup_by_all_forwards", 1)),
        Column(header="run", show=ids("run")),
    ]
    body = markdown(frame.drop_duplicates("curve"), columns, left=2)
    return details("Accuracy under parallelism (AUP)", f"{AUP_WORDS}\n\n{body}")


def _curve_name(curve: Curve) -> str:
    """The decoder, with what its points share."""
    decoder = curve.points[0].candidate.decoder
    size = number(decoder, "block_size")
    block = [f"block {size:g}"] if size is not None else []
    if not decoder.is_plug_in:
        return ", ".join([decoder.kind.replace("_", " "), *block])
    kind, *shared = unusual(decoder, without=[name for name in decoder.params if is_swept(decoder, name)])
    return ", ".join([kind, *block, *shared])


def _values(name: str, cells: Sequence[Cell]) -> dict[str, set[float]]:
    """By family, the values of a setting that were measured."""
    found: dict[str, set[float]] = {}
    for cell in cells:
        if (value := number(cell.decoder, name)) is not None:
            found.setdefault(family_key(name, cell), set()).add(value)
    return found


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
            invalid = " (INVALID)" if speed.invalid else ""
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


def measures(runs: Runs) -> Iterator[Measure]:
    """Retention, speedup and tokens per NFE, wherever they were measured."""
    kept, faster, parallel = [], [], []
    for speed in runs.speed:
        cell, on = speed.candidate, timed_on(speed)
        if (found := speed.time.estimate) is not None:
            figure = PointFigure(candidate=cell, on=on, value=found.value, estimate=found, invalid=speed.invalid)
            faster.append(figure)
        if (rate := speed.counts.tokens_per_nfe) is not None:
            parallel.append(PointFigure(candidate=cell, on=on, value=rate))
    for quality in runs.quality:
        cell, on = quality.candidate, scored_on(quality)
        if (found := quality.headline.estimate) is not None:
            kept.append(PointFigure(candidate=cell, on=on, value=found.value, estimate=found))
        if not quality.timed and (rate := quality.counts.tokens_per_nfe) is not None:
            parallel.append(PointFigure(candidate=cell, on=on, value=rate))
    yield Measure(label="retention of quality (%)", reference=100, scale=100, figures=tuple(kept))
    yield Measure(label="speedup in wall-clock time, S_time (x)", reference=1, scale=1, figures=tuple(faster))
    yield Measure(label="useful tokens per NFE", reference=1, scale=1, figures=tuple(parallel))


def _draw_sweep(
    figure: Figure, *, name: str, label: str, labels: Mapping[str, str], measures: Sequence[Measure]
) -> None:
    """One panel a measure. A family keeps its colour and marker; fill and stroke say what was measured on what."""
    handles = {words: handle(**_look(j)) for j, words in enumerate(labels.values())}
    order = {key: j for j, key in enumerate(labels)}
    for i, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), i + 1)
        axes.axhline(measure.reference, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        drawn = measure.series(name)
        grounds = sorted({one.on for own in drawn.values() for one in own}, key=lambda on: (on.wanted, on.run_ids))
        ticks = sorted({x for own in drawn.values() for one in own for x, _ in one.figures})
        for key, own in drawn.items():
            # A little to the side of each other, so that no line hides another.
            aside = (order[key] - (len(order) - 1) / 2) / max(len(order) - 1, 1)
            for one in own:
                look = _look(order[key], ground=grounds.index(one.on), joined=one.joined)
                _draw_series(axes, one, measure.scale, _moved(name, aside, ticks), look)
        if any(one.crossed for own in drawn.values() for one in own):
            handles["INVALID"] = handle(**CROSS)
        joined = {one.on for own in drawn.values() for one in own if one.joined}
        _dress(axes, name, label, measure.label, ticks)
        _name_grounds(axes, grounds, joined)
    columns = legend_columns(handles, 3 if len(measures) > 1 else 1, panels=len(measures))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def _moved(name: str, aside: float, ticks: Sequence[float]) -> Callable[[float], float]:
    """Where a value is drawn, a little aside: by a factor on the logarithmic axes, else by a distance."""
    if name not in LOGARITHMIC:
        return lambda x: x + 0.06 * aside * (ticks[-1] - ticks[0])
    return lambda x: x * 2 ** (0.24 * aside)


def _dress(axes: Axes, name: str, label: str, what: str, ticks: Sequence[float]) -> None:
    """The axes' names and ticks."""
    if name in LOGARITHMIC:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    axes.set_ylabel(what)


def _name_grounds(axes: Axes, grounds: Sequence[MeasuredOn], joined: Collection[MeasuredOn]) -> None:
    """Above a panel, what its figures were measured on; with the runs where two would say the same."""
    alike = Counter(dataclasses.replace(on, run_ids=(), same="") for on in grounds)
    shown = []
    for on in grounds:
        several = alike[dataclasses.replace(on, run_ids=(), same="")] > 1
        shown.append(measured_on_words(on) + (f" ({', '.join(on.run_ids)})" if several else ""))
    keys = [handle(**_look(None, ground=i, joined=on in joined)) for i, on in enumerate(grounds)]
    axes.legend(keys, shown, loc="lower left", bbox_to_anchor=(0, 1), fontsize=7, borderaxespad=0.2, handlelength=2.6)


def _look(family: int | None, *, ground: int = 0, joined: bool = False) -> dict[str, Any]:
    """How a series is drawn: colour and marker of its family, fill and stroke of what it was measured on."""
    colour = GREY if family is None else COLOURS[family % len(COLOURS)]
    return {
        "color": colour,
        "marker": "o" if family is None else MARKERS[(family + family // len(COLOURS)) % len(MARKERS)],
        "markerfacecolor": "white" if ground % 2 else colour,
        "markeredgecolor": colour,
        "linestyle": ("-", "--", ":", "-.")[ground % 4] if joined else "none",
        "markersize": 5,
        "linewidth": 1.3,
    }


def _draw_series(axes: Axes, one: Series, scale: float, moved: Callable[[float], float], look: dict[str, Any]) -> None:
    x_values = [moved(x) for x, _ in one.figures]
    y_values = [scale * figure.value for _, figure in one.figures]
    spans = [(f.value, f.value) if f.estimate is None else (f.estimate.low, f.estimate.high) for _, f in one.figures]
    reach = [
        [scale * (f.value - low), scale * (high - f.value)]
        for (low, high), (_, f) in zip(spans, one.figures, strict=True)
    ]
    axes.errorbar(x_values, y_values, yerr=list(zip(*reach, strict=True)), elinewidth=0.9, capsize=2.5, **look)
    for x, y, (_, figure) in zip(x_values, y_values, one.figures, strict=True):
        if figure.invalid:
            axes.plot([x], [y], linestyle="none", zorder=4, **CROSS)
