"""How a Hugging Face model is run: words, the same on terminals, in checks and in reports; and what of it slows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from twotower_eval.records import HALF_PRECISION, Arm, FailedTrial, RunManifest, Ways

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
    """An arm that was timed in a slower way than its model has: no speedup can be read off that."""

    arm: Arm
    way: SlowWay


def handicaps(
    arm: Arm, ways: Ways, *, batch_size: int, longest: int, unlike_lengths: bool = True
) -> tuple[Handicap, ...]:
    """What slows an arm in calls of ``batch_size`` prompts, of ``unlike_lengths`` in one call or not, and contexts of
    up to ``longest`` tokens.

    Prompts one after the other are as fast as any where each is timed alone; positions passed cost nothing, and
    options are not timed.
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
    """Why no speedup can be read off such times."""
    told = "; ".join(f"the {one.arm} was timed {SLOW_WORDS[one.way]}" for one in found)
    return f"{told}: a model that is slowed down gives no speedup"


def proof_outcome(ways: Ways) -> ProofOutcome:
    """Whether the model proved right in the fastest way that there is, in a slower one, or could not be tried."""
    if ways.precision in HALF_PRECISION:
        return "not checked"
    fast = ways.cached and ways.rows_together and ways.passes_together and ways.unlike_lengths_together
    return "fastest" if fast and ways.plain_beyond is None and not _splits_options(ways) else "slower"


def ways_text(ways: Ways) -> str:
    """One line: how the model is run, on how many tokens that was tried, and why it is not run faster."""
    found = list(_ways(ways)) or ["with a cache, the rows of a batch together"]
    tried = f"tried on up to {ways.proved_tokens:,} tokens against whole rows without a cache"
    if ways.precision in HALF_PRECISION:
        tried = f"not proved: float32 does not fit into memory, and in {ways.precision} rounding hides faults"
    reasons = list(dict.fromkeys(map(_reason, ways.failed)))
    return "; ".join([", ".join(found), tried, *reasons])


def slower_lines(manifest: RunManifest) -> list[str]:
    """A line for each model of a run that is not run in the fastest way, by name."""
    return [
        f"{name}: {ways_text(ways)}"
        for name, ways in named_ways(manifest)
        if ways.failed or proof_outcome(ways) != "fastest"
    ]


def named_ways(manifest: RunManifest) -> list[tuple[str, Ways]]:
    """Each model's with the name of its checkpoint."""
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
    """Whether options are read one by one that the model might have read in one row."""
    return not ways.options_packed and any(trial.check == "options in one row" for trial in ways.failed)


def _reason(trial: FailedTrial) -> str:
    way = " with positions passed" if trial.positions_passed else ""
    way += "" if trial.rows_together else ", one row at a time"
    way += "" if trial.precision == "float32" else f", in {trial.precision}"
    if trial.difference is None:
        return f"{trial.check}{way} failed: {trial.error}"
    by = f"{trial.difference:.2g} of the logits' spread (limit {trial.limit:g})"
    return f"{trial.check}{way} differ by {by} on {trial.num_tokens:,} tokens"
