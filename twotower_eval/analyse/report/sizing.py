"""The section on sizing runs: what steps of a size cost, on random weights, and what a speedup would need of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.sizing import SizingPoint, SizingRun, is_sizing_run
from twotower_eval.analyse.report.plots import COLOURS, GREY, MARKERS, png
from twotower_eval.analyse.report.rendering import (
    Column,
    fixed,
    frame_of,
    interval,
    markdown,
    optional,
    raw_rows,
    whole,
    words,
)
from twotower_eval.analyse.report.text import (
    NONE,
    Section,
    bullets,
    code,
    count,
    escape,
    measured_columns,
    percent,
    ratio,
    seconds,
    times,
)
from twotower_eval.analyse.report.verdicts import claimed_speedup
from twotower_eval.errors import NoEstimate
from twotower_eval.records import GateLimits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Costs of a model's size, on random weights"
PARTS = {"prefill": "prefill", "ar_step": "AR step", "denoise": "denoise step", "context_pass": "context pass"}
NUM_RATES = 80
WARNING = (
    "**Random weights: these are costs of a model's size, not a measured speedup of any model.** Which tokens such a "
    "model would commit is not known; commits follow a given rate, and speedup is a curve over it. Random routers "
    "spread a block over more experts than trained ones, so experts were forced, three ways: `shared` (all tokens of "
    "a row's block take one set), `half` (half of the set in common), `independent` (each token its own). Where a "
    "trained model lies between them is not known: the curve is a band. Prefill, the same for both arms, is left out."
)


def sizing(runs: Runs) -> Section:
    """Costs, floors, break-even and the band of speedups, for every sizing run."""
    concerned = [run for run in runs if is_sizing_run(run)]
    if not concerned:
        text = "No run on random weights. `twotower-eval size CONFIG` measures a model's size.\n"
        return Section(title=TITLE, markdown=text)
    parts, files, frames = [WARNING], {}, []
    claim = claimed_speedup(runs)
    for number, run in enumerate(concerned, start=1):
        try:
            found = SizingRun(run, None if claim is None else claim.expected)
        except NoEstimate as error:
            parts.append(f"{escape(error)}.")
            continue
        name = f"sizing_{number}.png"
        columns = min(2, len(found.points))
        picture = partial(
            _draw, points=found.points, columns=columns, dots=not found.extrapolated, claimed=found.claimed
        )
        files[name] = png(picture, columns=columns, rows=-(-len(found.points) // columns))
        frames.append(SizingFrames(found))
        parts += _of_run(found, frames[-1], name)
    if claim is not None:
        parts.append(f"{claim.expected:g}x on these random weights: what claim {escape(claim.name)} says of its model.")
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    tables = {
        "sizing_steps": _joined(one.steps for one in frames),
        "sizing_needs": _joined(one.needs for one in frames),
        "sizing_blocks": _joined(one.blocks for one in frames),
    }
    return Section(title=TITLE, markdown=text, files=files, tables=tables)


def _joined(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Rows of all runs in one frame."""
    return frame_of(row for frame in frames for row in raw_rows(frame))


class SizingFrames:
    """The frames of one sizing run."""

    def __init__(self, found: SizingRun) -> None:
        self.steps = steps_frame(found)
        self.needs = needs_frame(found)
        self.blocks = blocks_frame(found)


def _of_run(found: SizingRun, frames: SizingFrames, picture: str) -> list[str]:
    run = found.run
    towers = "one set of weights for both towers" if found.card["shared_towers"] else "two towers"
    layers = f"{len(found.pattern)} of {len(found.full_pattern)} layers a tower"
    state = "" if run.complete else " **INCOMPLETE.**"
    head = (
        f"Run {code(run.manifest.run_id)}: {escape(found.card['config'])}, random weights, {layers}, {towers}, "
        f"{escape(run.manifest.plan['dtype'])}, contexts of {count(found.context_tokens)} tokens, "
        f"{len(found.rounds)} rounds.{state}"
    )
    whole = "extrapolated to all layers" if found.extrapolated else "measured"
    return [
        bullets(_in_short(found)),
        head,
        f"What each step costs (random weights; {whole}), beside the floor that probed bandwidth and arithmetic set.",
        _steps(frames.steps),
        f"What a speedup needs (random weights; {whole}). At x tokens per NFE a block of K takes K / x denoise steps "
        f"and one context pass against K AR steps; a rate above K cannot be had.",
        _needs(frames.needs, found.claimed),
        f"![Speedup over tokens per NFE, random weights]({picture})",
        f"Whole blocks with forced commits, on the {len(found.pattern)} layers that were built (random weights): "
        f"{'not in the picture, which is about all layers' if found.extrapolated else 'the dots in the picture'}. "
        "Residual: what the single steps, timed apart, predict over what was measured.",
        _blocks(frames.blocks),
        bullets(_remarks(found)),
    ]


