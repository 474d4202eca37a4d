"""What a speedup is made of: parts times counts against measured times, and the break-even.

The residual is what the parts do not explain; it is printed and never absorbed into a part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.calls import Lane
from twotower_eval.analyse.compare.figures import Measured, measured, once
from twotower_eval.analyse.compare.residual import Residual, Round, by_round, fastest_of_calls, residual, unknown
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Arm, Cell, CostPart, CostSample, DecoderSpec, Estimate, Passes, SpeedSample
from twotower_eval.store import Run

Point = tuple[CostPart, int | None, int, int]  # part, block size, rows, context tokens
Call = Sequence[stats.PartPasses]
NOT_TIMED = "the parts of decoding were not timed alone"
SERVED = "an arm decodes behind a server, which does not show its forwards"
MAX_CONTEXTS = 8  # context lengths at which passes of one kind are looked up, for each call
NOT_COUNTED = "how many rows each pass of a batch served was not counted"


@dataclass(frozen=True, kw_only=True)
class ArmCosts:
    """One arm's measured parts, and its measured time against their prediction.

    ``reason``: why there is no prediction. ``residual`` has its interval over rounds.
    """

    phases: tuple[stats.PhaseCost, ...]
    prediction: stats.Prediction | None
    explanation: stats.Explanation | None
    reason: str | None
    residual: Residual


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

    @property
    def residuals(self) -> Mapping[Arm, Residual]:
        """The residuals of both arms."""
        return {"baseline": self.baseline.residual, "candidate": self.candidate.residual}


def costs(baseline: Lane, candidate: Lane) -> Costs:
    """Join the parts that were timed with the calls of both arms."""
    parts = [_parts(arm.runs, arm.cell) for arm in (baseline, candidate)]
    middle = _middle(baseline.samples)
    return Costs(
        baseline=arm_costs(baseline),
        candidate=arm_costs(candidate),
        break_even=measured(lambda: _break_even(parts, candidate.samples, _block_size(candidate.cell), middle)),
        tokens_per_nfe=_tokens_per_nfe(candidate.samples),
        context_tokens=middle,
    )


def arm_costs(arm: Lane) -> ArmCosts:
    """The parts and residual of one arm."""
    made = partial(_arm, _parts(arm.runs, arm.cell), arm.samples, _block_size(arm.cell), arm.cell)
    return once(arm.runs, ("costs", arm), made)


def _block_size(cell: Cell) -> int | None:
    """Block size of its decoder's forwards; ``None`` for baselines."""
    found = cell.decoder.params.get("block_size") if cell.arm == "candidate" else None
    return found if isinstance(found, int) else None


def _parts(runs: Sequence[Run], cell: Cell) -> list[CostSample]:
    """Measured parts of the cell, or of cells that cost the same: same weights and same timed prompts.

    Parts are timed once for all thresholds and steps of a block size.
    """
    found = []
    for run in runs:
        alike = {other.id for other in run.manifest.cells if _costs_like(other) == _costs_like(cell)}
        found += [
            sample for sample in run.costs if sample.cell in alike and sample.phase == "measure" and sample.wall_s > 0
        ]
    return [sample for sample in found if sample.routing is None]


def _costs_like(cell: Cell) -> tuple[object, ...]:
    return (cell.arm, cell.checkpoint, cell.workload, cell.decoder.own_steps)


def _arm(parts: list[CostSample], samples: Sequence[SpeedSample], block_size: int | None, cell: Cell) -> ArmCosts:
    found = _explained(parts, samples, block_size, cell)
    # Only runs that count passes note how busy the processor was, so that no pass at all is known to be none.
    idle = [sample for sample in samples if sample.cpu_s is not None and not sample.passes and _num_tokens(sample)]
    if cell.checkpoint.served is not None:  # its forwards are the server's affair
        return _unexplained((), SERVED)
    return replace(found, residual=replace(found.residual, num_idle_calls=len(idle))) if idle else found


def _num_tokens(sample: SpeedSample) -> int:
    return sum(prompt.num_tokens for prompt in sample.prompts)


