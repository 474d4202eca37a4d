"""Whether answers come from the logits of their own call, from calls that were decoded once more before a witness.

Three things are told. An answer that no logits of its call account for was known before. One that differs from what the
same prompt got when it was timed, or scored, shows that a decoder has two faces. And one that was given to the model as
a draft has to have been drafted somewhere: a decoder that has drafts for what it is timed on, and none for prompts that
nobody has seen, drafts from what it knows by heart. Where a draft comes from is not seen, so small models, tables of
n-grams and the prompt itself are as good as any, as long as they have something to say of new prompts as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean

from twotower_eval.analyse.compare.answers import Differing, draws
from twotower_eval.analyse.compare.points import QualityPoint, cells_of
from twotower_eval.analyse.compare.same import prompt_text, run_ids_of
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.records import (
    HALF_PRECISION,
    Arm,
    Cell,
    CheckOutcome,
    Gate,
    GateLimits,
    Witnessed,
    WitnessedKind,
    canonical_json,
    sha256_text,
)
from twotower_eval.store import Run

MANY_DRAFTED = 0.3  # of the tokens of timed prompts, from which on it matters where drafts come from
FAR_LESS = 10.0  # times as many drafted tokens on timed prompts as on made-up ones: no drafter knows so much less
ENOUGH_TOKENS = 24  # of answers to made-up prompts, to tell that
UNLIKE, ENOUGH_CALLS = 0.5, 4  # of how like the baseline's answers are, on made-up prompts against timed ones
NONE = "no call was decoded before a witness in these runs"
AT_RANDOM = "its tokens are drawn at random"


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """Tokens of witnessed answers to one kind of prompts, and those that were given to the model as a draft."""

    num_tokens: int = 0
    num_drafted: int = 0

    @property
    def share(self) -> float:
        return self.num_drafted / self.num_tokens if self.num_tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class ArmWitnessed:
    """What witnessed calls say of one arm. Of ``num_compared`` answers that are known from elsewhere ``differing`` are
    others; ``known`` are prompts that are timed or scored, ``new`` made-up ones. ``reason``: why nothing is said."""

    arm: Arm
    dtype: str
    num_calls: int = 0
    num_tokens: int = 0
    num_witnessed: int = 0
    num_compared: int = 0
    differing: tuple[Differing, ...] = ()
    known: Drafted = Drafted()
    new: Drafted = Drafted()
    reason: str | None = None

    @property
    def share(self) -> float:
        """Of the tokens, those that come from logits of their call."""
        return self.num_witnessed / self.num_tokens if self.num_tokens else 0.0

    def is_short(self, limits: GateLimits) -> bool:
        """Whether too many tokens come from elsewhere."""
        return self.reason is None and self.share < limits.witnessed_share

    def is_two_faced(self, limits: GateLimits) -> bool:
        """Whether more answers differ than rounding parts."""
        allowed = limits.differing_answers_half if self.dtype in HALF_PRECISION else limits.differing_answers
        return self.num_compared > 0 and len(self.differing) / self.num_compared > allowed

    @property
    def drafts_what_it_knows(self) -> bool:
        """Whether it has drafts for what it is timed on, and next to none for prompts that are new."""
        few = self.new.share < self.known.share / FAR_LESS
        return self.known.share >= MANY_DRAFTED and self.new.num_tokens >= ENOUGH_TOKENS and few


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How like the baseline's answers the candidate's are, as a mean share of tokens in common, in their order; over so
    many calls of each kind."""

    known: float
    new: float
    num_known: int
    num_new: int

    @property
    def is_far_less(self) -> bool:
        """Whether so much less of made-up prompts' answers is alike that somebody should look at them."""
        return min(self.num_known, self.num_new) >= ENOUGH_CALLS and self.new < UNLIKE * self.known


Hashes = Mapping[tuple[str, str], Collection[str]]  # launch and prompt -> hashes of the tokens of its answers