def _in_short(found: SizingRun) -> Iterator[str]:
    """What a speedup takes at each batch and block size, from the cheapest forced routing to the dearest."""
    for point in found.points if len(found.rounds) > 1 else ():
        even = " / ".join(_rounded(curve.break_even) for curve in point.curves)
        needed = " / ".join(_rounded(curve.needed) for curve in point.curves if curve.needed)
        claimed = f", {found.claimed:g}x at {needed}" if found.claimed else ""
        routings = " / ".join(curve.routing for curve in point.curves)
        yield (
            f"**Batch {count(point.batch_size)}, blocks of {count(point.block_size)}: break-even at {even} tokens per "
            f"NFE{claimed}** ({routings} experts; costs on random weights)" + _mark(found.nulls[point.batch_size])
        )


def _rounded(rate: Measured) -> str:
    return "no rate" if rate.estimate is None else f"{rate.estimate.value:.1f}"


def steps_frame(found: SizingRun) -> pd.DataFrame:
    """One row for each step: its seconds beside the floor that probed bandwidth and arithmetic set."""
    return frame_of(
        {
            "run": found.run.manifest.run_id,
            "step": step.part,
            "batch_size": step.batch_size,
            "block_size": step.block_size,
            "experts_forced": step.routing,
            "extrapolated": step.extrapolated,
            "num_experts_touched": step.num_experts_touched,
            **measured_columns("time_s", step.seconds),
            "floor_s": step.floor_s,
            "times_floor": value.value / step.floor_s if (value := step.seconds.estimate) and step.floor_s else None,
        }
        for step in found.steps
    )


def _steps(frame: pd.DataFrame) -> str:
    columns = [
        Column(header="step", show=lambda row: PARTS[row["step"]]),
        Column(header="batch", show=whole("batch_size")),
        Column(header="block", show=whole("block_size")),
        Column(header="experts forced", show=lambda row: str(row["experts_forced"])),
        Column(header="distinct experts per layer", show=fixed("num_experts_touched", 1)),
        Column(header="time [95 %]", show=interval("time_s", _time)),
        Column(header="floor", show=optional("floor_s", seconds)),
        Column(header="x floor", show=fixed("times_floor", 1)),
    ]
    return markdown(frame, columns)


def _time(value: Measured) -> str:
    found = value.estimate
    if found is None:
        return NONE
    return f"{seconds(found.value)} [{seconds(found.low)}, {seconds(found.high)}]"


def needs_frame(found: SizingRun) -> pd.DataFrame:
    """One row for each curve of speedup over tokens per NFE: its break-even, and what the claimed speedup needs."""
    return frame_of(
        {
            "run": found.run.manifest.run_id,
            "batch_size": point.batch_size,
            "block_size": point.block_size,
            "experts_forced": curve.routing,
            **measured_columns("break_even_tokens_per_nfe", curve.break_even),
            "claimed_speedup": found.claimed,
            **measured_columns("needed_tokens_per_nfe", curve.needed or Measured(estimate=None)),
            "largest_speedup": curve.speedup(point.block_size),
        }
        for point in found.points
        for curve in point.curves
    )


def _needs(frame: pd.DataFrame, claimed: float | None) -> str:
    needed = [] if claimed is None else [(f"{claimed:g}x needs, tokens per NFE [95 %]", "needed_tokens_per_nfe")]
    rates = [("break-even, tokens per NFE [95 %]", "break_even_tokens_per_nfe"), *needed]
    columns = [
        Column(header="batch", show=whole("batch_size")),
        Column(header="block", show=whole("block_size")),
        Column(header="experts forced", show=lambda row: str(row["experts_forced"])),
        *(Column(header=header, show=interval(name, _rate)) for header, name in rates),
        Column(header="most that the block allows", show=fixed("largest_speedup", 2, "x")),
    ]
    return markdown(frame, columns)


def _rate(value: Measured) -> str:
    return escape(value.reason) if value.estimate is None else ratio(value)


def blocks_frame(found: SizingRun) -> pd.DataFrame:
    """One row for each kind of whole block that was decoded at a forced rate."""
    return frame_of(
        {
            "run": found.run.manifest.run_id,
            "batch_size": point.batch_size,
            "block_size": point.block_size,
            "commits_follow": block.profile,
            "experts_forced": block.routing,
            "tokens_per_nfe": block.tokens_per_nfe,
            **measured_columns("speedup", block.speedup),
            "predicted_speedup": block.predicted,
            "residual": block.residual,
        }
        for point in found.points
        for block in point.blocks
    )


