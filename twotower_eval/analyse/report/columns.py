"""Columns that several CSV tables share."""

from __future__ import annotations

from twotower_eval.analyse.compare.calls import WithinCalls
from twotower_eval.analyse.compare.counts import Counts
from twotower_eval.analyse.compare.measured import Measured
from twotower_eval.analyse.compare.naming import NAMED, checkpoint_name, setting
from twotower_eval.analyse.words.methods import method_text
from twotower_eval.records import Cell

Row = dict[str, object]


def measured_columns(name: str, found: Measured) -> Row:
    """An estimate as four columns and the reason where there is none."""
    estimate = found.estimate
    numbers = (None,) * 4 if estimate is None else (estimate.value, estimate.low, estimate.high, estimate.level)
    values = dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_level"), numbers, strict=True))
    method = None if estimate is None else method_text(estimate)
    return {**values, f"{name}_method": method, f"{name}_missing_reason": found.reason}


def operating_point(cell: Cell) -> Row:
    """A point's columns: the usual three settings, then of a plug-in every parameter of its own, as ``param_NAME``."""
    named = {name: setting(cell.decoder, name) for name in NAMED}
    if cell.decoder.is_plug_in:
        others = (name for name in cell.decoder.params if name not in NAMED)
        named |= {f"param_{name}": cell.decoder.params[name] for name in others}
    return {"checkpoint": checkpoint_name(cell.checkpoint), "decoder": cell.decoder.label, **named}


def ends(arm: str, interval: Measured) -> Row:
    """The ends of an arm's own interval, or why it has none."""
    columns = measured_columns(arm, interval)
    return {name: columns[name] for name in (f"{arm}_low", f"{arm}_high", f"{arm}_missing_reason")}


def count_columns(arm: str, counts: Counts) -> Row:
    return {
        f"{arm}_num_prompts": counts.num_prompts,
        f"{arm}_num_tokens": counts.num_tokens,
        f"{arm}_num_discarded_tokens": counts.num_discarded_tokens,
        f"{arm}_num_context_forwards": counts.num_context_forwards,
        f"{arm}_num_prefill_forwards": counts.num_prefill_forwards,
        f"{arm}_num_denoiser_forwards": counts.num_denoiser_forwards,
        f"{arm}_num_forced_commits": counts.num_forced_commits,
        f"{arm}_tokens_per_nfe": counts.tokens_per_nfe,
        f"{arm}_tokens_per_nfe_and_commit": counts.tokens_per_nfe_and_commit,
        f"{arm}_tokens_per_forward": counts.tokens_per_forward,
    }


def within_columns(arm: str, within: WithinCalls) -> Row:
    """What timed calls say of their inside; None where they say nothing."""
    return {
        f"{arm}_prefill_median_s": within.prefill_s,
        f"{arm}_first_output_median_s": within.first_output_s,
        f"{arm}_peak_memory_bytes": within.peak_memory_bytes,
    }
