"""BD3-LM: MDLM's network under a block-causal mask (Arriola et al., arXiv 2503.09573), behind a cache.

Keys are kept unrotated: positions count from the start of a window of ``max_length`` tokens, which moves on by whole
blocks as it fills. What moved out of it still shows in deeper layers of what stayed, as in the published sampler.
Shape letters: B rows, S new tokens, T key columns, K block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from twotower_eval.engine.families.backbone import Past
from twotower_eval.engine.families.canvas import CanvasModel, Tokens
from twotower_eval.engine.families.dit import DiT, View, load_dit
from twotower_eval.engine.families.mdlm import PREFIX, sizes_of
from twotower_eval.engine.families.one_network import OneNetwork, own_lengths
from twotower_eval.engine.families.settings import identify, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole
from twotower_eval.errors import FileError

NO_TOKEN = -1  # in place of a token's number in its row: a column of padding
LIMITS = ("sampling_eps_min", "sampling_eps_max")  # of training, stored beside the weights


@dataclass(frozen=True)
class WindowContext:
    """What was read of B rows: unrotated keys and values, and for every column the number of its token in its row."""

    past: Past
    number_BT: Tensor
    lengths: tuple[int, ...]

    def select(self, rows: Sequence[int]) -> Self:
        """Some rows, in that order."""
        chosen = list(rows)
        lengths = tuple(self.lengths[row] for row in chosen)
        return type(self)(self.past.select(chosen), self.number_BT[chosen], lengths)

    def join(self, other: Self) -> Self:
        """These rows, then the other's."""
        width = max(self.number_BT.shape[1], other.number_BT.shape[1])
        number_BT = torch.cat([_wide(self.number_BT, width), _wide(other.number_BT, width)])
        return type(self)(self.past.joined(other.past), number_BT, self.lengths + other.lengths)


def _wide(number_BT: Tensor, width: int) -> Tensor:
    return nn.functional.pad(number_BT, (0, width - number_BT.shape[1]), value=NO_TOKEN)


