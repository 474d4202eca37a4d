"""Looks: every run towards a claim counts, given or not, and sets the level of its verdict. Also the reason of
NOT MEASURED.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from twotower_eval import store
from twotower_eval.analyse import stats
from twotower_eval.analyse.claims.files import SCORE_QUANTITIES, meant_tasks
from twotower_eval.analyse.claims.match import (
    ANY,
    UNSTATED,
    Evidence,
    cell_fits,
    gather,
    hardware_fits,
    names_baseline,
    names_subject,
    num_documents,
    quality_at,
    quality_near,
    runs_for,
    scores_of,
    speed_at,
    subject_of,
    tasks_fit,
    timing_fits,
    unnamed,
    workload_fits,
)
from twotower_eval.analyse.claims.terms import SPEED_QUANTITIES
from twotower_eval.analyse.compare import QualityPoint, Runs, SpeedPoint
from twotower_eval.analyse.compare.contradiction import was_cut_short
from twotower_eval.analyse.compare.points import OtherScore, checkpoint_name, long_name
from twotower_eval.analyse.compare.several import whole
from twotower_eval.analyse.compare.timing import tasks_of
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.decoder_settings import SHORTHANDS, set_text
from twotower_eval.errors import UserError
from twotower_eval.names import plural
from twotower_eval.plan import CONTEXT_TOWER
from twotower_eval.records import OWN_DECODERS, Cell, Claim, RunManifest, Score, SpeedSample
from twotower_eval.resources import SHIPPED
from twotower_eval.rules import load_text
from twotower_eval.store import Row, Run

Scored = frozenset[tuple[object, ...]]  # every score of one run in a claim's scope, of both arms
KEPT_MANIFESTS = 4096


@dataclass(frozen=True, kw_only=True)
class Looks:
    """The number of looks at a claim, with the error rate that they leave.

    ``not_given``: runs of the point in the same folder that were not given.
    """

    num: int
    declared: int
    not_given: tuple[str, ...] = ()

    @property
    def alpha(self) -> float | None:
        """The one-sided error rate of this verdict; ``None`` where earlier looks have used it up."""
        return stats.look_alpha(max(self.num, 1), self.declared)

    @property
    def level(self) -> float:
        """Level of the two-sided interval whose ends are the verdict's one-sided bounds."""
        return 1 - 2 * (stats.strictest_alpha() if self.alpha is None else self.alpha)


def looks_at_speed(claim: Claim, evidence: Evidence, found: Sequence[SpeedPoint]) -> tuple[Looks, list[SpeedPoint]]:
    """The looks at a claimed speedup, and the points of all but the first of ``found``, which is judged."""
    telling = [point for point in found if point is found[0] or point.timed.fixed or point.num_calls >= stats.MIN_CALLS]
    ids = {run_id for point in telling for run_id in point.run_ids}
    num = sum(num_measurings(run) for run in evidence.runs if run.manifest.run_id in ids)
    beside = _beside(evidence, lambda manifest: _times(claim, manifest), lambda run: _has_timed(claim, run))
    looks = Looks(
        num=num + sum(map(num_measurings, beside)),
        declared=claim.looks,
        not_given=tuple(run.manifest.run_id for run in beside),
    )
    return looks, [*found[1:], *(point for one in _each(claim, beside) for point in speed_at(claim, one))]


def looks_at_quality(
    claim: Claim, evidence: Evidence, found: Sequence[QualityPoint]
) -> tuple[Looks, list[QualityPoint]]:
    """The looks at a claimed quality, and one point of each run but the first of ``found``, which is judged."""
    alike = [point for point in found if point.timed == found[0].timed]
    runs = {run.manifest.run_id: run for run in evidence.runs}
    apart: dict[Scored, QualityPoint] = {}
    for point in alike:
        apart.setdefault(scored_by(claim, runs[point.run_id], timed=point.timed), point)
    others = [point for point in apart.values() if point.run_id != found[0].run_id and _is_telling(claim, point)]

    def shows_more(run: Run) -> bool:
        scored = scored_by(claim, run, timed=False)
        return scored not in apart and len({(task, doc) for _, task, doc, *_ in scored}) >= stats.MIN_CLUSTERS

    beside = [] if found[0].timed else _beside(evidence, lambda manifest: _scores(claim, manifest), shows_more)
    apart_beside = {scored_by(claim, run, timed=False): run.manifest.run_id for run in beside}
    judged = [runs[run_id] for run_id in {point.run_id for point in (found[0], *others)}]
    earlier = {scored for run in (*judged, *beside) for scored in scored_before(claim, run, timed=found[0].timed)}
    looks = Looks(
        num=1 + len({point.run_id for point in others}) + len(apart_beside) + len(earlier - {*apart, *apart_beside}),
        declared=claim.looks,
        not_given=tuple(sorted(apart_beside.values())),
    )
    unseen = [point for one in _each(claim, beside) for point in quality_at(claim, one)]
    return looks, [*others, *(point for point in unseen if not point.timed and _is_telling(claim, point))]


