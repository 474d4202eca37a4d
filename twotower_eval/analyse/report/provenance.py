"""What was run on what, how the candidate learned, and the command lines that do it again."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, TypedDict, cast, get_args

import pandas as pd

from twotower_eval.analyse.compare.points import checkpoint_name
from twotower_eval.analyse.compare.runs import Runs, is_alone
from twotower_eval.analyse.compare.sizing import is_sizing_run
from twotower_eval.analyse.report.plots import COLOURS, GREY, png
from twotower_eval.analyse.report.rendering import Column, frame_of, ids, markdown, optional, words
from twotower_eval.analyse.report.text import Section, bullets, code, count, details, escape, run_list
from twotower_eval.decoder_settings import USUAL, given_settings, set_text
from twotower_eval.errors import UserError
from twotower_eval.names import plural
from twotower_eval.plan import AnyPlan, RunPlan, SizingPlan, SpeedPlan, VerifyPlan
from twotower_eval.plan_baselines import MODEL, ONE, SEVERAL, Table, table_text
from twotower_eval.plan_files import plan_from_json
from twotower_eval.records import (
    Arm,
    Cell,
    Checkpoint,
    DecoderSpec,
    FileDigest,
    RunManifest,
    ServedModel,
    sizing_config,
)
from twotower_eval.rules import (
    asked_and_not_done,
    chat_facts,
    chat_lines,
    chosen_lines,
    joined_lines,
    named_ways,
    ways_text,
)
from twotower_eval.store import TRAINING_LOG, Run
from twotower_eval.store.journal import read_objects
from twotower_eval.strict import JsonObject
from twotower_eval.task_options import GenKwargs, gen_kwargs_text
from twotower_eval.usual import has_own_form, relation, usual_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Row(TypedDict, total=False):
    """A line of the log: a loss while a stage trained, or a point of the learning curve."""

    stage: str
    num_tokens: int
    loss_nats: float
    retention: float
    tokens_per_nfe: float
    threshold: float


def training(runs: Runs) -> Section:
    """Loss curves and the learning curve in the terms of the claim; nothing for a checkpoint without a log."""
    title = "How the candidate learned"
    logs = ([cast(Row, row) for _, row in read_objects(run.path / TRAINING_LOG)] for run in runs.whole)
    rows = next(filter(None, logs), None)
    if rows is None:
        return Section(title=title, markdown="No training log lay beside the candidate's weights.\n")
    points = [row for row in rows if row.get("retention") is not None]
    text = "![Loss, retention and tokens per denoiser forward while training](training.png)\n\n"
    if points:
        last = points[-1]
        text += (
            f"Measured while it trained, on held-out documents that no task uses: block 16, 16 steps, threshold "
            f"{last['threshold']:g}. At the end, after {last['num_tokens'] / 1e6:.1f} million noised tokens: retention "
            f"{last['retention']:.1%}, {last['tokens_per_nfe']:.2f} tokens per denoiser forward. These points have no "
            "intervals and are no part of any verdict.\n"
        )
    picture = png(partial(_draw, rows=rows), columns=2)
    return Section(title=title, markdown=text, files={"training.png": picture}, tables={"training": frame_of(rows)})


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    loss, curve = figure.subplots(1, 2)
    for colour, (stage, name) in zip(COLOURS, (("context", "context tower"), ("denoiser", "denoiser")), strict=False):
        own = [row for row in rows if row["stage"] == stage and "loss_nats" in row]
        loss.plot([r["num_tokens"] / 1e6 for r in own], [r["loss_nats"] for r in own], color=colour, label=name, lw=1)
    loss.set(xlabel="million tokens of the stage", ylabel="training loss, nats per token", yscale="log")
    loss.legend()
    points = [row for row in rows if row.get("retention") is not None]
    x = [row["num_tokens"] / 1e6 for row in points]
    curve.plot(x, [100 * row["retention"] for row in points], color=COLOURS[1], marker="o", ms=3)
    curve.axhline(100, color=GREY, lw=0.8, ls=":")
    curve.set(xlabel="million noised tokens of the denoiser", ylabel="retention, % (circles)", ylim=(0, 110))
    beside = curve.twinx()
    beside.plot(x, [row["tokens_per_nfe"] for row in points], color=COLOURS[2], marker="s", ms=3)
    beside.set(ylabel="useful tokens per denoiser forward (squares)", ylim=(0, None))
    beside.grid(visible=False)


QUIET_EVENTS = {"started", "cell_done", "done", "truncated", "compiled"}


def setup(runs: Runs) -> Section:
    """Checkpoints with their digests, documents, machine, packages, commit and seeds of every run."""
    frame = checkpoints_frame(runs)
    parts = ["Checkpoints, each with the sha256 of its tensors:\n", _checkpoints(runs, frame)]
    parts += [f"- {escape(line)}" for line in _baselines(runs)]
    parts += [_run(run) for run in runs.whole]
    title = "Environment: what was run on what"
    return Section(title=title, markdown="\n".join(parts), tables={"checkpoints": frame})


RELATIONS = {
    "own backbone": "by its name, the backbone that {candidate} was made from",
    "usual": "by its name, a model that {family} is usually compared with, and no backbone of it",
    "other": "another model; {usual}",
}


def _baselines(runs: Runs) -> list[str]:
    """What a baseline is to a candidate whose family has no autoregressive form of its own."""
    lines: dict[str, None] = {}
    for run in runs.whole:
        arms: dict[Arm, list[Checkpoint]] = {
            arm: [cell.checkpoint for cell in run.manifest.cells if cell.arm == arm] for arm in get_args(Arm)
        }
        for one, other in product(dict.fromkeys(arms["baseline"]), dict.fromkeys(arms["candidate"])):
            if not has_own_form(other.family):
                usual = usual_of(other.family).baseline
                said = f"usual for {other.family} is {usual}" if usual else f"{other.family} has no usual one"
                text = RELATIONS[relation(other.family, one.name)]
                told = text.format(candidate=checkpoint_name(other), family=other.family, usual=said)
                lines[f"baseline {checkpoint_name(one)}: {told}"] = None
    return list(lines)


def _arms(runs: Runs) -> dict[Checkpoint, set[str]]:
    """Every checkpoint with what it was in the runs."""
    used: dict[Checkpoint, set[str]] = {}
    for run in runs.whole:
        for cell in run.manifest.cells:
            used.setdefault(cell.checkpoint, set()).add(_arm(run, cell))
    return used


def checkpoints_frame(runs: Runs) -> pd.DataFrame:
    """One row for each checkpoint."""
    return frame_of(
        {
            "checkpoint": checkpoint_name(checkpoint),
            "arm": " and ".join(sorted(arms)),
            "family": checkpoint.family,
            "source": without_home(checkpoint.source),
            "revision": checkpoint.revision or None,
            "sha256": checkpoint.digest,
            "dtype": checkpoint.dtype,
            "weights": None if checkpoint.quantisation is None else str(checkpoint.quantisation),
            "attention": checkpoint.attention,
            "devices": ", ".join(checkpoint.devices),
        }
        for checkpoint, arms in _arms(runs).items()
    )


def _says(frame: pd.DataFrame, name: str) -> bool:
    """Whether any row says something there; without rows there is no such column."""
    return name in frame and bool(frame[name].notna().any())


def _checkpoints(runs: Runs, frame: pd.DataFrame) -> str:
    columns = [
        Column(header="checkpoint", show=words("checkpoint")),
        Column(header="arm", show=words("arm")),
        Column(header="family", show=words("family")),
        Column(header="source", show=words("source")),
        Column(header="revision", show=optional("revision", code)),
        Column(header="sha256", show=ids("sha256")),
        Column(header="dtype", show=words("dtype")),
        Column(header="devices", show=words("devices")),
    ]
    if _says(frame, "weights"):
        columns.insert(-1, Column(header="weights", show=optional("weights", escape)))
    if _says(frame, "attention"):
        columns.insert(-1, Column(header="attention", show=optional("attention", code)))
    beside = [_served(checkpoint, one) for checkpoint in _arms(runs) if (one := checkpoint.served) is not None]
    beside += list(dict.fromkeys(_files(checkpoint) for checkpoint in _arms(runs) if checkpoint.files))
    beside += dict.fromkeys(_foreign(checkpoint) for checkpoint in _arms(runs) if checkpoint.foreign_code)
    decoders = (cell.decoder for run in runs.whole for cell in run.manifest.cells)
    beside += dict.fromkeys(_code(decoder) for decoder in decoders if decoder.code)
    return markdown(frame, columns, left=len(columns)) + (f"\n{bullets(beside)}" if beside else "")


def _files(checkpoint: Checkpoint) -> str:
    beside = [file for file in checkpoint.files if file not in checkpoint.foreign_code]
    return f"{escape(checkpoint.name)} beside its tensors: {_digests(beside)}"


def _foreign(checkpoint: Checkpoint) -> str:
    ran = _digests(checkpoint.foreign_code)
    return f"**{escape(checkpoint.name)} ran code that came with it**, as --trust-remote-code allowed: {ran}"


def _served(checkpoint: Checkpoint, served: ServedModel) -> str:
    """What is known of a model behind a server, and what is not."""
    facts = ", ".join(f"{escape(name)} {code(value)}" for name, value in served.facts) or "nothing"
    return (
        f"{escape(checkpoint.name)} is behind a server, and its weights are unknown: the sha256 is over what is said "
        f"here, and two runs are of the same model by name only. Asked for as {code(served.name)} at "
        f"{code(served.url)}, which lists of it: {facts}. Prompts are sent as {served.prompts}; tokens, of both "
        f"prompts and answers, are counted with the tokenizer of {escape(served.tokenizer)}"
    )


def _code(decoder: DecoderSpec) -> str:
    return f"code of the decoder {escape(decoder.kind)}: {_digests(decoder.code or ())}"


def _digests(files: Sequence[FileDigest]) -> str:
    return ", ".join(f"{escape(file.name)} {code(file.sha256[:16])}" for file in files)


def _arm(run: Run, cell: Cell) -> str:
    """What a checkpoint was in a run."""
    if run.manifest.verb == "verify":
        return "checked"
    return "alone" if is_alone(run) else cell.who


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
        *([f"idle threads: OMP_WAIT_POLICY {escape(policy)}"] if (policy := manifest.omp_wait_policy) else []),
        f"packages: {_flat(manifest.packages)}",
        *map(escape, chosen_lines(manifest)),
        *([f"steps: {_steps(manifest.plan)}"] if "cuda_graphs" in manifest.plan else []),
        *_compiled(run),
        f"seeds: {_flat(manifest.seeds)}",
        f"documents: {_documents(run)}",
        *(f"asked and not done: {escape(line)}" for line in asked_and_not_done(manifest)),
        *(f"**warning**: {escape(line)}" for line in chat_lines(manifest)),
        *(f"prompts: {escape(line)}" for line in chat_facts(manifest)),
        *(f"thinking: {escape(line)}" for line in thinking_lines(run)),
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


def thinking_lines(run: Run) -> list[str]:
    """For each arm whose answers begin behind thinking: how many end it, and how much of their tokens it takes."""
    arms = {cell.id: cell.arm for cell in run.manifest.cells}
    lines = []
    for arm in ("candidate", "baseline"):
        rows = [row for row in run.generations if row.answer is not None and arms.get(row.cell) == arm]
        ended = [row for row in rows if row.num_thinking_tokens is not None]
        num_tokens = sum(row.generation.num_tokens for row in ended)
        if rows:
            share = sum(row.num_thinking_tokens or 0 for row in ended) / num_tokens if num_tokens else 0.0
            which = f", in which it takes {share:.1%} of the useful tokens" if ended else ""
            lines.append(f"{count(len(ended))} of {count(len(rows))} answers of the {arm} end their thinking{which}")
    return lines


def _steps(plan: JsonObject) -> str:
    """Whether small steps were launched as a whole."""
    return "small ones of both arms from CUDA graphs" if plan["cuda_graphs"] else "not from CUDA graphs"


def _compiled(run: Run) -> Iterator[str]:
    """What torch.compile took, which no timed call includes."""
    found = [event for event in run.events if event.get("kind") == "compiled"]
    if found:
        wall_s = sum(number for event in found if isinstance(number := event.get("wall_s"), int | float))
        yield f"torch.compile: {plural(len(found), 'step')} in {wall_s:.1f} s, outside of all timed calls"


def _flat(values: JsonObject) -> str:
    """Nested facts on one line; one that the system does not give is "unknown"."""
    parts = [f"{name.replace('_', ' ')} {_value(name, value)}" for name, value in values.items()]
    return escape("; ".join(parts)) or "none recorded"


def _value(name: str, value: object) -> str:
    if value is None:
        return "unknown"
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


PROGRAM = "twotower-eval"
UNNAMED = ((VerifyPlan, "model"), (SizingPlan, "config"))  # fields that the command line takes by their place
HOME = re.compile(r"(?:/home/[^/,=]+|/Users/[^/,=]+|/root)(?=/|$)")


def reproduce(runs: Runs) -> Section:
    """The command lines in order, made from the plans, and the commit of each run."""
    lines = []
    for run in runs.whole:
        commit = run.manifest.commit
        where = f"commit {commit}" if commit else f"version {run.manifest.project_version}"
        lines.append(f"# {run.manifest.run_id}, {where}{', edited checkout' if run.manifest.dirty else ''}")
        lines.append(_command(run.manifest))
    lines.append("# this report, from the run folders")
    lines.append(typed([PROGRAM, "report", *(_folder(run) for run in runs.whole)]))
    text = "\n".join(line.replace("```", "` ` `") for line in lines)
    return Section(title="How to reproduce it", markdown=f"```sh\n{text}\n```\n")


def _command(manifest: RunManifest) -> str:
    """The command that makes the run's plan; a comment instead where this version cannot read the plan."""
    try:
        words = command(plan_of(manifest.verb, given_settings(manifest.plan, manifest.cells)))
    except UserError as error:
        return f"# no command of this version makes its plan ({' '.join(str(error).split())})"
    out = _out(manifest)
    return typed([*map(without_home, words), *(["--out", out] if out else [])])


