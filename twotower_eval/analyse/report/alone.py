"""What reports say of one model alone: its scores, its speed, its outputs, and nothing of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.costs import ArmCosts
from twotower_eval.analyse.compare.points import checkpoint_name, long_name
from twotower_eval.analyse.compare.runs import (
    FlaggedAlone,
    GroupScore,
    Runs,
    TimedAlone,
    group_scores,
    is_alone,
    score_of,
)
from twotower_eval.analyse.compare.wholes import current_scores, is_whole
from twotower_eval.analyse.report.costs import PARTS, explained
from twotower_eval.analyse.report.text import (
    NONE,
    Row,
    bullets,
    code,
    count,
    count_columns,
    details,
    ends,
    escape,
    measured_columns,
    operating_point,
    percent,
    rate,
    run_list,
    seconds,
    table,
    times,
)
from twotower_eval.analyse.words import INVALID, fact_text
from twotower_eval.analyse.words.facts import method_line
from twotower_eval.names import plural
from twotower_eval.records import MEAN, Cell, Score
from twotower_eval.rules import override_lines, void_text
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
        lines.append(f"**{who(cell)}, measured alone: {'; '.join(parts)}.**")
    if not lines and not any(is_alone(run) for run in runs):
        return f"**{' and '.join(names_alone(runs))}: checked by `verify`, see the gates; neither scored nor timed.**"
    return "\n\n".join(lines) or "**Nothing has been scored or timed completely yet, so there is nothing to quote.**"


def remarks(runs: Runs) -> Iterator[str]:
    """Where the figures of the sentence are from, and what there is not."""
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


def who(cell: Cell) -> str:
    return escape(f"{checkpoint_name(cell.checkpoint)}, {long_name(cell.decoder) or cell.decoder.kind}")


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
    setting = f"{found.baseline.workload.kind} workload, batch {batch_of(found)}"
    if found.rate.estimate is None:
        return [f"timed on the {setting} ({escape(found.rate.reason)})"]
    invalid = " (INVALID timing, see below)" if found.null_fault else ""
    return [f"{rate(found.rate)} useful tokens per second{invalid} on the {setting}"]


def batch_of(one: TimedAlone) -> int:
    return one.baseline.workload.batch_size or 1


def speed_alone(runs: Runs) -> str:
    """The table of speeds, what they are made of, and what must be known of them; empty without any."""
    found = sorted(runs.timed_alone, key=lambda one: (one.baseline.workload.name, batch_of(one)))
    if not found:
        return ""
    header = ["model", "workload", "batch", "rounds x calls", "useful tokens/s [95 %]", "a call", "A/A null [99 %]"]
    rows = [
        [
            who(one.baseline),
            escape(one.baseline.workload.name),
            count(batch_of(one)),
            f"{one.num_rounds} x {one.num_calls}",
            rate(one.rate) + (f" **{INVALID}**" if one.null_fault else ""),
            seconds(one.call_s),
            times(one.null),
        ]
        for one in found
    ]
    parts = [LEAD + table(header, rows, left=2), bullets(_speed_remarks(found)), _parts(found)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _speed_remarks(found: Sequence[TimedAlone]) -> Iterator[str]:
    yield f"Runs {run_list(i for one in found for i in one.run_ids)}. Warm-up rounds are not in these figures."
    methods = {method_line(one.rate.estimate) for one in found if one.rate.estimate}
    yield from (f"{method}." for method in sorted(methods))
    not_resampled = [one.num_launches for one in found if not _resamples_launches(one)]
    if not_resampled:
        yield f"{plural(min(not_resampled), 'launch', 'launches')}: variation between launches was not measured."
    for one in found:
        name = f"{who(one.baseline)}, {one.baseline.workload.kind}, batch {batch_of(one)}"
        said = [] if one.complete else ["**the run is INCOMPLETE**"]
        said += [f"{one.num_dropped_rounds} rounds are not complete and are left out"] if one.num_dropped_rounds else []
        said += [f"{void_text(one.num_timed, one.faults)} and are left out"] if one.faults else []
        said += [f"{INVALID}: {escape(fact_text(one.null_fault))}"] if one.null_fault else []
        said += [f"{NONE}: {escape(found.reason)}" for found in (one.rate, one.null) if found.reason]
        yield from (f"{name}: {words}." for words in said)


def _resamples_launches(one: TimedAlone) -> bool:
    serial = None if one.rate.estimate is None else one.rate.estimate.serial
    return one.num_launches >= stats.MIN_LAUNCHES if serial is None else serial.launches


def _parts(found: Sequence[TimedAlone]) -> str:
    """Counts, and the parts of decoding that were timed alone with what they explain."""
    header = ["model", "batch", "prompts timed", "useful tokens", "context forwards", "tokens per forward"]
    header += ["ended by EOS / stop / length", "measured", "predicted", "residual"]
    rows, phases = [], []
    for one in found:
        counts = one.counts
        ends = " / ".join(count(counts.num_finished[reason]) for reason in ("eos", "stop", "length"))
        per_forward = NONE if counts.tokens_per_forward is None else f"{counts.tokens_per_forward:.2f}"
        row = [who(one.baseline), count(batch_of(one)), count(counts.num_prompts), count(counts.num_tokens)]
        rows.append([*row, count(counts.num_context_forwards), per_forward, ends, *explained(one.costs)])
        phases += list(_phase_rows(one.costs))
    body = table(header, rows)
    if phases:
        names = ["part", "rows", "context tokens", "ms per pass [interval]", "level", "rounds"]
        body += f"\nWhat each part costs:\n\n{table(names, phases)}"
    reasons = sorted({one.costs.reason for one in found if one.costs.reason})
    body += "".join(f"\nNo explanation of the times: {escape(reason)}.\n" for reason in reasons)
    return details("Tokens, forwards and what they cost", body)


def _phase_rows(costs: ArmCosts) -> Iterator[list[str]]:
    for phase in costs.phases:
        ms = phase.seconds
        spread = f"{1e3 * ms.value:.3g} [{1e3 * ms.low:.3g}, {1e3 * ms.high:.3g}]"
        yield [
            PARTS[phase.part],
            count(phase.num_rows),
            count(phase.context_tokens),
            spread,
            percent(ms.level),
            count(ms.n),
        ]


def degenerate_alone(runs: Runs) -> str:
    """How many outputs of the models measured alone are degenerate; empty where none was kept."""
    rows = [
        [who(one.cell), "whole tasks", *_share(one.flagged), code(one.run_id)]
        for one in runs.scored_alone
        if one.flagged.num_outputs and one.cell.workload.kind == "task"
    ]
    for one in runs.timed_alone:
        if one.flagged.num_outputs:
            outputs = f"{one.baseline.workload.kind}, batch {batch_of(one)}"
            rows.append([who(one.baseline), outputs, *_share(one.flagged), run_list(one.run_ids)])
    return table(["model", "outputs of", "n", "degenerate", "run"], rows, left=2) if rows else ""


def _share(flagged: FlaggedAlone) -> list[str]:
    share = percent(flagged.num_degenerate / flagged.num_outputs)
    return [count(flagged.num_outputs), f"{count(flagged.num_degenerate)} ({share})"]


def score_rows(run: Run) -> Iterator[Row]:
    """Every score of one model alone and every group's figure, with its interval; ``members`` are the group's."""
    groups: dict[tuple[str, str, str, str], list[Score]] = {}
    for score in current_scores(run):
        groups.setdefault((score.cell, score.task, score.metric, score.filter), []).append(score)
    for (cell_id, task, metric, filter_), scores in groups.items():
        figure, interval = score_of(scores, run)
        num_missing = 0 if is_whole(scores[0]) else sum(score.value is None for score in scores)
        yield {
            **_scored_columns(run, run.cells[cell_id]),
            "task": task,
            "members": None,
            "metric": metric,
            "filter": filter_,
            "aggregation": scores[0].aggregation or MEAN,
            "scored_by": scores[0].scored_by,
            "headline": scores[0].headline,
            "num_documents": len(scores) - num_missing,
            "num_documents_without_value": num_missing,
            "score": figure.value,
            **ends("score", interval),
        }
    yield from (_group_row(run, one) for one in group_scores(run))


def _scored_columns(run: Run, cell: Cell) -> Row:
    return {
        "run": run.manifest.run_id,
        "complete": run.complete,
        **operating_point(cell),
        "outputs": "whole_tasks" if cell.workload.kind == "task" else "timed",
        "batch_size": cell.workload.batch_size,
    }


def _group_row(run: Run, one: GroupScore) -> Row:
    return {
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
    }


def speed_row(one: TimedAlone) -> Row:
    return {
        "runs": " ".join(one.run_ids),
        "complete": one.complete,
        **operating_point(one.baseline),
        "workload": one.baseline.workload.kind,
        "batch_size": one.baseline.workload.batch_size,
        "num_rounds": one.num_rounds,
        "num_calls": one.num_calls,
        "num_launches": one.num_launches,
        **measured_columns("tokens_per_s", one.rate),
        "call_s": one.call_s,
        **measured_columns("against_itself", one.null),
        "invalid_reason": None if one.null_fault is None else fact_text(one.null_fault),
        **count_columns("model", one.counts),
        "latency_median_s": one.latency.median_s,
        "latency_p95_s": one.latency.p95_s,
        "num_outputs": one.flagged.num_outputs,
        "num_degenerate": one.flagged.num_degenerate,
    }
