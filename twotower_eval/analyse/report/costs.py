"""The part of the speed section that explains a speedup: measured parts times counts against measured time."""

from __future__ import annotations

from collections.abc import Sequence

from twotower_eval.analyse.compare.costs import ArmCosts
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report.text import (
    NONE,
    bullets,
    count,
    details,
    escape,
    percent,
    seconds,
    significant,
    table,
)
from twotower_eval.records import Estimate

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
    "above 10 % it is printed as unexplained and never absorbed. Where an arm is much faster than its own forwards "
    "allow, or the baseline much slower than its parts, the speedup is INVALID (see the gates). Break-even is the "
    "number of useful tokens per NFE at which both arms decode equally fast: below it a parallel decoder is slower "
    "than its baseline."
)


def explanation(runs: Runs, points: Sequence[SpeedPoint]) -> str:
    """Predicted and measured seconds of both arms, residuals and break-even; why not, where parts were not timed."""
    explained = [point for point in points if point.costs.candidate.explanation or point.costs.baseline.explanation]
    if not explained:
        reasons = sorted({arm.reason for point in points for arm in _arms(point) if arm.reason})
        return bullets(f"No explanation of the times: {escape(reason)}." for reason in reasons)
    header = [runs.point_header, "workload, batch", "baseline measured", "predicted", "residual"]
    header += ["candidate measured", "predicted", "residual", "tokens per NFE", "break-even"]
    body = table(header, [_row(runs, point) for point in explained])
    found = f"Do the parts explain the whole?\n\n{body}\n{details('How to read these figures', READING)}"
    return f"{found}\n{details('What each part costs', _phases(runs, explained))}"


def _arms(point: SpeedPoint) -> tuple[ArmCosts, ArmCosts]:
    return point.costs.baseline, point.costs.candidate


def _row(runs: Runs, point: SpeedPoint) -> list[str]:
    per_nfe = point.costs.tokens_per_nfe
    return [
        escape(runs.name(point.candidate)),
        f"{point.workload}, {count(point.batch_size)}",
        *(cell for arm in _arms(point) for cell in explained(arm)),
        NONE if per_nfe is None else significant(per_nfe),
        _break_even(point.costs.break_even),
    ]


def explained(arm: ArmCosts) -> list[str]:
    """Measured and predicted seconds of an arm, and the residual; dashes where nothing predicts them."""
    found = arm.explanation
    if found is None:
        return [NONE, NONE, NONE]
    residual = f"{100 * found.residual:+.1f} %" + ("" if found.explained else " **unexplained**")
    return [seconds(found.measured_s), seconds(found.predicted_s), residual]


def _break_even(found: Measured) -> str:
    return NONE if found.estimate is None else _spread(found.estimate)


def _spread(found: Estimate) -> str:
    return f"{significant(found.value)} [{significant(found.low)}, {significant(found.high)}]"


def _phases(runs: Runs, points: Sequence[SpeedPoint]) -> str:
    """Every measured part once: thresholds and steps of one block size share theirs."""
    rows: list[list[str]] = []
    for point in points:
        for name, arm in zip(("baseline", "candidate"), _arms(point), strict=True):
            for phase in arm.phases:
                ms = phase.seconds
                spread = f"{significant(1e3 * ms.value)} [{significant(1e3 * ms.low)}, {significant(1e3 * ms.high)}]"
                block = NONE if phase.block_size is None else count(phase.block_size)
                where = [PARTS[phase.part], block, count(phase.num_rows), count(phase.context_tokens)]
                row = [name, *where, spread, percent(ms.level), count(ms.n)]
                if row not in rows:
                    rows.append(row)
    header = ["arm", "part", "block", "rows", "context tokens", "ms per pass [interval]", "level", "rounds"]
    return table(header, rows, left=2)
