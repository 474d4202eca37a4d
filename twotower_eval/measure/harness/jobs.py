"""The cells of a plan: their models, decoders and tasks, whose log-likelihoods they use, and their known scores."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower_eval import store
from twotower_eval.decoder_settings import baseline_spec, block_sizes, cross_decoders
from twotower_eval.engine.models.chat import arm_chats, attach_formats, chat_extra
from twotower_eval.engine.models.protocol import Model, lacks, text_codec
from twotower_eval.engine.scorers import Scorer
from twotower_eval.errors import UserError
from twotower_eval.measure.chosen import choose_batch_size, without_auto
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.measure.harness.answers import Key
from twotower_eval.measure.harness.filtered import Row
from twotower_eval.measure.harness.prompts import asked_chats, built_tasks, first_texts, longest_context, uses_of
from twotower_eval.measure.harness.scoring import score_rows
from twotower_eval.measure.suites import BuiltTask, settle
from twotower_eval.measure.suites.lm_types import Instance
from twotower_eval.plan import RunPlan, devices_of, each_baseline, named_baselines
from twotower_eval.plan_chat import chat_options
from twotower_eval.plan_sources import baseline_source, chat_sources, model_source
from twotower_eval.records import (
    AUTO,
    Aggregate,
    Arm,
    Cell,
    ChatUse,
    Chosen,
    DecoderSpec,
    GenerationRow,
    LikelihoodKind,
    Override,
    RunManifest,
    Score,
    Ways,
    Workload,
    canonical_json,
    draws_at_random,
    make_cell,
    to_json,
)
from twotower_eval.rules import refuse_same, unlike_kinds, unlike_kinds_text
from twotower_eval.store.environment import new_manifest
from twotower_eval.task_options import recorded_seeds, run_seed
from twotower_eval.usual import usual_of

if TYPE_CHECKING:
    from twotower_eval.engine.models.arms import Loaded

DENOISER_KINDS: tuple[LikelihoodKind, ...] = ("denoiser_left_to_right", "bound")


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A cell with what is needed to fill it. ``model`` answers, by likelihoods of ``kind`` if it does not generate.

    ``likelihoods_of`` is the cell whose log-likelihoods score this one: itself or one of an equal model.
    """

    cell: Cell
    task: BuiltTask
    model: Model
    kind: LikelihoodKind
    likelihoods_of: str

    @property
    def requests(self) -> list[tuple[Instance, Key]]:
        """lm-eval's requests with their keys, once per sample; none if another cell answers them."""
        if not self.task.generates and self.likelihoods_of != self.cell.id:
            return []
        repeats = self.task.samples if self.task.generates else 1
        instances = [instance for doc in self.task.docs for instance in doc.instances]
        return [(i, (self.task.name, i.doc_id, i.idx, repeat)) for i in instances for repeat in range(repeats)]

    @property
    def costs_like(self) -> tuple[object, ...]:
        """Key of jobs that take about the same time per request."""
        way = self.cell.decoder.label if self.task.generates else self.kind
        return (self.cell.checkpoint.identity, way, self.task.request)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A plan, ready to run: documents built, models loaded and proved, cells made. No folder is written yet."""

    plan: RunPlan
    tasks: Sequence[BuiltTask]
    jobs: Sequence[Job]
    overrides: Sequence[Override]
    ways: Sequence[Ways]
    chosen: Sequence[Chosen] = ()
    chats: tuple[ChatUse, ...] | None = None

    @property
    def compares(self) -> bool:
        """Whether the plan has two arms to compare; a single model is compared with nothing."""
        return any(job.cell.arm == "candidate" for job in self.jobs)

    @cached_property
    def scored_once(self) -> frozenset[str]:
        """Tasks that one cell answers for both arms by log-likelihoods: their scores are equal by construction."""
        donors: dict[str, set[str]] = defaultdict(set)
        for job in self.jobs:
            donors[job.task.name].add(job.cell.id if job.task.generates else job.likelihoods_of)
        return frozenset(name for name, cells in donors.items() if len(cells) == 1)


def prepare(plan: RunPlan) -> Prepared:
    """Build a plan's documents, load its models and make its cells. Nothing is written or answered yet.

    UserError for whatever the user can mend, before weights are loaded where possible.
    """
    from twotower_eval.engine.models.arms import prove_arms

    plan, chosen = without_auto(plan)
    asked = asked_chats(plan)
    tasks = built_tasks(plan, asked)
    decoding = settle(tasks, temperature=plan.temperature, samples=plan.samples)
    held = dataclasses.replace(plan, temperature=decoding.temperature)
    specs = cross_decoders(held)
    for single in each_baseline(held):
        baseline_spec(single)  # a slip in it is found before weights are loaded
    check_scorers(plan, tasks)
    chats = asked or arm_chats(chat_sources(plan), chat_options(plan))
    uses = uses_of(tasks, chats)
    arms = load_models(plan)
    attach_formats(arms, chats, first_texts(tasks))
    use_graphs(plan, tasks, arms)
    jobs = make_jobs(held, tasks, specs, arms)
    _refuse_unreadable(jobs)
    longest = partial(longest_context, tasks)
    ways = prove_arms(arms, longest)
    if plan.batch_size == AUTO:
        batch = choose_batch_size(arms, longest, num_requests=max(len(job.requests) for job in jobs))
        plan, chosen = dataclasses.replace(plan, batch_size=int(batch.value)), (*chosen, batch)
    return Prepared(
        plan=plan, tasks=tasks, jobs=jobs, overrides=decoding.overrides, ways=ways, chosen=chosen, chats=uses
    )


def _refuse_unreadable(jobs: Sequence[Job]) -> None:
    """Refuse texts that a model cannot read now, not hours into the run; each task once per tokenizer."""
    from twotower_eval.engine.models.identity import reader_identity

    readers = {id(job.model): reader_identity(job.model) for job in jobs}
    read = set()
    for job in jobs:
        reader = (job.task.name, readers[id(job.model)])
        if reader not in read and (requests := job.requests):
            read.add(reader)
            HarnessLM(job.model).check_texts(requests)


def check_scorers(plan: RunPlan, tasks: Sequence[BuiltTask]) -> None:
    """UserError, before weights are loaded, for log-likelihoods of chats behind a server, and for a denoiser likelihood
    with a decoder that has no denoiser."""
    needy = [task.name for task in tasks if not task.generates]
    if needy and plan.apply_chat_template and any(source.kind == "endpoint" for source in chat_sources(plan)):
        raise UserError(
            f"{', '.join(needy)} need log-likelihoods, which no server gives of chats: leave them out, or drop "
            "--apply-chat-template"
        )
    if needy and plan.likelihood in DENOISER_KINDS and plan.decoder == "autoregressive":
        raise UserError(
            f"{', '.join(needy)} need log-likelihoods, and decoder 'autoregressive' has none of kind "
            f"{plan.likelihood!r}: take --likelihood context_tower or another decoder"
        )


def load_models(plan: RunPlan) -> tuple[Model, ...]:
    """The model of every baseline, then the candidate's; a checkpoint that several have is loaded once.

    See :func:`twotower_eval.engine.models.arms.load_arms`.
    """
    loaded: Loaded = {}
    pairs = [_load_pair(single, loaded) for single in each_baseline(plan)]
    return (*(baseline for baseline, _ in pairs), pairs[0][1])


def _load_pair(plan: RunPlan, loaded: Loaded) -> tuple[Model, Model]:
    from twotower_eval.engine.models.arms import load_arms

    arms = load_arms(
        model_source(plan),
        baseline_source(plan),
        dtype=plan.dtype,
        devices=plan.devices,
        baseline_dtype=plan.baseline_dtype,
        baseline_device=plan.baseline_device,
        cuda_graphs=plan.cuda_graphs,
        family=plan.family,
        baseline_family=plan.baseline_family,
        loaded=loaded,
        tokenizer=plan.tokenizer,
        request_timeout=plan.request_timeout,
        chat=bool(plan.apply_chat_template),
    )
    for arm in arms:
        text_codec(arm)
    return arms


def use_graphs(plan: RunPlan, tasks: Sequence[BuiltTask], arms: Sequence[Model]) -> None:
    """Run both arms' small steps as CUDA graphs if the plan says so, keeping as many as its requests can need."""
    from twotower_eval.engine.models.arms import enable_cuda_graphs
    from twotower_eval.engine.models.graphs import MAX_NEW

    if not plan.cuda_graphs:
        return
    texts = ("".join(map(str, i.args)) for task in tasks for doc in task.docs for i in doc.instances)
    # Tokens are not counted yet: a text has at most as many tokens as bytes, and a model reads at most its limit.
    longest = max((len(text.encode()) for text in texts), default=0) + max(block_sizes(plan), default=1)
    longest += max((task.max_new_tokens or 0 for task in tasks), default=0)
    longest = min(longest, *(arm.max_length or longest for arm in arms))
    # Scorers choose their own number of rows.
    enable_cuda_graphs(arms, max_rows=MAX_NEW, block_sizes=block_sizes(plan), longest=longest)


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """What a cell is made of, for any task; ``name`` is that of a baseline among several.

    ``shared``: its causal tower is also that of the other arm, so that one computation gives both log-likelihoods.
    """

    arm: Arm
    name: str | None
    model: Model
    spec: DecoderSpec
    shared: bool


