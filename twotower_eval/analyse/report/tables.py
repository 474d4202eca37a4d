"""The quality section: retention by task and by operating point, and other scores beside it. Every table says which run
it is from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import pandas as pd

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.chance import AgainstChance
from twotower_eval.analyse.compare.documents import truncated, truncated_by_task
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import OtherScore, QualityPoint, TaskQuality, checkpoint_name, point_key
from twotower_eval.analyse.compare.runs import Runs, group_scores, is_alone, score_of
from twotower_eval.analyse.compare.wholes import WholeScore, current_scores, is_whole
from twotower_eval.analyse.report.rendering import Column, Raw, frame_of, ids, interval, markdown, whole, words
from twotower_eval.analyse.report.text import (
    NONE,
    SCORED_BY,
    Section,
    bullets,
    code,
    count,
    details,
    escape,
    measured_columns,
    operating_point,
    percent,
    retention,
    scored_by_words,
    significant,
    table,
)
from twotower_eval.analyse.stats import Figure
from twotower_eval.analyse.words import finding_text
from twotower_eval.analyse.words.facts import method_text
from twotower_eval.analyse.words.gates import standing_text
from twotower_eval.names import plural
from twotower_eval.records import MEAN, Cell, Score
from twotower_eval.rules import override_lines
from twotower_eval.store import Run


def other_scores(point: QualityPoint) -> str:
    """The table, and under it how scores of all documents together come about."""
    header = ["task", "scored by", "metric (filter)", "better", "n", "baseline", "candidate", "difference [95 %]"]
    found: list[OtherScore | WholeScore] = [*point.others, *point.wholes]
    rows = []
    for other in sorted(found, key=lambda other: (other.task, other.metric, other.filter)):
        filtered = f" ({escape(other.filter)})" if other.filter != "none" else ""
        rows.append(
            [
                escape(other.task),
                scored_by_words(other.scored_by),
                escape(other.metric) + filtered,
                "higher" if other.higher_is_better else "lower",
                count(other.num_documents),
                *_figures(other),
            ]
        )
    remarks = bullets(_whole_remarks(point.wholes))
    return table(header, rows, left=4) + (f"\n{remarks}" if remarks else "")


def _figures(other: OtherScore | WholeScore) -> list[str]:
    """Baseline, candidate and what lies between them."""
    if isinstance(other, OtherScore):
        arms = [significant(other.baseline, 4), significant(other.candidate, 4)]
        return [*arms, _change(Measured(estimate=other.difference))]
    return [
        whole_figure(other.baseline, other.baseline_interval),
        whole_figure(other.candidate, other.candidate_interval),
        _change(other.difference),
    ]


def whole_figure(value: stats.Figure, interval: Measured) -> str:
    """A score of all documents together with its interval, where it has them."""
    if value.value is None:
        return NONE
    found = interval.estimate
    ends = "" if found is None else f" [{significant(found.low, 4)}, {significant(found.high, 4)}]"
    return significant(value.value, 4) + ends


def _change(change: Measured) -> str:
    found = change.estimate
    if found is None:
        return NONE
    if found.method_kind == "equal_by_construction":
        return "0 by construction"
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _whole_remarks(wholes: Sequence[WholeScore]) -> Iterator[str]:
    """Which function made each score, what is kept of it, and why figures are missing."""
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
    "only the candidate got right, with McNemar's exact p (by sign flips where a cluster has several scores), "
    "Holm-adjusted over the tasks."
)
READING_CHANCE = (
    " Chance is what guessing among a document's options scores. Retention above chance divides what lies above it: "
    "100 % where nothing is lost, 0 % where the candidate guesses. It is given where the baseline is clearly above "
    "chance, by a one-sided 95 % bound that holds for all tasks with options together."
)


def quality(runs: Runs) -> Section:
    """Retention by task at the headline's operating point, and of all points in one grid."""
    if not runs.compare:
        return Section(title="Scores", markdown=_single_arm(runs) or "Nothing has been scored yet.\n")
    if not runs.quality:
        text = "Nothing has been scored in both arms. `twotower-eval run` scores baseline and candidate.\n"
        return Section(title="Retention: is the quality kept?", markdown=text + _single_arm(runs))
    first = runs.shown.quality or runs.quality[0]
    reading = READING + READING_CHANCE * first.chance.has_options
    parts = [_point(runs, first), details("How to read this table", reading)]
    rest = [point for point in runs.quality if point is not first]
    if rest:
        parts.append(details(f"All {len(runs.quality)} measurements of retention", _grid(runs)))
        parts.append(
            details("Task by task in the other measurements", "\n\n".join(_point(runs, point) for point in rest))
        )
    alone = [run for run in runs if is_alone(run)]
    parts += [_single_arm(Runs(alone))] if alone else []
    frames = {"retention_points": retention_points(runs)}
    return Section(title="Retention: is the quality kept?", markdown="\n\n".join(parts) + "\n", tables=frames)


