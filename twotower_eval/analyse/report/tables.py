"""The quality section: retention by task and by operating point, and other scores beside it. Every table says which run
it is from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.chance import AgainstChance
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import QualityPoint, point_key
from twotower_eval.analyse.compare.runs import Runs, is_alone
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.report import alone
from twotower_eval.analyse.report.quality_frames import AVERAGE, MEMBER, TASK, TRUNCATED, QualityFrames, quality_frames
from twotower_eval.analyse.report.rendering import (
    Column,
    Raw,
    Show,
    ids,
    interval,
    markdown,
    metric,
    raw_rows,
    score_with_interval,
    scored_by,
    share,
    whole,
    words,
)
from twotower_eval.analyse.report.text import (
    NONE,
    Section,
    bullets,
    code,
    count,
    details,
    escape,
    mean_of,
    p_value,
    percent,
    retention,
    significant,
)
from twotower_eval.analyse.words import finding_text
from twotower_eval.analyse.words.facts import method_text
from twotower_eval.analyse.words.gates import standing_text
from twotower_eval.names import plural
from twotower_eval.rules import override_lines


def _other_scores(point: QualityPoint, frame: pd.DataFrame) -> str:
    """The table of a point's other scores, and under it how scores of all documents together are made."""
    columns = [
        Column(header="task", show=words("task")),
        Column(header="scored by", show=scored_by),
        Column(header="metric (filter)", show=metric),
        Column(header="better", show=lambda row: "higher" if row["higher_is_better"] else "lower"),
        Column(header="n", show=whole("num_documents")),
        Column(header="baseline", show=score_with_interval("baseline")),
        Column(header="candidate", show=score_with_interval("candidate")),
        Column(header="difference [95 %]", show=_difference),
    ]
    remarks = bullets(_whole_remarks(point.wholes))
    ordered = frame.sort_values(["task", "metric", "filter"], kind="stable")
    return markdown(ordered, columns, left=4) + (f"\n{remarks}" if remarks else "")


def _difference(row: Raw) -> str:
    if row["difference"] is None:
        return NONE
    if row["equal_by_construction"]:
        return "0 by construction"
    return f"{row['difference']:+.4f} [{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"


def _whole_remarks(wholes: Sequence[WholeScore]) -> Iterator[str]:
    """How each score of all documents together was computed, its retention, and why figures are missing."""
    for one in wholes:
        named = f"{escape(one.task)}, {escape(one.metric)}"
        named += f" ({escape(one.filter)})" if one.filter != "none" else ""
        kept = f"; retention {retention(one.retention)}" if one.retention.estimate else ""
        yield f"{named}: of all documents together, by lm-eval's {escape(one.aggregation)}{kept}."
        found = {"baseline": one.baseline.reason, "candidate": one.candidate.reason}
        if not any(found.values()):
            found = {
                "interval of the baseline": one.baseline_interval.reason,
                "interval of the candidate": one.candidate_interval.reason,
                "difference": one.difference.reason,
                "retention": one.retention.reason if one.higher_is_better else None,
            }
        reasons: dict[str, list[str]] = {}
        for what, why in found.items():
            if why is not None:
                reasons.setdefault(why, []).append(what)
        yield from (f"{named}: no {', '.join(what)}: {escape(why)}." for why, what in reasons.items())
    intervals = [found.estimate for whole in wholes for found in (whole.baseline_interval, whole.candidate_interval)]
    methods = sorted({method_text(found) for found in intervals if found})
    if methods:
        yield f"Intervals of scores of all documents together: {escape('; '.join(methods))}."


MAX_LISTED = 20
READING = (
    "Retention is the candidate's mean score over the baseline's on the same documents; the headline averages tasks, "
    "each weighing the same, before it divides. Intervals come from resampling clusters (problems, passages), or are "
    "exact bounds where fewer than five clusters differ. Lost and gained count documents that only the baseline or "
    "only the candidate got right, with McNemar's exact p in brackets (by sign flips where a cluster has "
    "several scores), Holm-adjusted over the tasks; below 0.0001 the table only says so."
)
READING_CHANCE = (
    " Chance is what guessing among a document's options scores. Retention above chance divides what lies above it: "
    "100 % where nothing is lost, 0 % where the candidate guesses. It is given where the baseline is clearly above "
    "chance, by a one-sided 95 % bound that holds for all tasks with options together."
)


