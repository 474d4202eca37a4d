"""Calls of the warm-up in which a witness notes every row of logits (see ``models.witness``). None of them is timed.

Each has one prompt, and the decoders of that round make them among its other calls. At batch size 1 some of the calls
that warm up are witnessed as they are. Where batches are larger a few of their prompts are decoded alone besides. And
every candidate is given prompts that nothing has read before, on some of which the baseline follows: made-up ones,
which show whether drafts come from what was known, and documents that are not timed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from twotower_eval.engine.models.witness import Tally
from twotower_eval.measure.speed.lanes import Lane, Timing
from twotower_eval.measure.speed.unseen import Probes, is_made_up
from twotower_eval.measure.speed.workloads import Call, Calls
from twotower_eval.records import Witnessed, WitnessedAnswer, WitnessedKind, draws

NUM_AS_THEY_ARE, NUM_ALONE = 8, 4  # timed prompts of a launch: of a batch size of 1, and of larger ones
NUM_MADE_UP, NUM_DOCUMENTS = 8, 2  # of every candidate
NUM_BESIDE = 4  # of these, those that the baseline is given as well


@dataclass(frozen=True, kw_only=True)
class Witnessing:
    """A call of one prompt, which these lanes decode in this order."""

    lanes: tuple[Lane, ...]
    call: Call
    kind: WitnessedKind


def watched_calls(calls: Calls, chance: random.Random) -> frozenset[str]:
    """Ids of the calls of the plan that are witnessed as they are."""
    alone = [call.id for call in calls.get(1, ())]
    return frozenset(chance.sample(alone, min(NUM_AS_THEY_ARE, len(alone))))


def witnessings(
    lanes: Mapping[int, Sequence[Lane]], calls: Calls, probes: Probes, chance: random.Random
) -> Iterator[Witnessing]:
    """What a launch decodes besides."""
    for size, of_size in lanes.items():
        watched = tuple(lane for lane in of_size if is_watched(lane))
        if size > 1 and watched:
            yield from _of_timed(calls[size], watched, chance)
        for lane in watched:
            beside = tuple(other for other in watched if other.cell.arm == "baseline" and other is not lane)
            if lane.cell.arm == "candidate":
                for number, probe in enumerate(probes.alone(size, (lane, *beside), NUM_MADE_UP, NUM_DOCUMENTS)):
                    kind: WitnessedKind = "made up" if is_made_up(probe.call) else "document"
                    own = probe.lanes if number < NUM_BESIDE else probe.lanes[:1]
                    yield Witnessing(lanes=own, call=probe.call, kind=kind)


def is_watched(lane: Lane) -> bool:
    """Whether a lane has witnessed calls: not the baseline's copy, and nothing that draws its tokens."""
    return lane.replica == 0 and not draws(lane.cell)


def _of_timed(calls: Sequence[Call], lanes: Sequence[Lane], chance: random.Random) -> Iterator[Witnessing]:
    """Some prompts of larger calls, each by itself."""
    places = [(call, at) for call in calls for at in range(len(call.requests))]
    for call, at in chance.sample(places, min(NUM_ALONE, len(places))):
        alone = replace(call, id=f"{call.id}-{at}", requests=(call.requests[at],))
        own = tuple(replace(lane, ids={alone.id: (lane.ids[call.id][at],)}) for lane in lanes)
        yield Witnessing(lanes=own, call=alone, kind="timed")


def witnessed(lane: Lane, call: Call) -> tuple[Timing, Tally]:
    """Decode a call of one prompt under a witness. Whatever is an error in a timed call is one here."""
    with lane.model.witnessed(lane.ids[call.id][0]) as witness:
        timing = lane.time(call, 0)
    return timing, witness.tally(timing.generations[0].token_ids)


def witnessed_row(
    lane: Lane, call: Call, kind: WitnessedKind, launch_id: str, timing: Timing, tally: Tally
) -> Witnessed:
    """The journal's row of it."""
    (made,) = timing.generations
    return Witnessed(
        cell=lane.cell.id,
        launch_id=launch_id,
        round=0,
        call_id=call.id,
        kind=kind,
        answers=(WitnessedAnswer(prompt_id=made.prompt_id, token_ids=made.token_ids),),
        num_rows=tally.num_rows,
        num_tokens=tally.num_tokens,
        num_witnessed=tally.num_witnessed,
        num_drafted=tally.num_drafted,
    )
