"""Calls beside the timed ones: prompts that were never read before, and answers decoded with a witness."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from twotower_eval.engine.models.witness import Tally
from twotower_eval.measure.speed.lanes import Lane, Timing
from twotower_eval.measure.speed.workloads import Call, Calls, Load, Request, encode_calls, prefix_of
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import (
    ChatPrompt,
    Witnessed,
    WitnessedAnswer,
    WitnessedKind,
    chat_json,
    derive_seed,
    draws,
    plain_chat,
    run_and_launch,
    sha256_text,
)
from twotower_eval.task_options import run_seed

NUM_AS_THEY_ARE, NUM_ALONE = 8, 4  # timed prompts of a launch: of a batch size of 1, and of larger ones
NUM_MADE_UP, NUM_DOCUMENTS = 8, 2  # of every candidate
NUM_BESIDE = 4  # of these, those that the baseline is given as well


@dataclass(frozen=True, kw_only=True)
class Witnessing:
    """A call on one prompt that these lanes decode in this order."""

    lanes: tuple[Lane, ...]
    call: Call
    kind: WitnessedKind


def watched_calls(calls: Calls, chance: random.Random) -> frozenset[str]:
    """Ids of the plan's calls that are witnessed unchanged."""
    alone = [call.id for call in calls.get(1, ())]
    return frozenset(chance.sample(alone, min(NUM_AS_THEY_ARE, len(alone))))


def witnessings(
    lanes: Mapping[Load, Sequence[Lane]], calls: Calls, probes: Probes, chance: random.Random
) -> Iterator[Witnessing]:
    """The witnessed calls of a launch."""
    for size, of_size in lanes.items():
        watched = tuple(lane for lane in of_size if is_watched(lane))
        if size != 1 and watched:
            yield from _of_timed(calls[size], watched, chance)
        for lane in watched:
            beside = tuple(other for other in watched if other.cell.arm == "baseline" and other is not lane)
            if lane.cell.arm == "candidate":
                for number, probe in enumerate(probes.alone(size, (lane, *beside), NUM_MADE_UP, NUM_DOCUMENTS)):
                    kind: WitnessedKind = "made up" if is_made_up(probe.call) else "document"
                    own = probe.lanes if number < NUM_BESIDE else probe.lanes[:1]
                    yield Witnessing(lanes=own, call=probe.call, kind=kind)


def is_watched(lane: Lane) -> bool:
    """Whether a lane has witnessed calls: not the baseline's copy, nothing that samples, nothing behind a server."""
    return lane.replica == 0 and not draws(lane.cell) and lane.cell.checkpoint.served is None


def _of_timed(calls: Sequence[Call], lanes: Sequence[Lane], chance: random.Random) -> Iterator[Witnessing]:
    """Some prompts of larger calls, each alone."""
    places = [(call, at) for call in calls for at in range(len(call.requests))]
    for call, at in chance.sample(places, min(NUM_ALONE, len(places))):
        alone = replace(call, id=f"{call.id}-{at}", requests=(call.requests[at],))
        own = tuple(replace(lane, ids={alone.id: (lane.ids[call.id][at],)}) for lane in lanes)
        yield Witnessing(lanes=own, call=alone, kind="timed")


def witnessed(lane: Lane, call: Call) -> tuple[Timing, Tally]:
    """Decode a call on one prompt with a witness. Errors are those of a timed call."""
    with lane.model.witnessed(lane.ids[call.id][0]) as witness:
        timing = lane.time(call, 0)
    return timing, witness.tally(timing.generations[0].token_ids)


def witnessed_row(
    lane: Lane, call: Call, kind: WitnessedKind, launch_id: str, timing: Timing, tally: Tally
) -> Witnessed:
    """The journal row of a witnessed call."""
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


