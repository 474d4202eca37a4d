"""Benchmarks of this package's own machinery: ratios measured side by side in one run. Names live in ``BENCHES``.

A bench is a function ``run(*, rounds, say) -> Findings``: it says what it will measure before it measures, runs its
arms interleaved round by round, and gives a table for people and a summary for machines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twotower_eval.environment import describe_machine, package_versions
from twotower_eval.names import did_you_mean, resolve

BENCHES = {
    "engine": "twotower_eval.bench.engine:run",
    "batching": "twotower_eval.bench.batching:run",
}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a bench found: a table's header and rows as text, and the figures behind it as plain data."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summary: dict[str, Any]


def run(names: Sequence[str], *, threads: int, rounds: int, say: Say) -> None:
    """Run benches by name (none: all), saying for each its card, its table and one JSON line.

    ValueError for an unknown name (a ``"module:function"`` is taken literally) or counts below 1.
    """
    for option, value in (("threads", threads), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{option} must be 1 or more, not {value}")
    for name in names:
        if name not in BENCHES and ":" not in name:
            raise ValueError(f"bench {name!r} is unknown{did_you_mean(name, BENCHES)}")
    from twotower_eval.speed.clock import torch_threads

    for name in names or list(BENCHES):
        bench = resolve(BENCHES.get(name, name))
        with torch_threads(threads):
            findings: Findings = bench(rounds=rounds, say=say)
        say(markdown(findings.header, findings.rows))
        conditions = {"machine": describe_machine(), "packages": package_versions()}
        line = {"bench": name, "threads": threads, "rounds": rounds, **findings.summary, **conditions}
        say("\n" + json.dumps(line, allow_nan=False))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned for reading as it is; numbers, all columns but the first, to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = []
    for first, *rest in (header, rule, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