def num_measurings(run: Run) -> int:
    """How often a speed run was completed with more rounds than before; at least once.

    Calls timed after a run was complete count once more, even if it was never completed again. So does a run that was
    ended before its planned rounds, as its results may have been seen by then.
    """
    num, last, is_new = 0, 0, False
    run = whole(run)  # of a run against one of its baselines, whose rows are not all that its events count
    for event in run.events:
        is_new |= event["kind"] == "launched"
        if event["kind"] == "measured" and not event.get("num_missing"):
            num_rounds = event.get("num_rounds", 0)  # of one launch among several: none where nothing was missing
            num += is_new or num_rounds > last
            last, is_new = max(last, num_rounds), False
    measured = [sample.phase == "measure" for sample in run.speed]
    timed = [sum(measured[:num_rows]) for num_rows in _rows_when_complete(run, SpeedSample)]
    num_extended = sum(later > earlier for earlier, later in pairwise([*timed, sum(measured)]))
    return max(num, 1 + num_extended) + was_cut_short(run)


def scored_before(claim: Claim, run: Run, *, timed: bool) -> set[Scored]:
    """A run's scores in a claim's scope each time the run was complete and extended later.

    Each is a look, on however few documents, as the run's results may have been seen before it was extended.
    """
    rows = whole(run).scores
    ends = {num_rows for num_rows in _rows_when_complete(run, Score) if num_rows < len(rows)}
    return {scored_by(claim, run, timed=timed, num_rows=num_rows) for num_rows in ends} - {frozenset()}


def _rows_when_complete(run: Run, kind: type[Row]) -> list[int]:
    """Number of rows in the journal of a kind each time the run was complete, by its events."""
    finished = [event["files"] for event in run.events if event["kind"] == "finished" and "files" in event]
    return [files.get(store.JOURNALS[kind][0], {}).get("rows", 0) for files in finished]


def scored_by(claim: Claim, run: Run, *, timed: bool, num_rows: int | None = None) -> Scored:
    """A run's scores in a claim's scope, or the first ``num_rows`` of all; runs with equal ones count as one look."""
    arms = {cell.id: cell.arm for cell in run.manifest.cells if _is_of(claim, cell, timed=timed)}
    return frozenset(
        (arms[row.cell], row.task, row.doc_id, row.doc_sha256, row.metric, row.filter, row.value, row.parts)
        for row in whole(run).scores[:num_rows]
        if row.cell in arms and _in_scope(claim, row)
    )


def _is_of(claim: Claim, cell: Cell, *, timed: bool) -> bool:
    """Whether a cell is one of the claim's two arms, with timed answers or with whole tasks."""
    named = names_baseline(claim, cell) if cell.arm == "baseline" else cell_fits(claim, cell)
    return named and (cell.workload.kind != "task") == timed


def _in_scope(claim: Claim, row: Score) -> bool:
    return row.task in claim.scope or row.group in claim.scope


def _is_telling(claim: Claim, point: QualityPoint) -> bool:
    """Whether a point has enough documents to support a claim."""
    return num_documents(claim, point) >= stats.MIN_CLUSTERS


def _times(claim: Claim, manifest: RunManifest) -> bool:
    """Whether a run's plan times a claim's point, on enough prompts to support it."""
    point, num_prompts = claim.point, manifest.plan.get("num_prompts")
    few = isinstance(num_prompts, int) and num_prompts // (point.batch_size or 1) < stats.MIN_CALLS
    if manifest.verb != "speed" or (few and point.workload == "answer"):
        return False
    on_machine = hardware_fits(claim, [manifest.machine])
    return on_machine and _has_both(claim, manifest, lambda cell: workload_fits(claim, cell.workload))


def _scores(claim: Claim, manifest: RunManifest) -> bool:
    """Whether a run's plan scores a claim's point."""
    return manifest.verb == "run" and _has_both(claim, manifest, lambda cell: cell.workload.kind == "task")


def _has_both(claim: Claim, manifest: RunManifest, fits: Callable[[Cell], bool]) -> bool:
    """Whether a run has the claim's candidate, with a workload that fits, and its baseline."""
    cells = manifest.cells
    return any(cell.arm == "candidate" and cell_fits(claim, cell) and fits(cell) for cell in cells) and any(
        cell.arm == "baseline" and names_baseline(claim, cell) for cell in cells
    )


