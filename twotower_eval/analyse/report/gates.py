"""The gates section: what must hold before a number is believed. And how each task was scored."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from twotower_eval.analyse.compare.alone import compares, is_alone
from twotower_eval.analyse.compare.clean import Flagged
from twotower_eval.analyse.compare.gaps import tells_digests
from twotower_eval.analyse.compare.points import Measured, QualityPoint
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.truncation import truncated
from twotower_eval.analyse.compare.witness import scored_witness_gates
from twotower_eval.analyse.report.alone import degenerate_alone, null_rows
from twotower_eval.analyse.report.section import Section
from twotower_eval.analyse.report.text import (
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
)
from twotower_eval.analyse.words import found_text, kind_text
from twotower_eval.analyse.words.contradictions import contradictions_text
from twotower_eval.analyse.words.gates import NO_DIGESTS
from twotower_eval.records import Check, Gate, GateKind, GateLimits
from twotower_eval.shortfalls import truncation_line
from twotower_eval.ways import ProofOutcome, named_ways, proof_outcome, ways_text

Row = list[str]
GATE_HEADER = ["gate", "outcome", "what was found", "run"]
OUTCOMES = {"passed": "passed", "failed": "**FAILED**", "not_checked": "not checked"}
ORDER = typing.get_args(GateKind)
OF_RUNS: tuple[GateKind, ...] = ("files_agree", "complete_run", "same_inputs", "whole_prompts", "verify")  # their rows
PROOF_WORDS: dict[ProofOutcome, str] = {"fastest": "passed", "slower": "slower way", "not checked": "not checked"}


def gates(runs: Runs) -> Section:
    """One row for each gate, then the shares of degenerate outputs with the figures on clean ones."""
    rows = [*_files_agree(runs), *_hashes(runs), *_whole_prompts(runs), *_ways(runs), *_witnessed(runs), *_timed(runs)]
    rows += [*_nulls_alone(runs), *_checks(runs)]
    verified = any(run.manifest.verb == "verify" for run in runs)
    missing = "" if verified else "Parity and batch logic were not checked: `twotower-eval verify` does it.\n"
    parts = [table(GATE_HEADER, rows, left=len(GATE_HEADER)), missing, _degenerate(runs)]
    return Section(title="Gates", markdown="\n".join(part for part in parts if part))


def _files_agree(runs: Runs) -> Iterator[Row]:
    for run in runs:
        run_id = run.manifest.run_id
        wrong, known = runs.contradictions.get(run_id, ()), tells_digests(run)
        found = "no file of the run contradicts another" + ("" if known else f"; {NO_DIGESTS}")
        found = escape(contradictions_text(wrong)) if wrong else found
        yield [
            "files agree",
            OUTCOMES["failed" if wrong else "passed" if known else "not_checked"],
            found,
            code(run_id),
        ]


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
            yield [f"{kind_text(gate.kind)}, scored", OUTCOMES[gate.outcome], escape(text), code(run.manifest.run_id)]


def _timed(runs: Runs) -> list[Row]:
    """The gates of timed points: faults and nulls one by one, the rest once for all points that it holds of."""
    found: dict[tuple[str, str, str, str, object], list[tuple[SpeedPoint, Gate]]] = {}
    for point in runs.speed:
        for gate in (gate for gate in point.gates if gate.kind not in OF_RUNS):
            is_null, failed = gate.kind == "aa_null", gate.outcome == "failed"
            where = f", {point.workload}, batch {point.batch_size}" if failed or is_null else ""
            which = f"{runs.name(point.candidate)}: " if failed and not is_null else ""
            same: object = gate.facts if failed or is_null else gate.facts.alike if gate.outcome != "passed" else ()
            found.setdefault((gate.kind, gate.outcome, where, which, same), []).append((point, gate))
    rows = []
    for (_, _, where, which, _), alike in found.items():
        gate = alike[0][1]
        more = "" if which or len(alike) == 1 else f"; likewise {plural(len(alike) - 1, 'more timed cell')}"
        run_ids = dict.fromkeys(run_id for point, gate in alike for run_id in gate.evidence or point.run_ids)
        text = escape(f"{which}{found_text(gate)}{more}")
        name = f"{kind_text(gate.kind)}{where}"
        rows.append((ORDER.index(gate.kind), [name, OUTCOMES[gate.outcome], text, code(" ".join(run_ids))]))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _ways(runs: Runs) -> Iterator[Row]:
    """How Hugging Face models proved to run rightly."""
    for run in runs:
        for name, ways in named_ways(run.manifest):
            yield [
                "proved against whole rows",
                PROOF_WORDS[proof_outcome(ways)],
                f"{escape(name)}: {escape(ways_text(ways))}",
                code(run.manifest.run_id),
            ]


def _nulls_alone(runs: Runs) -> Iterator[Row]:
    """The nulls of models that were measured alone."""
    for gate, fault, found, run in null_rows(runs):
        yield [gate, OUTCOMES["failed" if fault else "passed"], f"{found}; {escape(fault)}" if fault else found, run]


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
    header = [runs.point_header, "outputs", "n", "baseline flagged", "candidate flagged", "difference [95 %]"]
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
