"""Streams of requests to a server: when each is due, and the timed calls that they make.

A closed loop keeps so many requests in flight; at a rate requests are sent whatever the server does. There every time
is from the moment when a request was due, so that a server that stalls is charged for all that it keeps waiting ("no
coordinated omission"). A request is asked once: one that fails is a failed answer, and no second try hides it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from twotower_eval.engine.decoders.reported import call_request, check_answers
from twotower_eval.engine.endpoints.client import Failure
from twotower_eval.engine.endpoints.decoder import Answered, EndpointDecoder, Order
from twotower_eval.engine.models.tokenizer import stops_of
from twotower_eval.measure.speed.clock import no_garbage_collection
from twotower_eval.measure.speed.lanes import Lane, prompt_timing
from twotower_eval.measure.speed.workloads import Call, Load, PerSecond
from twotower_eval.records import (
    Generation,
    PromptTiming,
    Served,
    SpeedPhase,
    SpeedSample,
    TimeFault,
    canonical_json,
    derive_seed,
    sha256_text,
)
from twotower_eval.rules import finite, time_fault
from twotower_eval.store.journal import moment_now, moment_text


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One request of a timed stream: its call, its timed call's record, and its answer if there is one."""

    call: Call
    sample: SpeedSample
    generation: Generation | None


def schedule(load: Load, calls: Sequence[Call], *seed: object) -> list[tuple[Call, float]]:
    """The calls of a stream in random order, each with the seconds from the stream's start at which it is due.

    All lanes of a round have the same one. Poisson arrivals are a random number of seconds apart, exponentially
    distributed. In a closed loop all are due at once, and wait for a place.
    """
    chance = random.Random(derive_seed(*seed, str(load)))
    ordered = chance.sample(list(calls), len(calls))
    if not isinstance(load, PerSecond):
        return [(call, 0.0) for call in ordered]
    due_s, found = 0.0, []
    for call in ordered:
        found.append((call, due_s))
        due_s += chance.expovariate(load.rate) if load.arrivals == "poisson" else 1 / load.rate
    return found


def time_stream(
    lane: Lane,
    scheduled: Sequence[tuple[Call, float]],
    *,
    in_flight: int | None,
    launch_id: str,
    phase: SpeedPhase,
    number: int,
) -> Iterator[Sent]:
    """Send a lane's requests and time each of them. EndpointError where none is answered, or one is refused."""
    decoder = lane.decoder
    assert isinstance(decoder, EndpointDecoder), "only servers are sent streams"
    orders = []
    for call, due_s in scheduled:
        [prompt] = lane.prompts(call, number)
        eos_token_ids, stop = lane.model.eos_token_ids, stops_of(lane.model, call.stop)
        budget = call.max_new_tokens
        orders.append(Order(prompt=prompt, max_new_tokens=budget, eos_token_ids=eos_token_ids, stop=stop, due_s=due_s))
    lane.model.forget()
    began = moment_now()
    with no_garbage_collection():
        answered = decoder.stream(orders, in_flight=in_flight)
    for (call, _), order, one in zip(scheduled, orders, answered, strict=True):
        if isinstance(one.result, Generation):
            asked = call_request(lane.model, lane.name, order.max_new_tokens, order.eos_token_ids, order.stop)
            check_answers([one.result], [order.prompt], asked)
        sample = _sample(lane, call, order, one)
        started_at = moment_text(began + timedelta(seconds=one.due_s))
        sample = replace(sample, launch_id=launch_id, phase=phase, round=number, started_at=started_at)
        yield Sent(call=call, sample=sample, generation=one.result if isinstance(one.result, Generation) else None)


def _sample(lane: Lane, call: Call, order: Order, one: Answered) -> SpeedSample:
    wall_s, late_s = one.ended_s - one.due_s, max(0.0, one.sent_s - one.due_s)
    fault: TimeFault | None = "failed"
    first_output_s = None
    if isinstance(one.result, Failure):
        timing = _failed(lane, order, one.result, wall_s)
    else:
        timing, fault = prompt_timing(lane, one.result, wall_s), time_fault(wall_s, [])
        first_s = None if one.result.served is None else one.result.served.first_s
        first_output_s = wall_s if first_s is None else min(wall_s, late_s + first_s)
    return SpeedSample(
        call_id=call.id,
        launch_id="",
        cell=lane.cell.id,
        replica=lane.replica,
        round=0,
        phase="measure",
        batch_size=1,
        wall_s=finite(wall_s),
        prefill_s=None,
        first_output_s=first_output_s,
        peak_memory_bytes=None,
        peak_memory_reason=lane.devices.peak_memory()[1],
        started_at="",
        prompts=(timing,),
        fault=fault,
        due_s=one.due_s,
        late_s=late_s,
    )


def _failed(lane: Lane, order: Order, failure: Failure, wall_s: float) -> PromptTiming:
    """The place of an answer that did not come: no tokens."""
    return PromptTiming(
        prompt_id=order.prompt.id,
        num_prompt_tokens=len(order.prompt.token_ids),
        num_tokens=0,
        num_discarded_tokens=0,
        num_context_forwards=0,
        num_denoiser_forwards=0,
        num_forced_commits=None,
        finish="length",
        finish_s=wall_s,
        tokens_sha256=sha256_text(canonical_json([])),
        num_recounted=None if lane.counter is None else 0,
        served=Served(num_prompt_tokens=None, num_tokens=None, failure=failure.fault),
    )