def witnessed_arms(runs: Sequence[Run], point: QualityPoint | SpeedPoint) -> tuple[ArmWitnessed, ...]:
    """Both arms of a point, from the runs that it was measured in."""
    own = [run for run in runs if run.manifest.run_id in run_ids_of(point)]
    cells = (point.baseline, point.candidate)
    ids = [{cell.id} for cell in cells] if isinstance(point, SpeedPoint) else cells_of(own[0], point)
    return tuple(_arm(own, cell, of_arm) for cell, of_arm in zip(cells, ids, strict=True))


def _arm(runs: Sequence[Run], cell: Cell, ids: Collection[str]) -> ArmWitnessed:
    rows = [row for run in runs for row in run.witnessed if row.cell in ids]
    reason = AT_RANDOM if draws(cell) else NONE if not rows else None
    if reason is None and not any(row.num_tokens for row in rows):
        reason = "no witnessed answer has a token"
    if reason is not None:
        return ArmWitnessed(arm=cell.arm, dtype=cell.checkpoint.dtype, num_calls=len(rows), reason=reason)
    known = _timed(runs, ids)
    compared = [(row, answer) for row in rows for answer in row.answers if _key(row, answer.prompt_id) in known]
    differing = {
        answer.prompt_id: Differing(prompt_id=answer.prompt_id, position=None)
        for row, answer in compared
        if _hash(answer.token_ids) not in known[_key(row, answer.prompt_id)]
    }
    return ArmWitnessed(
        arm=cell.arm,
        dtype=cell.checkpoint.dtype,
        num_calls=len(rows),
        num_tokens=sum(row.num_tokens for row in rows),
        num_witnessed=sum(row.num_witnessed for row in rows),
        num_compared=len({_key(row, answer.prompt_id) for row, answer in compared}),
        differing=tuple(differing.values()),
        known=_drafted(row for row in rows if row.kind in ("timed", "scored")),
        new=_drafted(row for row in rows if row.kind == "made up"),
    )


def _timed(runs: Sequence[Run], ids: Collection[str]) -> Hashes:
    """What was answered without a witness. Every launch makes up new prompts of its own."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for sample in (sample for run in runs for sample in run.speed if sample.cell in ids):
        for prompt in sample.prompts:
            of = sample.launch_id if sample.phase == "probe" else ""
            found[of, prompt.prompt_id].add(prompt.tokens_sha256)
    for row in (row for run in runs for row in run.generations if row.cell in ids and run.manifest.verb == "run"):
        found["", row.generation.prompt_id].add(_hash(row.generation.token_ids))
    return found


def _key(row: Witnessed, prompt_id: str) -> tuple[str, str]:
    return ("" if row.kind in ("timed", "scored") else row.launch_id, prompt_id)


def _hash(token_ids: Sequence[int]) -> str:
    return sha256_text(canonical_json(list(token_ids)))


def _drafted(rows: Iterable[Witnessed]) -> Drafted:
    rows = list(rows)
    return Drafted(num_tokens=sum(row.num_tokens for row in rows), num_drafted=sum(row.num_drafted for row in rows))


def likeness(runs: Sequence[Run], point: SpeedPoint) -> Likeness | None:
    """The arms' answers to the same prompts beside each other; ``None`` where they are drawn or not there."""
    if draws(point.baseline) or draws(point.candidate):
        return None
    answers: dict[str, dict[tuple[str, str, WitnessedKind], tuple[int, ...]]] = {"baseline": {}, "candidate": {}}
    arms = {point.baseline.id: answers["baseline"], point.candidate.id: answers["candidate"]}
    for row in (row for run in runs if run.manifest.run_id in point.run_ids for row in run.witnessed):
        for answer in row.answers if row.cell in arms else ():
            arms[row.cell][row.launch_id, answer.prompt_id, row.kind] = answer.token_ids
    shares: dict[WitnessedKind, list[float]] = defaultdict(list)
    for key in answers["baseline"].keys() & answers["candidate"].keys():
        one, other = answers["baseline"][key], answers["candidate"][key]
        shares[key[2]].append(SequenceMatcher(None, one, other, autojunk=False).ratio())
    known, new = shares["timed"], shares["made up"]
    if not known or not new:
        return None
    return Likeness(known=fmean(known), new=fmean(new), num_known=len(known), num_new=len(new))


