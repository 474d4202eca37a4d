"""The gates section: what must hold before a number is believed. And how each task was scored."""

from __future__ import annotations

from collections.abc import Iterator

from twotower_eval.claims import halves
from twotower_eval.evidence.alone import compares, is_alone
from twotower_eval.evidence.busy import Busy, busy_faults, busy_of, busy_text
from twotower_eval.evidence.clean import Flagged
from twotower_eval.evidence.consistency import contradictions_text
from twotower_eval.evidence.points import Measured, QualityPoint
from twotower_eval.evidence.residual import fault_text, residual_text
from twotower_eval.evidence.runs import Runs
from twotower_eval.evidence.timing import SpeedPoint
from twotower_eval.evidence.truncation import truncated
from twotower_eval.evidence.unseen import unseen_text
from twotower_eval.records import Check, Gate, GateLimits
from twotower_eval.report.alone import degenerate_alone, null_rows
from twotower_eval.report.section import Section
from twotower_eval.report.text import (
    NONE,
    bullets,
    code,
    count,
    details,
    escape,
    percent,
    plural,
    retention,
    scored_by_words,
    significant,
    speedup,
    table,
    times,
)
from twotower_eval.shortfalls import truncation_line
from twotower_eval.times import void_text
from twotower_eval.ways import ProofOutcome, handicap_text, named_ways, proof_outcome, ways_text

Row = list[str]
GATE_HEADER = ["gate", "outcome", "what was found", "run"]
OUTCOMES = {"passed": "passed", "failed": "**FAILED**", "not_checked": "not checked"}
PROOF_WORDS: dict[ProofOutcome, str] = {"fastest": "passed", "slower": "slower way", "not checked": "not checked"}


def gates(runs: Runs) -> Section:
    """One row for each gate, then the shares of degenerate outputs with the figures on clean ones."""
    rows = [*_files_agree(runs), *_hashes(runs), *_whole_prompts(runs), *_answers(runs), *_ways(runs), *_nulls(runs)]
    rows += [*_residuals(runs), *_busy(runs), *_probes(runs), *_checks(runs)]
    verified = any(run.manifest.verb == "verify" for run in runs)
    missing = "" if verified else "Parity and batch logic were not checked: `twotower-eval verify` does it.\n"
    parts = [table(GATE_HEADER, rows, left=len(GATE_HEADER)), missing, _degenerate(runs)]
    return Section(title="Gates", markdown="\n".join(part for part in parts if part))


def _files_agree(runs: Runs) -> Iterator[Row]:
    for run in runs:
        run_id = run.manifest.run_id
        wrong = runs.contradictions.get(run_id, ())
        found = escape(contradictions_text(wrong)) if wrong else "no file of the run contradicts another"
        yield ["files agree", OUTCOMES["failed" if wrong else "passed"], found, code(run_id)]


def _hashes(runs: Runs) -> Iterator[Row]:
    """Pairs with unlike hashes are an error before any report, so what is here has passed."""
    for run in filter(compares, runs):
        num_scores = len({(score.task, score.doc_id) for score in run.scores})
        if num_scores:
            found = f"documents, prompts and targets of {count(num_scores)} items agree between the arms"
            yield ["same documents, same prompts", "passed", found, code(run.manifest.run_id)]


def _whole_prompts(runs: Runs) -> Iterator[Row]:
    """Whether any prompt lost its beginning; a fixed workload's are as long as it says."""
    for run in runs:
        if all(cell.workload.kind not in ("task", "answer") for cell in run.manifest.cells):
            continue
        found = truncated(run)
        arms = {"baseline": "the model" if is_alone(run) else "baseline", "candidate": "candidate"}
        cut = [(one.task, arms[one.arm], one.num_requests, one.num_truncated) for one in found if one.num_truncated]
        outcome = OUTCOMES["failed" if cut else "passed" if found else "not_checked"]
        lines = [escape(truncation_line(*one)) for one in dict.fromkeys(cut)]
        none = "no prompt was cut" if found else "prompts that were cut were not counted in this run"
        yield ["whole prompts", outcome, "; ".join(lines) or none, code(run.manifest.run_id)]


def _answers(runs: Runs) -> Iterator[Row]:
    """Whether timed answers are alike from round to round, and those that were scored; what is in order in one row."""
    found: dict[tuple[str, str, str], list[Gate]] = {}
    for point in runs.speed:
        quality = [one for one in runs.quality if one.key == point.key]
        for gate in halves.speed_gates(runs, quality, point, GateLimits()):
            each = f"{runs.name(point.candidate)}, {point.workload}, batch {point.batch_size}: "
            key = each if gate.outcome == "failed" else ""
            found.setdefault((gate.name, gate.outcome, key), []).append(gate)
    for (name, outcome, which), alike in found.items():
        more = f"; likewise {plural(len(alike) - 1, 'more timed cell')}" if len(alike) > 1 else ""
        run_ids = dict.fromkeys(run_id for gate in alike for run_id in gate.evidence)
        yield [name, OUTCOMES[outcome], escape(f"{which}{alike[0].detail}{more}"), code(" ".join(run_ids))]


