"""The speed section: speedups with their intervals, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.warned import Incomplete
from twotower_eval.analyse.report.alone import speed_alone
from twotower_eval.analyse.report.call_tables import (
    MAX_SHOWN,
    counts,
    counts_frame,
    forwards_frame,
    lengths,
    lengths_frame,
    order,
)
from twotower_eval.analyse.report.costs import cost_values, explanation, part_costs_frame
from twotower_eval.analyse.report.rates import rates_frame, rates_table
from twotower_eval.analyse.report.rendering import (
    Column,
    Raw,
    frame_of,
    interval,
    markdown,
    speedup_or_invalid,
    whole,
    words,
)
from twotower_eval.analyse.report.text import (
    NONE,
    Row,
    Section,
    bullets,
    count,
    count_columns,
    details,
    escape,
    load_columns,
    measured_columns,
    operating_point,
    ratio,
    run_list,
    speed_findings,
    times,
    within_columns,
)
from twotower_eval.analyse.words import finding_text
from twotower_eval.analyse.words.facts import best_text, method_line
from twotower_eval.records import Finding
from twotower_eval.rules import load_text

LEAD = (
    "S_time is the wall-clock speedup: the baseline's seconds over the candidate's for the same prompts, so above 1x "
    "the candidate is faster.\n\n"
)
READING = (
    "S_throughput compares useful tokens per second, so it differs where answers differ in length (length ratio: "
    "useful tokens, candidate over baseline). A/A null is the baseline against itself and should hold 1. Neighbouring"
    " rounds may be alike, as a machine is slow for a while: effective rounds are how many independent ones would say"
    " as much, by the lag-1 correlation of the rounds' own speedups in brackets, corrected for few rounds; fewer than"
    " 5 decide nothing. Intervals of S_time use an upper bound of the correlation, because few rounds estimate it "
    "poorly. Workload `fixed` makes a fixed number of tokens, `answer` stops where the task stops."
)


def speed(runs: Runs) -> Section:
    """Speedups, and what they are made of."""
    of_one, tables = speed_alone(runs)
    of_counts = counts_frame(runs)
    tables |= {"token_counts": of_counts, "forwards": forwards_frame(runs)}
    if not runs.speed:
        lines = bullets(escape(gap) for gap in runs.speed_gaps)
        what = "baseline and candidate" if runs.compare else "a model"
        text = of_one or f"Nothing has been timed completely. `twotower-eval speed` times {what}.\n"
        return Section(title="Speed", markdown=f"{text}\n{lines}" + counts(runs, of_counts), tables=tables)
    frame, of_lengths = speed_frame(runs), lengths_frame(runs)
    tables |= {"speed": frame, "lengths": of_lengths, "part_costs": part_costs_frame(runs.speed)}
    tables["rates"] = rates_frame(runs, runs.speed)
    ordered = sorted(runs.speed, key=order)
    shown = ordered if len(ordered) <= MAX_SHOWN else [point for point in ordered if point.key == runs.chosen]
    rest = [point for point in ordered if point not in shown]
    main = shown or ordered
    parts = [
        LEAD + (_speedups(runs, _rows_of(runs, frame, shown)) if shown else ""),
        details(f"The other {len(rest)} of {len(ordered)} measurements", _speedups(runs, _rows_of(runs, frame, rest)))
        if rest
        else "",
        bullets(_speed_remarks(runs)),
        rates_table(rates_frame(runs, main), runs.point_header),
        explanation(runs, main, _rows_of(runs, frame, main), part_costs_frame(main)),
        details("How to read this table", READING),
        lengths(_rows_of(runs, of_lengths, main)),
        counts(runs, of_counts),
        of_one,
    ]
    markdown = "\n\n".join(part.strip() for part in parts if part) + "\n"
    return Section(title="Speed", markdown=markdown, tables=tables)


def _rows_of(runs: Runs, frame: pd.DataFrame, points: Sequence[SpeedPoint]) -> pd.DataFrame:
    """The rows of these points in their order; ``measurement`` is a point's place in ``runs.speed``, from 1."""
    if frame.empty:
        return frame
    places = {id(point): number for number, point in enumerate(runs.speed, start=1)}
    order = {places[id(point)]: place for place, point in enumerate(points)}
    rows = frame[frame["measurement"].isin(order.keys())]
    return rows.sort_values("measurement", kind="stable", key=lambda numbers: numbers.map(order))


