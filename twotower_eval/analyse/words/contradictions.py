"""The words for what a run's files say in two ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower_eval.analyse.compare.contradiction import Contradiction, ContradictionKind, Side, Spot

_CALL = "call {call} of cell {cell}, round {round}"
_PROMPT = f"prompt {{prompt}} in {_CALL}"
_DOCUMENT = "document {document} of {task}, cell {cell}"
_SCORE = f"{{metric}} of {_DOCUMENT}"

WORDS: Mapping[ContradictionKind, str] = {
    "plan hash": "the plan's sha256 is written as {stated:.12}, that of the plan is {found:.12}",
    "plan and cells": "the plan says {field} {stated}, its cells say {field} {found}",
    "cell id": "cell {cell} is not made of its checkpoint, decoder and workload, which give {found}",
    "journal changed": "{file}: lines 1 to {line} are not those that were written, by the sha256 in events.jsonl",
    "journal short": "{file} has {found} lines, and events.jsonl tells of {stated}",
    "digests missing": "line {line} of {file} does not tell how many lines the journals have, with their sha256, as "
    "events of this version do",
    "rounds told": "events.jsonl tells of {stated} measured rounds, speed.jsonl has {found}",
    "seconds told": "events.jsonl tells of {stated:.3f} s on the clock, the calls of speed.jsonl add up to "
    "{found:.3f} s",
    "documents told": "events.jsonl tells of {stated} documents of task {task} in cell {cell}, {found} are scored",
    "launch untold": "speed.jsonl has launch {found}, and events.jsonl tells of {stated} only",
    "launches begun": "speed.jsonl has {found} launches of this run, and events.jsonl tells of {stated} starts",
    "launch without calls": "events.jsonl tells of launch {launch}, which measured to its end, and speed.jsonl has no "
    "call of it",
    "launch without warm-up": "launch {launch} has no warm-up, and the plan asks for {stated} in every launch",
    "round missing": "round {round} is not there, though rounds up to {found} are and no number is left out",
    "rounds below plan": "the plan asks for {stated} rounds, and speed.jsonl has {found} whole ones of a run that went "
    "to its end",
    "cell without rows": "cell {cell} has no row, in a run that went to its end",
    "plan without cells": "the plan has {field} {stated}, and no cell is of it: they are of {found}",
    "calls overlap": f"{_CALL} took {{stated:.3f}} s, and the next call of its launch began {{found:.3f}} s after it",
    "launches at once": "{stated} calls of {here} began while {there} was being timed, and a run's launches come one "
    "after the other",
    "moments repeated": "{stated} calls of {here} began at the very moments at which calls of {there} did",
    "times repeated": "{stated} timings of {here} are, to the last digit, those of {there}",
    "batch size": f"{_CALL} was of {{found}} prompts, its cell times {{stated}}",
    "prompts of a call": f"{_CALL} is on other prompts in one round than in another",
    "prompt tokens": "prompt {prompt} of cell {cell} has {stated} tokens in one round and {found} in another",
    "prompt tokens of arms": "prompt {prompt} has {stated} tokens for one arm and {found} for the other, of one "
    "tokenizer",
    "tokens of equal hash": f"{_PROMPT}: tokens of one sha256 are said to be {{stated}} and {{found}}",
    "tokens beyond budget": "prompt {prompt} of cell {cell} made {found} tokens, at most {stated} were asked for",
    "forwards counted": f"the prompts of {_CALL} report {{stated}} in {{field}}, and the harness counted {{found}}",
    "call and answer": f"{_PROMPT}: the timed call says {{field}} {{stated}}, the answer that it made {{found}}",
    "call without answer": f"{_PROMPT} was timed, and its answer is not there",
    "answer without call": "prompt {prompt} of cell {cell}, round {round} was answered in a timed call that is not "
    "there",
    "text of equal tokens": f"{_DOCUMENT}: the same tokens stand for two texts",
    "score without answer": f"{_DOCUMENT} has a score, and its answer is not there",
    "answer without score": f"{_DOCUMENT} was answered in a run whose answers are scored, and has no score",
    "score of another prompt": f"{_DOCUMENT} was scored for another prompt than it was answered for",
    "score outside 0 to 1": f"{_SCORE} is {{found:g}}",
    "scores of equal answers": f"{_SCORE}: equal answers to one document are scored {{stated:g}} and {{found:g}}",
    "score of the target": f"{_SCORE} is the target itself, and is scored {{found:g}}",
    "scores of one likelihood": f"{_SCORE} has the same log-likelihoods in both cells, scored {{stated}} and {{found}}",
}
_OTHER_TOKENS = f"{_PROMPT}: the timed call says other tokens than the answer that it made"


def contradiction_text(one: Contradiction) -> str:
    """In words, with how many there are besides."""
    words = _OTHER_TOKENS if (one.kind, one.field) == ("call and answer", "tokens_sha256") else WORDS[one.kind]
    sides = {"stated": _shown(one.stated, ", "), "found": _shown(one.found, " or ")}
    places = {"here": _timed_text(one.spot), "there": "" if one.like is None else _timed_text(one.like)}
    if one.like is not None and one.like.run != one.spot.run:
        places["there"] += f" of run {one.like.run}"
    text = words.format(file=one.file, line=one.line, field=one.field, **sides, **places, **one.spot._asdict())
    return text + (f" (and {one.num - 1:,} more like this)" if one.num > 1 else "")


def _timed_text(spot: Spot) -> str:
    """``cell x in launch y, round 3``, as far as it is known."""
    cell = f"{'the second copy of ' * (spot.replica == 1)}cell {spot.cell} in " * (spot.cell is not None)
    number = "warm-up" if spot.phase == "warmup" else "round"
    return f"{cell}launch {spot.launch}" + f", {number} {spot.round}" * (spot.round is not None)


def _shown(fact: Side, between: str) -> str | int | float | None:
    return between.join(map(str, fact)) if isinstance(fact, tuple) else fact


def contradictions_text(found: Sequence[Contradiction]) -> str:
    """All of a run's, one after the other."""
    return ", and ".join(map(contradiction_text, found))
