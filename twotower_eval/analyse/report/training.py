"""How the candidate learned, where its training log lies beside it: loss, and quality and parallelism as it trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict, cast

from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.plots import COLOURS, GREY, png
from twotower_eval.analyse.report.section import Section
from twotower_eval.store import TRAINING_LOG
from twotower_eval.store.journal import read_objects

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Row(TypedDict, total=False):
    """A line of the log: a loss while a stage trained, or a point of the learning curve."""

    stage: str
    num_tokens: int
    loss_nats: float
    retention: float
    tokens_per_nfe: float
    threshold: float


def training(runs: Runs) -> Section:
    """Loss curves and the learning curve in the terms of the claim; nothing for a checkpoint without a log."""
    title = "How the candidate learned"
    logs = ([cast(Row, row) for _, row in read_objects(run.path / TRAINING_LOG)] for run in runs)
    rows = next(filter(None, logs), None)
    if rows is None:
        return Section(title=title, markdown="No training log lay beside the candidate's weights.\n")
    points = [row for row in rows if row.get("retention") is not None]
    text = "![Loss, retention and tokens per denoiser forward while training](training.png)\n\n"
    if points:
        last = points[-1]
        text += (
            f"Measured while it trained, on held-out documents that no task uses: block 16, 16 steps, threshold "
            f"{last['threshold']:g}. At the end, after {last['num_tokens'] / 1e6:.1f} million noised tokens: retention "
            f"{last['retention']:.1%}, {last['tokens_per_nfe']:.2f} tokens per denoiser forward. These points have no "
            "intervals and are no part of any verdict.\n"
        )
    return Section(title=title, markdown=text, files={"training.png": png(partial(_draw, rows=rows), columns=2)})


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    loss, curve = figure.subplots(1, 2)
    for colour, (stage, name) in zip(COLOURS, (("context", "context tower"), ("denoiser", "denoiser")), strict=False):
        own = [row for row in rows if row["stage"] == stage and "loss_nats" in row]
        loss.plot([r["num_tokens"] / 1e6 for r in own], [r["loss_nats"] for r in own], color=colour, label=name, lw=1)
    loss.set(xlabel="million tokens of the stage", ylabel="training loss, nats per token", yscale="log")
    loss.legend()
    points = [row for row in rows if row.get("retention") is not None]
    x = [row["num_tokens"] / 1e6 for row in points]
    curve.plot(x, [100 * row["retention"] for row in points], color=COLOURS[1], marker="o", ms=3)
    curve.axhline(100, color=GREY, lw=0.8, ls=":")
    curve.set(xlabel="million noised tokens of the denoiser", ylabel="retention, % (circles)", ylim=(0, 110))
    beside = curve.twinx()
    beside.plot(x, [row["tokens_per_nfe"] for row in points], color=COLOURS[2], marker="s", ms=3)
    beside.set(ylabel="useful tokens per denoiser forward (squares)", ylim=(0, None))
    beside.grid(visible=False)
