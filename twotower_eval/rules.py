"""Rules and words that both arms share: how models are run, which task settings are not followed, times that void a
call."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from twotower_eval.errors import UserError
from twotower_eval.records import (
    HALF_PRECISION,
    Arm,
    Cell,
    ChatUse,
    Checkpoint,
    Chosen,
    ChosenReason,
    CostSample,
    FailedTrial,
    Override,
    Retried,
    RunManifest,
    Scalar,
    SpeedSample,
    TimeFault,
    UnlikeSetting,
    Ways,
    Workload,
)

EXTENDED = "this run was complete; extending it counts as another look"
LEAST_S = 1e-7  # no call is shorter: two readings of a clock are further apart
SLACK_S = 1e-4  # how far rounding or a coarse clock may put a moment outside its call
WORDS: dict[TimeFault, str] = {
    "not finite": "not a finite time",
    "negative": "a negative time",
    "no time": "no time at all",
    "after the end": "a moment after the call's end",
    "graph made": "a CUDA graph made meanwhile",
    "clock stood": "too long a stop of the clock for its texts",
    "retried": "a request that failed and was asked again",
    "failed": "a request that got no whole answer",
}


def refuse_same(cells: Sequence[Cell]) -> None:
    """UserError where one of several baselines is another one, or is the candidate, under a second name."""
    by_id: dict[str, Cell] = {}
    for cell in cells:
        other = by_id.setdefault(cell.id, cell)
        several = other.baseline is not None or cell.baseline is not None
        if several and other.who != cell.who:  # a model against itself alone is one cell, measured alone
            raise UserError(f"{other.who} and {cell.who} are one model with one decoder: drop one of them")


def time_fault(wall_s: float, moments_s: Sequence[float]) -> TimeFault | None:
    """What is wrong with a call's duration, or with moments in it (seconds from its start); ``None``: nothing."""
    if not all(map(math.isfinite, (wall_s, *moments_s))):
        return "not finite"
    if wall_s < 0 or min(moments_s, default=0.0) < -SLACK_S:
        return "negative"
    if wall_s < LEAST_S:
        return "no time"
    if max(moments_s, default=0.0) > wall_s + SLACK_S:
        return "after the end"
    return None


def fault_of(sample: SpeedSample) -> TimeFault | None:
    """The fault noted when the call was timed, or visible in its recorded times."""
    moments_s = (sample.prefill_s, sample.first_output_s, *(prompt.finish_s for prompt in sample.prompts))
    return sample.fault or time_fault(sample.wall_s, [moment for moment in moments_s if moment is not None])


def finite(seconds: float) -> float:
    """The time if it is finite, else ``None``, as JSON has no such number."""
    return seconds if math.isfinite(seconds) else 0.0


def total_finite_s(walls_s: Iterable[float]) -> float:
    """Sum of the finite, positive times."""
    return sum(wall_s for wall_s in walls_s if math.isfinite(wall_s) and wall_s > 0)


def clocked_s(samples: Iterable[SpeedSample | CostSample]) -> float:
    """Seconds on the clock of timed calls: their finite, positive times, and of every stream of requests to a server,
    which overlap, the time until its last one ended.
    """
    walls_s, streams_s = [], dict[tuple[object, ...], float]()
    for one in samples:
        if isinstance(one, SpeedSample) and one.due_s is not None:
            stream = (one.launch_id, one.round, one.phase, one.cell, one.replica)
            streams_s[stream] = max(streams_s.get(stream, 0.0), one.due_s + max(0.0, one.wall_s))
        else:
            walls_s.append(one.wall_s)
    return total_finite_s(walls_s) + total_finite_s(streams_s.values())


def load_text(workload: Workload) -> str:
    """``batch 8``, ``8 in flight``, ``4 requests/s (poisson)``: how many prompts a timed model is given at a time."""
    if workload.request_rate is not None:
        return f"{workload.request_rate:g} requests/s ({workload.requests})"
    size = workload.batch_size or 1
    return f"{size} in flight" if workload.requests is not None else f"batch {size}"


def void_text(num_timed: int, faults: Sequence[TimeFault]) -> str:
    """``3 of 80 timed calls are void (2 with a negative time, 1 with no time at all)``."""
    counted = ", ".join(f"{number} with {WORDS[fault]}" for fault, number in sorted(Counter(faults).items()))
    return f"{len(faults)} of {num_timed} timed calls are void ({counted})"


