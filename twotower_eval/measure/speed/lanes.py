"""Lanes: the cells of a plan, each ready to time any of its calls. Every baseline has two, for its A/A null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twotower_eval.decoder_settings import baseline_spec
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
from twotower_eval.engine.decoders.speculative import LookupParams, lookup_passes
from twotower_eval.engine.models.chat import chat_extra
from twotower_eval.engine.models.counting import UncountedForwards
from twotower_eval.engine.models.protocol import Model, TextCodec, remote
from twotower_eval.engine.models.tokenizer import stops_of
from twotower_eval.errors import UserError
from twotower_eval.measure.speed.clock import CallClock, Devices, TimedModel, no_garbage_collection
from twotower_eval.measure.speed.watch import Busy, TextCost, Watch, text_cost
from twotower_eval.measure.speed.workloads import (
    Call,
    Calls,
    Load,
    Request,
    encode_calls,
    loads_of,
    make_workload,
)
from twotower_eval.plan import SpeedPlan, named_baselines
from twotower_eval.records import (
    Arm,
    Cell,
    DecoderSpec,
    Generation,
    Passes,
    Prompt,
    PromptTiming,
    canonical_json,
    derive_seed,
    document_prompt_id,
    draws_at_random,
    make_cell,
    sha256_text,
)
from twotower_eval.rules import finite, refuse_same
from twotower_eval.task_options import run_seed

ONE_BY_ONE = ("autoregressive", "static_cache", "mock_ar", "reference")  # decoders whose tokens each take a forward
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
    energy_j: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Lane:
    """One cell as it is timed. ``replica`` is 1 for the second copy of a baseline; ``ids`` are by call id.

    ``decoder`` is set only during a round, see :func:`with_decoders`. ``watch`` and ``uncounted`` check that a call
    does only what it reports. ``text_cost`` is None without a tokenizer. ``untimed`` is the model itself. ``counter``
    counts the tokens of both arms where one is behind a server.
    """

    cell: Cell
    replica: int
    model: TimedModel
    untimed: Model
    decoder: Decoder | None
    watch: Watch
    uncounted: UncountedForwards
    text_cost: TextCost | None
    devices: Devices
    ids: Mapping[str, tuple[tuple[int, ...], ...]]
    seed: int
    counter: TextCodec | None = None

    def prompts(self, call: Call, sample: int) -> list[Prompt]:
        """The call's prompts; their seeds differ from ``sample`` to ``sample``, as between samples of an evaluation."""
        prompts = []
        for request, ids in zip(call.requests, self.ids[call.id], strict=True):
            seed = derive_seed(self.seed, request.task, request.doc_id, 0, sample)
            text = None if self.cell.checkpoint.served is None else request.text
            name = document_prompt_id(request.task, request.doc_id)
            prompts.append(Prompt(id=name, token_ids=ids, text=text, seed=seed))
        return prompts

    def recounted(self, generation: Generation) -> int | None:
        """The tokens of an answer's text as both arms count them; None where each arm's own count."""
        if self.counter is None or generation.text is None:
            return None
        try:
            return len(self.counter.encode(generation.text)) if generation.text else 0
        except UserError:  # a text that this tokenizer cannot read
            return 0

    def lookup_passes(self, generation: Generation, prompt_ids: Sequence[int]) -> int | None:
        """The passes in which a prompt lookup, with this one's settings if it is one, finds an answer."""
        spec = self.cell.decoder
        if spec.kind in ONE_BY_ONE or generation.num_denoiser_forwards or self.cell.checkpoint.served is not None:
            return None
        given: Mapping[str, Any] = spec.params
        params = LookupParams(**given) if spec.kind == "prompt_lookup" else None
        return lookup_passes(prompt_ids, generation.token_ids, params)

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
            before_j = self.devices.energy.read_j()
            look = watch.begin()
            given = self._decoded(decoder, prompts, call.max_new_tokens, eos_token_ids, stop)
            generations = finished(given, self.name)
            wall_s, busy = watch.end(look, self.name)
            energy_j = self.devices.energy.since_j(before_j)
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
        ends_s += [g.served.first_s for g in generations if g.served and g.served.first_s is not None]
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
            energy_j=energy_j,
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
        workload = self.cell.workload
        load = f"batch size {workload.batch_size}" if workload.request_rate is None else f"{workload.request_rate:g}/s"
        return f"{self.cell.who} {self.cell.decoder.label}, {load}"

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
    models: Sequence[Model],
    clock: CallClock,
) -> dict[Load, tuple[Lane, ...]]:
    """Batch size or request rate -> lanes: every baseline with its copy, then every candidate. ``models`` are those of
    the baselines in their order, and the candidate's."""
    watch, uncounted = Watch(clock), UncountedForwards(models)
    counter = next((model.tokenizer for model in models if remote(model) is not None), None)
    ready: dict[int, _Ready] = {}
    for model in models:
        if id(model) not in ready:
            ready[id(model)] = _ready(plan, calls, requests, model, clock)
    arms = _arms(plan, specs, models)
    lanes: dict[Load, tuple[Lane, ...]] = {}
    for size in loads_of(plan):
        found: dict[tuple[str, int], Lane] = {}
        cells = [_cell(plan, calls[size], size, arm) for arm in arms]
        refuse_same(cells)
        for arm, cell in zip(arms, cells, strict=True):
            own = ready[id(arm.model)]
            lane = Lane(
                cell=cell,
                replica=arm.replica,
                model=own.timed,
                untimed=arm.model,
                decoder=make_one(own.timed, arm.spec, clock, watch),
                watch=watch,
                uncounted=uncounted,
                text_cost=own.text_cost,
                devices=_devices(cell),
                ids=own.ids,
                seed=run_seed(plan.seed),
                counter=counter,
            )
            # An AR model timed against itself is one cell; its copy is the only other lane.
            found.setdefault((cell.id, arm.replica), lane)
        lanes[size] = tuple(found.values())
    return lanes


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """What all lanes of a model share."""

    timed: TimedModel
    text_cost: TextCost | None
    ids: Mapping[str, tuple[tuple[int, ...], ...]]


