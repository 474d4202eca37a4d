"""What to say of a claim that nothing was measured for: what there is instead, and the command that measures it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from twotower_eval.analyse import stats
from twotower_eval.analyse.claims.files import SCORE_QUANTITIES, SPEED_QUANTITIES, meant_tasks
from twotower_eval.analyse.claims.match import (
    UNSTATED,
    Evidence,
    names_subject,
    quality_near,
    scores_of,
    subject_of,
    timing_fits,
    unnamed,
)
from twotower_eval.analyse.compare import QualityPoint, SpeedPoint
from twotower_eval.analyse.compare.naming import checkpoint_name, long_name
from twotower_eval.analyse.compare.points import OtherScore
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.decoder_settings import SHORTHANDS, set_text
from twotower_eval.plan import CONTEXT_TOWER, SHIPPED
from twotower_eval.records import Claim

SHOWN = 4
OPTIONS = {param: f"--{field.replace('_', '-')}" for field, param in SHORTHANDS.items()}


def missing(claim: Claim, points: Sequence[QualityPoint | SpeedPoint], alone: Sequence[str] = ()) -> str:
    """Why a claim is NOT MEASURED, in words, and what measures it. ``alone``: models measured beside no other."""
    found = _nearby(claim, points, alone) + _left_open(claim, points) + _meant(claim)
    words = measuring_command(claim)
    where = f" on {claim.point.hardware}" if claim.point.hardware else ""
    refused = "" if claim.subject == SHIPPED else "; tasks whose scoring executes what a model wrote are refused"
    return f"{found}; `{shlex.join(words)}`{where} measures it{refused if claim.scope else ''}"


def _left_open(claim: Claim, points: Sequence[QualityPoint | SpeedPoint]) -> str:
    """A hint where all that keeps a claim from a measured point are parameters that it does not name and that are on
    there: a point is its whole decoder."""
    wanted = claim.point.decoder
    for point in points:
        held = point.candidate.decoder
        on = {name: value for name, value in unnamed(claim, held).items() if value not in UNSTATED}
        same = held.kind == wanted.kind and all(held.params.get(name) == value for name, value in wanted.params.items())
        if same and on and names_subject(claim, subject_of(point)):
            said = ", ".join(set_text(name, [value]) for name, value in on.items())
            return f"; the claim's point does not name {', '.join(on)}, and this decoder was measured with {said}"
    return ""


def _meant(claim: Claim) -> str:
    """A hint where the name of a task in scope may be a slip; many tasks of lm-eval are named much alike."""
    return "".join(f"; {name}: did you mean {near}?" for name, near in meant_tasks(claim.scope).items())


def missing_quality(claim: Claim, evidence: Evidence) -> str:
    """The same for a claim of quality, which may be of tasks that were measured and have no such quantity."""
    near = quality_near(claim, evidence) if claim.scope else []
    return _unlike(claim, near[0]) if near else missing(claim, evidence.quality, evidence.alone)


def _unlike(claim: Claim, point: QualityPoint) -> str:
    """Why a task in scope, though measured, does not have the claim's quantity."""
    headlines = {task.name: task for task in point.tasks}
    if claim.quantity in SCORE_QUANTITIES and len(claim.scope) == 1:
        [name] = claim.scope
        known = [f"{one.metric},{one.filter}" for one in scores_of(point, name)]
        known += [f"{headlines[name].metric},{headlines[name].filter}"] if name in headlines else []
        asked = "several scores" if claim.metric is None else f"no one score {claim.metric!r}"
        return f"{name} has {asked}: name one by metric, of {', '.join(sorted(known))}"
    name = next(name for name in claim.scope if name not in headlines)
    found = scores_of(point, name)
    one = next((one for one in found if one.main), found[0])
    no_place = f"{name} has no part in a {claim.quantity}"
    no_place += " over several tasks" if len(claim.scope) > 1 else ""
    return f"{no_place}: {_kind_of(one)}; claim its score or score_difference alone"


