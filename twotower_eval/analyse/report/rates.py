"""Each arm in absolute terms: tokens and answers per second, and the device time, memory and energy of answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from twotower_eval.analyse.compare.calls import WithinCalls
from twotower_eval.analyse.compare.figures import Counts, Measured
from twotower_eval.analyse.compare.runs import Runs, TimedAlone
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report.rendering import Column, Raw, Show, frame_of, interval, markdown, optional, whole
from twotower_eval.analyse.report.text import (
    Row,
    escape,
    load_columns,
    measured_columns,
    operating_point,
    rate,
    seconds,
    significant,
)
from twotower_eval.records import Cell

ANSWERS = 1_000
LEAD = (
    "In absolute terms. Device time is the seconds of the calls times the devices of the arm{energy}; neither counts "
    "what the machine does between calls.{memory}\n\n"
)
MEMORY = " Peak memory is what tensors took at most during the calls, the weights of every loaded model among them."
ENERGY = ", energy what these devices drew meanwhile by their own counters"


def rates_frame(runs: Runs, points: Sequence[SpeedPoint]) -> pd.DataFrame:
    """One row for each arm of these points; those timed together share their baseline's."""
    return frame_of(_compared(runs, points))


def alone_rates(one: TimedAlone) -> Row:
    """The rates of a model that was timed alone."""
    return _rates(one.baseline, one.rate, one.answers, one.counts, one.within)


def _compared(runs: Runs, points: Sequence[SpeedPoint]) -> Iterator[Row]:
    baselines = set()
    for point in points:
        same = (point.baseline.id, point.run_ids)
        if same not in baselines:
            baselines.add(same)
            figures = (point.baseline_rate, point.baseline_answers, point.baseline_counts, point.baseline_within)
            yield {**_setting(point.baseline, point.run_ids), **_rates(point.baseline, *figures)}
        figures = (point.candidate_rate, point.candidate_answers, point.counts, point.within)
        yield {
            **_setting(point.candidate, point.run_ids, runs.name(point.candidate)),
            **_rates(point.candidate, *figures),
        }


def _setting(cell: Cell, run_ids: Sequence[str], name: str | None = None) -> Row:
    """``operating_point`` is empty for a baseline."""
    return {
        "arm": cell.arm,
        "operating_point": name,
        **operating_point(cell),
        **load_columns(cell.workload),
        "num_devices": cell.workload.num_devices,
        "runs": " ".join(run_ids),
    }


def _rates(cell: Cell, tokens: Measured, answers: Measured, counts: Counts, within: WithinCalls) -> Row:
    per_s = None if answers.estimate is None else answers.estimate.value
    devices, energy_j = cell.workload.num_devices, within.energy_j
    return {
        **measured_columns("tokens_per_s", tokens),
        **measured_columns("answers_per_s", answers),
        "device_s_per_1000_answers": None if per_s is None or not devices else ANSWERS * devices / per_s,
        "first_output_median_s": within.first_output_s,
        "peak_memory_bytes": within.peak_memory_bytes,
        "energy_j_per_1000_answers": None if energy_j is None else ANSWERS * energy_j / counts.num_prompts,
    }


def rates_table(frame: pd.DataFrame, first: str) -> str:
    """The rows as a table, without columns of which nothing is known. ``first`` is the header of the first column."""
    known = [] if frame.empty else rate_columns(frame)
    if not known:
        return ""
    columns = [
        Column(header=first, show=arm_name),
        Column(header="workload", show=lambda row: str(row["workload"])),
        Column(header="batch", show=whole("batch_size")),
        *known,
    ]
    energy = ENERGY if frame["energy_j_per_1000_answers"].notna().any() else ""
    memory = MEMORY if frame["peak_memory_bytes"].notna().any() else ""
    return LEAD.format(energy=energy, memory=memory) + markdown(frame, columns, left=2)


def rate_columns(frame: pd.DataFrame, without: str = "") -> list[Column]:
    """The columns of figures, but for ``without`` and those of which nothing is known."""
    figures: dict[str, tuple[str, Show]] = {
        "tokens_per_s": ("useful tokens/s [95 %]", interval("tokens_per_s", rate)),
        "answers_per_s": ("answers/s [95 %]", interval("answers_per_s", rate)),
        "device_s_per_1000_answers": ("device time per 1,000 answers", _of("device_s_per_1000_answers", " s")),
        "first_output_median_s": ("first output", optional("first_output_median_s", seconds)),
        "peak_memory_bytes": ("peak memory", optional("peak_memory_bytes", gibibytes)),
        "energy_j_per_1000_answers": ("energy per 1,000 answers", _of("energy_j_per_1000_answers", " J")),
    }
    known = {name: column for name, column in figures.items() if name != without and frame[name].notna().any()}
    return [Column(header=header, show=show) for header, show in known.values()]


def gibibytes(num_bytes: float) -> str:
    """``17.31 GiB``."""
    return f"{num_bytes / 2**30:.2f} GiB"


def arm_name(row: Raw) -> str:
    """``baseline``, or the operating point of a candidate."""
    return "baseline" if row["operating_point"] is None else escape(row["operating_point"])


def _of(name: str, unit: str) -> Show:
    return optional(name, lambda value: f"{significant(value)}{unit}")
