"""Fast-dLLM v1's sampler (arXiv 2505.22618): the most confident masks of a canvas behind approximate caches.

The first pass of a block reads the whole canvas. Later ones read the block and what is behind it (``prefix``), or the
block alone (``dual``), and take all else as the first has read it. Shape letters: B rows, G canvas, M part, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.decoders import low_confidence
from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.canvas import Canvas, Predicted
from twotower_eval.engine.decoders.commits import num_by_factor, num_within_factor
from twotower_eval.engine.decoders.parts import STEPS_PER_TOKEN, alike, check_keeps, gathered, spread
from twotower_eval.engine.decoders.rows import Clock
from twotower_eval.engine.models.counting import CountedContext
from twotower_eval.engine.models.protocol import Model
from twotower_eval.errors import UserError

CACHES = ("none", "prefix", "dual")
FACTOR_RULES = {"until_first_failure": num_by_factor, "all_within": num_within_factor}


@dataclass(frozen=True, kw_only=True)
class Params(low_confidence.Params):
    """Those of low_confidence, and ``cache``: ``prefix`` and ``dual`` give cheaper steps and approximate answers.

    ``factor_rule`` says how a ``factor`` is read: ``until_first_failure`` is Fast-dLLM's own, ``all_within`` that of
    its port in dLLM. ``extra_step``: as published on 27 June 2025, at least one step follows a block's first pass, even
    where nothing is left to commit."""

    block_length: int | None = 32
    cache: Literal["none", "prefix", "dual"] = "none"
    factor_rule: Literal["until_first_failure", "all_within"] = "until_first_failure"
    extra_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache not in CACHES:
            raise UserError(f"cache must be one of {', '.join(CACHES)}, not {self.cache!r}")
        if self.factor_rule not in FACTOR_RULES:
            raise UserError(f"factor_rule must be one of {', '.join(FACTOR_RULES)}, not {self.factor_rule!r}")
        if self.cfg_scale and self.approximate:
            raise UserError("cfg_scale needs the whole canvas in every step: leave the cache out")

    @property
    def approximate(self) -> bool:
        """Whether tokens are predicted from stale keys and values."""
        return self.cache != "none"


OwnParams = Params  # the class below has an attribute of that name


class FastDLLMv1(low_confidence.LowConfidence):
    """``generate``, ``generate_with_prefix_cache`` and ``generate_with_dual_cache``."""

    KIND = "fast_dllm_v1"
    Params = Params
    VERSION = 1
    params: OwnParams

    def __init__(self, model: Model, params: OwnParams, *, clock: Clock | None = None) -> None:
        super().__init__(model, params, clock=clock)
        if self.params.approximate:
            check_keeps(model, self.KIND, f"cache={self.params.cache}")

    def is_open(self, canvas: Canvas) -> bool:
        """While the block has masks, whatever a schedule says; where the mask token may win, it ends some time."""
        another = self.params.extra_step and self.params.approximate and canvas.step == 1
        is_over = self.params.commit_mask and canvas.step >= STEPS_PER_TOKEN * canvas.shape.block_length
        return another or (not is_over and bool(canvas.masked_G[canvas.span].any()))

    def taken(
        self, predicted: Predicted, eligible_BG: Tensor, canvases: Sequence[Canvas], call: Call, rows: Sequence[int]
    ) -> Tensor:
        """By threshold, factor or quota; behind a cache only of the block, as nothing before it is read again."""
        if self.params.approximate:
            eligible_BG = torch.stack([canvas.eligible(earlier_too=False) for canvas in canvases])
        return super().taken(predicted, eligible_BG, canvases, call, rows)

    def confidence(self, logits_BGV: Tensor, tokens_BG: Tensor) -> Tensor:
        """The token's probability, in float64."""
        return super().confidence(logits_BGV.double(), tokens_BG)

    def num_by_factor(self, sorted_confidence: Sequence[float], factor: float) -> int:
        """By the rule that was chosen; none of none."""
        return FACTOR_RULES[self.params.factor_rule](sorted_confidence, factor) if sorted_confidence else 0

    def together(self, canvases: Sequence[Canvas], context: CountedContext) -> list[list[int]]:
        """Rows that read their whole canvases, and rows that read the same part of theirs."""
        if not self.params.approximate:
            return super().together(canvases, context)
        own = [canvases[row] for row in context.rows]
        return alike(canvas.block if canvas.step else None for canvas in own)

    def predicted(self, call: Call, own: Sequence[Canvas], view: CountedContext, mask_id: int) -> Predicted:
        """From whole canvases or, behind what a block's first pass kept, from parts of them."""
        if not self.params.approximate:
            return super().predicted(call, own, view, mask_id)
        tokens_BG = torch.stack([canvas.tokens_G for canvas in own])
        if own[0].step == 0:
            logits_BGV, kept = call.counted.denoise_kept(tokens_BG, view)
            for place, canvas in enumerate(own):
                canvas.kept = (kept, place)
            return self._chosen(call, logits_BGV, mask_id, view.rows)
        span = own[0].span
        part = slice(span.start, None if self.params.cache == "prefix" else span.stop)
        starts = [span.start] * len(own)
        logits_BMV = call.counted.denoise_part(tokens_BG[:, part], starts, view, gathered([c.kept for c in own]))
        found = self._chosen(call, logits_BMV, mask_id, view.rows)
        return Predicted(*(spread(values_BM, starts, tokens_BG.shape[1]) for values_BM in found))