NUM_TRIES = 20  # pairs of documents that are tried before there is no new prompt to be had
NUM_NEAR = 8  # documents of the nearest lengths, one of which continues a prompt
Kind = tuple[str, tuple[str, ...], int]
Ids = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class NewPrompt:
    """A made-up request; its ``doc_id`` is above those of all documents."""

    task: str
    doc_id: int
    text: str
    stop: tuple[str, ...]
    max_new_tokens: int
    prompt_sha256: str
    task_parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A call that ``lanes`` time in this order; it is no part of the measured results."""

    call: Call
    lanes: tuple[Lane, ...]


class NewPrompts:
    """New prompts, none twice: documents that are not timed, or prompts made from two documents."""

    def __init__(self, calls: Calls, requests: Sequence[Request], seed: int) -> None:
        self._random = random.Random(seed)
        self._texts = {request.text for request in requests}
        self._next_id = 1 + max((request.doc_id for request in requests), default=0)
        self._all: dict[Kind, list[Request]] = defaultdict(list)
        for request in requests:
            self._all[_kind(request)].append(request)
        timed = {request.text for of_size in calls.values() for call in of_size for request in call.requests}
        self._documents: dict[Kind, list[Request]] = {}  # given as they are, each once
        self._beginnings: dict[Kind, list[Request]] = {}  # made-up prompts begin like these, each once; then like any
        for kind, known in self._all.items():
            left = list({one.text: one for one in known if one.text not in timed}.values())
            self._random.shuffle(left)
            self._documents[kind], self._beginnings[kind] = left[::2], left[1::2]

    def similar_call(self, call: Call, call_id: str, *, of_documents: bool = False) -> Call | None:
        """A call as large as ``call``, with prompts of the same kinds and lengths; ``None`` if there are none.

        ``of_documents``: use unchanged documents if enough are left.
        """
        found = self._documents_like(call.requests) if of_documents else None
        if found is None:
            made = [self._made_up_like(request) for request in call.requests]
            there = tuple(one for one in made if one is not None)
            found = there if len(there) == len(made) else None
        return None if found is None else replace(call, id=call_id, requests=found)

    def _documents_like(self, requests: Sequence[Request]) -> tuple[Request, ...] | None:
        needed = Counter(map(_kind, requests))
        if any(len(self._documents[kind]) < num for kind, num in needed.items()):
            return None
        return tuple(_taken(self._documents[_kind(request)], len(request.text)) for request in requests)

    def _made_up_like(self, request: Request) -> NewPrompt | None:
        kind, length = _kind(request), len(request.text)
        known = self._all[kind]
        for _ in range(NUM_TRIES):
            self._beginnings[kind] = self._beginnings[kind] or list(known)
            first = _taken(self._beginnings[kind], length)
            near = sorted((one for one in known if one is not first), key=lambda one: abs(len(one.text) - length))
            text = _joined(first.text, self._random.choice(near[:NUM_NEAR]).text, self._random) if near else first.text
            if text not in self._texts:
                self._texts.add(text)
                self._next_id += 1
                return NewPrompt(
                    task=request.task,
                    doc_id=self._next_id,
                    text=text,
                    stop=request.stop,
                    max_new_tokens=request.max_new_tokens,
                    prompt_sha256=sha256_text(text),
                )
        return None


def _taken(left: list[Request], length: int) -> Request:
    """Remove and return the one nearest to that length."""
    found = min(left, key=lambda one: abs(len(one.text) - length))
    left.remove(found)
    return found


def is_made_up(call: Call) -> bool:
    """Whether the prompts of a probe are made up, not documents."""
    return any(isinstance(request, NewPrompt) for request in call.requests)


def _kind(request: Request) -> Kind:
    return (request.task, request.stop, request.max_new_tokens)


def joined(first: str, second: str, chance: random.Random) -> str:
    """A text that begins like ``first`` and continues like ``second``, with the lines that both begin with reordered.

    At most half comes from the first: if that was read before, most of the text is still new.
    """
    unlike = (at for at, (own, other) in enumerate(zip(first, second, strict=False)) if own != other)
    shared = first[: next(unlike, min(len(first), len(second)))]
    shared = shared[: shared.rfind("\n") + 1]
    own = [re.findall(r"\s*\S+\s*$|\s*\S+", text[len(shared) :]) for text in (first, second)]
    if min(map(len, own)) < 2:
        own = [list(text[len(shared) :]) for text in (first, second)]
    cut = chance.randint(1, max(1, len(own[0]) // 2))
    other = min(max(1, round(cut / max(1, len(own[0])) * len(own[1]))), max(1, len(own[1]) - 1))
    return turned(shared, chance) + "".join([*own[0][:cut], *own[1][other:]])


def _joined(first: str, second: str, chance: random.Random) -> str:
    """The same of two chats: the first, with a last question that is made of both."""
    if not (isinstance(first, ChatPrompt) and isinstance(second, ChatPrompt)):
        return joined(first, second, chance)
    asked, other = json.loads(first.asked), json.loads(second.asked)
    own, others = ([one for one in said["messages"] if one["role"] == "user"] for said in (asked, other))
    if not (own and others):
        return joined(first, second, chance)
    own[-1]["content"] = joined(own[-1]["content"], others[-1]["content"], chance)
    return ChatPrompt(plain_chat(asked["messages"]), chat_json(**asked))


def turned(shared: str, chance: random.Random) -> str:
    """Examples (else lines, else sentences) in an order with another beginning; unchanged if there is only one."""
    inside = shared.rstrip("\n")
    for pattern, separator in (("\n\n", "\n\n"), ("\n", "\n"), (r"(?<=[.!?]) ", " ")):
        parts = re.split(pattern, inside)
        starts = [index for index, part in enumerate(parts) if part != parts[0]]
        if starts:
            start = chance.choice(starts)
            return separator.join([*parts[start:], *parts[:start]]) + shared[len(inside) :]
    return shared


class Probes:
    """The probes of a launch: for every cell a few new calls, and those of the last round again.

    Each cell has its own new calls and is timed on them first, as another cell that read them before could share its
    memory. Right after a candidate every baseline is timed on the same call, for comparison. The baselines' copies have
    no new calls.
    """

    def __init__(
        self,
        plan: SpeedPlan,
        calls: Calls,
        requests: Sequence[Request],
        launch_id: str,
    ) -> None:
        self._plan, self._calls, self._requests = plan, calls, requests
        self._launch = run_and_launch(launch_id)[1]
        self._prompts = NewPrompts(calls, requests, derive_seed(run_seed(plan.seed), "new prompts", launch_id))
        self._random = random.Random(derive_seed(run_seed(plan.seed), "calls that are probed", launch_id))
        self._num_made: Counter[str] = Counter()  # by cell
        self._seen: list[tuple[str, Load, Call]] = []  # cell, batch size and call of the last round
        self._num_alone = 0
        self._ids: dict[str, dict[str, Ids]] = {}  # by call and cell

    def num_timings(self, lanes: Mapping[Load, tuple[Lane, ...]], num_rounds: int) -> int:
        """Number of probe timings in the first ``num_rounds``: the first has none of the round before again."""
        if not num_rounds:
            return 0
        num = 0
        for size, of_size in lanes.items():
            arms = [lane.cell.arm for lane in of_size if lane.replica == 0]
            beside = arms.count("baseline") * arms.count("candidate")
            num += self._num_calls(size) * ((2 * len(arms) + beside) * num_rounds - len(arms))
        return num

    def _num_calls(self, size: Load) -> int:
        return -(-self._plan.probes // len(self._calls[size][0].requests))

    def of_round(self, lanes: Mapping[Load, tuple[Lane, ...]]) -> list[Probe]:
        """The probes of the next round, on that round's lanes."""
        again = self._seen
        self._seen = [made for size, of_size in lanes.items() for made in self._make(size, of_size)]
        kept = {call.id for _, _, call in (*again, *self._seen)}
        self._ids = {call_id: ids for call_id, ids in self._ids.items() if call_id in kept}
        return [
            *(self._probe(cell, size, call, lanes[size], controlled=True) for cell, size, call in self._seen),
            *(self._probe(cell, size, call, lanes[size], controlled=False) for cell, size, call in again),
        ]

    def alone(self, size: Load, lanes: tuple[Lane, ...], num_made_up: int, num_documents: int) -> Iterator[Probe]:
        """New prompts, each alone, that are not timed; none if a plan has no probes."""
        for number in range(num_made_up + num_documents if self._plan.probes else 0):
            timed = self._random.choice(self._calls[size])
            like = replace(timed, requests=(self._random.choice(timed.requests),))
            call_id = f"{prefix_of(size)}-alone{self._launch}-{self._num_alone}"
            call = self._prompts.similar_call(like, call_id, of_documents=number >= num_made_up)
            self._num_alone += 1
            if call is not None:
                ids = self._encoded(call, lanes, size)
                yield Probe(call=call, lanes=tuple(replace(one, ids={call.id: ids[one.cell.id]}) for one in lanes))

    def _make(self, size: Load, lanes: Sequence[Lane]) -> Iterator[tuple[str, Load, Call]]:
        """Make new calls of every cell of a batch size, with their token ids."""
        for lane in (lane for lane in lanes if lane.replica == 0):
            for _ in range(self._num_calls(size)):
                cell, number = lane.cell.id, self._num_made.total()
                like, of_documents = self._random.choice(self._calls[size]), self._num_made[cell] % 2 == 0
                call = self._prompts.similar_call(
                    like, f"{prefix_of(size)}-new{self._launch}-{number}", of_documents=of_documents
                )
                self._num_made[cell] += 1
                if call is not None:
                    self._ids[call.id] = self._encoded(call, lanes, size)
                    yield cell, size, call

    def _encoded(self, call: Call, lanes: Sequence[Lane], size: Load) -> dict[str, Ids]:
        """Cell -> token ids, with the beginning cut off if they are longer than any timed prompt of that batch size."""
        found: dict[int, Ids] = {}  # by model
        requests = [*call.requests, *self._requests]
        for lane in lanes:
            if id(lane.untimed) not in found:
                ids = encode_calls(self._plan, {len(call.requests): (call,)}, requests, lane.untimed)[call.id]
                most = max(len(row) for timed in self._calls[size] for row in lane.ids[timed.id])
                found[id(lane.untimed)] = tuple(row[-most:] for row in ids)
        return {lane.cell.id: found[id(lane.untimed)] for lane in lanes}

    def _probe(self, cell: str, size: Load, call: Call, lanes: Sequence[Lane], *, controlled: bool) -> Probe:
        own = [lane for lane in lanes if lane.replica == 0 and lane.cell.id == cell]
        if controlled and own[0].cell.arm == "candidate":
            own += [lane for lane in lanes if lane.replica == 0 and lane.cell.arm == "baseline"]
        arms = tuple(replace(lane, ids={call.id: self._ids[call.id][lane.cell.id]}) for lane in own)
        return Probe(call=call, lanes=arms)