# Gates


def witness_gates(runs: Sequence[Run], point: QualityPoint | SpeedPoint, limits: GateLimits) -> list[Gate]:
    """Answers come from logits of their own call, and drafts from something that has drafts for any prompt.

    The second is left out where hardly anything is drafted.
    """
    arms, run_ids = witnessed_arms(runs, point), run_ids_of(point)
    wrong = [_short_text(one, limits) for one in arms if one.is_short(limits)]
    wrong += [_two_faced_text(one) for one in arms if one.is_two_faced(limits)]
    reasons = dict.fromkeys(f"{one.arm}: {one.reason}" if one.reason != NONE else NONE for one in arms if one.reason)
    outcome: CheckOutcome = "failed" if wrong else "not_checked" if reasons else "passed"
    detail = "; ".join(wrong or reasons) or "; ".join(map(_share_text, arms))
    found = [Gate(kind="witnessed_answers", outcome=outcome, detail=detail, evidence=run_ids)]
    return [*found, *_drafts_gates(arms, run_ids)]


def scored_witness_gates(runs: Sequence[Run], point: QualityPoint, limits: GateLimits) -> list[Gate]:
    """Those of a quality; none where nothing of it was generated."""
    [run] = [run for run in runs if run.manifest.run_id == point.run_id]
    ids = {cell for of_arm in cells_of(run, point) for cell in of_arm}
    return witness_gates(runs, point, limits) if any(row.cell in ids for row in run.generations) else []


def _drafts_gates(arms: Sequence[ArmWitnessed], run_ids: tuple[str, ...]) -> list[Gate]:
    many = [one for one in arms if one.known.share >= MANY_DRAFTED]
    if not many:
        return []
    wrong = [one for one in many if one.drafts_what_it_knows]
    unknown = [one for one in many if one.new.num_tokens < ENOUGH_TOKENS]
    outcome: CheckOutcome = "failed" if wrong else "not_checked" if unknown else "passed"
    detail = "; ".join(map(_drafts_text, wrong or many))
    if outcome == "not_checked":
        detail += f": fewer than {ENOUGH_TOKENS} tokens of answers to made-up prompts, too few to compare"
    return [Gate(kind="drafts", outcome=outcome, detail=detail, evidence=run_ids)]


# Words


def _share_text(one: ArmWitnessed) -> str:
    return (
        f"{one.arm}: {_percent(one.share)} of the {one.num_tokens:,} tokens of {one.num_calls:,} witnessed calls come "
        "from logits that the model computed in the same call"
    )


def _short_text(one: ArmWitnessed, limits: GateLimits) -> str:
    return f"{_share_text(one)}, fewer than {_percent(limits.witnessed_share)}: the others were not made by the model"


def _two_faced_text(one: ArmWitnessed) -> str:
    shown = "; ".join(dict.fromkeys(prompt_text(_document(one.prompt_id)) for one in one.differing[:3]))
    return (
        f"{one.arm}: {len(one.differing)} of {one.num_compared:,} answers are others before a witness than without: "
        f"{shown}"
    )


def _document(prompt_id: str) -> str:
    """``task/number``; prompts that are scored have their request and their sample behind it."""
    task, *numbers = prompt_id.rsplit("/", 3)
    return f"{task}/{numbers[0]}" if len(numbers) == 3 and all(map(str.isdigit, numbers)) else prompt_id


def _drafts_text(one: ArmWitnessed) -> str:
    return (
        f"{one.arm}: {_percent(one.known.share)} of its tokens on known prompts were given to the model before it had "
        f"computed them, of made-up prompts {_percent(one.new.share)}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def likeness_warning(found: Likeness | None) -> str | None:
    """What to look at where answers to made-up prompts are much less like the baseline's than those that are timed."""
    if found is None or not found.is_far_less:
        return None
    return (
        f"on made-up prompts the candidate's answers share {_percent(found.new)} of their tokens with the baseline's, "
        f"on timed prompts {_percent(found.known)}: read them, it may answer new prompts carelessly"
    )
