"""Counts forwards, the only place where they are counted: per sequence, and how many sequences shared each.

A prefill counts one context forward for each row, an extension one, a denoiser call one denoiser forward. Decoders
name the rows that a call serves by selecting them; a row that has finished is no longer selected, so it no longer
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class CountedContext:
    """A model's context and the batch rows that it holds."""

    inner: Any
    rows: tuple[int, ...]

    def select(self, positions: Sequence[int]) -> CountedContext:
        """The context of some of these rows, by position within this context."""
        if tuple(positions) == tuple(range(len(self.rows))):
            return self
        return CountedContext(self.inner.select(positions), tuple(self.rows[p] for p in positions))

    def join(self, other: CountedContext) -> CountedContext:
        """The context of these rows, then of the other's."""
        return CountedContext(self.inner.join(other.inner), self.rows + other.rows)


class CountingModel:
    """A model as decoders see it, with ``num_context_forwards`` and ``num_denoiser_forwards`` for each batch row."""

    def __init__(self, model: Any, num_rows: int) -> None:
        self.model = model
        self.num_context_forwards = [0] * num_rows
        self.num_denoiser_forwards = [0] * num_rows

    def prefill(self, rows: Sequence[int], ids_BS: Tensor, lengths: Sequence[int]) -> CountedContext:
        """Prompts of the given rows."""
        context = self.model.prefill(ids_BS, lengths)
        self._count(self.num_context_forwards, rows)
        return CountedContext(context, tuple(rows))

    def extend(self, context: CountedContext, ids_BK: Tensor) -> CountedContext:
        """K more tokens for each row of the context."""
        extended = self.model.extend(context.inner, ids_BK)
        self._count(self.num_context_forwards, context.rows)
        return CountedContext(extended, context.rows)

    def denoise(self, block_BK: Tensor, context: CountedContext, t_B: Sequence[float] | None) -> Tensor:
        """Denoiser logits (B, K, V) for each row of the context."""
        logits: Tensor = self.model.denoise(block_BK, context.inner, t_B)
        self._count(self.num_denoiser_forwards, context.rows)
        return logits

    def next_logits(self, context: CountedContext) -> Tensor:
        """Logits (B, V) from the context as it is: no forward of a tower, not counted."""
        logits: Tensor = self.model.next_logits(context.inner)
        return logits

    def _count(self, counts: list[int], rows: Sequence[int]) -> None:
        for row in rows:
            counts[row] += 1


@dataclass
class RowSteps:
    """Rows that each forward of a kind served, in order."""

    rows: list[int] = field(default_factory=list)

    def share(self, width: int) -> float | None:
        """Row-steps that served a sequence, of all that ``width`` slots had; None where there was no forward."""
        return sum(self.rows) / (width * len(self.rows)) if self.rows else None


class WatchedModel:
    """A model that notes how many rows each of its forwards serves. Decoders made for it decode as for the model.

    Decoders never give a finished row to a forward, so every row here is work: it is one of a generation's forwards.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.prefills, self.extensions, self.denoisings = RowSteps(), RowSteps(), RowSteps()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prefill(self, ids_BS: Tensor, *more: Any) -> Any:
        """The model's own, noted."""
        self.prefills.rows.append(ids_BS.shape[0])
        return self._model.prefill(ids_BS, *more)

    def extend(self, context: Any, ids_BK: Tensor) -> Any:
        """The model's own, noted."""
        self.extensions.rows.append(ids_BK.shape[0])
        return self._model.extend(context, ids_BK)

    def denoise(self, block_BK: Tensor, *more: Any) -> Tensor:
        """The model's own, noted."""
        self.denoisings.rows.append(block_BK.shape[0])
        logits: Tensor = self._model.denoise(block_BK, *more)
        return logits