SlowWay = Literal["no cache", "no cache for long contexts", "one prompt after the other", "one length after the other"]
ProofOutcome = Literal["fastest", "slower", "not checked"]
SLOW_WORDS: dict[SlowWay, str] = {
    "no cache": "without a cache, every token by a pass over all before it",
    "no cache for long contexts": "without a cache where contexts are long",
    "one prompt after the other": "one prompt after the other in batches of several",
    "one length after the other": "with prompts of one length together only, several passes a step for a mixed batch",
}


@dataclass(frozen=True, kw_only=True)
class Handicap:
    """An arm that was timed in a slower way than its model allows, so that no speedup can be computed."""

    arm: Arm
    way: SlowWay


def handicaps(
    arm: Arm, ways: Ways, *, batch_size: int, longest: int, unlike_lengths: bool = True
) -> tuple[Handicap, ...]:
    """What slows an arm in calls of ``batch_size`` prompts, with contexts of up to ``longest`` tokens.

    ``unlike_lengths``: whether prompts of one call differ in length. Running prompts one after the other is no handicap
    at batch size 1; passing positions costs nothing, and options are not timed.
    """
    slow: list[SlowWay] = []
    if not ways.cached:
        slow.append("no cache")
    elif ways.plain_beyond is not None and longest > ways.plain_beyond:
        slow.append("no cache for long contexts")
    if not ways.rows_together and batch_size > 1:
        slow.append("one prompt after the other")
    elif ways.cached and not ways.unlike_lengths_together and batch_size > 1 and unlike_lengths:
        slow.append("one length after the other")
    return tuple(Handicap(arm=arm, way=way) for way in slow)


def handicap_text(found: Sequence[Handicap]) -> str:
    """Why such times give no speedup."""
    slowed = "; ".join(f"the {one.arm} was timed {SLOW_WORDS[one.way]}" for one in found)
    return f"{slowed}: a model that is slowed down gives no speedup"


def proof_outcome(ways: Ways) -> ProofOutcome:
    """Whether the model proved right in the fastest way, in a slower one, or could not be checked."""
    if ways.precision in HALF_PRECISION:
        return "not checked"
    fast = ways.cached and ways.rows_together and ways.passes_together and ways.unlike_lengths_together
    return "fastest" if fast and ways.plain_beyond is None and not _splits_options(ways) else "slower"


def ways_text(ways: Ways) -> str:
    """One line: how the model is run, up to how many tokens that was checked, and why it is not run faster."""
    found = list(_ways(ways)) or ["with a cache, the rows of a batch together"]
    tried = f"tried on up to {ways.proved_tokens:,} tokens against whole rows without a cache"
    if ways.precision in HALF_PRECISION:
        tried = f"not proved: float32 does not fit into memory, and in {ways.precision} rounding hides faults"
    reasons = list(dict.fromkeys(map(_reason, ways.failed)))
    return "; ".join([", ".join(found), tried, *reasons])


def slower_lines(manifest: RunManifest) -> list[str]:
    """A line for each model of a run that is not run in the fastest way."""
    return [
        f"{name}: {ways_text(ways)}"
        for name, ways in named_ways(manifest)
        if ways.failed or proof_outcome(ways) != "fastest"
    ]


def named_ways(manifest: RunManifest) -> list[tuple[str, Ways]]:
    """(name of the checkpoint, ways) of each model."""
    names = {cell.checkpoint.identity: cell.checkpoint.name for cell in manifest.cells}
    return [(names.get(ways.checkpoint, ways.checkpoint), ways) for ways in manifest.ways]


def _ways(ways: Ways) -> Iterator[str]:
    if not ways.cached:
        yield SLOW_WORDS["no cache"]
    if not ways.rows_together:
        yield "one prompt after the other, whatever the batch size"
    elif ways.cached and not ways.unlike_lengths_together:
        yield "prompts of one length together, others after them"
    if not ways.passes_together:
        yield "rows that are scored one by one"
    if _splits_options(ways):
        yield "every option of a question in a row of its own"
    if ways.positions_passed:
        yield "cached, with the positions of its tokens passed to it"
    if ways.plain_beyond is not None:
        yield f"contexts of more than {ways.plain_beyond:,} tokens without a cache, one by one"
    if ways.resets_first:
        yield "with a short row before each of these, which undoes what a long one leaves behind"
    if ways.short_of_memory_at is not None:
        yield f"where {ways.short_of_memory_at:,} tokens were too many to be tried in the memory there is"


def _splits_options(ways: Ways) -> bool:
    """Whether options are read separately although the model might have read them in one row."""
    return not ways.options_packed and any(trial.check == "options in one row" for trial in ways.failed)