def _single_arm(runs: Runs) -> str:
    """Mean scores where there is one model only, or one arm so far."""
    groups: dict[tuple[str, str, str, str, str, str], list[Score]] = {}
    by_id = {run.manifest.run_id: run for run in runs}
    for run in runs:
        for score in current_scores(run):
            arm = _arm(run, run.cells[score.cell])
            key = (run.manifest.run_id, arm, score.task, score.metric, score.filter, score.scored_by)
            groups.setdefault(key, []).append(score)
    told = {run.manifest.run_id: truncated(run) for run in runs}
    rows, cut, gaps = [], [], []
    for (run_id, arm, task, metric, filter_, scored_by), scores in groups.items():
        figure, interval = score_of(scores, by_id[run_id])
        if is_whole(scores[0]):
            shown, num = whole_figure(figure, interval), len(scores)
        else:
            shown, num = _mean(figure, interval), sum(score.value is not None for score in scores)
        named = escape(metric) + (f" ({escape(filter_)})" if filter_ != "none" else "")
        gaps += [
            f"{escape(task)}, {named}, {escape(arm)}: {words}" for words in _without_value(scores, figure, interval)
        ]
        how = SCORED_BY.get(scored_by, escape(scored_by))
        rows.append([escape(task), named, how, escape(arm), code(run_id), count(num), shown])
        cut.append(sum(one.num_truncated for one in told[run_id] if (one.task, one.cell) == (task, scores[0].cell)))
    header = ["task", "metric (filter)", "scored by", "model", "run", "n", "score [95 %]"]
    if any(cut):
        header.append("cut prompts")
        rows = [[*row, count(num)] for row, num in zip(rows, cut, strict=True)]
    rows += [[*row, *[""] * any(cut)] for run in runs for row in _group_rows(run)]
    without = f"\nScores without a value:\n\n{bullets(gaps)}" if gaps else ""
    return f"\nWhat has been scored:\n\n{table(header, rows, left=5)}{without}" if rows else ""


def _group_rows(run: Run) -> Iterator[list[str]]:
    """Groups' figures, as lm-eval makes them of their members."""
    for one in group_scores(run):
        named = escape(one.metric) + (f" ({escape(one.filter)})" if one.filter != "none" else "")
        how, arm, num = scored_by_words(one.scored_by), escape(_arm(run, one.cell)), count(one.num_documents)
        name = escape(one.group) + _mean_of(len(one.members), one.by_size)
        shown = _mean(one.value, one.interval) if one.aggregation == MEAN else whole_figure(one.value, one.interval)
        yield [name, named, how, arm, code(run.manifest.run_id), num, shown]


def _mean(figure: Figure, interval: Measured) -> str:
    found = interval.estimate
    ends = "" if found is None else f" [{found.low:.4f}, {found.high:.4f}]"
    return NONE if figure.value is None else f"{figure.value:.4f}{ends}"


def _without_value(scores: list[Score], figure: Figure, interval: Measured) -> Iterator[str]:
    """How many documents are left out of a mean, by the reason; why a score of all together is not known."""
    if is_whole(scores[0]):
        yield from [escape(why) for why in (figure.reason or interval.reason,) if why]
        return
    reasons = Counter(score.missing_reason or "no reason recorded" for score in scores if score.value is None)
    for reason, num in reasons.items():
        yield f"{count(num)} of {count(len(scores))} documents: {escape(reason)}"
    if interval.reason and figure.value is not None:
        yield f"no interval: {escape(interval.reason)}"


def _arm(run: Run, cell: Cell) -> str:
    """Which model a score is of, by which decoder; timed answers with their batch."""
    who = checkpoint_name(cell.checkpoint) if is_alone(run) else cell.arm
    timed = "" if cell.workload.kind == "task" else f", timed at batch {cell.workload.batch_size}"
    return f"{who}, {cell.decoder.label}{timed}"


def _point(runs: Runs, point: QualityPoint) -> str:
    kind = f"timed outputs, batch {point.candidate.workload.batch_size}" if point.timed else "whole tasks"
    state = "" if point.complete else " (INCOMPLETE run)"
    title = f"### {escape(runs.name(point.candidate))}: {kind}{state}\n"
    parts = [title, _task_table(point, truncated_by_task(runs, point)), bullets(_remarks(runs, point))]
    if point.others or point.wholes:
        parts.append(details("Other scores, which are not part of retention", other_scores(point)))
    if point.missing:
        parts.append(_missing(point))
    return "\n".join(part for part in parts if part)


