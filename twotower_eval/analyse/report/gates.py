"""The gates section: what must hold before a number is believed. And how each task was scored."""

from __future__ import annotations

import typing
from collections.abc import Iterator

import pandas as pd

from twotower_eval.analyse.compare.contradiction import tells_digests
from twotower_eval.analyse.compare.documents import truncated
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.points import QualityPoint
from twotower_eval.analyse.compare.runs import Runs, compares, is_alone
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.witness import scored_witness_gates
from twotower_eval.analyse.report.alone import batch_of, degenerate_alone
from twotower_eval.analyse.report.rendering import (
    Column,
    Raw,
    Show,
    frame_of,
    ids,
    interval,
    markdown,
    metric,
    raw_rows,
    scored_by,
    share,
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
    details,
    escape,
    measured_columns,
    retention,
    significant,
    times,
)
from twotower_eval.analyse.words import fact_text, found_text, kind_text
from twotower_eval.analyse.words.gates import NO_DIGESTS, contradictions_text
from twotower_eval.names import plural
from twotower_eval.records import Gate, GateKind, GateLimits
from twotower_eval.rules import ProofOutcome, load_text, named_ways, proof_outcome, truncation_line, ways_text

OUTCOMES = {"passed": "passed", "failed": "**FAILED**", "not_checked": "not checked", "slower": "slower way"}
ORDER = typing.get_args(GateKind)
OF_RUNS: tuple[GateKind, ...] = ("files_agree", "complete_run", "same_inputs", "whole_prompts", "verify")  # their rows
PROOFS: dict[ProofOutcome, str] = {"fastest": "passed", "slower": "slower", "not checked": "not_checked"}


def gates(runs: Runs) -> Section:
    """A table of gates, then shares of degenerate outputs with the figures on clean ones."""
    frame = gate_frame(runs)
    verified = any(run.manifest.verb == "verify" for run in runs)
    missing = "" if verified else "Parity and batch logic were not checked: `twotower-eval verify` does it.\n"
    flagged = _flagged_frame(runs)
    of_one, flagged_alone = degenerate_alone(runs)
    parts = [_gate_table(frame), missing, _degenerate(runs, flagged, of_one)]
    tables = {"gates": frame, "degenerate_outputs": flagged, "degenerate_outputs_alone": flagged_alone}
    return Section(title="Gates", markdown="\n".join(part for part in parts if part), tables=tables)


def gate_frame(runs: Runs) -> pd.DataFrame:
    """One row for each gate: its outcome, and what was found in words or, of nulls and checks, in numbers."""
    rows = [*_files_agree(runs), *_hashes(runs), *_whole_prompts(runs), *_ways(runs), *_witnessed(runs), *_timed(runs)]
    blank = {"value": None, "limit": None, **measured_columns("against_itself", Measured(estimate=None))}
    blank |= {"num_rounds": None, "num_calls": None}
    return frame_of({**_row("", "", None, ""), **blank, **row} for row in [*rows, *_nulls_alone(runs), *_checks(runs)])


def _gate_table(frame: pd.DataFrame) -> str:
    columns = [
        Column(header="gate", show=words("gate")),
        Column(header="outcome", show=lambda row: OUTCOMES[row["outcome"]]),
        Column(header="what was found", show=_found),
        Column(header="run", show=ids("run")),
    ]
    return markdown(frame, columns, left=len(columns))


def _found(row: Raw) -> str:
    parts = [] if row["found"] is None else [escape(row["found"])]
    if row["against_itself"] is not None:
        null, calls = (
            interval("against_itself", times)(row),
            f"{int(row['num_rounds'])} rounds of {int(row['num_calls'])}",
        )
        parts.insert(0, f"the model against itself {null} (99 %), {calls} calls")
    numbers = [f"{name} {significant(row[name])}" for name in ("value", "limit") if row[name] is not None]
    return "; ".join(parts) + (f" ({', '.join(numbers)})" if numbers else "")


def _files_agree(runs: Runs) -> Iterator[Row]:
    for run in runs:
        run_id = run.manifest.run_id
        wrong, known = runs.contradictions.get(run_id, ()), tells_digests(run)
        found = "no file of the run contradicts another" + ("" if known else f"; {NO_DIGESTS}")
        found = contradictions_text(wrong) if wrong else found
        yield _row("files agree", "failed" if wrong else "passed" if known else "not_checked", found, run_id)


def _row(gate: str, outcome: str, found: str | None, run: str) -> Row:
    return {"gate": gate, "outcome": outcome, "found": found, "run": run}


def _hashes(runs: Runs) -> Iterator[Row]:
    """Pairs with unlike hashes are an error before any report, so what is here has passed."""
    for run in filter(compares, runs):
        num_scores = len({(score.task, score.doc_id) for score in run.scores})
        if num_scores:
            found = f"documents, prompts and targets of {count(num_scores)} items agree between the arms"
            yield _row("same documents, same prompts", "passed", found, run.manifest.run_id)