def _explained(parts: list[CostSample], samples: Sequence[SpeedSample], block_size: int | None, cell: Cell) -> ArmCosts:
    own = _own(parts, samples, block_size, cell)
    phases = _phases(own)
    if not phases:
        return _unexplained(phases, NOT_TIMED)
    try:
        kept = any(sample.part == "bookkeeping" for sample in own)
        calls = {id(sample): _call(sample, block_size, cell.decoder, kept) for sample in samples}
        prediction = stats.predict(stats.CostTable(phases), [*calls.values()])
        explanation = stats.explain(sum(sample.wall_s for sample in samples), prediction.total_s)
    except NoEstimate as error:
        return _unexplained(phases, str(error))
    of_round: dict[Round, list[CostSample]] = defaultdict(list)
    for part in own:
        of_round[part.launch_id, part.round].append(part)

    def predicted(round_: Round, made: Sequence[SpeedSample]) -> stats.Prediction:
        if round_ not in of_round:
            raise NoEstimate(NOT_TIMED)
        return stats.predict(stats.CostTable(_phases(of_round[round_])), [calls[id(sample)] for sample in made])

    counted = all(sample.passes or len(sample.prompts) == 1 for sample in samples)
    found = residual(
        by_round(samples),
        predicted,
        towers_apart=len(set(cell.checkpoint.devices)) > 1,
        not_counted=None if counted else NOT_COUNTED,
    )
    if counted and found.whole.estimate is not None:
        found = replace(found, calm=_calm(phases, samples, calls))
    return ArmCosts(phases=phases, prediction=prediction, explanation=explanation, reason=None, residual=found)


def _calm(phases: tuple[stats.PhaseCost, ...], samples: Sequence[SpeedSample], calls: Mapping[int, Call]) -> float:
    """The unexplained share of each call's fastest round, with its parts at their mean over all rounds."""
    fastest = fastest_of_calls(samples)
    alone = stats.predict(stats.CostTable(phases), [calls[id(sample)] for sample in fastest])
    return stats.explain(sum(sample.wall_s for sample in fastest), alone.total_s).residual


def seconds_alone(runs: Sequence[Run], cell: Cell, samples: Sequence[SpeedSample]) -> Callable[[SpeedSample], float]:
    """A function from a call of a cell to the seconds that its forwards take alone; ``samples`` are its timed calls.

    The function raises NoEstimate where the parts that a call needs were not timed.
    """
    block_size = _block_size(cell)
    own = _own(_parts(runs, cell), samples, block_size, cell)
    table, kept = stats.CostTable(_phases(own)), any(sample.part == "bookkeeping" for sample in own)
    return lambda sample: stats.predict(table, [_call(sample, block_size, cell.decoder, kept)]).total_s


def _own(
    parts: Sequence[CostSample], samples: Sequence[SpeedSample], block_size: int | None, cell: Cell
) -> list[CostSample]:
    """Parts at the sizes of the forwards; sizes that were not timed are interpolated."""
    sizes, timed = _sizes(samples, block_size, cell.decoder), {part.block_size for part in parts}
    return [part for part in parts if part.block_size is None or part.block_size in sizes or sizes - timed]


def _unexplained(phases: tuple[stats.PhaseCost, ...], reason: str) -> ArmCosts:
    return ArmCosts(phases=phases, prediction=None, explanation=None, reason=reason, residual=unknown(reason))


def _phases(parts: Iterable[CostSample]) -> tuple[stats.PhaseCost, ...]:
    """Mean over rounds of the seconds of one pass, at each number of rows and context length.

    A mean and not a median, because what it has to predict is a sum: on a machine with neighbours times are skewed.
    """
    seconds: dict[Point, dict[str, float]] = defaultdict(dict)
    for sample in parts:
        of_point = seconds[sample.part, sample.block_size, sample.batch_size, sample.context_tokens]
        of_point[f"{sample.launch_id} {sample.round}"] = sample.wall_s / sample.num_repeats
    return tuple(
        stats.PhaseCost(
            part=part,
            block_size=size,
            num_rows=rows,
            context_tokens=tokens,
            seconds=stats.mean_time(list(by_round.values())),
        )
        for (part, size, rows, tokens), by_round in sorted(seconds.items(), key=_in_order)
    )


def _in_order(item: tuple[Point, object]) -> tuple[CostPart, int, int, int]:
    part, size, rows, tokens = item[0]
    return part, size or 0, -rows, tokens