def _task_table(point: QualityPoint, cut: Mapping[str, tuple[int, int]]) -> str:
    with_chance = point.chance.has_options
    header = ["task", "retention [95 %]", *["above chance [95 %]", "chance"] * with_chance, "baseline", "candidate"]
    header += ["lost / gained (p)", "n (clusters)", "scored by", "metric (filter)"]
    rows = [row for task in point.tasks for row in _task_rows(task, with_chance)]
    above = [retention(point.chance.headline)] * with_chance
    rows.append(_total_row("**headline**", point.tasks, retention(point.headline), above))
    if not point.all_exercise_decoder:
        exercising = tuple(task for task in point.tasks if task.exercises_decoder)
        above = [retention(point.chance.exercised)] * with_chance
        rows.append(_total_row("**decoder-exercised**", exercising, retention(point.exercised), above))
    if any(map(any, cut.values())):
        header.append("cut prompts: baseline / candidate")
        names = [name for task in point.tasks for name in (task.name, *(member for member, *_ in task.members))]
        cells = [" / ".join(map(count, cut.get(name, (0, 0)))) for name in names]
        rows = [[*row, cell] for row, cell in zip_longest(rows, cells, fillvalue="")]
    return table(header, rows, texts=("scored by", "metric (filter)"))


def _averaged(task: TaskQuality) -> str:
    """How a task of several members is one figure."""
    return _mean_of(len(task.members), task.by_size) if task.members else ""


def _mean_of(num: int, by_size: bool) -> str:
    weighted = ", by documents" if by_size else ""
    return f" (mean of {num}{weighted})"


def _task_rows(task: TaskQuality, with_chance: bool) -> Iterator[list[str]]:
    flips = f"{task.flips.num_lost} / {task.flips.num_gained} ({significant(max(task.flips.p_holm, 1e-4), 2)})"
    filtered = f" ({escape(task.filter)})" if task.filter != "none" else ""
    chance = NONE if task.standing.chance is None else percent(task.standing.chance)
    yield [
        escape(task.name) + (_averaged(task)),
        _kept(task, task.retention),
        *[_kept(task, task.above_chance), chance] * with_chance,
        percent(task.baseline),
        percent(task.candidate),
        flips,
        f"{count(task.num_documents)} ({count(task.num_clusters)})",
        scored_by_words(task.scored_by),
        escape(task.metric) + filtered,
    ]
    for name, num_documents, baseline, candidate in task.members:
        blanks = ["", *["", ""] * with_chance]
        means = [percent(baseline), percent(candidate)]
        yield [f"{NONE} {escape(name)}", *blanks, *means, "", count(num_documents), "", ""]


def _kept(task: TaskQuality, found: Measured) -> str:
    return "100 % by construction" if task.equal_by_construction and found.estimate else retention(found)


def _total_row(name: str, tasks: tuple[TaskQuality, ...], kept: str, above: list[str]) -> list[str]:
    """``above`` holds the retention above chance, and nothing where no task can be guessed at."""
    if not tasks:
        return [name, NONE, *[NONE, NONE] * len(above), NONE, NONE, "", "0", "", ""]
    means = [sum(task.baseline for task in tasks), sum(task.candidate for task in tasks)]
    chances = [task.standing.chance or 0.0 for task in tasks]
    chance = percent(sum(chances) / len(tasks)) if any(chances) else NONE
    cells = [kept, *[*above, chance] * len(above), *(percent(total / len(tasks)) for total in means)]
    num_documents = count(sum(task.num_documents for task in tasks))
    return [f"{name} ({len(tasks)} tasks)", *(f"**{cell}**" for cell in cells), "", num_documents, "", ""]


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


def _grid(runs: Runs) -> str:
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
    return markdown(retention_points(runs), columns, left=2)


def _outputs(row: Raw) -> str:
    return f"timed, batch {int(row['batch_size'])}" if row["timed"] else "whole tasks"


def _leaving_one_out(row: Raw) -> str:
    low, high = row["leaving_one_out_low"], row["leaving_one_out_high"]
    return NONE if low is None else f"{percent(low)} to {percent(high)}"


def retention_points(runs: Runs) -> pd.DataFrame:
    """One row for each measurement of retention: its averages over tasks."""
    rows = []
    for point in runs.quality:
        ends = [ratio for _, ratio in point.leave_one_out]
        low, high = (ends[0], ends[-1]) if len(ends) > 1 else (None, None)
        rows.append(
            {
                "run": point.run_id,
                "operating_point": runs.name(point.candidate),
                **operating_point(point.candidate),
                "timed": point.timed,
                "batch_size": point.candidate.workload.batch_size,
                "num_tasks": len(point.tasks),
                "num_documents": sum(task.num_documents for task in point.tasks),
                **measured_columns("headline", point.headline),
                **measured_columns("headline_above_chance", point.chance.headline),
                **measured_columns("decoder_exercised", point.exercised),
                **measured_columns("mean_of_ratios", point.mean_of_ratios),
                "leaving_one_out_low": low,
                "leaving_one_out_high": high,
            }
        )
    return frame_of(rows)
