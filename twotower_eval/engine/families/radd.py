"""RADD: a diffusion transformer that is told no time (Ou et al., arXiv 2406.03736). Logits at p predict the token at p.

Its config.json is that of its training, and names no type of model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.families.canvas import CanvasModel
from twotower_eval.engine.families.dit import DiT, Sizes, load_dit
from twotower_eval.engine.families.settings import identify, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole
from twotower_eval.errors import FileError


class RADD(CanvasModel):
    """The network."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.network = network

    def canvas_logits(self, ids_BS: Tensor, lengths: Sequence[int]) -> Tensor:
        """Every token sees every token of its row; positions count from 0, and padding is hidden."""
        return self.network.whole(ids_BS, lengths)


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> RADD:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    config = read_json(folder / "config.json")
    inner = config.get("model")
    if not isinstance(inner, dict):
        raise FileError(f"{folder}: config.json: model must be a table")
    sizes = Sizes(
        vocab_size=whole_number(folder, config, "tokens") + 1,
        hidden_size=whole_number(folder, inner, "hidden_size"),
        num_blocks=whole_number(folder, inner, "n_blocks"),
        num_heads=whole_number(folder, inner, "n_heads"),
        condition=None,
    )
    tensors, checkpoint = read_whole(folder, family="radd", dtype=dtype, devices=devices[:1])
    return identify(
        RADD(load_dit(folder, sizes, tensors, dtype=dtype, device=devices[0])),
        folder,
        config,
        checkpoint,
        vocab_size=sizes.vocab_size,
        max_length=whole_number(folder, inner, "length"),
        mask_token_id=sizes.vocab_size - 1,
    )