def _reason(trial: FailedTrial) -> str:
    way = " with positions passed" if trial.positions_passed else ""
    way += "" if trial.rows_together else ", one row at a time"
    way += "" if trial.precision == "float32" else f", in {trial.precision}"
    if trial.difference is None:
        return f"{trial.check}{way} failed: {trial.error}"
    by = f"{trial.difference:.2g} of the logits' spread (limit {trial.limit:g})"
    return f"{trial.check}{way} differ by {by} on {trial.num_tokens:,} tokens"


def asked_and_not_done(manifest: RunManifest) -> list[str]:
    """Lines on task and checkpoint settings that a run does not follow."""
    return [*override_lines(manifest.overrides), *unheeded_lines(manifest.unheeded)]


def override_lines(overrides: Sequence[Override]) -> list[str]:
    """One line for each overridden setting, with all tasks that ask for it."""
    tasks: dict[Override, list[str]] = {}
    for one in overrides:
        tasks.setdefault(dataclasses.replace(one, task=""), []).append(one.task)
    return [_override_line(one, list(dict.fromkeys(names))) for one, names in tasks.items()]


def _override_line(one: Override, tasks: Sequence[str]) -> str:
    named, single = ", ".join(tasks), len(tasks) == 1
    option = f"--{one.option.replace('_', '-')}"
    setting = f"{one.setting}: {_plain(one.asked)}"
    if one.done == one.asked:
        return (
            f"{named} set{'s' if single else ''} {setting}, which is kept, as in lm-eval: {option} does not count there"
        )
    verb = ("is" if single else "are") + " published with" if one.published else f"ask{'s' if single else ''} for"
    held = "not done" if one.done is None else f"done with {_plain(one.done)}"
    return f"{named} {verb} {setting}, {held}: {option} overrides it"


def unheeded_lines(unheeded: Mapping[str, Mapping[str, object]]) -> list[str]:
    """One line for each checkpoint whose generation settings ask for something that no decoder here does."""
    return [
        f"generation_config.json of {name} asks for {', '.join(f'{key} {value}' for key, value in asked.items())}, "
        "which is not done here and would be by transformers' generate: texts are those of plain decoding"
        for name, asked in unheeded.items()
    ]


def chat_lines(manifest: RunManifest) -> list[str]:
    """Warnings on chat templates: one that is there and not used, a system message that was left out, today's date."""
    return [line for use in _by_checkpoint(manifest) for line in _chat_warnings(use)]


def _chat_warnings(use: ChatUse) -> Iterator[str]:
    if not use.applied and use.generates:
        yield (
            f"{use.checkpoint} has a chat template and is asked without it: an instruct model may score far below what "
            "it can do, a base model will not (--apply-chat-template asks through it)"
        )
    if use.drops_system:
        yield f"the chat template of {use.checkpoint} takes no system message: the tasks' descriptions were left out"
    if use.is_dated:
        yield f"the chat template of {use.checkpoint} writes today's date: prompts of another day are not the same"


def chat_facts(manifest: RunManifest) -> list[str]:
    """One line for each model that was asked through its chat template, and one where these gave unlike texts."""
    applied = [use for use in _by_checkpoint(manifest) if use.applied]
    lines = [f"{use.checkpoint} was {_template_text(use)}" for use in applied]
    if any(not use.reads_alike for use in applied):
        lines.append("baseline and candidate were asked the same messages, each through its own chat template")
    return lines


def _template_text(use: ChatUse) -> str:
    if use.served:
        return "sent the messages themselves, which its server wrote with its own chat template"
    named = f"its chat template {use.name!r}" if use.name else "its chat template"
    return f"asked through {named} (sha256 {(use.sha256 or '')[:16]})"


def _by_checkpoint(manifest: RunManifest) -> list[ChatUse]:
    """Each model once, also where it is both arms."""
    return list({(use.checkpoint, use.sha256): use for use in manifest.chats or ()}.values())


def joined_lines(manifest: RunManifest) -> list[str]:
    """One line for each task with documents that are nearly the same as others."""
    return [
        f"{task}: {num:,} document{'s are' if num > 1 else ' is'} nearly the same as others and share"
        f"{'' if num > 1 else 's'} their clusters, in which they count once"
        for task, num in manifest.joined.items()
    ]