def _has_timed(claim: Claim, run: Run) -> bool:
    """Whether a run has any measured call on the claim's tasks, even if it was stopped early."""
    prompts = [prompt.prompt_id for sample in run.speed if sample.phase != "probe" for prompt in sample.prompts]
    return any(sample.phase == "measure" for sample in run.speed) and tasks_fit(claim, tasks_of(prompts))


def _beside(evidence: Evidence, is_meant: Callable[[RunManifest], bool], shows: Callable[[Run], bool]) -> list[Run]:
    """Further runs of the point in the folders of the given runs."""
    given = {run.manifest.run_id for run in evidence.runs}
    roots = sorted({run.path.resolve().parent for run in evidence.runs})
    paths = {
        manifest.run_id: path  # a copy of a run is not a further run
        for root in roots
        for path, manifest in _manifests_in(root)
        if manifest.run_id not in given and is_meant(manifest)
    }
    return [run for run in _loaded(paths.values()) if shows(run)]


def _manifests_in(root: Path) -> Iterator[tuple[Path, RunManifest]]:
    """Run folders directly under a folder, without those whose manifest cannot be read."""
    for file in sorted(root.glob(f"*/{store.MANIFEST}")):
        try:
            yield file.parent, _manifest_at(file.parent, file.stat().st_mtime_ns)
        except UserError:
            continue


@lru_cache(maxsize=KEPT_MANIFESTS)
def _manifest_at(path: Path, _changed_ns: int) -> RunManifest:
    """A manifest, read once for all claims, as manifests never change."""
    return store.read_manifest(path)


def _each(claim: Claim, runs: Iterable[Run]) -> Iterator[Evidence]:
    """The points of every single run; a run that raises is skipped, as it was not given."""
    for run in runs:
        try:
            yield gather(runs_for(claim, Runs([run])))
        except UserError:
            continue


def _loaded(paths: Iterable[Path]) -> Iterator[Run]:
    for path in paths:
        try:
            yield store.load(path)
        except UserError:  # a run that cannot be read cannot be judged
            continue


SHOWN = 4
OPTIONS = {param: f"--{field.replace('_', '-')}" for field, param in SHORTHANDS.items()}


def missing(claim: Claim, points: Sequence[QualityPoint | SpeedPoint], alone: Sequence[str] = ()) -> str:
    """Why a claim is NOT MEASURED, and the command that measures it. ``alone``: models measured without a baseline."""
    found = _nearby(claim, points, alone) + _left_open(claim, points) + _other_baseline(claim, points) + _meant(claim)
    words = measuring_command(claim)
    where = f" on {claim.point.hardware}" if claim.point.hardware else ""
    refused = "" if claim.subject == SHIPPED else "; tasks that execute model-written code to score it are refused"
    return f"{found}; `{shlex.join(words)}`{where} measures it{refused if claim.scope else ''}"


def _left_open(claim: Claim, points: Sequence[QualityPoint | SpeedPoint]) -> str:
    """A hint where a measured point differs from the claim's only in parameters that the claim does not name."""
    wanted = claim.point.decoder
    for point in points:
        held = point.candidate.decoder
        on = {name: value for name, value in unnamed(claim, held).items() if value not in UNSTATED}
        same = held.kind == wanted.kind and all(held.params.get(name) == value for name, value in wanted.params.items())
        if same and on and names_subject(claim, subject_of(point)):
            settings = ", ".join(set_text(name, [value]) for name, value in on.items())
            return f"; the claim's point does not name {', '.join(on)}, but this decoder was measured with {settings}"
    return ""


def _meant(claim: Claim) -> str:
    """A hint where the name of a task in scope is close to another task's; lm-eval has many similar names."""
    return "".join(f"; {name}: did you mean {near}?" for name, near in meant_tasks(claim.scope).items())


def missing_quality(claim: Claim, evidence: Evidence) -> str:
    """The same for a claim on quality; its tasks may have been measured with scores that do not fit the quantity."""
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
    no_place = f"{name} cannot be part of a {claim.quantity}"
    no_place += " over several tasks" if len(claim.scope) > 1 else ""
    return f"{no_place}: {_kind_of(one)}; claim its score or score_difference by itself"


def _kind_of(one: OtherScore | WholeScore) -> str:
    """Why a score cannot be averaged with others."""
    if isinstance(one, WholeScore):
        return f"its {one.metric} is not a mean over documents but lm-eval's {one.aggregation} over all of them"
    return f"its {one.metric} is outside retention ({'higher' if one.higher_is_better else 'lower'} is better)"


