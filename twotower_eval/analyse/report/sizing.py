"""The section on sizing runs: what steps of a size cost, on random weights, and what a speedup would need of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.sizing import SizingPoint, SizingRun, StepCost, is_sizing_run
from twotower_eval.analyse.report.plots import COLOURS, GREY, MARKERS, png
from twotower_eval.analyse.report.text import (
    NONE,
    Section,
    bullets,
    code,
    count,
    escape,
    percent,
    ratio,
    seconds,
    table,
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
    parts, files = [WARNING], {}
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
        parts += _of_run(found, name)
    if claim is not None:
        parts.append(f"{claim.expected:g}x on these random weights: what claim {escape(claim.name)} says of its model.")
    return Section(title=TITLE, markdown="\n\n".join(part.strip() for part in parts) + "\n", files=files)


def _of_run(found: SizingRun, picture: str) -> list[str]:
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
        _steps(found.steps),
        f"What a speedup needs (random weights; {whole}). At x tokens per NFE a block of K takes K / x denoise steps "
        f"and one context pass against K AR steps; a rate above K cannot be had.",
        _needs(found),
        f"![Speedup over tokens per NFE, random weights]({picture})",
        f"Whole blocks with forced commits, on the {len(found.pattern)} layers that were built (random weights): "
        f"{'not in the picture, which is about all layers' if found.extrapolated else 'the dots in the picture'}. "
        "Residual: what the single steps, timed apart, predict over what was measured.",
        _blocks(found),
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


def _steps(steps: Sequence[StepCost]) -> str:
    header = [
        "step",
        "batch",
        "block",
        "experts forced",
        "distinct experts per layer",
        "time [95 %]",
        "floor",
        "x floor",
    ]
    rows = []
    for step in steps:
        value = step.seconds.estimate
        ratio = value.value / step.floor_s if value and step.floor_s else None
        rows.append(
            [
                PARTS[step.part],
                count(step.batch_size),
                NONE if step.block_size is None else count(step.block_size),
                step.routing,
                NONE if step.num_experts_touched is None else f"{step.num_experts_touched:.1f}",
                _time(step.seconds),
                NONE if step.floor_s is None else seconds(step.floor_s),
                NONE if ratio is None else f"{ratio:.1f}",
            ]
        )
    return table(header, rows)


def _time(value: Measured) -> str:
    found = value.estimate
    if found is None:
        return NONE
    return f"{seconds(found.value)} [{seconds(found.low)}, {seconds(found.high)}]"


def _needs(found: SizingRun) -> str:
    header = ["batch", "block", "experts forced", "break-even, tokens per NFE [95 %]"]
    header += [] if found.claimed is None else [f"{found.claimed:g}x needs, tokens per NFE [95 %]"]
    header.append("most that the block allows")
    rows = []
    for point in found.points:
        for curve in point.curves:
            most = curve.speedup(point.block_size)
            needs = [_rate(value) for value in (curve.break_even, curve.needed) if value]
            rows.append([count(point.batch_size), count(point.block_size), curve.routing, *needs, f"{most:.2f}x"])
    return table(header, rows)


def _rate(value: Measured) -> str:
    return escape(value.reason) if value.estimate is None else ratio(value)


def _blocks(found: SizingRun) -> str:
    header = ["batch", "block", "commits follow", "experts forced", "tokens per NFE", "speedup [95 %]", "residual"]
    rows = []
    for point in found.points:
        for block in point.blocks:
            residual = block.residual
            words = NONE if residual is None else percent(residual)
            if residual is not None and abs(residual) > 0.1:
                words += " unexplained"
            sizes = [count(point.batch_size), count(point.block_size)]
            rate = f"{block.tokens_per_nfe:.2f}"
            rows.append([*sizes, escape(block.profile), block.routing, rate, times(block.speedup), words])
    return table(header, rows)


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
    """What stands behind a finding whose null does not hold."""
    if null.estimate is None:
        return " (without an A/A null)"
    return " **INVALID**: see the A/A null" if stats.is_off(null.estimate) else ""


def _of_null(null: Measured) -> str:
    """What the AR step timed against itself says of the other times."""
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
