"""What a speedup is made of: measured parts times counts against measured times, and where the break-even lies.

A residual is what the parts leave unexplained; it is printed, never absorbed into a part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twotower_eval import stats
from twotower_eval.evidence.measured import Measured, measured
from twotower_eval.records import Cell, CostPart, CostSample, Estimate, SpeedSample
from twotower_eval.store import Run

Point = tuple[CostPart, int | None, int]  # part, block size, context tokens


@dataclass(frozen=True, kw_only=True)
class ArmCosts:
    """One arm's measured parts, and its measured time against what they predict.

    ``reason`` says why there is no prediction.
    """

    phases: tuple[stats.PhaseCost, ...]
    prediction: stats.Prediction | None
    explanation: stats.Explanation | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Both arms' parts. ``break_even`` is tokens per NFE at which both arms decode equally fast, beside those made.

    It is computed round by round at ``context_tokens``, the middle of the workload, with the workload's own context
    passes per NFE.
    """

    baseline: ArmCosts
    candidate: ArmCosts
    break_even: Measured
    tokens_per_nfe: float | None
    context_tokens: float


def costs(
    runs: Sequence[Run], baseline: Cell, candidate: Cell, samples: tuple[Sequence[SpeedSample], Sequence[SpeedSample]]
) -> Costs:
    """Join the parts that were timed with the calls of both arms, ``samples``: those of the measured rounds."""
    parts = [_parts(runs, baseline), _parts(runs, candidate)]
    block_size = candidate.decoder.params.get("block_size")
    own = block_size if isinstance(block_size, int) else None
    middle = _middle(samples[0])
    return Costs(
        baseline=_arm(parts[0], samples[0], None),
        candidate=_arm(parts[1], samples[1], own),
        break_even=measured(lambda: _break_even(parts, samples[1], own, middle)),
        tokens_per_nfe=_tokens_per_nfe(samples[1]),
        context_tokens=middle,
    )


def costs_alone(runs: Sequence[Run], cell: Cell, samples: Sequence[SpeedSample]) -> ArmCosts:
    """The same of an autoregressive cell that nothing was timed beside."""
    return _arm(_parts(runs, cell), samples, None)


def _parts(runs: Sequence[Run], cell: Cell) -> list[CostSample]:
    """Measured parts of the cell or of those beside it that cost the same: same weights, same timed prompts.

    Parts are timed once for all thresholds and steps of a block size.
    """
    found = []
    for run in runs:
        alike = {other.id for other in run.manifest.cells if _costs_like(other) == _costs_like(cell)}
        found += [sample for sample in run.costs if sample.cell in alike and sample.phase == "measure"]
    return [sample for sample in found if sample.routing is None]


def _costs_like(cell: Cell) -> tuple[object, ...]:
    return (cell.arm, cell.checkpoint, cell.workload)


def _arm(parts: list[CostSample], samples: Sequence[SpeedSample], block_size: int | None) -> ArmCosts:
    phases = _phases(sample for sample in parts if sample.block_size in (None, block_size))
    if not phases:
        reason = "the parts of decoding were not timed alone"
        return ArmCosts(phases=(), prediction=None, explanation=None, reason=reason)
    try:
        calls = [_counts(sample, block_size) for sample in samples]
        prediction = stats.predict(stats.CostTable(phases), calls)
        explanation = stats.explain(sum(sample.wall_s for sample in samples), prediction.total_s)
    except ValueError as error:
        return ArmCosts(phases=phases, prediction=None, explanation=None, reason=str(error))
    return ArmCosts(phases=phases, prediction=prediction, explanation=explanation, reason=None)


def _phases(parts: Iterable[CostSample]) -> tuple[stats.PhaseCost, ...]:
    """Mean over rounds of the seconds of one pass, at each context length.

    A mean and not a median, because what it has to predict is a sum: on a machine with neighbours times are skewed.
    """
    seconds: dict[Point, dict[str, float]] = defaultdict(dict)
    for sample in parts:
        of_point = seconds[sample.part, sample.block_size, sample.context_tokens]
        of_point[f"{sample.launch_id} {sample.round}"] = sample.wall_s / sample.num_repeats
    return tuple(
        stats.PhaseCost(
            part=part, block_size=size, context_tokens=tokens, seconds=stats.mean_time(list(by_round.values()))
        )
        for (part, size, tokens), by_round in sorted(seconds.items(), key=lambda item: (item[0][0], item[0][2]))
    )


def _counts(sample: SpeedSample, block_size: int | None) -> stats.CallCounts:
    """Passes of the whole batch: as many as its longest row takes.

    In a batch of several, rows may take more passes in different blocks, which counts of whole rows do not show: then
    fewer passes are predicted than there were, and the residual has the rest.
    """
    context_passes = max(prompt.num_context_forwards for prompt in sample.prompts) - 1
    prompt_tokens = max(prompt.num_prompt_tokens for prompt in sample.prompts)
    if block_size is None:
        if any(prompt.num_denoiser_forwards for prompt in sample.prompts):
            raise ValueError("this decoder has no blocks, and no parts of its own were timed")
        return stats.CallCounts(prompt_tokens=prompt_tokens, num_steps=context_passes)
    return stats.CallCounts(
        prompt_tokens=prompt_tokens,
        num_steps=max(prompt.num_denoiser_forwards for prompt in sample.prompts),
        block_size=block_size,
        num_context_passes=context_passes,
    )


def _middle(samples: Sequence[SpeedSample]) -> float:
    """Mean context length half way through the answers."""
    prompts = [prompt for sample in samples for prompt in sample.prompts]
    return sum(prompt.num_prompt_tokens + prompt.num_tokens / 2 for prompt in prompts) / len(prompts)


def _tokens_per_nfe(samples: Sequence[SpeedSample]) -> float | None:
    prompts = [prompt for sample in samples for prompt in sample.prompts]
    num_passes = sum(prompt.num_denoiser_forwards for prompt in prompts)
    return sum(prompt.num_tokens for prompt in prompts) / num_passes if num_passes else None


def _break_even(
    parts: list[list[CostSample]], samples: Sequence[SpeedSample], block_size: int | None, middle: float
) -> Estimate:
    """Median over rounds of what each round's own costs give, so that drift hits all parts of it alike."""
    prompts = [prompt for sample in samples for prompt in sample.prompts]
    num_passes = sum(prompt.num_denoiser_forwards for prompt in prompts)
    if block_size is None or not num_passes:
        raise ValueError("the candidate denoises no blocks, so there is no break-even")
    blocks_per_nfe = sum(prompt.num_context_forwards - 1 for prompt in prompts) / num_passes
    by_round: dict[tuple[str, int], list[CostSample]] = defaultdict(list)
    for sample in (*parts[0], *parts[1]):
        if sample.part != "prefill" and sample.block_size in (None, block_size):
            by_round[sample.launch_id, sample.round].append(sample)
    values = []
    for of_round in by_round.values():
        if {sample.part for sample in of_round} == {"ar_step", "denoise", "context_pass"}:
            table = stats.CostTable(_phases(of_round))
            value = stats.break_even(
                ar_step_s=table.seconds("ar_step", None, middle),
                denoise_s=table.seconds("denoise", block_size, middle),
                context_pass_s=table.seconds("context_pass", block_size, middle),
                blocks_per_nfe=blocks_per_nfe,
            )
            values.append(value)
    if not values:
        raise ValueError("no round has all parts of decoding timed alone")
    return stats.median(values)