def speed_frame(runs: Runs) -> pd.DataFrame:
    """One row for each timed point: speedups, what they rest on, and what they cost."""
    return frame_of({**_speed(runs, point), "measurement": i} for i, point in enumerate(runs.speed, start=1))


def _speed(runs: Runs, point: SpeedPoint) -> Row:
    return {
        "runs": " ".join(point.run_ids),
        "complete": point.complete,
        **operating_point(point.candidate),
        **load_columns(point.candidate.workload),
        "num_rounds": point.num_rounds,
        "num_calls": point.num_calls,
        "num_launches": point.num_launches,
        **_serial(point),
        **measured_columns("time_speedup", point.time),
        **measured_columns("throughput_speedup", point.throughput),
        **measured_columns("length_ratio", point.length),
        **measured_columns("geometric_speedup", point.geometric),
        **measured_columns("baseline_against_itself", point.null),
        **measured_columns("baseline_tokens_per_s", point.baseline_rate),
        **measured_columns("candidate_tokens_per_s", point.candidate_rate),
        **measured_columns("baseline_answers_per_s", point.baseline_answers),
        **measured_columns("candidate_answers_per_s", point.candidate_answers),
        **count_columns("baseline", point.baseline_counts),
        **count_columns("candidate", point.counts),
        **within_columns("baseline", point.baseline_within),
        **within_columns("candidate", point.within),
        "baseline_latency_median_s": point.baseline_latency.median_s,
        "baseline_latency_p95_s": point.baseline_latency.p95_s,
        "candidate_latency_median_s": point.latency.median_s,
        "candidate_latency_p95_s": point.latency.p95_s,
        "baseline_degenerate_share": point.flagged.baseline,
        "candidate_degenerate_share": point.flagged.candidate,
        "warnings": "; ".join(map(finding_text, speed_findings(point))),
        "operating_point": runs.name(point.candidate),
        "workload_name": point.candidate.workload.name,
        "invalid": point.invalid,
        "resamples_launches": None if point.serial is None else point.serial.launches,
        **measured_columns("time_speedup_per_device", point.time_per_device),
        **cost_values(point),
    }


def _serial(point: SpeedPoint) -> Row:
    """How much rounds depend on their neighbours, and what the interval of the speedup in time makes of it."""
    serial = point.serial
    return {
        "lag1_correlation": serial.lag1 if serial else None,
        "lag1_correlation_bound": serial.lag1_bound if serial else None,
        "effective_rounds": serial.effective_rounds if serial else None,
        "serial_widening": serial.widening if serial else None,
        "serial_block_rounds": serial.block if serial else None,
    }


def _speedups(runs: Runs, frame: pd.DataFrame) -> str:
    per_device = not all(point.equal_devices for point in runs.speed)
    columns = [
        Column(header=runs.point_header, show=words("operating_point")),
        Column(header="S_time [95 %]", show=speedup_or_invalid("time_speedup")),
        Column(header="S_throughput [95 %]", show=speedup_or_invalid("throughput_speedup")),
        Column(header="workload", show=words("workload_name"), text=True),
        Column(header="batch", show=whole("batch_size")),
        Column(header="rounds x calls", show=lambda row: f"{row['num_rounds']} x {row['num_calls']}"),
        Column(header="effective rounds (lag-1)", show=_independent),
        Column(header="length ratio [95 %]", show=interval("length_ratio", ratio)),
        Column(header="geometric mean [95 %]", show=speedup_or_invalid("geometric_speedup")),
        Column(header="A/A null [99 %]", show=interval("baseline_against_itself", times)),
    ]
    per_device_column = Column(header="S_time per device [95 %]", show=speedup_or_invalid("time_speedup_per_device"))
    return markdown(frame, [*columns, *[per_device_column] * per_device])


