"""Sizing runs: step costs, their floors, and the speedup at a given rate of commits.

Costs of a model whose weights are not at hand, never a measured speedup: claims do not read them. Layers that were not
built are extrapolated. Letters as in stats/intervals; F measured parts of a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from scipy.special import ndtr

from twotower_eval.analyse.compare.figures import Measured, measured
from twotower_eval.analyse.stats.costs import needed_tokens_per_nfe, predicted_speedup
from twotower_eval.analyse.stats.intervals import LEVEL, Floats, t_quantile
from twotower_eval.analyse.stats.speedup import NULL_LEVEL
from twotower_eval.errors import NoEstimate
from twotower_eval.records import ROUTINGS, CostPart, CostSample, Estimate, Method, verb_of
from twotower_eval.store import Run

SEED = 0
NUM_DRAWS = 2_000

# part, replica, batch size, block size, routing, steps: a timed item apart from its layers
Item = tuple[CostPart, int, int, int | None, str, int | None]


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One part of decoding beside its floor. ``extrapolated``: the whole model's cost, from ``pattern``'s layers."""

    part: CostPart
    batch_size: int
    block_size: int | None
    routing: str
    extrapolated: bool
    seconds: Measured
    floor_s: float | None
    num_experts_touched: float | None


class Drawn(TypedDict):
    """One row of costs, under the names that the statistics of costs use."""

    ar_step_s: float
    denoise_s: float
    context_pass_s: float
    block_size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockCosts:
    """Seconds of an AR step, a denoise step and a context pass, (Q,) each: as measured first, then bootstrap draws."""

    ar_Q: Floats
    denoise_Q: Floats
    context_Q: Floats
    block_size: int

    def draw(self, row: int) -> Drawn:
        """One row, as the statistics of costs want it."""
        return Drawn(
            block_size=self.block_size,
            ar_step_s=float(self.ar_Q[row]),
            denoise_s=float(self.denoise_Q[row]),
            context_pass_s=float(self.context_Q[row]),
        )


@dataclass(frozen=True, kw_only=True)
class ForcedBlock:
    """Whole blocks decoded at a forced rate: their speedup measured, and as the single steps predict it."""

    profile: str
    routing: str
    tokens_per_nfe: float
    speedup: Measured
    predicted: float

    @property
    def residual(self) -> float | None:
        """Predicted over measured, minus one; None where nothing was measured."""
        return None if self.speedup.estimate is None else self.predicted / self.speedup.estimate.value - 1


@dataclass(frozen=True, kw_only=True)
class RoutingCurve:
    """Speedup over tokens per NFE at one forced routing."""

    routing: str
    costs: BlockCosts
    break_even: Measured
    needed: Measured | None  # for the speedup that is claimed, if one is

    def speedup(self, tokens_per_nfe: float) -> float:
        """Of decoding, prefill left out."""
        return predicted_speedup(tokens_per_nfe, **self.costs.draw(0))


@dataclass(frozen=True, kw_only=True)
class SizingPoint:
    """One batch size and block size: a band of curves, and whole blocks that check them."""

    batch_size: int
    block_size: int
    curves: tuple[RoutingCurve, ...]
    blocks: tuple[ForcedBlock, ...]


