"""The ``run`` verb: answers, journals and scores every cell, scores timed answers, and reports progress."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from twotower_eval import store
from twotower_eval.engine.decoders.reported import ReportError
from twotower_eval.engine.models import family_calls
from twotower_eval.engine.models.protocol import remote
from twotower_eval.errors import UserError
from twotower_eval.measure.harness.adapter import Batch, HarnessLM
from twotower_eval.measure.harness.answers import CellJournal, Key
from twotower_eval.measure.harness.filtered import Filtered, Row, document_text, filter_rows
from twotower_eval.measure.harness.jobs import (
    Job,
    KnownScores,
    Prepared,
    check_known,
    kind_lines,
    make_manifest,
    make_scorer_of,
    prepare,
)
from twotower_eval.measure.harness.lm_files import FOLDER, LmEvalFiles
from twotower_eval.measure.harness.prompts import asked_chats, built_tasks, timed_tasks
from twotower_eval.measure.harness.scoring import aggregate_rows, aggregates_of, score_rows, scores_of
from twotower_eval.measure.suites import BuiltTask, lm_tasks
from twotower_eval.measure.suites.lm_types import Instance
from twotower_eval.names import plural
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_files import plan_from_json
from twotower_eval.plan_sources import arm_sources, model_source
from twotower_eval.progress import Advance, Progress, SilentProgress, duration_text
from twotower_eval.records import Aggregate, Cell, Retried, RunManifest, Score, Witnessed, derive_seed, draws, to_json
from twotower_eval.rules import (
    EXTENDED,
    asked_and_not_done,
    chat_facts,
    chat_lines,
    chosen_lines,
    joined_lines,
    retried_line,
    slower_lines,
    truncation_line,
)
from twotower_eval.sources import Source
from twotower_eval.store import TRAINING_LOG
from twotower_eval.store.environment import with_scoring_of_now
from twotower_eval.task_options import run_seed


@dataclass(frozen=True, kw_only=True)
class TaskFigure:
    """A task's score in one cell, under its headline metric.

    It covers ``num_documents``; ``num_without`` more have no value. ``value`` is ``None`` if there is none, for
    ``reason`` if one is known.
    """

    task: BuiltTask
    cell: Cell
    value: float | None
    num_documents: int
    num_without: int = 0
    reason: str | None = None

    @property
    def arm(self) -> str:
        """The arm and its decoder."""
        return f"{self.cell.who} {self.cell.decoder.label}"


def task_figure(task: BuiltTask, cell: Cell, scores: Sequence[Score], aggregates: Sequence[Aggregate]) -> TaskFigure:
    """The mean of documents' values, or lm-eval's own aggregate if the metric is no mean."""
    chosen = (task.metric, task.filter)
    for made in aggregates:
        if (made.metric, made.filter) == chosen:
            num, reason = made.num_documents, made.missing_reason
            return TaskFigure(task=task, cell=cell, value=made.value, num_documents=num, reason=reason)
    values = [score.value for score in scores if (score.metric, score.filter) == chosen]
    numbers = [value for value in values if value is not None]
    mean = sum(numbers) / len(numbers) if numbers else None
    without = len(values) - len(numbers)
    return TaskFigure(task=task, cell=cell, value=mean, num_documents=len(numbers), num_without=without)


def headline_text(figure: TaskFigure) -> str:
    """``acc 0.25 over 8 documents``."""
    metric = figure.task.metric
    if figure.value is None:
        return f"{metric} without a value" + (f" ({figure.reason})" if figure.reason else "")
    without = f", {figure.num_without} more without a value" if figure.num_without else ""
    return f"{metric} {figure.value:.4g} over {plural(figure.num_documents, 'document')}{without}"


def group_lines(figures: Iterable[TaskFigure]) -> Iterator[str]:
    """``group g_macro, baseline autoregressive(...): acc 0.1667, mean of 2 tasks``, for each group and arm."""
    groups: dict[tuple[str, str], list[TaskFigure]] = defaultdict(list)
    for figure in figures:
        if figure.task.group is not None:
            groups[figure.task.group, figure.arm].append(figure)
    for (group, arm), members in groups.items():
        yield f"group {group}, {arm}: {_group_text(members)}"


def _group_text(members: Sequence[TaskFigure]) -> str:
    """lm-eval's figure of a group: the mean over its members, weighted by documents or equally; none if one has
    none."""
    task = members[0].task
    without = [member.task.name for member in members if member.value is None]
    if without:
        return f"{task.metric} without a value ({without[0]} has none)"
    weights = [member.num_documents if task.by_size else 1 for member in members]
    values = [member.value for member in members if member.value is not None]
    mean = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    weighted = " by their documents" if task.by_size else ""
    return f"{task.metric} {mean:.4g}, mean of {plural(len(members), 'task')}{weighted}"


WITNESSED_OF, MOST_WITNESSED = 200, 4  # one in that many requests of a cell, up to a maximum


def run(plan: RunPlan, *, root: Path, resume: Path | None = None, progress: Progress | None = None) -> Path:
    """Evaluate both arms of a plan on its tasks; the run's folder. See :func:`answer`."""
    return answer(prepare(plan), root=root, resume=resume, progress=progress)


