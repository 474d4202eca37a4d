"""Every gate of one timed point: what a claim is judged by, and what a report marks as INVALID, is one and the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from twotower_eval.analyse.compare import gates
from twotower_eval.analyse.compare.contradiction import Contradiction
from twotower_eval.analyse.compare.nulls import caution
from twotower_eval.analyse.compare.points import QualityPoint
from twotower_eval.analyse.compare.same import answer_gates
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.witness import likeness, likeness_warning, witness_gates
from twotower_eval.records import Estimate, Gate, GateLimits
from twotower_eval.store import Run

Contradictions = Mapping[str, Sequence[Contradiction]]  # by run id


def speed_gates(
    point: SpeedPoint,
    runs: Sequence[Run],
    limits: GateLimits,
    *,
    quality: Sequence[QualityPoint],
    speed: Sequence[SpeedPoint],
    contradictions: Contradictions,
    judged: Estimate | None = None,
    claimed: float | None = None,
) -> tuple[Gate, ...]:
    """All gates of a timed point, by these limits.

    ``quality`` and ``speed`` are all points of the runs: what was measured at the same point, and whose nulls are
    corrected for together. ``judged`` is the speedup that the null is held against and ``claimed`` what is claimed of
    it; without them the null is held against its own limits alone.
    """
    own = [one for one in quality if one.key == point.key]
    found = [*_gates(point, runs, own, limits)]
    if point.time.estimate is not None:
        found.append(gates.null_gate(point, speed, judged, claimed, limits))
    run_ids = dict.fromkeys([*point.run_ids, *(run_id for gate in found for run_id in gate.evidence)])
    return (gates.files_agree_gate(contradictions, [*run_ids], runs), *found)


def _gates(point: SpeedPoint, runs: Sequence[Run], own: Sequence[QualityPoint], limits: GateLimits) -> Iterator[Gate]:
    """Those that hang on nothing that is claimed."""
    yield gates.complete_gate(point)
    yield gates.same_inputs_gate({}, point.run_ids)
    yield gates.whole_prompts_gate(runs, point, point.run_ids)
    yield from answer_gates(runs, own, point, limits)
    if point.handicaps:
        yield gates.fastest_way_gate(point)
    yield gates.busy_gate(runs, point, limits)
    if (beside := gates.own_generate_gate(point, limits)) is not None:
        yield beside
    if point.faults:
        yield gates.times_gate(point, limits)
    yield gates.probes_gate(point, limits)
    yield from witness_gates(runs, point, limits)
    yield gates.residual_gate(point, limits)
    if (lag := gates.baseline_lag_gate(point, limits)) is not None:
        yield lag
    yield gates.degenerate_gate(point, own, limits)
    yield gates.floor_gate(own, limits)
    yield gates.verify_gate(runs, point.candidate.checkpoint.identity)


def gated(
    speed: Sequence[SpeedPoint], runs: Sequence[Run], quality: Sequence[QualityPoint], contradictions: Contradictions
) -> tuple[SpeedPoint, ...]:
    """The points with their gates, by the limits of a claim that names none.

    One whose null is good enough in itself, and yet wide for so small a speedup, gets a warning, and one that answers
    made-up prompts quite unlike the baseline.
    """
    found = []
    for point in speed:
        own = speed_gates(point, runs, GateLimits(), quality=quality, speed=speed, contradictions=contradictions)
        null_failed = any(gate.kind == "aa_null" and gate.outcome == "failed" for gate in own)
        more = (None if null_failed else caution(point), likeness_warning(likeness(runs, point)))
        warnings = (*point.warnings, *(warning for warning in more if warning is not None))
        found.append(replace(point, gates=own, warnings=warnings))
    return tuple(found)
