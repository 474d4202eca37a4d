"""SDAR's sampler (arXiv 2510.06303): block after block behind a cache, by quota, by threshold, or from left to right.

Shape letters: B rows, K block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.decoders.blocks import Block, BlockDecoder, Predicted
from twotower_eval.engine.decoders.commits import even_quotas, most_confident, scheduled_quotas, threshold_or_quota
from twotower_eval.engine.decoders.limits import within_top_k, within_top_p
from twotower_eval.engine.decoders.rows import check_counts, check_not_negative, check_temperature, check_top_p
from twotower_eval.errors import UserError

STRATEGIES = ("low_confidence_dynamic", "low_confidence_static", "sequential")


@dataclass(frozen=True, kw_only=True)
class Params:
    """``block_size`` None: that of the model. ``steps`` per block, None: a token a step. A step's quota is the block's
    size shared evenly over them, or its masks as ``scheduled`` by dLLM (see decoders.commits).

    ``low_confidence_static`` commits the quota's most confident masks; ``low_confidence_dynamic`` all masks above the
    ``threshold`` where these are as many as the quota, else as static; ``sequential`` the quota's first masks.
    ``top_k`` and ``top_p`` cut the distribution before confidence is taken from it. The original has no temperature 0:
    here that is the likeliest token with its own probability. ``commit_mask``: see decoders.canvas."""

    block_size: int | None = None
    steps: int | None = None
    quotas: Literal["even", "scheduled"] = "even"
    strategy: Literal["low_confidence_dynamic", "low_confidence_static", "sequential"] = "low_confidence_dynamic"
    threshold: float = 0.85
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 0.0
    commit_mask: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_counts(self, "block_size", "steps", "top_k")
        check_not_negative(self, "threshold")
        check_top_p(self.top_p)
        if self.quotas not in ("even", "scheduled"):
            raise UserError(f"quotas must be even or scheduled, not {self.quotas!r}")
        if self.strategy not in STRATEGIES:
            raise UserError(f"strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}")


class SDAR(BlockDecoder[Params]):
    """SDAR's ``block_diffusion_generate``, its quotas clamped to the masks that are left."""

    KIND = "sdar"
    Params = Params
    VERSION = 1

    def block_size(self) -> int:
        """The parameter's, else the model's. UserError for a size at which the model's attention has no blocks."""
        own: int | None = getattr(self.model, "block_size", None)
        size = self.params.block_size or own
        if size is None:
            raise UserError(f"decoder {self.KIND!r} needs a block size, and this model names none: --set block_size=16")
        return size

    def opened(self, block: Block) -> None:
        """Even quotas are of the block's size, whatever of it is known; scheduled ones are of its masks."""
        size, steps = len(block.tokens_K), self.params.steps or len(block.tokens_K)
        even = self.params.quotas == "even"
        block.quotas = list(even_quotas(size, steps) if even else scheduled_quotas(int(block.masked_K.sum()), steps))

    def limited(self, logits_BKV: Tensor) -> Tensor:
        """``top_k``, then ``top_p``."""
        if self.params.top_k is not None:
            logits_BKV = within_top_k(logits_BKV, self.params.top_k)
        return logits_BKV if self.params.top_p is None else within_top_p(logits_BKV, self.params.top_p)

    def taken(self, predicted: Predicted, blocks: Sequence[Block]) -> Tensor:
        """By the strategy."""
        masked_BK = torch.stack([block.masked_K for block in blocks])
        quotas = [block.quotas[min(block.step, len(block.quotas) - 1)] for block in blocks]
        if self.params.strategy == "sequential":
            return masked_BK & (masked_BK.cumsum(1) <= torch.tensor(quotas)[:, None])
        if self.params.strategy == "low_confidence_static":
            return most_confident(predicted.confidence_BK, masked_BK, quotas)
        return threshold_or_quota(predicted.confidence_BK, masked_BK, self.params.threshold, quotas)

    def num_forced(self, taken_K: Tensor, confidence_K: Tensor) -> int | None:
        """Commits that the threshold alone would not have let through."""
        if self.params.strategy != "low_confidence_dynamic":
            return None
        return int((taken_K & ~(confidence_K > self.params.threshold)).sum())