def answer(prepared: Prepared, *, root: Path, resume: Path | None = None, progress: Progress | None = None) -> Path:
    """Answer, journal and score a prepared plan; the run's folder.

    ``resume`` continues a run: nothing in its journals is computed again. An interrupted run can be resumed. UserError
    for whatever the user can mend.
    """
    progress = progress or SilentProgress()
    plan, jobs = prepared.plan, prepared.jobs
    manifest = make_manifest(prepared, resume)
    with _open(root, resume, manifest, jobs) as writer, family_calls(*arm_sources(plan)):
        said = (*writer.warnings, *asked_and_not_done(manifest), *chat_lines(manifest), *kind_lines(jobs))
        ways = (*joined_lines(manifest), *slower_lines(manifest), *chat_facts(manifest))
        for line in (*chosen_lines(manifest), *(f"warning: {text}" for text in said), *ways):
            progress.note(line)
        _keep_training_log(model_source(plan), writer.path)
        evaluation = _Evaluation(plan, writer, jobs, progress)
        if writer.run.complete and evaluation.lacks_answers:
            progress.note(EXTENDED)
        evaluation.run()
        writer.finish()
    return writer.path


def _open(root: Path, resume: Path | None, manifest: RunManifest, jobs: Sequence[Job]) -> store.RunWriter:
    if resume is None:
        return store.create(root, manifest)
    found = store.load(resume)
    _refuse_misreported(found)
    check_known(found, manifest, jobs)
    return store.resume(resume, manifest)


def _refuse_misreported(run: store.Run) -> None:
    """UserError if the run ended because its decoder misreported: its journalled answers cannot be trusted."""
    for event in run.events:
        if event["kind"] == "failed" and event.get("error") == ReportError.__name__:
            raise UserError(
                f"cannot resume {run.path}: its journal holds answers of a decoder whose reports were wrong "
                f"({event.get('message')}): start a new run"
            )


def _keep_training_log(source: Source, run_folder: Path) -> None:
    """Copy the training log beside a pair trained here, so that a report needs only the run's folder."""
    log = None if source.folder is None else source.folder / TRAINING_LOG
    if log is not None and log.is_file():
        shutil.copyfile(log, run_folder / TRAINING_LOG)


def score_journal(path: Path) -> Path:
    """Score the journalled answers of a speed run with the code that scores runs."""
    found = store.load(path)
    if found.manifest.verb != "speed":
        raise UserError(f"{path} is a {found.manifest.verb!r} run: only timed answers are scored afterwards")
    plan = plan_from_json(SpeedPlan, found.manifest.plan)
    if plan.workload != "answer":
        raise UserError(f"{path} timed the {plan.workload!r} workload, whose texts are no answers")
    tasks = timed_tasks(plan)
    manifest = dataclasses.replace(
        found.manifest,
        tasks={task.name: task.parts for task in tasks},
        packages=with_scoring_of_now(found.manifest.packages),
    )
    store.check_comparable(found, manifest)
    known = KnownScores(found, "was scored before its last rounds were timed, or was edited")
    new: list[Score | Aggregate] = []
    for cell in found.manifest.cells:
        rows = [row for row in found.generations if row.cell == cell.id]
        new += known.new(score for task in tasks for score in score_rows(task, cell.id, rows))
        new += known.new_aggregates(
            made for task in tasks for made in aggregate_rows(task, cell.id, rows, known.stored)
        )
    known.check_all_made()
    with store.resume(path, manifest, event="scored") as writer:
        keep_texts(writer, tasks, {(row.task, row.doc_id) for row in found.generations})
        for made in new:
            writer.append(made)
        writer.finish()
    return path


