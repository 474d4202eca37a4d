"""The section that says what was run on what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from twotower_eval.analyse.compare.alone import is_alone
from twotower_eval.analyse.compare.naming import checkpoint_name
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.sizing import is_sizing_run
from twotower_eval.analyse.report.reproduce import without_home
from twotower_eval.analyse.report.section import Section
from twotower_eval.analyse.report.text import NONE, bullets, code, count, details, escape, run_list, table
from twotower_eval.json_text import JsonObject
from twotower_eval.records import Cell, Checkpoint, DecoderSpec, FileDigest
from twotower_eval.shortfalls import asked_and_not_done, joined_lines
from twotower_eval.store import Run
from twotower_eval.ways import named_ways, ways_text

QUIET_EVENTS = {"started", "cell_done", "done", "truncated"}


def setup(runs: Runs) -> Section:
    """Checkpoints with their digests, documents, machine, packages, commit and seeds of every run."""
    parts = ["Checkpoints, each with the sha256 of its tensors:\n", _checkpoints(runs)]
    parts += [_run(run) for run in runs]
    return Section(title="Environment: what was run on what", markdown="\n".join(parts))


def _checkpoints(runs: Runs) -> str:
    used: dict[Checkpoint, set[str]] = {}
    for run in runs:
        for cell in run.manifest.cells:
            used.setdefault(cell.checkpoint, set()).add(_arm(run, cell))
    rows = []
    for checkpoint, arms in used.items():
        rows.append(
            [
                escape(checkpoint_name(checkpoint)),
                " and ".join(sorted(arms)),
                escape(checkpoint.family),
                escape(without_home(checkpoint.source)),
                code(checkpoint.revision) if checkpoint.revision else NONE,
                code(checkpoint.digest),
                escape(checkpoint.dtype),
                escape(", ".join(checkpoint.devices)),
            ]
        )
    header = ["checkpoint", "arm", "family", "source", "revision", "sha256", "dtype", "devices"]
    beside = list(dict.fromkeys(_files(checkpoint) for checkpoint in used if checkpoint.files))
    beside += dict.fromkeys(_code(cell.decoder) for run in runs for cell in run.manifest.cells if cell.decoder.code)
    return table(header, rows, left=len(header)) + (f"\n{bullets(beside)}" if beside else "")


def _files(checkpoint: Checkpoint) -> str:
    return f"{escape(checkpoint.name)} beside its tensors: {_digests(checkpoint.files)}"


def _code(decoder: DecoderSpec) -> str:
    return f"code of the decoder {escape(decoder.kind)}: {_digests(decoder.code or ())}"


def _digests(files: Sequence[FileDigest]) -> str:
    return ", ".join(f"{escape(file.name)} {code(file.sha256[:16])}" for file in files)


def _arm(run: Run, cell: Cell) -> str:
    """What a checkpoint was in a run."""
    if run.manifest.verb == "verify":
        return "checked"
    return "alone" if is_alone(run) else cell.arm


def _run(run: Run) -> str:
    manifest = run.manifest
    state = "complete" if run.complete else "**INCOMPLETE**"
    commit = code(manifest.commit) if manifest.commit else "unknown (installed package)"
    edited = {True: ", with uncommitted changes", False: "", None: ""}[manifest.dirty]
    events = [str(event.get("kind")) for event in run.events if event.get("kind") not in QUIET_EVENTS]
    facts = [
        f"verb {code(manifest.verb)}, started {escape(manifest.started_at)}, {state}",
        f"twotower-eval {escape(manifest.project_version)}, commit {commit}{edited}",
        f"machine: {_flat(manifest.machine)}",
        f"packages: {_flat(manifest.packages)}",
        *([f"steps: {_steps(manifest.plan)}"] if "cuda_graphs" in manifest.plan else []),
        f"seeds: {_flat(manifest.seeds)}",
        f"documents: {_documents(run)}",
        *(f"asked and not done: {escape(line)}" for line in asked_and_not_done(manifest)),
        *(f"near-duplicates: {escape(line)}" for line in joined_lines(manifest)),
        *(f"{escape(name)} was run {escape(ways_text(ways))}" for name, ways in named_ways(manifest)),
        *(f"note: {escape(note)}" for note in manifest.notes),
    ]
    if events:
        tally = ", ".join(f"{escape(kind)} {events.count(kind)}x" for kind in sorted(set(events)))
        facts.append(f"on the way: {tally}")
    plan_shown = {name: without_home(v) if isinstance(v, str) else v for name, v in manifest.plan.items()}
    plan = json.dumps(plan_shown, indent=1, sort_keys=True, ensure_ascii=False).replace("```", "` ` `")
    folded = details(f"plan (sha256 {manifest.plan_sha256[:16]})", f"```json\n{plan}\n```")
    return f"### Run {code(manifest.run_id)}\n\n{bullets(facts)}\n{folded}"


def _steps(plan: JsonObject) -> str:
    """Whether small steps were launched as a whole."""
    return "small ones of both arms from CUDA graphs" if plan["cuda_graphs"] else "not from CUDA graphs"


def _flat(values: JsonObject) -> str:
    """Nested facts on one line; what the system does not tell is said so."""
    parts = [f"{name.replace('_', ' ')} {_value(name, value)}" for name, value in values.items()]
    return escape("; ".join(parts)) or "none recorded"


def _value(name: str, value: object) -> str:
    if value is None:
        return "not told"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, Mapping) and "device" in value:
        facts = ", ".join(f"{inner} {_value(inner, item)}" for inner, item in value.items() if inner != "device")
        return f"{value['device']} ({facts})" if facts else str(value["device"])
    if isinstance(value, Mapping):
        return ", ".join(f"{inner} {_value(inner, item)}" for inner, item in value.items())
    if isinstance(value, (list, tuple)):
        return " and ".join(_value(name, item) for item in value)
    return str(value)


def _documents(run: Run) -> str:
    """Documents per task as scored (or prompts as timed), with the digest of the workload they are from."""
    if is_sizing_run(run):
        return "none: random weights answer nothing"
    cells = {cell.id: cell for cell in run.manifest.cells if cell.arm == "baseline"}
    texts = [_documents_of(run, cell) for cell in cells.values()]
    return "; ".join(texts) if texts else f"no baseline cell among {run_list([run.manifest.run_id])}"


def _documents_of(run: Run, cell: Cell) -> str:
    tasks: dict[str, set[int]] = {}
    for score in run.scores:
        if score.cell == cell.id:
            tasks.setdefault(score.task, set()).add(score.doc_id)
    samples = (sample for sample in run.speed if sample.cell == cell.id and sample.phase != "probe")
    prompts = {prompt.prompt_id for sample in samples for prompt in sample.prompts}
    counted = [f"{escape(task)} {count(len(ids))} documents" for task, ids in tasks.items()]
    if prompts:
        counted.append(f"{count(len(prompts))} prompts timed in batches of {cell.workload.batch_size}")
    digest = f"workload {escape(cell.workload.name)} {code(cell.workload.digest[:16])}"
    return f"{', '.join(counted) or 'nothing yet'} ({digest})"
