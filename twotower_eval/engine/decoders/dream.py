"""Dream's sampler (arXiv 2508.15487): no blocks, commits by a linear schedule in time, confidence by one of three
measures or none. Shape letters: B rows, G tokens of a canvas, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.canvas import Canvas, CanvasDecoder, Predicted, Shape
from twotower_eval.engine.decoders.commits import most_confident
from twotower_eval.engine.decoders.limits import within_top_k, within_top_p
from twotower_eval.engine.decoders.rows import check_counts, check_not_negative, check_temperature, check_top_p
from twotower_eval.errors import UserError

MEASURES = ("maskgit_plus", "topk_margin", "entropy", "origin")


@dataclass(frozen=True, kw_only=True)
class Params:
    """``alg``: confidence is the token's probability (``maskgit_plus``), its lead over the second (``topk_margin``), or
    the negative entropy (``entropy``); ``origin`` commits at random instead. ``steps`` None: as many as tokens. Time
    runs from 1 to ``eps``. ``top_p`` and ``top_k`` cut the distribution before confidence is taken from it.
    ``cfg_scale`` and ``commit_mask``: see canvas."""

    alg: Literal["maskgit_plus", "topk_margin", "entropy", "origin"] = "entropy"
    steps: int | None = None
    eps: float = 1e-3
    top_p: float | None = None
    top_k: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    commit_mask: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_counts(self, "steps", "top_k")
        check_not_negative(self, "cfg_scale")
        if not 0 < self.eps < 1:
            raise UserError(f"eps must lie between 0 and 1, not {self.eps!r}")
        if self.alg not in MEASURES:
            raise UserError(f"alg must be one of {', '.join(MEASURES)}, not {self.alg!r}")
        check_top_p(self.top_p)

    @property
    def sampled(self) -> bool:
        """Whether places are drawn at random."""
        return self.alg == "origin"


class Dream(CanvasDecoder[Params]):
    """Dream's ``diffusion_generate``."""

    KIND = "dream"
    Params = Params
    VERSION = 1

    def shape(self, max_new_tokens: int) -> Shape:
        """One block."""
        return Shape(max_new_tokens, max_new_tokens, self.params.steps or max_new_tokens)

    def is_open(self, canvas: Canvas) -> bool:
        """All steps are made, also those that commit nothing."""
        return canvas.step < canvas.shape.num_steps

    def limited(self, logits_BGV: Tensor) -> Tensor:
        """``top_p`` and ``top_k``; the first token that crosses ``top_p`` stays, and so do ties of the k-th."""
        if self.params.top_p is not None and self.params.top_p < 1:
            logits_BGV = within_top_p(logits_BGV, self.params.top_p)
        if self.params.top_k is not None:
            logits_BGV = within_top_k(logits_BGV, self.params.top_k)
        return logits_BGV

    def confidence(self, logits_BGV: Tensor, tokens_BG: Tensor) -> Tensor:
        """By the measure asked for, (B, G)."""
        probability_BGV = logits_BGV.softmax(-1)
        if self.params.alg == "topk_margin":
            first, second = probability_BGV.topk(2, dim=-1).values.unbind(-1)
            return first - second
        if self.params.alg == "entropy":
            return (probability_BGV * (probability_BGV + 1e-10).log()).sum(-1)
        return probability_BGV.gather(-1, tokens_BG[..., None])[..., 0]

    def taken(
        self, predicted: Predicted, eligible_BG: Tensor, canvases: Sequence[Canvas], call: Call, rows: Sequence[int]
    ) -> Tensor:
        """So many of the most confident masks, or each mask with a probability."""
        times = [self._times(canvas) for canvas in canvases]
        if self.params.alg == "origin":
            return torch.stack(
                [
                    _drawn(eligible_G, 1 - s / t if s is not None else 1.0, call, row)
                    for eligible_G, (t, s), row in zip(eligible_BG, times, rows, strict=True)
                ]
            )
        left = eligible_BG.sum(1).tolist()
        numbers = [num if s is None else int(num * (1 - s / t)) for num, (t, s) in zip(left, times, strict=True)]
        return most_confident(predicted.confidence_BG, eligible_BG, numbers)

    def _times(self, canvas: Canvas) -> tuple[float, float | None]:
        """Time before and after this step; None behind the last, which commits all that is left."""
        times = torch.linspace(1, self.params.eps, canvas.shape.num_steps + 1)
        last = canvas.step == canvas.shape.num_steps - 1
        return float(times[canvas.step]), None if last else float(times[canvas.step + 1])


def _drawn(eligible_G: Tensor, probability: float, call: Call, row: int) -> Tensor:
    """Each eligible position with this probability, by a draw for each in their order; (G,) boolean."""
    taken_G = torch.zeros_like(eligible_G)
    taken_G[eligible_G] = call.noise.uniform(row, int(eligible_G.sum())) < probability
    return taken_G
