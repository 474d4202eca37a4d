"""Whether answers come from the logits of their own call, by untimed witnessed calls of one prompt each.

Three things are checked. Tokens of an answer without a row of logits in their call were known before it. An answer that
differs from the timed or scored answer to the same prompt shows that a decoder behaves differently when watched. And a
draft comes from somewhere: a decoder that drafts on timed prompts and not on made-up ones knows the timed ones by
heart. Where drafts come from is not seen. Small models, n-gram tables and the prompt itself are all fine, as they give
drafts for made-up prompts too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean
from typing import Literal

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.answers import Differing
from twotower_eval.analyse.compare.points import QualityPoint, cells_of
from twotower_eval.analyse.compare.same import run_ids_of
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.records import (
    ROUNDED,
    Arm,
    Cell,
    CheckOutcome,
    Fact,
    Finding,
    Gate,
    GateLimits,
    Witnessed,
    WitnessedKind,
    canonical_json,
    draws,
    sha256_text,
)
from twotower_eval.store import Run

LEVEL = 0.99  # of the bounds of shares
MANY_DRAFTED = 0.3  # of the tokens of known prompts, from which on it matters where drafts come from
FAR_LESS = 10.0  # times as many drafted tokens on known prompts as on made-up ones: no drafter knows so much less
ENOUGH_MADE_UP, ENOUGH_TOKENS = 8, 24  # made-up prompts, and tokens of their answers, to tell that
UNLIKE, ENOUGH_CALLS = 0.5, 4  # of how like the baseline's answers are, on made-up prompts against timed ones
Unknown = Literal["no call", "at random", "several prompts", "no token", "behind a server"]


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """Witnessed answers to prompts of one kind: their tokens and drafted tokens, their prompts and those with many
    drafts.
    """

    num_tokens: int = 0
    num_drafted: int = 0
    num_prompts: int = 0
    num_with_many: int = 0

    @property
    def share(self) -> float:
        """Drafted tokens over all tokens."""
        return self.num_drafted / self.num_tokens if self.num_tokens else 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        """Exact bounds of the share of prompts with many drafts."""
        return _least(self.num_with_many, self.num_prompts), _most(self.num_with_many, self.num_prompts)


@dataclass(frozen=True, kw_only=True)
class ArmWitnessed:
    """Witnessed calls of one arm. Of ``num_compared`` answers that were also timed or scored, ``differing`` are not the
    same; ``known`` are timed prompts, ``new`` made-up ones. ``unknown``: why nothing is known.
    """

    arm: Arm
    dtype: str
    num_calls: int = 0
    num_tokens: int = 0
    num_witnessed: int = 0
    num_compared: int = 0
    differing: tuple[Differing, ...] = ()
    known: Drafted = Drafted()
    new: Drafted = Drafted()
    unknown: Unknown | None = None

    @property
    def share(self) -> float:
        """Share of the tokens that come from logits of their call."""
        return self.num_witnessed / self.num_tokens if self.num_tokens else 0.0

    def is_short(self, limits: GateLimits) -> bool:
        """Whether too many tokens do not come from logits of their call."""
        return self.unknown is None and self.share < limits.witnessed_share

    def is_two_faced(self, limits: GateLimits) -> bool:
        """Whether more answers differ than rounding explains; in half precision, by a lower bound."""
        num, of = len(self.differing), self.num_compared
        if self.dtype in ROUNDED:
            return _least(num, of) > limits.differing_answers_half
        return of > 0 and num / of > limits.differing_answers

    @property
    def can_tell_drafts(self) -> bool:
        """Whether enough made-up prompts were answered to compare drafts."""
        return self.new.num_prompts >= ENOUGH_MADE_UP and self.new.num_tokens >= ENOUGH_TOKENS

    @property
    def lacks_drafts(self) -> bool:
        """Whether drafts are far less common on made-up prompts in these calls."""
        return self.new.share < self.known.share / FAR_LESS

    @property
    def surely_lacks_drafts(self) -> bool:
        """Whether that cannot be chance, by exact bounds."""
        return self.lacks_drafts and self.new.bounds[1] < self.known.bounds[0]


def _least(num: int, of: int) -> float:
    return 1 - _most(of - num, of) if of else 0.0


def _most(num: int, of: int) -> float:
    return stats.binomial_upper_bound(num, of, (1 - LEVEL) / 2) if of else 1.0


@dataclass(frozen=True, kw_only=True)
class WitnessedAnswers(Fact):
    """Both arms' witnessed calls: in ``short`` arms, fewer than ``least_share`` of the tokens come from logits of their
    own call; in ``two_faced`` arms, too many answers differ from those of other calls.
    """

    arms: tuple[ArmWitnessed, ...]
    short: tuple[Arm, ...]
    two_faced: tuple[Arm, ...]
    least_share: float

    @property
    def alike(self) -> tuple[object, ...]:
        """The same arms at fault, or the same reasons."""
        return (self.short, self.two_faced, tuple(one.unknown for one in self.arms))


@dataclass(frozen=True, kw_only=True)
class DraftedAnswers(Fact):
    """Arms with many drafted tokens; ``too_few``: too few prompts to decide where drafts come from."""

    arms: tuple[ArmWitnessed, ...]
    too_few: bool

    @property
    def alike(self) -> tuple[object, ...]:
        """The same arms."""
        return tuple(one.arm for one in self.arms)


@dataclass(frozen=True, kw_only=True)
class Likeness(Fact):
    """How similar the candidate's answers are to the baseline's: the mean share of tokens in common, in order, over so
    many calls of each kind.
    """

    known: float
    new: float
    num_known: int
    num_new: int

    @property
    def is_far_less(self) -> bool:
        """Whether answers to made-up prompts are so much less similar that a reader should look at them."""
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
    own = [row for row in rows if len(row.answers) == 1]
    unknown: Unknown | None = "at random" if draws(cell) else "no call" if not rows else None
    if cell.checkpoint.served is not None:
        unknown = "behind a server"
    if unknown is None and not own:
        unknown = "several prompts"
    if unknown is None and not any(row.num_tokens for row in own):
        unknown = "no token"
    if unknown is not None:
        return ArmWitnessed(arm=cell.arm, dtype=cell.checkpoint.dtype, num_calls=len(rows), unknown=unknown)
    elsewhere = _not_witnessed(runs, ids)
    compared: dict[tuple[str, str], bool] = {}  # whether the answers are the same
    for row in rows:
        for answer in row.answers:
            key = (_launch_of(row), answer.prompt_id)
            if key in elsewhere:
                compared[key] = compared.get(key, True) and _hash(answer.token_ids) in elsewhere[key]
    return ArmWitnessed(
        arm=cell.arm,
        dtype=cell.checkpoint.dtype,
        num_calls=len(own),
        num_tokens=sum(row.num_tokens for row in own),
        num_witnessed=sum(row.num_witnessed for row in own),
        num_compared=len(compared),
        differing=tuple(Differing(prompt_id=key[1], position=None) for key, is_same in compared.items() if not is_same),
        known=_drafted(row for row in own if row.kind == "timed"),
        new=_drafted(row for row in own if row.kind == "made up"),
    )


def _not_witnessed(runs: Sequence[Run], ids: Collection[str]) -> Hashes:
    """Timed or scored answers, without the warm-up, whose calls may be witnessed. Every launch has other made-up
    prompts.
    """
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for sample in (sample for run in runs for sample in run.speed if sample.cell in ids):
        for prompt in sample.prompts if sample.phase != "warmup" else ():
            of = sample.launch_id if sample.phase == "probe" else ""
            found[of, prompt.prompt_id].add(prompt.tokens_sha256)
    for row in (row for run in runs for row in run.generations if row.cell in ids and run.manifest.verb == "run"):
        found["", row.generation.prompt_id].add(_hash(row.generation.token_ids))
    return found


def _launch_of(row: Witnessed) -> str:
    return "" if row.kind in ("timed", "scored") else row.launch_id


def _hash(token_ids: Sequence[int]) -> str:
    return sha256_text(canonical_json(list(token_ids)))


def _drafted(rows: Iterable[Witnessed]) -> Drafted:
    """Drafts, each prompt once: several launches repeat the same answer."""
    once = {(_launch_of(row), row.answers[0].prompt_id): row for row in rows}.values()
    return Drafted(
        num_tokens=sum(row.num_tokens for row in once),
        num_drafted=sum(row.num_drafted for row in once),
        num_prompts=len(once),
        num_with_many=sum(row.num_drafted > MANY_DRAFTED * row.num_tokens for row in once),
    )


def likeness(runs: Sequence[Run], point: SpeedPoint) -> Likeness | None:
    """Similarity of the arms' answers to the same prompts; ``None`` where they are drawn at random or missing."""
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


