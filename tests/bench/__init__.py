"""Benchmarks of this package's own machinery: ratios measured side by side in one run. Names live in ``BENCHES``.

A bench is a function ``run(*, rounds, full, say) -> Findings``: it says what it will measure before it measures, runs
its arms interleaved round by round, and gives a table for people and a summary for machines. ``full`` asks for the
sizes of published tables instead of small ones. Further keywords are its options; those without a default must be
given.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twotower_eval.names import did_you_mean, resolve
from twotower_eval.store.environment import describe_machine, package_versions

BENCHES = {
    "engine": "bench.engine:run",
    "batching": "bench.batching:run",
    "drafts": "bench.drafts:run",
    "families": "bench.families:run",
    "scoring": "bench.scoring:run",
    "generation": "bench.generation:run",
    "opening": "bench.opening:run",
}

ROUNDS, FULL_ROUNDS = 3, 9

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a bench found: a table's header and rows as text, and the figures behind it as plain data."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summary: dict[str, Any]


def run(
    names: Sequence[str], *, threads: int, rounds: int | None, full: bool = False, say: Say, **options: Any
) -> None:
    """Run benches by name (none: all that have what they need), saying for each its card, its table and one JSON line.

    ``rounds`` None: ROUNDS, or FULL_ROUNDS where ``full``.

    ValueError for an unknown name (a ``"module:function"`` is taken literally), counts below 1, and ``options`` (None:
    not given) that a bench lacks or that none of them takes.
    """
    rounds = (FULL_ROUNDS if full else ROUNDS) if rounds is None else rounds
    for option, value in (("threads", threads), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{option} must be 1 or more, not {value}")
    for name in names:
        if name not in BENCHES and ":" not in name:
            raise ValueError(f"bench {name!r} is unknown{did_you_mean(name, BENCHES)}")
    from twotower_eval.measure.speed.clock import torch_threads

    given = {option: value for option, value in options.items() if value is not None}
    for name, bench, own in _chosen(names, given, say):
        with torch_threads(threads):
            findings: Findings = bench(rounds=rounds, full=full, say=say, **own)
        say(markdown(findings.header, findings.rows))
        conditions = {"machine": describe_machine(), "packages": package_versions()}
        line = {"bench": name, "threads": threads, "rounds": rounds, "full": full, **findings.summary, **conditions}
        say("\n" + json.dumps(line, allow_nan=False))


def _chosen(names: Sequence[str], given: dict[str, Any], say: Say) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, function and options of each bench to run."""
    chosen = []
    for name in names or list(BENCHES):
        bench: Any = resolve(BENCHES.get(name, name))
        parameters = [
            p for p in inspect.signature(bench).parameters.values() if p.name not in ("rounds", "full", "say")
        ]
        lacking = [_flag(p.name) for p in parameters if p.default is p.empty and p.name not in given]
        if not lacking:
            chosen.append((name, bench, {p.name: given[p.name] for p in parameters if p.name in given}))
        elif names:
            raise ValueError(f"bench {name} needs {' and '.join(lacking)}")
        else:
            say(f"bench {name} left out: it needs {' and '.join(lacking)}\n")
    for option in given:
        if not any(option in own for *_, own in chosen):
            raise ValueError(f"{_flag(option)} would be ignored: no bench chosen here takes it")
    return chosen


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned for reading as it is; numbers, all columns but the first, to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = []
    for first, *rest in (header, rule, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