def _arms(plan: RunPlan, specs: Sequence[DecoderSpec], models: Sequence[Model]) -> list[_Arm]:
    """The baselines, then the candidates. ``models`` are those of the baselines, and the candidate's."""
    *baselines, candidate = models
    found = []
    for (name, single), model in zip(named_baselines(plan), baselines, strict=True):
        shared = plan.likelihood == "context_tower" and _equal_context(model, candidate)
        spec = baseline_spec(single)
        found.append(_Arm(arm="baseline", name=name, model=model, spec=spec, shared=shared))
    shared = any(arm.shared for arm in found)
    return found + [_Arm(arm="candidate", name=None, model=candidate, spec=spec, shared=shared) for spec in specs]


def make_jobs(
    plan: RunPlan, tasks: Sequence[BuiltTask], specs: Sequence[DecoderSpec], models: Sequence[Model]
) -> list[Job]:
    """Every cell of the plan, task by task, the baselines first, at the plan's temperature.

    UserError if a model cannot score in the requested way.
    """
    from twotower_eval.engine.decoders import from_spec

    arms = _arms(plan, specs, models)
    jobs: dict[str, Job] = {}
    first_with: dict[tuple[object, ...], str] = {}
    for task in tasks:
        of_task: list[Cell] = []
        for arm in arms:
            kind = _kind(plan, arm.arm, arm.model, arm.shared)
            cell = _cell(plan, arm, task, kind)
            of_task.append(cell)
            donor = first_with.setdefault(_scored_alike(arm, task, kind), cell.id)
            if plan.baselines and not task.generates:
                cell = dataclasses.replace(cell, likelihoods_of=donor)
            answering = models[-1] if arm.shared and not task.generates else arm.model
            # Refuse a model that cannot answer now, not hours into the run.
            if task.generates:
                from_spec(answering, arm.spec)
            else:
                make_scorer_of(answering, kind, arm.spec)
            # An AR model compared with itself is one cell, not two.
            jobs.setdefault(cell.id, Job(cell=cell, task=task, model=answering, kind=kind, likelihoods_of=donor))
        if plan.baselines:
            refuse_same(of_task)
    return list(jobs.values())