def _independent(row: Raw) -> str:
    """How many independent rounds would say as much, and how alike neighbouring rounds are."""
    if row["resamples_launches"] is None:
        return NONE
    if row["resamples_launches"]:
        return f"{row['num_launches']} launches"
    if row["lag1_correlation"] is None:
        return "too few to tell"
    return f"{row['effective_rounds']:.1f} ({row['lag1_correlation']:+.2f})"


def _widened(runs: Runs) -> Iterator[str]:
    found = [point.serial for point in runs.speed if point.serial is not None]
    if by := _times([serial.widening for serial in found if not serial.launches]):
        yield f"As rounds may be alike, their standard error is taken {by} times as large as that of independent ones."
    if by := _times([serial.widening for serial in found if serial.launches]):
        yield (
            f"What slows a launch may slow the next one too. So the standard error of launches is taken {by} times as "
            "large as if they were independent. Launches that are started further apart make it smaller."
        )


def _times(widenings: Sequence[float]) -> str:
    """How much wider; empty where nothing is."""
    if not widenings or max(widenings) <= 1:
        return ""
    least, most = f"{min(widenings):.1f}", f"{max(widenings):.1f}"
    return least if least == most else f"{least} to {most}"


def _speed_remarks(runs: Runs) -> Iterator[str]:
    run_ids = [run_id for point in runs.speed for run_id in point.run_ids]
    yield f"{'Runs' if len(set(run_ids)) > 1 else 'Run'} {run_list(run_ids)}. Warm-up rounds are not in these figures."
    methods = {method_line(point.time.estimate) for point in runs.speed if point.time.estimate}
    yield from (f"{method}." for method in sorted(methods))
    yield from _widened(runs)
    launches = [point.num_launches for point in runs.speed if not stats.resamples_launches(point.timed.launches)]
    if launches:
        yield f"{min(launches)} launch{'es' * (min(launches) > 1)}: variation between launches was not measured."
    bests = dict.fromkeys((point.workload, point.batch_size, best_text(point.best)) for point in runs.speed)
    for workload, batch_size, found in bests:
        yield f"Is the baseline at its best? {workload}, batch {count(batch_size)}: {escape(found)}."
    yield from _warnings(runs)
    reasons = {m.reason for p in runs.speed for m in (p.time, p.throughput, p.null) if m.reason}
    yield from (f"{NONE}: {escape(reason)}." for reason in sorted(reasons))
    yield from (f"{escape(gap)}." for gap in runs.speed_gaps)


INCOMPLETE = Finding(kind="complete_run", severity="warning", facts=Incomplete())


def _warnings(runs: Runs) -> Iterator[str]:
    """One line for each reason: how many measurements it concerns, and of which one the figures in it are."""
    concerned: dict[tuple[object, ...], list[tuple[Finding, SpeedPoint]]] = {}
    for point in runs.speed:
        unfinished = () if point.complete else (INCOMPLETE,)
        for one in (*unfinished, *speed_findings(point)):
            concerned.setdefault((one.severity, one.kind, one.facts.alike), []).append((one, point))
    for found in concerned.values():
        first, point = found[0]
        name = f"{escape(runs.name(point.candidate))}, {point.workload}, {load_text(point.candidate.workload)}"
        differing = any(one != first for one, _ in found)
        figures = f" (the figures of {name}; those of the others differ)" if differing else ""
        every = f"every one of {len(found)} measurements" if len(found) > 1 else name
        some = f"{len(found)} of {len(runs.speed)} measurements" if len(found) > 1 else name
        yield f"{every if len(found) == len(runs.speed) else some}: {finding_text(first)}{figures}."