def quality(runs: Runs) -> Section:
    """Retention by task at the headline's operating point, and of all points in one grid."""
    if not runs.compare:
        text, frame = alone.scores(runs)
        return Section(title="Scores", markdown=text or "Nothing has been scored yet.\n", tables=_alone(frame))
    if not runs.quality:
        text, frame = alone.scores(runs)
        lead = "Nothing has been scored in both arms. `twotower-eval run` scores baseline and candidate.\n"
        title = "Retention: is the quality kept?"
        return Section(title=title, markdown=lead + text, tables=_alone(frame))
    first = runs.shown.quality or runs.quality[0]
    reading = READING + READING_CHANCE * first.chance.has_options
    frames = quality_frames(runs)
    parts = [_point(runs, first, frames), details("How to read this table", reading)]
    rest = [point for point in runs.quality if point is not first]
    if rest:
        parts.append(details(f"All {len(runs.quality)} measurements of retention", _grid(runs, frames.points)))
        parts.append(
            details("Task by task in the other measurements", "\n\n".join(_point(runs, one, frames) for one in rest))
        )
    text, of_one = alone.scores([run for run in runs if is_alone(run)])
    parts += [text] if text else []
    tables = {**frames.tables(), **_alone(of_one)}
    return Section(title="Retention: is the quality kept?", markdown="\n\n".join(parts) + "\n", tables=tables)


def _of(frame: pd.DataFrame, measurement: int) -> pd.DataFrame:
    """The rows of one measurement."""
    return frame[frame["measurement"] == measurement] if len(frame) else frame


