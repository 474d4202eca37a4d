"""Is the baseline at its best? How it was run, how far above its memory floor, how fast beside transformers' own.

A speedup over a baseline that its own library would outrun is bought. What a step of a tiny model takes is the host's
time, so that the floor is said and decides nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.warned import FarAboveFloor, SlowerThanGenerate
from twotower_eval.json_text import JsonObject
from twotower_eval.records import BaselineBest, Cell, Estimate, Finding
from twotower_eval.store import Run
from twotower_eval.strict import from_json

FAR_ABOVE = 10.0  # times its floor: said as a warning
TELLING_S = 5e-3  # floors of steps shorter than this say little: such a step is the host's time
FIELDS = {field.name for field in dataclasses.fields(BaselineBest)}


@dataclass(frozen=True, kw_only=True)
class Best:
    """What was found of one baseline cell, over all launches of its runs.

    ``above_floor``: times as long as reading a step's bytes takes, from ``tokens_per_s`` useful ones.
    ``over_generate``: times as long as transformers' own ``generate``, ``None`` where that was not timed or gave other
    tokens.
    """

    batch_size: int
    dtype: str
    facts: BaselineBest
    tokens_per_s: float | None
    above_floor: float | None
    over_generate: Estimate | None

    def is_handicapped(self, limit: float) -> bool:
        """Whether transformers' own is surely faster, by more than ``limit`` of its time."""
        return self.over_generate is not None and self.over_generate.low > 1 + limit


def best_of(runs: Sequence[Run], cell: Cell, tokens_per_s: float | None) -> Best | None:
    """``None`` where no launch looked, as in runs of old."""
    found = [_read(event) for run in runs for event in run.events if event.get("kind") == "baseline_best"]
    own = [one for one in found if one.cell == cell.id]
    if not own:
        return None
    facts = own[-1]
    bytes_per_s = max((one.bytes_per_s for one in own if one.bytes_per_s is not None), default=None)
    width = cell.workload.batch_size or 1
    above = None
    if facts.step_bytes and bytes_per_s and tokens_per_s:
        above = (width / tokens_per_s) / (facts.step_bytes / bytes_per_s)
    pairs = [pair for one in own if one.same_tokens for pair in zip(one.own_s, one.generate_s, strict=True)]
    ratios = [ours / theirs for ours, theirs in pairs if theirs > 0]
    return Best(
        batch_size=width,
        dtype=cell.checkpoint.dtype,
        facts=dataclasses.replace(facts, bytes_per_s=bytes_per_s),
        tokens_per_s=tokens_per_s,
        above_floor=above,
        over_generate=stats.median(ratios) if ratios else None,
    )


def _read(event: JsonObject) -> BaselineBest:
    return from_json(BaselineBest, {name: value for name, value in event.items() if name in FIELDS})


def best_warning(best: Best | None) -> Finding | None:
    """What is to be read before a speedup over this baseline is believed."""
    if best is None:
        return None
    if best.over_generate is not None and best.over_generate.low > 1:
        slower = SlowerThanGenerate(over_generate=best.over_generate)
        return Finding(kind="slower_than_generate", severity="warning", facts=slower)
    step_bytes, bytes_per_s = best.facts.step_bytes or 0.0, best.facts.bytes_per_s or 1.0
    if (best.above_floor or 0.0) > FAR_ABOVE and step_bytes / bytes_per_s >= TELLING_S:
        far = FarAboveFloor(above_floor=best.above_floor or 0.0, limit=FAR_ABOVE)
        return Finding(kind="far_above_floor", severity="warning", facts=far)
    return None
