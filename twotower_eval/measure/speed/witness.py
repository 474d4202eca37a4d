"""Calls that are decoded once more off the clock, with a witness of every row of logits (see ``models.witness``).

They lie among the timed calls of a round, so that a decoder cannot tell them by their place: in one round a call that
is timed, of every cell; in the next one a probe that has been read before, of every candidate, with the baseline beside
it. They are no part of any figure.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from twotower_eval.measure.speed.clock import CallClock
from twotower_eval.measure.speed.lanes import Lane, make_one
from twotower_eval.measure.speed.unseen import Probes, is_made_up
from twotower_eval.measure.speed.workloads import Call, Calls
from twotower_eval.records import Witnessed, WitnessedAnswer, WitnessedKind

EVERY = 2  # so manyth round looks at probes, where there are any


@dataclass(frozen=True, kw_only=True)
class Witnessing:
    """A call that a lane is to decode before a witness."""

    lane: Lane
    call: Call
    kind: WitnessedKind


def witnessings(
    number: int, lanes: Mapping[int, tuple[Lane, ...]], calls: Calls, probes: Probes, chance: random.Random
) -> Iterator[Witnessing]:
    """Those of a round, for every batch size."""
    again = probes.read_again(lanes, chance) if number % EVERY else []
    for probe in again:
        kind: WitnessedKind = "made up" if is_made_up(probe.call) else "document"
        yield from (Witnessing(lane=lane, call=probe.call, kind=kind) for lane in probe.lanes if not _draws(lane))
    for size, of_size in lanes.items() if not again else ():
        yield from _of_timed(chance.choice(calls[size]), of_size)


def _of_timed(call: Call, lanes: Sequence[Lane]) -> Iterator[Witnessing]:
    own = (lane for lane in lanes if lane.replica == 0 and not _draws(lane))
    yield from (Witnessing(lane=lane, call=call, kind="timed") for lane in own)


def _draws(lane: Lane) -> bool:
    temperature = lane.cell.decoder.params.get("temperature")
    return isinstance(temperature, (int, float)) and temperature > 0


def witnessed(step: Witnessing, launch_id: str, number: int, clock: CallClock) -> Witnessed:
    """Decode the call by a decoder of its own. Whatever is an error in a timed call is one here."""
    lane = step.lane
    fresh = replace(lane, decoder=make_one(lane.model, lane.cell.decoder, clock, lane.watch))
    with lane.model.witnessed(lane.ids[step.call.id]) as witness:
        made = fresh.time(step.call, number if step.kind == "timed" else 0).generations
    tally = witness.tally(generation.token_ids for generation in made)
    return Witnessed(
        cell=lane.cell.id,
        launch_id=launch_id,
        round=number,
        call_id=step.call.id,
        kind=step.kind,
        answers=tuple(WitnessedAnswer(prompt_id=one.prompt_id, token_ids=one.token_ids) for one in made),
        num_rows=tally.num_rows,
        num_tokens=tally.num_tokens,
        num_witnessed=tally.num_witnessed,
        num_drafted=tally.num_drafted,
    )