def _alone(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {} if frame.empty else {"scores_alone": frame.drop(columns="level")}


def _point(runs: Runs, point: QualityPoint, frames: QualityFrames) -> str:
    kind = f"timed outputs, batch {point.candidate.workload.batch_size}" if point.timed else "whole tasks"
    state = "" if point.complete else " (INCOMPLETE run)"
    title = f"### {escape(runs.name(point.candidate))}: {kind}{state}\n"
    number = 1 + next(i for i, one in enumerate(runs.quality) if one is point)
    table = _task_table(_of(frames.by_task, number), point.chance.has_options)
    parts = [title, table, bullets(_remarks(runs, point))]
    if point.others or point.wholes:
        table = _other_scores(point, _of(frames.others, number))
        parts.append(details("Other scores, which are not part of retention", table))
    if point.missing:
        parts.append(_missing(point))
    return "\n".join(part for part in parts if part)


SHOWN_AVERAGES = {"(headline)": "headline", "(decoder_exercised)": "decoder-exercised"}


def _task_table(frame: pd.DataFrame, with_chance: bool) -> str:
    """One measurement's tasks, each followed by its members, then the averages."""
    averages = ["(headline)", *([] if frame["exercises_decoder"].all() else ["(decoder_exercised)"])]
    shown = frame[(frame["level"] != AVERAGE) | frame["task"].isin(averages)]
    chance = [
        Column(header="above chance [95 %]", show=_by_level(_kept("retention_above_chance"), share_of_average=True)),
        Column(header="chance", show=_by_level(share("chance"), share_of_average=True)),
    ]
    columns = [
        Column(header="task", show=_task_name),
        Column(header="retention [95 %]", show=_by_level(_kept("retention"), share_of_average=True)),
        *chance * with_chance,
        Column(header="baseline", show=_mean("baseline_mean")),
        Column(header="candidate", show=_mean("candidate_mean")),
        Column(header="lost / gained (p)", show=_by_level(_flips)),
        Column(header="n (clusters)", show=_num_documents),
        Column(header="scored by", show=_by_level(scored_by), text=True),
        Column(header="metric (filter)", show=_by_level(metric), text=True),
    ]
    if any(row.get(name) for row in raw_rows(frame) for name in TRUNCATED):  # no task, no such column
        columns.append(Column(header="cut prompts: baseline / candidate", show=_cut))
    return markdown(shown, columns)


def _by_level(show: Show, *, share_of_average: bool = False) -> Show:
    """A cell of a task; blank for a group's member. An average has its own figures in bold, and else a blank."""

    def shown(row: Raw) -> str:
        if row["level"] == TASK:
            return show(row)
        return _bold(row, show) if share_of_average and row["level"] == AVERAGE else ""

    return shown


def _bold(row: Raw, show: Show) -> str:
    """An average's figure; a plain dash where no task is averaged."""
    return f"**{show(row)}**" if row["num_tasks"] else NONE


def _mean(name: str) -> Show:
    return lambda row: _bold(row, share(name)) if row["level"] == AVERAGE else share(name)(row)


def _task_name(row: Raw) -> str:
    if row["level"] == MEMBER:
        return f"{NONE} {escape(row['task'])}"
    if row["level"] == TASK:
        return escape(row["task"]) + (mean_of(int(row["num_members"]), row["by_size"]) if row["num_members"] else "")
    tasks = f" ({int(row['num_tasks'])} tasks)" if row["num_tasks"] else ""
    return f"**{SHOWN_AVERAGES[row['task']]}**{tasks}"


def _kept(name: str) -> Show:
    """Retention, or that it is 100 % by construction."""

    def show(row: Raw) -> str:
        if row["equal_by_construction"] and row[name] is not None:
            return "100 % by construction"
        return interval(name, retention)(row)

    return show


def _flips(row: Raw) -> str:
    return f"{int(row['num_lost'])} / {int(row['num_gained'])} ({p_value(row['p_holm'])})"


def _num_documents(row: Raw) -> str:
    clusters = f" ({count(int(row['num_clusters']))})" if row["level"] == TASK else ""
    return whole("num_documents")(row) + clusters


def _cut(row: Raw) -> str:
    """How many prompts were cut; blank for an average."""
    return "" if row["level"] == AVERAGE else " / ".join(count(int(row[name] or 0)) for name in TRUNCATED)


def without_unclear(found: AgainstChance, headline: Measured, exercised: Measured) -> str | None:
    """Which baselines are not clearly above chance, and what retention is without these tasks; ``None`` without any."""
    if not found.unclear:
        return None
    named = escape("; ".join(standing_text(one) for one in found.unclear))
    start = f"Baselines not clearly above chance, on which a retention says little: {named}."
    num_left = len(found.standings) - len(found.unclear)
    if not num_left:
        return f"{start} No other task is left."
    left = f"over the {plural(num_left, 'task')} left"
    text = f"the headline is {retention(found.clear_headline)}, {left}; with them it is {retention(headline)}"
    if exercised.estimate:
        both = f"{retention(found.clear_exercised)} and {retention(exercised)}"
        text += f"; on the tasks that the decoder answers, {both}"
    return f"{start} Without them {text}."


def _remarks(runs: Runs, point: QualityPoint) -> Iterator[str]:
    reason = f" ({escape(point.mean_of_ratios.reason)})" if point.mean_of_ratios.reason else ""
    yield f"Run {code(point.run_id)}. Mean of the tasks' own ratios: {retention(point.mean_of_ratios)}{reason}."
    if len(point.leave_one_out) > 1:
        (low_task, low), *_, (high_task, high) = point.leave_one_out
        if percent(low) != percent(high):
            yield (
                f"Leaving one task out: from {percent(low)} (without {escape(low_task)}) to {percent(high)} "
                f"(without {escape(high_task)})."
            )
    if point.equal_tasks:
        names = escape(", ".join(point.equal_tasks))
        yield f"{names}: one computation scores both arms, on the context tower's tensors that they share."
    estimates = [found.estimate for found in (point.headline, point.exercised) if found.estimate]
    methods = sorted({method_text(e) + (f", seed {e.seed}" if e.seed is not None else "") for e in estimates})
    if methods:
        yield f"Intervals of the averages: {'; '.join(methods)}."
    if unclear := without_unclear(point.chance, point.headline, point.exercised):
        yield unclear
    if point.headline.reason:
        yield f"No headline: {escape(point.headline.reason)}."
    notes: dict[str, list[str]] = {}
    for task in point.tasks:
        if task.retention.estimate is None:
            notes.setdefault(f"no retention, {escape(task.retention.reason)}", []).append(escape(task.name))
        elif stats.is_exact(task.retention.estimate):
            notes.setdefault(method_text(task.retention.estimate), []).append(escape(task.name))
    yield from (f"{', '.join(names)}: {note}." for note, names in notes.items())
    yield from (f"{finding_text(one)}." for one in point.warnings)
    manifest = next(run.manifest for run in runs if run.manifest.run_id == point.run_id)
    yield from (f"{escape(line)}." for line in override_lines(manifest.overrides))
    yield from _bound_draws(runs, point)


def _bound_draws(runs: Runs, point: QualityPoint) -> Iterator[str]:
    """How many draws a Monte-Carlo bound rests on, and how well it is known."""
    run = next(run for run in runs if run.manifest.run_id == point.run_id)
    cells = {cell.id for cell in run.manifest.cells if cell.arm == "candidate" and point_key(cell) == point.key}
    bounds = [row.likelihood for row in run.likelihoods if row.cell in cells and row.likelihood.kind == "bound"]
    errors = [bound.stderr_nats for bound in bounds if bound.stderr_nats is not None]
    if bounds and errors:
        draws = ", ".join(sorted({str(bound.num_draws) for bound in bounds}))
        mean_nats = significant(sum(errors) / len(errors))
        yield f"Denoiser bounds: {draws} draws a continuation, mean standard error {mean_nats} nats."


def _missing(point: QualityPoint) -> str:
    """What has no value and why; documents of headline scores by number."""
    lines = []
    for gap in point.missing:
        named = escape(gap.metric) + (f" ({escape(gap.filter)})" if gap.filter != "none" else "")
        listed = ", ".join(map(str, gap.doc_ids[:MAX_LISTED])) + (", ..." if len(gap.doc_ids) > MAX_LISTED else "")
        which = f" (headline; documents {listed})" if gap.headline else ""
        number = f"{count(len(gap.doc_ids))} of the {gap.arm}'s"
        lines.append(f"{escape(gap.task)}, {named}: {number}{which}: {escape(gap.reason)}")
    return f"Scores without a value:\n\n{bullets(lines)}"


def _grid(runs: Runs, frame: pd.DataFrame) -> str:
    with_chance = any(point.chance.has_options for point in runs.quality)
    above = Column(header="above chance [95 %]", show=interval("headline_above_chance", retention))
    columns = [
        Column(header=runs.point_header, show=words("operating_point")),
        Column(header="outputs", show=_outputs),
        Column(header="tasks", show=whole("num_tasks")),
        Column(header="n", show=whole("num_documents")),
        Column(header="headline [95 %]", show=interval("headline", retention)),
        *[above] * with_chance,
        Column(header="decoder-exercised [95 %]", show=interval("decoder_exercised", retention)),
        Column(header="mean of ratios [95 %]", show=interval("mean_of_ratios", retention)),
        Column(header="leaving one out", show=_leaving_one_out),
        Column(header="run", show=ids("run")),
    ]
    return markdown(frame, columns, left=2)


def _outputs(row: Raw) -> str:
    return f"timed, batch {int(row['batch_size'])}" if row["timed"] else "whole tasks"


def _leaving_one_out(row: Raw) -> str:
    low, high = row["leaving_one_out_low"], row["leaving_one_out_high"]
    return NONE if low is None else f"{percent(low)} to {percent(high)}"
