"""The part of the speed section that explains a speedup: measured parts times counts against measured time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from twotower_eval.analyse.compare.costs import ArmCosts
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report.rendering import (
    Column,
    Raw,
    Show,
    frame_of,
    interval,
    markdown,
    optional,
    share,
    whole,
    words,
)
from twotower_eval.analyse.report.text import (
    NONE,
    Row,
    bullets,
    count,
    details,
    escape,
    measured_columns,
    rate,
    seconds,
    significant,
)
from twotower_eval.analyse.stats.costs import EXPLAINED
from twotower_eval.records import GateLimits

PARTS = {
    "prefill": "prefill",
    "ar_step": "AR step",
    "bookkeeping": "bookkeeping of a step",
    "denoise": "denoiser pass",
    "context_pass": "context pass",
    "forced_block": "forced block",
}
READING = (
    "Each part of decoding was timed alone, in the same rounds; predicted seconds are these parts times the passes "
    "that the timed calls made. The residual is what the parts leave unexplained, as a share of the measured time; "
    f"above {100 * EXPLAINED:g} % it is printed as unexplained and never absorbed. That mark alone fails nothing: the "
    f"gate on the residual has a limit of its own, {100 * GateLimits().residual:g} % unless a claim file sets another, "
    "and only where an arm is faster than its own forwards allow by more than that, or the baseline slower than its "
    "parts, is the speedup INVALID (see the gates). Break-even is the number of useful tokens per NFE at which both "
    "arms decode equally fast: below it a parallel decoder is slower than its baseline."
)


def explanation(runs: Runs, points: Sequence[SpeedPoint], frame: pd.DataFrame, parts_alone: pd.DataFrame) -> str:
    """Predicted and measured seconds of both arms, residuals and break-even; why not, where parts were not timed.

    ``frame`` has a row for each of the points, ``parts_alone`` those of :func:`part_costs_frame`.
    """
    if not _is_explained(frame).any():
        reasons = sorted({arm.reason for point in points for arm in _arms(point) if arm.reason})
        return bullets(f"No explanation of the times: {escape(reason)}." for reason in reasons)
    columns = [
        Column(header=runs.point_header, show=words("operating_point")),
        Column(header="workload, batch", show=lambda row: f"{row['workload']}, {count(int(row['batch_size']))}"),
        *explained_columns("baseline", "baseline measured"),
        *explained_columns("candidate", "candidate measured"),
        Column(header="tokens per NFE", show=optional("tokens_per_nfe", significant)),
        Column(header="break-even", show=interval("break_even_tokens_per_nfe", rate)),
    ]
    body = markdown(frame[_is_explained(frame)], columns)
    found = f"Do the parts explain the whole?\n\n{body}\n{details('How to read these figures', READING)}"
    names = [Column(header="arm", show=words("arm")), *part_columns(with_block=True)]
    return f"{found}\n{details('What each part costs', markdown(parts_alone, names, left=2))}"


def _is_explained(frame: pd.DataFrame) -> pd.Series[bool]:
    return frame["baseline_predicted_s"].notna() | frame["candidate_predicted_s"].notna()


def _arms(point: SpeedPoint) -> tuple[ArmCosts, ArmCosts]:
    return point.costs.baseline, point.costs.candidate


def cost_values(point: SpeedPoint) -> Row:
    """Measured and predicted seconds of both arms, and where they would decode equally fast."""
    return {
        **explained_values("baseline", point.costs.baseline),
        **explained_values("candidate", point.costs.candidate),
        "tokens_per_nfe": point.costs.tokens_per_nfe,
        **measured_columns("break_even_tokens_per_nfe", point.costs.break_even),
    }


def explained_values(arm: str, costs: ArmCosts) -> Row:
    """Measured and predicted seconds of an arm and the residual as a share; missing where nothing predicts them."""
    found = costs.explanation
    return {
        f"{arm}_measured_s": None if found is None else found.measured_s,
        f"{arm}_predicted_s": None if found is None else found.predicted_s,
        f"{arm}_residual": None if found is None else found.residual,
        f"{arm}_explained": None if found is None else found.explained,
    }


def explained_columns(arm: str, header: str = "measured") -> list[Column]:
    """The columns of :func:`explained_values`."""
    return [
        Column(header=header, show=optional(f"{arm}_measured_s", seconds)),
        Column(header="predicted", show=optional(f"{arm}_predicted_s", seconds)),
        Column(header="residual", show=_residual(arm)),
    ]


def _residual(arm: str) -> Show:
    def show(row: Raw) -> str:
        unexplained = "" if row[f"{arm}_explained"] else " **unexplained**"
        return f"{100 * row[f'{arm}_residual']:+.1f} %{unexplained}"

    return lambda row: NONE if row[f"{arm}_residual"] is None else show(row)


def part_costs_frame(points: Sequence[SpeedPoint]) -> pd.DataFrame:
    """One row for each part that was timed alone, once: thresholds and steps of one block size share theirs."""
    rows = [
        {"arm": name, **row}
        for point in points
        for name, arm in zip(("baseline", "candidate"), _arms(point), strict=True)
        for row in part_rows(arm)
    ]
    return frame_of(rows).drop_duplicates(ignore_index=True)


def part_rows(costs: ArmCosts) -> Iterator[Row]:
    """What one pass of each part of decoding costs an arm."""
    for phase in costs.phases:
        yield {
            "part": phase.part,
            "block_size": phase.block_size,
            "num_rows": phase.num_rows,
            "context_tokens": phase.context_tokens,
            "pass_s": phase.seconds.value,
            "pass_s_low": phase.seconds.low,
            "pass_s_high": phase.seconds.high,
            "pass_s_level": phase.seconds.level,
            "num_rounds": phase.seconds.n,
        }


def part_columns(*, with_block: bool) -> list[Column]:
    """The columns of :func:`part_rows`, with the block size where a decoder has blocks."""
    number = significant if with_block else "{:.3g}".format
    block = [Column(header="block", show=whole("block_size"))]
    return [
        Column(header="part", show=lambda row: PARTS[row["part"]]),
        *(block if with_block else []),
        Column(header="rows", show=whole("num_rows")),
        Column(header="context tokens", show=whole("context_tokens")),
        Column(header="ms per pass [interval]", show=lambda row: _milliseconds(row, number)),
        Column(header="level", show=share("pass_s_level")),
        Column(header="rounds", show=whole("num_rounds")),
    ]


def _milliseconds(row: Raw, number: Callable[[float], str]) -> str:
    value, low, high = (number(1e3 * row[name]) for name in ("pass_s", "pass_s_low", "pass_s_high"))
    return f"{value} [{low}, {high}]"
