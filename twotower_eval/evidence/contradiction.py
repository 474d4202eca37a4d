"""What a run's files say in two ways: its kinds, and the words for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from twotower_eval.records import SpeedSample
from twotower_eval.store import Run

ContradictionKind = Literal[
    "plan hash",
    "plan and cells",
    "cell id",
    "journal changed",
    "journal short",
    "rounds told",
    "seconds told",
    "documents told",
    "launch untold",
    "calls overlap",
    "batch size",
    "prompts of a call",
    "prompt tokens",
    "prompt tokens of arms",
    "tokens of equal hash",
    "tokens beyond budget",
    "forwards counted",
    "call and answer",
    "call without answer",
    "answer without call",
    "text of equal tokens",
    "score without answer",
    "answer without score",
    "score of another prompt",
    "score outside 0 to 1",
    "scores of equal answers",
    "score of the target",
    "scores of one likelihood",
]


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """What a run's files say in two ways: ``stated`` and ``found``, first at ``where``; ``num`` places in all."""

    kind: ContradictionKind
    where: str
    stated: str
    found: str
    num: int = 1


Place = tuple[str, str, str]  # where, stated, found
Check = Callable[[Run], Iterable[Place]]


WORDS: Mapping[ContradictionKind, str] = {
    "plan hash": "the plan's sha256 is written as {stated}, that of the plan is {found}",
    "plan and cells": "the plan says {stated}, its cells say {found}",
    "cell id": "{where} is not made of its checkpoint, decoder and workload, which give {found}",
    "journal changed": "{where}: {stated} are not those that were written, by the sha256 in events.jsonl",
    "journal short": "{where} has {found} lines, and events.jsonl tells of {stated}",
    "rounds told": "events.jsonl tells of {stated} measured rounds, speed.jsonl has {found}",
    "seconds told": "events.jsonl tells of {stated} s on the clock, the calls of speed.jsonl add up to {found} s",
    "documents told": "events.jsonl tells of {stated} documents of {where}, {found} are scored",
    "launch untold": "speed.jsonl has launch {found}, and events.jsonl tells of {stated} only",
    "calls overlap": "{where} took {stated} s, and the next call of its launch began {found} s after it",
    "batch size": "{where} was of {found} prompts, its cell times {stated}",
    "prompts of a call": "{where} is on other prompts in one round than in another",
    "prompt tokens": "{where} has {stated} tokens in one round and {found} in another",
    "prompt tokens of arms": "{where} has {stated} tokens for one arm and {found} for the other, of one tokenizer",
    "tokens of equal hash": "{where}: tokens of one sha256 are said to be {stated} and {found}",
    "tokens beyond budget": "{where} made {found} tokens, at most {stated} were asked for",
    "forwards counted": "the prompts of {where} report {stated} forwards, and the harness counted {found}",
    "call and answer": "{where}: the timed call says {stated}, the answer that it made {found}",
    "call without answer": "{where} was timed, and its answer is not there",
    "answer without call": "{where} was answered in a timed call that is not there",
    "text of equal tokens": "{where}: the same tokens stand for two texts",
    "score without answer": "{where} has a score, and its answer is not there",
    "answer without score": "{where} was answered in a run whose answers are scored, and has no score",
    "score of another prompt": "{where} was scored for another prompt than it was answered for",
    "score outside 0 to 1": "{where} is {found}",
    "scores of equal answers": "{where}: equal answers to one document are scored {stated} and {found}",
    "score of the target": "{where} is the target itself, and is scored {found}",
    "scores of one likelihood": "{where} has the same log-likelihoods in both cells, scored {stated} and {found}",
}


def contradiction_text(one: Contradiction) -> str:
    """In words, with how many there are besides."""
    text = WORDS[one.kind].format(where=one.where, stated=one.stated, found=one.found)
    return text + (f" (and {one.num - 1:,} more like this)" if one.num > 1 else "")


def contradictions_text(found: Sequence[Contradiction]) -> str:
    """All of a run's, one after the other."""
    return ", and ".join(map(contradiction_text, found))


def call_name(call: SpeedSample) -> str:
    """A timed call, as contradictions name it."""
    return f"call {call.call_id} of cell {call.cell}, round {call.round}"
