"""One model alone in a report: its scores, its speed and its outputs; nothing is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.documents import truncated
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import checkpoint_name, long_name
from twotower_eval.analyse.compare.runs import Runs, TimedAlone, group_scores, is_alone, score_of
from twotower_eval.analyse.compare.wholes import current_scores, is_whole
from twotower_eval.analyse.report.costs import explained_columns, explained_values, part_columns, part_rows
from twotower_eval.analyse.report.rates import alone_rates, rate_columns
from twotower_eval.analyse.report.rendering import (
    Column,
    Raw,
    Tables,
    endings,
    fixed,
    frame_of,
    id_list,
    ids,
    interval,
    markdown,
    metric,
    optional,
    raw_rows,
    score_with_interval,
    scored_by,
    whole,
    words,
)
from twotower_eval.analyse.report.text import (
    NONE,
    Row,
    bullets,
    count,
    count_columns,
    details,
    ends,
    escape,
    load_columns,
    mean_of,
    measured_columns,
    operating_point,
    outputs_columns,
    percent,
    rate,
    run_list,
    seconds,
    times,
)
from twotower_eval.analyse.words import INVALID, fact_text
from twotower_eval.analyse.words.facts import method_line
from twotower_eval.names import plural
from twotower_eval.records import MEAN, Cell, Score
from twotower_eval.rules import load_text, override_lines, void_text
from twotower_eval.store import Run

LEAD = "Useful tokens over the seconds of their calls, as the model decodes by itself.\n\n"


def names_alone(runs: Runs) -> list[str]:
    """The models that were measured alone; where nothing was measured, those that were checked."""
    cells = [cell for run in runs if is_alone(run) for cell in run.manifest.cells]
    cells = cells or [cell for run in runs for cell in run.manifest.cells]
    return sorted({escape(checkpoint_name(cell.checkpoint)) for cell in cells})


def sentence(runs: Runs) -> str:
    """One sentence for each model that was measured alone: what was scored of it, and how fast it decodes."""
    lines = []
    for cell in {(c.checkpoint, c.decoder.label): c for c in _cells(runs)}.values():
        parts = [*_scored(runs, cell), *_timed(runs, cell)]
        lines.append(f"**{escape(model_name(cell))}, measured alone: {'; '.join(parts)}.**")
    if not lines and not any(is_alone(run) for run in runs):
        return f"**{' and '.join(names_alone(runs))}: checked by `verify`, see the gates; neither scored nor timed.**"
    return "\n\n".join(lines) or "**Nothing has been scored or timed completely yet, so there is nothing to quote.**"


def remarks(runs: Runs) -> Iterator[str]:
    """Which runs the sentence rests on, and that nothing is compared."""
    run_ids = {one.run_id for one in runs.scored_alone} | {i for one in runs.timed_alone for i in one.run_ids}
    if run_ids:
        noun = "run" if len(run_ids) == 1 else "runs"
        yield f"Measured in {noun} {run_list(run_ids)}. Brackets hold 95 % intervals."
    overrides = [one for run in runs if is_alone(run) for one in run.manifest.overrides]
    yield from (f"{escape(line)}." for line in override_lines(list(dict.fromkeys(overrides))))
    if any(is_alone(run) for run in runs):
        yield "Nothing was measured beside it, so nothing is compared: `--baseline FOLDER` names another model."


def _cells(runs: Runs) -> list[Cell]:
    return [one.cell for one in runs.scored_alone] + [one.baseline for one in runs.timed_alone]


def model_name(cell: Cell) -> str:
    """A model measured alone: its checkpoint and how it decodes."""
    return f"{checkpoint_name(cell.checkpoint)}, {long_name(cell.decoder) or cell.decoder.kind}"


def _same(one: Cell, other: Cell) -> bool:
    return (one.checkpoint, one.decoder.label) == (other.checkpoint, other.decoder.label)


def _scored(runs: Runs, cell: Cell) -> list[str]:
    """Whole tasks if there are any: the timed answers are among their documents."""
    own = [one for one in runs.scored_alone if _same(one.cell, cell)]
    whole = [one for one in own if one.cell.workload.kind == "task"]
    found = max(whole or own, key=lambda one: one.num_documents, default=None)
    if found is None:
        return []
    return [f"{plural(found.num_documents, 'document')} of {plural(len(set(found.tasks)), 'task')} scored"]


def _timed(runs: Runs, cell: Cell) -> list[str]:
    own = [one for one in runs.timed_alone if _same(one.baseline, cell)]
    found = min(own, key=lambda one: (one.baseline.workload.kind != "answer", batch_of(one)), default=None)
    if found is None:
        return []
    setting = f"{found.baseline.workload.kind} workload, {load_text(found.baseline.workload)}"
    if found.rate.estimate is None:
        return [f"timed on the {setting} ({escape(found.rate.reason)})"]
    invalid = " (INVALID timing, see below)" if found.null_fault else ""
    return [f"{rate(found.rate)} useful tokens per second{invalid} on the {setting}"]


def batch_of(one: TimedAlone) -> int:
    return one.baseline.workload.batch_size or 1


def speed_alone(runs: Runs) -> tuple[str, Tables]:
    """Speeds, what they are made of, and what must be known of them; an empty text without any. And their frames."""
    found = sorted(runs.timed_alone, key=lambda one: (one.baseline.workload.name, batch_of(one)))
    if not found:
        return "", {}
    frame = speed_frame_alone(found)
    columns = [
        Column(header="model", show=words("model")),
        Column(header="workload", show=words("workload_name")),
        Column(header="batch", show=whole("batch_size")),
        Column(header="rounds x calls", show=lambda row: f"{row['num_rounds']} x {row['num_calls']}"),
        Column(header="useful tokens/s [95 %]", show=_rate_or_invalid),
        *rate_columns(frame, without="tokens_per_s"),
        Column(header="a call", show=optional("call_s", seconds)),
        Column(header="A/A null [99 %]", show=interval("against_itself", times)),
    ]
    parts_alone = part_costs_frame(found)
    parts = [LEAD + markdown(frame, columns, left=2), bullets(_speed_remarks(found)), _costs(found, frame, parts_alone)]
    text = "\n\n".join(part.strip() for part in parts if part) + "\n"
    return text, {"speed_alone": frame, "part_costs_alone": parts_alone}


def _rate_or_invalid(row: Raw) -> str:
    return interval("tokens_per_s", rate)(row) + (f" **{INVALID}**" if row["invalid_reason"] is not None else "")


def _speed_remarks(found: Sequence[TimedAlone]) -> Iterator[str]:
    yield f"Runs {run_list(i for one in found for i in one.run_ids)}. Warm-up rounds are not in these figures."
    methods = {method_line(one.rate.estimate) for one in found if one.rate.estimate}
    yield from (f"{method}." for method in sorted(methods))
    not_resampled = [one.num_launches for one in found if not _resamples_launches(one)]
    if not_resampled:
        yield f"{plural(min(not_resampled), 'launch', 'launches')}: variation between launches was not measured."
    for one in found:
        name = f"{escape(model_name(one.baseline))}, {one.baseline.workload.kind}, {load_text(one.baseline.workload)}"
        lines = [] if one.complete else ["**the run is INCOMPLETE**"]
        lines += [_left_out(one.num_dropped_rounds)] if one.num_dropped_rounds else []
        lines += [f"{void_text(one.num_timed, one.faults)} and are left out"] if one.faults else []
        lines += [f"{INVALID}: {escape(fact_text(one.null_fault))}"] if one.null_fault else []
        lines += [f"{NONE}: {escape(found.reason)}" for found in (one.rate, one.null) if found.reason]
        yield from (f"{name}: {words}." for words in lines)


def _left_out(num_rounds: int) -> str:
    verb = "is" if num_rounds == 1 else "are"
    return f"{plural(num_rounds, 'round')} {verb} not complete and {verb} left out"


def _resamples_launches(one: TimedAlone) -> bool:
    serial = None if one.rate.estimate is None else one.rate.estimate.serial
    return one.num_launches >= stats.MIN_LAUNCHES if serial is None else serial.launches


def _costs(found: Sequence[TimedAlone], frame: pd.DataFrame, parts_alone: pd.DataFrame) -> str:
    """Counts, and the parts of decoding that were timed alone with what they explain."""
    columns = [
        Column(header="model", show=words("model")),
        Column(header="batch", show=whole("batch_size")),
        Column(header="prompts timed", show=whole("model_num_prompts")),
        Column(header="useful tokens", show=whole("model_num_tokens")),
        Column(header="context forwards", show=whole("model_num_context_forwards")),
        Column(header="tokens per forward", show=fixed("model_tokens_per_forward", 2)),
        Column(header="ended by EOS / stop / length", show=endings("model")),
        *explained_columns("model"),
    ]
    body = markdown(frame, columns)
    if len(parts_alone):
        body += f"\nWhat each part costs:\n\n{markdown(parts_alone, part_columns(with_block=False))}"
    reasons = sorted({one.costs.reason for one in found if one.costs.reason})
    body += "".join(f"\nNo explanation of the times: {escape(reason)}.\n" for reason in reasons)
    return details("Tokens, forwards and what they cost", body)


def part_costs_frame(found: Sequence[TimedAlone]) -> pd.DataFrame:
    """One row for each part of decoding that was timed alone, of each model."""
    return frame_of(
        {"runs": " ".join(one.run_ids), **operating_point(one.baseline), "batch_size": batch_of(one), **row}
        for one in found
        for row in part_rows(one.costs)
    )


def degenerate_alone(runs: Runs) -> tuple[str, pd.DataFrame]:
    """How many outputs of the models measured alone are degenerate; an empty text where none was kept."""
    frame = frame_of(_flagged_rows(runs))
    columns = [
        Column(header="model", show=words("model")),
        Column(header="outputs of", show=_outputs_of),
        Column(header="n", show=whole("num_outputs")),
        Column(header="degenerate", show=_degenerate),
        Column(header="run", show=id_list("runs")),
    ]
    return ("" if frame.empty else markdown(frame, columns, left=2)), frame


def _flagged_rows(runs: Runs) -> Iterator[Row]:
    of_scores = [(one.cell, one.flagged, [one.run_id]) for one in runs.scored_alone if one.cell.workload.kind == "task"]
    of_calls = [(one.baseline, one.flagged, list(one.run_ids)) for one in runs.timed_alone]
    for cell, flagged, run_ids in (*of_scores, *of_calls):
        if flagged.num_outputs:
            yield {
                "model": model_name(cell),
                **operating_point(cell),
                "workload": cell.workload.kind,
                "batch_size": cell.workload.batch_size or 1,
                "num_outputs": flagged.num_outputs,
                "num_degenerate": flagged.num_degenerate,
                "degenerate_share": flagged.num_degenerate / flagged.num_outputs,
                "runs": " ".join(run_ids),
            }


def _outputs_of(row: Raw) -> str:
    return "whole tasks" if row["workload"] == "task" else f"{row['workload']}, batch {int(row['batch_size'])}"


def _degenerate(row: Raw) -> str:
    return f"{count(int(row['num_degenerate']))} ({percent(row['degenerate_share'])})"


@dataclass(frozen=True, kw_only=True)
class OneScore:
    """Rows of one task, metric and filter by one model, and their score. ``model`` names it in tables."""

    run: Run
    model: str
    rows: tuple[Score, ...]
    value: stats.Figure
    interval: Measured

    @property
    def num_without(self) -> int:
        """Documents that are left out of a mean for want of a value."""
        return 0 if is_whole(self.rows[0]) else sum(row.value is None for row in self.rows)


def scores(runs: Sequence[Run]) -> tuple[str, pd.DataFrame]:
    """Scores where there is one model only, or one arm so far: the table with what is missing, and its frame."""
    found = [one for run in runs for one in _scores_of(run)]
    rows = [row for run in runs for row in (*(_score_row(one) for one in found if one.run is run), *_group_rows(run))]
    frame = frame_of(rows)
    if frame.empty:
        return "", frame
    columns = [
        Column(header="task", show=_task_or_group),
        Column(header="metric (filter)", show=metric),
        Column(header="scored by", show=scored_by),
        Column(header="model", show=words("model")),
        Column(header="run", show=ids("run")),
        Column(header="n", show=whole("num_documents")),
        Column(header="score [95 %]", show=_score),
    ]
    if any(row["num_truncated"] for row in raw_rows(frame)):
        columns.append(Column(header="cut prompts", show=_cut))
    body = markdown(frame.sort_values("level", kind="stable", ascending=False), columns, left=5)
    gaps = [f"{_named(one)}: {why}" for one in found for why in _without_value(one)]
    without = f"\nScores without a value:\n\n{bullets(gaps)}" if gaps else ""
    return f"\nWhat has been scored:\n\n{body}{without}", frame


def _scores_of(run: Run) -> Iterator[OneScore]:
    groups: dict[tuple[str, ...], list[Score]] = {}
    for score in current_scores(run):
        model = model_text(run, run.cells[score.cell])
        groups.setdefault((model, score.task, score.metric, score.filter, score.scored_by), []).append(score)
    for (model, *_), rows in groups.items():
        value, interval = score_of(rows, run)
        yield OneScore(run=run, model=model, rows=tuple(rows), value=value, interval=interval)


def model_text(run: Run, cell: Cell) -> str:
    """Which model a score is of, by which decoder; timed answers with their batch size."""
    name = checkpoint_name(cell.checkpoint) if is_alone(run) else cell.arm
    timed = "" if cell.workload.kind == "task" else f", timed at batch {cell.workload.batch_size}"
    return f"{name}, {cell.decoder.label}{timed}"


def _named(one: OneScore) -> str:
    first = one.rows[0]
    named = escape(first.metric) + (f" ({escape(first.filter)})" if first.filter != "none" else "")
    return f"{escape(first.task)}, {named}, {escape(one.model)}"


def _without_value(one: OneScore) -> Iterator[str]:
    """How many documents are left out of a mean, by the reason; why a score of all together is not known."""
    if is_whole(one.rows[0]):
        yield from [escape(why) for why in (one.value.reason or one.interval.reason,) if why]
        return
    reasons = Counter(row.missing_reason or "no reason recorded" for row in one.rows if row.value is None)
    for reason, num in reasons.items():
        yield f"{count(num)} of {count(len(one.rows))} documents: {escape(reason)}"
    if one.interval.reason and one.value.value is not None:
        yield f"no interval: {escape(one.interval.reason)}"


def _task_or_group(row: Raw) -> str:
    members = "" if row["members"] is None else mean_of(len(row["members"].split()), row["by_size"])
    return escape(row["task"]) + members


def _score(row: Raw) -> str:
    """A mean with four decimals, any other score with four digits; the interval behind it."""
    if row["aggregation"] != MEAN:
        return score_with_interval("score")(row)
    if row["score"] is None:
        return NONE
    low, high = row["score_low"], row["score_high"]
    return f"{row['score']:.4f}" + ("" if low is None else f" [{low:.4f}, {high:.4f}]")


def _cut(row: Raw) -> str:
    return "" if row["level"] == GROUP else count(int(row["num_truncated"] or 0))


TASK, GROUP = "task", "group"


def _score_row(one: OneScore) -> Row:
    first = one.rows[0]
    cut = [known.num_truncated for known in truncated(one.run) if (known.task, known.cell) == (first.task, first.cell)]
    return {
        **_scored_columns(one.run, one.run.cells[first.cell]),
        "task": first.task,
        "members": None,
        "metric": first.metric,
        "filter": first.filter,
        "aggregation": first.aggregation or MEAN,
        "scored_by": first.scored_by,
        "headline": first.headline,
        "num_documents": len(one.rows) - one.num_without,
        "num_documents_without_value": one.num_without,
        "score": one.value.value,
        **ends("score", one.interval),
        "level": TASK,
        "model": one.model,
        "num_truncated": sum(cut) if cut else None,
        "by_size": None,
    }


def _group_rows(run: Run) -> Iterator[Row]:
    """Groups' figures, as lm-eval makes them of their members."""
    for one in group_scores(run):
        yield {
            **_scored_columns(run, one.cell),
            "task": one.group,
            "members": " ".join(one.members),
            "metric": one.metric,
            "filter": one.filter,
            "aggregation": one.aggregation,
            "scored_by": " + ".join(one.scored_by),
            "headline": one.headline,
            "num_documents": one.num_documents,
            "num_documents_without_value": one.num_without,
            "score": one.value.value,
            **ends("score", one.interval),
            "level": GROUP,
            "model": model_text(run, one.cell),
            "num_truncated": None,
            "by_size": one.by_size,
        }


