"""The candidate against each of several baselines: a table of all, and what was measured against the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd

from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.runs import Headline, Runs
from twotower_eval.analyse.compare.several import AgainstOne, least_speedup, strongest
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report.gates import gates
from twotower_eval.analyse.report.rates import gibibytes
from twotower_eval.analyse.report.rendering import (
    Column,
    Raw,
    frame_of,
    interval,
    markdown,
    optional,
    speedup_or_invalid,
    words,
)
from twotower_eval.analyse.report.speed_tables import speed
from twotower_eval.analyse.report.tables import quality
from twotower_eval.analyse.report.text import (
    NONE,
    Row,
    Section,
    details,
    escape,
    load_columns,
    measured_columns,
    operating_point,
    rate,
    retention,
    times,
)

NAME = "baseline"  # the column of tables that are of several baselines
OF_RUNS = ("checkpoints", "checks", "training")  # tables that are the same whatever the baseline
STRONGEST = (
    "The strongest baseline is the one with the most useful tokens per second, as measured. The speedup over the "
    "strongest is the least over all of them. Its lower end is the least of their lower ends, which holds whichever is "
    "the strongest; its upper end is the least of upper ends that hold for all of them at once."
)


def frame(runs: Runs) -> pd.DataFrame:
    """One row for each operating point, way of timing and baseline; empty where there is only one baseline."""
    found = []
    for key in runs.points:
        ways: list[SpeedPoint | None] = [point for point in runs.speed if point.key == key]
        found += [row for point in ways or [None] for row in _rows(runs, runs.each_baseline(key, point))]
    return frame_of(found)


def _rows(runs: Runs, each: Sequence[AgainstOne]) -> Iterator[Row]:
    best = strongest(each)
    for one in each:
        yield _row(runs, one, least_speedup(each) if one is best else Measured(estimate=None), one is best)


def _row(runs: Runs, one: AgainstOne, least: Measured, is_strongest: bool) -> Row:
    none = Measured(estimate=None)
    point, kept = one.speed, one.quality
    return {
        NAME: one.name,
        "baseline_decoder": one.cell.decoder.label,
        "baseline_dtype": one.cell.checkpoint.dtype,
        **operating_point(one.candidate),
        "operating_point": runs.name(one.candidate),
        **({"workload": None, "batch_size": None} if point is None else load_columns(point.candidate.workload)),
        **measured_columns("baseline_tokens_per_s", none if point is None else point.baseline_rate),
        **measured_columns("candidate_tokens_per_s", none if point is None else point.candidate_rate),
        **measured_columns("baseline_answers_per_s", none if point is None else point.baseline_answers),
        **measured_columns("candidate_answers_per_s", none if point is None else point.candidate_answers),
        "baseline_peak_memory_bytes": None if point is None else point.baseline_within.peak_memory_bytes,
        "candidate_peak_memory_bytes": None if point is None else point.within.peak_memory_bytes,
        **measured_columns("retention", none if kept is None else kept.headline),
        **measured_columns("time_speedup", none if point is None else point.time),
        **measured_columns("throughput_speedup", none if point is None else point.throughput),
        **measured_columns("baseline_against_itself", none if point is None else point.null),
        "invalid": point is not None and point.invalid,
        "strongest": is_strongest,
        **measured_columns("speedup_over_strongest", least),
    }


def _table(found: pd.DataFrame) -> str:
    several = found["operating_point"].nunique() > 1
    timed = bool(found["workload"].notna().any())
    columns = [Column(header="baseline", show=_named), Column(header="decoder", show=words("baseline_decoder"))]
    columns += [Column(header="operating point", show=words("operating_point"))] * several
    columns += [Column(header="workload, batch", show=_timed_so)] * timed
    columns += [Column(header="retention [95 %]", show=interval("retention", retention))]
    if timed:
        columns += [
            Column(header="S_time [95 %]", show=speedup_or_invalid("time_speedup")),
            Column(header="S_throughput [95 %]", show=speedup_or_invalid("throughput_speedup")),
            Column(header="baseline's useful tokens/s [95 %]", show=interval("baseline_tokens_per_s", rate)),
            Column(header="its answers/s [95 %]", show=interval("baseline_answers_per_s", rate)),
            Column(header="A/A null [99 %]", show=interval("baseline_against_itself", times)),
        ]
        if found["baseline_peak_memory_bytes"].notna().any():
            columns.append(
                Column(
                    header="peak memory, all models' weights in it",
                    show=optional("baseline_peak_memory_bytes", gibibytes),
                )
            )
    return markdown(found, columns, left=2 + several + timed)


def _named(row: Raw) -> str:
    return escape(row[NAME]) + (" **(strongest)**" if row["strongest"] else "")


def _timed_so(row: Raw) -> str:
    size = "" if row["batch_size"] is None else f", {int(row['batch_size'])}"
    return NONE if row["workload"] is None else f"{row['workload']}{size}"


def headline_lines(runs: Runs, found: Headline) -> list[str]:
    """A sentence and a table of the headline's point against each baseline; nothing where there is only one."""
    each = runs.each_baseline(found.key, found.speed) if found.key else ()
    if len(each) < 2:
        return []
    return [sentence(each), _table(frame_of(_rows(runs, each)))]