def _whole_prompts(runs: Runs) -> Iterator[Row]:
    """Whether any prompt lost its beginning; a fixed workload's are as long as it says."""
    for run in runs:
        if all(cell.workload.kind not in ("task", "answer") for cell in run.manifest.cells):
            continue
        found = truncated(run)
        arms = {"baseline": "the model" if is_alone(run) else "baseline", "candidate": "candidate"}
        cut = [(one.task, arms[one.arm], one.num_requests, one.num_truncated) for one in found if one.num_truncated]
        outcome = "failed" if cut else "passed" if found else "not_checked"
        lines = [truncation_line(*one) for one in dict.fromkeys(cut)]
        none = "no prompt was cut" if found else "prompts that were cut were not counted in this run"
        yield _row("whole prompts", outcome, "; ".join(lines) or none, run.manifest.run_id)


def _witnessed(runs: Runs) -> Iterator[Row]:
    """Whether scored answers were computed: each point that fails, the rest of a run once."""
    for run in runs:
        of_run = [point for point in runs.quality if point.run_id == run.manifest.run_id and not point.timed]
        found = [(runs.name(p.candidate), g) for p in of_run for g in scored_witness_gates([run], p, GateLimits())]
        rows: dict[tuple[str, str, str], tuple[str, Gate]] = {}
        for name, gate in found:
            rows.setdefault((gate.kind, gate.outcome, name if gate.outcome == "failed" else ""), (name, gate))
        for name, gate in rows.values():
            more = sum(other.kind == gate.kind and other.outcome == gate.outcome for _, other in found) - 1
            alone = gate.outcome == "failed" or not more
            text = f"{name}: {found_text(gate)}" + ("" if alone else f"; likewise {plural(more, 'more point')}")
            text = found_text(gate) if gate.outcome == "not_checked" else text
            yield _row(f"{kind_text(gate.kind)}, scored", gate.outcome, text, run.manifest.run_id)


