"""The most confident masks first: LLaDA's sampler (arXiv 2502.09992, low-confidence remasking), and with ``threshold``
or ``factor`` that of Fast-dLLM v1 (arXiv 2505.22618) without its caches. Shape letters: B rows, G tokens of a canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.canvas import Canvas, CanvasDecoder, Predicted, Shape
from twotower_eval.engine.decoders.commits import (
    above_threshold,
    even_quotas,
    most_confident,
    num_by_factor,
    scheduled_quotas,
)
from twotower_eval.engine.decoders.rows import check_counts, check_not_negative, check_temperature
from twotower_eval.errors import UserError

QUOTAS = {"even": even_quotas, "scheduled": scheduled_quotas}


@dataclass(frozen=True, kw_only=True)
class Params:
    """``block_length`` None: one block, the whole answer. ``steps`` are those of all blocks together, None: a token a
    step; ``quotas`` spreads a block's commits over its steps. A ``threshold`` commits every mask whose confidence
    reaches it, a ``factor`` as many as :func:`~twotower_eval.engine.decoders.commits.num_by_factor` says, both at least
    one a step; then ``steps`` has no effect. ``cfg_scale`` and ``commit_mask``: see canvas."""

    block_length: int | None = None
    steps: int | None = None
    quotas: Literal["even", "scheduled"] = "even"
    threshold: float | None = None
    factor: float | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    commit_mask: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_counts(self, "block_length", "steps")
        check_not_negative(self, "threshold", "factor", "cfg_scale")
        if self.quotas not in QUOTAS:
            raise UserError(f"quotas must be one of {', '.join(QUOTAS)}, not {self.quotas!r}")
        if self.threshold is not None and self.factor is not None:
            raise UserError("threshold and factor are two rules for the same commits: give one of them")


class LowConfidence(CanvasDecoder[Params]):
    """Low-confidence remasking."""

    KIND = "low_confidence"
    Params = Params
    VERSION = 1

    @property
    def _by_quota(self) -> bool:
        return self.params.threshold is None and self.params.factor is None

    def shape(self, max_new_tokens: int) -> Shape:
        """UserError where even quotas cannot share the steps."""
        block_length = self.params.block_length or max_new_tokens
        num_blocks = -(-max_new_tokens // block_length)
        steps = self.params.steps
        if steps is None:
            return Shape(max_new_tokens, block_length, block_length)
        if steps % num_blocks and self._by_quota and self.params.quotas == "even":
            raise UserError(
                f"steps are shared by {num_blocks} blocks of {block_length} tokens: "
                f"{steps} is no multiple of {num_blocks}"
            )
        return Shape(max_new_tokens, block_length, -(-steps // num_blocks))

    def opened(self, canvas: Canvas) -> None:
        """How many commits each step of the block makes."""
        if self._by_quota:
            num_masked = canvas.span.stop - canvas.span.start
            num_steps = num_masked if self.params.steps is None else canvas.shape.num_steps
            canvas.quotas = list(QUOTAS[self.params.quotas](num_masked, num_steps))

    def is_open(self, canvas: Canvas) -> bool:
        """A schedule is kept to its end, also where its last steps commit nothing."""
        return bool(canvas.quotas) if self._by_quota else super().is_open(canvas)

    def taken(
        self, predicted: Predicted, eligible_BG: Tensor, canvases: Sequence[Canvas], call: Call, rows: Sequence[int]
    ) -> Tensor:
        """By threshold, by factor or by quota."""
        confidence_BG, params = predicted.confidence_BG, self.params
        if params.threshold is not None:
            return above_threshold(confidence_BG, eligible_BG, params.threshold, strict=False)
        if params.factor is None:
            return most_confident(confidence_BG, eligible_BG, [_quota(canvas) for canvas in canvases])
        ordered = [
            confidence_G[eligible_G].sort(descending=True).values.tolist()
            for confidence_G, eligible_G in zip(confidence_BG, eligible_BG, strict=True)
        ]
        return most_confident(confidence_BG, eligible_BG, [self.num_by_factor(row, params.factor) for row in ordered])

    def num_by_factor(self, sorted_confidence: Sequence[float], factor: float) -> int:
        """How many of a row's eligible positions a factor lets through."""
        return num_by_factor(sorted_confidence, factor)

    def num_forced(self, taken_G: Tensor, confidence_G: Tensor) -> int | None:
        """Commits below the threshold."""
        if self.params.threshold is None:
            return None
        return int((taken_G & (confidence_G < self.params.threshold)).sum())


def _quota(canvas: Canvas) -> int:
    """What this step commits; one where the schedule is at its end."""
    return canvas.quotas.pop(0) if canvas.quotas else 1