def _folder(run: Run) -> str:
    """What `report` finds a run by: its id, with the folder in front that its command made it in."""
    out = _out(run.manifest)
    return f"{out.rstrip('/')}/{run.manifest.run_id}" if out else run.manifest.run_id


def _out(manifest: RunManifest) -> str | None:
    """The ``--out`` of our command line; ``None`` where another program began the run."""
    given = plain_argv(manifest.argv)
    if given[1:2] != [manifest.verb] and not (manifest.verb == "size" and given[1:2] == ["speed"]):  # its alias
        return None
    outs = [value for option, value in pairwise(given) if option == "--out"]
    outs += [option.removeprefix("--out=") for option in given if option.startswith("--out=")]
    return outs[-1] if outs else None


def plain_argv(argv: Sequence[str]) -> list[str]:
    """The command as one types it: without the folder of the script and anyone's home folder."""
    return [argv[0].rsplit("/", 1)[-1], *map(without_home, argv[1:])] if argv else []


def without_home(text: str) -> str:
    """A text with ~ for anyone's home folder."""
    return HOME.sub("~", text)


def plan_of(verb: str, values: JsonObject) -> AnyPlan:
    """The plan that a run's manifest holds; UserError where this version knows no such plan."""
    if verb == "run":
        return plan_from_json(RunPlan, values)
    if verb == "verify":
        return plan_from_json(VerifyPlan, values)
    if sizing_config(verb, values) is not None:
        return plan_from_json(SizingPlan, values)
    return plan_from_json(SpeedPlan, values)


