"""What is timed: task prompts cut into calls, the same for all cells, and lanes, the cells ready to time them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice, pairwise
from typing import Any, Protocol

from twotower_eval.engine.decoders import Decoder
from twotower_eval.engine.decoders.reported import (
    ReportError,
    call_request,
    check_all_counted,
    check_answers,
    check_forwards,
    finished,
    generating,
)
from twotower_eval.engine.models.counting import UncountedForwards
from twotower_eval.engine.models.protocol import Model, text_codec
from twotower_eval.engine.models.tokenizer import fitted_prompt_ids, naming, prompt_ids, stops_of
from twotower_eval.errors import UserError
from twotower_eval.measure.speed.clock import CallClock, Devices, TimedModel, no_garbage_collection
from twotower_eval.measure.speed.watch import Busy, TextCost, Watch, text_cost
from twotower_eval.names import plural
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import (
    Arm,
    Cell,
    DecoderSpec,
    Generation,
    Passes,
    Prompt,
    Workload,
    canonical_json,
    derive_seed,
    document_prompt_id,
    make_cell,
    sha256_text,
)

# Includes a runaway of one in a hundred prompts with 98 % probability; whole batches of 1 to 128 by powers of two.
ENOUGH_PROMPTS = 384


class Request(Protocol):
    """A task's prompt with stops and budget, as ``suites.build_requests`` gives it."""

    @property
    def task(self) -> str: ...
    @property
    def doc_id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def prompt_sha256(self) -> str: ...
    @property
    def task_parts(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, kw_only=True)
class Call:
    """Prompts that are decoded together: their ``stop`` strings, whether EOS ends them, and their budget."""

    id: str
    requests: tuple[Request, ...]
    stop: tuple[str, ...]
    ignore_eos: bool
    max_new_tokens: int


Calls = Mapping[int, tuple[Call, ...]]  # by batch size