def _kind_of(one: OtherScore | WholeScore) -> str:
    """Why a score can be averaged with no other."""
    if isinstance(one, WholeScore):
        return f"its {one.metric} is no mean of documents but lm-eval's {one.aggregation} of all of them together"
    return (
        f"of its {one.metric} {'more' if one.higher_is_better else 'less'} is better, and it stands outside retention"
    )


def measuring_command(claim: Claim) -> list[str]:
    """The command line that measures a claim at its own point; words in capitals are for the reader to fill in.

    Parameters without an option of their own are said by ``--set``.
    """
    timed, point, shipped = claim.quantity in SPEED_QUANTITIES, claim.point, claim.subject == SHIPPED
    params = {
        name: value for name, value in point.decoder.params.items() if point.decoder.is_plug_in or value not in UNSTATED
    }
    if point.decoder.kind == "block_diffusion":  # a threshold that is not named is off, and off is not the default
        params["threshold"] = point.decoder.params.get("threshold") or 0.0
    words = ["twotower-eval", "speed" if timed else "run"]
    words += [] if shipped else ["--model", "CKPT"]
    words += [] if claim.baseline == CONTEXT_TOWER else ["--baseline", "BASELINE"]
    tasks = ",".join(point.timed_tasks if timed else claim.scope) or ("" if shipped else "TASKS")
    words += ["--tasks", tasks] if tasks else []
    words += [] if point.decoder.kind == "block_diffusion" else ["--decoder", point.decoder.kind]
    words += ["--launches", str(stats.MIN_LAUNCHES)] if timed else []  # with fewer a verdict holds in them alone
    for name, option in OPTIONS.items():
        value = params.pop(name, None)
        words += [] if value is None else [option, f"{value}"]
    for name, value in params.items():
        words += ["--set", set_text(name, [value])]
    words += [] if point.dtype in (None, "float32") else ["--dtype", str(point.dtype)]
    if not timed:
        return words
    words += [] if point.batch_size in (None, 1) else ["--batch-sizes", str(point.batch_size)]
    words += [] if point.workload in (None, "answer") else ["--workload", str(point.workload)]
    return words if (point.num_devices or 1) < 2 else [*words, "--devices", "D,D"]


def _nearby(claim: Claim, points: Sequence[QualityPoint | SpeedPoint], alone: Sequence[str]) -> str:
    """In words, what was measured instead: points of the same subject, nearest first; else the other subjects."""
    own = [point for point in points if names_subject(claim, subject_of(point))]
    if not own:
        others = sorted({checkpoint_name(subject_of(point)) for point in points})
        if not others and alone:
            return f"{', '.join(alone)} alone {'was' if len(alone) == 1 else 'were'} measured, against no baseline"
        return f"measured were only {', '.join(others)}" if others else "nothing of the kind was measured"
    nearest = sorted(own, key=lambda point: _num_apart(claim, point))
    with_tasks = bool(claim.point.timed_tasks)
    ordered = list(dict.fromkeys(_described(point, with_tasks=with_tasks) for point in nearest))
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return f"measured were: {'; '.join(ordered[:SHOWN])}{more}"


def _num_apart(claim: Claim, point: QualityPoint | SpeedPoint) -> int:
    """In how many settings a point differs from the claim's."""
    params = point.candidate.decoder.params
    apart = sum(params.get(name) != value for name, value in claim.point.decoder.params.items())
    return apart + (isinstance(point, SpeedPoint) and not timing_fits(claim, point))


def _described(point: QualityPoint | SpeedPoint, *, with_tasks: bool) -> str:
    cell = point.candidate
    parts = [long_name(cell.decoder) or cell.decoder.kind, cell.checkpoint.dtype]
    if isinstance(point, SpeedPoint):
        parts += [f"{point.workload} workload", f"batch {point.batch_size}", f"{cell.workload.num_devices} device(s)"]
        parts += [f"on prompts of {', '.join(point.tasks)}"] if with_tasks else []
    else:
        parts.append("on " + ", ".join(task.name for task in point.tasks))
    return ", ".join(parts)