def _ways(runs: Runs) -> Iterator[Row]:
    """How Hugging Face models proved to run rightly; and speedups over one that was slowed by it."""
    for run in runs:
        for name, ways in named_ways(run.manifest):
            yield [
                "proved against whole rows",
                PROOF_WORDS[proof_outcome(ways)],
                f"{escape(name)}: {escape(ways_text(ways))}",
                code(run.manifest.run_id),
            ]
    for point in runs.speed:
        if point.handicaps:
            gate = f"timed in the fastest way, {point.workload}, batch {point.batch_size}"
            found = escape(handicap_text(point.handicaps))
            yield [gate, OUTCOMES["failed"], found, code(" ".join(point.run_ids))]


def _nulls(runs: Runs) -> Iterator[Row]:
    seen = set()
    for point in runs.speed:
        if (point.baseline.id, point.run_ids) in seen:
            continue
        seen.add((point.baseline.id, point.run_ids))
        yield _null(point)
    for gate, fault, found, run in null_rows(runs):
        yield [gate, OUTCOMES["failed" if fault else "passed"], f"{found}; {escape(fault)}" if fault else found, run]


def _busy(runs: Runs) -> Iterator[Row]:
    """Whether both arms worked all the time: the points where one did not, or the one that was nearest to it. Nothing
    of runs that do not tell."""
    found = [(point, busy) for point in runs.speed if isinstance(busy := busy_of(runs, point), Busy)]
    failed = [(point, faults) for point, busy in found if (faults := busy_faults(busy, GateLimits()))]
    for point, faults in failed:
        gate = f"busy arms, {point.workload}, batch {point.batch_size}"
        yield [gate, OUTCOMES["failed"], escape("; ".join(faults)), code(" ".join(point.run_ids))]
    if found and not failed:
        point, least = min(found, key=lambda one: min(one[1].share))
        of_all = f" (the least of {count(len(found))} points)" if len(found) > 1 else ""
        yield ["busy arms", OUTCOMES["passed"], f"{busy_text(least)}{of_all}", code(" ".join(point.run_ids))]


def _probes(runs: Runs) -> Iterator[Row]:
    """Impossible times, and whether anything was remembered, by the limits of a claim that names none."""
    limits = GateLimits()
    for point in runs.speed:
        where, run_ids = f"{point.workload}, batch {point.batch_size}", code(" ".join(point.run_ids))
        if point.faults:
            outcome = OUTCOMES["failed" if point.too_many_faults(limits) else "passed"]
            yield [f"possible times, {where}", outcome, escape(void_text(point.num_paired, point.faults)), run_ids]
        if point.unseen.num_new:
            outcome = OUTCOMES["passed" if point.unseen.checked else "not_checked"]
            if point.unseen.remembered(limits.seen_gain):
                outcome = OUTCOMES["failed"]
            found = escape(f"{runs.name(point.candidate)}: {unseen_text(point.unseen, limits.seen_gain)}")
            yield [f"new prompts take as long as seen ones, {where}", outcome, found, run_ids]


def _null(point: SpeedPoint) -> Row:
    """The null of one baseline cell, by itself; a claim holds its width against the speedup that it claims, too."""
    found = f"baseline against itself {times(point.null)} (99 %), {point.num_rounds} rounds of {point.num_calls} calls"
    outcome = "passed"
    if point.null.estimate is None:
        outcome, found = "not checked", escape(point.null.reason or "")
    if point.null_fault is not None:
        outcome = OUTCOMES["failed"]
        found += "; " + escape(point.null_fault)
    gate = f"A/A null, {point.workload}, batch {point.batch_size}"
    return [gate, outcome, found, code(" ".join(point.run_ids))]