def _ready(plan: SpeedPlan, calls: Calls, requests: Sequence[Request], model: Model, clock: CallClock) -> _Ready:
    # A server's answers are read behind the last of them, when nothing is left that could run beside it.
    is_here = remote(model) is None
    cost = None if model.tokenizer is None or not is_here else text_cost(model.tokenizer, model.vocab_size, clock.now)
    ids = encode_calls(plan, calls, requests, model)
    return _Ready(timed=TimedModel(model, clock), text_cost=cost, ids=ids)


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """What a lane is made of, at any batch size; ``name`` is that of a baseline among several."""

    arm: Arm
    name: str | None
    replica: int
    model: Model
    spec: DecoderSpec


def _arms(plan: SpeedPlan, specs: Sequence[DecoderSpec], models: Sequence[Model]) -> list[_Arm]:
    """The baselines, each with its copy, then the candidates."""
    found = []
    for (name, single), model in zip(named_baselines(plan), models, strict=False):
        own = baseline_spec(single)
        found += [_Arm(arm="baseline", name=name, replica=copy, model=model, spec=own) for copy in (0, 1)]
    return found + [_Arm(arm="candidate", name=None, replica=0, model=models[-1], spec=spec) for spec in specs]


def _devices(cell: Cell) -> Devices:
    """The devices that a cell computes on, none of them here for a model behind a server."""
    if cell.checkpoint.served is not None:
        return Devices((), unmeasured="not measured behind a server")
    return Devices(cell.checkpoint.devices)


def without_decoders(lanes: Mapping[Load, tuple[Lane, ...]]) -> dict[Load, tuple[Lane, ...]]:
    """The lanes without decoders, between two rounds."""
    return {size: tuple(replace(lane, decoder=None) for lane in of_size) for size, of_size in lanes.items()}


def with_decoders(lanes: Mapping[Load, tuple[Lane, ...]], clock: CallClock) -> dict[Load, tuple[Lane, ...]]:
    """The lanes, each with a new decoder: what a decoder keeps ends with its round."""

    def renewed(lane: Lane) -> Lane:
        return replace(lane, decoder=make_one(lane.model, lane.cell.decoder, clock, lane.watch))

    return {size: tuple(renewed(lane) for lane in of_size) for size, of_size in lanes.items()}


def _cell(plan: SpeedPlan, calls: Sequence[Call], size: Load, arm: _Arm) -> Cell:
    checkpoint = arm.model.checkpoint
    workload = make_workload(plan, calls, size, None if checkpoint.served else len(checkpoint.devices))
    drawn = (plan.temperature or 0) > 0 or draws_at_random(arm.spec)
    extra = {"seed": run_seed(plan.seed) if drawn else None, **chat_extra(arm.model)}
    return make_cell(arm.arm, checkpoint, arm.spec, workload, extra, arm.name)


def prompt_timing(lane: Lane, generation: Generation, wall_s: float, prompt_ids: Sequence[int] = ()) -> PromptTiming:
    """The timing of one prompt; without a reported finish time, the prompt finishes at the end of the call."""
    return PromptTiming(
        prompt_id=generation.prompt_id,
        num_prompt_tokens=generation.num_prompt_tokens,
        num_tokens=generation.num_tokens,
        num_discarded_tokens=generation.num_discarded_tokens,
        num_context_forwards=generation.num_context_forwards,
        num_denoiser_forwards=generation.num_denoiser_forwards,
        num_draft_forwards=generation.num_draft_forwards,
        num_forced_commits=generation.num_forced_commits,
        finish=generation.finish,
        finish_s=_finish_s(generation, finite(wall_s)),
        tokens_sha256=sha256_text(canonical_json(list(generation.token_ids))),
        num_recounted=lane.recounted(generation),
        num_lookup_passes=lane.lookup_passes(generation, prompt_ids),
        served=generation.served,
    )


def _finish_s(generation: Generation, wall_s: float) -> float:
    """The finish time, clipped to the call: a decoder's clock may start slightly before it or end after it."""
    return wall_s if generation.finish_s is None else max(0.0, min(finite(generation.finish_s), wall_s))