def write_lm_files(path: Path) -> Path:
    """Write lm-eval's files of a ``run`` anew from its journals, samples included; their folder.

    No model is loaded. UserError for a run of another verb, and where a task is no longer what was asked.
    """
    found = store.load(path)
    manifest = found.manifest
    if manifest.verb != "run":
        raise UserError(f"{path} is a {manifest.verb!r} run: only run answers whole tasks, as lm-eval does")
    plan = plan_from_json(RunPlan, manifest.plan)
    tasks = {task.name: task for task in built_tasks(plan, asked_chats(plan))}
    for name, parts in manifest.tasks.items():
        if name not in tasks or dict(tasks[name].parts) != dict(parts):
            raise UserError(f"{path}: task {name!r} is no longer what the run asked: restore its files, or run anew")
    with LmEvalFiles(path, manifest, with_samples=True) as files:
        for cell in manifest.cells:
            task = tasks[cell.workload.name]
            files.add(cell, task, _filtered_again(found, cell, task))
    return path / FOLDER


def _filtered_again(run: store.Run, cell: Cell, task: BuiltTask) -> Sequence[Filtered]:
    """A cell's answers; those of another cell where that one's log-likelihoods score it, which its scores tell."""
    if task.generates:
        return filter_rows(task, run.generations_of({cell.id}))
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in run.likelihoods:
        if row.task == task.name:
            rows[row.cell].append(row)
    if cell.id in rows:
        return filter_rows(task, rows[cell.id])
    scored = {(one.doc_id, one.metric, one.filter, one.value, one.scored_by) for one in run.scores_of({cell.id})}
    for donor in rows.values():
        filtered = filter_rows(task, donor)
        made = scores_of(task, cell.id, filtered)
        if {(one.doc_id, one.metric, one.filter, one.value, one.scored_by) for one in made} == scored:
            return filtered
    raise UserError(f"{run.path}: task {task.name!r} has no answers that give the scores of cell {cell.id}")