def command(plan: AnyPlan) -> list[str]:
    """The words of a command line that makes this plan; fields at their default, and the usual decoder, are left out.

    Options are called as fields are; only the checkpoint of ``verify`` and the config of ``size`` have none.
    """
    verb = {RunPlan: "run", SpeedPlan: "speed", SizingPlan: "size", VerifyPlan: "verify"}[type(plan)]
    words = [PROGRAM, verb]
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if value == field.default or (field.name, value) == ("decoder", USUAL):
            continue
        option = field.name.replace("_", "-")
        if field.name == SEVERAL:
            words += _baseline_words(value)
        elif field.name in ("gen_kwargs", "chat_template_args"):
            words += [f"--{option}", gen_kwargs_text(cast(GenKwargs, value))]
        elif field.name == "include_path":
            words += [word for folder in value for word in (f"--{option}", folder)]
        elif isinstance(value, Mapping):
            words += [word for name, values in value.items() for word in (f"--{option}", set_text(name, values))]
        elif isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif (type(plan), field.name) in UNNAMED:
            words.append(str(value))
        else:
            words += [f"--{option}", ",".join(map(_text, value)) if isinstance(value, tuple) else _text(value)]
    return words


def _baseline_words(tables: Sequence[Table]) -> list[str]:
    """Options for several baselines: their models alone, where tables say no more."""
    if len(tables) > 1 and all(set(table) == {MODEL} for table in tables):
        return [word for table in tables for word in (f"--{ONE}", str(table[MODEL]))]
    return [word for table in tables for word in (f"--{SEVERAL}", table_text(table))]


def typed(words: Sequence[str]) -> str:
    """Words as one types them in a shell, which has to see the ~ of a home folder."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    home, slash, rest = word.partition("/")
    return f"{home}{slash}{shlex.quote(rest) if rest else ''}" if home == "~" else shlex.quote(word)


def _text(value: str | int | float | None) -> str:
    """A number with all its digits and no more."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
