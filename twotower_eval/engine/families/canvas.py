"""Families without a cache: every call reads prompt and answer together, and nothing hides one token from another.

Prompts are clamped: they stand before the block that is denoised and never change. Shape letters: B rows, S positions
of a canvas (prompt and block), K block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from twotower_eval.engine.families.one_network import OneNetwork, own_lengths


@dataclass(frozen=True)
class Tokens:
    """The tokens of B rows. Nothing is computed for them until a canvas is read."""

    rows: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(len(row) for row in self.rows)

    def select(self, rows: Sequence[int]) -> Self:
        """Some rows, in that order."""
        return type(self)(tuple(self.rows[row] for row in rows))

    def join(self, other: Self) -> Self:
        """These rows, then the other's."""
        return type(self)(self.rows + other.rows)


class CanvasModel(OneNetwork[Tokens]):
    """Base of these families: they define :meth:`canvas_logits`, and ``shift`` where row p of it predicts token
    p + ``shift``."""

    reads_prompts = False
    shift = 0

    def canvas_logits(self, ids_BS: Tensor, lengths: Sequence[int]) -> Tensor:
        """Raw logits (B, S, V) float32 of whole canvases, rows padded on the right to S positions."""
        raise AssertionError(f"{type(self).__name__} does not define canvas_logits")

    def timed_logits(self, ids_BS: Tensor, lengths: Sequence[int], t_B: object) -> Tensor:
        """The same at times of a call; the few families that take a time define it."""
        return self.canvas_logits(ids_BS, lengths)

    def logits_at(self, ids_BS: Tensor, lengths: Sequence[int], places_BK: Tensor, t_B: object) -> Tensor:
        """Logits (B, K, V) float32 at some places of whole canvases, at times of a call."""
        logits_BSV = self.timed_logits(ids_BS, lengths, t_B)
        return logits_BSV[torch.arange(len(ids_BS))[:, None], places_BK.to(logits_BSV.device)]

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Tokens:
        """The prompts as they are; no forward."""
        lengths = own_lengths(ids_BS, lengths_B)
        return Tokens(tuple(tuple(row[:length]) for row, length in zip(ids_BS.tolist(), lengths, strict=True)))

    def extend(self, context: Tokens, ids_BK: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> Tokens:
        """The rows with K more tokens each, or each row's own number of them; no forward."""
        new = self.prefill(ids_BK, lengths_B).rows
        return Tokens(tuple(row + more for row, more in zip(context.rows, new, strict=True)))

    def denoise(self, block_BK: Tensor, context: Tokens, t_B: object = None) -> Tensor:
        """Logits (B, K, V) float32 of the token at each position of the block, from one call over the whole canvas.

        ``t_B`` has no effect on most of these families: they take no time.
        """
        rows = [row + tuple(block) for row, block in zip(context.rows, block_BK.tolist(), strict=True)]
        lengths = [len(row) for row in rows]
        padded = [row + (0,) * (max(lengths) - len(row)) for row in rows]
        first_B1 = torch.tensor(context.lengths)[:, None] - self.shift
        places_BK = (first_B1 + torch.arange(block_BK.shape[1])).clamp(min=0)
        return self.logits_at(torch.tensor(padded), lengths, places_BK, t_B)