CHOSEN_WORDS: dict[ChosenReason, str] = {
    "first there is": "the first of CUDA, MPS and CPU that torch can use here",
    "no accelerator": "torch finds neither CUDA nor MPS here",
    "needs float64": "these towers compute in float64, which MPS lacks",
    "as stored": "as its checkpoint is stored",
    "slow on CPUs": "stored in {stored}, in which most CPUs are slow: {option} {stored} keeps it",
    "not computed in": "stored in {stored}, in which no model is run here",
    "not stated": "its checkpoint does not say what it is stored in",
    "no denoiser": "the model has no denoiser",
    "of the family": "its family's own",
    "no causal tower": "its family has no causal tower",
    "usual": "the usual one; a CPU gains nothing from more",
    "fits": "the largest power of two that fits into memory",
}


def chosen_line(chosen: Sequence[Chosen]) -> str:
    """``auto: device cpu (torch finds neither CUDA nor MPS here); dtype float32 (as its checkpoint is stored)``."""
    return "auto: " + "; ".join(map(_chosen_text, chosen))


def chosen_lines(manifest: RunManifest) -> list[str]:
    """The line on what ``auto`` became in a run, if it became anything."""
    return [chosen_line(manifest.chosen)] if manifest.chosen else []


SCORED_BY = {
    "generation": "generation",
    "exact": "autoregressive likelihood (exact)",
    "context_tower": "context-tower likelihood",
    "denoiser_left_to_right": "denoiser likelihood (left-to-right)",
    "bound": "denoiser bound (Monte-Carlo)",
}
# Kinds that mean the same: a causal model's own log-likelihoods.
CAUSAL_KINDS = ("exact", "context_tower")


def unlike_kinds(baseline: str, candidate: str) -> bool:
    """Whether a pair of arms is scored by kinds that mean different things."""
    return baseline != candidate and not {baseline, candidate} <= set(CAUSAL_KINDS)


def unlike_kinds_text(tasks: Sequence[str], baseline: str, candidate: str) -> str:
    """``miniature_choice: the candidate's denoiser bound (Monte-Carlo) stands against the baseline's …``."""
    against = f"stands against the baseline's {SCORED_BY.get(baseline, baseline)}"
    below = "; a bound lies below what it bounds" if "bound" in (baseline, candidate) else ""
    return f"{', '.join(tasks)}: the candidate's {SCORED_BY.get(candidate, candidate)} {against}{below}"


def unlike_settings(baseline: Checkpoint, candidate: Checkpoint) -> tuple[UnlikeSetting, ...]:
    """What two arms differ in besides model and decoder: dtype, type of device, how weights are stored."""

    def settings(of: Checkpoint) -> dict[Literal["dtype", "device", "weights"], str]:
        weights = "as plain numbers" if of.quantisation is None else str(of.quantisation)
        return {"dtype": of.dtype, "device": of.devices[0].partition(":")[0], "weights": weights}

    pairs = zip(settings(baseline).items(), settings(candidate).values(), strict=True)
    return tuple(UnlikeSetting(setting=name, baseline=one, candidate=two) for (name, one), two in pairs if one != two)


def unlike_text(found: Sequence[UnlikeSetting]) -> str:
    """``bfloat16 against the baseline's float32: the arms differ in more than model and decoder``."""
    parts = [f"{one.candidate} against the baseline's {one.baseline}" for one in found if one.setting != "weights"]
    parts += [
        f"weights {one.candidate} against the baseline's {one.baseline}" for one in found if one.setting == "weights"
    ]
    settings = " and ".join(one.setting for one in found)
    return f"{'; '.join(parts)}: a difference may be due to {settings}, not to the decoder"


def _chosen_text(one: Chosen) -> str:
    what = one.setting.replace("_", " ")
    whose = "" if one.arm is None else f" of the {one.arm}{'' if one.name is None else f' {one.name}'}"
    option = "--baseline-dtype" if one.arm == "baseline" else "--dtype"
    reason = CHOSEN_WORDS[one.reason].format(stored=one.stored, option=option)
    return f"{what}{whose} {one.value} ({reason})"


def retried_line(arm: str, retried: Retried) -> str:
    """A failed request of an arm's server; all of them are in the run's events."""
    return f"{arm}: a request failed ({retried.detail}) and is asked again; see events.jsonl"


def truncation_line(task: str, arm: str, num_requests: int | None, num_truncated: int) -> str:
    """How many of a task's prompts lost their beginning; ``num_requests`` is None if the total is unknown."""
    of = "" if num_requests is None else f" of {num_requests:,}"
    were = "prompt was" if num_truncated == 1 else "prompts were"
    return f"{task}, {arm}: {num_truncated:,}{of} {were} longer than the model has room for and lost the beginning"


def _plain(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "\\n")
