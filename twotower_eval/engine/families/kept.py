"""Keys and values of a pass over a whole block or canvas, kept so that later passes read only a part of it.

What is not read again stays as the earlier tokens made it: where tokens see each other in both directions, that is an
approximation. Shape letters: B rows, M tokens of the part, T key columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from twotower_eval.engine.families.backbone import Backbone, Past
from twotower_eval.engine.families.canvas import CanvasModel, Tokens
from twotower_eval.errors import UserError


@dataclass(frozen=True)
class Kept:
    """Keys and values of B rows, which columns are no padding (B, T), and each row's first column of the block."""

    past: Past
    real_BT: Tensor
    firsts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.firsts)

    def select(self, rows: Sequence[int]) -> Self:
        """Some rows, in that order."""
        chosen = list(rows)
        return type(self)(self.past.select(chosen), self.real_BT[chosen], tuple(self.firsts[row] for row in chosen))

    def join(self, other: Self) -> Self:
        """These rows, then the other's."""
        width = max(self.real_BT.shape[1], other.real_BT.shape[1])
        wide = [nn.functional.pad(one.real_BT, (0, width - one.real_BT.shape[1])) for one in (self, other)]
        return type(self)(self.past.joined(other.past), torch.cat(wide), self.firsts + other.firsts)


def read_part(backbone: Backbone, part_BM: Tensor, starts: Sequence[int], lengths: Sequence[int], kept: Kept) -> Tensor:
    """Raw logits (B, M, V) of each row's tokens at the places ``starts`` and behind it in the block, which stands
    behind ``lengths`` tokens. They see each other, and every kept column but those in whose stead they come."""
    places_M = torch.arange(part_BM.shape[1])
    starts_B1 = torch.tensor(list(starts))[:, None]
    replaced_BM = torch.tensor(kept.firsts)[:, None] + starts_B1 + places_M
    seen_BT = kept.real_BT.scatter(1, replaced_BM, torch.zeros_like(replaced_BM, dtype=torch.bool))
    visible_BT = torch.cat([seen_BT, torch.ones_like(replaced_BM, dtype=torch.bool)], dim=1)
    visible_BMT = visible_BT[:, None].expand(-1, part_BM.shape[1], -1)
    positions_BM = torch.tensor(list(lengths))[:, None] + starts_B1 + places_M
    return backbone.read(part_BM, positions_BM, visible_BMT, kept.past)[0]


class BackboneCanvas(CanvasModel):
    """A canvas read by transformers' layers: every token sees every token of its row, and padding is hidden."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def canvas_logits(self, ids_BS: Tensor, lengths: Sequence[int]) -> Tensor:
        """Positions count from 0."""
        return self.backbone.logits(ids_BS, *self._seen(ids_BS, lengths))

    def logits_at(self, ids_BS: Tensor, lengths: Sequence[int], places_BK: Tensor, t_B: object) -> Tensor:
        """The head reads these places alone."""
        return self.backbone.logits(ids_BS, *self._seen(ids_BS, lengths), places_BM=places_BK)

    def denoise_kept(self, block_BK: Tensor, context: Tokens) -> tuple[Tensor, Kept]:
        """As :meth:`denoise`; and the keys and values of the whole canvas, for :meth:`denoise_part`."""
        rows = [row + tuple(block) for row, block in zip(context.rows, block_BK.tolist(), strict=True)]
        lengths = [len(row) for row in rows]
        width = max(lengths)
        ids_BS = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
        logits_BSV, past = self.backbone.read(ids_BS, *self._seen(ids_BS, lengths))
        first_B1 = torch.tensor(context.lengths)[:, None] - self.shift
        places_BK = (first_B1 + torch.arange(block_BK.shape[1])).clamp(min=0).to(logits_BSV.device)
        real_BS = torch.arange(width) < torch.tensor(lengths)[:, None]
        return logits_BSV[torch.arange(len(rows))[:, None], places_BK], Kept(past, real_BS, context.lengths)

    def denoise_part(self, part_BM: Tensor, starts: Sequence[int], context: Tokens, kept: Kept) -> Tensor:
        """Logits (B, M, V) of the tokens at each row's places ``starts`` and behind it in the block, all else as it was
        when it was kept: approximate. UserError for a family whose rows predict the token behind them."""
        if self.shift:
            raise UserError(f"family {self.checkpoint.family} predicts the first token of a part outside of the part")
        return read_part(self.backbone, part_BM, starts, context.lengths, kept)

    def _seen(self, ids_BS: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Positions (B, S), and what each token sees (B, S, S)."""
        positions_S = torch.arange(ids_BS.shape[1])
        visible_B1S = positions_S < torch.tensor(list(lengths))[:, None, None]
        return positions_S.expand_as(ids_BS), visible_B1S.expand(-1, ids_BS.shape[1], -1)