class _Evaluation:
    """One pass over a run's jobs: answers what is missing and scores what is complete."""

    def __init__(self, plan: RunPlan, writer: store.RunWriter, jobs: Sequence[Job], progress: Progress) -> None:
        self._plan = plan
        self._writer = writer
        self._jobs = jobs
        self._progress = progress
        self._prepared: dict[str, list[Batch]] = {}
        self._estimate_s: dict[str, float] = {}  # by cell: time spent on the estimate
        # By cell: number of requests, and of truncated ones.
        self._truncated = {
            event["cell"]: (event["num_requests"], event["num_truncated"])
            for event in writer.run.events
            if event.get("kind") == "truncated" and "num_truncated" in event
        }
        self._warned: set[tuple[str, str]] = set()
        self._advance: Advance = lambda num=1, /: None
        self._known = KnownScores(writer.run)
        limited = {**writer.run.manifest.plan, "limit": plan.limit}  # a resume may raise it
        manifest = dataclasses.replace(writer.run.manifest, plan=limited)
        self._files = LmEvalFiles(writer.path, manifest, with_samples=plan.log_samples)
        self._testified = {(row.cell, row.call_id) for row in writer.run.witnessed}
        self._journals = {job.cell.id: CellJournal(cell=job.cell.id, append=writer.append) for job in jobs}
        rows: list[Row] = [*writer.run.generations, *writer.run.likelihoods]
        for row in rows:
            self._journals[row.cell].keep(row)

    @property
    def lacks_answers(self) -> bool:
        """Whether any request is still to be answered."""
        return any(self._missing(job) for job in self._jobs)

    def run(self) -> None:
        """Answer and score every job, with a time estimate from one batch of each kind of job."""
        total = sum(len(job.requests) for job in self._jobs)
        num_tasks = len({job.task.name for job in self._jobs})
        self._progress.note(
            f"{plural(len(self._jobs), 'cell')} over {plural(num_tasks, 'task')}, {plural(total, 'request')}"
        )
        figures: list[TaskFigure] = []
        if self._plan.log_samples:
            keep_texts(self._writer, [job.task for job in self._jobs])
        with self._files, self._progress.track(total, "run") as self._advance:
            self._estimate()
            for number, job in enumerate(self._jobs, start=1):
                started_s = time.monotonic()
                batches = self._prepared.pop(job.cell.id) if job.cell.id in self._prepared else self._batches(job)
                for answer in batches:
                    answer()
                figures.append(self._score(job))
                took_s = self._estimate_s.get(job.cell.id, 0.0) + time.monotonic() - started_s
                done = f"{job.task.name}, {figures[-1].arm}: {headline_text(figures[-1])} in {duration_text(took_s)}"
                self._progress.note(f"[{number}/{len(self._jobs)}] {done}")
        self._known.check_all_made()
        for line in group_lines(figures):
            self._progress.note(line)

    def _estimate(self) -> None:
        """Answer a few requests of middling length for each kind of job, and report the estimated duration."""
        left_s = 0.0
        per_request_s: dict[tuple[Any, ...], float] = {}
        for job in self._jobs:
            num_missing = len(self._missing(job))
            if not num_missing:
                continue
            if job.costs_like not in per_request_s:
                started_s = time.monotonic()
                self._answer_some(job)
                took_s, num_left = time.monotonic() - started_s, len(self._missing(job))
                self._estimate_s[job.cell.id] = took_s
                per_request_s[job.costs_like] = took_s / max(1, num_missing - num_left)
                num_missing = num_left
            left_s += num_missing * per_request_s[job.costs_like]
        if per_request_s:
            self._progress.note(f"estimated duration: about {duration_text(left_s)}")

    def _answer_some(self, job: Job) -> None:
        """Answer one batch of requests, or one piece of those that are scored together."""
        if not job.task.generates:
            batches = self._prepared[job.cell.id] = self._batches(job)
            batches.pop(len(batches) // 2)()
            return
        size = int(self._plan.batch_size)
        chosen = self._witnessed(job)  # decoded alone, which takes longer
        usual = [item for item in self._missing(job) if item[1] not in chosen]
        missing = sorted(usual or self._missing(job), key=lambda item: len(item[0].args[0]))
        start = max(0, len(missing) - size) // 2
        # These answers are reported as progress when the whole job is prepared.
        for answer in self._model_of(job, advance=lambda num=1, /: None).batches(missing[start : start + size]):
            answer()

    def _journal(self, job: Job) -> CellJournal:
        return self._journals[job.cell.id if job.task.generates else job.likelihoods_of]

    def _answered(self, job: Job) -> Mapping[Key, Row]:
        journal = self._journal(job)
        return journal.generations if job.task.generates else journal.likelihoods

    def _missing(self, job: Job) -> list[tuple[Instance, Key]]:
        """The job's requests without an answer."""
        answered = self._answered(job)
        return [(request, key) for request, key in job.requests if key not in answered]

    def _batches(self, job: Job) -> list[Batch]:
        """The remaining work of a job, batch by batch. Truncated requests are counted once, over all of it."""
        counted = self._truncated.get(job.cell.id if job.requests else job.likelihoods_of)
        known = counted and (not job.requests or counted[0] == len(job.requests))  # a resume may raise the limit
        if counted and known and not self._missing(job):
            self._advance(len(job.requests))
            batches = []
        else:
            lm = self._model_of(job, self._advance)
            batches = lm.batches(job.requests)
            counted = len(job.requests), lm.num_truncated
        self._warn_of_truncation(job, counted)
        return batches

    def _warn_of_truncation(self, job: Job, counted: tuple[int, int]) -> None:
        num_requests, num_truncated = counted
        if self._truncated.get(job.cell.id) != counted:
            self._truncated[job.cell.id] = counted
            numbers = {"num_requests": num_requests, "num_truncated": num_truncated}
            self._writer.event("truncated", cell=job.cell.id, task=job.task.name, **numbers)
        who = (job.task.name, job.cell.arm)
        if num_truncated and who not in self._warned:
            self._warned.add(who)
            self._progress.note(f"warning: {truncation_line(*who, num_requests, num_truncated)}")

    def _model_of(self, job: Job, advance: Advance) -> HarnessLM:
        """The adapter that answers the job's requests into its journal."""
        from twotower_eval.engine.decoders import from_spec

        spec, generates = job.cell.decoder, job.task.generates
        if (served := remote(job.model)) is not None:
            served.on_retry = partial(self._retried, job)
        return HarnessLM(
            job.model,
            decoder=from_spec(job.model, spec) if generates else None,
            scorer=None if generates else make_scorer_of(job.model, job.kind, spec),
            kind=job.kind,
            batch_size=int(self._plan.batch_size),
            seed=run_seed(self._plan.seed),
            journal=self._journal(job),
            advance=advance,
            traced=_first_documents(job, self._plan.trace),
            witnessed=self._witnessed(job),
            testify=self._testify,
        )

    def _witnessed(self, job: Job) -> frozenset[Key]:
        """The requests of a job that are decoded with a witness: a few, chosen by the seed."""
        if not job.task.generates or draws(job.cell) or job.cell.checkpoint.served is not None:
            return frozenset()
        keys = sorted(
            (key for _, key in job.requests), key=lambda key: derive_seed(run_seed(self._plan.seed), "witness", *key)
        )
        return frozenset(keys[: min(MOST_WITNESSED, -(-len(keys) // WITNESSED_OF))])

    def _testify(self, row: Witnessed) -> None:
        """Journal a witness row, once: a run killed between a witness and its answer decodes that request again."""
        if (row.cell, row.call_id) not in self._testified:
            self._writer.append(row)

    def _retried(self, job: Job, retried: Retried) -> None:
        """Journal a request that failed and is asked again; say so once for each arm."""
        self._writer.event("retried", cell=job.cell.id, task=job.task.name, **to_json(retried))
        if (who := ("retried", job.cell.arm)) not in self._warned:
            self._warned.add(who)
            self._progress.note(f"warning: {retried_line(job.cell.arm, retried)}")

    def _score(self, job: Job) -> TaskFigure:
        """Write the job's scores, if missing, and return the task's figure."""
        filtered = filter_rows(job.task, self._answered(job).values())
        scores = scores_of(job.task, job.cell.id, filtered)
        aggregates = aggregates_of(job.task, job.cell.id, filtered, self._known.stored, self._progress)
        self._files.add(job.cell, job.task, filtered, job.model)
        new: list[Score | Aggregate] = [*self._known.new(scores), *self._known.new_aggregates(aggregates)]
        for made in new:
            self._writer.append(made)
        self._writer.event("cell_done", cell=job.cell.id, task=job.task.name, num_documents=len(job.task.docs))
        return task_figure(job.task, job.cell, scores, aggregates)


def keep_texts(writer: store.RunWriter, tasks: Iterable[BuiltTask], only: Set[tuple[str, int]] | None = None) -> None:
    """Journal the texts of documents that are not there yet; ``only`` of these tasks and numbers."""
    known = {(row.task, row.doc_id) for row in writer.run.documents}
    with lm_tasks.quiet():
        for task in {task.name: task for task in tasks}.values():
            for doc in task.docs:
                at = (task.name, doc.doc_id)
                if at not in known and (only is None or at in only):
                    writer.append(document_text(doc))


def _first_documents(job: Job, number: int) -> frozenset[int]:
    """The lowest document numbers of a job."""
    return frozenset(sorted({doc_id for _, (_, doc_id, _, _) in job.requests})[:number])