def _scored_columns(run: Run, cell: Cell) -> Row:
    return {
        "run": run.manifest.run_id,
        "complete": run.complete,
        **operating_point(cell),
        **outputs_columns(cell),
    }


def speed_frame_alone(found: Sequence[TimedAlone]) -> pd.DataFrame:
    """One row for each timed cell that nothing was compared with."""
    return frame_of(_speed_row(one) for one in found)


def _speed_row(one: TimedAlone) -> Row:
    return {
        "runs": " ".join(one.run_ids),
        "complete": one.complete,
        **operating_point(one.baseline),
        **load_columns(one.baseline.workload),
        "num_rounds": one.num_rounds,
        "num_calls": one.num_calls,
        "num_launches": one.num_launches,
        **alone_rates(one),
        "call_s": one.call_s,
        **measured_columns("against_itself", one.null),
        "invalid_reason": None if one.null_fault is None else fact_text(one.null_fault),
        **count_columns("model", one.counts),
        "latency_median_s": one.latency.median_s,
        "latency_p95_s": one.latency.p95_s,
        "num_outputs": one.flagged.num_outputs,
        "num_degenerate": one.flagged.num_degenerate,
        "model": model_name(one.baseline),
        "workload_name": one.baseline.workload.name,
        **explained_values("model", one.costs),
    }