def _blocks(frame: pd.DataFrame) -> str:
    columns = [
        Column(header="batch", show=whole("batch_size")),
        Column(header="block", show=whole("block_size")),
        Column(header="commits follow", show=words("commits_follow")),
        Column(header="experts forced", show=lambda row: str(row["experts_forced"])),
        Column(header="tokens per NFE", show=fixed("tokens_per_nfe", 2)),
        Column(header="speedup [95 %]", show=interval("speedup", times)),
        Column(header="residual", show=optional("residual", _residual)),
    ]
    return markdown(frame, columns)


def _residual(residual: float) -> str:
    return percent(residual) + (" unexplained" if abs(residual) > 0.1 else "")


def _remarks(found: SizingRun) -> Iterator[str]:
    for batch_size, null in found.nulls.items():
        yield f"A/A null, the AR step over itself, batch {batch_size}: {times(null)} (99 %), {_of_null(null)}"
    devices = len(found.run.manifest.plan["devices"])
    if devices > 1:
        yield f"the candidate has {devices} devices where the baseline needs one: per device it is 1/{devices} of this"
    if found.extrapolated:
        yield from _fit_remarks(found)
    reasons = {step.seconds.reason for step in found.steps if step.seconds.reason}
    yield from (f"{NONE}: {escape(reason)}" for reason in sorted(reasons))
    yield "rows of a batch commit in step; rows of a real batch differ, and then a batch waits for its slowest row"


def _mark(null: Measured) -> str:
    """A mark behind a finding whose A/A null is missing or off."""
    if null.estimate is None:
        return " (without an A/A null)"
    return " **INVALID**: see the A/A null" if stats.is_off(null.estimate) else ""


def _of_null(null: Measured) -> str:
    """How far the A/A null of the AR step lets the other times be trusted."""
    limits = GateLimits()
    if null.estimate is None:
        return "so nothing says how far the machine was quiet"
    if stats.is_off(null.estimate):
        return (
            f"**INVALID**: off by more than {percent(limits.null_offset)}, so the machine was not quiet: time it again"
        )
    if (half := stats.half_width(null.estimate)) > limits.null_half_width:
        return f"which should be 1 and is known to +-{percent(half)} only: smaller differences are not shown here"
    return "it holds 1"


def _fit_remarks(found: SizingRun) -> Iterator[str]:
    """How far the layer costs behind an extrapolation can be trusted."""
    worst: dict[str, float] = {}
    for step in found.steps:
        item = (step.part, 0, step.batch_size, step.block_size, step.routing, None)
        for pattern, error in found.fit_residuals(item).items():
            worst[pattern] = max(worst.get(pattern, 0.0), abs(error))
    share = len(found.full_pattern) / len(found.pattern)
    yield (
        f"extrapolated {share:.1f}-fold, from a cost outside the layers and one for each kind of layer, fitted to "
        f"{len(worst) - (found.held_out is not None)} parts of the layers that were built (nonnegative least squares)"
    )
    for pattern, error in worst.items():
        held = ", which the fit did not see" if pattern == found.held_out else ""
        layers = f"layers {code(pattern)}" if pattern else "no layers at all"
        yield f"largest residual of a step on {layers}{held}: {percent(error)}"


def _draw(figure: Figure, points: Sequence[SizingPoint], columns: int, dots: bool, claimed: float | None) -> None:
    rows = -(-len(points) // columns)
    handles: dict[str, Any] = {}
    for index, point in enumerate(points):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_band(axes, point, dots, claimed)
        axes.set_title(f"random weights, batch {point.batch_size}, block {point.block_size}", loc="left", fontsize=9)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)


def _draw_band(axes: Axes, point: SizingPoint, dots: bool, claimed: float | None) -> None:
    """Three curves and the area between the outer ones; ``dots`` are whole blocks as measured."""
    rates_X = np.minimum(np.geomspace(1, point.block_size, NUM_RATES), point.block_size)
    curves = {curve.routing: [curve.speedup(float(rate)) for rate in rates_X] for curve in point.curves}
    axes.fill_between(rates_X, curves["independent"], curves["shared"], color=COLOURS[0], alpha=0.13, linewidth=0)
    for index, (routing, speedups_X) in enumerate(curves.items()):
        axes.plot(rates_X, speedups_X, color=COLOURS[index], linewidth=1.3, label=f"{routing} experts")
        for block in point.blocks if dots else ():
            if block.routing == routing and block.speedup.estimate is not None:
                at = ([block.tokens_per_nfe], [block.speedup.estimate.value])
                axes.plot(*at, color=COLOURS[index], marker=MARKERS[index], markersize=4, linestyle="none")
    for height, label in ((1.0, "break-even"), *([] if claimed is None else [(claimed, f"{claimed:g}x")])):
        axes.axhline(height, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        axes.annotate(label, (1, height), xytext=(2, 2), textcoords="offset points", fontsize=7, color=GREY)
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(int(np.log2(point.block_size)) + 1)]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens per NFE")
    axes.set_ylabel("speedup over AR (x)")
