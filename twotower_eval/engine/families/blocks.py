"""Families that keep the prompt and finished blocks in a cache: a token sees its own block and all earlier ones.

Blocks are counted from the first token of a row, prompt included. A pass over whole blocks and passes block after block
give the same, so that the cache is exact. Shape letters: B rows, S new tokens, T key columns, K block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from twotower_eval.engine.families.backbone import Backbone, Past
from twotower_eval.engine.families.kept import Kept, read_part
from twotower_eval.engine.families.one_network import OneNetwork, own_lengths

View = tuple[Tensor, Tensor, Tensor]  # positions (B, S), visible columns (B, S, T) and their blocks' numbers (B, T)
NOBODY = -1  # in place of a block's number or a token's position: a column of padding


@dataclass(frozen=True)
class BlockContext:
    """What was read of B rows: keys and values, the number of the block of every column, and each row's last raw logits
    (B, V). ``offsets`` are the places of a row's first block that stand empty before its first token."""

    past: Past
    block_BT: Tensor
    last_BV: Tensor
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    views: dict[int, View] = field(default_factory=dict, compare=False, repr=False)  # of blocks of a width, once made

    def select(self, rows: Sequence[int]) -> Self:
        """Some rows, in that order; all of them as they stand without a copy."""
        chosen = list(rows)
        if chosen == list(range(len(self.lengths))):
            return self
        lengths, offsets = (tuple(of[row] for row in chosen) for of in (self.lengths, self.offsets))
        return type(self)(self.past.select(chosen), self.block_BT[chosen], self.last_BV[chosen], lengths, offsets)

    def join(self, other: Self) -> Self:
        """These rows, then the other's."""
        width = max(self.block_BT.shape[1], other.block_BT.shape[1])
        block_BT = torch.cat([_wide(self.block_BT, width), _wide(other.block_BT, width)])
        last_BV = torch.cat([self.last_BV, other.last_BV])
        lengths, offsets = self.lengths + other.lengths, self.offsets + other.offsets
        return type(self)(self.past.joined(other.past), block_BT, last_BV, lengths, offsets)


def _wide(block_BT: Tensor, width: int) -> Tensor:
    return nn.functional.pad(block_BT, (0, width - block_BT.shape[1]), value=NOBODY)


class BlockModel(OneNetwork[BlockContext]):
    """Base of these families. ``block_size`` is that of the attention; where ``shift`` is 1, row p predicts the token
    p + 1, and the first token of a block is predicted by the last row before it. ``ends_with_prompt``: blocks are
    counted so that one ends where the prompt does, and the first may be shorter."""

    two_way = True
    block_size: int
    shift = 0
    ends_with_prompt = False

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> BlockContext:
        """Read prompts, rows padded on the right; a row may have no token."""
        num = len(ids_BS)
        empty = Past.nothing(num, self.backbone)
        none_BT = torch.zeros(num, 0, dtype=torch.int64)
        lengths = own_lengths(ids_BS, lengths_B)
        offsets = tuple(-length % self.block_size if self.ends_with_prompt else 0 for length in lengths)
        nothing = BlockContext(empty, none_BT, torch.zeros(num, self.vocab_size), (0,) * num, offsets)
        return nothing if max(lengths) == 0 else self._read(nothing, ids_BS, lengths)

    def extend(
        self, context: BlockContext, ids_BK: Tensor, lengths_B: Tensor | Sequence[int] | None = None
    ) -> BlockContext:
        """The context after K more tokens in every row, or each row's own number of them. The old one stays valid."""
        lengths = own_lengths(ids_BK, lengths_B)
        return self._read(context, ids_BK, lengths)

    def denoise(self, block_BK: Tensor, context: BlockContext, t_B: object = None) -> Tensor:
        """Logits (B, K, V) float32 of the token at each position of a block behind the context, which is not changed.

        ``t_B`` has no effect: these families take no time.
        """
        return self.denoise_kept(block_BK, context)[0]

    def denoise_kept(self, block_BK: Tensor, context: BlockContext, t_B: object = None) -> tuple[Tensor, Kept]:
        """As :meth:`denoise`; and the keys and values of context and block, for :meth:`denoise_part`."""
        num_new = block_BK.shape[1]
        if num_new not in context.views:
            context.views[num_new] = self.seen(context, num_new, [num_new] * len(block_BK))
        positions_BK, visible_BKT, block_BT = context.views[num_new]
        logits_BKV, past = self.backbone.read(block_BK, positions_BK, visible_BKT, context.past)
        if self.shift:
            logits_BKV = torch.cat([context.last_BV.to(logits_BKV.device)[:, None], logits_BKV[:, :-1]], dim=1)
        return logits_BKV, Kept(past, block_BT != NOBODY, (past.num_columns - num_new,) * len(block_BK))

    def denoise_part(self, part_BM: Tensor, starts: Sequence[int], context: BlockContext, kept: Kept) -> Tensor:
        """Logits (B, M, V) of the tokens at each row's places ``starts`` and behind it in the block, all else as it was
        when it was kept: approximate.

        With a shift, the first of them is predicted by its own row: nothing that is known here predicts it.
        """
        logits_BMV = read_part(self.backbone, part_BM, starts, context.lengths, kept)
        return torch.cat([logits_BMV[:, :1], logits_BMV[:, :-1]], dim=1) if self.shift else logits_BMV

    def next_logits(self, context: BlockContext) -> Tensor:
        """Logits (B, V) of each row's next token: known already where rows predict the token behind them, else those of
        a single mask, which is a forward."""
        if self.shift:
            return context.last_BV
        return super().next_logits(context)

    def _read(self, context: BlockContext, ids_BS: Tensor, lengths: Sequence[int]) -> BlockContext:
        positions_BS, visible_BST, block_BT = self.seen(context, ids_BS.shape[1], lengths)
        last_B1 = torch.tensor([[max(length - 1, 0)] for length in lengths])
        last_B1V, past = self.backbone.read(ids_BS, positions_BS, visible_BST, context.past, places_BM=last_B1)
        read_B = torch.tensor([length > 0 for length in lengths], device=last_B1V.device)
        last_BV = torch.where(read_B[:, None], last_B1V[:, 0], context.last_BV.to(last_B1V.device))
        total = tuple(before + new for before, new in zip(context.lengths, lengths, strict=True))
        return BlockContext(past, block_BT, last_BV, total, context.offsets)

    def seen(self, context: BlockContext, num_new: int, lengths: Sequence[int]) -> View:
        """Positions (B, S) of new tokens, the columns (B, S, T) that they see, theirs and earlier blocks', and the
        number of every column's block (B, T)."""
        positions_BS = torch.tensor(context.lengths)[:, None] + torch.arange(num_new)
        number_BS = (positions_BS + torch.tensor(context.offsets)[:, None]) // self.block_size
        real_BS = torch.arange(num_new) < torch.tensor(list(lengths))[:, None]
        block_BT = torch.cat([context.block_BT, torch.where(real_BS, number_BS, NOBODY)], dim=1)
        visible_BST = (block_BT[:, None] <= number_BS[:, :, None]) & (block_BT != NOBODY)[:, None]
        return positions_BS, visible_BST, block_BT