def _residuals(runs: Runs) -> Iterator[Row]:
    """Whether the times of both arms fit their forwards: the faults one by one, the rest once for each batch size."""
    known: dict[tuple[str, int, tuple[str, ...]], list[SpeedPoint]] = {}
    for point in runs.speed:
        known.setdefault((point.workload, point.batch_size, point.run_ids), []).append(point)
    for (workload, batch_size, run_ids), points in known.items():
        gate, run = f"times fit forwards, {workload}, batch {batch_size}", code(" ".join(run_ids))
        for point in points:
            for fault in point.residual_faults:
                found = f"{escape(runs.name(point.candidate))}: {escape(fault_text(fault))}"
                yield [gate, OUTCOMES["failed"], found, run]
        fitting = [point for point in points if not point.residual_faults]
        wholes = [one.whole for point in fitting for one in point.costs.residuals.values()]
        reasons = list(dict.fromkeys(escape(str(one.reason)) for one in wholes if one.estimate is None))
        if reasons:
            yield [gate, OUTCOMES["not_checked"], "; ".join(reasons), run]
        elif wholes:
            off = max((one.estimate for one in wholes if one.estimate), key=lambda found: abs(found.value))
            found = f"the largest residual of {count(len(fitting))} points is {residual_text(off)}"
            yield [gate, OUTCOMES["passed"], found, run]


def _checks(runs: Runs) -> Iterator[Row]:
    for run in runs:
        for check in run.checks:
            name = escape(check.name.replace("_", " "))
            yield [name, OUTCOMES[check.outcome], _found(check), code(run.manifest.run_id)]


def _found(check: Check) -> str:
    numbers = [
        f"{word} {significant(v)}" for word, v in (("value", check.value), ("limit", check.limit)) if v is not None
    ]
    return escape(check.detail) + (f" ({', '.join(numbers)})" if numbers else "")


def _degenerate(runs: Runs) -> str:
    rows = [row for point in runs.quality if point.flagged.num_outputs for row in [_flag_row(runs, point)]]
    rows += [row for point in runs.speed if point.flagged.num_outputs for row in [_flag_row(runs, point)]]
    alone = degenerate_alone(runs)
    if not rows and not alone:
        return "No outputs were kept, so none was looked at for degeneration.\n"
    lead = (
        "Degenerate outputs: empty, ending in a loop, compressible like one, full of repeated n-grams, or going on "
        "with junk behind the answer.\n"
    )
    if not rows:
        return f"{lead}\n{alone}"
    lead = lead.rstrip() + (
        " Figures on clean outputs leave out whatever is flagged in either arm; they are *conditional, diagnostic "
        "only*, and no verdict rests on them.\n"
    )
    header = ["block, steps, threshold", "outputs", "n", "baseline flagged", "candidate flagged", "difference [95 %]"]
    header += ["on all outputs", "on clean outputs", "run"]
    body = table(header, rows, left=2)
    body = body if len(rows) <= 4 else details(f"Flagged shares at {len(rows)} points", body)
    return f"{lead}\n{body}" + (f"\n{alone}" if alone else "")


def _flag_row(runs: Runs, point: QualityPoint | SpeedPoint) -> Row:
    if isinstance(point, QualityPoint):
        kind = f"timed, batch {point.candidate.workload.batch_size}: scores" if point.timed else "whole tasks: scores"
        figures, run_ids = [retention(point.headline), retention(point.clean.headline)], [point.run_id]
    else:
        kind = f"{point.workload}, batch {point.batch_size}: S_time"
        figures, run_ids = [speedup(point, point.time), speedup(point, point.clean.time)], list(point.run_ids)
    return [escape(runs.name(point.candidate)), kind, *_shares(point.flagged), *figures, code(" ".join(run_ids))]


def _shares(flagged: Flagged) -> Row:
    shares = [NONE if share is None else percent(share) for share in (flagged.baseline, flagged.candidate)]
    return [count(flagged.num_outputs), *shares, _points(flagged.difference)]


def _points(difference: Measured) -> str:
    found = difference.estimate
    if found is None:
        return NONE
    return f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def scoring(runs: Runs) -> Section:
    """How each task was scored, once per task."""
    title = "How each task was scored"
    rows: list[Row] = []
    for point in runs.quality:
        for task in point.tasks:
            filtered = f" ({escape(task.filter)})" if task.filter != "none" else ""
            part = "yes" if task.exercises_decoder else "no"
            if task.equal_by_construction:
                part += ": equal by construction"
            row = [escape(task.name), scored_by_words(task.scored_by), escape(task.metric) + filtered, part]
            if row not in rows:
                rows.append(row)
    if not rows:
        return Section(title=title, markdown="Nothing has been scored in both arms.\n")
    header = ["task", "scored by", "metric (filter)", "candidate's decoder has a part in it"]
    remarks = [
        "Scored by generation: the candidate's decoder wrote the text that is scored.",
        "Scored by the context tower's likelihood: the decoder has no part in it; where the tower's tensors are the "
        "baseline's own, one computation serves both arms and retention is 100 % by construction.",
    ]
    return Section(title=title, markdown=f"{table(header, sorted(rows), left=len(header))}\n{bullets(remarks)}")