def _scored_alike(arm: _Arm, task: BuiltTask, kind: LikelihoodKind) -> tuple[object, ...]:
    """What cells have to share to have the same log-likelihoods."""
    from twotower_eval.engine.models.identity import causal_identity

    by_denoiser = kind in DENOISER_KINDS
    whose = arm.model.checkpoint.identity if by_denoiser else causal_identity(arm.model)
    return (task.name, kind, whose, arm.spec.params.get("block_size") if by_denoiser else None)


def make_scorer_of(model: Model, kind: LikelihoodKind, spec: DecoderSpec) -> Scorer:
    """A scorer of the kind; a denoiser's uses the decoder's block size."""
    from twotower_eval.engine.scorers import make_scorer

    block_size = spec.params.get("block_size")
    if kind in DENOISER_KINDS and isinstance(block_size, int):
        return make_scorer(model, kind, block_size=block_size)
    return make_scorer(model, kind)


def _equal_context(baseline: Model, candidate: Model) -> bool:
    """Whether both causal towers are the same model and read the same tokens, so that one answer serves both."""
    from twotower_eval.engine.models.identity import causal_identity

    return bool(candidate.has_denoiser) and causal_identity(baseline) == causal_identity(candidate)


def _kind(plan: RunPlan, arm: Arm, model: Model, shared: bool) -> LikelihoodKind:
    """The kind of a model's log-likelihoods, as named beside every score."""
    if lacks(model, "causal"):  # in either arm
        kinds = usual_of(model.checkpoint.family).kinds or DENOISER_KINDS
        return plan.likelihood if plan.likelihood in kinds else kinds[0]
    if arm == "candidate" and (model.has_denoiser or plan.likelihood in DENOISER_KINDS):
        return plan.likelihood
    return "context_tower" if shared or model.has_denoiser else "exact"