class SizingRun:
    """One sizing run. NoEstimate where it has no complete round or no cost card.

    ``claimed`` is a speedup to look up in its curves.
    """

    def __init__(self, run: Run, claimed: float | None = None) -> None:
        self.run = run
        self.claimed = claimed
        cards = [event for event in run.events if event.get("kind") == "cost_card"]
        if not cards:
            raise NoEstimate(f"run {run.manifest.run_id} holds costs on random weights but no cost card")
        self.card: Mapping[str, Any] = cards[-1]["card"]
        self._seconds = _per_repeat(run.costs)
        self.rounds = _complete_rounds(self._seconds, int(cards[-1]["num_items"]))
        if not self.rounds:
            raise NoEstimate(f"run {run.manifest.run_id} on random weights has no complete measured round yet")
        self.pattern: str = self.card["built_pattern"]
        self.full_pattern: str = self.card["pattern"]
        self.context_tokens = run.costs[0].context_tokens
        self._touched = {(_item(s), s.pattern): s.num_experts_touched for s in run.costs}

    @property
    def extrapolated(self) -> bool:
        """Whether fewer layers were built than the config has."""
        return self.pattern != self.full_pattern

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        """The parts that were measured, the largest first."""
        return tuple(sorted({pattern for _, pattern in self._seconds}, key=lambda p: (-len(p), p)))

    @cached_property
    def _draws(self) -> dict[tuple[Item, str], Floats]:
        """Mean seconds of one repetition, (Q,), of every item and pattern; rounds drawn alike for all."""
        keys = list(self._seconds)
        seconds_RF = np.array([[self._seconds[key][r] for key in keys] for r in self.rounds])
        return dict(zip(keys, round_draws(seconds_RF, SEED).T, strict=True))

    def whole(self, item: Item) -> Floats:
        """Seconds (Q,) for all layers of the config: measured, or the sum of its layers' costs."""
        if not self.extrapolated:
            return self._draws[item, self.pattern]
        key = (item, "whole")
        if key not in self._fitted:
            fitted = [pattern for pattern in self.patterns if pattern != self.held_out]
            kinds, costs_QL = fit_layers(fitted, np.stack([self._draws[item, p] for p in fitted], axis=1))
            self._fitted[key] = costs_QL @ layer_counts([self.full_pattern], kinds)[0]
            counts_FL = layer_counts(self.patterns, kinds)
            seconds_F = np.array([self._draws[item, p][0] for p in self.patterns])
            self._fitted[item, "residual"] = counts_FL @ costs_QL[0] / seconds_F - 1
        return self._fitted[key]

    @cached_property
    def _fitted(self) -> dict[tuple[Item, str], Floats]:
        return {}

    @cached_property
    def held_out(self) -> str | None:
        """The first half of the built layers, which tests the fit; ``None`` where the fit needs it."""
        half = self.pattern[: len(self.pattern) // 2]
        others = [pattern for pattern in self.patterns if pattern != half]
        kinds = set(self.pattern)
        return half if half in self.patterns and len(others) > len(kinds) else None

    def fit_residuals(self, item: Item) -> dict[str, float]:
        """Relative error of the fitted layer costs at every measured part."""
        self.whole(item)
        return dict(zip(self.patterns, map(float, self._fitted[item, "residual"]), strict=True))

    @cached_property
    def steps(self) -> tuple[StepCost, ...]:
        """Every single step, whole blocks apart."""
        items = [item for item, pattern in self._seconds if pattern == self.pattern and item[0] != "forced_block"]
        return tuple(self._step(item) for item in sorted(items, key=_order) if item[1] == 0)

    def _step(self, item: Item) -> StepCost:
        part, _, batch_size, block_size, routing, _ = item
        wanted = (self.full_pattern, part, batch_size, block_size, routing)
        names = ("pattern", "part", "batch_size", "block_size", "routing")
        floors = [f["floor_s"] for f in self.card["floors"] if tuple(f[name] for name in names) == wanted]
        return StepCost(
            part=part,
            batch_size=batch_size,
            block_size=block_size,
            routing=routing,
            extrapolated=self.extrapolated,
            seconds=self._measured(self.whole(item)),
            floor_s=next(iter(floors), None),
            num_experts_touched=self._touched[item, self.pattern],
        )

    @cached_property
    def nulls(self) -> dict[int, Measured]:
        """AR step over its own repetition in the same rounds, by batch size, 99 % interval."""
        found = {}
        for batch_size in sorted({item[2] for item, _ in self._seconds}):
            twice = [self._draws[_ar(batch_size, replica), self.pattern] for replica in (0, 1)]
            found[batch_size] = self._measured(twice[0] / twice[1], NULL_LEVEL)
        return found

    @cached_property
    def points(self) -> tuple[SizingPoint, ...]:
        """Every batch size and block size."""
        sizes = sorted({(item[2], item[3]) for item, _ in self._seconds if item[0] == "denoise"}, key=str)
        return tuple(self._point(batch, block) for batch, block in sizes if block is not None)

    def _point(self, batch_size: int, block_size: int) -> SizingPoint:
        curves = tuple(self._curve(batch_size, block_size, routing) for routing in ROUTINGS)
        items = [i for i, _ in self._seconds if i[0] == "forced_block" and i[2:4] == (batch_size, block_size)]
        blocks = tuple(self._block(item) for item in sorted(items, key=_order))
        return SizingPoint(batch_size=batch_size, block_size=block_size, curves=curves, blocks=blocks)

    def _costs(self, batch_size: int, block_size: int, routing: str, *, built: bool = False) -> BlockCosts:
        """Costs of the whole model, or with ``built`` of the layers that were built."""

        def seconds(item: Item) -> Floats:
            return self._draws[item, self.pattern] if built else self.whole(item)

        return BlockCosts(
            # Both copies of the AR step are the same thing.
            ar_Q=(seconds(_ar(batch_size, 0)) + seconds(_ar(batch_size, 1))) / 2,
            denoise_Q=seconds(("denoise", 0, batch_size, block_size, routing, None)),
            context_Q=seconds(("context_pass", 0, batch_size, block_size, routing, None)),
            block_size=block_size,
        )

    def _curve(self, batch_size: int, block_size: int, routing: str) -> RoutingCurve:
        costs = self._costs(batch_size, block_size, routing)
        needed = None if self.claimed is None else self._needed(costs, self.claimed)
        return RoutingCurve(routing=routing, costs=costs, break_even=self._needed(costs, 1.0), needed=needed)

    def _needed(self, costs: BlockCosts, speedup: float) -> Measured:
        """Tokens per NFE that the speedup needs; infinite in a resample where no rate reaches it."""
        figures = [needed_tokens_per_nfe(speedup, **costs.draw(row)) for row in range(len(costs.ar_Q))]
        if figures[0].value is None:
            return Measured(estimate=None, reason=figures[0].reason)
        return self._measured(np.array([np.inf if f.value is None else f.value for f in figures]))

    def _block(self, item: Item) -> ForcedBlock:
        _, _, batch_size, block_size, routing, num_steps = item
        assert block_size is not None
        name, num_blocks = next(
            (str(event["name"]), int(event["num_blocks"]))
            for event in self.run.events
            if event.get("kind") == "profile" and (event["block_size"], event["num_steps"]) == (block_size, num_steps)
        )
        assert num_steps is not None
        costs = self._costs(batch_size, block_size, routing, built=True)
        rate = block_size * num_blocks / num_steps
        speedup_Q = block_size * costs.ar_Q / self._draws[item, self.pattern]
        return ForcedBlock(
            profile=name,
            routing=routing,
            tokens_per_nfe=rate,
            speedup=self._measured(speedup_Q),
            predicted=predicted_speedup(rate, **costs.draw(0)),
        )

    def _measured(self, values_Q: Floats, level: float = 0.95) -> Measured:
        return measured(lambda: round_estimate(values_Q, num_rounds=len(self.rounds), seed=SEED, level=level))


def is_sizing_run(run: Run) -> bool:
    """Whether a run measured a size of model, on random weights."""
    return verb_of(run.manifest) == "size"


def _complete_rounds(
    seconds: Mapping[tuple[Item, str], Mapping[tuple[str, int], float]], num_items: int
) -> list[tuple[str, int]]:
    """Rounds, as (launch, number), in which every item was timed."""
    if len(seconds) < num_items:
        return []
    return sorted(set.intersection(*(set(of_round) for of_round in seconds.values())))


def _per_repeat(samples: Sequence[CostSample]) -> dict[tuple[Item, str], dict[tuple[str, int], float]]:
    """Seconds of one repetition by item and pattern, then by round; warm-ups left out."""
    found: dict[tuple[Item, str], dict[tuple[str, int], float]] = defaultdict(dict)
    for sample in samples:
        if sample.phase == "measure" and sample.pattern is not None and sample.wall_s > 0:
            found[_item(sample), sample.pattern][sample.launch_id, sample.round] = sample.wall_s / sample.num_repeats
    return found


def _item(sample: CostSample) -> Item:
    sizes = (sample.batch_size, sample.block_size, sample.routing or "", sample.num_steps)
    return (sample.part, sample.replica, *sizes)


def _ar(batch_size: int, replica: int) -> Item:
    return ("ar_step", replica, batch_size, None, "independent", None)


def _order(item: Item) -> tuple[int, ...]:
    parts = ("prefill", "ar_step", "denoise", "context_pass", "forced_block")
    part, replica, batch_size, block_size, routing, num_steps = item
    where = ROUTINGS.index(routing) if routing in ROUTINGS else -1
    return (batch_size, parts.index(part), block_size or 0, num_steps or 0, where, replica)


def round_draws(seconds_RF: Floats, seed: int) -> Floats:
    """Means over rounds, (Q, F): of all rounds first, then of rounds drawn with replacement, the same for all F."""
    num_rounds = seconds_RF.shape[0]
    drawn_QR = np.random.default_rng(seed).integers(num_rounds, size=(NUM_DRAWS, num_rounds))
    return np.concatenate([seconds_RF.mean(0)[None], seconds_RF[drawn_QR].mean(1)])


def round_estimate(values_Q: Floats, *, num_rounds: int, seed: int, level: float = LEVEL) -> Estimate:
    """Row 0 of (Q,) with an interval from the other rows; its ends may be infinite. NoEstimate for a single round."""
    if num_rounds < 2:
        raise NoEstimate("one round gives no interval: measure more")
    inflation = (num_rounds / (num_rounds - 1)) ** 0.5
    # No BCa: it compares draws with the value, and either may be infinite here.
    tail = float(ndtr(-t_quantile(level, num_rounds - 1) * inflation))
    low, high = (float(np.quantile(values_Q[1:], share, method="inverted_cdf")) for share in (tail, 1 - tail))
    method = Method(kind="round_bootstrap", num_resamples=NUM_DRAWS)
    return Estimate(value=float(values_Q[0]), low=low, high=high, level=level, n=num_rounds, method=method, seed=seed)


def fit_layers(patterns: Sequence[str], seconds_QF: Floats) -> tuple[str, Floats]:
    """Layer kinds, and seconds (Q, 1 + kinds) outside the layers and of one layer of each kind.

    Least squares of relative errors, no cost below zero. NoEstimate where the parts cannot separate the kinds.
    """
    kinds = "".join(sorted(set("".join(patterns))))
    counts_FL = layer_counts(patterns, kinds)
    if np.linalg.matrix_rank(counts_FL) < counts_FL.shape[1]:
        raise NoEstimate(f"{len(patterns)} parts cannot tell {len(kinds)} kinds of layers apart")
    from scipy.optimize import nnls  # takes long to import, and few reports are of sizing

    ones_F = np.ones(len(patterns))
    return kinds, np.array([nnls(counts_FL / row_F[:, None], ones_F)[0] for row_F in seconds_QF])


def layer_counts(patterns: Sequence[str], kinds: str) -> Floats:
    """(F, 1 + kinds): 1, and how many layers of each kind a pattern has."""
    return np.array([[1.0, *(pattern.count(kind) for kind in kinds)] for pattern in patterns])