def make_calls(plan: SpeedPlan, requests: Sequence[Request]) -> Calls:
    """Choose ``plan.num_prompts`` prompts and cut them into calls of each batch size: the same prompts for all sizes.

    On the ``answer`` workload the prompts of a call share stops and budget, tasks take turns, and a task's prompts are
    spread over all of its lengths. Without a number, ``ENOUGH_PROMPTS`` are chosen, or as many as make whole batches.
    UserError if there are fewer than asked for, or no whole batch.
    """
    together = math.lcm(*plan.batch_sizes)
    wanted = _wanted(plan, together)
    if plan.workload == "answer":
        chosen = _spread(requests, together, wanted)
    else:
        chosen = list(requests[:wanted])
        if plan.num_prompts is None:
            chosen = chosen[: len(chosen) // together * together]
    if not chosen or (len(chosen) < wanted and plan.num_prompts is not None):
        batches = f" in batches of {together} from one task" if plan.workload == "answer" and together > 1 else ""
        raise UserError(f"{wanted} prompts wanted{batches}, the tasks give {len(chosen)}: name more tasks")
    return {size: _cut(plan, chosen, size) for size in plan.batch_sizes}


def untimed_tasks_text(plan: SpeedPlan, requests: Sequence[Request]) -> str:
    """A warning where so few prompts are asked for that tasks have none among them; empty where all have."""
    tasks = list(dict.fromkeys(request.task for request in requests))
    chosen = (request for calls in make_calls(plan, requests).values() for call in calls for request in call.requests)
    untimed = sorted({*tasks} - {request.task for request in chosen})
    if not untimed or plan.num_prompts is None:
        return ""
    enough = len(tasks) * math.lcm(*plan.batch_sizes)
    more = f"--num-prompts {enough} or more" if enough > plan.num_prompts else "more prompts (--num-prompts)"
    return (
        f"warning: {plural(plan.num_prompts, 'prompt')} of {plural(len(tasks), 'task')}: not timed: "
        f"{', '.join(untimed)}; to time every task, take {more}"
    )


def _wanted(plan: SpeedPlan, together: int) -> int:
    """How many prompts: the default is rounded up to whole batches, a given number must make them."""
    fitting = math.ceil((plan.num_prompts or ENOUGH_PROMPTS) / together) * together
    if plan.num_prompts not in (fitting, None):
        sizes = ", ".join(map(str, plan.batch_sizes))
        raise UserError(
            f"{plan.num_prompts} prompts cannot be cut into whole batches of {sizes}: take --num-prompts {fitting}"
        )
    return fitting


def _spread(requests: Sequence[Request], together: int, wanted: int) -> list[Request]:
    """Prompts in groups of ``together`` that share task, stops and budget; tasks in turn, each spread over its lengths.

    A task's first prompts may be unlike the rest, so each kind is sampled from all of its lengths.
    """
    by_kind: dict[tuple[str, tuple[str, ...], int], list[Request]] = defaultdict(list)
    for request in requests:
        by_kind[request.task, request.stop, request.max_new_tokens].append(request)
    most = max((len(group) for group in by_kind.values()), default=0) // together
    in_turn = (kind for turn in range(most) for kind, group in by_kind.items() if (turn + 1) * together <= len(group))
    turns = list(islice(in_turn, wanted // together))
    chosen = {kind: iter(_strata(by_kind[kind], num * together)) for kind, num in Counter(turns).items()}
    return list(chain.from_iterable(islice(chosen[kind], together) for kind in turns))


def _strata(group: Sequence[Request], num: int) -> list[Request]:
    """One prompt from each of ``num`` equally large strata of lengths, in the group's order.

    The first of each stratum is taken, so that a run on a task's first documents holds most of what is timed. Of
    documents that share a cluster one is taken if the others suffice.
    """
    first_of: dict[str, Request] = {}
    for i, request in enumerate(group):
        first_of.setdefault(getattr(request, "cluster_id", None) or f"#{i}", request)
    if len(first_of) >= num:
        group = list(first_of.values())
    by_length = sorted(range(len(group)), key=lambda i: (len(group[i].text), i))
    edges = [i * len(group) // num for i in range(num + 1)]
    places = sorted(min(by_length[low:high]) for low, high in pairwise(edges))
    return [group[place] for place in places]


def _cut(plan: SpeedPlan, chosen: Sequence[Request], size: int) -> tuple[Call, ...]:
    calls = []
    for index, start in enumerate(range(0, len(chosen), size)):
        batch = tuple(chosen[start : start + size])
        fixed = plan.workload == "fixed"
        call = Call(
            id=f"b{size}-{index}",
            requests=batch,
            stop=() if fixed else batch[0].stop,
            ignore_eos=fixed,
            max_new_tokens=plan.new_tokens or batch[0].max_new_tokens,
        )
        calls.append(call)
    return tuple(calls)


def make_workload(plan: SpeedPlan, calls: Sequence[Call], size: int, num_devices: int) -> Workload:
    """The workload of a cell. Its digest covers the prompts, what ends them and what scores the answers, but not the
    cut into batches."""
    asked: list[Any] = [
        [r.task, r.doc_id, r.prompt_sha256, c.stop, c.max_new_tokens] for c in calls for r in c.requests
    ]
    asked.append(scored_tasks(plan, calls))
    # Part of the name, and so of the cell: times with and without graphs are never pooled.
    graphs = ", CUDA graphs" if plan.cuda_graphs else ""
    return Workload(
        kind=plan.workload,
        name=f"{plan.workload}: {', '.join(plan.tasks)}{graphs}",
        digest=sha256_text(canonical_json(asked)),
        max_new_tokens=max(call.max_new_tokens for call in calls),
        batch_size=size,
        prompt_tokens=plan.prompt_tokens,
        num_devices=num_devices,
    )


def scored_tasks(plan: SpeedPlan, calls: Iterable[Call]) -> dict[str, dict[str, str]]:
    """Parts of the tasks whose timed answers are scored, by name."""
    if plan.workload != "answer":
        return {}
    return {request.task: dict(request.task_parts) for call in calls for request in call.requests}


def encode_calls(
    plan: SpeedPlan, calls: Calls, requests: Sequence[Request], model: Model
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """A model's token ids of every prompt, by call id. UserError if the model has no tokenizer or no room."""
    if model.tokenizer is None:
        raise UserError(f"checkpoint {model.checkpoint.name} has no tokenizer files: prompts are text, it needs one")
    known: dict[tuple[str, int], tuple[int, ...]] = {}
    encoded = {}
    for call in chain.from_iterable(calls.values()):
        for request in call.requests:
            key = (request.task, request.doc_id)
            if key not in known:
                fixed = plan.workload == "fixed"
                with naming(f"task {request.task!r}, document {request.doc_id}"):
                    # As in an evaluation of the same prompt: its end, if there is no room for the whole.
                    ids = (
                        _fixed_ids(plan, request, requests, model)
                        if fixed
                        else fitted_prompt_ids(model, request.text, call.max_new_tokens)[0]
                    )
                known[key] = tuple(ids)
        encoded[call.id] = tuple(known[request.task, request.doc_id] for request in call.requests)
    return encoded


def count_truncated(plan: SpeedPlan, calls: Calls, model: Model) -> dict[str, tuple[int, int]]:
    """Task -> how many prompts a model is timed on, and how many of them are truncated."""
    asked = {(r.task, r.doc_id): (call, r) for of_size in calls.values() for call in of_size for r in call.requests}
    counted: dict[str, tuple[int, int]] = {}
    for call, request in asked.values():
        num_prompts, num_truncated = counted.get(request.task, (0, 0))
        # A fixed workload sets its prompt length and is refused without room.
        cut = plan.workload == "answer" and fitted_prompt_ids(model, request.text, call.max_new_tokens)[1]
        counted[request.task] = num_prompts + 1, num_truncated + cut
    return counted


def _fixed_ids(plan: SpeedPlan, request: Request, requests: Sequence[Request], model: Model) -> list[int]:
    """A prompt of ``plan.prompt_tokens`` tokens: this one and those after it, cyclically, cut at the end.

    Natural text, because models degenerate on random ids, which a mixture of experts routes unlike any text.
    """
    ids = prompt_ids(model, request.text)
    if plan.prompt_tokens is not None:
        first = next(i for i, other in enumerate(requests) if other is request)
        for other in cycle([*requests[first + 1 :], *requests[: first + 1]]):
            if len(ids) >= plan.prompt_tokens:
                break
            ids = [*ids, *(text_codec(model).encode(f"\n{other.text}") if other.text else ids[:1])]
        ids = ids[: plan.prompt_tokens]
    needed = len(ids) + (plan.new_tokens or 0)
    if model.max_length is not None and needed > model.max_length:
        raise UserError(
            f"{needed} tokens of prompt and output do not fit into {model.max_length} tokens of {model.checkpoint.name}"
        )
    return ids


FINISH_SHARE, FINISH_S = 1e-3, 1e-4  # how far a finish may lie after the end: two readings of one clock


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The result of one timed call, in seconds from its start. ``is_stalled``: the clock stood longer than texts
    need."""

    generations: tuple[Generation, ...]
    wall_s: float
    prefill_s: float | None
    first_output_s: float
    peak_memory_bytes: int | None
    peak_memory_reason: str | None
    passes: tuple[Passes, ...]
    busy: Busy
    is_stalled: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Lane:
    """One cell as it is timed. ``replica`` is 1 for the second copy of the baseline; ``ids`` are by call id.

    ``decoder`` is set only during a round, see :func:`with_decoders`. ``watch`` and ``uncounted`` check that a call
    does only what it reports. ``text_cost`` is None without a tokenizer.
    """

    cell: Cell
    replica: int
    model: TimedModel
    decoder: Decoder | None
    watch: Watch
    uncounted: UncountedForwards
    text_cost: TextCost | None
    devices: Devices
    ids: Mapping[str, tuple[tuple[int, ...], ...]]
    seed: int

    def prompts(self, call: Call, sample: int) -> list[Prompt]:
        """The call's prompts; their seeds differ from ``sample`` to ``sample``, as between samples of an evaluation."""
        prompts = []
        for request, ids in zip(call.requests, self.ids[call.id], strict=True):
            seed = derive_seed(self.seed, request.task, request.doc_id, 0, sample)
            prompts.append(Prompt(id=document_prompt_id(request.task, request.doc_id), token_ids=ids, seed=seed))
        return prompts

    def time(self, call: Call, sample: int) -> Timing:
        """Decode the call once, from prompt ids on the host to the last id on the host."""
        prompts = self.prompts(call, sample)
        eos_token_ids = () if call.ignore_eos else self.model.eos_token_ids
        stop = call.stop if call.ignore_eos else stops_of(self.model, call.stop)
        self.model.forget()
        self.devices.forget_peak()
        watch, decoder = self.watch, self.decoder
        assert decoder is not None
        with no_garbage_collection(), self.uncounted.noted(self.model):
            look = watch.begin()
            given = self._decoded(decoder, prompts, call.max_new_tokens, eos_token_ids, stop)
            generations = finished(given, self.name)
            wall_s, busy = watch.end(look, self.name)
        peak_memory_bytes, reason = self.devices.peak_memory()
        asked = call_request(self.model, self.name, call.max_new_tokens, eos_token_ids, stop)
        self._check_count(call, generations)
        check_answers(generations, prompts, asked)
        self._check_passes(generations)
        self._check_times(generations, wall_s)
        lengths = [g.num_prompt_tokens + g.num_tokens + g.num_discarded_tokens for g in generations]
        cost = self.text_cost
        is_stalled = cost is not None and not watch.check_texts(look, cost, lengths, wall_s, self.name)
        moments_s = (self.model.prefilled_at_s, self.model.extended_at_s)
        prefill_s, extended_s = (None if moment is None else moment - look.started_s for moment in moments_s)
        ends_s = [wall_s, *(g.finish_s for g in generations if g.finish_s is not None)]
        return Timing(
            generations=generations,
            wall_s=wall_s,
            prefill_s=prefill_s,
            first_output_s=min([*ends_s, *([] if extended_s is None else [extended_s])]),
            peak_memory_bytes=peak_memory_bytes,
            peak_memory_reason=reason,
            passes=self.model.passes,
            busy=busy,
            is_stalled=is_stalled,
        )

    def _decoded(
        self,
        decoder: Decoder,
        prompts: list[Prompt],
        max_new_tokens: int,
        eos_token_ids: Sequence[int],
        stop: Sequence[str],
    ) -> object:
        with generating(decoder, self.name, "--batch-sizes"):
            return decoder.generate(prompts, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, stop=stop)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.cell.arm} {self.cell.decoder.label}, batch size {self.cell.workload.batch_size}"

    def _check_count(self, call: Call, generations: Sequence[Generation]) -> None:
        short = [g.num_tokens for g in generations if call.ignore_eos and g.num_tokens != call.max_new_tokens]
        if short:
            raise UserError(f"{self.name}: made {short[0]} tokens where exactly {call.max_new_tokens} were asked for")

    def _check_passes(self, generations: Sequence[Generation]) -> None:
        """ReportError if the model ran uncounted forwards, or others than reported."""
        check_all_counted(self.uncounted.num, self.name)
        if self.model.num_while_stopped:
            raise ReportError(
                f"{self.name}: ran {self.model.num_while_stopped} forwards while the clock stood for a text"
            )
        check_forwards(generations, self.model, self.name)
        others = self.model.num_threads - {self.watch.num_threads}
        if others:
            raise ReportError(
                f"{self.name}: ran forwards with {min(others)} CPU threads, and the plan has {self.watch.num_threads}"
            )

    def _check_times(self, generations: Sequence[Generation], wall_s: float) -> None:
        """ReportError if an answer finished before its call started or after it ended; not checked if the call's own
        time is impossible."""
        for generation in generations if wall_s > 0 else ():
            finish_s = generation.finish_s
            if finish_s is not None and not -FINISH_S <= finish_s <= wall_s * (1 + FINISH_SHARE) + FINISH_S:
                raise ReportError(
                    f"{self.name}: prompt {generation.prompt_id!r}: finish_s is {finish_s:.6g}, and the call took "
                    f"{wall_s:.6g} s"
                )


def make_one(timed: TimedModel, spec: DecoderSpec, clock: CallClock, watch: Watch) -> Decoder:
    """A decoder of the spec for a timed model; it may read the clock. ReportError if it starts lasting threads."""
    from twotower_eval.engine.decoders import from_spec

    with watch.no_threads_left(f"decoder {spec.label}"):
        return from_spec(timed, spec, clock=clock.reader())


def make_lanes(
    plan: SpeedPlan,
    calls: Calls,
    requests: Sequence[Request],
    specs: Sequence[DecoderSpec],
    models: tuple[Model, Model],
    clock: CallClock,
) -> dict[int, tuple[Lane, ...]]:
    """Batch size -> lanes: the baseline, its copy, and every candidate. ``models`` are baseline and candidate."""
    from twotower_eval.engine.decoders import decoder_spec

    autoregressive = decoder_spec("autoregressive", temperature=float(plan.temperature or 0))
    timed = [TimedModel(model, clock) for model in models]
    watch, uncounted = Watch(clock), UncountedForwards(models)
    texts = [
        None if model.tokenizer is None else text_cost(model.tokenizer, model.vocab_size, clock.now) for model in models
    ]
    ids = [encode_calls(plan, calls, requests, model) for model in models]
    arms: list[tuple[Arm, int, DecoderSpec]] = [("baseline", 0, autoregressive), ("baseline", 1, autoregressive)]
    arms += [("candidate", 0, spec) for spec in specs]
    lanes: dict[int, tuple[Lane, ...]] = {}
    for size in plan.batch_sizes:
        found: dict[tuple[str, int], Lane] = {}
        for arm, replica, spec in arms:
            which = 0 if arm == "baseline" else 1
            cell = _cell(plan, calls[size], size, arm, models[which], spec)
            lane = Lane(
                cell=cell,
                replica=replica,
                model=timed[which],
                decoder=make_one(timed[which], spec, clock, watch),
                watch=watch,
                uncounted=uncounted,
                text_cost=texts[which],
                devices=Devices(cell.checkpoint.devices),
                ids=ids[which],
                seed=plan.seed,
            )
            # An AR model timed against itself is one cell; its copy is the only other lane.
            found.setdefault((cell.id, replica), lane)
        lanes[size] = tuple(found.values())
    return lanes


def without_decoders(lanes: Mapping[int, tuple[Lane, ...]]) -> dict[int, tuple[Lane, ...]]:
    """The lanes without decoders, between two rounds."""
    return {size: tuple(replace(lane, decoder=None) for lane in of_size) for size, of_size in lanes.items()}


def with_decoders(lanes: Mapping[int, tuple[Lane, ...]], clock: CallClock) -> dict[int, tuple[Lane, ...]]:
    """The lanes, each with a new decoder: what a decoder keeps ends with its round."""

    def renewed(lane: Lane) -> Lane:
        return replace(lane, decoder=make_one(lane.model, lane.cell.decoder, clock, lane.watch))

    return {size: tuple(renewed(lane) for lane in of_size) for size, of_size in lanes.items()}


def _cell(plan: SpeedPlan, calls: Sequence[Call], size: int, arm: Arm, model: Model, spec: DecoderSpec) -> Cell:
    workload = make_workload(plan, calls, size, len(model.checkpoint.devices))
    extra = {"seed": plan.seed if (plan.temperature or 0) > 0 else None}
    return make_cell(arm, model.checkpoint, spec, workload, extra)