def _cell(plan: RunPlan, arm: _Arm, task: BuiltTask, kind: LikelihoodKind) -> Cell:
    workload = Workload(kind="task", name=task.name, digest=task.digest, max_new_tokens=task.max_new_tokens)
    drawn = (plan.temperature or 0) > 0 or draws_at_random(arm.spec)
    random = drawn if task.generates else kind == "bound"
    extra = {
        "seed": run_seed(plan.seed) if random else None,
        "likelihood": None if task.generates else kind,
        "samples": task.samples,
        **({"pools_samples": True} if task.pools_samples else {}),
        **({"cuda_graphs": True} if plan.cuda_graphs else {}),  # sums may run in another order
        **chat_extra(arm.model),
    }
    return make_cell(arm.arm, arm.model.checkpoint, arm.spec, workload, extra, arm.name)


def make_manifest(prepared: Prepared, resume: Path | None) -> RunManifest:
    from twotower_eval.engine.models.identity import unheeded_settings

    plan, jobs, tasks = prepared.plan, prepared.jobs, prepared.tasks
    return new_manifest(
        "run",
        run_id=store.new_run_id("run") if resume is None else resume.name,
        plan=plan,
        cells=[job.cell for job in jobs],
        devices=devices_of(plan),
        seeds=recorded_seeds(plan.seed),
        notes=tuple(_notes(jobs)),
        tasks={task.name: task.parts for task in tasks},
        overrides=prepared.overrides,
        joined={task.name: len(task.joins) for task in tasks if task.joins},
        unheeded=unheeded_settings(job.model for job in jobs if job.task.generates),
        ways=prepared.ways,
        chosen=prepared.chosen,
        chats=prepared.chats,
    )