class BD3LM(OneNetwork[WindowContext]):
    """The network."""

    two_way = True
    max_length: int

    def __init__(self, network: DiT, block_size: int) -> None:
        super().__init__()
        self.network, self.block_size = network, block_size

    def prefill(self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None) -> WindowContext:
        """Read prompts, rows padded on the right; a row may have no token."""
        num = len(ids_BS)
        lengths = own_lengths(ids_BS, lengths_B)
        nothing = WindowContext(self.network.nothing(num), torch.zeros(num, 0, dtype=torch.int64), (0,) * num)
        return self._kept(nothing, ids_BS, lengths)

    def extend(
        self, context: WindowContext, ids_BK: Tensor, lengths_B: Tensor | Sequence[int] | None = None
    ) -> WindowContext:
        """The context after K more tokens in every row, or each row's own number of them. The old one stays valid."""
        lengths = own_lengths(ids_BK, lengths_B)
        return self._kept(context, ids_BK, lengths)

    def denoise(self, block_BK: Tensor, context: WindowContext, t_B: object = None) -> Tensor:
        """Logits (B, K, V) float32 of the token at each position of a block behind the context, which is not changed.

        ``t_B`` has no effect: published checkpoints take no time.
        """
        return self._read(context, block_BK, [block_BK.shape[1]] * len(block_BK))[0]

    def plain_logits(self, ids_BS: Tensor, *, sigma_B: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) of whole rows within a window, in one pass without a cache."""
        length = ids_BS.shape[1]
        block_S = torch.arange(length) // self.block_size
        visible_SS = block_S[:, None] >= block_S
        return self._masked(ids_BS, torch.arange(length), visible_SS, sigma_B=sigma_B)

    def doubled_logits(self, noisy_BS: Tensor, clean_BS: Tensor, block_size: int | None = None) -> Tensor:
        """Logits (B, S, V) of noisy rows, each of whose blocks sees itself and the clean blocks before it, from one
        pass over both (training's way)."""
        length = noisy_BS.shape[1]
        visible_SS = doubled_mask(length, block_size or self.block_size)
        positions_S = torch.arange(length).repeat(2)
        return self._masked(torch.cat([noisy_BS, clean_BS], dim=1), positions_S, visible_SS)[:, :length]

    def _masked(
        self, ids_BS: Tensor, positions_S: Tensor, visible_SS: Tensor, *, sigma_B: Tensor | None = None
    ) -> Tensor:
        positions_BS = positions_S.expand_as(ids_BS)
        view = View(positions_BS, positions_BS, visible_SS.expand(len(ids_BS), -1, -1))
        return self.network.read(ids_BS, view, sigma_B=sigma_B)[0]

    def _kept(self, context: WindowContext, ids_BS: Tensor, lengths: Sequence[int]) -> WindowContext:
        """All at once while it fits into the window, then block after block, as the window moves."""
        room = self.max_length - max(context.lengths)
        step = ids_BS.shape[1] if ids_BS.shape[1] <= room else self.block_size
        for start in range(0, ids_BS.shape[1], max(step, 1)):
            part_BS = ids_BS[:, start : start + step]
            num = [min(max(length - start, 0), part_BS.shape[1]) for length in lengths]
            context = self._read(context, part_BS, num)[1]
        return context

    def _read(self, context: WindowContext, ids_BS: Tensor, lengths: Sequence[int]) -> tuple[Tensor, WindowContext]:
        before_B1, new_B1 = torch.tensor(context.lengths)[:, None], torch.tensor(list(lengths))[:, None]
        places_S = torch.arange(ids_BS.shape[1])
        number_BS = torch.where(places_S < new_B1, before_B1 + places_S, NO_TOKEN)
        number_BT = torch.cat([context.number_BT, number_BS], dim=1)
        over_B1 = (before_B1 + new_B1 - self.max_length).clamp(min=0)
        first_B1 = -(-over_B1 // self.block_size) * self.block_size  # of the window
        block_BS1 = (number_BS // self.block_size)[:, :, None]
        seen_BT = (number_BT != NO_TOKEN) & (number_BT >= first_B1)
        visible_BST = seen_BT[:, None] & ((number_BT // self.block_size)[:, None] <= block_BS1)
        own_ST = nn.functional.pad(torch.eye(len(places_S), dtype=torch.bool), (context.number_BT.shape[1], 0))
        visible_BST = visible_BST | (own_ST & ~visible_BST.any(2, keepdim=True))  # padding sees itself
        view = View((number_BS - first_B1).clamp(min=0), (number_BT - first_B1).clamp(min=0), visible_BST)
        logits_BSV, past = self.network.read(ids_BS, view, context.past)
        total = tuple(old + new for old, new in zip(context.lengths, lengths, strict=True))
        return logits_BSV, WindowContext(past, number_BT, total)


class Uncached(CanvasModel):
    """The same without a cache: every call reads the window anew, so that nothing of what moved out of it is left."""

    def __init__(self, cached: BD3LM) -> None:
        super().__init__()
        self.cached, self.block_size = cached, cached.block_size

    def canvas_logits(self, ids_BS: Tensor, lengths: Sequence[int]) -> Tensor:
        """Rows within a window; padding behind them is in later blocks, or in the last one where it is seen: rows of
        unequal length are read one by one."""
        if len(set(lengths)) == 1:
            return self.cached.plain_logits(ids_BS)
        rows = [self.cached.plain_logits(row[None, :length])[0] for row, length in zip(ids_BS, lengths, strict=True)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def denoise(self, block_BK: Tensor, context: Tokens, t_B: object = None) -> Tensor:
        """As of the cached model, from the tokens of the window alone."""
        size, room = self.block_size, self.cached.max_length - block_BK.shape[1]
        firsts = [-(-max(length - room, 0) // size) * size for length in context.lengths]
        rows = tuple(row[first:] for row, first in zip(context.rows, firsts, strict=True))
        return super().denoise(block_BK, Tokens(rows), t_B)


def uncached(model: BD3LM) -> Uncached:
    """The same network, read without a cache."""
    made = Uncached(model)
    for name in ("checkpoint", "vocab_size", "max_length", "mask_token_id", "eos_token_ids", "tokenizer"):
        setattr(made, name, getattr(model, name))
    return made


def doubled_mask(length: int, block_size: int) -> Tensor:
    """What each of the noisy and then the clean tokens sees of them, (2 length, 2 length) boolean: the noisy ones their
    own block, and clean blocks before it; the clean ones clean blocks up to their own."""
    block_S = torch.arange(length) // block_size
    same_SS, before_SS = block_S[:, None] == block_S, block_S[:, None] > block_S
    upper = torch.cat([same_SS, before_SS], dim=1)
    lower = torch.cat([torch.zeros_like(same_SS), same_SS | before_SS], dim=1)
    return torch.cat([upper, lower])


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> BD3LM:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    config = read_json(folder / "config.json")
    for name, known in (("adaln", True), ("causal", False), ("time_conditioning", False)):
        if config.get(name, known) != known:
            raise FileError(f"{folder}: config.json has {name} {config[name]!r}; BD3-LM is known with {known!r} only")
    sizes = sizes_of(folder, config)
    tensors, checkpoint = read_whole(folder, family="bd3lm", dtype=dtype, devices=devices[:1])
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name not in LIMITS}
    network = load_dit(folder, sizes, named, dtype=dtype, device=devices[0])
    return identify(
        BD3LM(network, whole_number(folder, config, "block_size")),
        folder,
        config,
        checkpoint,
        vocab_size=sizes.vocab_size,
        max_length=whole_number(folder, config, "model_length"),
        mask_token_id=sizes.vocab_size - 1,
    )