def _sizes(samples: Sequence[SpeedSample], block_size: int | None, decoder: DecoderSpec) -> set[int]:
    """Block sizes of the recorded forwards; without any, the decoder's own."""
    seen = {one.part(decoder)[1] for sample in samples for one in sample.passes}
    return {size for size in (seen or {block_size}) if size is not None}


def _call(sample: SpeedSample, block_size: int | None, decoder: DecoderSpec, bookkeeping: bool) -> Call:
    """The forwards of a call: recorded ones or, in older runs, those that its decoder reports.

    ``bookkeeping``: an autoregressive loop's own work beside its steps was timed, too.
    """
    if not sample.passes:
        return _reported(sample, block_size)
    start = max(prompt.num_prompt_tokens for prompt in sample.prompts)
    end = start + max(prompt.num_tokens + prompt.num_discarded_tokens for prompt in sample.prompts)
    seen = [_seen(one, decoder, start, end) for one in sample.passes]
    steps = [one for one in seen if bookkeeping and one.part == "ar_step"]
    return [
        *seen,
        *(replace(one, part="bookkeeping", contexts=(0.0,), repeats=len(one.contexts) * one.repeats) for one in steps),
    ]


def _seen(passes: Passes, decoder: DecoderSpec, start: int, end: int) -> stats.PartPasses:
    """The context of each forward is not recorded, so they are spread evenly over the answer."""
    part, block_size = passes.part(decoder)
    if part == "prefill":
        contexts: tuple[float, ...] = (float(passes.tokens),)
    else:
        num, room = min(passes.num, MAX_CONTEXTS), max(0, end - start - passes.tokens)
        contexts = tuple(start + room * (place + 0.5) / num for place in range(num))
    return stats.PartPasses(
        part=part,
        block_size=block_size,
        contexts=contexts,
        repeats=passes.num / len(contexts),
        num_rows=passes.rows,
    )


def _reported(sample: SpeedSample, block_size: int | None) -> Call:
    """Forwards of the whole batch: as many as its longest row takes.

    In a batch, rows may take more forwards in different blocks, which counts per row do not show: then fewer forwards
    are predicted than there were, and the residual holds the rest.
    """
    context_passes = max(prompt.num_context_forwards for prompt in sample.prompts) - 1
    num_passes = max(prompt.num_denoiser_forwards for prompt in sample.prompts)
    if context_passes < 0:
        return ()
    if block_size is None and num_passes:
        raise NoEstimate("this decoder has no blocks, and no parts of its own were timed")
    counts = stats.CallCounts(
        prompt_tokens=max(prompt.num_prompt_tokens for prompt in sample.prompts),
        num_steps=context_passes if block_size is None else num_passes,
        block_size=block_size,
        num_context_passes=0 if block_size is None else context_passes,
    )
    return stats.passes_of(counts)


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
    """Median over rounds of each round's break-even, so that drift affects all its parts alike."""
    prompts = [prompt for sample in samples for prompt in sample.prompts]
    num_passes = sum(prompt.num_denoiser_forwards for prompt in prompts)
    if block_size is None or not num_passes:
        raise NoEstimate("the candidate denoises no blocks, so there is no break-even")
    blocks_per_nfe = sum(prompt.num_context_forwards - 1 for prompt in prompts) / num_passes
    needed = {"ar_step", "denoise", *(["context_pass"] if blocks_per_nfe else [])}
    by_round: dict[tuple[str, int], list[CostSample]] = defaultdict(list)
    for sample in (*parts[0], *parts[1]):
        if sample.part not in ("prefill", "bookkeeping") and sample.block_size in (None, block_size):
            by_round[sample.launch_id, sample.round].append(sample)
    values = []
    for of_round in by_round.values():
        if {sample.part for sample in of_round} == needed:
            table = stats.CostTable(_phases(of_round))
            value = stats.break_even(
                ar_step_s=table.seconds("ar_step", None, middle),
                denoise_s=table.seconds("denoise", block_size, middle),
                context_pass_s=table.seconds("context_pass", block_size, middle) if blocks_per_nfe else 0.0,
                blocks_per_nfe=blocks_per_nfe,
            )
            values.append(value)
    if not values:
        raise NoEstimate("no round has all parts of decoding timed alone")
    return stats.median(values)