def kind_lines(jobs: Sequence[Job]) -> Iterator[str]:
    """A line on each two kinds of log-likelihoods that are compared though they mean different things."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    scored = [job for job in jobs if not job.task.generates]
    for one, other in product(scored, scored):
        arms = (one.cell.arm, other.cell.arm)
        if arms == ("baseline", "candidate") and one.task is other.task and unlike_kinds(one.kind, other.kind):
            found.setdefault((one.kind, other.kind), {})[one.task.name] = None
    for (baseline, candidate), tasks in found.items():
        yield unlike_kinds_text(tuple(tasks), baseline, candidate)


def _notes(jobs: Sequence[Job]) -> Iterator[str]:
    if any(job.likelihoods_of != job.cell.id and not job.task.generates for job in jobs):
        yield (
            "Log-likelihoods of equal models (weights, settings, tokenizer), scored alike, were computed once and "
            "serve every cell they belong to."
        )


class KnownScores:
    """The scores on disk. ``reason`` explains in an error how one may differ from its answer."""

    def __init__(self, run: store.Run, reason: str = "has another score") -> None:
        self._reason = reason
        name, self._key_of = store.JOURNALS[Score]
        self._file = run.path / name
        self._there = {self._key_of(row): (line, row) for line, row in enumerate(run.scores, start=1)}
        self._left = dict(self._there)
        key_of = store.JOURNALS[Aggregate][1]
        self._aggregates = {key_of(row): (line, row) for line, row in enumerate(run.aggregates, start=1)}

    def new(self, scores: Iterable[Score]) -> list[Score]:
        """The scores that are not on disk yet. UserError, with file and line, if one on disk differs."""
        new = []
        for score in scores:
            key = self._key_of(score)
            if key not in self._there:
                new.append(score)
                continue
            line, row = self._there[key]
            if row.filtered is None:  # as rows of versions that did not keep it
                score = dataclasses.replace(score, filtered=None)
            if canonical_json(to_json(row)) != canonical_json(to_json(score)):
                raise self._refusal(line, row, f"{self._reason} ({_difference(row, score)})")
            self._left.pop(key, None)
        return new

    def stored(self, made: Aggregate) -> Aggregate | None:
        """The row on disk of the same score."""
        return self._aggregates.get(store.JOURNALS[Aggregate][1](made), (0, None))[1]

    def new_aggregates(self, aggregates: Iterable[Aggregate]) -> list[Aggregate]:
        """The same for aggregates. Those of fewer documents, under an older limit, are kept."""
        new = []
        for made in aggregates:
            line, row = self._aggregates.get(store.JOURNALS[Aggregate][1](made), (0, made))
            if canonical_json(to_json(row)) != canonical_json(to_json(made)):
                where = f"{self._file.with_name(store.JOURNALS[Aggregate][0])}, line {line}: task {row.task!r}"
                raise UserError(f"{where} {self._reason}: restore the file or start a new run")
            if not line:
                new.append(made)
        return new

    def check_all_made(self) -> None:
        """UserError if a score on disk was not among the scores made."""
        for line, row in self._left.values():
            raise self._refusal(line, row, "has a score that no answer in this run gives")

    def _refusal(self, line: int, row: Score, what: str) -> UserError:
        where = f"{self._file}, line {line}: task {row.task!r}, document {row.doc_id}"
        return UserError(f"{where} {what}: restore the file or start a new run")


def check_known(run: store.Run, manifest: RunManifest, jobs: Sequence[Job]) -> None:
    """UserError, before a run is opened again, if a score on disk does not match its journalled answer, or an answer
    contradicts itself."""
    store.check_comparable(run, manifest)
    known = KnownScores(run)
    answered: dict[str, dict[Key, Row]] = defaultdict(dict)
    rows: list[Row] = [*run.generations, *run.likelihoods]
    for row in rows:
        answered[row.cell][row.task, row.doc_id, row.request_index, row.repeat] = row
    _check_texts_are_of_tokens(run, jobs)
    for job in jobs if run.scores else ():
        own = answered[job.cell.id if job.task.generates else job.likelihoods_of]
        known.new(score_rows(job.task, job.cell.id, _whole_documents(job.task, own)))


def _check_texts_are_of_tokens(run: store.Run, jobs: Sequence[Job]) -> None:
    """UserError if a text does not match its tokens. Plug-in decoders may write texts differently, and before a stop
    string there may be part of a token that is not counted."""
    own = {job.cell.id: job for job in jobs if job.task.generates and not job.cell.decoder.is_plug_in}
    for line, row in enumerate(run.generations, start=1):
        made, job = row.generation, own.get(row.cell)
        if job is None or made.finish == "stop" or made.text == text_codec(job.model).decode(made.token_ids):
            continue
        where = f"{run.path / store.JOURNALS[GenerationRow][0]}, line {line}: task {row.task!r}, document {row.doc_id}"
        raise UserError(f"{where} has a text that is not that of its tokens: restore the file or start a new run")


def _whole_documents(task: BuiltTask, answered: Mapping[Key, Row]) -> Iterator[Row]:
    """Answers of completely answered documents: only these have final scores."""
    repeats = task.samples if task.generates else 1
    wanted = {doc.doc_id: len(doc.instances) * repeats for doc in task.docs}
    found = Counter(doc_id for name, doc_id, _, _ in answered if name == task.name)
    for (name, doc_id, _, _), row in answered.items():
        if name == task.name and found[doc_id] == wanted.get(doc_id):
            yield row


def _difference(row: Score, score: Score) -> str:
    """The first differing field, ``value`` before all others."""
    fields: tuple[dict[str, Any], dict[str, Any]] = (to_json(row), to_json(score))
    names = sorted({**fields[1], **fields[0]}, key=lambda name: name != "value")
    name = next(name for name in names if fields[0].get(name) != fields[1].get(name))
    return f"{name} is {fields[0].get(name)!r} there, {fields[1][name]!r} by its answer under {row.metric!r}"