def sentence(each: Sequence[AgainstOne]) -> str:
    """``1.70x [1.62, 1.78] against ar, 1.20x [1.14, 1.26] against prompt_lookup (the strongest)``, in bold."""
    best = strongest(each)
    timed = [(one, one.speed) for one in each if one.speed is not None and one.speed.time.estimate is not None]
    if best is None or not timed:
        return ""
    parts = []
    for one, point in timed:
        invalid = " (INVALID)" if point.invalid else ""
        is_best = " (the strongest)" if one is best else ""
        parts.append(f"{times(point.time)}{invalid} against {escape(one.name)}{is_best}")
    least = least_speedup(each)
    over = f"not known: {escape(least.reason)}" if least.estimate is None else times(least)
    return f"**Against each baseline: {', '.join(parts)}.** Over the strongest, whichever it is: {over}."


def baselines(runs: Runs) -> Section:
    """The candidate against each baseline, and the tables against all but the first."""
    title = "Against each baseline"
    if not runs.baselines:
        return Section(title=title, markdown="These runs have one baseline.\n")
    found = frame(runs)
    others = [name for name in runs.baselines if name != runs.baseline]
    first = escape(runs.baseline or "the first one")
    parts = [
        f"The tables of the other sections are against {first}.",
        _table(found) if not found.empty else "Nothing has been measured against two of them yet.",
        details("How the strongest is found", STRONGEST),
        *(_other(name, runs.against(name)) for name in others),
    ]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    return Section(title=title, markdown=text, tables={"baselines": found})


def _other(name: str, runs: Runs) -> str:
    """Quality, speed and gates against another baseline, folded."""
    sections = (quality(runs), speed(runs), gates(runs))
    body = "\n\n".join(f"**{one.title}**\n\n{_deeper(one.markdown)}" for one in sections)
    return details(f"Everything against {escape(name)}", body)


def _deeper(text: str) -> str:
    """A section's text without headings, as it stands within another section."""
    lines = [f"**{line.lstrip('# ')}**" if line.startswith("### ") else line for line in text.strip().splitlines()]
    return "\n".join(lines)


Tables = Mapping[str, pd.DataFrame]


def of_all(runs: Runs, make: Callable[[Runs], Tables]) -> dict[str, pd.DataFrame]:
    """Tables of runs; with several baselines those against each, below each other, with the baseline's name first."""
    if not runs.baselines:
        return dict(make(runs))
    found = {name: make(runs.against(name)) for name in runs.baselines}
    tables: dict[str, pd.DataFrame] = {}
    for table in dict.fromkeys(table for of_one in found.values() for table in of_one):
        each = {name: of_one[table] for name, of_one in found.items() if table in of_one}
        if table in OF_RUNS:
            tables[table] = next(iter(each.values()))
            continue
        named = [one.assign(**{NAME: name}) for name, one in each.items() if not one.empty]
        joined = pd.concat(named, ignore_index=True) if named else pd.DataFrame()
        tables[table] = joined[[NAME, *(column for column in joined.columns if column != NAME)]] if named else joined
    return tables
