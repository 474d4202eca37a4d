"""The section that says how to do runs again: each plan as the command line that makes it, whatever began the run."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise

from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.section import Section
from twotower_eval.decoder_settings import set_text
from twotower_eval.errors import UserError
from twotower_eval.json_text import JsonObject
from twotower_eval.plan import AnyPlan, RunPlan, SizingPlan, SpeedPlan, VerifyPlan, plan_from_json
from twotower_eval.records import RunManifest, sizing_config
from twotower_eval.store import Run

PROGRAM = "twotower-eval"
UNNAMED = ((VerifyPlan, "model"), (SizingPlan, "config"))  # fields that the command line takes by their place
HOME = re.compile(r"(?:/home/[^/,=]+|/Users/[^/,=]+|/root)(?=/|$)")


def reproduce(runs: Runs) -> Section:
    """The command lines, in order, and how to get back to the code: from the plans, whatever began the runs."""
    lines = []
    for run in runs:
        commit = run.manifest.commit
        where = f"commit {commit}" if commit else f"version {run.manifest.project_version}"
        lines.append(f"# {run.manifest.run_id}, {where}{', edited checkout' if run.manifest.dirty else ''}")
        lines.append(_command(run.manifest))
    lines.append("# this report, from the run folders")
    lines.append(typed([PROGRAM, "report", *(_folder(run) for run in runs)]))
    text = "\n".join(line.replace("```", "` ` `") for line in lines)
    return Section(title="How to reproduce it", markdown=f"```sh\n{text}\n```\n")


def _command(manifest: RunManifest) -> str:
    """The command that makes the run's plan; a plan of another version cannot be told, and is said so."""
    try:
        words = command(plan_of(manifest.verb, manifest.plan))
    except UserError as error:
        return f"# no command of this version makes its plan ({' '.join(str(error).split())})"
    out = _out(manifest)
    return typed([*map(without_home, words), *(["--out", out] if out else [])])


def _folder(run: Run) -> str:
    """What `report` finds a run by: its id, with the folder in front that its command made it in."""
    out = _out(run.manifest)
    return f"{out.rstrip('/')}/{run.manifest.run_id}" if out else run.manifest.run_id


def _out(manifest: RunManifest) -> str | None:
    """Where our command line was told to make the run; what else began it may mean anything by ``--out``."""
    given = plain_argv(manifest.argv)
    if given[1:2] != [manifest.verb] and not (manifest.verb == "size" and given[1:2] == ["speed"]):  # its alias
        return None
    outs = [value for option, value in pairwise(given) if option == "--out"]
    outs += [option.removeprefix("--out=") for option in given if option.startswith("--out=")]
    return outs[-1] if outs else None


def plain_argv(argv: Sequence[str]) -> list[str]:
    """The command as one types it: where the script was installed, and whose home it was, is nobody's business."""
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
    """The words of a command line that makes this plan; fields at their default go unsaid.

    Options are called as fields are; only the checkpoint of ``verify`` and the config of ``size`` have none.
    """
    verb = {RunPlan: "run", SpeedPlan: "speed", SizingPlan: "size", VerifyPlan: "verify"}[type(plan)]
    words = [PROGRAM, verb]
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if value == field.default:
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, Mapping):
            words += [word for name, values in value.items() for word in (f"--{option}", set_text(name, values))]
        elif isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif (type(plan), field.name) in UNNAMED:
            words.append(str(value))
        else:
            words += [f"--{option}", ",".join(map(_text, value)) if isinstance(value, tuple) else _text(value)]
    return words


def typed(words: Sequence[str]) -> str:
    """Words as one types them in a shell, which has to see the ~ of a home folder."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    home, slash, rest = word.partition("/")
    return f"{home}{slash}{shlex.quote(rest) if rest else ''}" if home == "~" else shlex.quote(word)


def _text(value: str | int | float) -> str:
    """A number with all its digits and no more."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