def witness_gates(runs: Sequence[Run], point: SpeedPoint, limits: GateLimits) -> list[Gate]:
    """The gates of a timed point: its answers come from logits of their own call, and its drafts are not known by
    heart. The second is left out where hardly anything is drafted.
    """
    arms = witnessed_arms(runs, point)
    return [_answers_gate(arms, point, limits), *_drafts_gates(arms, run_ids_of(point))]


def scored_witness_gates(runs: Sequence[Run], point: QualityPoint, limits: GateLimits) -> list[Gate]:
    """The gates of a quality; none where nothing of it was generated. A ``run`` has no made-up prompts, so drafts are
    not checked.
    """
    [run] = [run for run in runs if run.manifest.run_id == point.run_id]
    ids = {cell for of_arm in cells_of(run, point) for cell in of_arm}
    if not any(row.cell in ids for row in run.generations):
        return []
    return [_answers_gate(witnessed_arms(runs, point), point, limits)]


def _answers_gate(arms: Sequence[ArmWitnessed], point: QualityPoint | SpeedPoint, limits: GateLimits) -> Gate:
    facts = WitnessedAnswers(
        arms=tuple(arms),
        short=tuple(one.arm for one in arms if one.is_short(limits)),
        two_faced=tuple(one.arm for one in arms if one.is_two_faced(limits)),
        least_share=limits.witnessed_share,
    )
    wrong, unknown = facts.short or facts.two_faced, any(one.unknown for one in arms)
    outcome: CheckOutcome = "failed" if wrong else "not_checked" if unknown else "passed"
    return Gate(kind="witnessed_answers", outcome=outcome, facts=facts, evidence=run_ids_of(point))


def _drafts_gates(arms: Sequence[ArmWitnessed], run_ids: tuple[str, ...]) -> list[Gate]:
    many = [one for one in arms if one.known.share >= MANY_DRAFTED]
    if not many:
        return []
    wrong = [one for one in many if one.can_tell_drafts and one.surely_lacks_drafts]
    unknown = [one for one in many if not one.can_tell_drafts or one.lacks_drafts]
    outcome: CheckOutcome = "failed" if wrong else "not_checked" if unknown else "passed"
    facts = DraftedAnswers(arms=tuple(wrong or unknown or many), too_few=outcome == "not_checked")
    return [Gate(kind="drafts", outcome=outcome, facts=facts, evidence=run_ids)]


def likeness_warning(found: Likeness | None) -> Finding | None:
    """A warning where answers to made-up prompts are much less like the baseline's than those to timed prompts."""
    if found is None or not found.is_far_less:
        return None
    return Finding(kind="unlike_answers", severity="warning", facts=found)
