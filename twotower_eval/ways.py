"""Words for how a Hugging Face model is run, the same on terminals, in checks and in reports."""

from __future__ import annotations

from collections.abc import Iterator

from twotower_eval.records import FailedTrial, RunManifest, Ways


def ways_text(ways: Ways) -> str:
    """One line: how the model is run, on how many tokens that was tried, and why it is not run faster."""
    found = list(_ways(ways)) or ["cached, rows of a batch beside each other"]
    tried = f"tried on up to {ways.proved_tokens:,} tokens against passes over whole rows, alone and without a cache"
    reasons = list(dict.fromkeys(map(_reason, ways.failed)))
    return "; ".join([", ".join(found), tried, *reasons])


def slower_lines(manifest: RunManifest) -> list[str]:
    """A line for each model of a run that is not run in the fastest way, by name."""
    names = {cell.checkpoint.identity: cell.checkpoint.name for cell in manifest.cells}
    return [
        f"{names.get(ways.checkpoint, ways.checkpoint)}: {ways_text(ways)}"
        for ways in manifest.ways
        if ways.failed or ways.plain_beyond is not None or not ways.cached
    ]


def _ways(ways: Ways) -> Iterator[str]:
    if not ways.cached:
        yield "without a cache, every token by a pass over all before it"
    if not ways.rows_together:
        yield "one prompt after the other, whatever the batch size"
    if not ways.passes_together:
        yield "rows that are scored one by one"
    if any(trial.check == "options in one row" for trial in ways.failed) and not ways.options_packed:
        yield "every option of a question in a row of its own"
    if ways.positions_passed:
        yield "cached, with the positions of its tokens passed to it"
    if ways.plain_beyond is not None:
        after = ", behind a short row each" if ways.resets_first else ""
        yield f"contexts of more than {ways.plain_beyond:,} tokens whole, alone and without a cache{after}"


def _reason(trial: FailedTrial) -> str:
    way = " with positions passed" if trial.positions_passed else ""
    way += "" if trial.rows_together else ", one row at a time"
    if trial.difference is None:
        return f"{trial.check}{way} failed: {trial.error}"
    by = f"{trial.difference:.2g} of the logits' spread (limit {trial.limit:g})"
    return f"{trial.check}{way} differ by {by} on {trial.num_tokens:,} tokens"
