"""The words for what gates found in files, prompts, times, costs and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare import gate_facts as facts
from twotower_eval.analyse.compare.chance import SHARE
from twotower_eval.analyse.compare.contradiction import Contradiction, ContradictionKind, Location, Side
from twotower_eval.analyse.compare.fairness import Busy, BusyFault, NullFault
from twotower_eval.analyse.compare.figures import PERCENT, TIMES, Measured, compared, interval
from twotower_eval.analyse.compare.residual import ResidualFault
from twotower_eval.analyse.compare.unseen import FAR, Memory, is_explained
from twotower_eval.analyse.words.facts import fact_text, generate_text, share_text
from twotower_eval.names import plural
from twotower_eval.records import Estimate
from twotower_eval.rules import handicap_text, truncation_line, void_text

_CALL = "call {call} of cell {cell}, round {round}"
_PROMPT = f"prompt {{prompt}} in {_CALL}"
_DOCUMENT = "document {document} of {task}, cell {cell}"
_SCORE = f"{{metric}} of {_DOCUMENT}"

WORDS: Mapping[ContradictionKind, str] = {
    "plan hash": "the manifest gives the plan's sha256 as {stated:.12}, but the plan hashes to {found:.12}",
    "plan and cells": "{field} is {stated} in the plan and {found} in its cells",
    "cell id": "the id of cell {cell} does not follow from its checkpoint, decoder and workload, which give {found}",
    "journal changed": "{file}: lines 1 to {line} were changed after they were written, by the sha256 in events.jsonl",
    "journal short": "{file} has {found} lines, events.jsonl recorded {stated}",
    "digests missing": "line {line} of {file} lacks the journals' line counts and sha256, which events of this "
    "version have",
    "rounds recorded": "events.jsonl recorded {stated} measured rounds, speed.jsonl has {found}",
    "seconds recorded": "events.jsonl recorded {stated:.3f} s on the clock, the calls of speed.jsonl add up to "
    "{found:.3f} s",
    "documents recorded": "events.jsonl recorded {stated} documents of task {task} in cell {cell}, {found} are scored",
    "launch not recorded": "speed.jsonl has launch {found}, events.jsonl recorded only {stated}",
    "launches begun": "speed.jsonl has {found} launches of this run, events.jsonl recorded {stated} starts",
    "launch without calls": "events.jsonl recorded launch {launch} as complete, but speed.jsonl has no call of it",
    "launch without warm-up": "launch {launch} has no warm-up, the plan asks for {stated} in every launch",
    "round missing": "round {round} is missing, though rounds run up to {found} and the harness skips no number",
    "rounds below plan": "the run is complete and its plan asks for {stated} rounds, but speed.jsonl has {found} "
    "whole ones",
    "cell without rows": "the run is complete, but cell {cell} has no row",
    "plan without cells": "the plan has {field} {stated}, but no cell has it: they have {found}",
    "calls overlap": f"{_CALL} took {{stated:.3f}} s, and the next call of its launch began {{found:.3f}} s after it",
    "launches at once": "{stated} calls of {here} began while {there} was being timed, but the launches of a run never "
    "overlap",
    "moments repeated": "{stated} calls of {here} began at exactly the same moments as calls of {there}",
    "times repeated": "{stated} timings of {here} are equal, to the last digit, to those of {there}",
    "batch size": f"{_CALL} has {{found}} prompts, its cell's batch size is {{stated}}",
    "prompts of a call": f"{_CALL} has different prompts in different rounds",
    "prompt tokens": "prompt {prompt} of cell {cell} has {stated} tokens in one round and {found} in another",
    "prompt tokens of arms": "prompt {prompt} has {stated} tokens in one arm and {found} in the other, with the same "
    "tokenizer",
    "tokens of equal hash": f"{_PROMPT}: the same sha256 of tokens stands for {{stated}} tokens and for {{found}}",
    "tokens beyond budget": "prompt {prompt} of cell {cell} got {found} tokens, above the budget of {stated}",
    "forwards counted": f"the prompts of {_CALL} report {{stated}} in {{field}}, the harness counted {{found}}",
    "call and answer": f"{_PROMPT}: {{field}} is {{stated}} in the timed call and {{found}} in its answer",
    "call without answer": f"{_PROMPT} was timed, but its answer is missing",
    "answer without call": "prompt {prompt} of cell {cell}, round {round} has an answer, but its timed call is missing",
    "text of equal tokens": f"{_DOCUMENT}: the same tokens have two different texts",
    "score without answer": f"{_DOCUMENT} has a score, but its answer is missing",
    "answer without score": f"{_DOCUMENT} has an answer but no score, in a run that scores its answers",
    "score of another prompt": f"{_DOCUMENT} was scored on another prompt than it was answered on",
    "score outside 0 to 1": f"{_SCORE} is {{found:g}}",
    "scores of equal answers": f"{_SCORE}: equal answers to the same document are scored {{stated:g}} and {{found:g}}",
    "score of the target": f"{_SCORE}: the answer is the target itself, but is scored {{found:g}}",
    "scores of one likelihood": f"{_SCORE} has the same log-likelihoods in both cells, scored {{stated}} and {{found}}",
}
_OTHER_TOKENS = f"{_PROMPT}: the timed call and its answer have different tokens"


def contradiction_text(one: Contradiction) -> str:
    """One contradiction in words, with the number of further ones like it."""
    words = _OTHER_TOKENS if (one.kind, one.field) == ("call and answer", "tokens_sha256") else WORDS[one.kind]
    sides = {"stated": _stated(one.stated, ", "), "found": _stated(one.found, " or ")}
    places = {"here": _timed_text(one.location), "there": "" if one.other is None else _timed_text(one.other)}
    if one.other is not None and one.other.run != one.location.run:
        places["there"] += f" of run {one.other.run}"
    text = words.format(file=one.file, line=one.line, field=one.field, **sides, **places, **one.location._asdict())
    return text + (f" (and {one.num - 1:,} more like this)" if one.num > 1 else "")


def _timed_text(location: Location) -> str:
    """``cell x in launch y, round 3``; parts that are not known are left out."""
    cell = f"{'the second copy of ' * (location.replica == 1)}cell {location.cell} in " * (location.cell is not None)
    number = "warm-up" if location.phase == "warmup" else "round"
    return f"{cell}launch {location.launch}" + f", {number} {location.round}" * (location.round is not None)


def _stated(fact: Side, between: str) -> str | int | float | None:
    return between.join(map(str, fact)) if isinstance(fact, tuple) else fact


def contradictions_text(found: Sequence[Contradiction]) -> str:
    """All contradictions of a run in words."""
    return ", and ".join(map(contradiction_text, found))


BROKEN = "fast and broken"
NO_DIGESTS = "whether journals were changed later cannot be checked: events of older versions hold no digests"
NOT_COUNTED = "prompts that were cut were not counted in this run"
NO_PROBE = "no new prompt was timed"
TOO_FEW = "too few probes to decide, time more rounds (--min-rounds) or more probes (--probes): "
NEAR = {
    "near": "is not clearly above chance",
    "below": "lies below chance",
    "zero": "is zero",
}


@fact_text.register
def _files_agree(fact: facts.FilesAgree) -> str:
    if fact.contradictions:
        each = (
            f"run {run_id} contradicts itself: {contradictions_text(found)}" for run_id, found in fact.contradictions
        )
        return "; ".join(each)
    older = f"; {NO_DIGESTS} ({', '.join(fact.without_digests)})" if fact.without_digests else ""
    return f"no file of a run contradicts another{older}"


@fact_text.register
def _run_complete(fact: facts.RunComplete) -> str:
    return "the run is complete" if fact.complete else "the run is not complete: resume it"


@fact_text.register
def _all_scored(fact: facts.AllScored) -> str:
    if not fact.num_documents:
        return "every document is scored in both arms"
    return f"{fact.num_documents} documents have no score in one arm"


@fact_text.register
def _above_chance(fact: facts.AboveChance) -> str:
    named, num_clear = "; ".join(map(standing_text, fact.unclear)), len(fact.standings) - len(fact.unclear)
    if not num_clear:
        return f"no task in scope has a baseline clearly above chance: {named}"
    text = f"the baseline is clearly above chance on {num_clear} of {len(fact.standings)} tasks"
    return text + (f"; not on {named}" if named else "")


def standing_text(standing: stats.Standing) -> str:
    """``choice (26.0 % is not clearly above chance, 25.0 %)``, for a baseline that is not; ``sort (0.0 % is zero)``."""
    if standing.chance is None:
        return f"{standing.task} ({PERCENT.text(standing.baseline)} {NEAR[standing.stand]})"
    baseline, chance = compared(SHARE, standing.baseline, standing.chance)
    return f"{standing.task} ({baseline} {NEAR[standing.stand]}, {chance})"


@fact_text.register
def _whole_prompts(fact: facts.WholePrompts) -> str:
    lines = (truncation_line(one.task, one.arm, one.num_requests, one.num_truncated) for one in fact.cut)
    return "; ".join(dict.fromkeys(lines)) or ("no prompt was cut" if fact.counted else NOT_COUNTED)


@fact_text.register
def _same_inputs(fact: facts.SameInputs) -> str:
    return "; ".join(fact.differing) or "hashes agree between the arms"


@fact_text.register
def _verified(fact: facts.Verified) -> str:
    if not fact.found:
        return "no verify run of these weights is among the runs, so kernels and batching were not checked"
    if fact.failed:
        return "failed: " + "; ".join(f"{name} ({found})" for name, found in fact.failed)
    unchecked = f", not checked: {', '.join(fact.unchecked)}" if fact.unchecked else ""
    passed = f"{fact.num_passed} checks passed{unchecked}"
    return passed if fact.complete else f"the verify run is not complete; {passed}"


@fact_text.register
def _handicaps(fact: facts.Handicaps) -> str:
    return handicap_text(fact.handicaps) if fact.handicaps else "neither arm is slowed by how it is run"


@fact_text.register
def _busy_arms(fact: facts.BusyArms) -> str:
    if fact.busy is None:
        return str(fact.reason)
    busy = fact.busy
    return "; ".join(_busy_fault(busy, one) for one in fact.faults) or _busy(busy)


def _busy(found: Busy) -> str:
    baseline, candidate = found.share
    return f"the baseline is busy for {100 * baseline:.0f} % of its time, the candidate for {100 * candidate:.0f} %"


def _busy_fault(found: Busy, fault: BusyFault) -> str:
    if fault.kind == "waits":
        return f"the {fault.arm} waits: {_busy(found)}"
    processors = found.processors[0 if fault.arm == "baseline" else 1]
    return f"the {fault.arm} keeps {processors:.2f} processors busy, and the plan gives it {found.num_threads}"


@fact_text.register
def _possible_times(fact: facts.PossibleTimes) -> str:
    void = void_text(fact.num_timed, fact.faults)
    if fact.limit is None:
        return void
    return f"{void}: {100 * fact.share:.1f} % of the timings go with them, more than {100 * fact.limit:g} %"


@fact_text.register
def _kept_up(fact: facts.KeptUp) -> str:
    asked = f"{fact.rate:g} requests a second"
    if not fact.grown and fact.unknown:
        return f"one round does not tell whether latencies of the {' and the '.join(fact.unknown)} grow at {asked}"
    if not fact.grown:
        return f"latencies do not grow at {asked}"
    grown = []
    for arm, growth, answers_per_s in fact.grown:
        gave = "" if answers_per_s is None else f", at {answers_per_s:.3g} answers a second"
        grown.append(f"the {arm}'s grow by {growth:.2f}x within a round{gave}")
    return (
        f"latencies at {asked} are not steady, and would be others if it went on: {'; '.join(grown)}. The server does "
        "not keep up (take a lower rate), or there are too few prompts (take more)"
    )


@fact_text.register
def _probes(fact: facts.Probes) -> str:
    """What the probes found, and which arm remembers earlier prompts."""
    found, limit = fact.unseen, fact.limit
    remembers = found.remembered(limit)
    verb = "remembers" if len(remembers) == 1 else "remember"
    lead = f"the {' and the '.join(remembers)} {verb} earlier prompts (above {limit:g}x): " if remembers else ""
    if not found.num_new and not remembers:
        return NO_PROBE
    own = found.candidate
    again = f"the candidate is {_shown(own.seconds)}, the baseline {_shown(found.baseline.seconds)} as fast"
    first = f"{_shown(own.forwards)} as many forwards on the first reading of timed prompts as on later ones"
    at_most = f" (limit {limit:g}x)"
    lines = [
        f"repeated prompts: {again} as on the first reading{at_most}",
        f"the candidate makes {first}{at_most}",
    ]
    for one, beyond, kind, most in (
        (own.documents, own.documents_beyond, "untimed documents", at_most),
        (own.made_up, own.made_up_beyond, "made-up prompts", f" (limit {FAR:g}x)"),
    ):
        if one.estimate is not None:
            calls = f"{one.estimate.n} call{'s' * (one.estimate.n != 1)} on {kind}"
            left = f", {_shown(beyond)} where a prompt lookup needs as many" if is_explained(one, beyond) else ""
            lines.append(f"{calls} need {_shown(one)} as many forwards per token as similar timed calls{left}{most}")
    if own.forward_s.estimate is not None:
        longer = f"{_shown(own.forward_s)} as long on new prompts as on timed ones"
        lines.append(f"equal forwards of the candidate take {longer}{at_most}")
    unclear = "" if remembers or found.checked(limit) or not _is_timed(own) else TOO_FEW
    return f"{lead}{unclear}{'; '.join(lines)}"


def _is_timed(own: Memory) -> bool:
    """Whether there are times and forwards to compare."""
    return own.seconds.estimate is not None and own.forwards.estimate is not None


def _shown(found: Measured) -> str:
    return f"({found.reason})" if found.estimate is None else interval(TIMES, found.estimate)


@fact_text.register
def _null(fact: facts.Null) -> str:
    text = "the baseline timed against itself agrees with 1, narrowly enough"
    if fact.fault is not None:
        text = fact_text(fact.fault)
    return text + (f" ({fact.null.value:.3f} [{fact.null.low:.3f}, {fact.null.high:.3f}])" if fact.null else "")


@fact_text.register
def _null_fault(fact: NullFault) -> str:
    if fact.kind == "missing":
        return f"without an A/A null no speedup can be judged: {fact.reason}"
    if fact.kind == "off":
        return f"the baseline timed against itself is off by more than {100 * fact.offset:g} %"
    share = ""
    if fact.most is not None and fact.share is not None:
        share = f", the smaller of {100 * fact.most:g} % and {share_text(fact.share)}"
    width, limit = compared(PERCENT, fact.half_width, fact.widest)
    return (
        f"the machine is too noisy: the baseline timed against itself varies by ±{width} (allowed: {limit}{share}): "
        "time more rounds (--min-rounds)"
    )


@fact_text.register
def _unexplained(fact: facts.Unexplained) -> str:
    if fact.faults:
        return "; ".join(map(_residual_fault, fact.faults))
    if fact.reasons:
        return f"cannot compare times with forwards: {'; '.join(fact.reasons)}"
    return f"unexplained time: {', '.join(f'{arm} {_residual(found)}' for arm, found in fact.shares)}"


def _residual_fault(fault: ResidualFault) -> str:
    """``the candidate is faster than its forwards allow: these, timed alone, need 347 [346, 348] times its time``."""
    found = fault.residual
    if found is None:
        return f"the {fault.arm} made tokens without any forward of its model, in {plural(fault.num_calls, 'call')}"
    if fault.kind == "faster":
        times = [1 - share for share in (found.value, found.high, found.low)]
        longer = f"{times[0]:,.3g} [{times[1]:,.3g}, {times[2]:,.3g}]"
        return (
            f"the {fault.arm} is faster than its own forwards allow: these, timed alone, take {longer} times its time"
        )
    slower = f"the {fault.arm} is slower than its parts: they do not explain {_residual(found)} of its time"
    return slower if fault.calm is None else f"{slower}, and {_signed(fault.calm)} in the fastest round of every call"


@fact_text.register
def _baseline_lag(fact: facts.BaselineLag) -> str:
    shown = "" if fact.whole is None else f": they do not explain {_residual(fact.whole)} of its time"
    return (
        f"the baseline seems slower than its parts{shown}; that varies or is too uncertain, so other work on the "
        "machine may have slowed it: time more rounds on a quieter machine"
    )


def _residual(found: Estimate) -> str:
    """``+12.0 % [+10.1 %, +13.9 %]``."""
    return f"{_signed(found.value)} [{_signed(found.low)}, {_signed(found.high)}]"


def _signed(value: float) -> str:
    return f"{100 * value:+,.1f} %"


@fact_text.register
def _own_generate(fact: facts.OwnGenerate) -> str:
    return f"the baseline takes {generate_text(fact.best)}"


@fact_text.register
def _degenerate(fact: facts.DegenerateOutputs) -> str:
    if fact.shares is None:
        return "no output of this point was kept, so none was checked"
    baseline, candidate = fact.shares
    text = (
        f"{100 * candidate:.1f} % of the candidate's outputs are degenerate, {100 * baseline:.1f} % of the baseline's"
    )
    return f"{BROKEN}: {text}" if fact.broken else text


@fact_text.register
def _floor(fact: facts.QualityFloor) -> str:
    if fact.retention is None or fact.stands is None:
        few = f"retention rests on {plural(fact.num_clusters or 0, 'cluster')}, fewer than {stats.MIN_CLUSTERS}"
        return f"the quality floor cannot be checked: {few if fact.reason is None else fact.reason}"
    above = " above chance" if fact.above_chance else ""
    stands = {"above": "is above", "open": "does not clear", "below": "is below"}[fact.stands]
    kept = f"retention{above} {interval(PERCENT, fact.retention, against=fact.floor)}"
    text = f"{kept} {stands} the floor of {100 * fact.floor:g} %"
    return f"{BROKEN}: {text}" if fact.stands == "below" else text