def measuring_command(claim: Claim) -> list[str]:
    """The command line that measures a claim at its own point; the reader fills in the words in capitals.

    Parameters without their own option are given by ``--set``.
    """
    timed, point, shipped = claim.quantity in SPEED_QUANTITIES, claim.point, claim.subject == SHIPPED
    params = {
        name: value for name, value in point.decoder.params.items() if point.decoder.is_plug_in or value not in UNSTATED
    }
    if point.decoder.kind == "block_diffusion":  # a threshold that is not named is off, and off is not the default
        params["threshold"] = point.decoder.params.get("threshold") or 0.0
    words = ["twotower-eval", "speed" if timed else "run"]
    words += [] if shipped else ["--model", "CKPT"]
    words += _baseline_words(claim)
    tasks = ",".join(point.timed_tasks if timed else claim.scope) or ("" if shipped else "TASKS")
    words += ["--tasks", tasks] if tasks else []
    words += [] if point.decoder.kind == "block_diffusion" else ["--decoder", point.decoder.kind]
    words += ["--launches", str(stats.MIN_LAUNCHES)] if timed else []  # with fewer a verdict holds in them alone
    for name, option in OPTIONS.items():
        value = params.pop(name, None)
        words += [] if value is None else [option, f"{value}"]
    for name, value in params.items():
        words += ["--set", set_text(name, [value])]
    words += [] if point.dtype is None else ["--dtype", str(point.dtype)]
    if not timed:
        return words
    words += [] if point.batch_size in (None, 1) else ["--batch-sizes", str(point.batch_size)]
    words += [] if point.request_rate is None else ["--request-rates", f"{point.request_rate:g}"]
    words += ["--arrivals", "constant"] if point.requests == "constant" else []
    words += [] if point.workload in (None, "answer") else ["--workload", str(point.workload)]
    return words if (point.num_devices or 1) < 2 else [*words, "--devices", "D,D"]


def _baseline_words(claim: Claim) -> list[str]:
    if claim.baseline in OWN_DECODERS or ":" in claim.baseline:
        return ["--baseline-decoder", claim.baseline]
    return [] if claim.baseline in (CONTEXT_TOWER, ANY) else ["--baseline", "BASELINE"]


def _other_baseline(claim: Claim, points: Sequence[QualityPoint | SpeedPoint]) -> str:
    """A hint where the model was measured against a plug-in's decoding of its baseline, which a claim has to name."""
    kinds = [point.baseline.decoder for point in points if names_subject(claim, subject_of(point))]
    kind = next((one.kind for one in kinds if one.is_plug_in and claim.baseline != one.kind), None)
    return "" if kind is None else f"; only a claim with baseline = {kind!r} is about a baseline that {kind} decodes"


def _nearby(claim: Claim, points: Sequence[QualityPoint | SpeedPoint], alone: Sequence[str]) -> str:
    """What was measured instead: points of the same subject, nearest first, else other subjects."""
    own = [point for point in points if names_subject(claim, subject_of(point))]
    if not own:
        others = sorted({checkpoint_name(subject_of(point)) for point in points})
        if not others and alone:
            return f"{', '.join(alone)} {'was' if len(alone) == 1 else 'were'} measured only without a baseline"
        if not others:
            return "nothing was measured at this point"
        return f"only {', '.join(others)} {'was' if len(others) == 1 else 'were'} measured"
    nearest = sorted(own, key=lambda point: _num_apart(claim, point))
    with_tasks = bool(claim.point.timed_tasks)
    ordered = list(dict.fromkeys(_described(point, with_tasks=with_tasks) for point in nearest))
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return f"measured instead: {'; '.join(ordered[:SHOWN])}{more}"


def _num_apart(claim: Claim, point: QualityPoint | SpeedPoint) -> int:
    """The number of settings in which a point differs from the claim's."""
    params = point.candidate.decoder.params
    apart = sum(params.get(name) != value for name, value in claim.point.decoder.params.items())
    return apart + (isinstance(point, SpeedPoint) and not timing_fits(claim, point))


def _described(point: QualityPoint | SpeedPoint, *, with_tasks: bool) -> str:
    cell = point.candidate
    parts = [long_name(cell.decoder) or cell.decoder.kind, cell.checkpoint.dtype]
    if isinstance(point, SpeedPoint):
        parts += [
            f"{point.workload} workload",
            load_text(cell.workload),
            plural(cell.workload.num_devices or 0, "device"),
        ]
        parts += [f"on prompts of {', '.join(point.tasks)}"] if with_tasks else []
    else:
        parts.append("on " + ", ".join(task.name for task in point.tasks))
    return ", ".join(parts)