def _timed(runs: Runs) -> list[Row]:
    """The gates of timed points: faults and nulls one by one, any other once for all points alike."""
    found: dict[tuple[str, str, str, str, object], list[tuple[SpeedPoint, Gate]]] = {}
    for point in runs.speed:
        for gate in (gate for gate in point.gates if gate.kind not in OF_RUNS):
            is_null, failed = gate.kind == "aa_null", gate.outcome == "failed"
            where = f", {point.workload}, {load_text(point.candidate.workload)}" if failed or is_null else ""
            which = f"{runs.name(point.candidate)}: " if failed and not is_null else ""
            same: object = gate.facts if failed or is_null else gate.facts.alike if gate.outcome != "passed" else ()
            found.setdefault((gate.kind, gate.outcome, where, which, same), []).append((point, gate))
    rows = []
    for (_, _, where, which, _), alike in found.items():
        gate = alike[0][1]
        more = "" if which or len(alike) == 1 else f"; likewise {plural(len(alike) - 1, 'more timed cell')}"
        run_ids = dict.fromkeys(run_id for point, gate in alike for run_id in gate.evidence or point.run_ids)
        row = _row(
            f"{kind_text(gate.kind)}{where}", gate.outcome, f"{which}{found_text(gate)}{more}", " ".join(run_ids)
        )
        rows.append((ORDER.index(gate.kind), row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _ways(runs: Runs) -> Iterator[Row]:
    """How Hugging Face models proved to run rightly."""
    for run in runs:
        for name, ways in named_ways(run.manifest):
            outcome, found = PROOFS[proof_outcome(ways)], f"{name}: {ways_text(ways)}"
            yield _row("proved against whole rows", outcome, found, run.manifest.run_id)


def _nulls_alone(runs: Runs) -> Iterator[Row]:
    """The nulls of models that were measured alone."""
    for one in runs.timed_alone:
        fault = None if one.null_fault is None else fact_text(one.null_fault)
        faults = [text for text in (one.null.reason, fault) if text]
        gate = f"A/A null, {one.baseline.workload.kind}, batch {batch_of(one)}"
        row = _row(gate, "failed" if fault else "passed", "; ".join(faults) or None, " ".join(one.run_ids))
        measured = measured_columns("against_itself", one.null)
        yield {**row, **measured, "num_rounds": one.num_rounds, "num_calls": one.num_calls}


def _checks(runs: Runs) -> Iterator[Row]:
    for run in runs:
        for check in run.checks:
            row = _row(check.name.replace("_", " "), check.outcome, check.detail, run.manifest.run_id)
            yield {**row, "value": check.value, "limit": check.limit}


def _flagged_frame(runs: Runs) -> pd.DataFrame:
    """One row for each point whose outputs were kept: shares of degenerate ones, and figures with and without them."""
    points: list[QualityPoint | SpeedPoint] = [*runs.quality, *runs.speed]
    return frame_of(_flag_row(runs, point) for point in points if point.flagged.num_outputs)


def _degenerate(runs: Runs, frame: pd.DataFrame, alone: str) -> str:
    """The table of degenerate outputs; ``alone`` is that of models measured alone."""
    if frame.empty and not alone:
        return "No outputs were kept, so none was looked at for degeneration.\n"
    lead = (
        "Degenerate outputs: empty, ending in a loop, compressible like one, full of repeated n-grams, or going on "
        "with junk behind the answer.\n"
    )
    if frame.empty:
        return f"{lead}\n{alone}"
    lead = lead.rstrip() + (
        " Figures on clean outputs leave out whatever is flagged in either arm; they are *conditional, diagnostic "
        "only*, and no verdict rests on them.\n"
    )
    columns = [
        Column(header=runs.point_header, show=words("operating_point")),
        Column(header="outputs", show=_outputs),
        Column(header="n", show=whole("num_outputs")),
        Column(header="baseline flagged", show=share("baseline_share")),
        Column(header="candidate flagged", show=share("candidate_share")),
        Column(header="difference [95 %]", show=interval("difference", _points)),
        Column(header="on all outputs", show=_figure("all")),
        Column(header="on clean outputs", show=_figure("clean")),
        Column(header="run", show=ids("runs")),
    ]
    body = markdown(frame, columns, left=2)
    body = body if len(frame) <= 4 else details(f"Flagged shares at {len(frame)} points", body)
    return f"{lead}\n{body}" + (f"\n{alone}" if alone else "")


def _flag_row(runs: Runs, point: QualityPoint | SpeedPoint) -> Row:
    of_scores = isinstance(point, QualityPoint)
    figures = (
        (point.headline, point.clean.headline) if isinstance(point, QualityPoint) else (point.time, point.clean.time)
    )
    return {
        "operating_point": runs.name(point.candidate),
        "quantity": "retention" if of_scores else "time_speedup",
        "workload": point.candidate.workload.kind,
        "batch_size": point.candidate.workload.batch_size,
        "num_outputs": point.flagged.num_outputs,
        "baseline_share": point.flagged.baseline,
        "candidate_share": point.flagged.candidate,
        **measured_columns("difference", point.flagged.difference),
        **measured_columns("all", figures[0]),
        **measured_columns("clean", figures[1]),
        "invalid": isinstance(point, SpeedPoint) and point.invalid,
        "runs": point.run_id if isinstance(point, QualityPoint) else " ".join(point.run_ids),
    }


def _outputs(row: Raw) -> str:
    if row["quantity"] == "time_speedup":
        return f"{row['workload']}, batch {int(row['batch_size'] or 1)}: S_time"
    timed = row["workload"] != "task"
    return f"timed, batch {int(row['batch_size'])}: scores" if timed else "whole tasks: scores"


def _figure(name: str) -> Show:
    """Retention, or a speedup that may be INVALID."""
    kept, faster = interval(name, retention), speedup_or_invalid(name)
    return lambda row: (kept if row["quantity"] == "retention" else faster)(row)


def _points(difference: Measured) -> str:
    found = difference.estimate
    if found is None:
        return NONE
    return f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def scoring(runs: Runs) -> Section:
    """How each task was scored, once per task."""
    title = "How each task was scored"
    frame = scoring_frame(runs)
    if frame.empty:
        return Section(title=title, markdown="Nothing has been scored in both arms.\n")
    columns = [
        Column(header="task", show=words("task")),
        Column(header="scored by", show=scored_by),
        Column(header="metric (filter)", show=metric),
        Column(header="candidate's decoder has a part in it", show=_part_of_decoder),
    ]
    remarks = [
        "Scored by generation: the candidate's decoder wrote the text that is scored.",
        "Scored by the context tower's likelihood: the decoder has no part in it; where the tower's tensors are the "
        "baseline's own, one computation serves both arms and retention is 100 % by construction.",
    ]
    rows = raw_rows(frame)
    order = sorted(range(len(rows)), key=lambda i: [column.show(rows[i]) for column in columns])
    body = markdown(frame.iloc[order], columns, left=len(columns))
    return Section(title=title, markdown=f"{body}\n{bullets(remarks)}", tables={"scoring": frame})


def scoring_frame(runs: Runs) -> pd.DataFrame:
    """One row for each way in which a task was scored."""
    rows = [
        {
            "task": task.name,
            "scored_by": " + ".join(task.scored_by),
            "metric": task.metric,
            "filter": task.filter,
            "exercises_decoder": task.exercises_decoder,
            "equal_by_construction": task.equal_by_construction,
        }
        for point in runs.quality
        for task in point.tasks
    ]
    return frame_of(rows).drop_duplicates(ignore_index=True)


def _part_of_decoder(row: Raw) -> str:
    equal = ": equal by construction" if row["equal_by_construction"] else ""
    return ("yes" if row["exercises_decoder"] else "no") + equal
